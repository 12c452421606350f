"""Why an objective does what it does: gradients, toys, a diagnosis."""
