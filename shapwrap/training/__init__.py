"""Training: the loop, on accelerate."""
