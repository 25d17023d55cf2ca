"""Answers to a benchmark's questions, by the models of an evaluation.

  WORKDIR/evaluate/benchmarks/BENCHMARK/NAME/  the answers, bundle.json and
                                               their manifest; whole or absent
  WORKDIR/evaluate/answering-KEY/              parts of what is under way

A part depends on its questions, the weights and the settings alone, so a
killed run goes on with the next part and ends with the same answers. Answers
that are there are never made anew: judgments may have been paid for them.
"""

import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

import mcpo_jax
from mcpo_jax import commit, errors, faults, hosts
from mcpo_jax.data import files
from mcpo_jax.evaluation import benchmarks, judgments, statistics, tables
from mcpo_jax.evaluation.benchmarks import Answer, Question
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.generation.service import GenerationService
from mcpo_jax.models import hf
from mcpo_jax.rewards import answers as final_answers
from mcpo_jax.stages import sampling
from mcpo_jax.stages.contenders import Contender
from mcpo_jax.training import launches, setup

_PART = 64  # questions that are answered and committed together
# What the bundles of one model's answers may differ in.
_FREE = ("answers", "code")


def open_questions(run: setup.Run) -> list[Question]:
  """The questions of config.benchmark; also looks for the judgments' file.

  Raises:
    DataError: as `benchmarks.read_questions`, data.no_files.
  """
  options = run.config["benchmark"]
  for path in (options["judgments_path"], options["baseline_path"]):
    if path:
      files.expand(path)
  questions = [
      Question(key, category, tuple(turns), row)
      for key, category, turns, row in hosts.from_first(
          "questions", lambda: benchmarks.read_questions(
              options["name"], options["questions_path"]))]
  expected = benchmarks.BENCHMARKS[options["name"]].expected
  if len(questions) != expected:
    logging.warning("%s: %d questions of %d, so nothing to compare with "
                    "published results", options["name"], len(questions),
                    expected)
  return questions


def run_benchmark(
    run: setup.Run, models: Sequence[Contender],
    questions: Sequence[Question], shas: dict[str, str],
) -> list[dict[str, Any]]:
  """Answers what is not answered yet, then reads what the judge said.

  Args:
    run: whose config.benchmark names the benchmark.
    models: that answer.
    questions: from open_questions.
    shas: name -> params_sha256, of those whose hash is known.

  Returns:
    Rows of `tables`, one per model.

  Raises:
    DataError: judgments or answers of another form.
    CheckpointError: benchmark.mismatch, there are answers of other settings,
      weights or questions; benchmark.bundle, or what `commit.verify` finds.
  """
  for model in models:
    answer_questions(run, model, questions, shas.get(model.name))
  return hosts.from_first("judgments", lambda: read_rows(
      run, models, questions))


def folder_of(run: setup.Run, model: Contender) -> pathlib.Path:
  return (run.workdir / "evaluate" / "benchmarks"
          / run.config["benchmark"]["name"] / model.name)


def generator_of(run: setup.Run, model: Contender) -> str:
  """What a benchmark's tools call the model."""
  return f"{run.workdir.resolve().name}-{model.name}"


def answer_questions(
    run: setup.Run, model: Contender, questions: Sequence[Question],
    sha: str | None,
) -> None:
  """Makes the folder of a model's answers, unless it is there."""
  name, folder = run.config["benchmark"]["name"], folder_of(run, model)
  params = None
  if sha is None:
    params = model.load()
    sha = hf.params_sha256(params)
  bundle = describe(run, model, questions, sha)
  if hosts.from_first("answers", folder.exists):
    hosts.from_first("answers", lambda: check_same(folder, bundle))
    return
  params = model.load() if params is None else params
  service = sampling.make_service(
      model.run, model.model, params, length=bundle["max_new_tokens"])
  parts = run.workdir / "evaluate" / ("answering-" + setup.digest(
      {key: value for key, value in bundle.items() if key not in _FREE}))
  said: list[Answer] = []
  for first in tqdm(range(0, len(questions), _PART), unit="part",
                    desc=f"{name} {model.name}"):
    path = parts / f"{first:08d}.json"
    old = hosts.from_first("answers", lambda path=path: json.loads(
        path.read_text()) if path.exists() else None)
    if old is None:
      some = answer_part(service, model, questions[first:first + _PART], bundle)
      path.parent.mkdir(parents=True, exist_ok=True)
      faults.point("benchmark.part")
      commit.write_file(path, json.dumps(some))
    said += some if old is None else [
        Answer(tuple(turns), *rest) for turns, *rest in old]

  def write(to: pathlib.Path) -> None:
    file = benchmarks.answer_file(name, bundle["generator"])
    text = benchmarks.write_answers(
        name, questions, said, bundle["generator"], time.time())
    (to / file).write_text(text, encoding="utf-8")
    (to / "bundle.json").write_text(json.dumps(bundle | {"answers": {
        "file": file, "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "num_cut": sum(a.cut for a in said),
        "num_empty": sum(not all(t.strip() for t in a.turns) for a in said),
    }}, indent=1, ensure_ascii=False), encoding="utf-8")

  commit.write_folder(folder, write, {})
  hosts.wait_for_first("answers")
  shutil.rmtree(parts, ignore_errors=True)
  logging.info("%s: answers of %s in %s", name, model.name, folder)


def describe(
    run: setup.Run, model: Contender, questions: Sequence[Question], sha: str
) -> dict[str, Any]:
  """The bundle of a model's answers, without what is known of them later."""
  options, tokenizer = run.config["benchmark"], model.run.tokenizer
  pinned = benchmarks.BENCHMARKS[options["name"]]
  law = sampling.law(run.config)._asdict()
  law = {key: list(law[key]) if isinstance(law[key], tuple) else law[key]
         for key in law if key not in ("max_new_tokens", "stop_ids")}
  temperatures = pinned.temperatures
  if options["temperature"] is not None:
    law["temperature"], temperatures = options["temperature"], None
  content = json.dumps([q.row for q in questions], sort_keys=True)
  return {
      "version": benchmarks.BUNDLE_VERSION,
      "benchmark": options["name"], "benchmark_version": pinned.version,
      "generator": generator_of(run, model),
      "questions": {"sha256": hashlib.sha256(content.encode()).hexdigest(),
                    "count": len(questions), "expected": pinned.expected},
      "model": {"name": model.name, "kind": model.kind, "where": model.where,
                "step": model.step, "params_sha256": sha},
      "code": {"commit": launches.commit_of_code(), "sha256": code_sha256()},
      "tokenizer": {"key": tokenizer.key, "template": tokenizer.template,
                    "template_kwargs": tokenizer.template_kwargs,
                    "date": tokenizer.date},
      "sampling": law,
      "temperatures": temperatures and dict(temperatures),
      "max_new_tokens": options["max_new_tokens"] or sampling.longest_sample(
          run.config),
      "seed": run.config["seed"]}


def code_sha256() -> str:
  """Of all Python files of the package, by their names."""
  digest = hashlib.sha256()
  root = pathlib.Path(mcpo_jax.__file__).parent
  for path in sorted(root.rglob("*.py")):
    digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
  return digest.hexdigest()


def check_same(folder: pathlib.Path, bundle: dict[str, Any]) -> None:
  """Answers that are there must be those that would be made.

  Raises:
    CheckpointError: benchmark.mismatch with the difference,
      benchmark.bundle, or what `commit.verify` finds.
  """
  commit.verify(folder)
  old = benchmarks.read_bundle(folder)
  place = lambda bundle: {**bundle, "model": {
      "params_sha256": bundle["model"]["params_sha256"]}}
  old, new = place(old), place(bundle)
  changed = [f"{key}: {old.get(key)!r} -> {value!r}"
             for key, value in new.items()
             if key not in _FREE and old.get(key) != value]
  if changed:
    raise errors.CheckpointError(
        "benchmark.mismatch", "these answers were made otherwise",
        where=str(folder / "bundle.json"), got="; ".join(changed)[:600],
        hint="move the folder away to answer anew")


def answer_part(
    service: GenerationService, model: Contender,
    questions: Sequence[Question], bundle: dict[str, Any],
) -> list[Answer]:
  """Answers some questions, turn by turn: later turns see earlier answers."""
  turns: list[list[str]] = [[] for _ in questions]
  tokens, cut = [0] * len(questions), [False] * len(questions)
  for turn in range(max(len(q.turns) for q in questions)):
    groups: dict[tuple[float, int], list[tuple[int, np.ndarray]]] = {}
    for i, question in enumerate(questions):
      if turn >= len(question.turns):
        continue
      ids = model.run.tokenizer.encode_prompt(
          _messages(question, turns[i]), where=f"question {question.key}")
      room = model.model.config.max_positions - len(ids)
      if room < 1:
        raise errors.DataError(
            "data.prompt_too_long", "a question fills the model's context",
            where=f"question {str(question.key)[:80]}, turn {turn + 1}",
            got=len(ids), want=f"below {model.model.config.max_positions}")
      temperature = (bundle["temperatures"] or {}).get(
          question.category, bundle["sampling"]["temperature"])
      groups.setdefault(
          (temperature, min(room, bundle["max_new_tokens"])), []
      ).append((i, ids))
    for (temperature, longest), asked in groups.items():
      law = Sampling(**bundle["sampling"] | {
          "temperature": temperature, "max_new_tokens": longest,
          "stop": tuple(bundle["sampling"]["stop"])})
      result = service.generate(
          [ids for _, ids in asked], num_samples=1, sampling=law,
          seed=bundle["seed"], prompt_ids=np.stack([
              _address(questions[i].key, turn) for i, _ in asked]))
      for (i, _), text, mask, reason in zip(
          asked, result.text, result.mask, result.finish_reason):
        turns[i].append(text[0])
        tokens[i] = int(mask[0].sum())
        cut[i] |= reason[0] == "length"
  return [Answer(tuple(said), *rest) for said, *rest in zip(turns, tokens, cut)]


def _messages(question: Question, said: Sequence[str]) -> list[dict[str, str]]:
  """The conversation up to the next answer."""
  messages = []
  for user, assistant in zip(question.turns, [*said, None]):
    messages.append({"role": "user", "content": user})
    if assistant is None:
      break
    messages.append({"role": "assistant", "content": assistant})
  return messages


def _address(key: str | int, turn: int) -> np.ndarray:
  """[2] uint32, of the draws of an answer's turn."""
  digest = hashlib.sha256(f"{turn}\n{key}".encode()).digest()
  return np.frombuffer(digest[:8], ">u4").astype(np.uint32)


def read_rows(
    run: setup.Run, models: Sequence[Contender], questions: Sequence[Question]
) -> list[dict[str, Any]]:
  """What is known of the models' answers, in rows of `tables`."""
  options, seed = run.config["benchmark"], run.config["seed"]
  name = options["name"]
  said = {}
  for model in models:
    bundle = benchmarks.read_bundle(folder_of(run, model))
    _, said[generator_of(run, model)] = benchmarks.read_answers(
        name, str(folder_of(run, model) / bundle["answers"]["file"]))
  summarize: Callable[[str], dict[str, Any]] = lambda generator: dict.fromkeys(
      ("win_rate", "tie_rate", "lc_win_rate", "score", "judge"),
  ) | {"by_category": {}, "num_questions": 0, "num_skipped": 0}
  if name == "gsm8k":
    summarize = lambda generator: _exact_match(
        questions, said[generator], seed)
  elif options["judgments_path"]:
    summarize = _judged(run, questions, said)
  rows = []
  for model in models:
    generator = generator_of(run, model)
    lengths = [sum(map(len, turns)) for turns in said[generator].values()]
    rows.append(tables.plain({
        "benchmark": name,
        "benchmark_version": benchmarks.BENCHMARKS[name].version,
        "model": model.name, "generator": generator,
        "mean_length": float(np.mean(lengths))} | summarize(generator)))
  return rows


def _judged(run, questions, said) -> Callable[[str], dict[str, Any]]:
  """generator -> the numbers of its judgments."""
  options = run.config["benchmark"]
  kind, verdicts, skipped = judgments.read(
      options["name"], options["judgments_path"], list(said), said)
  baselines = {}
  if options["baseline_path"]:
    baselines = dict(
        benchmarks.read_answers(options["name"], str(file))
        for file in files.expand(options["baseline_path"]))
  categories = {question.key: question.category for question in questions}

  def summarize(generator):
    mine = verdicts.get(generator, [])
    if baselines and kind == "win_rate":
      mine = judgments.with_baseline(mine, said[generator], baselines)
    return judgments.summarize(
        kind, mine, categories, seed=run.config["seed"]) | {
            "num_skipped": skipped[generator]}

  return summarize


def _exact_match(questions, said, seed) -> dict[str, Any]:
  """The share of answers that end in the right number."""
  right = final_answers.make_exact_match()(
      [q.turns[0] for q in questions], [said[q.key][0] for q in questions],
      answer=[q.row["answer"] for q in questions])
  return {"win_rate": None, "tie_rate": None, "lc_win_rate": None,
          "score": statistics.mean_interval(np.array(right), seed=seed),
          "judge": None, "by_category": {}, "num_questions": len(questions),
          "num_skipped": 0}
