"""Training: history -> bundle."""
