"""The FUSE shell: files of one directory, each a disk's guest side.

``export`` is what is shown; ``operations`` and ``mount`` are the pyfuse3 lane. This package is the only one that knows
pyfuse3, and the only place where errors become errnos.
"""
