"""The verb generate: candidates of a model for a set of prompts, as records.

Prompts are cut into shards; each is sampled, scored and committed whole under
<workdir>/generating. When all are there they become, in order,

  <workdir>/generate/candidates.jsonl  one native record per prompt
                     result.json       what the summary says
                     settings.json     what decided about it
                     manifest.json     their hashes

A shard depends on its prompts, the weights and the settings alone (the service
is idle when it begins), so a killed run ends with the same bytes as one that
never stopped.
"""

import json
import math
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from mcpo_jax import commit, errors, faults, hosts, watch
from mcpo_jax.data import store as store_lib
from mcpo_jax.evaluation import samples, statistics
from mcpo_jax.models import hf
from mcpo_jax.rewards import functions
from mcpo_jax.stages import results, sampling
from mcpo_jax.training import architecture, setup
from mcpo_jax.types import GenerationResult

# Columns of the store that are no columns of the record.
_OWN = ("where", "sources", "ref_logps")


class Draw(NamedTuple):
  """The samples of a shard's prompts at one temperature."""

  temperature: float
  seed: int
  result: GenerationResult
  scores: np.ndarray | None  # [R, N], None without a reward


def run_generate(run: setup.Run) -> dict[str, Any]:
  """Makes this process's part of the candidates, or what is missing of it.

  Returns:
    The numbers of `summarize`, with the hash of the weights.

  Raises:
    ConfigError: config.other_run, the workdir holds candidates of other
      settings, data or weights; config.range, there are too many parts.
    DataError: bad rows, or data.field_missing for a prompt without text.
    ServiceError: from the reward. NonFiniteError: from the model.
  """
  options = run.config["generate"]
  data = setup.open_store(
      run, options["data_path"], options["data_format"], name="generate",
      prompts_only=True)
  weights = results.find_weights(run)
  model, start = architecture.open_model(run, weights.folder)
  params = start()
  sha = hf.params_sha256(params)
  settings = {
      "data": data.key, "params_sha256": sha,
      "temperatures": list(options["temperatures"]),
      **{key: options[key]
         for key in ("prompts_per_shard", "num_parts", "part")}}
  done, folder = run.workdir / "generate", run.workdir / "generating"

  def read_result() -> dict[str, Any] | None:
    for place in (done, folder):
      check_same(place / "settings.json", settings)
    if not done.exists():
      return None
    commit.verify(done)
    shutil.rmtree(folder, ignore_errors=True)
    return json.loads((done / "result.json").read_text())

  result = hosts.from_first("earlier candidates", read_result)
  if result is not None:
    return result

  shards = shards_of(
      prompt_rows(data), size=options["prompts_per_shard"],
      num_parts=options["num_parts"], part=options["part"])
  folder.mkdir(exist_ok=True)
  commit.write_file(folder / "settings.json", json.dumps(settings, indent=1))
  paths = {number: folder / f"{number:08d}.jsonl" for number in shards}
  missing = hosts.from_first("shards", lambda: [
      number for number, path in paths.items() if not path.exists()])
  if len(missing) < len(shards):
    logging.info("generate goes on: %d of %d shards are there",
                 len(shards) - len(missing), len(shards))
  reward = sampling.load_reward(run.config, run.tokenizer)
  service = sampling.make_service(run, model, params)
  service.update(params, weights.step)
  with tqdm(desc="generate", unit="prompt", total=sum(map(
      len, shards.values()))) as bar:
    bar.update(sum(len(shards[n]) for n in shards if n not in missing))
    for number in missing:
      prompts = sampling.prompt_set(data, shards[number])
      with watch.phase("work", f"generate: shard {number}"):
        draws = draw(run.config, service, reward, prompts, weights.step)
      lines = [
          json.dumps(record(data, int(row), i, draws, weights, sha),
                     ensure_ascii=False)
          for i, row in enumerate(shards[number])]
      faults.point("generate.shard")
      commit.write_file(paths[number], "".join(x + "\n" for x in lines))
      bar.update(len(lines))

  def write(to: pathlib.Path) -> None:
    with open(to / "candidates.jsonl", "wb") as out:
      for path in paths.values():
        out.write(path.read_bytes())
    with open(to / "candidates.jsonl", "rb") as lines:
      summary = summarize(map(json.loads, lines), seed=run.config["seed"])
    for name, value in (("settings", settings),
                        ("result", summary | {"generate/params_sha256": sha})):
      (to / f"{name}.json").write_text(json.dumps(value, indent=1))

  def finish() -> dict[str, Any]:
    commit.write_folder(done, write, {})
    shutil.rmtree(folder)
    logging.info("candidates: %s", done / "candidates.jsonl")
    return json.loads((done / "result.json").read_text())

  return hosts.from_first("candidates", finish)


def check_same(path: pathlib.Path, settings: dict[str, Any]) -> None:
  """Compares with what earlier shards were made by, if there are any.

  Raises:
    ConfigError: config.other_run with the difference.
  """
  if not path.exists():
    return
  old = json.loads(path.read_text())
  changed = [f"{key}: {old[key]!r} -> {value!r}"
             for key, value in settings.items() if old[key] != value]
  if changed:
    raise errors.ConfigError(
        "config.other_run", "the workdir holds candidates of other settings, "
        "data or weights", where=str(path), got="; ".join(changed),
        hint="use a fresh --workdir")


def prompt_rows(data: store_lib.Store) -> np.ndarray:
  """[R] rows, one of each prompt id, in the order of the data.

  Raises:
    DataError: data.field_missing, a prompt has no text.
  """
  first = np.unique(data.example_ids, axis=0, return_index=True)[1]
  rows = np.sort(first)
  if len(rows) < len(data):
    logging.info("%d rows repeat a prompt and are sampled for once",
                 len(data) - len(rows))
  for row in rows:
    columns = data.columns(int(row))
    if not columns["prompt"]:
      raise errors.DataError(
          "data.field_missing", "records are text, and a prompt given as ids "
          "has none", where=f"{columns['where']}, prompt")
  return rows


def shards_of(
    rows: np.ndarray, *, size: int, num_parts: int, part: int
) -> dict[int, np.ndarray]:
  """Number of a shard -> its rows, of the shards that belong to a part.

  Shards are cut before they are dealt out, in runs, so the parts' files one
  after the other are the file of a single part.

  Raises:
    ConfigError: config.range, a part would have none.
  """
  count = math.ceil(len(rows) / size)
  if num_parts > count:
    raise errors.ConfigError(
        "config.range", "there are fewer shards than parts",
        where="generate.num_parts", got=num_parts, want=f"at most {count}",
        hint="lower generate.prompts_per_shard")
  first, last = (count * p // num_parts for p in (part, part + 1))
  return {n: rows[n * size:(n + 1) * size] for n in range(first, last)}


def temperature_seed(seed: int, temperature: float) -> int:
  """Of the noise at one temperature: sample n is drawn anew at every one, and
  is the same whichever others are asked for."""
  word = int(np.float32(temperature).view(np.uint32))
  return int(np.random.SeedSequence([seed, word]).generate_state(1)[0])


def draw(
    config: dict[str, Any],
    service: Any,
    reward: functions.Reward | None,
    prompts: samples.PromptSet,
    version: int,
) -> list[Draw]:
  """Samples some prompts at every temperature, and scores the texts."""
  draws = []
  for temperature in config["generate"]["temperatures"]:
    seed = temperature_seed(config["seed"], temperature)
    result = service.generate(
        prompts.tokens, prompt_ids=prompts.prompt_ids,
        num_samples=config["generation"]["num_samples"],
        sampling=sampling.law(config)._replace(temperature=temperature),
        seed=seed, require_version=version)
    scores = None if reward is None else samples.score_texts(
        reward, prompts, result)
    draws.append(Draw(temperature, seed, result, scores))
  return draws


def record(
    data: store_lib.Store, row: int, i: int, draws: Sequence[Draw],
    weights: results.Weights, sha: str,
) -> dict[str, Any]:
  """The native record of one prompt, K samples with where each came from.

  Args:
    data: holds the prompt.
    row: of the store.
    i: place of the prompt among those of `draws`.
    draws: one per temperature.
    weights, sha: that were sampled from.

  Returns:
    `prompt_id`, `prompt`, `completions` (repeated and empty ones stay), with a
    reward `scores`; one entry per completion in `sources`, `behaviour_logps`
    (nats, of the law that the ids were drawn from), `behaviour_raw_logps` (of
    the policy), `finish_reasons`, `lengths` (tokens, the stop token included),
    `temperatures`, `seeds` and `sample_indices`; `policy_step`,
    `params_sha256`; then further columns of the prompt's own record, but for
    lists about that record's completions.
  """
  columns = data.columns(row)
  each = [(d, n, d.result.mask[i, n])
          for d in draws for n in range(d.result.mask.shape[1])]
  total = lambda logps, mask: float(logps[mask].sum(dtype=np.float64))
  out = {
      "prompt_id": columns["prompt_id"], "prompt": columns["prompt"],
      "completions": [d.result.text[i][n] for d, n, _ in each]}
  if draws[0].scores is not None:
    out["scores"] = [float(d.scores[i, n]) for d, n, _ in each]
  out |= {
      "sources": [weights.name] * len(each),
      "behaviour_logps": [total(d.result.behaviour_logps[i, n], mask)
                          for d, n, mask in each],
      "behaviour_raw_logps": [total(d.result.behaviour_raw_logps[i, n], mask)
                              for d, n, mask in each],
      "finish_reasons": [d.result.finish_reason[i][n] for d, n, _ in each],
      "lengths": [int(mask.sum()) for _, _, mask in each],
      "temperatures": [d.temperature for d, _, _ in each],
      "seeds": [d.seed for d, _, _ in each],
      "sample_indices": [n for _, n, _ in each],
      "policy_step": weights.step, "params_sha256": sha}
  said = int(data.candidate_set(row).multiplicity.sum())
  about = lambda value: isinstance(value, list) and len(value) == said
  return out | {key: value for key, value in columns.items()
                if key not in out and key not in _OWN and not about(value)}


def summarize(
    records: Iterable[dict[str, Any]], *, seed: int
) -> dict[str, float]:
  """What the candidates of a run are like.

  Args:
    records: as `record` makes them, at least one.
    seed: of the interval.

  Returns:
    `generate/num_prompts`, `num_completions`, `tokens`; `mean_length` in
    tokens; the shares `stop_share`, `empty_share` and `repeated_share` (of
    completions that the same prompt has already); with scores `score`, the
    mean over prompts, and its interval over prompts.
  """
  texts = tokens = stopped = empty = repeated = 0
  scores: list[float] = []
  prompts = 0
  for one in records:
    prompts += 1
    texts += len(one["completions"])
    tokens += sum(one["lengths"])
    stopped += one["finish_reasons"].count("stop")
    empty += sum(not text.strip() for text in one["completions"])
    repeated += len(one["completions"]) - len(set(one["completions"]))
    if "scores" in one:
      scores.append(float(np.mean(one["scores"])))
  out = {"num_prompts": prompts, "num_completions": texts, "tokens": tokens,
         "mean_length": tokens / texts, "stop_share": stopped / texts,
         "empty_share": empty / texts, "repeated_share": repeated / texts}
  if scores:
    mean = statistics.mean_interval(np.array(scores), seed=seed)
    out |= {"score": mean.mean, "score_ci95_low": mean.ci95_low,
            "score_ci95_high": mean.ci95_high}
  return {f"generate/{key}": value for key, value in out.items()}
