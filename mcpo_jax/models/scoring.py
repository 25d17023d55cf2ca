"""What is read from a model about completions: per token, then per candidate.

Log-probabilities, and the terms of the objectives that need more: sums over
each candidate's scored tokens of a function of the whole next-token law, of
the policy's or of the policy's and the reference's. The laws are looked at
chunk by chunk; logits of all tokens never exist at once.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mcpo_jax import sharding
from mcpo_jax.models import decoder
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import Array, Features, Params, SetBatch, Streams

TOP_K = 20  # tokens that the "topk" terms look at


# --- terms --------------------------------------------------------------------


class _Law(NamedTuple):
  """A model's next-token law before each of n tokens, and these tokens."""

  logits: jax.Array  # [..., V]
  log_z: jax.Array  # [...]
  tokens: jax.Array  # [...]

  @property
  def log_probs(self) -> jax.Array:
    return self.logits - self.log_z[..., None]

  @property
  def logps(self) -> jax.Array:
    picked = jnp.take_along_axis(self.logits, self.tokens[..., None], axis=-1)
    return picked[..., 0] - self.log_z


class _Seen(NamedTuple):
  """What a term is a function of. None where no term asks for it."""

  policy: _Law
  reference: _Law | None
  masks: jax.Array | None  # [..., masks] of SparsePO: first ratio, last KL
  confidence: float | None


def _collision(seen):
  """log sum_v pi(v)^2."""
  policy = seen.policy
  return jax.nn.logsumexp(2.0 * policy.logits, axis=-1) - 2.0 * policy.log_z


def _kl(seen):
  """KL(ref || pi)."""
  ref_log_probs = seen.reference.log_probs
  gaps = ref_log_probs - seen.policy.log_probs
  return jnp.sum(jnp.exp(ref_log_probs) * gaps, axis=-1)


def _risk(seen):
  """The part of KL(ref || pi) from tokens v whose gap exceeds a quantile.

  With gaps d = log ref - log pi, and confidence c: those of d_v above the
  (1 - c)-quantile of d over the vocabulary, every token counting alike,
  linear between order statistics.
  """
  ref_log_probs = seen.reference.log_probs
  gaps = ref_log_probs - seen.policy.log_probs
  threshold = jnp.quantile(
      _whole_laws(jax.lax.stop_gradient(gaps)),
      1.0 - seen.confidence,
      axis=-1,
      keepdims=True,
  )
  kept = jnp.where(gaps > threshold, gaps, 0.0)
  return jnp.sum(jnp.exp(ref_log_probs) * kept, axis=-1)


def _whole_laws(x):
  """x [S, ..., V] with the law of a token on one device, for what sorts it."""
  return sharding.constrain(x, *sharding.BATCH_SPEC)


def _top_log_probs(seen):
  """[..., k] of the most probable tokens, without gradient."""
  log_probs = _whole_laws(jax.lax.stop_gradient(seen.policy.log_probs))
  return jax.lax.top_k(log_probs, min(TOP_K, log_probs.shape[-1]))[0]


def _topk_mass(seen):
  return jnp.sum(jnp.exp(_top_log_probs(seen)), axis=-1)


def _topk_entropy(seen):
  """-sum p log p over the most probable tokens, p not normalised anew."""
  top = _top_log_probs(seen)
  return -jnp.sum(jnp.exp(top) * top, axis=-1)


def _masked_ratio(seen):
  return seen.masks[..., 0] * (seen.policy.logps - seen.reference.logps)


def _masked_kl(seen):
  return seen.masks[..., -1] * _kl(seen)


def _mask_size(seen):
  """Both masks, which are never negative; a shared one counts twice."""
  return seen.masks[..., 0] + seen.masks[..., -1]


# Name -> value at one token.
TERMS = {
    "collision": _collision,
    "kl": _kl,
    "risk": _risk,
    "prefix": lambda seen: seen.policy.logps,
    "ref_prefix": lambda seen: seen.reference.logps,
    "masked_ratio": _masked_ratio,
    "masked_kl": _masked_kl,
    "mask_size": _mask_size,
    "topk_mass": _topk_mass,
    "topk_entropy": _topk_entropy,
}
PREFIX_TERMS = ("prefix", "ref_prefix")
MASK_TERMS = ("masked_ratio", "masked_kl", "mask_size")
# Terms for which the reference's weights must be there.
REFERENCE_TERMS = ("kl", "risk", "ref_prefix", *MASK_TERMS)


# --- per token ----------------------------------------------------------------


def token_logps(
    params: Params,
    config: ModelConfig,
    streams: Streams,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
    head_chunk: int | None = None,
) -> jax.Array:
  """The log-probability of every scored token.

  Args:
    params: the parameters.
    config: static.
    streams: [S, T] each.
    compute_dtype: of products and activations.
    remat: see decoder.hidden_states.
    head_chunk: tokens, over all streams, whose logits exist at once; None: as
      many as the devices run fast.

  Returns:
    [S, T] float32 nats (float64 if compute_dtype is); 0 where completion_mask
    is False.
  """
  return token_values(
      params,
      config,
      streams,
      compute_dtype=compute_dtype,
      remat=remat,
      head_chunk=head_chunk,
  )["logps"]


def token_values(
    params: Params,
    config: ModelConfig,
    streams: Streams,
    *,
    hidden: jax.Array | None = None,
    terms: tuple[str, ...] = (),
    reference: Params | None = None,
    reference_config: ModelConfig | None = None,
    confidence: float | None = None,
    objective_params: Params | None = None,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
    head_chunk: int | None = None,
) -> dict[str, jax.Array]:
  """The log-probability and the terms of every scored token.

  The head runs only where a token is scored: the scored tokens of each stream
  are moved to its front and taken in chunks, and a chunk with none is skipped.

  Args:
    params, config, streams, compute_dtype, remat, head_chunk: see token_logps.
    hidden: [S, T, D] the policy's last hidden states, where the caller has
      them; None: computed here.
    terms, reference, reference_config, confidence, objective_params: see
      sequence_features.

  Returns:
    "logps" and each term -> [S, T] float32 (float64 if compute_dtype is); 0
    where completion_mask is False. Terms of a prefix are not yet cut to it.

  Raises:
    ValueError: at trace time, on an unknown term, or one whose reference,
      confidence or objective_params is missing.
  """
  _check_terms(terms, reference, confidence, objective_params)
  how = dict(compute_dtype=compute_dtype, remat=remat)
  if hidden is None:
    hidden = decoder.hidden_states(params, config, streams, **how)
  ref_hidden, masks = None, None
  if any(name in REFERENCE_TERMS for name in terms):
    reference = jax.lax.stop_gradient(reference)
    reference_config = reference_config or config
    ref_hidden, masks = _reference_states(
        reference,
        reference_config,
        streams,
        objective_params if set(terms) & set(MASK_TERMS) else None,
        **how,
    )
  heads = [decoder.split_head(params, config, hidden.dtype)]
  if ref_hidden is not None:
    heads.append(decoder.split_head(reference, reference_config, hidden.dtype))
  tokens, wanted = _parts(streams.tokens), _parts(streams.completion_mask)
  order = jnp.argsort(~wanted, axis=1)  # stable: scored tokens first, in order
  take = lambda x: jnp.take_along_axis(x, order, axis=1)
  num_streams, length = tokens.shape
  take_states = _sources(streams, take)

  head_chunk = head_chunk or _head_chunk()
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
    return jax.lax.cond(
        jnp.any(chunk[1]), lambda: values(chunk), lambda: zeros
    )

  def values(chunk):
    tokens, _, hidden, ref_hidden, masks = chunk
    policy = _law(heads[0], config, hidden, tokens)
    law = None
    if ref_hidden is not None:
      law = _law(heads[1], reference_config, ref_hidden, tokens)
    seen = _Seen(policy, law, masks, confidence)
    out = {"logps": policy.logps}
    return out | {name: TERMS[name](seen) for name in terms}

  dtype = jnp.promote_types(compute_dtype, jnp.float32)
  zeros = jnp.zeros((num_streams, width), dtype)
  zeros = {name: zeros for name in ("logps", *terms)}
  states = jax.tree.map(take_states, (hidden, ref_hidden, masks))
  chunks_of = (take(tokens), take(wanted), *states)
  out = jax.lax.map(score, jax.tree.map(cut, chunks_of))
  back = jnp.argsort(order, axis=1)

  def join(x):  # [chunks, S, width] -> [S, T]
    x = jnp.moveaxis(x, 0, 1).reshape(num_streams, -1)[:, :length]
    x = jnp.where(wanted, jnp.take_along_axis(x, back, axis=1), 0.0)
    return x.reshape(streams.tokens.shape)

  return jax.tree.map(join, out)


def _head_chunk():
  """Tokens of a chunk: few on a CPU, whose cache then holds the logits, and
  elsewhere enough that a product is worth reading the head for."""
  kind, _ = sharding.traced_devices()
  devices = math.prod(map(sharding.axis_size, ("data", "fsdp", "context")))
  return devices * (256 if kind == "cpu" else 1024)


def _parts(x):
  """[S, T, ...] to [S * parts, T / parts, ...]: a stream's tokens by the part
  of the mesh axis "context" that has them."""
  parts = sharding.axis_size("context")
  x = x.reshape(x.shape[0] * parts, -1, *x.shape[2:])
  return sharding.constrain(x, (*sharding.BATCH_SPEC[0], "context"))


def _sources(streams, reorder=lambda x: x):
  """A function that reads [S, T, ...] at each token's source, in `_parts`.

  Hardly a source lies in another part than its token: that of a part's first
  token, one before it, and the last token of the one prompt whose candidates
  go on from an earlier part. These two rows of each part are looked up, and no
  states are gathered.
  """
  parts = sharding.axis_size("context")
  source = _parts(streams.source)
  if parts == 1:
    index = reorder(source)[..., None]
    return lambda x: jnp.take_along_axis(x, index, axis=1)
  num_streams, length = streams.source.shape
  size = length // parts
  start = jnp.tile(size * jnp.arange(parts), num_streams)[:, None]
  earliest = jnp.min(
      source, axis=1, where=_parts(streams.completion_mask), initial=length - 1,
      keepdims=True,
  )
  rows = jnp.concatenate([jnp.maximum(start - 1, 0), earliest], axis=1)
  rows = rows.reshape(num_streams, -1)
  index = source - start
  index = jnp.where(index == -1, size, jnp.where(index < 0, size + 1, index))
  index = reorder(index)

  def read(x):
    more = (1,) * (x.ndim - 2)
    far = jnp.take_along_axis(x, rows.reshape(*rows.shape, *more), axis=1)
    far = far.reshape(num_streams * parts, 2, *x.shape[2:])
    return jnp.take_along_axis(
        jnp.concatenate([_parts(x), far], axis=1),
        index.reshape(*index.shape, *more), axis=1, mode="clip",
    )

  return read


def _check_terms(terms, reference, confidence, objective_params):
  needs = {
      "reference": (reference, REFERENCE_TERMS),
      "confidence": (confidence, ("risk",)),
      "objective_params": (objective_params, MASK_TERMS),
  }
  for name in terms:
    if name not in TERMS:
      raise ValueError(f"unknown term {name!r}, one of {tuple(TERMS)}")
    for what, (value, of) in needs.items():
      if name in of and value is None:
        raise ValueError(f"the term {name!r} needs {what}")


def _law(head, config, hidden, tokens):
  axes = sharding.axes_that_split(config.vocab_size)
  if axes:  # every device has all tokens, and its part of the vocabulary
    hidden = sharding.constrain(hidden)
  logits = decoder.head_logits(head, config, hidden)
  if axes:
    logits = sharding.constrain(logits, None, None, axes)
  return _Law(logits, jax.nn.logsumexp(logits, axis=-1), tokens)


def _reference_states(reference, config, streams, mask_params, **how):
  """Last hidden states [S, T, D] and, given parameters, masks [S, T, masks].

  A mask of SparsePO is relu(sum_l mixer_l relu(kernel_l . x_l + bias_l)), with
  x_l the layer-normed residual stream after the reference's layer l. It stands
  where its hidden states do: at the source of the token that it weighs.
  """
  if mask_params is None:
    return decoder.hidden_states(reference, config, streams, **how), None

  def probe(x, weights):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(x * x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(variance + config.rms_norm_eps)
    bias = weights["bias"].reshape(1, 1, -1)
    return jax.nn.relu(x @ weights["kernel"].T + bias)

  probe_weights = {name: mask_params[name] for name in ("kernel", "bias")}
  hidden, probed = decoder.probed_states(
      reference, config, streams, probe, probe_weights, **how
  )  # probed [L, S, T, masks]
  mixed = jnp.einsum("lstm,lm->stm", probed, mask_params["mixer"])
  return hidden, jax.nn.relu(mixed)


# --- per candidate ------------------------------------------------------------


def sequence_features(
    params: Params,
    config: ModelConfig,
    streams: Streams,
    sets: SetBatch,
    *,
    terms: tuple[str, ...] = (),
    reference: Params | None = None,
    reference_config: ModelConfig | None = None,
    confidence: float | None = None,
    objective_params: Params | None = None,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
    head_chunk: int | None = None,
) -> Features:
  """Log-probabilities and terms of every candidate.

  Args:
    params: the policy's parameters.
    config: static.
    streams: [S, T] each, of some or all of the sets.
    sets: [B, K]. With a prefix term the anchor "prefix_length" [B, K]: the
      number of scored tokens that count.
    terms: names in TERMS. Each is a sum over a candidate's scored tokens of
      "collision"     log sum_v pi(v)^2
      "kl"            KL(ref || pi)
      "risk"          the part of it from large gaps, see _risk
      "prefix"        log pi of the token, if among the first prefix_length
      "ref_prefix"    log ref of it, likewise
      "masked_ratio"  m_u (log pi - log ref) of the token; m_u, m_d: SparsePO
      "masked_kl"     m_d KL(ref || pi)
      "mask_size"     m_u + m_d
      "topk_mass"     probability of the TOP_K most probable tokens
      "topk_entropy"  -sum p log p over them; neither has a gradient
    reference: parameters of the reference, for REFERENCE_TERMS. No gradient
      reaches them.
    reference_config: its decoder; None: that of the policy.
    confidence: c of "risk", in [0, 1).
    objective_params: of `token_level.sparse_po_parameters`.
    compute_dtype: of products and activations.
    remat: see decoder.hidden_states.
    head_chunk: tokens, over all streams, whose logits exist at once, once for
      each of the two models.

  Returns:
    logps and terms [B, K] float32 (float64 if compute_dtype is); 0 for a
    candidate that is not in these streams, so that chunks add up.

  Raises:
    ValueError: see token_values.

  References:
    Zhou et al. 2024 (collision), https://arxiv.org/abs/2406.11827
    Zeng et al. 2024 (kl), https://arxiv.org/abs/2404.11999
    Shi et al. 2024 (topk), https://arxiv.org/abs/2410.11677
  """
  values = token_values(
      params,
      config,
      streams,
      terms=terms,
      reference=reference,
      reference_config=reference_config,
      confidence=confidence,
      objective_params=objective_params,
      compute_dtype=compute_dtype,
      remat=remat,
      head_chunk=head_chunk,
  )
  if set(terms) & set(PREFIX_TERMS):
    inside = _in_prefix(streams, sets.anchors["prefix_length"])
    values |= {
        name: jnp.where(inside, values[name], 0.0)
        for name in PREFIX_TERMS
        if name in terms
    }
  sums = {
      name: _sum_by_candidate(x, streams, *sets.role.shape)
      for name, x in values.items()
  }
  return Features(sums.pop("logps"), sums)


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
  return _sum_by_candidate(token_logps, streams, num_sets, num_slots)


def hidden_sums(
    params: Params,
    config: ModelConfig,
    streams: Streams,
    sets: SetBatch,
    *,
    compute_dtype: Any = jnp.float32,
) -> jax.Array:
  """Sums of the last hidden states that predict a candidate's scored tokens.

  Where all of a completion is scored these stand at the last prompt token up
  to the second-last completion token, as the CHES score has it.

  Args:
    params: the parameters.
    config: static.
    streams: [S, T] each.
    sets: [B, K].
    compute_dtype: of products and activations.

  Returns:
    [B, K, D] float32 (float64 if compute_dtype is), without gradient; 0 for a
    candidate that is not in these streams.

  References:
    Razin et al. 2024, https://arxiv.org/abs/2410.08847
  """
  hidden = decoder.hidden_states(
      jax.lax.stop_gradient(params),
      config,
      streams,
      compute_dtype=compute_dtype,
  )
  return _hidden_sums(hidden, streams, sets)


def held_out_values(
    params: Params,
    config: ModelConfig,
    streams: Streams,
    sets: SetBatch,
    *,
    compute_dtype: Any = jnp.float32,
    head_chunk: int | None = None,
) -> tuple[Features, jax.Array]:
  """What an evaluation reads of every candidate, from one forward pass.

  The most probable tokens are looked for on preferred completions alone: over
  a whole pool that search would cost a fourth of the pass.

  Args:
    params, config, streams, sets, compute_dtype, head_chunk: see
      sequence_features.

  Returns:
    Features [B, K] with the terms "topk_mass" and "topk_entropy", 0 outside
    slot 0; and [B, K, D], see hidden_sums. All without gradient, and 0 for a
    candidate that is not in these streams.
  """
  params = jax.lax.stop_gradient(params)
  how = dict(compute_dtype=compute_dtype)
  hidden = decoder.hidden_states(params, config, streams, **how)
  values = token_values(
      params, config, streams, hidden=hidden, head_chunk=head_chunk, **how
  )
  preferred = streams._replace(
      completion_mask=streams.completion_mask & (streams.candidate_slot == 0)
  )
  # Few tokens: small chunks leave most of the streams out.
  topk = token_values(
      params,
      config,
      preferred,
      hidden=hidden,
      terms=("topk_mass", "topk_entropy"),
      head_chunk=(head_chunk or _head_chunk()) // 4,
      **how,
  )
  sums = {
      name: _sum_by_candidate(x, streams, *sets.role.shape)
      for name, x in (topk | values).items()
  }
  return Features(sums.pop("logps"), sums), _hidden_sums(hidden, streams, sets)


def _hidden_sums(hidden, streams, sets):
  hidden = _sources(streams)(hidden).reshape(hidden.shape)
  hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
  hidden = jnp.where(streams.completion_mask[..., None], hidden, 0.0)
  return _sum_by_candidate(hidden, streams, *sets.role.shape)


def _segments(streams, num_slots, nowhere):
  """[S, T] b * K + k of the candidate of each token, `nowhere` of others."""
  segment = streams.prompt_slot * num_slots + streams.candidate_slot
  return jnp.where(streams.candidate_slot >= 0, segment, nowhere)


def _sum_by_candidate(values, streams, num_sets, num_slots):
  """[S, T, ...] -> [B, K, ...]."""
  nowhere = num_sets * num_slots
  total = jax.ops.segment_sum(
      values.reshape(-1, *values.shape[2:]),
      _segments(streams, num_slots, nowhere).reshape(-1),
      num_segments=nowhere + 1,
  )
  return total[:-1].reshape(num_sets, num_slots, *values.shape[2:])


def _in_prefix(streams: Streams, prefix_length: Array) -> jax.Array:
  """[S, T] bool, True on the first prefix_length [B, K] scored tokens.

  The tokens of a candidate stand side by side in one stream.
  """
  num_sets, num_slots = prefix_length.shape
  nowhere = num_sets * num_slots
  scored = streams.completion_mask.astype(jnp.int32)
  before = jnp.cumsum(scored, axis=1) - scored  # scored tokens of the stream
  segment = _segments(streams, num_slots, nowhere)
  first = jax.ops.segment_min(
      before.reshape(-1), segment.reshape(-1), num_segments=nowhere + 1
  )
  allowed = jnp.append(prefix_length.reshape(-1), 0)
  return before - first[segment] < allowed[segment]
