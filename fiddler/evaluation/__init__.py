"""Measures a loaded model: speed and perplexity."""
