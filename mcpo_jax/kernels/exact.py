"""Small discrete models, where every expectation is a finite sum.

V outcomes stand for all completions of one prompt. A pool is a preferred
outcome and L candidates drawn independently from a proposal; N = V^(1 + L)
pools are all there are. The weights come from the kernel that trains. A chain
whose every step has candidates of its own is a product of one step's matrices.

For a real model and K candidates the exact law over the pool is
`weights.log_weights` itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mcpo_jax.kernels import mc
from mcpo_jax.kernels import sets as sets_lib
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
  return sets_lib.make_sets(
      np.full(pools.shape, np.nan),
      anchors={name: x[pools] for name, x in anchors.items()})


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


def accepted_matrix(
    log_proposal: Array, log_tilts: Array, *, transition: str
) -> jax.Array:
  """Law of one `metropolis` or `barker` step, whatever the block's size.

  Args:
    log_proposal: [V] law the candidates are drawn from.
    log_tilts: [V] log of the model over that law, up to a constant: the
      reward, plus log mu - log q for candidates from q.
    transition: `metropolis` accepts y with min(1, exp(t_y - t_x)), `barker`
      with the logistic function of t_y - t_x.

  Returns:
    [V, V], row: where the chain stands; every row sums to 1.
  """
  accept = {
      "metropolis": lambda x: jnp.exp(jnp.minimum(x, 0.0)),
      "barker": jax.nn.sigmoid,
  }[transition]
  moves = jnp.exp(log_proposal)[None, :] * accept(
      log_tilts[None, :] - log_tilts[:, None]
  )
  moves = moves - jnp.diag(jnp.diag(moves))
  return moves + jnp.diag(1.0 - jnp.sum(moves, axis=1))


def total_variation(law: Array, other: Array) -> jax.Array:
  """[...] half the L1 distance of laws [..., V], in [0, 1]."""
  return 0.5 * jnp.sum(jnp.abs(law - other), axis=-1)


def stationarity_error(matrix: Array, law: Array) -> jax.Array:
  """[] total variation between `law` [V] and `law` after one step."""
  return total_variation(law @ matrix, law)


def mixing(
    matrix: Array, start: Array, law: Array, *, num_steps: int
) -> jax.Array:
  """[1 + num_steps] total variation to `law` after 0, 1, .. steps.

  Args:
    matrix: [V, V].
    start: [V] law the chain starts from.
    law: [V], of the model.
    num_steps: >= 0.
  """
  step = lambda at, _: (at @ matrix, total_variation(at, law))
  return jax.lax.scan(step, jnp.asarray(start), length=1 + num_steps)[1]


def spectral_gap(matrix: Array) -> float:
  """1 - |second eigenvalue|: what mixing gains per step in the long run."""
  moduli = np.sort(np.abs(np.linalg.eigvals(np.asarray(matrix))))
  return float(1.0 - moduli[-2])


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
