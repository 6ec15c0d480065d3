"""Measurements: speed against what a user would otherwise run, and the laws at full size."""
