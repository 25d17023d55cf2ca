"""FLOPs of a decoder's matrix products, from a formula.

A compiler that scans over layers counts their body once, and what it counts
includes padding and recomputation. These are the FLOPs that the mathematics
needs: every prompt once, no padding, the head on scored tokens alone.
"""

import numpy as np

from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import CandidateSet


def layer_params(config: ModelConfig) -> int:
  """Weights of one layer that take part in matrix products."""
  queries = config.num_heads * config.head_dim
  keys = config.num_kv_heads * config.head_dim
  width = config.hidden_size
  return 2 * width * (queries + keys) + 3 * width * config.intermediate_size


def head_params(config: ModelConfig) -> int:
  """Weights of the output head."""
  return config.hidden_size * config.vocab_size


def forward_flops(
    config: ModelConfig, *, tokens: int, pairs: int, scored: int
) -> float:
  """FLOPs of a forward pass; a backward pass needs twice as many.

  Args:
    config: the decoder.
    tokens: that run through the layers.
    pairs: (query, key) that see each other, in one layer without a window.
    scored: tokens whose log-prob is taken.
  """
  attention = 4 * config.num_heads * config.head_dim * pairs
  layers = config.num_layers * (2 * layer_params(config) * tokens + attention)
  return float(layers + 2 * head_params(config) * scored)


def pass_flops(
    config: ModelConfig,
    sets: list[CandidateSet],
    chosen: list[np.ndarray],
) -> float:
  """FLOPs of a forward pass over some candidates of each set.

  Args:
    config: the decoder.
    sets: B sets.
    chosen: for each set the indices of the candidates that are run.
  """
  tokens = pairs = scored = 0
  for one, indices in zip(sets, chosen, strict=True):
    if not len(indices):
      continue
    prompt = len(one.prompt)
    lengths = np.array([len(one.completions[k]) for k in indices])
    tokens += prompt + lengths.sum()
    pairs += prompt * (prompt + 1) // 2
    pairs += (lengths * prompt + lengths * (lengths + 1) // 2).sum()
    scored += sum(
        np.count_nonzero(one.completion_masks[k]) for k in indices
    )
  return forward_flops(
      config, tokens=int(tokens), pairs=int(pairs), scored=int(scored)
  )
