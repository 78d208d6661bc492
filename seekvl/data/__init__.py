"""Training samples at rest and in motion."""
