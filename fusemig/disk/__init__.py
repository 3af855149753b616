"""Disks: synchronous, thread-safe stacks of layers with one small interface.

``raw`` (an image file) and ``memory`` hold bytes; ``tracked`` is the guest's side of a disk: it admits writes through
the write gate and marks them in the dirty maps; ``fault`` fails on purpose. Nothing here knows trio, FUSE or a wire.
"""
