"""One update on one batch, and the scores of held-out batches.

What the host does around the jitted functions of `step`: packs streams, adds
up chunks, reads which candidates were drawn.
"""

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mcpo_jax import faults, types
from mcpo_jax.data import packing
from mcpo_jax.models import flops
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import step as step_lib
from mcpo_jax.training.stage import Model, Reference, Stage


def run_step(
    stage: Stage,
    model: Model,
    functions: step_lib.StepFunctions,
    state: step_lib.TrainState,
    batch: batch_lib.HostBatch,
    reference: Reference,
) -> tuple[step_lib.TrainState, dict[str, jax.Array]]:
  """One update on one batch: score, draw, pack, gradient, apply.

  Where a draw lasts several steps it was made by `draw_window`. Beside scalars
  the metrics hold what was seen of the pool: `kernel/selected` and its mask
  [B, M], and where they are known `kernel/log_weights`, `logps` and
  `ref_logps` [B, K].
  """
  batch = with_anchors(batch, stage, reference)
  sets = model.put_replicated(batch.meta)
  values, pool = None, []
  if stage.scores_pool and stage.refresh == 1:
    pool = model.pack_all(batch)
    values = score_chunks(model, functions, state.params, batch, sets, pool)
  memory = state.memory
  if stage.refresh == 1:
    logps = (values or model.no_features(batch)).logps
    drawn, sets, memory, info = functions.draw(
        stage.seed, state.step, memory, logps, sets)
  else:
    drawn, sets, info = functions.recall(state.draws, state.step, sets)
  slots = drawn_slots(drawn, batch, contrast=stage.entry.contrast)
  known = values is not None and not stage.entry.terms
  chunks = model.pack(batch.sets, slots, batch.order, whole=not known)
  inputs = step_lib.Inputs(sets, drawn, state.objective_state, state.step)

  faults.point("step.drawn")
  present = [np.isin(np.arange(len(batch.meta.role)), c.prompt_slot)
             for c in chunks]
  uncut = np.sum(present, axis=0).max(initial=0) <= 1
  if not known and uncut and (stage.entry.separable or len(chunks) == 1):
    total = functions.zeros(
        state.params, model.no_features(batch, stage.entry.terms), inputs)
    for i, (chunk, here) in enumerate(zip(chunks, present)):
      faults.point("step.accumulate" if i else "step.first_chunk")
      total, objective_state = functions.from_loss(
          state.params, model.frozen, reference.params, total,
          model.put(chunk), inputs, here)
      inputs = inputs._replace(objective_state=objective_state)
  else:
    if not known:
      values = feature_chunks(
          stage, model, functions, state.params, batch, inputs, chunks,
          reference)
    cotangent, total, objective_state = functions.cotangents(
        state.params, values, inputs)
    inputs = inputs._replace(objective_state=objective_state)
    for i, chunk in enumerate(chunks):
      faults.point("step.accumulate" if i else "step.first_chunk")
      total = functions.from_cotangents(
          state.params, model.frozen, reference.params, total,
          model.put(chunk), inputs, cotangent)
  state, metrics = functions.update(state, total, inputs, memory)
  used = sum(np.count_nonzero(c.prompt_slot >= 0) for c in pool + chunks)
  if values is not None and not stage.entry.terms:
    metrics["logps"] = values.logps
  if "ref" in batch.meta.anchors:
    metrics["ref_logps"] = batch.meta.anchors["ref"]
  return state, metrics | info | {
      "kernel/selected": drawn.selected,
      "kernel/selected_mask": drawn.selected_mask,
      "flops": step_flops(model, batch, slots, scored=bool(pool)),
      "tokens": used, "perf/pad_fraction": packing.pad_fraction(pool + chunks)}


def step_flops(
    model: Model,
    batch: batch_lib.HostBatch,
    slots: list[np.ndarray],
    *,
    scored: bool,
) -> float:
  """FLOPs that one update needs: a forward pass of the pool if it is scored,
  three of what is trained on; two beside frozen weights, which get no gradient,
  and adapters are too small to count."""
  forward = lambda slots: flops.pass_flops(
      model.config, batch.sets,
      [np.asarray(order, int)[picked]
       for order, picked in zip(batch.order, slots)])
  pool = [np.arange(len(order)) for order in batch.order]
  passes = 2 if model.frozen else 3
  return passes * forward(slots) + (forward(pool) if scored else 0.0)


def draw_window(
    stage: Stage,
    model: Model,
    functions: step_lib.StepFunctions,
    state: step_lib.TrainState,
    make_batch: Callable[[int], batch_lib.HostBatch],
    reference: Reference,
) -> step_lib.TrainState:
  """Draws the negatives of the next `stage.refresh` steps, all by the weights
  of now, and puts them into the state."""
  step, draws = int(state.step), state.draws
  rows = range(min(stage.refresh, stage.num_steps - step))
  for row in tqdm(rows, desc="draws", unit="step", leave=False,
                  disable=not sys.stderr.isatty()):
    batch = with_anchors(make_batch(step + row), stage, reference)
    sets = model.put_replicated(batch.meta)
    values = score_chunks(model, functions, state.params, batch, sets,
                          model.pack_all(batch))
    drawn, sets, _, seen = functions.draw(
        stage.seed, state.step, (), values.logps, sets)
    draws = functions.keep(draws, row, drawn, sets, seen)
  return state._replace(draws=draws)


def score_chunks(
    model: Model,
    functions: step_lib.StepFunctions,
    params: types.Params,
    batch: batch_lib.HostBatch,
    sets: types.SetBatch,
    chunks: list[types.Streams],
) -> types.Features:
  """Log-probs [B, K] of what stands in the chunks, without gradient."""
  logps, policy = model.no_features(batch).logps, model.policy(params)
  for chunk in chunks:
    logps += functions.score(policy, model.put(chunk), sets)
  return types.Features(logps)


def feature_chunks(
    stage: Stage,
    model: Model,
    functions: step_lib.StepFunctions,
    params: types.Params,
    batch: batch_lib.HostBatch,
    inputs: step_lib.Inputs,
    chunks: list[types.Streams],
    reference: Reference,
) -> types.Features:
  """All that the objective needs [B, K] of what stands in the chunks, without
  gradient."""
  values = model.no_features(batch, stage.entry.terms)
  policy = model.policy(params)
  for chunk in chunks:
    values = jax.tree.map(jnp.add, values, functions.features(
        policy, reference.params, model.put(chunk), inputs))
  return values


def examine_chunks(
    model: Model,
    functions: step_lib.StepFunctions,
    params: types.Params,
    sets: types.SetBatch,
    chunks: list[types.Streams],
) -> tuple[types.Features, np.ndarray]:
  """What an evaluation reads of the chunks: Features [B, K] and, on the host
  in float64, sums of hidden states [B, K, D]; see `scoring.held_out_values`."""
  values, hidden = functools.reduce(
      lambda total, more: jax.tree.map(jnp.add, total, more),
      (functions.examine(model.policy(params), model.put(chunk), sets)
       for chunk in chunks))
  return values, np.asarray(hidden, np.float64)


def drawn_slots(
    drawn: types.KernelState, batch: batch_lib.HostBatch, *, contrast: bool
) -> list[np.ndarray]:
  """Per set the slots whose tokens the gradient needs, ascending.

  None for a set whose chains drew no negative: it has no gradient.
  """
  slots, mask = jax.device_get((drawn.selected, drawn.selected_mask))
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
  # [N, K] inner products of a candidate's sum of hidden states with slot 0's
  products: np.ndarray
  topk_mass: np.ndarray  # [N] summed over tokens of the preferred completion
  topk_entropy: np.ndarray  # [N] likewise


def score_held_out(
    stage: Stage,
    model: Model,
    functions: step_lib.StepFunctions,
    state: step_lib.TrainState,
    held: list[batch_lib.HostBatch],
    reference: Reference,
) -> HeldOut:
  """Scores the pools of held-out batches with the current weights."""
  losses, rows = [], []
  for batch in held:
    batch = with_anchors(batch, stage, reference)
    sets, chunks = model.put_replicated(batch.meta), model.pack_all(batch)
    values, hidden = examine_chunks(
        model, functions, state.params, sets, chunks)
    logps, topk = values.logps, values.terms
    drawn, sets, _, _ = functions.draw(
        stage.seed, state.step, state.memory, logps, sets)
    inputs = step_lib.Inputs(sets, drawn, state.objective_state, state.step)
    if stage.entry.terms:
      values = feature_chunks(stage, model, functions, state.params, batch,
                              inputs, chunks, reference)
    loss, _ = functions.evaluate(values, inputs)
    seen = batch.meta.candidate_mask[:, 0]
    losses.append(np.asarray(loss)[seen])
    ref = batch.meta.anchors.get("ref", np.zeros_like(batch.meta.scores))
    rows.append(tuple(x[seen] for x in (
        np.asarray(logps), ref, batch.meta.role, batch.meta.scores,
        batch.meta.lengths,
        np.einsum("bd,bkd->bk", hidden[:, 0], hidden),
        *(np.asarray(topk[name])[:, 0]
          for name in ("topk_mass", "topk_entropy")))))
  held_out = HeldOut(0.0, *map(np.concatenate, zip(*rows)))
  count = len(held_out.role)
  if stage.entry.reduce == "tokens":
    count = held_out.lengths[:, 0].sum()
  return held_out._replace(loss=float(np.concatenate(losses).sum() / count))


def with_anchors(
    batch: batch_lib.HostBatch, stage: Stage, reference: Reference
) -> batch_lib.HostBatch:
  """The batch with anchors["ref"] filled, if there is a reference; it is also
  the mu of candidates whose q is known, and the policy before the first round.
  """
  if reference.logps is None:
    return batch
  anchors, ref = batch.meta.anchors, reference.logps(batch)
  anchors = anchors | {"ref": ref}
  if "prev" in stage.entry.anchors:
    anchors["prev"] = ref
  if stage.corrected:  # held-out records of online runs: as if drawn from it
    anchors = {"proposal_q": ref} | anchors | {"proposal_mu": ref}
  return batch._replace(meta=batch.meta._replace(anchors=anchors))
