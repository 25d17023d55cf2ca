"""What a stage is made of: the model on its mesh, settings, functions."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcpo_jax import objective_names, registry, sharding, types, user_code
from mcpo_jax.data import packing
from mcpo_jax.models import config as model_config
from mcpo_jax.models import lora, scoring
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import optimizer as optimizer_lib
from mcpo_jax.training import step as step_lib


class Model(NamedTuple):
  """What all stages share: the architecture, where it lies, how it is fed."""

  config: model_config.ModelConfig
  mesh: jax.sharding.Mesh
  param_shapes: Any  # tree of ShapeDtypeStruct with shardings; of the trained
  compute_dtype: Any
  remat: str
  num_streams: int  # of a chunk
  stream_length: int  # the longest; see `packing.chunk_lengths`
  pad_id: int
  frozen: Any = ()  # weights beside the trained ones; () where all are

  def policy(self, trained: types.Params) -> types.Params:
    """All parameters, of those that are trained."""
    return lora.join(trained, self.frozen)

  @property
  def param_shardings(self) -> Any:
    return jax.tree.map(lambda x: x.sharding, self.param_shapes)

  def pack(self, sets, slots, order, *, whole=False) -> list[types.Streams]:
    """Chunks of few shapes; see `packing.pack_streams`."""
    return packing.pack_streams(
        sets, slots, order, num_streams=self.num_streams,
        stream_length=self.stream_length, pad_id=self.pad_id, whole=whole)

  def pack_all(self, batch: batch_lib.HostBatch) -> list[types.Streams]:
    """Chunks with every candidate of a batch."""
    everything = [list(range(len(o))) for o in batch.order]
    return self.pack(batch.sets, everything, batch.order)

  def put(self, streams: types.Streams) -> types.Streams:
    """A chunk on the devices, streams split over data and fsdp, their tokens
    over context."""
    return sharding.put_global(streams, sharding.stream_sharding(self.mesh))

  def put_replicated(self, tree: Any) -> Any:
    """Set metadata, whole on every device."""
    return sharding.put_global(tree, sharding.replicated(self.mesh))

  def no_features(
      self, batch: batch_lib.HostBatch, terms: tuple[str, ...] = ()
  ) -> types.Features:
    """[B, K] zeros, to add chunks to."""
    dtype = jnp.promote_types(self.compute_dtype, jnp.float32)
    zeros = lambda: self.put_replicated(
        np.zeros(batch.meta.role.shape, dtype))
    return types.Features(zeros(), {name: zeros() for name in terms})

  def token_logps(self, params, streams):
    """[S, T] float32; see `scoring.token_logps`."""
    with sharding.tracing_on(self.mesh):
      return scoring.token_logps(
          params, self.config, streams, compute_dtype=self.compute_dtype,
          remat=self.remat)

  def sequence_logps(self, params, streams, num_sets, num_slots):
    """[B, K] float32, 0 for what is not in the streams."""
    return scoring.sequence_logps(
        self.token_logps(params, streams), streams, num_sets=num_sets,
        num_slots=num_slots)

  def features(self, params, reference, streams, sets, *, terms=(),
               confidence=None, reference_config=None):
    """Features [B, K], 0 for what is not in the streams; `reference` are the
    weights that some terms need, () for all others, of `reference_config` if
    that is not the policy's."""
    with sharding.tracing_on(self.mesh):
      return scoring.sequence_features(
          step_lib.policy_of(params), self.config, streams, sets, terms=terms,
          reference=reference or None, reference_config=reference_config,
          confidence=confidence,
          objective_params=params.get("objective"),
          compute_dtype=self.compute_dtype, remat=self.remat)

  def held_out_values(self, params, streams, sets):
    """Features [B, K] and hidden sums [B, K, D]; see
    `scoring.held_out_values`."""
    with sharding.tracing_on(self.mesh):
      return scoring.held_out_values(
          step_lib.policy_of(params), self.config, streams, sets,
          compute_dtype=self.compute_dtype)


class Stage(NamedTuple):
  """Plain settings of one stage, from the resolved config."""

  name: str
  objective: str  # `objective.name`
  entry: registry.Objective  # what it needs
  objective_settings: dict[str, Any]  # None: each member's own default
  kernel: dict[str, Any]  # strategy, score, temperature, ...
  optimizer: dict[str, Any]
  num_steps: int
  batch_size: int
  seed: int
  refresh: int = 1  # steps that a draw of negatives lasts
  corrected: bool = False  # log mu - log q on every candidate
  num_examples: int = 0  # of the training data, for what remembers them
  num_slots: int = 0  # of a batch
  moving: bool = False  # whether the state carries moving weights
  scoring: str = "auto"  # how the pool gets its scores, see `update.score_pool`
  on_policy: bool = False  # candidates are the policy's own samples

  @property
  def scores_pool(self) -> bool:
    """Whether the current policy scores the pool before the draw; a kernel of
    the user's own always sees the scores."""
    return registry.STRATEGIES.get(self.kernel["strategy"], True)


class Reference(NamedTuple):
  """Of what the objective and the kernel compare the policy with."""

  logps: Callable[[batch_lib.HostBatch], np.ndarray] | None = None  # -> [B, K]
  params: Any = ()  # resident weights, for objectives whose terms need them
  config: model_config.ModelConfig | None = None  # None: as the policy's


NO_REFERENCE = Reference()


def refresh_steps(text: str, num_examples: int, batch_size: int) -> int:
  """Steps that a draw lasts, of "step", "epoch" or a whole number."""
  if text == "epoch":
    return -(-num_examples // batch_size)
  return 1 if text == "step" else int(text)


def make_objective(
    stage: Stage, reference_config: model_config.ModelConfig
) -> step_lib.Objective:
  """The loss of a stage with its settings, and what it needs of the step."""
  entry, kernel, init_params = stage.entry, stage.kernel, None
  include = bool(kernel.get("include_preferred"))
  loss = objective_names.bind(
      stage.objective, stage.objective_settings, include_preferred=include,
      # A draw by weight has used the correction already, as log m.
      corrected=stage.corrected and kernel["strategy"] == "all")
  if entry.parameters:
    init_params = lambda: user_code.load(entry.parameters)(
        jax.random.key(stage.seed), reference_config,
        shared_mask=first_setting(stage, "shared_mask", False))
  return step_lib.Objective(
      loss, lambda: objective_names.first_state(
          stage.objective, stage.num_examples), init_params,
      preferred_weight=entry.include_preferred and not include,
      prefix_length="prefix" in entry.terms, mismatched=entry.mismatched,
      progress=entry.progress, contrast=entry.contrast, reduce=entry.reduce)


def make_functions(
    stage: Stage,
    model: Model,
    reference_config: model_config.ModelConfig | None = None,
) -> step_lib.StepFunctions:
  """The jitted functions of a stage; `reference_config` is that of resident
  reference weights, None: as the policy's."""
  entry, options = stage.entry, dict(stage.optimizer)
  schedule = optimizer_lib.make_schedule(
      schedule=options.pop("schedule"),
      learning_rate=options.pop("learning_rate"),
      warmup_ratio=options.pop("warmup_ratio"), num_steps=stage.num_steps)
  offload = options.pop("offload", False)
  options.pop("max_skipped", None)  # of the loop
  tx = optimizer_lib.make_optimizer(schedule=schedule, **options)
  if any(jnp.finfo(x.dtype).bits < 32
         for x in jax.tree.leaves(model.param_shapes)):
    tx = optimizer_lib.with_master(tx)
  kernel = {name: value for name, value in stage.kernel.items()
            if name not in ("refresh", "scoring")}
  if ":" in kernel["strategy"]:
    kernel["custom"] = user_code.load(
        user_code.check_kernel(kernel["strategy"]).place)
  return step_lib.make_step_functions(
      functools.partial(
          model.features, terms=entry.terms,
          confidence=first_setting(stage, "confidence", None),
          reference_config=reference_config),
      model.sequence_logps, model.held_out_values,
      make_objective(stage, reference_config or model.config),
      step_lib.Kernel(
          **kernel, replace=entry.replace, corrected=stage.corrected),
      tx, schedule, num_steps=stage.num_steps, refresh=stage.refresh,
      batch_size=stage.batch_size, num_examples=stage.num_examples,
      num_slots=stage.num_slots, beta=first_setting(stage, "beta", 1.0),
      param_shapes=model.param_shapes, moving=stage.moving,
      replicated=sharding.replicated(model.mesh), offload=offload)


def implicit_rewards(
    objective: str,
    settings: dict[str, Any],
    logps: np.ndarray,
    ref_logps: np.ndarray,
    lengths: np.ndarray,
) -> np.ndarray:
  """[N, K] beta times the log ratio, as an objective has it.

  Args:
    objective: its name.
    settings: its own.
    logps: [N, K] nats, of the policy.
    ref_logps: [N, K] nats; 0 for objectives without a reference.
    lengths: [N, K] scored tokens, by which some objectives divide.
  """
  per_token = objective_names.find_objective(objective).per_token or (
      objective == "ipo" and settings["length_average"])
  ratios = np.asarray(logps, np.float64) - ref_logps
  return _first(objective, settings, "beta", 1.0) * (
      ratios / np.maximum(lengths, 1) if per_token else ratios)


def first_setting(stage: Stage, name: str, default: Any) -> Any:
  """A setting of the first member of the objective that takes it."""
  return _first(stage.objective, stage.objective_settings, name, default)


def _first(objective, settings, name, default):
  return next((member.settings[name] for member in objective_names.members(
      objective, settings) if name in member.settings), default)
