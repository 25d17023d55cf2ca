"""Losses as pure functions on sequence log-probabilities."""
