"""Teachers: the source of the distributions that a student learns to match."""
