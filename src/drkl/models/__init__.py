"""Models: load them, prune a student from a teacher, read their hidden states, generate."""
