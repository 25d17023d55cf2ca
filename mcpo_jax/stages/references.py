"""What the policy is compared with: log-probs on disk, or weights."""

from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mcpo_jax import objective_names, registry, sharding
from mcpo_jax.data import store as store_lib
from mcpo_jax.models import hf, lora
from mcpo_jax.training import architecture, reference, setup
from mcpo_jax.training import stage as stage_lib


def open_reference(
    run: setup.Run, model: stage_lib.Model, start, data: store_lib.Store
) -> reference.ReferenceCache:
  """The filled cache of a store."""
  params, model = reference_params(run, model, start)
  key = setup.digest([str(model.config), hf.params_sha256(params),
                      str(model.compute_dtype), data.key])
  cache = reference.ReferenceCache(run.cache / "reference" / key, len(data))
  if cache.missing:
    cache.fill(data.candidate_set, host_token_logps(model, params), model.pack,
               lambda shards: tqdm(shards, desc="reference", unit="shard"))
  return cache


def reference_params(run: setup.Run, model: stage_lib.Model, start):
  """Weights and model of the reference: of reference.path, the base that lies
  beside the adapters, or the start."""
  path = run.config["reference"]["path"]
  if run.config["reference"]["source"] == "lora_base":
    return lora.merge(model.frozen), model
  if path is None:
    return start(), model
  other, load = architecture.open_model(
      run, setup.resolve_once(run.config, run.workdir, path, None))
  return load(), other


def is_start(config: dict[str, Any]) -> bool:
  """Whether policy and reference are the same weights at the start."""
  source, path = config["reference"]["source"], config["reference"]["path"]
  adapted = config["model"]["adapter_path"] is not None
  return (source is not None and path is None
          and not (source == "lora_base" and adapted))


def host_token_logps(model: stage_lib.Model, params):
  """streams -> [S, T] on the host, with fixed weights."""
  function = jax.jit(
      model.token_logps, out_shardings=sharding.replicated(model.mesh))
  return lambda chunk: np.asarray(function(params, model.put(chunk)))


def host_sequence_logps(model: stage_lib.Model, params):
  """batch -> [B, K] on the host, with fixed weights."""
  function = jax.jit(model.sequence_logps, static_argnums=(2, 3),
                     out_shardings=sharding.replicated(model.mesh))

  def logps(batch):
    return np.asarray(sum(
        function(params, model.put(chunk), *batch.meta.role.shape)
        for chunk in model.pack_all(batch)))

  return logps


def make_references(
    run, model, start, stores, make_batch
) -> dict[str, stage_lib.Reference]:
  """For "train" and "eval" what the policy is compared with, gated.

  Nothing if neither the objective nor the kernel reads a reference.
  """
  source = run.config["reference"]["source"]
  if source is None:
    return dict.fromkeys(("train", "eval"), stage_lib.NO_REFERENCE)
  if source in ("resident", "lora_base"):
    params, other = reference_params(run, model, start)
    resident = host_sequence_logps(other, params)
    needs_weights = registry.REFERENCE_TERMS & set(
        objective_names.find_objective(run.config["objective"]["name"]).terms)
    return {name: stage_lib.Reference(
        resident, params if needs_weights else (), other.config)
            for name in stores}
  caches = {name: open_reference(run, model, start, data)
            for name, (data, _) in stores.items()}
  if run.config["reference"]["path"] is None:
    tolerance = 1e-5 if model.compute_dtype == np.float32 else 2e-2
    reference.check_start(
        caches["train"], make_batch(0), host_token_logps(model, start()),
        model.pack, tolerance=tolerance)
  return {name: stage_lib.Reference(cache.anchor)
          for name, cache in caches.items()}
