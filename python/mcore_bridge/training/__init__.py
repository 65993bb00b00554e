"""A training run: set-up, the loop, checkpoints, what watches over it."""
