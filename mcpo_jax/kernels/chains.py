"""Markov chains over the pool of a set: k steps, each over fresh candidates.

On one fixed set a second categorical step changes nothing, so every step has
a block of negatives of its own, beside the candidate the chain stands on. The
transitions differ in how they choose among the two:

  categorical     by weight, among all of them
  metropolis      one of the block is proposed; accepted as Metropolis does
  barker          the same, accepted by the logistic function
  self_repellent  categorical, repelled by what was drawn more often at earlier
                  visits than its weight calls for

Candidates drawn independently from mu leave p = mu exp(s / temperature) / Z
invariant under the first three (`exact` enumerates this).
"""

import jax
import jax.numpy as jnp

from mcpo_jax.kernels import address, mc, weights
from mcpo_jax.types import Array, KernelInfo, KernelState, SetBatch

TRANSITIONS = ("categorical", "metropolis", "barker", "self_repellent")
INITS = ("preferred", "persistent", "model")


def walk(
    key: Array,
    state: KernelState | None,
    scores: Array,
    sets: SetBatch,
    *,
    transition: str,
    temperature: float | Array,
    num_negatives: int,
    num_steps: int,
    block_size: int | None,
    init: str,
    include_preferred: bool,
    repulsion: float | None,
    corrected: bool = False,
) -> tuple[KernelState, KernelInfo]:
  """Walks M independent chains per set and returns where they stand.

  A chain sorts the negatives of its set at random, the one it starts from
  left out; the block of step j is entries [j * block_size, (j + 1) *
  block_size). In sets with few negatives the last blocks are short, or empty:
  there the chain stays. All noise is addressed, see `mc.draw`.

  Args:
    key: typed key of the run's seed, the same at every step.
    state: of the last visit; `persistent` starts from its `selected` [B, M]
      (a slot that is no negative now: from the preferred), `self_repellent`
      reads its `history` [B, K]. None where neither is asked for.
    scores: [B, K] float, e.g. of `mc.kernel_scores`. No gradient flows.
      NaN makes the row's info NaN; the caller stops on it.
    sets: [B, K] the pool, the preferred completion in slot 0. A negative of
      multiplicity m counts as m candidates that share a block.
    transition: one of TRANSITIONS. All but `categorical` have the preferred
      completion among the candidates, whatever `include_preferred` says.
    temperature: > 0, may be traced.
    num_negatives: M >= 1.
    num_steps: k >= 1.
    block_size: candidates of one step; None: all of them, for one step.
    init: `preferred` every chain starts at slot 0; `persistent` where it
      stood; `model` at a slot drawn from the whole pool by weight.
    include_preferred: False: a chain that stands on the preferred completion
      must leave it, unless its block is empty.
    repulsion: >= 0; `self_repellent` multiplies the weight w of what was drawn
      n times by (w / (1 + n))^repulsion. A history in proportion to the weights
      changes nothing, so in the long run a fixed pool is drawn by weight, with
      less variance the stronger the repulsion.
    corrected: see `weights.proposal_correction`.

  Returns:
    state: KernelState, [B, M]; slot 0 where `selected_mask` is False: the
      chain stands on the preferred completion. `history` counts this draw
      under `self_repellent`, on slot 0 too, and passes through otherwise.
    info: KernelInfo; log-weights are those of the whole pool, not of a block,
      and know no history. Rows without candidates have zeros.

  Raises:
    ValueError: at trace time, on an unknown transition or init, or on steps
      whose blocks no set could fill.

  References:
    Chen et al. 2025, https://arxiv.org/abs/2502.04567
    Barker 1965, https://doi.org/10.1071/PH650119
    Doshi et al. 2023 (self-repellent random walks),
    https://arxiv.org/abs/2305.05097
  """
  block_size = _checked_block_size(
      sets, transition, init, num_steps, block_size
  )
  include_preferred = include_preferred or transition != "categorical"
  settings = {"temperature": temperature, "corrected": corrected}
  scores = jax.lax.stop_gradient(jnp.asarray(scores))
  log_weights = weights.log_weights(
      scores, sets, include_preferred=include_preferred, **settings
  )
  negative = weights.negatives(sets)
  start = jnp.zeros((len(negative), num_negatives), jnp.int32)
  if init == "persistent":
    there = jnp.take_along_axis(negative, state.selected, axis=1)
    start = jnp.where(there, state.selected, start)
  elif init == "model":
    whole = weights.log_weights(
        scores, sets, include_preferred=True, **settings
    )
  log_count = weights.log_counts(sets, corrected=False)
  attraction = log_weights
  if transition == "self_repellent":
    attraction += repulsion * (log_weights - jnp.log1p(state.history))

  def one_chain(chain, current):
    noise = lambda purpose, step=None: address.gumbel(
        key, sets, purpose=purpose, chain=chain, step=step
    )
    if init == "model":
      current = _argmax(whole + noise(address.CHAIN_START))
    fresh = jnp.logical_and(negative, ~_is_at(current, negative))
    order = jnp.where(fresh, -noise(address.CHAIN_BLOCKS), jnp.inf)
    block_of = jnp.argsort(jnp.argsort(order, axis=1), axis=1) // block_size

    def step(current, j):
      block = jnp.logical_and(fresh, block_of == j)
      move = noise(address.CHAIN_MOVE, j)
      if transition in ("categorical", "self_repellent"):
        return _categorical(move, current, block, attraction), None
      accept = noise(address.CHAIN_ACCEPT, j)
      proposal = _propose(move, current, block, log_count)
      accepted = _accept(
          accept, current, proposal, log_weights - log_count, transition
      )
      return jnp.where(accepted, proposal, current), None

    return jax.lax.scan(step, current, jnp.arange(num_steps))[0]

  selected = jax.vmap(one_chain, in_axes=(0, 1), out_axes=1)(
      jnp.arange(num_negatives), start
  )
  some = jnp.any(negative, axis=1)
  history = () if state is None else state.history
  if transition == "self_repellent":
    drawn = jax.nn.one_hot(selected, negative.shape[1], dtype=jnp.int32)
    history += jnp.where(some[:, None], jnp.sum(drawn, axis=1), 0)
  walked = KernelState(selected, selected > 0, history)
  info = mc.kernel_info(
      log_weights,
      weights.candidates(sets, include_preferred=include_preferred),
      scores,
      sets,
      walked,
      stayed=jnp.where(some, jnp.mean(selected == 0, axis=1), 0.0),
  )
  return walked, info


def _checked_block_size(sets, transition, init, num_steps, block_size):
  """The block size as a number; refuses what cannot be walked."""
  for name, known in ((transition, TRANSITIONS), (init, INITS)):
    if name not in known:
      raise ValueError(f"unknown {name!r}, one of {known}")
  pool = sets.role.shape[1] - 1
  if block_size is None and num_steps == 1:
    return max(pool, 1)
  if block_size is None:
    raise ValueError(f"{num_steps} steps need a block_size")
  if num_steps * block_size > pool:
    raise ValueError(
        f"{num_steps} steps of {block_size} candidates do not fit a pool of"
        f" {pool}"
    )
  return block_size


def _categorical(noise, current, block, log_weights):
  """[B] drawn by weight among the block and where the chain stands."""
  among = jnp.logical_or(block, _is_at(current, block))
  # A preferred completion that is left out has the weight -inf.
  among = jnp.logical_and(among, log_weights > -jnp.inf)
  drawn = _argmax(jnp.where(among, log_weights + noise, -jnp.inf))
  return jnp.where(jnp.any(among, axis=1), drawn, current)


def _propose(noise, current, block, log_count):
  """[B] drawn by multiplicity; the chain stands on one copy of its own."""
  smallest = jnp.finfo(log_count.dtype).min  # drawn if there is nothing else
  others = jnp.maximum(jnp.log(jnp.expm1(log_count)), smallest)
  log_weights = jnp.where(block, log_count, -jnp.inf)
  log_weights = jnp.where(_is_at(current, block), others, log_weights)
  return _argmax(log_weights + noise)


def _accept(noise, current, proposal, tilts, transition):
  """[B] bool, by how much the proposal outweighs where the chain stands."""
  take = lambda x, slot: jnp.take_along_axis(x, slot[:, None], axis=1)[:, 0]
  log_ratio = take(tilts, proposal) - take(tilts, current)
  if transition == "barker":
    return log_ratio + take(noise, proposal) > take(noise, current)
  log_uniform = -jnp.exp(-take(noise, proposal))
  return log_uniform <= log_ratio


def _argmax(keys):
  return jnp.argmax(keys, axis=1).astype(jnp.int32)


def _is_at(current, like):
  """[B, K] bool, True on the slot the chain stands on."""
  return jax.nn.one_hot(current, like.shape[1], dtype=bool)
