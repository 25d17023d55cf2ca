"""The compiled parts of generation: prefill of prompts, a stretch of decoding.

Token ids only. What is large lives on the device from call to call (`Memory`);
what is small and changes with every request comes from the host (`Slots`).

Letters beside those of types.py: G groups of W slots in F equal parts, Q pages
of a part, C own tokens of a slot, K stop tokens of it, T tokens of a stretch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mcpo_jax import sharding
from mcpo_jax.generation import sampling
from mcpo_jax.models import decoder
from mcpo_jax.models.config import ModelConfig

Array = jax.Array

STRETCH = 64  # the most tokens of a slot that one call decodes

# Fields that Slots have from sampling.Sampling, as they are.
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty",
            "min_new_tokens")


class Memory(NamedTuple):
  """What stays on the device."""

  caches: tuple[decoder.Cache, ...]  # one per model
  prompts: Array  # [F, Q, PAGE] int32, tokens in the pages
  own: Array  # [G, W, C] int32, tokens in the own part of the cache


class Slots(NamedTuple):
  """The sample of each slot. A slot without one is not active."""

  active: Array  # [G, W] bool
  tokens: Array  # [G, W] int32, the newest token, not yet run
  counts: Array  # [G, W] int32, tokens drawn so far
  seeds: Array  # [G, W] uint32
  sample_index: Array  # [G, W] int32
  temperature: Array  # [G, W] float32, and so on: see sampling.Sampling
  top_k: Array
  top_p: Array
  min_p: Array
  repetition_penalty: Array
  min_new_tokens: Array
  max_new_tokens: Array
  stop_ids: Array  # [G, W, K] int32, -1 on empty places
  wanted: Array  # [G, W] bool, the prompt has further samples to begin
  queued: Array  # [] bool, further prompts wait for a group
  prompt_lengths: Array  # [G] int32, in the cache: all but the last token
  prompt_ids: Array  # [G, 2] uint32
  pages: decoder.Pages


class Drawn(NamedTuple):
  """The tokens of a stretch: of each slot the first `numbers`."""

  numbers: Array  # [G, W] int32
  ended: Array  # [G, W] bool, by a stop token or its limit
  tokens: Array  # [T, G, W] int32
  behaviour_logps: Array  # [T, G, W] nats, of the law that was drawn from
  behaviour_raw_logps: Array  # [T, G, W] nats, of the first model


class Kernels(NamedTuple):
  """The compiled functions; memory that is handed to them is used up.

  init(groups, slots, own_length, parts, pages, number of models) -> Memory.
  grow(memory, own_length, pages) -> Memory, with more of both or one; the
    own length is a multiple of that before.
  prefill(models, memory, tokens [F, P], lengths [F], pages [F, P / PAGE]) ->
    Memory; see decoder.prefill. Compiled once per P and shape of the memory.
  decode(models, weights [number of models], memory, slots, clock [],
    max_tokens []) -> (Memory, Drawn). clock counts the steps of all calls. A
    slot has at most C tokens when it ends. Compiled once per shape of the
    memory.
  score(params, tokens [F, P], lengths [F]) -> see decoder.prompt_logps.
    Compiled once per P.
  """

  init: Callable[..., Memory]
  grow: Callable[..., Memory]
  prefill: Callable[..., Memory]
  decode: Callable[..., tuple[Memory, Drawn]]
  score: Callable[..., tuple[Array, Array, Array]]


@functools.cache
def make_kernels(
    config: ModelConfig,
    *,
    compute_dtype: Any = jnp.float32,
    vocab_size: int | None = None,
    mesh: Mesh | None = None,
) -> Kernels:
  """Makes the compiled functions of one architecture.

  Args:
    config: of all the models.
    compute_dtype: of products, activations and the cache.
    vocab_size: ids of the tokenizer; rows of the embedding beyond it are never
      drawn. None: all rows may be.
    mesh: groups are split over ("data", "fsdp"), heads as the weights are.
      Call the functions under `jax.set_mesh(mesh)`.

  Returns:
    Kernels, the same for the same arguments. A sample depends on the weights
    of the models, its seed, prompt, prompt id, index and sampling alone.
  """
  beyond = None
  if vocab_size is not None and vocab_size < config.vocab_size:
    beyond = jnp.arange(config.vocab_size)[None] >= vocab_size

  def init(groups, slots, own_length, parts, pages, number):
    cache = lambda: decoder.init_cache(
        config, groups=groups, slots=slots, own_length=own_length, parts=parts,
        pages=pages, dtype=compute_dtype,
    )
    return pinned(Memory(
        caches=tuple(cache() for _ in range(number)),
        prompts=jnp.zeros((parts, pages, decoder.PAGE), jnp.int32),
        own=jnp.zeros((groups, slots, own_length), jnp.int32),
    ))

  def grow(memory, own_length, pages):
    times = own_length // memory.own.shape[2]
    # A token's column is the clock's remainder: in a ring of a whole multiple
    # of the length it stands at one of its copies, and ages hide the others.
    ring = lambda tree, axis: jax.tree.map(
        lambda x: jnp.concatenate([x] * times, axis), tree
    )

    def padded(tree):
      def pad(x):
        more = pages - x.shape[1]
        return jnp.pad(x, [(0, more * (i == 1)) for i in range(x.ndim)])

      return jax.tree.map(pad, tree)

    return pinned(Memory(
        caches=tuple(
            decoder.Cache(
                padded(c.page_keys), padded(c.page_values),
                ring(c.own_keys, 4), ring(c.own_values, 3),
            )
            for c in memory.caches
        ),
        prompts=padded(memory.prompts),
        own=ring(memory.own, 2),
    ))

  def pinned(memory):
    """Parts over the batch axes, heads over "tensor" where it divides them."""
    if mesh is None:
      return memory
    split = config.num_kv_heads % mesh.shape["tensor"] == 0
    heads = "tensor" if split else None
    batch = sharding.BATCH_SPEC[0]
    pin = lambda tree: jax.tree.map(
        lambda x: sharding.constrain(x, batch, None, heads), tree
    )
    return Memory(
        caches=tuple(decoder.Cache(*map(pin, c)) for c in memory.caches),
        prompts=sharding.constrain(memory.prompts, batch),
        own=sharding.constrain(memory.own, batch),
    )

  def prefill(models, memory, tokens, lengths, pages):
    parts = len(tokens)
    split = tokens.reshape(parts, -1, decoder.PAGE)
    where = jnp.arange(parts)[:, None], pages
    return pinned(Memory(
        caches=tuple(
            decoder.prefill(params, config, cache, tokens, lengths, pages)
            for params, cache in zip(models, memory.caches)
        ),
        prompts=memory.prompts.at[where].set(split, mode="drop"),
        own=memory.own,
    ))

  def choose(logits, weights, rows, active, seen):
    """Draws one token of every row: tokens [R] and both log-probs [R]."""
    raw = logits[0]

    def directly():
      tokens, logps = sampling.draw(raw, rows)
      return tokens, logps, logps

    def in_full():
      if len(logits) == 1:
        mixed = weights[0] * raw
      else:
        logps = [jax.nn.log_softmax(x, axis=-1) for x in logits]
        mixed = sum(weight * x for weight, x in zip(weights, logps))
      mixed = mixed.astype(raw.dtype)
      if beyond is not None:
        mixed = jnp.where(beyond, -jnp.inf, mixed)
      tokens, logps = sampling.draw(sampling.law(mixed, rows, seen), rows)
      of_raw = jnp.take_along_axis(raw, tokens[:, None], axis=1)[:, 0]
      return tokens, logps, of_raw - jax.nn.logsumexp(raw, axis=-1)

    if len(logits) > 1 or beyond is not None:
      return in_full()
    simple = jnp.all(sampling.plain(rows) | ~active) & (weights[0] == 1)
    return jax.lax.cond(simple, directly, in_full)

  def decode(models, weights, memory, slots, clock, max_tokens):
    shape = slots.active.shape
    flat = lambda x: x.reshape(shape[0] * shape[1], *x.shape[2:])
    ids = jnp.broadcast_to(slots.prompt_ids[:, None], (*shape, 2))
    keys = sampling.row_keys(
        flat(slots.seeds), flat(ids), flat(slots.sample_index)
    )
    own_length = memory.own.shape[2]

    def seen(own, column, counts):
      """[G * W, V] bool, True on the tokens in the cache."""
      size = config.vocab_size
      groups, starts = slots.pages
      parts = len(groups)
      part = jnp.arange(parts)[:, None]
      lengths = slots.prompt_lengths.reshape(parts, -1)[part, groups]
      place = starts[..., None] + jnp.arange(decoder.PAGE)[None, None]
      stored = (groups >= 0)[..., None] & (place < lengths[..., None])
      # Tokens outside the vocabulary are dropped.
      prompts = jnp.where(stored, memory.prompts, size)
      of_prompt = jnp.zeros((parts, shape[0] // parts, size), bool)
      of_prompt = of_prompt.at[
          part[..., None], groups[..., None], prompts
      ].set(True, mode="drop").reshape(shape[0], 1, size)
      age = jnp.mod(column - jnp.arange(own_length), own_length)[None, None]
      own = flat(jnp.where(age <= counts[..., None], own, size))
      of_own = jnp.zeros((len(own), size), bool)
      index = jnp.arange(len(own))[:, None]
      of_own = of_own.at[index, own].set(True, mode="drop")
      return flat(of_prompt | of_own.reshape(*shape, size))

    def goes_on(carry):
      step, idle, _, slots, _ = carry
      # Going back for new samples costs about what an eighth of a step does.
      return (
          (step < max_tokens)
          & jnp.any(slots.active)
          & (idle * 8 < slots.active.size)
      )

    def one_more(carry):
      step, idle, memory, slots, drawn = carry
      column = jnp.mod(clock + step, own_length)
      results = [
          decoder.decode_step(
              params, config, cache, slots.pages, slots.tokens,
              slots.prompt_lengths, slots.counts, column,
          )
          for params, cache in zip(models, memory.caches)
      ]
      logits, caches = zip(*results)
      own = jax.lax.dynamic_update_slice_in_dim(
          memory.own, slots.tokens[..., None], column, 2
      )
      rows = sampling.Rows(
          keys=keys,
          positions=flat(slots.counts),
          may_stop=flat(slots.counts >= slots.min_new_tokens),
          stop_ids=flat(slots.stop_ids),
          **{n: flat(getattr(slots, n)) for n in SETTINGS[:-1]},
      )
      chosen = choose(
          [flat(x) for x in logits], weights, rows, flat(slots.active),
          lambda: seen(own, column, slots.counts),
      )
      tokens, *logps = (x.reshape(shape) for x in chosen)
      counts = slots.counts + 1
      ended = jnp.any(tokens[..., None] == slots.stop_ids, axis=-1)
      ended = slots.active & (ended | (counts >= slots.max_new_tokens))
      write = lambda whole, x: jax.lax.dynamic_update_index_in_dim(
          whole, x, step, 0
      )
      drawn = Drawn(
          numbers=drawn.numbers + slots.active,
          ended=drawn.ended | ended,
          tokens=write(drawn.tokens, tokens),
          behaviour_logps=write(drawn.behaviour_logps, logps[0]),
          behaviour_raw_logps=write(drawn.behaviour_raw_logps, logps[1]),
      )
      slots = slots._replace(
          active=slots.active & ~ended, tokens=tokens, counts=counts
      )
      emptied = slots.queued & ~jnp.any(slots.active, axis=1, keepdims=True)
      missed = drawn.ended & (slots.wanted | emptied)
      idle = idle + jnp.sum(missed, dtype=jnp.int32)
      return step + 1, idle, Memory(caches, memory.prompts, own), slots, drawn

    zero = jnp.zeros((), jnp.int32)
    wide = jnp.promote_types(compute_dtype, jnp.float32)
    drawn = Drawn(
        numbers=jnp.zeros(shape, jnp.int32),
        ended=jnp.zeros(shape, bool),
        tokens=jnp.zeros((STRETCH, *shape), jnp.int32),
        behaviour_logps=jnp.zeros((STRETCH, *shape), wide),
        behaviour_raw_logps=jnp.zeros((STRETCH, *shape), wide),
    )
    carry = jax.lax.while_loop(
        goes_on, one_more, (zero, zero, memory, slots, drawn)
    )
    return pinned(carry[2]), carry[4]

  def score(params, tokens, lengths):
    return decoder.prompt_logps(
        params, config, tokens, lengths, compute_dtype=compute_dtype)

  # What the host reads is whole on every device.
  drawn = None if mesh is None else (None, sharding.replicated(mesh))
  return Kernels(
      init=jax.jit(init, static_argnums=range(6)),
      grow=jax.jit(grow, static_argnums=(1, 2)),
      prefill=jax.jit(prefill, donate_argnums=1),
      decode=jax.jit(decode, donate_argnums=2, out_shardings=drawn),
      score=jax.jit(score, out_shardings=drawn and drawn[1]),
  )
