"""Preference optimization by contrastive divergence, in JAX.

    config = mcpo_jax.load_config("configs/quickstart.py", {"num_epochs": 1.0})
    run = mcpo_jax.train(config, "runs/quickstart")
    run.summary["score/difference"]
    run.model().generate(["name[Red Maple], type[inn]"]).text

What stands here is the public interface; `python -m mcpo_jax` calls the same
functions, and `notebooks/` shows it at work:

  load_config, train, Run      settings, a run, what its workdir holds
  load_model, Model            samples texts and scores them
  loss, draw, make_sets        an objective, the kernel, and sets to try them on
  exact                        small models, where every expectation is a sum
  objective, kernel, reward    declare functions of your own
  check_objective              says which property a loss lacks
  McpoError                    what everything raises

A name is imported when it is used: settings are checked before JAX is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
  from mcpo_jax.api import Model, Run, load_config, load_model, loss, train
  from mcpo_jax.errors import McpoError
  from mcpo_jax.kernels import exact
  from mcpo_jax.kernels.mc import draw
  from mcpo_jax.kernels.sets import make_sets
  from mcpo_jax.objectives.check import check_objective
  from mcpo_jax.user_code import kernel, objective, reward
else:
  def __getattr__(name: str) -> Any:
    if name not in _PLACES:
      raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place, _, attribute = _PLACES[name].partition(":")
    module = importlib.import_module(place)
    return getattr(module, attribute) if attribute else module

_PLACES = {
    "McpoError": "mcpo_jax.errors:McpoError",
    "Model": "mcpo_jax.api:Model",
    "Run": "mcpo_jax.api:Run",
    "check_objective": "mcpo_jax.objectives.check:check_objective",
    "draw": "mcpo_jax.kernels.mc:draw",
    "exact": "mcpo_jax.kernels.exact:",
    "kernel": "mcpo_jax.user_code:kernel",
    "load_config": "mcpo_jax.api:load_config",
    "load_model": "mcpo_jax.api:load_model",
    "loss": "mcpo_jax.api:loss",
    "make_sets": "mcpo_jax.kernels.sets:make_sets",
    "objective": "mcpo_jax.user_code:objective",
    "reward": "mcpo_jax.user_code:reward",
    "train": "mcpo_jax.api:train",
}

__all__ = [
    "McpoError", "Model", "Run", "check_objective", "draw", "exact", "kernel",
    "load_config", "load_model", "loss", "make_sets", "objective", "reward",
    "train",
]


def __dir__() -> list[str]:
  return [*globals(), *_PLACES]
