"""fusemig: VM disk images as FUSE files that move to another host while they are being written."""

__version__ = "0.1.0"
