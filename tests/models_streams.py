"""Small inputs of a decoder for tests: streams, one set each, and weights."""

import jax
import numpy as np

from mcpo_jax.models import decoder
from mcpo_jax.types import Streams


def random_params(config, dtype=np.float32, scale=0.3):
  """Weights without compiling anything: all random, norms near their start."""
  rng = np.random.default_rng(1)

  def draw(path, shape):
    start = path[-1].key == "scale" and not config.norm_offset
    return (start + scale * rng.normal(size=shape.shape)).astype(dtype)

  shapes = decoder.param_shapes(config)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def pack(sets, length, *, pad_id=0):
  """One stream for each (prompt ids, [completion ids]).

  Args:
    sets: list of (prompt [P], list of completions [C_k]).
    length: T.
    pad_id: what stands on padding.
  """
  rows = [_stream(b, *ids, length, pad_id) for b, ids in enumerate(sets)]
  return Streams(*(np.stack(column) for column in zip(*rows)))


def _stream(b, prompt, completions, length, pad_id):
  size = len(prompt)
  columns = dict(
      tokens=list(prompt),
      positions=list(range(size)),
      prompt_slot=[b] * size,
      candidate_slot=[-1] * size,
      completion_mask=[False] * size,
      source=[0] * size,
  )
  for k, completion in enumerate(completions):
    start, count = len(columns["tokens"]), len(completion)
    columns["tokens"] += list(completion)
    columns["positions"] += range(size, size + count)
    columns["prompt_slot"] += [b] * count
    columns["candidate_slot"] += [k] * count
    columns["completion_mask"] += [True] * count
    columns["source"] += [size - 1, *range(start, start + count - 1)]
  fill = dict(
      tokens=pad_id, positions=0, prompt_slot=-1, candidate_slot=-1,
      completion_mask=False, source=0,
  )
  padding = length - len(columns["tokens"])
  return [
      np.array(
          values + [fill[name]] * padding,
          bool if name == "completion_mask" else np.int32,
      )
      for name, values in columns.items()
  ]


def random_sets(rng, vocab_size, prompt_lengths, completion_lengths):
  """Sets of random ids: lengths of prompts, and of each one's completions."""
  draw = lambda size: rng.integers(0, vocab_size, size)
  return [
      (draw(p), [draw(c) for c in cs])
      for p, cs in zip(prompt_lengths, completion_lengths)
  ]
