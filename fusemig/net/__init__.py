"""Connections: byte streams over TCP, unix sockets and TLS, who may make them, and a small HTTP server."""
