"""The model of a run on its mesh, what of it is trained, its first weights."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from mcpo_jax import errors, sharding, types
from mcpo_jax.models import config as config_lib
from mcpo_jax.models import decoder, hf, lora, peft
from mcpo_jax.training import setup
from mcpo_jax.training import stage as stage_lib

# Of adapters, which are small and take small updates.
_ADAPTER_DTYPE = jnp.float32


def open_model(
    run: setup.Run, start_dir: pathlib.Path | None
) -> tuple[stage_lib.Model, Callable[[], types.Params]]:
  """The architecture on the mesh, and a function that gives first weights.

  Args:
    run: of this workdir.
    start_dir: HF folder of the weights; None: random ones from the seed. Those
      of model.path come with the adapters of model.adapter_path.

  Returns:
    model, and () -> params; every call makes fresh arrays.
  """
  options = run.config["model"]
  adapters = None
  if options["adapter_path"] and start_dir == run.model_dir:
    adapters = peft.Adapters(setup.resolve_once(
        run.config, run.workdir, options["adapter_path"], None))
  if start_dir is not None:
    config = hf.load_config(start_dir)
  else:
    config = own_shape(
        options, run.tokenizer.vocab_size, bos_token_id=run.tokenizer.bos_id,
        eos_token_id=list(run.tokenizer.stop_ids),
        pad_token_id=run.tokenizer.pad_id)
  if run.tokenizer.vocab_size > config.vocab_size:
    raise errors.ModelDirError(
        "hf.vocab", "the tokenizer has more ids than the model has embeddings",
        where=str(start_dir), got=run.tokenizer.vocab_size,
        want=f"<= {config.vocab_size}")
  model = lay_out(run.config, config, run.mesh, run.tokenizer.pad_id)
  shardings, dtype = model.param_shardings, jnp.dtype(options["param_dtype"])

  def start() -> types.Params:
    if start_dir is not None:
      params = hf.load_params(
          start_dir, config, shardings=shardings, dtype=dtype)
      return params if adapters is None else lora.join(
          params, adapters.load(config, run.mesh, dtype=_ADAPTER_DTYPE))
    return jax.jit(
        lambda: decoder.init_params(
            jax.random.key(run.config["seed"]), config, dtype=dtype),
        out_shardings=shardings)()

  return model, start


def open_trained(
    run: setup.Run, model: stage_lib.Model, start: Callable[[], types.Params]
) -> tuple[
    stage_lib.Model, Callable[[], types.Params], Callable[[], types.Params]]:
  """What the preference stage trains: adapters where LoRA is on, else all.

  Args:
    run: of this workdir.
    model, start: from open_model.

  Returns:
    model, which holds what is frozen; () -> the first of what is trained,
    fresh arrays; and () -> the first policy. With LoRA the latter shares the
    frozen arrays: one copy of the base is on the devices.
  """
  options = run.config["lora"]
  if options["rank"] is None and not run.config["model"]["adapter_path"]:
    return model, start, start
  policy = start()
  trained, frozen = lora.split(policy)
  if not trained:
    init = lambda key: lora.init_adapters(
        key, model.param_shapes, rank=options["rank"],
        targets=options["targets"], dtype=_ADAPTER_DTYPE)
    key = jax.random.key(run.config["seed"])
    trained = jax.jit(init, out_shardings=sharding.infer_shardings(
        jax.eval_shape(init, key), decoder.PARAM_RULES, run.mesh))(key)
    scales = lora.scales(trained, options["alpha"] / options["rank"])
    frozen = lora.join(frozen, sharding.put_global(
        scales, sharding.replicated(run.mesh)))
  logging.info("LoRA: %d weights are trained beside %d of the base", *(
      sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
      for tree in (trained, model.param_shapes)))
  shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      trained)
  return (model._replace(param_shapes=shapes, frozen=frozen),
          lambda: jax.tree.map(jnp.copy, trained), lambda: policy)


def own_shape(
    options: dict[str, Any], vocab_size: int, **ids: Any
) -> config_lib.ModelConfig:
  """The architecture that the config's group model describes."""
  return config_lib.from_hf({
      "model_type": options["family"],
      "vocab_size": vocab_size,
      "hidden_size": options["hidden_size"],
      "intermediate_size": options["intermediate_size"],
      "num_hidden_layers": options["num_layers"],
      "num_attention_heads": options["num_heads"],
      "num_key_value_heads": options["num_kv_heads"],
      "head_dim": options["head_dim"] or (
          options["hidden_size"] // options["num_heads"]),
      "max_position_embeddings": options["max_position_embeddings"],
      "rope_theta": options["rope_theta"],
      "tie_word_embeddings": options["tie_embeddings"],
      **ids,
  })


def lay_out(
    config: dict[str, Any], model: config_lib.ModelConfig,
    mesh: jax.sharding.Mesh, pad_id: int,
) -> stage_lib.Model:
  """An architecture on a mesh; nothing is allocated.

  Raises:
    ConfigError: config.length for sequences beyond the model's context;
      config.divisible for a mesh that its heads, weights or streams do not fit.
  """
  data, options = config["data"], config["model"]
  needed = data["max_prompt_length"] + data["max_completion_length"]
  if needed > model.max_positions:
    raise errors.ConfigError(
        "config.length", "max_prompt_length + max_completion_length exceeds "
        "the model's context", where="data.max_completion_length", got=needed,
        want=f"<= {model.max_positions}")
  num_streams = setup.check_streams(config, mesh)
  tensor = mesh.shape["tensor"]
  if model.num_heads % tensor or model.num_kv_heads % tensor:
    raise errors.ConfigError(
        "config.divisible", "the tensor axis splits heads", where="mesh.tensor",
        got=tensor, want=f"a divisor of {model.num_heads} query and "
        f"{model.num_kv_heads} key-value heads")
  return stage_lib.Model(
      model, mesh, placed_shapes(model, mesh, options["param_dtype"]),
      jnp.dtype(options["compute_dtype"]),
      options["remat"], num_streams, data["stream_length"], pad_id)


def placed_shapes(
    model: config_lib.ModelConfig, mesh: jax.sharding.Mesh, dtype: str
) -> Any:
  """Shapes of an architecture's weights, with where they lie on a mesh."""
  shapes = decoder.param_shapes(model, dtype=jnp.dtype(dtype))
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, sharding.infer_shardings(shapes, decoder.PARAM_RULES, mesh))
