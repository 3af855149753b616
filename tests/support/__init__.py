"""What several tests share: memory streams, a migration between two sides in one loop, a writing guest."""
