"""Training: what every stage shares."""
