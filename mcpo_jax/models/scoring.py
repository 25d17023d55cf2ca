"""Log-probabilities of completions: per token, then per candidate."""

from typing import Any

import jax
import jax.numpy as jnp

from mcpo_jax.models import decoder
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import Params, Streams


def token_logps(
    params: Params,
    config: ModelConfig,
    streams: Streams,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
    head_chunk: int = 2048,
) -> jax.Array:
  """The log-probability of every scored token.

  The head runs only where a token is scored: the scored tokens of each stream
  are moved to its front and taken in chunks, and a chunk with none is skipped.
  So the logits of all tokens never exist at once.

  Args:
    params: the parameters.
    config: static.
    streams: [S, T] each.
    compute_dtype: of products and activations.
    remat: see decoder.hidden_states.
    head_chunk: tokens, over all streams, whose logits exist at once.

  Returns:
    [S, T] float32 nats (float64 if compute_dtype is); 0 where completion_mask
    is False.
  """
  num_streams, length = streams.tokens.shape
  hidden = decoder.hidden_states(
      params, config, streams, compute_dtype=compute_dtype, remat=remat
  )
  mask = streams.completion_mask
  order = jnp.argsort(~mask, axis=1)  # stable: scored tokens first, in order
  take = lambda x: jnp.take_along_axis(x, order, axis=1)
  hidden = jnp.take_along_axis(hidden, take(streams.source)[..., None], axis=1)

  width = min(length, max(1, head_chunk // num_streams))
  chunks = -(-length // width)

  def cut(x):  # [S, T, ...] -> [chunks, S, width, ...]
    fill = [(0, 0)] * x.ndim
    fill[1] = (0, chunks * width - length)
    x = jnp.pad(x, fill)
    x = x.reshape(num_streams, chunks, width, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  @jax.checkpoint
  def score(chunk):
    hidden, targets, wanted = chunk
    return jax.lax.cond(
        jnp.any(wanted), lambda: logps(hidden, targets), lambda: zeros
    )

  def logps(hidden, targets):
    logits = decoder.head_logits(params, config, hidden)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)

  zeros = jnp.zeros(
      (num_streams, width), jnp.promote_types(compute_dtype, jnp.float32)
  )
  out = jax.lax.map(
      score, (cut(hidden), cut(take(streams.tokens)), cut(take(mask)))
  )
  out = jnp.moveaxis(out, 0, 1).reshape(num_streams, -1)[:, :length]
  out = jnp.take_along_axis(out, jnp.argsort(order, axis=1), axis=1)
  return jnp.where(mask, out, 0.0)


def sequence_logps(
    token_logps: jax.Array,
    streams: Streams,
    *,
    num_sets: int,
    num_slots: int,
) -> jax.Array:
  """Sums the log-probabilities of each candidate's tokens.

  Args:
    token_logps: [S, T], 0 where no token is scored.
    streams: [S, T] each; prompt_slot < num_sets, candidate_slot < num_slots.
    num_sets: B.
    num_slots: K.

  Returns:
    [B, K] nats; 0 for a candidate that is not in these streams.
  """
  nowhere = num_sets * num_slots
  segment = streams.prompt_slot * num_slots + streams.candidate_slot
  segment = jnp.where(streams.candidate_slot >= 0, segment, nowhere)
  total = jax.ops.segment_sum(
      token_logps.reshape(-1),
      segment.reshape(-1),
      num_segments=nowhere + 1,
  )
  return total[:-1].reshape(num_sets, num_slots)
