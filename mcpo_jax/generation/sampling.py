"""From logits to one token per row: the law of a row and an addressed draw.

Two laws are kept apart. The raw policy is softmax(logits). The behaviour law
is what a token is drawn from: penalised, tempered, truncated, renormalised.
Everything is logits or log-probabilities in nats; a token without weight
stands at -inf and is never drawn. What no row asks for is not computed.

Letters: R rows, V vocabulary, K stop tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# A token is drawn in two stages: a block of this many tokens, then the token.
BLOCK = 128


class Sampling(NamedTuple):
  """How a completion is drawn; the same for all samples of a request.

  The order is that of other engines: repetition penalty on the logits,
  temperature, then top-k, min-p and top-p on what is left, renormalised.
  """

  temperature: float = 1.0  # divides the logits; 0 is greedy
  top_k: int = 0  # the k likeliest tokens; 0: all
  top_p: float = 1.0  # the fewest likeliest tokens with this mass; 1: all
  min_p: float = 0.0  # tokens at least this share as likely as the likeliest
  # On tokens that stand in the prompt or in the completion so far, as
  # transformers has it: positive logits are divided by it, others multiplied.
  repetition_penalty: float = 1.0
  min_new_tokens: int = 0  # no stop token before; stop strings still end it
  max_new_tokens: int | None = None  # None: the service's own limit
  stop_ids: tuple[int, ...] = ()  # end a completion, beside the service's own
  stop: tuple[str, ...] = ()  # texts that end it; they are left out of `text`


GREEDY = Sampling(temperature=0.0)


class Rows(NamedTuple):
  """What differs from row to row; the fields of Sampling and the address."""

  temperature: Array  # [R]
  top_k: Array  # [R] int32
  top_p: Array  # [R]
  min_p: Array  # [R]
  repetition_penalty: Array  # [R]
  stop_ids: Array  # [R, K] int32, -1 on empty places
  may_stop: Array  # [R] bool, False before min_new_tokens
  keys: Array  # [R] typed keys from row_keys
  positions: Array  # [R] int32, of the token within its completion


def plain(rows: Rows) -> Array:
  """[R] bool, True where the law is the raw policy."""
  return (
      (rows.temperature == 1)
      & (rows.top_k == 0)
      & (rows.top_p == 1)
      & (rows.min_p == 0)
      & (rows.repetition_penalty == 1)
      & rows.may_stop
  )


def law(logits: Array, rows: Rows, seen: Callable[[], Array]) -> Array:
  """Logits of the law that tokens are drawn from.

  Args:
    logits: [R, V] float; -inf is no weight. Every row needs a finite entry.
    rows: how each is drawn.
    seen: gives [R, V] bool, True on tokens of the prompt and the completion
      so far. Called only in the branch that is run when a row is penalised.

  Returns:
    [R, V], -inf on what is never drawn. At temperature 0 they are those of
    temperature 1; `draw` takes the best.
  """
  each = lambda x: x[:, None].astype(logits.dtype)

  def penalised(x):
    penalty = each(rows.repetition_penalty)
    return jnp.where(seen(), jnp.where(x > 0, x / penalty, x * penalty), x)

  def without_stops(x):
    barred = jnp.where(rows.may_stop[:, None], -1, rows.stop_ids)
    # A place outside the vocabulary is dropped; -1 would be its last token.
    barred = jnp.where(barred < 0, x.shape[1], barred)
    index = np.arange(len(x))[:, None]
    return x.at[index, barred].set(-jnp.inf, mode="drop")

  def tempered(x):
    # The largest entry is 0 before the division, so no temperature overflows.
    x = x - jnp.max(x, axis=-1, keepdims=True)
    greedy = rows.temperature == 0
    tiny = jnp.finfo(x.dtype).tiny
    return x / each(jnp.where(greedy, 1, jnp.maximum(rows.temperature, tiny)))

  def top_k(x):
    size = jnp.where(rows.top_k == 0, x.shape[1], rows.top_k)
    return _head(x, jnp.ones_like(x), size)

  def min_p(x):
    floor = jnp.max(x, axis=-1, keepdims=True) + jnp.log(each(rows.min_p))
    return jnp.where(x < floor, -jnp.inf, x)

  def top_p(x):
    mass = jnp.maximum(rows.top_p, jnp.finfo(rows.top_p.dtype).tiny)
    return _head(x, jax.nn.softmax(x, axis=-1), mass)

  for asked, change in (
      (rows.repetition_penalty != 1, penalised),
      (~rows.may_stop, without_stops),
      (rows.temperature != 1, tempered),
      (rows.top_k > 0, top_k),
      (rows.min_p > 0, min_p),
      (rows.top_p < 1, top_p),
  ):
    logits = jax.lax.cond(jnp.any(asked), change, lambda x: x, logits)
  return logits


def _head(logits: Array, weights: Array, mass: Array) -> Array:
  """Keeps the fewest largest logits whose weights reach a mass.

  Of equal logits those with the smaller id enter first. Nothing is sorted:
  sorting a vocabulary costs more than a small model. The last logit that
  enters is found bit by bit, one sum over the row for each.

  Args:
    logits: [R, V].
    weights: [R, V], at least 0.
    mass: [R], above 0; what the weights never reach keeps all.

  Returns:
    [R, V], -inf on what is left out.
  """
  bits = jnp.finfo(logits.dtype).bits
  unsigned = jnp.uint32 if bits == 32 else jnp.uint64
  # Floats as integers of the same order: negative ones count backwards.
  order = jax.lax.bitcast_convert_type(logits + 0.0, unsigned)
  sign = unsigned(1 << (bits - 1))
  order = jnp.where(order >= sign, ~order, order | sign)
  mass = mass[:, None].astype(weights.dtype)
  last = _last(order, weights, mass, bits)
  above = jnp.sum(jnp.where(order > last, weights, 0), axis=-1, keepdims=True)
  tied = order == last
  size = logits.shape[1]
  places = jnp.arange(size, 0, -1, dtype=jnp.uint32)[None]
  first = _last(
      places, jnp.where(tied, weights, 0), mass - above, size.bit_length()
  )
  keep = (order > last) | (tied & (places >= first))
  return jnp.where(keep, logits, -jnp.inf)


def _last(order, weights, mass, bits):
  """[R, 1] largest integer such that what is not below it reaches the mass."""

  def bit(i, found):
    higher = found | (order.dtype.type(1) << (bits - 1 - i).astype(order.dtype))
    inside = jnp.where(order >= higher, weights, 0)
    reached = jnp.sum(inside, axis=-1, keepdims=True) >= mass
    return jnp.where(reached, higher, found)

  start = jnp.zeros_like(mass, order.dtype)
  return jax.lax.fori_loop(0, bits, bit, start)


def row_keys(seeds: Array, prompt_ids: Array, sample_index: Array) -> Array:
  """One key per row from its address: a row never sees its batch mates.

  Args:
    seeds: [R] uint32.
    prompt_ids: [R, 2] uint32.
    sample_index: [R] int32 or uint32.

  Returns:
    [R] typed keys.
  """

  def one(seed, ids, index):
    key = jax.random.key(seed)
    for part in (ids[0], ids[1], index):
      key = jax.random.fold_in(key, part)
    return key

  return jax.vmap(one)(seeds, prompt_ids, sample_index)


def draw(logits: Array, rows: Rows) -> tuple[Array, Array]:
  """Draws one token per row, with noise that its address alone decides.

  First a block of tokens by the mass of each block, then a token of it: each
  is argmax(log-mass + Gumbel noise), so the token has exactly the law, at the
  noise of V / BLOCK + BLOCK entries instead of V.

  Args:
    logits: [R, V], -inf on tokens without weight.
    rows: temperature 0 takes the first largest entry; the others of the law
      have no meaning here any more.

  Returns:
    tokens [R] int32 and their log-probabilities [R].
  """
  size = logits.shape[1]
  short = -size % BLOCK
  if short:
    logits = jnp.pad(logits, ((0, 0), (0, short)), constant_values=-jnp.inf)
  blocks = logits.reshape(len(logits), -1, BLOCK)
  number = blocks.shape[1]

  def noise(key, position):
    key = jax.random.fold_in(key, position)
    return jax.random.gumbel(key, (number + BLOCK,), logits.dtype)

  greedy = (rows.temperature == 0)[:, None]
  noise = jnp.where(greedy, 0, jax.vmap(noise)(rows.keys, rows.positions))
  # The barriers keep XLA from reading all logits again for what the blocks
  # have told.
  best = jax.lax.optimization_barrier(jnp.max(blocks, axis=-1))
  top = jnp.max(best, axis=-1, keepdims=True)
  masses = jnp.sum(jnp.exp(blocks - top[..., None]), axis=-1)
  masses = jax.lax.optimization_barrier(masses)
  scores = jnp.where(greedy, best, jnp.log(masses) + noise[:, :number])
  block = jnp.argmax(scores, axis=-1)[:, None]
  within = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
  place = jnp.argmax(within + noise[:, number:], axis=-1)[:, None]
  log_z = top[:, 0] + jnp.log(jnp.sum(masses, axis=-1))
  logps = jnp.take_along_axis(within, place, axis=1)[:, 0] - log_z
  tokens = (block * BLOCK + place)[:, 0].astype(jnp.int32)
  return tokens, jnp.where(greedy[:, 0], 0 * logps, logps)
