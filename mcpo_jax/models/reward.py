"""A decoder with a head of one number: reward models, in memory and on disk.

Their folders are those of transformers' sequence classification with one
label: the tensors of a decoder without a language head, and `score.weight`.
The score of a text is the head on the hidden state of its last token.
"""

import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcpo_jax import commit, errors, sharding
from mcpo_jax.models import config as config_lib
from mcpo_jax.models import decoder, hf
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.models.shards import Shards
from mcpo_jax.types import CandidateSet, Params, Streams

_HEAD = "score.weight"  # [1, D]; here score/kernel [D, 1]


def param_shapes(config: ModelConfig, *, dtype: Any = jnp.float32) -> Params:
  """The tree of a reward model's parameters as ShapeDtypeStructs."""
  shapes = decoder.param_shapes(config, dtype=dtype)
  head = jax.ShapeDtypeStruct((config.hidden_size, 1), dtype)
  return _body(shapes) | {"score": {"kernel": head}}


def with_head(key: jax.Array, params: Params, config: ModelConfig) -> Params:
  """Parameters of a decoder with a random head for its language head."""
  dtype = params["final_norm"]["scale"].dtype
  kernel = config.initializer_range * jax.random.normal(
      key, (config.hidden_size, 1), dtype)
  return _body(params) | {"score": {"kernel": kernel}}


def _body(params: Params) -> Params:
  return {k: x for k, x in params.items() if k not in ("lm_head", "score")}


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


def load_params(
    path: str | pathlib.Path,
    config: ModelConfig,
    *,
    dtype: Any = jnp.float32,
) -> Params:
  """Reads the weights of a reward model onto the first device.

  Args:
    path: a folder with safetensors, one file or many with an index.
    config: from hf.load_config.
    dtype: of the parameters, whatever the file has.

  Raises:
    ModelDirError: `hf.tensor` if there is no head of one label, and those of
      hf.load_params.
  """
  shards = Shards(pathlib.Path(path))
  want, head = (1, config.hidden_size), shards.shapes.pop(_HEAD, None)
  if head != want:
    raise errors.ModelDirError(
        "hf.tensor", "a reward model has a head of one label",
        where=f"{path}: {_HEAD}", got=head, want=want,
        hint="sequence classification with num_labels=1")
  shapes = _body(decoder.param_shapes(config, dtype=dtype))
  hf._check_tensors(shards, config, shapes)

  def read(name, ndim, turned):
    array = shards.read(name, (slice(None),) * ndim)
    return jnp.asarray((array.T if turned else array).astype(dtype))

  def load(path, shape):
    names, turned = hf._tensors_of(sharding.path_name(path), config)
    if not hf._stacked(path):
      return read(names[0], shape.ndim, turned)
    return jnp.stack([read(name, shape.ndim - 1, turned) for name in names])

  params = jax.tree_util.tree_map_with_path(load, shapes)
  return params | {"score": {"kernel": read(_HEAD, 2, True)}}


def save_params(
    path: str | pathlib.Path,
    params: Params,
    config: ModelConfig,
    *,
    tokenizer_dir: str | pathlib.Path,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a folder that transformers loads, as hf.save_params does.

  Args:
    path: the folder.
    params: with a head; their dtype is the dtype of the files.
    config: of these parameters.
    tokenizer_dir: where the tokenizer's files and the chat template are.
    max_shard_bytes: above it the weights are cut into several files.

  Raises:
    ModelDirError: `hf.export`, if the disk does not hold what was written.
  """
  body = jax.eval_shape(lambda: _body(params))
  groups = hf._plan(config, body, max_shard_bytes)
  key = jax.tree_util.DictKey
  groups[-1].append((_HEAD, (key("score"), key("kernel")), None))
  if jax.process_index():
    for group in groups:  # takes part in gathering
      hf._host_tensors(params, group)
    return

  def write(folder: pathlib.Path) -> None:
    hf._write_weights(folder, params, groups)
    content = config_lib.to_hf(config, dtype=hf._dtype(params))
    (name,) = content["architectures"]
    if config.family == "gemma3_text":  # the plain name is of images and text
      name = name.replace("Gemma3", "Gemma3Text")
    content["architectures"] = [
        name.replace("ForCausalLM", "ForSequenceClassification")]
    content["id2label"], content["label2id"] = {"0": "score"}, {"score": 0}
    hf._write_json(folder / "config.json", content)
    (folder / "README.md").write_text(_card(config, params))
    for name in hf._TOKENIZER_FILES:
      source = pathlib.Path(tokenizer_dir) / name
      if source.exists():
        shutil.copyfile(source, folder / name)

  commit.write_folder(pathlib.Path(path), write, {"kind": "hf"})


def _card(config: ModelConfig, params: Params) -> str:
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  return f"""---
library_name: transformers
pipeline_tag: text-classification
tags:
- reward-model
- mcpo_jax
---

# A {config.family} reward model of {count:,} parameters

Trained on pairs by the Bradley-Terry loss. Its one logit is the score of a
prompt with a completion, rendered by the chat template: higher is better, and
only differences mean something.

Written by mcpo_jax. Load it with
`transformers.AutoModelForSequenceClassification.from_pretrained`.
"""
