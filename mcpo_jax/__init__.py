"""Preference optimization by contrastive divergence, in JAX."""

__version__ = "0.1.0"
