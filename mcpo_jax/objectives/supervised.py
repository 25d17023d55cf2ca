"""Losses on the preferred completion alone."""

from typing import Any

import chex
import jax

from mcpo_jax.objectives import implicit
from mcpo_jax.types import Features, SetBatch


def sft_loss(
    features: Features, batch: SetBatch, state: Any
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Negative log-likelihood of slot 0, summed over its tokens.

  Args:
    features: logps [B, J].
    batch: [B, J]; no contrast and no anchor needed.
    state: passed through.

  Returns:
    losses: [B] nats, not reduced: the train step divides the sum by the global
      number of scored tokens, not by B. 0 where slot 0 is masked.
    aux: name -> [B], stopped gradients.
    state: as given.
  """
  chex.assert_rank(features.logps, 2)
  chex.assert_equal_shape([features.logps, batch.role])
  logps = implicit.masked(features.logps, batch)[:, 0]
  return -logps, {"logps/chosen": jax.lax.stop_gradient(logps)}, state
