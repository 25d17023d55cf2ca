"""Folders of adapters in PEFT's format: read them, write them.

`peft.PeftModel.from_pretrained(base, folder)` loads what is written here, and
what it wrote is read here, as far as it is plain LoRA on the projections that
`lora` knows: a setting that would change the function is refused.
"""

import concurrent.futures
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from mcpo_jax import commit, errors, hosts, sharding
from mcpo_jax.models import hf, lora, parameters
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.models.shards import Shards, read_json
from mcpo_jax.types import Params

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_THREADS = 16  # that read

# Settings without an effect on the function that is computed.
_FREE = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying",
    "inference_mode", "layers_pattern", "lora_dropout", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "task_type",
}
_READ = {"peft_type", "r", "lora_alpha", "target_modules"}
# What else a setting may be; other ways to initialise change the base too.
_PLAIN = (None, False, "none", [], {})
_PLAIN_OF = {"init_lora_weights": (True, False, "gaussian", "orthogonal")}


class Adapters:
  """A folder whose adapter_config.json has been read and can be computed."""

  def __init__(self, folder: pathlib.Path):
    """Reads the config.

    Raises:
      ModelDirError: `peft.config`, `peft.feature`.
    """
    self._folder = folder
    raw = read_json(folder, CONFIG, "peft.config")
    self._where = str(folder / CONFIG)
    if raw.get("peft_type") != "LORA":
      self._refuse("another kind of adapter", raw.get("peft_type"), "LORA")
    for key in sorted(raw.keys() - _FREE - _READ):
      if raw[key] not in _PLAIN_OF.get(key, _PLAIN):
        self._refuse(f"{key} is not supported", raw[key], "plain LoRA")
    self.rank, self.alpha = raw.get("r"), raw.get("lora_alpha")
    self.targets = raw.get("target_modules")
    known = [name for _, name in lora.projections()]
    if self.targets == "all-linear":
      self.targets = known
    names = isinstance(self.targets, list) and set(map(str, self.targets))
    for key, right, want in (
        ("r", type(self.rank) is int and self.rank > 0, "a whole number > 0"),
        ("lora_alpha", type(self.alpha) in (int, float), "a number"),
        ("target_modules", names and names <= set(known),
         f"some of {', '.join(known)}"),
    ):
      if not right:
        raise errors.ModelDirError(
            "peft.config", f"{key} cannot be used", where=self._where,
            got=raw.get(key), want=want)

  def _refuse(self, message, got, want):
    raise errors.ModelDirError(
        "peft.feature", message, where=self._where, got=got, want=want)

  def load(
      self, config: ModelConfig, mesh: jax.sharding.Mesh, *, dtype: Any
  ) -> Params:
    """The adapters with their scales, to be joined to the base.

    Args:
      config: of the base.
      mesh: whose devices they are split over.
      dtype: of the adapters.

    Raises:
      ModelDirError: `peft.tensor`, and those of shards.Shards.
    """
    shards = Shards(self._folder, single=WEIGHTS)
    shapes = jax.eval_shape(
        lambda: lora.init_adapters(
            jax.random.key(0), parameters.param_shapes(config),
            rank=self.rank, targets=tuple(self.targets), dtype=dtype))
    expected = {
        name: leaf.shape[:0:-1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        for name in _tensors_of(path, config)
    }
    for name in sorted(expected.keys() | shards.shapes.keys()):
      if expected.get(name) != shards.shapes.get(name):
        raise errors.ModelDirError(
            "peft.tensor", f"{CONFIG} and the base expect other tensors",
            where=f"{self._folder / WEIGHTS}: {name}",
            got=shards.shapes.get(name, "none"),
            want=expected.get(name, "none"))

    def load(path, shape, placed):
      names = _tensors_of(path, config)
      read = lambda index: np.stack([*pool.map(
          lambda name: shards.read(name, index[:0:-1]).T.astype(dtype),
          names[index[0]])])
      return jax.make_array_from_callback(shape.shape, placed, read)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      adapters = jax.tree_util.tree_map_with_path(
          load, shapes,
          sharding.infer_shardings(shapes, parameters.PARAM_RULES, mesh))
    shards.check_unchanged()
    scales = lora.scales(adapters, self.alpha / self.rank)
    return lora.join(adapters, sharding.put_global(
        scales, sharding.replicated(mesh)))


def _tensors_of(path: tuple, config: ModelConfig) -> list[str]:
  """The tensors of an adapter's lora_a or lora_b, one a layer."""
  *place, which = sharding.path_name(path).split("/")
  names, _ = hf.tensors_of("/".join([*place, "kernel"]), config)
  which = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}[which]
  return [f"base_model.model.{x.removesuffix('weight')}{which}" for x in names]


def save_adapters(
    path: str | pathlib.Path, policy: Params, config: ModelConfig, *, base: str
) -> None:
  """Writes a folder that PEFT loads, all or nothing, in float32.

  All processes call it; one a disk writes.

  Args:
    path: the folder.
    policy: of lora.join; every adapter has the same rank and scale.
    config: of the base.
    base: name or folder of the base, for whoever loads the adapters.
  """
  trained, _ = lora.split(policy)
  tensors = {}
  for place, leaf in jax.tree_util.tree_leaves_with_path(trained):
    stacked = hf.to_host(leaf)
    for name, one in zip(_tensors_of(place, config), stacked, strict=True):
      tensors[name] = np.ascontiguousarray(one.T.astype(np.float32))
  targets = [
      (part, name) for part, name in lora.projections()
      if name in trained["layers"].get(part, {})
  ]
  part, name = targets[0]
  one = policy["layers"][part][name]
  rank = one["lora_a"].shape[-1]
  alpha = float(jnp.ravel(one["lora_scale"])[0]) * rank
  if not hosts.writes():
    return

  def write(folder: pathlib.Path) -> None:
    safetensors.numpy.save_file(
        tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base, "inference_mode": True, "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": [name for _, name in targets],
    }, indent=2) + "\n")
    (folder / "README.md").write_text(_CARD.format(base=base, rank=rank))

  commit.write_folder(pathlib.Path(path), write, {"kind": "peft"}, replace=True)


_CARD = """---
library_name: peft
base_model: {base}
tags:
- preference-optimization
- mcpo_jax
---

# Adapters of rank {rank} for {base}

Written by mcpo_jax. Load them with `peft.PeftModel.from_pretrained` on top of
the base.
"""
