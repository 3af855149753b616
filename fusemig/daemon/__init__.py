"""The daemon: what serves disks, moves them and answers questions about them, put together from the layers below."""
