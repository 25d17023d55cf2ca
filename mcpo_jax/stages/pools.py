"""Candidate sets of the preference stage: which rows, and are they enough."""

import numpy as np
from absl import logging

from mcpo_jax import errors, objective_names, types
from mcpo_jax.data import mismatched, packing
from mcpo_jax.data import store as store_lib
from mcpo_jax.stages import results
from mcpo_jax.training import setup


def open_preference_stores(
    run: setup.Run,
) -> dict[str, tuple[store_lib.Store, np.ndarray]]:
  """"train" and, if there is held-out data, "eval": (store, its rows)."""
  if "preference" in run.stores:
    return run.stores["preference"]
  options = run.config["data"]
  online = run.config["online"]  # the records' completions may tie, or lack
  sampled = online["enabled"] and online["preferred"] == "score" and (
      online["online_fraction"] == 1)
  data = setup.open_store(
      run, options["path"], options["format"], name="train",
      prompts_only=sampled)
  rows = np.arange(len(data))
  entry = objective_names.find_objective(
      run.config["objective"]["name"])
  if entry.contrast and not online["enabled"]:
    rows = data.contrast_rows()
    if len(rows) < len(data):
      logging.info("%d rows without contrast are not used",
                   len(data) - len(rows))
  held, other = None, open_eval_store(run)
  if other is not None:
    held = other, other.contrast_rows()
  elif options["eval_fraction"]:
    held = data, np.intersect1d(data.contrast_rows(), np.flatnonzero(
        setup.held_out(data, options["eval_fraction"])))
  if held is not None and not len(held[1]):
    raise errors.DataError(
        "data.too_small", "no held-out row has a preference", got=0,
        where=f"data.eval_{'path' if other is not None else 'fraction'}",
        want="at least 1")
  rows = setup.trained_rows(run, data, rows, other)
  if entry.mismatched:
    same = held is not None and held[0] is data
    data = mismatched.with_mismatched(data, run.config["seed"])
    if held is not None:
      held = (data if same else mismatched.with_mismatched(
          held[0], run.config["seed"])), held[1]
  if options["preferred"] == "index" and not online["enabled"]:
    for row in rows:  # a record that names none is refused before training
      packing.order_candidates(data.candidate_set(int(row)), preferred="index")
  run.stores["preference"] = {"train": (data, rows)} | (
      {} if held is None else {"eval": held})
  return run.stores["preference"]


def check_data(run: setup.Run) -> None:
  """Reads what all stages to come will read: a bad row is told now, not when
  the stage before has trained for hours.

  Raises:
    DataError or an ErrorGroup of them; ConfigError, see `check_pools`.
  """
  config = run.config
  for stage in config["stages"]:
    if stage not in ("sft", "reward_model", "preference") or (
        results.read_result(run, stage) is not None):
      continue
    if stage == "preference":
      check_pools(config, open_preference_stores(run))
    else:
      setup.open_store(run, config[stage]["data_path"],
                       config[stage]["data_format"], name=stage)


def open_eval_store(run: setup.Run) -> store_lib.Store | None:
  """The store of data.eval_path, None without one."""
  data = run.config["data"]
  if not data["eval_path"]:
    return None
  return setup.open_store(
      run, data["eval_path"], data["eval_format"], name="eval")


def check_pools(config, stores) -> None:
  """What the objective and the kernel need of every set, before any training.

  Raises:
    DataError: data.field_missing, a score that the objective reads is unknown;
      data.score_range, it is no win rate.
    ConfigError: config.range, no set has candidates enough for the chains.
  """
  if config["online"]["enabled"]:  # what is trained on is sampled, not read
    stores = {name: x for name, x in stores.items() if name != "train"}
  name, kernel = config["objective"]["name"], config["kernel"]
  win_rates = config["objective"].get("form") == "win_rate"
  scores = objective_names.find_objective(name).scores or win_rates
  steps = (kernel["num_steps"] or 1) * (kernel["block_size"] or 1)
  negatives = []
  for data, rows in stores.values():
    for row in rows if scores or steps > 1 else []:
      one = data.candidate_set(int(row))
      own = one.candidate_ids != types.MISMATCHED_ID
      where = f"prompt_id {one.prompt_id}, scores"
      if scores and np.isnan(one.scores[own]).any():
        raise errors.DataError(
            "data.field_missing", "the objective reads the score of every "
            "completion", where=where, hint=f"{name} needs scores")
      if win_rates and ((one.scores[own] < 0) | (one.scores[own] > 1)).any():
        raise errors.DataError(
            "data.score_range", "the objective reads scores as win rates",
            where=where, got=float(one.scores[own].max()), want="0 to 1",
            hint="objective.form=hard reads the order alone")
      negatives.append(own.sum() - 1)
  if negatives and steps > max(negatives):
    raise errors.ConfigError(
        "config.range", "num_steps * block_size is more than any set has "
        "candidates", where="kernel.block_size", got=steps,
        want=f"at most {max(negatives)}")
  if negatives and steps > 1:
    logging.info("%d of %d sets have fewer candidates than the %d of a chain",
                 np.sum(np.array(negatives) < steps), len(negatives), steps)
