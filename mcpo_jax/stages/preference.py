"""The stage preference: aligns the start on the sets of data.path."""

import json
from typing import Any

import numpy as np
from absl import logging

from mcpo_jax import commit, errors, hosts, objective_names, types, user_code
from mcpo_jax.evaluation import explorer, likelihood, preferences
from mcpo_jax.generation.sampling import GREEDY
from mcpo_jax.models import hf, lora, peft
from mcpo_jax.stages import online as online_stage
from mcpo_jax.stages import pools, references, results, sampling
from mcpo_jax.training import (
  architecture,
  candidates,
  loop,
  metrics,
  setup,
  update,
)
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training import step as step_lib


def run_preference(run: setup.Run, writer: metrics.Writer) -> dict[str, Any]:
  """Aligns the start on the candidate sets of data.path."""
  config, folder = run.config, run.workdir / "preference"
  done = results.read_result(run, "preference")
  if done is not None:
    return done
  model, trained, start = architecture.open_trained(
      run, *architecture.open_model(run, results.find_start(run)))
  stores = pools.open_preference_stores(run)
  data, rows = stores["train"]
  online = config["online"]["enabled"]
  if online:  # what is trained on is sampled, not read
    stores = {name: x for name, x in stores.items() if name != "train"}
  num_slots = max([d.max_candidates for d, _ in stores.values()] + (
      [config["online"]["num_candidates"]] if online else []))
  stage = setup.stage_of(
      config, len(rows), supervised=False, num_slots=num_slots)
  if stage.corrected and not online:
    for store, used in stores.values():
      for row in used:
        batch_lib.behaviour_logps(store, int(row))
  options = {"seed": stage.seed, "num_slots": num_slots,
             "preferred": config["data"]["preferred"],
             "top_k": config["data"]["top_k"],
             "behaviour": stage.corrected and not online}
  rounds = None
  if online:
    rounds = online_stage.make_rounds(run, stage, model, start, data, rows)
    make_batch = rounds.make_batch
    compared = online_stage.make_references(run, model, start, stores)
  else:
    make_batch = batch_lib.make_batch_fn(
        data, rows, batch_size=stage.batch_size, **options)
    compared = references.make_references(
        run, model, start, stores, make_batch)

  evaluate = None
  if "eval" in stores:
    evaluate = make_evaluate(
        run, stage, model, start, *stores["eval"], options, compared["eval"])
  params, step = loop.train(
      stage, model, make_batch, trained, folder, writer,
      setup.schedule_of(run),
      meta=run.origin | {
          "stage": "preference", "data": data.key, "model": str(model.config),
          "start": hf.params_sha256(start()), "objective": stage.objective,
          "own_code": own_code(stage, config)},
      reference=compared["train"], evaluate=evaluate,
      expect_start=references.is_start(config)
      and not config["online"]["extrapolation"],
      rounds=rounds, show=make_show(run, data, folder / "candidates.jsonl"))
  hosts.from_first("candidates.html", lambda: explorer.write_explorer(
      folder / "candidates.jsonl", run.workdir / "candidates.html",
      f"Candidates of {run.workdir.resolve().name}"))
  policy = model.policy(params)
  if model.frozen:
    peft.save_adapters(
        folder / "adapter", policy, model.config,
        base=config["model"]["path"] or str(results.find_start(run)))
  params = lora.merge(policy)
  results.save_model(run, folder / "model", params, model)
  return results.write_result(run, "preference", {
      "params/sha256": hf.params_sha256(params), "step": step})


def make_show(run, data, path):
  """(updates done, batch, metrics) -> None: appends what the step saw of its
  candidates. What a restart does again is replaced."""
  last = []

  def show(step, batch, metrics):
    if not hosts.is_first():
      return
    if not last and path.exists():
      # What follows the last line end was being written when the run died.
      kept = [line for line in path.read_text().split("\n")[:-1]
              if json.loads(line)["step"] < step - 1]
      commit.write_file(path, "".join(line + "\n" for line in kept))
    last.append(step)
    rows = explorer.explorer_rows(
        step - 1, batch.sets, batch.order, batch.meta,
        [data.columns(int(row))["prompt"] for row in batch.rows],
        [[run.tokenizer.decode(ids) for ids in one.completions]
         for one in batch.sets],
        [["policy" if k >= candidates.IDS_PER_ROUND
          and k != types.MISMATCHED_ID else "data" for k in one.candidate_ids]
         for one in batch.sets],
        logps=metrics.get("logps"), ref_logps=metrics.get("ref_logps"),
        log_weights=metrics.get("kernel/log_weights"),
        selected=metrics["kernel/selected"],
        selected_mask=metrics["kernel/selected_mask"])
    try:
      commit.append(path, "".join(json.dumps(row) + "\n" for row in rows))
    except errors.ResourceError as e:  # a full disk is no reason to stop
      logging.log_first_n(
          logging.WARNING, "candidates.jsonl lacks steps from %d on: %s", 1,
          step, e)

  return show


def own_code(
    stage: stage_lib.Stage, config: dict[str, Any]
) -> dict[str, str | None]:
  """Name -> SHA-256 of the file, of objectives and kernels of the user's own
  and of the reward that rounds train on: a run goes on only with the code it
  began with."""
  hashes = objective_names.source_hashes(stage.objective)
  strategy = stage.kernel["strategy"]
  if ":" in strategy:
    hashes[strategy] = user_code.check_kernel(strategy).sha256
  if config["online"]["enabled"]:
    hashes |= sampling.own_rewards(config)
  return hashes


def make_evaluate(run, stage, model, start, data, rows, options, reference):
  """(functions, state) -> metrics on the first held-out prompts.

  Each call also writes samples of `evaluation.num_display` prompts, beside
  those of the start, to preference/samples.jsonl.
  """
  limits = run.config["evaluation"]
  rows = rows[:limits["num_prompts"] or len(rows)]
  held = []
  for first in range(0, len(rows), stage.batch_size):
    some = rows[first:first + stage.batch_size]
    held.append(batch_lib.collect(
        data, some, np.zeros(len(some), np.int32), batch_size=stage.batch_size,
        **options))
  shown = sampling.prompt_set(data, rows[:limits["num_display"]])
  params = start()
  service = sampling.make_service(run, model, params)
  # The start's log-probs are known already where it is the reference.
  start_is_reference = references.is_start(run.config)
  logps = (reference.logps if start_is_reference
           else references.host_sequence_logps(model, params))
  start_logps = np.concatenate(
      [logps(batch)[batch.meta.candidate_mask[:, 0]] for batch in held])
  greedy = {"num_samples": 1, "sampling": GREEDY, "seed": stage.seed,
            "prompt_ids": shown.prompt_ids}
  before = service.generate(shown.tokens, **greedy).text
  path = run.workdir / "preference" / "samples.jsonl"

  def evaluate(functions, state):
    out = update.score_held_out(stage, model, functions, state, held, reference)
    rewards = stage_lib.implicit_rewards(
        stage.objective, stage.objective_settings, out.logps, out.ref_logps,
        out.lengths)
    values = preferences.preference_metrics(
        rewards, out.logps, out.role, seed=stage.seed)
    step = int(state.step)
    values |= likelihood.likelihood_metrics(
        out.logps, start_logps, rewards, out.role, out.lengths,
        products=out.products, topk_mass=out.topk_mass,
        topk_entropy=out.topk_entropy)
    if step == 0 and start_is_reference:  # all margins are 0, but for rounding
      values["likelihood/length_correlation"] = np.nan
    service.update(model.policy(step_lib.policy_of(state.params)), step)
    now = service.generate(shown.tokens, **greedy).text
    lines = path.read_text().splitlines() if path.exists() else []
    lines = [x for x in lines if json.loads(x)["step"] < step] + [
        json.dumps({"step": step, "prompt": prompt, "start": old, "now": new})
        for prompt, (old,), (new,) in zip(shown.prompts, before, now)]
    commit.write_file(path, "\n".join(lines) + "\n")
    return {f"eval/{k}": v for k, v in values.items() if np.ndim(v) == 0} | {
        "eval/loss": out.loss,
        "eval/accuracy": values["rewards/accuracies"],
        "eval/margin": values["rewards/margins"]}

  return evaluate
