"""The loss of reward models: the better completion wins its comparisons."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mcpo_jax.kernels import weights
from mcpo_jax.objectives import implicit
from mcpo_jax.types import Features, SetBatch


def bradley_terry_loss(
    features: Features, batch: SetBatch, state: Any
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """-log sigmoid(s_0 - s_i), the mean over the negatives i.

  Under Bradley and Terry's model sigmoid(s_0 - s_i) is the probability that
  completion 0 is preferred to i. No reference and no temperature: the scale of
  the scores is learned, their zero is not.

  Args:
    features: logps [B, J] are the scores s: of a reward model what its head
      gives, of a policy its log-probs. Nothing here takes them for nats.
    batch: [B, J], chosen in slot 0. A negative counts as often as it occurred;
      on a drawn set that is once.
    state: passed through.

  Returns:
    losses: [B] nats, not reduced. 0 without gradient on rows without a valid
      negative.
    aux: see `implicit.preference_aux`, rewards alone: they are the scores.
    state: as given.

  References:
    Bradley and Terry 1952, https://doi.org/10.2307/2334029
  """
  chex.assert_rank(features.logps, 2)
  chex.assert_equal_shape([features.logps, batch.role])
  scores = implicit.masked(features.logps, batch)
  negative = weights.negatives(batch)
  count = jnp.where(negative, batch.multiplicity, 0)
  margins = jnp.where(negative, scores[:, :1] - scores, 0.0)
  total = jnp.sum(-jax.nn.log_sigmoid(margins) * count, axis=1)
  losses = total / jnp.maximum(jnp.sum(count, axis=1), 1)
  aux = implicit.preference_aux(scores, scores, batch)
  return losses, {
      name: x for name, x in aux.items() if not name.startswith("logps/")
  }, state
