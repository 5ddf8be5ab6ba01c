"""Make a transformer sparse without losing what it can do."""
