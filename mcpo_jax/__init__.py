"""Preference optimization by contrastive divergence, in JAX."""

import importlib

__version__ = "0.1.0"

# Imported on first use: settings are checked before JAX is imported.
_PLACES = {
    "check_objective": "mcpo_jax.objectives.check",
    "objective": "mcpo_jax.user_code",
}


def __getattr__(name: str):
  if name not in _PLACES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
  return [*globals(), *_PLACES]
