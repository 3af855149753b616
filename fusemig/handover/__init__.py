"""What one daemon hands over to the next: the state document, and the agreement that it can be read."""
