"""One update on one batch, and the scores of held-out batches.

What the host does around the jitted functions of `step`: packs streams, adds
up chunks, reads which candidates were drawn.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from mcpo_jax import faults, preempt, types
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
  scores = Scores(model.no_features(batch).logps)
  if stage.scores_pool and stage.refresh == 1:
    scores = score_pool(stage, model, functions, state, batch, sets)
  memory = state.memory
  if stage.refresh == 1:
    drawn, sets, memory, info = functions.draw(
        stage.seed, state.step, memory, scores.logps, sets)
  else:
    drawn, sets, info = functions.recall(state.draws, state.step, sets)
  slots = drawn_slots(drawn, batch, contrast=stage.entry.contrast)
  known = bool(scores.pool) and not stage.entry.terms
  chunks, passes = [], backward_passes(model)
  if not scores.kept:
    passes += 1
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
    values = types.Features(scores.logps) if known else feature_chunks(
        stage, model, functions, state.params, batch, inputs, chunks, reference)
    cotangent, total, objective_state = functions.cotangents(
        state.params, values, inputs)
    inputs = inputs._replace(objective_state=objective_state)
    for i, chunk in enumerate(chunks):
      faults.point("step.accumulate" if i else "step.first_chunk")
      total = functions.from_cotangents(
          state.params, model.frozen, reference.params, total,
          model.put(chunk), inputs, cotangent)
    while scores.kept:  # each is given back before the next is used
      total = functions.backward(
          state.params, model.frozen, total, scores.kept.pop(0), cotangent)
  state, metrics = functions.update(state, total, inputs, memory)
  run = scores.pool + chunks
  if stage.scores_pool and stage.refresh == 1:
    metrics["logps"] = scores.logps
  if "ref" in batch.meta.anchors:
    metrics["ref_logps"] = batch.meta.anchors["ref"]
  return state, metrics | info | {
      "kernel/selected": drawn.selected,
      "kernel/selected_mask": drawn.selected_mask,
      "flops": passes * forward_flops(model, batch, slots) + (
          forward_flops(model, batch) if scores.pool else 0.0),
      "shapes": {("pool", *c.tokens.shape) for c in scores.pool} | {
          ("drawn", *c.tokens.shape) for c in chunks},
      "tokens": sum(np.count_nonzero(c.prompt_slot >= 0) for c in run),
      "perf/pad_fraction": packing.pad_fraction(run)}


class Scores(NamedTuple):
  """What is known of a pool before the draw."""

  logps: jax.Array  # [B, K] nats, 0 where nothing reads them
  pool: list[types.Streams] = []  # chunks that the policy was run on
  kept: list[Any] = []  # of each, what its backward pass needs; or nothing


def score_pool(
    stage: Stage,
    model: Model,
    functions: step_lib.StepFunctions,
    state: step_lib.TrainState,
    batch: batch_lib.HostBatch,
    sets: types.SetBatch,
) -> Scores:
  """The scores that the kernel draws by, in one of three ways.

  With F(n) a forward pass of a set's prompt and n of its completions, L
  candidates and M that are drawn, an update of all weights costs

    separate  F(1 + L) + 3 F(1 + M)  score without gradient, then train
    together  3 F(1 + L)             one forward pass whose activations wait for
                                     the draw; undrawn candidates have zeros as
                                     cotangents, at full price
    sampler   3 F(1 + M)             what the sampler said when it wrote them

  Sharing prompts, "together" is the cheaper one up to L = 2 for M = 1, and
  further the longer prompts are beside completions: with a prompt as long as
  n completions up to L = 2 + n / 2. "auto" takes what is cheapest for the
  batch: "sampler" where the weights of now wrote all of it, "together" where
  all activations need no more room than those of one chunk. "sampler" is
  "separate" for any other batch.
  """
  scoring, logps = stage.scoring, None
  if scoring == "sampler" or scoring == "auto" and stage.on_policy:
    logps = batch_lib.sampled_logps(batch, int(state.step))
  if logps is not None:
    return Scores(model.put_replicated(logps))
  pool = model.pack_all(batch)
  if scoring == "auto" and not stage.entry.terms:
    room = model.num_streams * model.stream_length
    size, passes = sum(c.tokens.size for c in pool), 1 + backward_passes(model)
    whole = forward_flops(model, batch)
    drawn = forward_flops(model, batch, [
        range(min(1 + stage.kernel["num_negatives"], len(order)))
        for order in batch.order])
    costs = whole + passes * drawn, passes * whole
    if size <= room and costs[1] < costs[0]:
      scoring = "together"
    logging.log_first_n(
        logging.INFO, "scoring of the first pool: %s; %.3g FLOPs separate, "
        "%.3g together, whose %d tokens want room in %d", 1,
        scoring.replace("auto", "separate"), *costs, size, room)
  if scoring == "together":
    parts = [functions.forward(
        state.params, model.frozen, model.put(chunk), sets) for chunk in pool]
    return Scores(sum(logps for logps, _ in parts), pool,
                  [kept for _, kept in parts])
  values = score_chunks(model, functions, state.params, batch, sets, pool)
  return Scores(values.logps, pool)


def backward_passes(model: Model) -> int:
  """Forward passes that a backward pass costs: frozen weights get no gradient,
  and adapters are too small to count."""
  return 1 if model.frozen else 2


def forward_flops(
    model: Model,
    batch: batch_lib.HostBatch,
    slots: list[Sequence[int]] | None = None,
) -> float:
  """FLOPs that a forward pass needs of some slots of each set, None: of all."""
  if slots is None:
    slots = [range(len(order)) for order in batch.order]
  return flops.pass_flops(
      model.config, batch.sets,
      [np.array([order[k] for k in picked], int)
       for order, picked in zip(batch.order, slots)])


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
    preempt.check()
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
