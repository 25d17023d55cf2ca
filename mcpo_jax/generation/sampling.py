"""From logits to one token per row: temperature, top-p, an addressed draw.

Two laws are kept apart. The raw policy is softmax(logits). The behaviour law
is what a token is drawn from: temperature first, then truncation to the
nucleus, renormalised. Everything is log-probabilities in nats; a token without
weight stands at -inf and is never drawn.

Letters: R rows, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


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


def behaviour_logps(
    logps: Array, *, temperature: Array, top_p: Array
) -> Array:
  """Log-probabilities of the law that tokens are drawn from.

  Args:
    logps: [R, V] log-probabilities or logits, float; -inf is no weight. Every
      row needs a finite entry.
    temperature: [] >= 0, divides the logits; 0 puts all weight on the first
      largest entry.
    top_p: [] in (0, 1], mass of the nucleus: the fewest tokens, most probable
      first, whose probabilities reach it. Of equally probable tokens those
      with the smaller id enter first. 1 leaves nothing out.

  Returns:
    [R, V] normalised.
  """
  # The largest entry is 0 before the division, so no temperature overflows it.
  top = jnp.max(logps, axis=-1, keepdims=True)
  tiny = jnp.finfo(logps.dtype).tiny
  tempered = (logps - top) / jnp.maximum(temperature, tiny).astype(logps.dtype)
  best = jnp.argmax(logps, axis=-1, keepdims=True)
  others = jnp.arange(logps.shape[-1])[None] != best
  tempered = jnp.where((temperature == 0) & others, -jnp.inf, tempered)
  tempered = jax.nn.log_softmax(tempered, axis=-1)
  return jax.lax.cond(
      top_p < 1, lambda x: _nucleus(x, top_p), lambda x: x, tempered
  )


def _nucleus(logps, top_p):
  """Keeps the smallest head of the sorted law that has mass top_p."""
  order = jnp.argsort(-logps, axis=-1, stable=True)
  probs = jnp.exp(jnp.take_along_axis(logps, order, axis=-1))
  # The mass before a token decides, so the first is always kept. Rounding of
  # this sum can move the edge of the nucleus, never draw what is outside it.
  before = jnp.cumsum(probs, axis=-1) - probs
  rows = jnp.arange(logps.shape[0])[:, None]
  keep = jnp.zeros(logps.shape, bool).at[rows, order].set(before < top_p)
  return jax.nn.log_softmax(jnp.where(keep, logps, -jnp.inf), axis=-1)


def row_keys(key: Array, prompt_ids: Array, sample_index: Array) -> Array:
  """One key per row from its address: a row never sees its batch mates.

  Args:
    key: [] typed key made from the seed.
    prompt_ids: [R, 2] uint32.
    sample_index: [R] int32 or uint32.

  Returns:
    [R] typed keys.
  """

  def one(ids, index):
    first = jax.random.fold_in(key, ids[0])
    return jax.random.fold_in(jax.random.fold_in(first, ids[1]), index)

  return jax.vmap(one)(prompt_ids, sample_index)


def draw(keys: Array, logps: Array, *, position: Array) -> Array:
  """Draws one token per row as argmax(log-probability + Gumbel noise).

  Args:
    keys: [R] typed keys of the rows.
    logps: [R, V] normalised, -inf on tokens without weight. A law with one
      token gives that token.
    position: [] index of the token within its completion, part of the address.

  Returns:
    [R] int32.
  """

  def noise(key):
    return jax.random.gumbel(
        jax.random.fold_in(key, position), logps.shape[-1:], logps.dtype
    )

  return jnp.argmax(logps + jax.vmap(noise)(keys), axis=-1).astype(jnp.int32)
