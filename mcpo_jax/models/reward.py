"""A decoder with a head of one number: reward models, in memory and on disk.

Their folders are those of transformers' sequence classification with one
label: the tensors of a decoder without a language head, and `score.weight`.
The score of a text is the head on the hidden state of its last token.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcpo_jax.models import decoder, hf
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import CandidateSet, Params, Streams


def load_config(path: str | pathlib.Path) -> ModelConfig:
  """As hf.load_config, of a folder that is meant to be a reward model.

  If it is one, its tensors say: hf.load_params refuses a policy.
  """
  return dataclasses.replace(hf.load_config(path), reward_head=True)


def with_head(key: jax.Array, params: Params, config: ModelConfig) -> Params:
  """Parameters of a decoder with a random head for its language head."""
  dtype = params["final_norm"]["scale"].dtype
  kernel = config.initializer_range * jax.random.normal(
      key, (config.hidden_size, 1), dtype)
  body = {name: x for name, x in params.items() if name != "lm_head"}
  return body | {"score": {"kernel": kernel}}


def token_scores(
    params: Params,
    config: ModelConfig,
    streams: Streams,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
) -> jax.Array:
  """The head on the hidden state of every token that is marked.

  Args:
    params: with a head.
    config: static.
    streams: [S, T] each; completion_mask marks one token of each candidate,
      see `mark_last`.
    compute_dtype: of products and activations.
    remat: see decoder.hidden_states.

  Returns:
    [S, T] float32 (float64 if compute_dtype is); 0 where nothing is marked.
  """
  hidden = decoder.hidden_states(
      params, config, streams, compute_dtype=compute_dtype, remat=remat)
  kernel = params["score"]["kernel"][:, 0].astype(hidden.dtype)
  scores = jnp.matmul(
      hidden, kernel,
      preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32))
  return jnp.where(streams.completion_mask, scores, 0.0)


def mark_last(
    one: CandidateSet, *, pad_id: int | None, end_id: int, tail: list[int]
) -> CandidateSet:
  """The set with the token marked that each completion's score stands at.

  That is the last one that is not `pad_id`, as transformers takes it: where
  padding is done with EOS, it is the token before EOS. A completion of nothing
  else has its last one marked.

  Args:
    one: completions that begin after the prompt.
    pad_id: of the model's config, None if it has none.
    end_id: token that ends a completion that was not cut.
    tail: what the template puts after it; see `rewards.model.tail_ids`.
  """
  completions, masks = [], []
  for ids in one.completions:
    if len(ids) and ids[-1] == end_id:
      ids = np.append(ids, np.array(tail, ids.dtype))
    told = np.flatnonzero(ids != (-1 if pad_id is None else pad_id))
    completions.append(ids)
    masks.append(np.arange(len(ids)) == (
        told[-1] if len(told) else len(ids) - 1))
  return one._replace(completions=completions, completion_masks=masks)
