"""Training loop, run folders and checkpoints."""
