"""How a mount outlives its daemon: who holds its descriptors, and how they come to the next one (docs/resilience.md).

Nothing here imports more of fusemig than the errors; `holder` and `dying` not even those.
"""
