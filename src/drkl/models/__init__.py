"""Load a teacher or a student, make a smaller student from a teacher, generate."""
