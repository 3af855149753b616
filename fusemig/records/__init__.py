"""Durable records: who owns a disk, and what a group of daemons decided."""
