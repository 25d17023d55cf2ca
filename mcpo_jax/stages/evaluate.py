"""The stage evaluate: the aligned model beside its start."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from mcpo_jax import commit, sharding, types
from mcpo_jax.evaluation import diversity, likelihood, samples
from mcpo_jax.generation.sampling import GREEDY
from mcpo_jax.models import hf
from mcpo_jax.stages import pools, results, sampling
from mcpo_jax.training import architecture, metrics, reference, setup
from mcpo_jax.training import stage as stage_lib


def run_evaluate(run: setup.Run, writer: metrics.Writer) -> dict[str, Any]:
  """Held-out loss, accuracy, margin and likelihoods; with a reward also
  samples of held-out prompts, aligned against start: their scores, what they
  are like, how the start finds them, and their KL.

  Both models draw with the same noise; the interval is over prompts.
  """
  done = results.read_result(run, "evaluate")
  if done is not None:
    return done
  results.finished(run, "preference")
  stores = pools.open_preference_stores(run)
  if "eval" not in stores:
    logging.warning("evaluate: there is no held-out data; set "
                    "data.eval_path or data.eval_fraction")
    return {}
  summary = held_out_metrics(run)
  reward = sampling.load_reward(run.config, run.tokenizer)
  if reward is None:
    logging.warning("evaluate: no reward.name, so samples are not scored")
    return summary
  data, rows = stores["eval"]
  prompts = sampling.prompt_set(
      data, rows[:run.config["evaluation"]["num_prompts"]])
  options, seed = run.config["generation"], run.config["seed"]
  names = ("sft" if "sft" in run.config["stages"] else "start", "aligned")

  model, start = architecture.open_model(run, results.find_start(run))
  first = start()
  service = sampling.make_service(run, model, first)
  laws = {"": (options["num_samples"], sampling.law(run.config)),
          "greedy/": (1, GREEDY)}

  def sample(law):
    num, how = laws[law]
    return samples.sample_and_score(
        service, reward, prompts, num_samples=num, sampling=how, seed=seed)

  before = {law: sample(law) for law in laws}
  aligned = hf.load_params(
      results.finished(run, "preference"), model.config,
      shardings=model.param_shardings,
      dtype=run.config["model"]["param_dtype"])
  service.update(aligned, 1)
  score = make_scorer(model, prompts, before[""].mask.shape[-1])
  shown, per_prompt = {}, {}
  for law in laws:
    after = sample(law)
    compared = samples.compare(
        before[law], after, prompts.prompts, names=names, seed=seed)
    found = score(first, after)
    if not law:
      summary |= likelihood.kl_metrics(
          score(aligned, after), found, after.raw_logps, after.mask, seed=seed)
    # The start's own samples come with its log-probs.
    for name, logps, mask in (
        (names[0], before[law].raw_logps, before[law].mask),
        (names[1], found, after.mask)):
      value = diversity.perplexity(logps, mask, seed=seed)
      key = f"{law}ref_perplexity/{name}"
      summary |= {key: value.mean, f"{key}_ci95_low": value.ci95_low,
                  f"{key}_ci95_high": value.ci95_high}
    shown[law or "sampled/"] = compared.pop("samples")
    summary |= {law + name: value for name, value in compared.items()}
    per_prompt[law.rstrip("/") or "sampled"] = {
        "prompt_ids": [f"{a:08x}{b:08x}" for a, b in prompts.prompt_ids],
        "start": before[law].scores.mean(1).tolist(),
        "aligned": after.scores.mean(1).tolist()}
  folder = run.workdir / "evaluate"
  folder.mkdir(exist_ok=True)
  commit.write_file(folder / "scores.json", json.dumps(per_prompt))
  commit.write_file(folder / "samples.json", json.dumps(shown, indent=1))
  results.write_result(run, "evaluate", summary)
  writer.write("evaluate", 0, {
      k: v for k, v in summary.items() if isinstance(v, int | float)})
  for row in shown["sampled/"]:
    print("", row["prompt"] if isinstance(row["prompt"], str)
          else row["prompt"][-1]["content"],
          *(f"  {name + ':':9} {row[name]}" for name in names), sep="\n")
  return summary


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
  that the preference stage ended with, as its last evaluation wrote them."""
  result = json.loads((run.workdir / "preference/result.json").read_text())
  rows = [json.loads(line) for line in (
      run.workdir / "metrics.jsonl").read_text().splitlines()]
  rows = [r for r in rows if r["stage"] == "preference"
          and r["step"] == result["step"] and "eval/loss" in r]
  return {k: v for k, v in rows[-1].items() if k.startswith("eval/")}
