"""Small discrete models, where every expectation is a finite sum.

V outcomes stand for all completions of one prompt. A pool is a preferred
outcome and L candidates drawn independently from a proposal; N = V^(1 + L)
pools are all there are. The weights come from the kernel that trains.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mcpo_jax.kernels import mc
from mcpo_jax.types import Array, Features, KernelState, SetBatch


def tilted(log_base: Array, rewards: Array) -> tuple[jax.Array, jax.Array]:
  """The model p = mu exp(r) / Z.

  Args:
    log_base: [V] log mu, normalised.
    rewards: [V].

  Returns:
    log_p: [V]. log_z: [], log of E_mu exp(r); its gradient is E_p of that of r.
  """
  log_z = jax.nn.logsumexp(log_base + rewards)
  return log_base + rewards - log_z, log_z


def all_pools(num_outcomes: int, num_candidates: int) -> np.ndarray:
  """[N, 1 + L] int, every pool once; column 0 is the preferred outcome."""
  shape = (num_outcomes,) * (1 + num_candidates)
  return np.indices(shape).reshape(len(shape), -1).T


def pool_sets(pools: np.ndarray, anchors: dict[str, Array]) -> SetBatch:
  """Pools as a SetBatch. All of L are negatives, copies of y0 as well.

  Args:
    pools: [N, 1 + L] int.
    anchors: name -> [V], e.g. the reference's log-probabilities.
  """
  num_pools, num_slots = pools.shape
  role = np.full(pools.shape, -1, np.int8)
  role[:, 0] = 1
  ids = np.arange(num_pools, dtype=np.uint32)
  slots = np.arange(num_slots, dtype=np.uint32)
  return SetBatch(
      role=role,
      candidate_mask=np.ones(pools.shape, bool),
      candidate_id=np.broadcast_to(slots, pools.shape),
      multiplicity=np.ones(pools.shape, np.int32),
      scores=np.full(pools.shape, np.nan, np.float32),
      lengths=np.ones(pools.shape, np.int32),
      anchors={name: jnp.asarray(x)[pools] for name, x in anchors.items()},
      example_id=np.stack([ids, np.zeros_like(ids)], axis=1),
      visit=np.zeros(num_pools, np.int32),
      row=np.arange(num_pools, dtype=np.int32),
  )


def transition_matrix(
    pools: np.ndarray, log_weights: Array, log_proposal: Array
) -> jax.Array:
  """Law of one kernel step over fresh candidates.

  Args:
    pools: [N, 1 + L] of `all_pools`.
    log_weights: [N, 1 + L] of `weights.log_weights`.
    log_proposal: [V] law the candidates are drawn from.

  Returns:
    [V, V], row: where the chain stands; every row sums to 1.
  """
  num_outcomes = log_proposal.shape[0]
  log_pool = jnp.sum(log_proposal[pools[:, 1:]], axis=1, keepdims=True)
  matrix = jnp.zeros((num_outcomes, num_outcomes), log_proposal.dtype)
  return matrix.at[pools[:, :1], pools].add(jnp.exp(log_weights + log_pool))


def expected_pair_loss(
    loss: Callable[[Features, SetBatch], jax.Array],
    logps: Array,
    sets: SetBatch,
    log_weights: Array,
) -> jax.Array:
  """Mean over the draw z of a loss on (y0, y_z).

  Args:
    loss: (features, batch of two slots) -> [N].
    logps: [N, K]; the gradient flows through them and not through the weights.
    sets: [N, K].
    log_weights: [N, K] of `weights.log_weights`.

  Returns:
    [N], the sum over z of w_z loss(y0, y_z); z = 0 is a masked slot.
  """
  total = 0.0
  for slot in range(logps.shape[1]):
    selected = jnp.full((logps.shape[0], 1), slot, jnp.int32)
    state = KernelState(selected, jnp.full(selected.shape, slot > 0))
    pair_logps, pair = mc.take_drawn(logps, sets, state)
    weight = jnp.exp(log_weights[:, slot])
    total = total + weight * loss(Features(logps=pair_logps), pair)
  return total
