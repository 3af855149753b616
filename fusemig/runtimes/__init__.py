"""What runs guests, as far as their move is concerned: QEMU over QMP, anything else by commands."""
