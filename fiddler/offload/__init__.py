"""Experts that do not fit the GPU: who computes them, where, and in which order."""
