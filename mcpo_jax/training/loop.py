"""One stage of training: restore, step, log, evaluate, save.

Read `train` from top to bottom; `update.run_step` is one update.
"""

import contextlib
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

import mcpo_jax
from mcpo_jax import (
    checkpoints,
    errors,
    faults,
    hosts,
    memory,
    preempt,
    registry,
    types,
    watch,
)
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import estimator, launches, performance, update
from mcpo_jax.training import metrics as metrics_lib
from mcpo_jax.training import rounds as rounds_lib
from mcpo_jax.training import step as step_lib
from mcpo_jax.training.stage import (
    NO_REFERENCE,
    Model,
    Reference,
    Stage,
    make_functions,
)


class Schedule(NamedTuple):
  """When to do what, in updates."""

  log_every: int
  save_every: int
  keep: int
  evaluate_every: int
  patience: int | None
  keep_best: bool
  estimate_every: int | None = None  # `estimator.compare_gradients`
  show_every: int = 1
  profile: pathlib.Path | None = None  # folder of a trace of some updates
  save_seconds: float = checkpoints.TIMEOUT_SECONDS  # that a save may take
  mirror: str | None = None  # place in an object store


def tell_non_finite(
    metrics: dict[str, Any], batch: batch_lib.HostBatch, step: int,
    logps: np.ndarray, path: pathlib.Path,
) -> errors.NonFiniteError:
  """Writes the batch of an update that was not made to a file, a line a set:
  its id, loss, and each candidate's id and log-prob by the weights of now.

  Args:
    metrics: of the update.
    batch: of the update.
    step: updates before it.
    logps: [B, K] nats.
    path: of the file, which is appended to.

  Returns:
    train.non_finite, with the example ids at fault.
  """
  losses = np.asarray(metrics["loss_per_set"])
  plain = lambda x: float(x) if np.isfinite(x) else str(float(x))
  rows = [{
      "step": step + 1, "prompt_id": one.prompt_id, "loss": plain(losses[b]),
      "candidate_ids": [int(one.candidate_ids[k]) for k in slots],
      "logps": [plain(x) for x in logps[b, :len(slots)]]}
      for b, (one, slots) in enumerate(zip(batch.sets, batch.order))]
  if hosts.is_first():
    with open(path, "a") as file:
      file.writelines(json.dumps(row) + "\n" for row in rows)
  bad = np.flatnonzero(~np.isfinite(losses[:len(batch.sets)]))
  ids = [batch.sets[b].prompt_id for b in (bad if len(bad) else range(
      len(batch.sets)))]
  return errors.NonFiniteError(
      "train.non_finite", "loss or gradient is not finite; the weights are "
      "those before this update", where=f"step {step}, prompt_id "
      + ", ".join(ids[:8]), got=(float(metrics["loss"]),
                                 float(metrics["grads/global_norm"])),
      want="finite loss and gradient norm",
      hint=f"lower the learning rate, or look at these examples, in {path}; "
      "optimizer.max_skipped leaves so many such updates in a row out")


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
      or stage.kernel["include_preferred"]
      or stage.kernel["strategy"] not in registry.STRATEGIES):
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
    reference: Reference = NO_REFERENCE,
    evaluate: Callable[
        [step_lib.StepFunctions, step_lib.TrainState], dict[str, float]
    ] | None = None,
    expect_start: bool = False,
    rounds: rounds_lib.Rounds | None = None,
    show: Callable[[int, batch_lib.HostBatch, dict[str, Any]], None]
    = lambda step, batch, metrics: None,
) -> tuple[types.Params, int]:
  """Trains one stage to its last step, from wherever it stopped.

  Args:
    stage, model, when: settings.
    make_batch: step -> HostBatch.
    start: gives the first of the weights that are trained; called unless a
      checkpoint is found.
    folder: of this stage, holds `checkpoints/`.
    writer: of metrics.
    meta: goes into every manifest; a checkpoint with other values of these
      keys is refused.
    reference: what the objective and the kernel read of it.
    evaluate: metrics on held-out data; the highest "eval/accuracy" is best.
    expect_start: the first weights are the reference's, so that
      `check_softmax_start` must pass.
    rounds: of on-policy candidates, of which `make_batch` makes its batches.
    show: is told the updates done, the batch and `run_step`'s metrics, every
      `when.show_every` updates.

  Returns:
    the trained weights, the best if `when.keep_best`, and the updates behind
    them.

  Raises:
    NonFiniteError, CheckpointError. Preempted and ServiceError, when all is
      saved.
  """
  functions = make_functions(stage, model, reference.config)
  meter = performance.Meter(functions, model.mesh, when.profile)
  keeper = checkpoints.Checkpointer(
      folder / "checkpoints", keep=when.keep, timeout=when.save_seconds,
      mirror=when.mirror and f"{when.mirror}/{stage.name}")
  with preempt.guarded():
    try:
      return _train(stage, model, make_batch, start, folder, writer, when,
                    functions, keeper, meter, meta, reference, evaluate,
                    expect_start, rounds, show)
    finally:
      meter.close()
      # Also commits a save that was under way at an error, unless others, who
      # may not come to that, would have to take part.
      if hosts.count() == 1 or sys.exc_info()[0] in (None, errors.Preempted):
        with watch.phase("save", f"{stage.name}: the last save"):
          keeper.close()
          hosts.meet("the last save")  # who is told of an end ends at once
      if rounds is not None:
        rounds.close()


def _train(
    stage, model, make_batch, start, folder, writer, when, functions, keeper,
    meter, meta, reference, evaluate, expect_start, rounds, show,
) -> tuple[types.Params, int]:
  """The body of `train`."""
  # --- Restore ---------------------------------------------------------------
  hosts.check_same(
      "hosts.run", f"the stage {stage.name}", meta | {
          "num_steps": stage.num_steps, "num_examples": stage.num_examples},
      hint="data, weights and code of all must be the same")
  code = [mcpo_jax.__version__, launches.commit_of_code()]
  keeper.check_room(functions.state_shapes, best=when.keep_best)
  memory.check_host(
      host_bytes(functions.state_shapes), f"the state of {stage.name}")
  with watch.phase("work", f"{stage.name}: the newest checkpoint"):
    restored = keeper.restore_latest(functions.state_shapes)
  best = {"accuracy": -1.0, "step": 0, "waited": 0}
  step, evaluated = 0, evaluate is None
  skipped = in_a_row = 0  # updates that were not finite
  if restored is None:
    state = functions.init(start())
    writer.rewind(stage.name, -1)
  else:
    state, saved = restored
    step, best = saved["step"], saved["best"]
    evaluated |= saved["evaluated"]
    skipped, in_a_row = saved["skipped"]
    check_same_run(saved, meta, folder)
    logging.info("%s resumes at step %d", stage.name, step)
    writer.rewind(stage.name, step, evaluated=evaluated)
  on_disk = step
  keeper.protect(best["step"] if when.keep_best else None)

  def save() -> None:
    if rounds is not None:
      with watch.phase("work", f"{stage.name}: rounds under way"):
        rounds.settle()
    writer.keep()
    with watch.phase("save", f"{stage.name}: the checkpoint of step {step}"):
      keeper.save(step, state, meta | {
          "best": best, "evaluated": evaluated, "skipped": [skipped, in_a_row],
          "code": code,
          "cursor": {"step": step, "examples": step * stage.batch_size}})

  def judge() -> dict[str, Any]:
    """The best after an evaluation of now."""
    with watch.phase("work", f"{stage.name}: the evaluation at step {step}"):
      values = evaluate(functions, state)
    writer.write(stage.name, step, values)
    if step == 0:
      return best
    logging.info("%s %d/%d %s", stage.name, step, stage.num_steps,
                 metrics_lib.one_line(values))
    if values["eval/accuracy"] > best["accuracy"]:
      return {"accuracy": values["eval/accuracy"], "step": step, "waited": 0}
    return best | {"waited": best["waited"] + 1}

  # --- Loop ------------------------------------------------------------------
  bar = tqdm(total=stage.num_steps, initial=step, desc=stage.name,
             unit="step", disable=not is_watched())
  try:
    if not evaluated:  # the start is not, nor where a stop came in between
      best, evaluated = judge(), True
    meter.restart()
    stop = step >= stage.num_steps or _patience_over(best, when)
    first = True  # compiles
    while not stop:
      preempt.check()
      if rounds is not None:
        with watch.phase("work", f"{stage.name}: a round at step {step}"):
          state, values = rounds.advance(step, state)
        if values:
          writer.write(stage.name, step + 1, values)
      faults.point("data.next")
      batch = make_batch(step)
      faults.point("step.before")
      if stage.refresh > 1 and step % stage.refresh == 0:
        state = update.draw_window(
            stage, model, functions, state, make_batch, reference)
      if when.estimate_every and step % when.estimate_every == 0:
        writer.write(stage.name, step + 1, estimator.compare_gradients(
            stage, model, functions, state, batch, reference))
      with meter.step(step), watch.phase(
          "compile" if first else "step", f"{stage.name}: update {step + 1}"):
        state, metrics = update.run_step(
            stage, model, functions, state, batch, reference)
        metrics = jax.device_get(metrics)
      first = False
      with watch.phase("save", f"{stage.name}: the save under way"):
        keeper.poll()
      in_a_row = 0 if metrics["finite"] else in_a_row + 1
      if in_a_row:
        error = tell_non_finite(metrics, batch, step, np.asarray(
            update.score_chunks(
                model, functions, state.params, batch, model.put_replicated(
                    batch.meta), model.pack_all(batch)).logps),
                                folder / "non_finite.jsonl")
        if in_a_row > stage.optimizer.get("max_skipped", 0):
          raise error
        logging.warning("left out: %s", error)
        skipped += 1
      if step == 0 and expect_start and not in_a_row:
        check_softmax_start(
            float(metrics["loss"]), stage, batch, model.compute_dtype)
      step += 1
      preempt.hold()
      meter.add(step, **{name: metrics.pop(name)
                         for name in ("tokens", "flops", "shapes")})
      faults.point("step.after")
      if step % when.show_every == 0 or step == 1:
        show(step, batch, metrics)

      if step % when.log_every == 0 or step == stage.num_steps or step == 1:
        row = {k: v for k, v in metrics.items() if np.ndim(v) == 0}
        del row["finite"]
        row |= meter.row() | {"epoch": float(batch.meta.visit.max())}
        if stage.optimizer.get("max_skipped"):
          row["updates_skipped"] = skipped
        writer.write(stage.name, step, row)
        if bar.disable:
          logging.info("%s %d/%d %s", stage.name, step, stage.num_steps,
                       metrics_lib.one_line(row))
        bar.set_postfix_str(metrics_lib.one_line(row))
      bar.update()

      last = step == stage.num_steps
      if evaluate is not None and (step % when.evaluate_every == 0 or last):
        evaluated = False
        best, evaluated = judge(), True
        meter.restart()
      stop = last or _patience_over(best, when)
      if step % when.save_every == 0 or stop or (
          best["step"] == step and when.keep_best):
        save()
        on_disk = step
        keeper.protect(best["step"] if when.keep_best else None)
  except errors.Preempted:
    if step > on_disk:
      save()
    raise preempt.stopped(
        f"{stage.name} is saved at step {step}" if step else "") from None
  except errors.ServiceError:  # who did not answer may be away for long
    if step > on_disk and hosts.count() == 1:
      with contextlib.suppress(errors.ServiceError):  # a round of a lag
        save()
    raise
  bar.close()

  # --- Result ----------------------------------------------------------------
  if when.keep_best and 0 < best["step"] != step:
    step = best["step"]
    logging.info("%s: step %d evaluated best", stage.name, step)
    state = keeper.restore(step, functions.state_shapes)
  return step_lib.policy_of(state.params), step


def host_bytes(state: Any) -> int:
  """Bytes of the host that training takes at least: the copy that a save
  writes, and where the host is the device the state and the gradients too."""

  def of(tree: Any, *, once: bool) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
      places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
      count = len(set(map(str, places.values()))) if once else len(places)
      total += count * leaf.dtype.itemsize * math.prod(
          leaf.sharding.shard_shape(leaf.shape))
    return total

  device = jax.tree.leaves(state)[0].sharding.mesh.local_devices[0]
  copy = of(state, once=True)
  if device.platform != "cpu":
    return copy
  return copy + of(state, once=False) + of(state.params, once=False)


def is_watched() -> bool:
  """Whether somebody sees a line that changes: on a terminal or in a notebook,
  where the interpreter has prompts."""
  return sys.stderr.isatty() or hasattr(sys, "ps1")


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
