"""Training: a thin `transformers.Trainer` subclass, and the runs made with it."""
