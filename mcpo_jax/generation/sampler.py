"""Prefill and decode in one compiled call; token ids only, no text.

Letters beside those of types.py: R prompts of the call, N samples of each,
rows = R * N sequences that are decoded together.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mcpo_jax import sharding
from mcpo_jax.generation import sampling
from mcpo_jax.models import decoder
from mcpo_jax.models.config import ModelConfig

Array = jax.Array


class Samples(NamedTuple):
  """Completions as ids. Behaviour is the law drawn from, raw the policy."""

  tokens: Array  # [R, N, C] int32, pad after the end
  mask: Array  # [R, N, C] bool, True up to and including the stop token
  behaviour_logps: Array  # [R, N, C] nats, 0 after the end
  behaviour_raw_logps: Array  # [R, N, C] nats, 0 after the end


class _State(NamedTuple):
  """What the decoding loop carries."""

  position: Array  # [] tokens of the completions so far
  last: Array  # [rows] int32, the newest token of each row
  caches: tuple[decoder.Cache, ...]  # one per model
  done: Array  # [rows] bool
  samples: Samples  # [rows, C] each


def make_generate_fn(
    config: ModelConfig,
    *,
    max_completion_length: int,
    stop_ids: Sequence[int],
    pad_id: int,
    compute_dtype: Any = jnp.float32,
    vocab_size: int | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., Samples]:
  """Makes the compiled sampler of one architecture.

  Args:
    config: of all the models.
    max_completion_length: C, the stop token included.
    stop_ids: tokens that end a completion; any number of them.
    pad_id: what stands after the end; it may be a stop id.
    compute_dtype: of products, activations and the cache.
    vocab_size: ids of the tokenizer; rows of the embedding beyond it are never
      drawn. None: all rows may be.
    mesh: if given, the outputs are whole on every device of it. Call it under
      `jax.set_mesh(mesh)` with rows split over ("data", "fsdp").

  Returns:
    generate(models, key, tokens, lengths, prompt_ids, sample_index, *,
    temperature, top_p) -> Samples, with

      models: tuple of (params, weight). Tokens are drawn from the law whose
        log-probabilities are the weighted sum of theirs; the first model is
        the raw policy.
      key: [] typed key made from the seed.
      tokens: [R, P] int32, padded on the right.
      lengths: [R] int32, at least 1.
      prompt_ids: [R, 2] uint32.
      sample_index: [R, N] int32. A sample depends on the weights, the seed,
        its prompt, its prompt id and its index, on nothing else of the call.
      temperature, top_p: [] see sampling.behaviour_logps.

    A prompt is prefilled once for its N samples. Decoding stops when all rows
    have ended. Compiled once per (R, N, P, number of models).
  """
  stops = np.array(sorted(set(stop_ids)), np.int32)
  batch = sharding.BATCH_SPEC[0]

  def generate(
      models, key, tokens, lengths, prompt_ids, sample_index, *,
      temperature, top_p,
  ):
    num_prompts, num_samples = sample_index.shape
    rows, length = num_prompts * num_samples, tokens.shape[1]
    params, weights = zip(*models)
    repeat = lambda x, axis=0: jnp.repeat(x, num_samples, axis=axis)
    keys = sampling.row_keys(key, repeat(prompt_ids), sample_index.reshape(-1))
    starts = repeat(lengths)

    def prefill(params):
      """One prefill per prompt; its cache repeated for the samples."""
      cache = decoder.init_cache(
          config, num_prompts, length + max_completion_length, compute_dtype
      )
      _, cache = decoder.prefill(params, config, tokens, lengths, cache)
      return decoder.Cache(
          keys=_pin_rows(repeat(cache.keys, 1), batch),
          values=_pin_rows(repeat(cache.values, 1), batch),
          lengths=repeat(cache.lengths),
      )

    def choose(state, logits):
      """Draws the token at state.position of every row that goes on."""
      logps = [jax.nn.log_softmax(x, axis=-1) for x in logits]
      mixed = sum(weight * x for weight, x in zip(weights, logps))
      if vocab_size is not None:
        known = jnp.arange(mixed.shape[-1])[None] < vocab_size
        mixed = jnp.where(known, mixed, -jnp.inf)
      law = sampling.behaviour_logps(
          mixed, temperature=temperature, top_p=top_p
      )
      drawn = sampling.draw(keys, law, position=state.position)
      pick = lambda x: jnp.take_along_axis(x, drawn[:, None], axis=-1)[:, 0]
      new = Samples(
          tokens=jnp.where(state.done, pad_id, drawn),
          mask=~state.done,
          behaviour_logps=jnp.where(state.done, 0.0, pick(law)),
          behaviour_raw_logps=jnp.where(state.done, 0.0, pick(logps[0])),
      )
      return state._replace(
          position=state.position + 1,
          last=drawn,
          done=state.done | jnp.isin(drawn, stops),
          samples=jax.tree.map(
              lambda whole, x: whole.at[:, state.position].set(x),
              state.samples,
              new,
          ),
      )

    def goes_on(state):
      return (state.position < max_completion_length) & ~jnp.all(state.done)

    def step(state):
      # The first step runs the last token of the prompt again, on purpose: so
      # there is one place that draws, and it is compiled once.
      results = [
          decoder.decode_step(
              p, config, cache, state.last, starts + state.position - 1
          )
          for p, cache in zip(params, state.caches)
      ]
      logits, caches = zip(*results)
      return choose(state._replace(caches=caches), logits)

    shape = (rows, max_completion_length)
    wide = jnp.promote_types(compute_dtype, jnp.float32)
    final = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
    state = _State(
        position=jnp.zeros((), jnp.int32),
        last=repeat(final),
        caches=tuple(prefill(p) for p in params),
        done=jnp.zeros(rows, bool),
        samples=Samples(
            tokens=jnp.full(shape, pad_id, jnp.int32),
            mask=jnp.zeros(shape, bool),
            behaviour_logps=jnp.zeros(shape, wide),
            behaviour_raw_logps=jnp.zeros(shape, wide),
        ),
    )
    state = jax.lax.while_loop(goes_on, step, state)
    return jax.tree.map(
        lambda x: x.reshape(num_prompts, num_samples, -1), state.samples
    )

  if mesh is None:
    return jax.jit(generate)
  return jax.jit(generate, out_shardings=sharding.replicated(mesh))


def _pin_rows(x, batch):
  """Keeps the rows of a cache [L, rows, ...] split, all else as it comes."""
  free = P.UNCONSTRAINED
  return sharding.constrain(x, free, batch, *[free] * (x.ndim - 2))
