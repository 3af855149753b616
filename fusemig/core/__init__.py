"""The rules without I/O: maps, forecasts, state machines; nothing here sleeps, reads a clock or opens a file."""
