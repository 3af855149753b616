"""What lets a mount outlive its daemon: who holds the descriptors, and what the next daemon must know."""
