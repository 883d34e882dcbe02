"""Training loops, checkpoints and weight averaging."""
