"""Moving disks: ``source`` sends, ``destination`` receives, both over a byte stream that they are given.

Neither knows FUSE, QMP or the command line. ``reader`` and ``writer`` are the synchronous halves that run in worker
threads; ``link`` puts the native wire on a stream.
"""
