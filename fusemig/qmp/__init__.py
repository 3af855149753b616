"""QMP, the QEMU Machine Protocol: its bytes (`fusemig.qmp.codec`) and its vocabulary (`fusemig.qmp.schema`); pure."""
