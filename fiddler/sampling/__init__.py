"""Chooses a token from logits: penalties, truncation, constraints, log-probabilities."""
