"""Wires: stream formats, as pure codecs (bytes in, events out; no I/O, no clock). No wire imports another."""
