"""The control socket: QMP's server and the client of it that the command line uses."""
