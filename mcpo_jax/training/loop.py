"""One stage of training: restore, step, log, evaluate, save.

Read `train` from top to bottom; `run_step` is one update.
"""

import functools
import importlib
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from mcpo_jax import checkpoints, errors, faults, settings, sharding, types
from mcpo_jax.data import packing
from mcpo_jax.models import config as model_config
from mcpo_jax.models import scoring
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import metrics as metrics_lib
from mcpo_jax.training import optimizer as optimizer_lib
from mcpo_jax.training import step as step_lib


class Model(NamedTuple):
  """What all stages share: the architecture, where it lies, how it is fed."""

  config: model_config.ModelConfig
  mesh: jax.sharding.Mesh
  param_shapes: Any  # tree of ShapeDtypeStruct with shardings
  compute_dtype: Any
  remat: str
  num_streams: int  # of a chunk
  stream_length: int
  pad_id: int

  @property
  def param_shardings(self) -> Any:
    return jax.tree.map(lambda x: x.sharding, self.param_shapes)

  def pack(self, sets, slots, order) -> list[types.Streams]:
    """Chunks of one shape; see `packing.pack_streams`."""
    return packing.pack_streams(
        sets, slots, order, num_streams=self.num_streams,
        stream_length=self.stream_length, pad_id=self.pad_id)

  def pack_all(self, batch: batch_lib.HostBatch) -> list[types.Streams]:
    """Chunks with every candidate of a batch."""
    everything = [list(range(len(o))) for o in batch.order]
    return self.pack(batch.sets, everything, batch.order)

  def put(self, streams: types.Streams) -> types.Streams:
    """A chunk on the devices, streams split over data and fsdp."""
    return sharding.put_global(streams, sharding.batch_sharding(self.mesh))

  def put_replicated(self, tree: Any) -> Any:
    """Set metadata, whole on every device."""
    return sharding.put_global(tree, sharding.replicated(self.mesh))

  def no_logps(self, batch: batch_lib.HostBatch) -> jax.Array:
    """[B, K] zeros, to add chunks to."""
    dtype = jnp.promote_types(self.compute_dtype, jnp.float32)
    return jax.device_put(jnp.zeros(batch.meta.role.shape, dtype),
                          sharding.replicated(self.mesh))

  def token_logps(self, params, streams):
    """[S, T] float32; see `scoring.token_logps`."""
    return scoring.token_logps(
        params, self.config, streams, compute_dtype=self.compute_dtype,
        remat=self.remat)

  def sequence_logps(self, params, streams, num_sets, num_slots):
    """[B, K] float32, 0 for what is not in the streams."""
    return scoring.sequence_logps(
        self.token_logps(params, streams), streams, num_sets=num_sets,
        num_slots=num_slots)


class Stage(NamedTuple):
  """Plain settings of one stage, from the resolved config."""

  name: str
  objective: str
  objective_settings: dict[str, Any]
  kernel: dict[str, Any]  # strategy, score, temperature, ...
  optimizer: dict[str, Any]
  num_steps: int
  batch_size: int
  seed: int
  refresh: int = 1  # steps that a draw of negatives lasts
  corrected: bool = False  # log mu - log q on every candidate

  @property
  def entry(self) -> settings.Objective:
    return settings.OBJECTIVES[self.objective]

  @property
  def scores_pool(self) -> bool:
    """Whether the current policy scores the pool before the draw."""
    return settings.STRATEGIES[self.kernel["strategy"]]


class Schedule(NamedTuple):
  """When to do what, in updates."""

  log_every: int
  save_every: int
  keep: int
  evaluate_every: int
  patience: int | None
  keep_best: bool


def refresh_steps(text: str, num_examples: int, batch_size: int) -> int:
  """Steps that a draw lasts, of "step", "epoch" or a whole number."""
  if text == "epoch":
    return -(-num_examples // batch_size)
  return 1 if text == "step" else int(text)


def make_functions(stage: Stage, model: Model) -> step_lib.StepFunctions:
  """The jitted functions of a stage."""
  entry, options = stage.entry, dict(stage.optimizer)
  schedule = optimizer_lib.make_schedule(
      schedule=options.pop("schedule"),
      learning_rate=options.pop("learning_rate"),
      warmup_ratio=options.pop("warmup_ratio"), num_steps=stage.num_steps)
  tx = optimizer_lib.make_optimizer(schedule=schedule, **options)
  module, function = entry.place.split(":")
  bound = dict(stage.objective_settings)
  if stage.objective == "cd":
    bound["include_preferred"] = stage.kernel["include_preferred"]
  if stage.corrected:  # a draw by weight has used the correction, as log m
    bound["corrected"] = stage.kernel["strategy"] == "all"
  objective = functools.partial(
      getattr(importlib.import_module(module), function), **bound)
  return step_lib.make_step_functions(
      model.sequence_logps, objective, tx, schedule,
      strategy=stage.kernel["strategy"], score=stage.kernel["score"],
      temperature=stage.kernel["temperature"],
      num_negatives=stage.kernel["num_negatives"],
      include_preferred=stage.kernel["include_preferred"],
      replace=entry.replace, corrected=stage.corrected,
      preferred_weight="include_preferred" in bound
      and not bound["include_preferred"],
      refresh=stage.refresh, batch_size=stage.batch_size,
      beta=stage.objective_settings.get("beta", 1.0),
      reduce=entry.reduce, param_shapes=model.param_shapes,
      replicated=sharding.replicated(model.mesh))


def run_step(
    stage: Stage,
    model: Model,
    functions: step_lib.StepFunctions,
    state: step_lib.TrainState,
    batch: batch_lib.HostBatch,
    reference_logps: Callable[[batch_lib.HostBatch], np.ndarray] | None,
) -> tuple[step_lib.TrainState, dict[str, jax.Array]]:
  """One update on one batch: score, draw, pack, gradient, apply.

  Where a draw lasts several steps it was made by `draw_window`.
  """
  batch = with_anchors(batch, reference_logps)
  sets = model.put_replicated(batch.meta)
  logps = model.no_logps(batch)
  scored = stage.scores_pool and stage.refresh == 1
  pool = model.pack_all(batch) if scored else []
  if scored:
    logps = score_chunks(model, functions, state.params, batch, sets, pool)
  if stage.refresh == 1:
    drawn, sets, info = functions.draw(stage.seed, logps, sets)
  else:
    drawn, sets, info = functions.recall(state.draws, state.step, sets)
  slots = drawn_slots(drawn, batch, contrast=stage.entry.contrast)
  chunks = model.pack(batch.sets, slots, batch.order)

  faults.point("step.drawn")
  present = [np.isin(np.arange(len(batch.meta.role)), c.prompt_slot)
             for c in chunks]
  uncut = np.sum(present, axis=0).max(initial=0) <= 1
  objective_state = state.objective_state
  if not scored and uncut and (
      stage.entry.separable or len(chunks) == 1):
    total = functions.zeros(
        state.params, logps, sets, drawn, objective_state)
    for i, (chunk, here) in enumerate(zip(chunks, present)):
      faults.point("step.accumulate" if i else "step.first_chunk")
      total, objective_state = functions.from_loss(
          state.params, total, model.put(chunk), sets, drawn,
          objective_state, here)
  else:
    if not scored:
      logps = score_chunks(model, functions, state.params, batch, sets, chunks)
    cotangent, total, objective_state = functions.cotangents(
        state.params, logps, sets, drawn, objective_state)
    for i, chunk in enumerate(chunks):
      faults.point("step.accumulate" if i else "step.first_chunk")
      total = functions.from_cotangents(
          state.params, total, model.put(chunk), cotangent)
  state, metrics = functions.update(
      state, total, sets, drawn, objective_state)
  used = sum(np.count_nonzero(c.prompt_slot >= 0) for c in pool + chunks)
  return state, metrics | info | {
      "tokens": used, "perf/pad_fraction": packing.pad_fraction(pool + chunks)}


def draw_window(
    stage: Stage,
    model: Model,
    functions: step_lib.StepFunctions,
    state: step_lib.TrainState,
    make_batch: Callable[[int], batch_lib.HostBatch],
    reference_logps: Callable[[batch_lib.HostBatch], np.ndarray] | None,
) -> step_lib.TrainState:
  """Draws the negatives of the next `stage.refresh` steps, all by the weights
  of now, and puts them into the state."""
  step, draws = int(state.step), state.draws
  rows = range(min(stage.refresh, stage.num_steps - step))
  for row in tqdm(rows, desc="draws", unit="step", leave=False,
                  disable=not sys.stderr.isatty()):
    batch = with_anchors(make_batch(step + row), reference_logps)
    sets = model.put_replicated(batch.meta)
    logps = score_chunks(model, functions, state.params, batch, sets,
                         model.pack_all(batch))
    draws = functions.keep(
        draws, row, *functions.draw(stage.seed, logps, sets))
  return state._replace(draws=draws)


def score_chunks(
    model: Model,
    functions: step_lib.StepFunctions,
    params: types.Params,
    batch: batch_lib.HostBatch,
    sets: types.SetBatch,
    chunks: list[types.Streams],
) -> jax.Array:
  """[B, K] log-probs of what stands in the chunks, without gradient."""
  logps = model.no_logps(batch)
  for chunk in chunks:
    logps += functions.score(params, model.put(chunk), sets)
  return logps


def drawn_slots(
    drawn: types.KernelState, batch: batch_lib.HostBatch, *, contrast: bool
) -> list[np.ndarray]:
  """Per set the slots whose tokens the gradient needs, ascending.

  None for a set whose chains drew no negative: it has no gradient.
  """
  slots, mask = jax.device_get(drawn)
  out = []
  for b in range(len(batch.sets)):
    negatives = np.unique(slots[b][mask[b]]).tolist()
    out.append([0, *negatives] if negatives or not contrast else [])
  return out


class HeldOut(NamedTuple):
  """What a policy makes of held-out sets, in host arrays."""

  loss: float  # of the objective, negatives drawn as at a first visit
  logps: np.ndarray  # [N, K] nats
  ref_logps: np.ndarray  # [N, K] nats, 0 without a reference
  role: np.ndarray  # [N, K]
  scores: np.ndarray  # [N, K]
  lengths: np.ndarray  # [N, K] scored tokens


def score_held_out(
    stage: Stage,
    model: Model,
    functions: step_lib.StepFunctions,
    state: step_lib.TrainState,
    held: list[batch_lib.HostBatch],
    reference_logps: Callable[[batch_lib.HostBatch], np.ndarray] | None,
) -> HeldOut:
  """Scores the pools of held-out batches with the current weights."""
  losses, rows = [], []
  for batch in held:
    batch = with_anchors(batch, reference_logps)
    sets = model.put_replicated(batch.meta)
    logps = score_chunks(model, functions, state.params, batch, sets,
                         model.pack_all(batch))
    drawn, sets, _ = functions.draw(stage.seed, logps, sets)
    loss, _ = functions.evaluate(logps, sets, drawn, state.objective_state)
    seen = batch.meta.candidate_mask[:, 0]
    losses.append(np.asarray(loss)[seen])
    ref = batch.meta.anchors.get("ref", np.zeros_like(batch.meta.scores))
    rows.append(tuple(x[seen] for x in (
        np.asarray(logps), ref, batch.meta.role, batch.meta.scores,
        batch.meta.lengths)))
  held_out = HeldOut(0.0, *map(np.concatenate, zip(*rows)))
  count = len(held_out.role)
  if stage.entry.reduce == "tokens":
    count = held_out.lengths[:, 0].sum()
  return held_out._replace(loss=float(np.concatenate(losses).sum() / count))


def with_anchors(
    batch: batch_lib.HostBatch,
    reference_logps: Callable[[batch_lib.HostBatch], np.ndarray] | None,
) -> batch_lib.HostBatch:
  """The batch with anchors["ref"] filled, if there is a reference; it is also
  the mu of candidates whose q is known."""
  if reference_logps is None:
    return batch
  anchors, ref = batch.meta.anchors, reference_logps(batch)
  anchors = anchors | {"ref": ref}
  if "proposal_q" in anchors:
    anchors["proposal_mu"] = ref
  return batch._replace(meta=batch.meta._replace(anchors=anchors))


def check_finite(metrics: dict[str, Any], batch: batch_lib.HostBatch,
                 step: int) -> None:
  """Stops the run, weights untouched, with the example ids at fault.

  Raises:
    NonFiniteError: train.non_finite.
  """
  if metrics["finite"]:
    return
  bad = np.flatnonzero(~np.isfinite(metrics["loss_per_set"]))
  ids = [batch.sets[b].prompt_id for b in (bad if len(bad) else range(
      len(batch.sets)))]
  raise errors.NonFiniteError(
      "train.non_finite", "loss or gradient is not finite; the weights are "
      "those before this update", where=f"step {step}, prompt_id "
      + ", ".join(ids[:8]), got=(float(metrics["loss"]),
                                 float(metrics["grads/global_norm"])),
      want="finite loss and gradient norm",
      hint="lower the learning rate, or look at these examples")


def check_softmax_start(
    loss: float, stage: Stage, batch: batch_lib.HostBatch, compute_dtype: Any
) -> None:
  """Start gate of the softmax losses: of equal policy and reference every
  reward is 0, so the loss is the mean over sets of log(1 + negatives).

  Losses of another form, corrected ones, and chains that may stay at the
  preferred completion are not looked at.

  Args:
    loss: of the first step.
    stage: settings.
    batch: of the first step.
    compute_dtype: of the model; decides the tolerance.

  Raises:
    CheckpointError: ckpt.reference_gate.
  """
  if (stage.objective not in ("mcpo", "rnce") or stage.corrected
      or stage.kernel["include_preferred"]):
    return
  meta = batch.meta
  negative = (meta.role == -1) & meta.candidate_mask & meta.candidate_mask[
      :, :1]
  count = np.minimum(negative.sum(axis=1), stage.kernel["num_negatives"])
  if stage.kernel["strategy"] == "all":
    count = np.sum(np.where(negative, meta.multiplicity, 0), axis=1)
  want = float(np.mean(np.log1p(count)[meta.candidate_mask[:, 0]]))
  tolerance = 1e-4 if jnp.finfo(compute_dtype).bits >= 32 else 5e-2
  # A reward may be off by what the gate per token allows.
  tolerance *= max(
      1.0, stage.objective_settings["beta"] * meta.lengths.max() / 10)
  if not abs(loss - want) <= tolerance:
    raise errors.CheckpointError(
        "ckpt.reference_gate", "policy and reference are the same weights, but "
        "the first loss is not that of equal policies", where="step 0",
        got=loss, want=f"log(1 + negatives) = {want:.6g} +- {tolerance:.1g}",
        hint="the reference log-probs belong to other candidates or weights")


def train(
    stage: Stage,
    model: Model,
    make_batch: Callable[[int], batch_lib.HostBatch],
    start: Callable[[], types.Params],
    folder: pathlib.Path,
    writer: metrics_lib.Writer,
    when: Schedule,
    *,
    meta: dict[str, Any],
    reference_logps: Callable[[batch_lib.HostBatch], np.ndarray] | None = None,
    evaluate: Callable[
        [step_lib.StepFunctions, step_lib.TrainState], dict[str, float]
    ] | None = None,
    expect_start: bool = False,
) -> tuple[types.Params, int]:
  """Trains one stage to its last step, from wherever it stopped.

  Args:
    stage, model, when: settings.
    make_batch: step -> HostBatch.
    start: gives the first weights; called unless a checkpoint is found.
    folder: of this stage, holds `checkpoints/`.
    writer: of metrics.
    meta: goes into every manifest; a checkpoint with other values of these
      keys is refused.
    reference_logps: HostBatch -> [B, K] anchors, if the objective or the
      kernel reads them.
    evaluate: metrics on held-out data; the highest "eval/accuracy" is best.
    expect_start: the first weights are the reference's, so that
      `check_softmax_start` must pass.

  Returns:
    the weights, the best if `when.keep_best`, and the updates behind them.

  Raises:
    NonFiniteError, CheckpointError.
  """
  functions = make_functions(stage, model)
  keeper = checkpoints.Checkpointer(folder / "checkpoints", keep=when.keep)
  try:
    return _train(stage, model, make_batch, start, folder, writer, when,
                  functions, keeper, meta, reference_logps, evaluate,
                  expect_start)
  finally:
    keeper.close()  # also commits a save that was under way at an error


def _train(
    stage, model, make_batch, start, folder, writer, when, functions, keeper,
    meta, reference_logps, evaluate, expect_start,
) -> tuple[types.Params, int]:
  """The body of `train`."""
  # --- Restore ---------------------------------------------------------------
  restored = keeper.restore_latest(functions.state_shapes)
  best = {"accuracy": -1.0, "step": 0, "waited": 0}
  step = 0
  if restored is None:
    state = functions.init(start())
    writer.rewind(stage.name, -1)
  else:
    state, saved = restored
    step, best = saved["step"], saved["best"]
    check_same_run(saved, meta, folder)
    logging.info("%s resumes at step %d", stage.name, step)
    writer.rewind(stage.name, step)
  keeper.protect(best["step"] if when.keep_best else None)
  if step == 0 and evaluate is not None:
    writer.write(stage.name, 0, evaluate(functions, state))

  # --- Loop ------------------------------------------------------------------
  bar = tqdm(total=stage.num_steps, initial=step, desc=stage.name,
             unit="step", disable=not sys.stderr.isatty())
  clock, tokens = time.perf_counter(), 0
  stop = step >= stage.num_steps or _patience_over(best, when)
  while not stop:
    batch = make_batch(step)
    faults.point("step.before")
    if stage.refresh > 1 and step % stage.refresh == 0:
      state = draw_window(stage, model, functions, state, make_batch,
                          reference_logps)
    state, metrics = run_step(stage, model, functions, state, batch,
                              reference_logps)
    metrics = jax.device_get(metrics)
    keeper.poll()
    check_finite(metrics, batch, step)
    if step == 0 and expect_start:
      check_softmax_start(
          float(metrics["loss"]), stage, batch, model.compute_dtype)
    step += 1
    tokens += int(metrics.pop("tokens"))
    faults.point("step.after")

    if step % when.log_every == 0 or step == stage.num_steps or step == 1:
      row = {k: v for k, v in metrics.items() if np.ndim(v) == 0}
      del row["finite"]
      row["perf/tokens_per_sec"] = tokens / (time.perf_counter() - clock)
      row["epoch"] = float(batch.meta.visit.max())
      writer.write(stage.name, step, row)
      if bar.disable:
        logging.info("%s %d/%d %s", stage.name, step, stage.num_steps,
                     metrics_lib.one_line(row))
      bar.set_postfix_str(metrics_lib.one_line(row))
      clock, tokens = time.perf_counter(), 0
    bar.update()

    last = step == stage.num_steps
    better = False
    if evaluate is not None and (step % when.evaluate_every == 0 or last):
      values = evaluate(functions, state)
      writer.write(stage.name, step, values)
      logging.info("%s %d/%d %s", stage.name, step, stage.num_steps,
                   metrics_lib.one_line(values))
      better = values["eval/accuracy"] > best["accuracy"]
      best = ({"accuracy": values["eval/accuracy"], "step": step, "waited": 0}
              if better else best | {"waited": best["waited"] + 1})
      clock, tokens = time.perf_counter(), 0
    stop = last or _patience_over(best, when)
    if step % when.save_every == 0 or stop or (better and when.keep_best):
      keeper.save(step, state, meta | {"best": best})
      keeper.protect(best["step"] if when.keep_best else None)
  bar.close()

  # --- Result ----------------------------------------------------------------
  if when.keep_best and 0 < best["step"] != step:
    step = best["step"]
    logging.info("%s: step %d evaluated best", stage.name, step)
    state = keeper.restore(step, functions.state_shapes)
  return state.params, step


def _patience_over(best: dict[str, Any], when: Schedule) -> bool:
  return when.patience is not None and best["waited"] >= when.patience


def check_same_run(
    saved: dict[str, Any], meta: dict[str, Any], folder: pathlib.Path
) -> None:
  """A checkpoint must belong to this config and this data.

  Raises:
    DataError: data.changed_since_checkpoint.
    CheckpointError: ckpt.run_id, naming what differs.
  """
  for key, value in meta.items():
    if saved.get(key) != value and key == "data":
      raise errors.DataError(
          "data.changed_since_checkpoint", "the training data is not what the "
          "checkpoint was trained on", where=str(folder), got=value,
          want=saved.get(key),
          hint="restore the file, or use a fresh --workdir")
    if saved.get(key) != value:
      raise errors.CheckpointError(
          "ckpt.run_id", f"the checkpoint belongs to another {key}",
          where=str(folder), got=saved.get(key), want=value,
          hint="use a fresh --workdir")
