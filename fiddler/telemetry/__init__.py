"""Timing of a step, and counts of the experts that it chose."""
