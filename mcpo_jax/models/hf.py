"""Hugging Face folders: read them, write them; hub.py finds them.

Weights go from file to device one parameter after the other, of several
processes each reads its part, and back tensor by tensor, so no host holds the
whole model. The names of the tensors are a table.
"""

import concurrent.futures
import hashlib
import itertools
import json
import logging
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mcpo_jax import commit, errors, hosts, sharding
from mcpo_jax.models import config as config_lib
from mcpo_jax.models import decoder, hub
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.models.shards import (
    INDEX,
    SINGLE,
    Shards,
    read_json,
    write_file,
)
from mcpo_jax.types import Params

logger = logging.getLogger(__name__)

# Our path -> theirs. A kernel is stored [out, in] there and [in, out] here.
_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
    "score/kernel": "score.weight",
    "attention_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    **{
        f"attention/{name}_proj/{ours}": f"self_attn.{name}_proj.{theirs}"
        for name in "qkvo"
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    **{
        f"attention/{name}_norm/scale": f"self_attn.{name}_norm.weight"
        for name in "qk"
    },
    **{
        f"mlp/{name}_proj/{ours}": f"mlp.{name}_proj.{theirs}"
        for name in ("gate", "up", "down")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
}
# Families with norms before and after each part give the same name to another
# norm than the rest.
_POST_NORM_NAMES = {
    **_NAMES,
    "post_attention_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "post_mlp_norm/scale": "post_feedforward_layernorm.weight",
}
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # old exports; computed here
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)

_THREADS = 16  # that read, and how much each at once
_PIECE_BYTES = 4 * 2**20

resolve_model = hub.resolve_model


# --- reading ------------------------------------------------------------------


def load_config(path: str | pathlib.Path) -> ModelConfig:
  """Reads config.json; generation_config.json only for ids that it leaves out.

  Raises:
    ModelDirError: `hf.config`, `hf.feature`, `hf.dtype`, `hf.remote_code`.
  """
  folder = pathlib.Path(path)
  raw = read_json(folder, "config.json", "hf.config")
  where = str(folder / "config.json")
  if raw.get("model_type") not in config_lib.FAMILIES and "auto_map" in raw:
    raise errors.ModelDirError(
        "hf.remote_code",
        "the model brings its own code, which is never run",
        where=where,
        got=raw.get("model_type"),
        want=f"one of {', '.join(config_lib.FAMILIES)}",
    )
  if (folder / "generation_config.json").exists():
    extra = read_json(folder, "generation_config.json", "hf.config")
    as_list = lambda ids: ids if isinstance(ids, list) else [ids]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
      ours, theirs = raw.get(key), extra.get(key)
      if ours is None:
        raw[key] = theirs
      elif theirs is not None and as_list(ours) != as_list(theirs):
        logger.warning(
            "%s: %s is %s there and %s in generation_config.json; the former"
            " holds", where, key, ours, theirs,
        )
  return config_lib.from_hf(raw, where=where)


def weights_dtype(path: str | pathlib.Path) -> Any:
  """bfloat16 if config.json says that the weights are, else float32."""
  raw = read_json(pathlib.Path(path), "config.json", "hf.config")
  name = raw.get("dtype") or raw.get("torch_dtype")
  return jnp.bfloat16 if name == "bfloat16" else jnp.float32


def check_tokenizer(path: str | pathlib.Path, config: ModelConfig) -> None:
  """Compares the ids of tokenizer.json with the rows of the embedding.

  Raises:
    ModelDirError: `hf.tokenizer`, `hf.vocab`.
  """
  folder = pathlib.Path(path)
  raw = read_json(folder, "tokenizer.json", "hf.tokenizer")
  try:
    vocab = raw["model"]["vocab"]
    ids = (
        list(vocab.values()) if isinstance(vocab, dict)
        else list(range(len(vocab)))
    )
    ids += [token["id"] for token in raw.get("added_tokens") or []]
    size = max(ids) + 1
  except (KeyError, TypeError, ValueError):
    raise errors.ModelDirError(
        "hf.tokenizer", "tokenizer.json has no vocabulary", where=str(folder)
    ) from None
  if size > config.vocab_size:
    raise errors.ModelDirError(
        "hf.vocab",
        "the tokenizer has more ids than the embedding has rows",
        where=str(folder / "tokenizer.json"),
        got=size,
        want=f"at most {config.vocab_size}",
    )
  special = (config.bos_token_id, *config.eos_token_ids, config.pad_token_id)
  wrong = [i for i in special if i is not None and i not in set(ids) | {-1}]
  if wrong or not config.eos_token_ids:
    raise errors.ModelDirError(
        "hf.tokenizer",
        "config.json names a special id that the tokenizer does not have"
        if wrong
        else "no EOS id is named",
        where=str(folder / "config.json"),
        got=wrong or None,
    )


def load_params(
    path: str | pathlib.Path,
    config: ModelConfig,
    *,
    shardings: Any = None,
    dtype: Any = jnp.float32,
) -> Params:
  """Reads the weights straight into the shards of each device.

  Every tensor is read once by all processes together; small ones by each.

  Args:
    path: a folder with safetensors, one file or many with an index.
    config: from load_config.
    shardings: tree of shardings as of the parameters; None: one device.
    dtype: of the parameters, whatever the file has.

  Returns:
    Parameters as decoder.init_params makes them.

  Raises:
    ModelDirError: `hf.tensor`, `hf.tied`, `hf.vocab`, `hf.non_finite`, and
      those of shards.Shards; `hf.changed`, a file did so meanwhile.
  """
  folder = pathlib.Path(path)
  shards = Shards(folder)
  shapes = decoder.param_shapes(config, dtype=dtype)
  _check_tensors(shards, config, shapes)
  if shardings is None:
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: one, shapes)

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:

    def load(path, shape, placed):
      names, transposed = tensors_of(sharding.path_name(path), config)
      fill = lambda out, first: _fill(
          out if _stacked(path) else out[None], shards, names, first, pool)
      if _alone(placed) or len(shards.shapes[names[0]]) == 1:
        whole = np.empty(shape.shape, shape.dtype)
        fill(whole.swapaxes(-1, -2) if transposed else whole, 0)
        array = jax.make_array_from_callback(
            shape.shape, placed, whole.__getitem__)
      else:
        array = _by_rows(shape, placed, transposed, fill)
      # Ready before the next is read: a transfer keeps what it reads from.
      return jax.block_until_ready(array)

    params = jax.tree_util.tree_map_with_path(load, shapes, shardings)
  shards.check_unchanged()
  return params


def _alone(placed: jax.sharding.Sharding) -> bool:
  """Whether this process has all the devices of an array."""
  return placed.is_fully_addressable


def _fill(
    out: np.ndarray, shards: Shards, names: list[str], first: int,
    pool: concurrent.futures.Executor,
) -> None:
  """Reads the same rows of some tensors, in pieces side by side.

  Args:
    out: [len(names), rows, ...], of any dtype and strides.
    shards: where they are.
    names: of the tensors.
    first: the first row.
    pool: of the threads that read.
  """
  rows = out.shape[1]
  step = max(1, _PIECE_BYTES // (math.prod(out.shape[2:]) * out.itemsize))

  def one(piece):
    number, start = piece
    stop = min(start + step, rows)
    out[number, start:stop] = shards.read(
        names[number], (slice(first + start, first + stop),))

  for _ in pool.map(one, itertools.product(
      range(len(names)), range(0, rows, step))):
    pass


def _by_rows(
    shape: jax.ShapeDtypeStruct, placed: NamedSharding, transposed: bool,
    fill: Callable[[np.ndarray, int], None],
) -> jax.Array:
  """A parameter of which each device reads as many rows as the others.

  A cut through the columns of what is stored would have every process read all
  of it. So rows are cut, over all devices, and these exchange what they need.

  Args:
    shape: [..., rows, columns] of the parameter, or if `transposed` [...,
      columns, rows].
    placed: where its parts belong.
    transposed: whether its tensors are stored the other way round.
    fill: (array [..., n, columns], first) reads the n rows from the first on.
  """
  mesh, *lead = placed.mesh, *shape.shape[:-2]
  spec = (*placed.spec, *[None] * len(shape.shape))[:len(shape.shape)]
  entries = [() if e is None else (e,) if isinstance(e, str) else e
             for e in spec[-2:]]
  ends = [*zip(shape.shape[-2:], entries)]
  (rows, own), (columns, other) = ends[::-1] if transposed else ends
  rest = tuple(a for a in mesh.axis_names if a not in (*own, *other))
  # The blocks of rows that stay together, each filled up to be divisible.
  blocks = math.prod(mesh.shape[a] for a in own)
  block, readers = rows // blocks, mesh.size // blocks
  padded = -(-block // readers) * readers

  def read(index):
    start, stop, _ = index[-2].indices(blocks * padded)
    number, first = divmod(start, padded)
    last = min(first + stop - start, block)
    out = np.zeros((*lead, stop - start, columns), shape.dtype)
    if first < last:
      fill(out[..., :last - first, :], number * block + first)
    return out

  def turn(x):  # one tensor on one device
    x = jax.lax.all_gather(x, rest, tiled=True)
    x = jax.lax.all_to_all(x, other, 1, 0, tiled=True)[:block]
    return x.T if transposed else x

  def turn_all(x):  # one after the other, for the memory of one
    return jax.lax.map(turn, x) if lead else turn(x)

  split = P(*[None] * len(lead), (*own, *other, *rest), None)
  stored = jax.make_array_from_callback(
      (*lead, blocks * padded, columns), NamedSharding(mesh, split), read)
  return jax.jit(
      jax.shard_map(turn_all, mesh=mesh, in_specs=split, out_specs=placed.spec,
                    check_vma=False), out_shardings=placed)(stored)


def _stacked(path: tuple) -> bool:
  return path[0].key == "layers"


def tensors_of(name: str, config: ModelConfig) -> tuple[list[str], bool]:
  """The tensors that make a parameter, one a layer, and if each is turned."""
  table = _POST_NORM_NAMES if config.post_norms else _NAMES
  transposed = name.endswith("/kernel")
  if not name.startswith("layers/"):
    return [table[name]], transposed
  theirs = table[name.removeprefix("layers/")]
  return (
      [f"model.layers.{i}.{theirs}" for i in range(config.num_layers)],
      transposed,
  )


def _expected(
    config: ModelConfig, shapes: Params
) -> Iterator[tuple[str, tuple[int, ...], tuple, int | None]]:
  """(tensor name, its shape, our path, layer) of all tensors, in order."""
  for path, shape in jax.tree_util.tree_leaves_with_path(shapes):
    names, transposed = tensors_of(sharding.path_name(path), config)
    sizes = shape.shape[1:] if _stacked(path) else shape.shape
    sizes = sizes[::-1] if transposed else sizes
    for layer, name in enumerate(names):
      yield name, sizes, path, layer if _stacked(path) else None


def _check_tensors(shards: Shards, config: ModelConfig, shapes: Params) -> None:
  expected = {name: size for name, size, _, _ in _expected(config, shapes)}
  embedding = _NAMES["embed/embedding"]
  found = shards.shapes.get(embedding)
  if found and found[0] != config.vocab_size:
    raise errors.ModelDirError(
        "hf.vocab", "the embedding has not vocab_size rows",
        where=shards.where(embedding), got=found[0],
        want=f"vocab_size {config.vocab_size}",
    )
  for name, size in expected.items():
    hint = ("sequence classification with num_labels=1"
            if name == _NAMES["score/kernel"] else "")
    if name not in shards.shapes:
      raise errors.ModelDirError(
          "hf.tensor", "a tensor is missing", where=name, want=size, hint=hint
      )
    if shards.shapes[name] != size:
      raise errors.ModelDirError(
          "hf.tensor", "a tensor has not the shape that config.json says",
          where=shards.where(name), got=shards.shapes[name], want=size,
          hint=hint,
      )
  head = _NAMES["lm_head/kernel"]
  for name in sorted(set(shards.shapes) - set(expected)):
    if name == head and config.tied_head:
      _check_tied(shards, embedding, head)
    elif not _IGNORED.search(name):
      raise errors.ModelDirError(
          "hf.tensor", "a tensor is not expected", where=shards.where(name),
          got=shards.shapes[name],
      )


def _check_tied(shards: Shards, embedding: str, head: str) -> None:
  """A head that is stored beside the flag that ties it must be the same."""
  same = shards.shapes[head] == shards.shapes[embedding]
  total = shards.shapes[embedding][0]
  own = range(4096 * hosts.index(), total, 4096 * hosts.count())
  for start in own if same else ():
    rows = (slice(start, min(start + 4096, total)), slice(None))
    one, other = shards.read(head, rows), shards.read(embedding, rows)
    same &= np.array_equal(one, other)
  if not same:
    raise errors.ModelDirError(
        "hf.tied", "tie_word_embeddings is true, but the head that is stored"
        " differs from the embedding", where=shards.where(head),
    )


# --- writing ------------------------------------------------------------------


def save_params(
    path: str | pathlib.Path,
    params: Params,
    config: ModelConfig,
    *,
    tokenizer_dir: str | pathlib.Path | None = None,
    stop_ids: tuple[int, ...] = (),
    card: str = "",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a folder that transformers loads, all or nothing.

  Every file of weights is read back and compared with the weights in memory
  before the folder gets its name; an existing folder stays until then. All
  processes call it; one a disk writes.

  Args:
    path: the folder.
    params: as of decoder.init_params; their dtype is the dtype of the files.
    config: of these parameters.
    tokenizer_dir: where the tokenizer's files and the chat template are.
    stop_ids: further ids that end a completion, for generation_config.json.
    card: text for README.md, below what is said there of the architecture.
    max_shard_bytes: above it the weights are cut into several files.

  Raises:
    ModelDirError: `hf.export`, if the disk does not hold what was written.
  """
  shapes = jax.eval_shape(lambda: params)
  groups = _plan(config, shapes, max_shard_bytes)
  if not hosts.writes():
    for group in groups:  # takes part in gathering
      for _ in _host_tensors(params, group):
        pass
    return

  def write(folder: pathlib.Path) -> None:
    _write_weights(folder, params, groups)
    _write_json(
        folder / "config.json", config_lib.to_hf(config, dtype=_dtype(params))
    )
    stops = dict.fromkeys((*config.eos_token_ids, *stop_ids))
    ids = dict(
        bos_token_id=config.bos_token_id,
        eos_token_id=list(stops) or None,
        pad_token_id=config.pad_token_id,
    )
    ids = {key: value for key, value in ids.items() if value is not None}
    if not config.reward_head:
      _write_json(folder / "generation_config.json", ids)
    (folder / "README.md").write_text(_card(config, params, card))
    if tokenizer_dir is not None:
      for name in _TOKENIZER_FILES:
        source = pathlib.Path(tokenizer_dir) / name
        if source.exists():
          shutil.copyfile(source, folder / name)

  commit.write_folder(
      pathlib.Path(path), write, {"kind": "hf"}, replace=True, point="export")


def _plan(config, shapes, max_bytes) -> list[list[tuple]]:
  """Which tensors go in which file: lists of entries of `_expected`."""
  groups, size = [[]], 0
  itemsize = jax.tree.leaves(shapes)[0].dtype.itemsize
  for entry in _expected(config, shapes):
    nbytes = math.prod(entry[1]) * itemsize
    if groups[-1] and size + nbytes > max_bytes:
      groups.append([])
      size = 0
    size += nbytes
    groups[-1].append(entry)
  return groups


def _host_tensors(params: Params, group: list[tuple]) -> Iterator[np.ndarray]:
  """The tensors of a file, one after the other."""
  for _, _, path, layer in group:
    leaf = params
    for key in path:
      leaf = leaf[key.key]
    array = to_host(leaf if layer is None else leaf[layer])
    yield array.T if path[-1].key == "kernel" else array


def to_host(array: jax.Array) -> np.ndarray:
  """The whole array, whichever processes hold it; all of them call this."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


def _write_weights(
    folder: pathlib.Path, params: Params, groups: list[list[tuple]]
) -> None:
  weight_map, total = {}, 0
  dtype = jax.tree.leaves(params)[0].dtype
  for number, group in enumerate(groups):
    name = SINGLE
    if len(groups) > 1:
      name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
    sizes = {tensor: shape for tensor, shape, _, _ in group}
    write_file(folder / name, sizes, dtype, _host_tensors(params, group))
    weight_map |= dict.fromkeys(sizes, name)
    total += dtype.itemsize * sum(map(math.prod, sizes.values()))
  if len(groups) > 1:
    _write_json(
        folder / INDEX,
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n")


def _dtype(params: Params) -> str:
  return jax.tree.leaves(params)[0].dtype.name


_REWARD_USE = """
Its one logit is the score of a prompt with a completion, rendered by the chat
template: higher is better, and only differences mean something.
"""


def _card(config: ModelConfig, params: Params, text: str) -> str:
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  task, tag, kind, loader, use = (
      "text-generation", "preference-optimization", "model",
      "AutoModelForCausalLM", "")
  if config.reward_head:
    task, tag, kind, loader, use = (
        "text-classification", "reward-model", "reward model",
        "AutoModelForSequenceClassification", _REWARD_USE)
  return f"""---
library_name: transformers
pipeline_tag: {task}
tags:
- {tag}
- mcpo_jax
---

# A {config.family} {kind} of {count:,} parameters

{config.num_layers} layers of width {config.hidden_size}, \
{config.num_heads} query and {config.num_kv_heads} key-value heads of width \
{config.head_dim}, vocabulary {config.vocab_size}, weights in {_dtype(params)}.
{use}
Written by mcpo_jax. Load it with
`transformers.{loader}.from_pretrained`.
{text and chr(10) + text}"""


def params_sha256(params: Params) -> str:
  """Hex SHA-256 over the sorted paths, shapes, dtypes and bytes."""
  digest = hashlib.sha256()
  leaves = {
      sharding.path_name(path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  for name, leaf in sorted(leaves.items()):
    digest.update(f"{name} {leaf.shape} {leaf.dtype.name};".encode())
    layers = name.startswith("layers/")
    for piece in map(leaf.__getitem__, range(len(leaf))) if layers else [leaf]:
      digest.update(np.ascontiguousarray(to_host(piece)).tobytes())
  return digest.hexdigest()
