"""The stage evaluate: the aligned model beside its start and any others.

What each of them makes of held-out preferences, and with a reward samples of
held-out prompts: scores, win rates, KL to the reference, drift of length and
diversity. `tables` says what is written. `benchmarks` lets the same models
answer a benchmark's questions.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from mcpo_jax import commit, errors, hosts, sharding, types
from mcpo_jax.data import store as store_lib
from mcpo_jax.evaluation import (
  calibration,
  diversity,
  likelihood,
  preferences,
  samples,
  statistics,
  tables,
)
from mcpo_jax.generation.sampling import GREEDY
from mcpo_jax.generation.service import GenerationService
from mcpo_jax.models import hf
from mcpo_jax.stages import (
  benchmarks,
  contenders,
  pools,
  references,
  results,
  sampling,
)
from mcpo_jax.stages.contenders import Contender
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import metrics, reference, setup
from mcpo_jax.training import stage as stage_lib

_LAWS = ("sampled", "greedy")


def run_evaluate(run: setup.Run, writer: metrics.Writer) -> dict[str, Any]:
  """The held-out evaluation of a finished preference stage, and the answers to
  a benchmark.

  All models draw with the same noise; intervals are over prompts or sets.

  Raises:
    CheckpointError: the stage has not finished, or a model is not there.
    ConfigError: evaluation.baseline names none of the models.
    NonFiniteError: a model gave a number that is not finite.
    DataError: questions or judgments of another form.
  """
  wanted, folder = settings_of(run), run.workdir / "evaluate"
  done = results.read_result(run, "evaluate")
  content = hosts.from_first("an evaluation", lambda: tables.read(folder))
  if content is not None and content.get("settings") != wanted:
    content = None
  benchmark = run.config["benchmark"]["name"]
  if done is not None and content is not None and not benchmark:
    return done
  models = contenders.find(run)
  data, summary = run.config["data"], {}
  if data["eval_path"] or data["eval_fraction"]:
    summary = held_out_metrics(run)
  questions = benchmarks.open_questions(run) if benchmark else []
  if content is None:
    content = held_out(run, models) | {"settings": wanted}
    folder.mkdir(exist_ok=True)
    tables.write(folder, content)
  if benchmark:
    rows = benchmarks.run_benchmark(run, models, questions, {
        one["name"]: one["params_sha256"] for one in content["models"]})
    content["benchmarks"] = [
        row for row in content["benchmarks"] if row["benchmark"] != benchmark
    ] + rows
    tables.write(folder, content)
  summary |= tables.flatten(content)
  writer.write("evaluate", 0, {
      k: v for k, v in summary.items() if isinstance(v, int | float)})
  return results.write_result(run, "evaluate", summary)


def held_out(run: setup.Run, models: list[Contender]) -> dict[str, Any]:
  """The content of `tables`; without held-out data that of no model. Writes
  scores.json and samples.json, and prints the latter."""
  stores = pools.open_preference_stores(run)
  if "eval" not in stores:
    logging.warning("evaluate: there is no held-out data; set "
                    "data.eval_path or data.eval_fraction")
    return {"seed": run.config["seed"], "num_prompts": 0, "num_sets": 0,
            "reference": None, "baseline": None, "beta": None, "gain": None,
            "models": [], "frontier": [], "benchmarks": []}
  data, rows = stores["eval"]
  rows = rows[:run.config["evaluation"]["num_prompts"]]
  content, shown, scores = compare_models(run, models, data, rows)
  if scores:
    folder = run.workdir / "evaluate"
    folder.mkdir(exist_ok=True)
    commit.write_file(folder / "scores.json", json.dumps(scores))
    commit.write_file(folder / "samples.json", json.dumps(shown, indent=1))
  for row in shown.get("sampled/", ()):
    print("", row["prompt"] if isinstance(row["prompt"], str)
          else row["prompt"][-1]["content"],
          *(f"  {name + ':':9} {text}" for name, text in row.items()
            if name != "prompt"), sep="\n")
  return content


def settings_of(run: setup.Run) -> dict[str, Any]:
  """What decides about an evaluation beside the run itself: the config, own
  rewards' code, and the files of models of other places."""
  options = run.config["evaluation"]
  own = {key: options[key] for key in ("baseline", "reward")}
  own["own_rewards"] = sampling.own_rewards(run.config)
  own["models"] = {entry: _looks(entry.partition("=")[2] or entry)
                   for entry in options["models"]}
  return hosts.from_first("the models", lambda: own)


def _looks(where: str) -> str:
  """A hash that changes with the files of a folder; of another place empty."""
  folder = pathlib.Path(where).expanduser()
  seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns)
          for pattern in ("*.safetensors", "preference/result.json",
                          "sft/result.json")
          for path in sorted(folder.glob(pattern))]
  return hashlib.sha256(json.dumps(seen).encode()).hexdigest() if seen else ""


def compare_models(
    run: setup.Run, models: list[Contender], data: store_lib.Store,
    rows: np.ndarray,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
  """The tables of the models, first samples, and scores prompt by prompt.

  Args:
    run: that evaluates.
    models: the start first, the aligned one last.
    data, rows: held-out sets.

  Returns:
    content of `tables`, of samples.json and of scores.json; the latter two
    empty without a reward.
  """
  config, seed = run.config, run.config["seed"]
  anchor = next((m for m in models if m.kind == "reference"), models[0])
  baseline = config["evaluation"]["baseline"] or models[0].name
  if baseline not in [m.name for m in models]:
    raise errors.ConfigError(
        "config.range", "no model of the evaluation has this name",
        where="evaluation.baseline", got=baseline,
        want=" | ".join(m.name for m in models),
        hint=errors.nearest(baseline, [m.name for m in models]))
  reward = sampling.load_reward(
      config, run.tokenizer, config["evaluation"]["reward"])
  if reward is None:
    logging.warning("evaluate: no reward.name, so nothing is sampled")
  held = held_out_batches(run, data, rows)
  anchor_params = anchor.load()
  anchor_logps = sequence_logps(anchor, anchor_params, held)
  prompts = sampling.prompt_set(data, rows)
  kl = KL(anchor, anchor_params, prompts, seed)
  drawn: dict[str, dict[str, samples.ScoredSamples]] = {}
  table, service = [], None
  for model in models:
    logging.info("evaluate: %s, %s", model.name, model.where)
    params = anchor_params if model is anchor else model.load()
    same = model.run.tokenizer is run.tokenizer
    entry = {
        "name": model.name, "kind": model.kind, "where": model.where,
        "step": model.step, "params_sha256": hf.params_sha256(params),
        "same_tokenizer": same, "preferences": None, "samples": None}
    if same:
      logps = anchor_logps if model is anchor else sequence_logps(
          model, params, held)
      entry["preferences"] = preference_table(
          config, held, logps, anchor_logps)
    if reward is not None:
      service = serve(service, model, params)
      asked = prompts if same else _encoded(prompts, model)
      drawn[model.name] = {law: samples.sample_and_score(
          service.sampler, reward, asked, seed=seed,
          num_samples=1 if law == "greedy" else (
              config["generation"]["num_samples"]),
          sampling=GREEDY if law == "greedy" else sampling.law(config))
                           for law in _LAWS}
      entry["samples"] = {
          law: samples.describe(one, seed=seed) | kl.measure(
              model, params, one, law == "sampled", same)
          for law, one in drawn[model.name].items()}
    table.append(entry)
    del params
  for entry in table if drawn else ():
    for law, described in entry["samples"].items():
      described["against"] = None if entry["name"] == baseline else (
          samples.against(drawn[entry["name"]][law], drawn[baseline][law],
                          seed=seed))
  first, last = models[0].name, models[-1].name
  mean = lambda name, law: drawn[name][law].scores.mean(1)
  gain = {law: statistics.paired_difference(
      mean(first, law), mean(last, law), seed=seed)
          for law in _LAWS} if drawn else None
  content = tables.plain({
      "seed": seed, "num_prompts": len(rows),
      "num_sets": table[-1]["preferences"]["num_sets"],
      "reference": anchor.name, "baseline": baseline,
      "beta": float(config["objective"].get("beta") or 1.0),
      "gain": gain, "models": table,
      "frontier": frontier(table), "benchmarks": []})
  called = {first: "start"}
  return content, {
      f"{law}/": samples.side_by_side(
          {name: of[law] for name, of in drawn.items()}, prompts.prompts)
      for law in _LAWS if drawn
  }, {
      law: {"prompt_ids": [f"{a:08x}{b:08x}" for a, b in prompts.prompt_ids]}
      | {called.get(name, name): mean(name, law).tolist() for name in drawn}
      for law in _LAWS if drawn
  }


def frontier(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Score against KL of this run's own models, by growing KL."""
  points = [{
      "model": entry["name"], "step": entry["step"],
      "kl": entry["samples"]["sampled"]["kl"],
      "score": entry["samples"]["sampled"]["score"]}
      for entry in table if entry["kind"] != "other" and entry["samples"]]
  return sorted(points, key=lambda point: point["kl"].mean)


class Serving:
  """The sampler of the model before, which the next one may take over."""

  def __init__(self, model: Contender, sampler: GenerationService):
    self.config, self.tokenizer = model.model.config, model.run.tokenizer
    self.sampler, self.version = sampler, 0


def serve(
    before: Serving | None, model: Contender, params: types.Params
) -> Serving:
  """A sampler with these weights; programs of the same shape are kept."""
  if before is None or (
      before.config != model.model.config
      or before.tokenizer is not model.run.tokenizer):
    return Serving(model, sampling.make_service(
        model.run, model.model, params))
  before.version += 1
  before.sampler.update(params, before.version)
  return before


def _encoded(
    prompts: samples.PromptSet, model: Contender
) -> samples.PromptSet:
  """The same prompts in the ids of another tokenizer."""
  tools = prompts.columns.get("tools") or [None] * len(prompts.prompts)
  return prompts._replace(tokens=[
      model.run.tokenizer.encode_prompt(prompt, tools=of)
      for prompt, of in zip(prompts.prompts, tools)])


class KL:
  """Log-probs of samples under the reference, and of the model's own."""

  def __init__(
      self, anchor: Contender, params: types.Params,
      prompts: samples.PromptSet, seed: int,
  ):
    self._anchor, self._params = anchor, params
    self._prompts, self._seed = prompts, seed
    self._scorers: dict[Any, Callable[..., np.ndarray]] = {}

  def measure(
      self, model: Contender, params: types.Params,
      drawn: samples.ScoredSamples, sampled: bool, same_tokenizer: bool,
  ) -> dict[str, Any]:
    """`ref_perplexity`; of samples that are no argmax `kl`, `kl_per_token` and
    `logp_gap` too. None where ids are not the reference's."""
    out = dict.fromkeys(("kl", "kl_per_token", "logp_gap", "ref_perplexity"))
    if not same_tokenizer:
      return out
    theirs = self._score(self._anchor, self._params, drawn)
    out["ref_perplexity"] = diversity.perplexity(
        theirs, drawn.mask, seed=self._seed)
    if sampled:
      ours = theirs if params is self._params else self._score(
          model, params, drawn)
      out |= likelihood.kl_metrics(
          ours, theirs, drawn.raw_logps, drawn.mask, seed=self._seed)
    return out

  def _score(self, model, params, drawn):
    key = model.model.config
    if key not in self._scorers:
      self._scorers[key] = make_scorer(
          model.model, self._prompts, drawn.mask.shape[-1])
    return finite(self._scorers[key](params, drawn), model)


def finite(values: np.ndarray, model: Contender) -> np.ndarray:
  """The values again.

  Raises:
    NonFiniteError: model.non_finite.
  """
  if not np.isfinite(values).all():
    raise errors.NonFiniteError(
        "model.non_finite", "the model gave a log-prob that is not finite",
        where=f"{model.name}, {model.where}")
  return values


def held_out_batches(
    run: setup.Run, data: store_lib.Store, rows: np.ndarray
) -> list[batch_lib.HostBatch]:
  """The sets of some rows, the preferred completion in slot 0."""
  options, size = run.config["data"], run.config["batch_size"]
  return [batch_lib.collect(
      data, rows[at:at + size], np.zeros(len(rows[at:at + size]), np.int32),
      seed=run.config["seed"], num_slots=data.max_candidates,
      preferred=options["preferred"], top_k=options["top_k"], batch_size=size)
          for at in range(0, len(rows), size)]


def sequence_logps(
    model: Contender, params: types.Params, held: list[batch_lib.HostBatch]
) -> np.ndarray:
  """[N, K] nats of held-out candidates.

  Raises:
    NonFiniteError: model.non_finite.
  """
  logps = references.host_sequence_logps(model.model, params)
  return finite(_rows(held, [logps(batch) for batch in held]), model)


def _rows(held, arrays) -> np.ndarray:
  """[N, ...] of the batches' arrays [B, ...], without the rows that pad."""
  return np.concatenate([x[batch.meta.candidate_mask[:, 0]]
                         for batch, x in zip(held, arrays)])


def preference_table(
    config: dict[str, Any], held: list[batch_lib.HostBatch],
    logps: np.ndarray, ref_logps: np.ndarray,
) -> dict[str, Any]:
  """What a model's implicit rewards say of held-out candidates."""
  field = lambda name: _rows(
      held, [getattr(batch.meta, name) for batch in held])
  role, scores, seed = field("role"), field("scores"), config["seed"]
  settings = dict(config["objective"])
  rewards = stage_lib.implicit_rewards(
      settings.pop("name"), settings, logps,
      ref_logps if config["reference"]["source"] else 0.0, field("lengths"))
  flat = preferences.preference_metrics(rewards, logps, role, seed=seed)
  bounds = lambda key: statistics.Interval(*(
      flat[key + end] for end in ("", "_ci95_low", "_ci95_high")))
  return {
      "accuracy": bounds("rewards/accuracies"),
      "margin": bounds("rewards/margins"),
      **{key.replace("rewards/", "").replace("/", "_"): flat[key] for key in (
          "rewards/chosen", "rewards/rejected", "logps/chosen",
          "logps/rejected", "num_pairs", "num_sets")},
      "by_rank": preferences.by_rank(rewards, role, scores, seed=seed),
      "calibration": calibration.calibration(
          rewards, scores, field("candidate_mask"), seed=seed)}


def make_scorer(
    model: stage_lib.Model, prompts: samples.PromptSet, length: int
) -> Callable[[types.Params, samples.ScoredSamples], np.ndarray]:
  """Returns (params, samples of these prompts, of at most `length` tokens) ->
  [R, N, C] float32 nats of each token, scored anew; 0 after the end."""
  longest = length + max(len(tokens) for tokens in prompts.tokens)
  model = model._replace(stream_length=max(model.stream_length, longest))
  token_logps = jax.jit(
      model.token_logps, out_shardings=sharding.replicated(model.mesh))

  def score(params, drawn):
    tokens, _, _ = reference.score_sets(
        samples.candidate_sets(prompts, drawn),
        lambda chunk: np.asarray(token_logps(params, model.put(chunk))),
        model.pack)
    logps = np.zeros(drawn.mask.shape, np.float32)
    logps[drawn.mask] = tokens
    return logps

  return score


def held_out_metrics(run: setup.Run) -> dict[str, float]:
  """Loss, accuracy, margin and likelihoods on held-out rows of the weights
  that the preference stage ended with, as its last evaluation wrote them.

  Raises:
    CheckpointError: evaluate.metrics, they are not there.
  """
  path = run.workdir / "metrics.jsonl"

  def last() -> dict[str, float] | None:
    step = json.loads(
        (run.workdir / "preference/result.json").read_text())["step"]
    found = None
    for line in path.read_text().splitlines() if path.exists() else ():
      try:
        row = json.loads(line)
        if row["stage"] == "preference" and row["step"] == step and (
            "eval/loss" in row):
          found = row
      except (ValueError, KeyError, TypeError):
        continue  # a line that a killed run left
    return found and {k: v for k, v in found.items() if k.startswith("eval/")}

  found = hosts.from_first("metrics", last)
  if found is None:
    raise errors.CheckpointError(
        "evaluate.metrics", "the preference stage's last evaluation is not "
        "there", where=str(path), hint="restore the file")
  return found
