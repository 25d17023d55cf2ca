"""The stage reward_model: scores learned from the pairs of its data_path."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from mcpo_jax import errors, hosts, registry, sharding, types
from mcpo_jax.data import store as store_lib
from mcpo_jax.evaluation import preferences
from mcpo_jax.models import decoder, hf, reward, scoring
from mcpo_jax.rewards import model as reward_model
from mcpo_jax.stages import pools, results
from mcpo_jax.training import architecture, loop, metrics, setup
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training import step as step_lib


class RewardModel(stage_lib.Model):
  """A decoder with a head: what a set's candidates have are scores.

  Streams mark the token that each of them is read at.
  """

  def sequence_logps(self, params, streams, num_sets, num_slots):
    """[B, K] float32 scores, 0 for what is not in the streams."""
    with sharding.tracing_on(self.mesh):
      scores = reward.token_scores(
          params, self.config, streams, compute_dtype=self.compute_dtype,
          remat=self.remat)
    return scoring.sequence_logps(
        scores, streams, num_sets=num_sets, num_slots=num_slots)

  def features(self, params, reference, streams, sets, **unused):
    """The scores, where a policy has its log-probs."""
    del reference, unused
    return types.Features(
        self.sequence_logps(params, streams, *sets.role.shape))


def run_reward_model(
    run: setup.Run, writer: metrics.Writer
) -> dict[str, Any]:
  """Trains on the pairs of reward_model.data_path; the result, a folder that
  `reward.path` takes, lies in <workdir>/reward_model/model."""
  config, folder = run.config, run.workdir / "reward_model"
  group = config["reward_model"]
  done = results.read_result(run, "reward_model")
  if done is not None:
    return done
  model, start = open_reward_model(run)
  data = setup.open_store(
      run, group["data_path"], group["data_format"], name="reward_model")
  rows, held = split_rows(run, data)
  stage = stage_lib.Stage(
      "reward_model", "bradley_terry", registry.OBJECTIVES["bradley_terry"], {},
      {"strategy": "random"}, group["optimizer"], group["num_steps"],
      group["batch_size"], config["seed"])
  mark = functools.partial(
      reward.mark_last, pad_id=model.config.pad_token_id,
      end_id=run.tokenizer.end_id, tail=reward_model.tail_ids(
          run.tokenizer, where="tokenizer"))
  marked = lambda batch: batch._replace(sets=list(map(mark, batch.sets)))
  options = {"seed": stage.seed, "num_slots": data.max_candidates,
             "preferred": "best", "top_k": None}
  make_batch = batch_lib.make_batch_fn(
      data, rows, batch_size=stage.batch_size, **options)
  evaluate = make_evaluate(model, [
      marked(batch_lib.collect(
          data, some, np.zeros(len(some), np.int32),
          batch_size=stage.batch_size, **options))
      for some in np.split(
          held, range(stage.batch_size, len(held), stage.batch_size))
  ] if len(held) else [], stage.seed)
  params, step = loop.train(
      stage, model, lambda step: marked(make_batch(step)), start, folder,
      writer, setup.schedule_of(run)._replace(estimate_every=None),
      meta=run.origin | {
          "stage": "reward_model", "data": data.key,
          "model": str(model.config), "start": hf.params_sha256(start())},
      evaluate=evaluate and (lambda functions, state: {
          f"eval/{name}": value for name, value in evaluate(
              step_lib.policy_of(state.params)).items()}))
  hf.save_params(folder / "model", params, model.config,
                 tokenizer_dir=run.workdir / "tokenizer",
                 card="Trained on pairs by the Bradley-Terry loss.\n")
  hosts.wait_for_first("a reward model")
  result = {"reward_model/sha256": hf.params_sha256(params),
            "reward_model/step": step}
  if evaluate:
    values = evaluate(params)
    result |= {f"reward_model/{name}": value for name, value in values.items()}
    if not values["accuracy_ci95_low"] > 0.5:
      logging.warning("reward_model: no better than chance on held-out pairs")
  return results.write_result(run, "reward_model", result)


def open_reward_model(
    run: setup.Run,
) -> tuple[RewardModel, Callable[[], types.Params]]:
  """As `architecture.open_model` of the start, with a head from the seed."""
  body, start_body = architecture.open_model(run, results.find_start(run))
  config = dataclasses.replace(body.config, reward_head=True)
  shapes = decoder.param_shapes(
      config, dtype=run.config["model"]["param_dtype"])
  shardings = sharding.infer_shardings(shapes, decoder.PARAM_RULES, run.mesh)
  model = RewardModel(*body._replace(config=config, param_shapes=jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, shardings)))

  def start() -> types.Params:
    return jax.device_put(reward.with_head(
        jax.random.key(run.config["seed"]), start_body(), body.config),
                          shardings)

  return model, start


def split_rows(
    run: setup.Run, data: store_lib.Store
) -> tuple[np.ndarray, np.ndarray]:
  """Rows with a preference: those trained on, and those held out by
  reward_model.eval_fraction.

  Raises:
    DataError: data.too_small, none is left on one side.
  """
  rows, fraction = data.contrast_rows(), (
      run.config["reward_model"]["eval_fraction"])
  out = setup.held_out(data, fraction)[rows]
  if fraction and not out.any():
    raise errors.DataError(
        "data.too_small", "no held-out row has a preference", got=0,
        where="reward_model.eval_fraction", want="at least 1")
  return setup.trained_rows(
      run, data, rows[~out], pools.open_eval_store(run)), rows[out]


def make_evaluate(
    model: RewardModel, held: list[batch_lib.HostBatch], seed: int
) -> Callable[[types.Params], dict[str, float]] | None:
  """params -> how often a held-out pair is ordered right, with its 95 %
  interval over prompts; None without held-out pairs."""
  if not held:
    return None
  scores_of = jax.jit(model.sequence_logps, static_argnums=(2, 3),
                      out_shardings=sharding.replicated(model.mesh))
  role = np.concatenate([batch.meta.role for batch in held])

  def evaluate(params):
    scores = np.concatenate([np.asarray(sum(
        scores_of(params, model.put(chunk), *batch.meta.role.shape)
        for chunk in model.pack_all(batch))) for batch in held])
    values = preferences.preference_metrics(scores, scores, role, seed=seed)
    return {name: values[key] for name, key in (
        ("accuracy", "rewards/accuracies"),
        ("accuracy_ci95_low", "rewards/accuracies_ci95_low"),
        ("accuracy_ci95_high", "rewards/accuracies_ci95_high"),
        ("margin", "rewards/margins"), ("num_pairs", "num_pairs"))}

  return evaluate
