"""Questions and answers of benchmarks, in the files that their tools read.

  AlpacaEval 2     questions: alpaca_eval.json     answers: model_outputs.json
  Arena-Hard       questions: question.jsonl       answers: GENERATOR.jsonl
  MT-Bench         questions: question.jsonl       answers: GENERATOR.jsonl
  GSM8K            questions: rows of its set      answers: answers.jsonl

The answers of a model lie in a folder of their own that is whole or not there,
beside bundle.json, which says what made them:

  {"version": 1, "benchmark", "benchmark_version", "generator",
   "questions": {"sha256", "count", "expected"},
   "model": {"name", "kind", "where", "step", "params_sha256"},
   "code": {"commit", "sha256"},
   "tokenizer": {"key", "template", "template_kwargs", "date"},
   "sampling": {field: value, ...}, "temperatures": by category or null,
   "max_new_tokens", "seed",
   "answers": {"file", "sha256", "num_cut": those that reached their longest
               length, "num_empty"}}

Arena-Hard v2.0 answers count tokens as this model's tokenizer does, its own
tool as GPT-4o's: they enter its style control as a ratio of the two models, so
count them anew there (its utils/add_markdown_info.py) before using it.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mcpo_jax import errors
from mcpo_jax.data import files

BUNDLE_VERSION = 1


class Benchmark(NamedTuple):
  """What is pinned of a benchmark."""

  version: str  # of the tool and its judge
  expected: int  # questions of the whole set
  fields: Mapping[str, type]  # of a question
  key: str  # the field that names a question
  temperatures: Mapping[str, float] | None = None  # by category


BENCHMARKS = {
    "alpaca_eval": Benchmark(
        "alpaca_eval==0.6.6, weighted_alpaca_eval_gpt4_turbo against "
        "gpt4_1106_preview", 805, {"instruction": str}, "instruction"),
    "arena_hard_v0.1": Benchmark(
        "arena-hard-auto, arena-hard-v0.1 against gpt-4-0314", 500,
        {"uid": str, "category": str, "prompt": str}, "uid"),
    "arena_hard_v2.0": Benchmark(
        "arena-hard-auto, arena-hard-v2.0 against o3-mini-2025-01-31, in "
        "creative writing gemini-2.0-flash-001", 750,
        {"uid": str, "category": str, "prompt": str}, "uid"),
    "mt_bench": Benchmark(
        "fschat==0.2.36, llm_judge", 80,
        {"question_id": int, "category": str, "turns": list}, "question_id",
        {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0,
         "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}),
    "gsm8k": Benchmark(
        "grade-school-math, test", 1319, {"question": str, "answer": str},
        "question"),
}


class Question(NamedTuple):
  """One of a benchmark; its answer has as many turns."""

  key: str | int
  category: str
  turns: tuple[str, ...]
  row: dict[str, Any]  # as the file has it


class Answer(NamedTuple):
  """What a model said to a question."""

  turns: tuple[str, ...]
  num_tokens: int  # of the last turn
  cut: bool  # a turn reached its longest length


def read_questions(name: str, path: str) -> list[Question]:
  """The questions of a file, in its order.

  Raises:
    DataError: data.no_files, or what `files` finds; data.field_missing,
      data.field_type, data.duplicate_key (a question stands there twice),
      data.too_small.
  """
  benchmark, questions, seen = BENCHMARKS[name], [], set()
  for where, row in read_rows(path):
    check_fields(row, benchmark.fields, where)
    key = row[benchmark.key]
    if key in seen:
      raise errors.DataError(
          "data.duplicate_key", "a question occurs twice", where=where,
          got=str(key)[:80])
    seen.add(key)
    if name == "mt_bench" and not (
        row["turns"] and all(isinstance(t, str) for t in row["turns"])):
      raise errors.DataError(
          "data.field_type", "a question is a list of turns",
          where=f"{where}, turns", want="at least one text")
    text = {"alpaca_eval": "instruction", "gsm8k": "question"}.get(
        name, "prompt")
    category = row.get("category") or row.get("dataset") or name
    questions.append(Question(
        key, str(category),
        tuple(row["turns"]) if name == "mt_bench" else (row[text],), row))
  if not questions:
    raise errors.DataError("data.too_small", "there is no question",
                           where=path, got=0, want="at least 1")
  return questions


def read_rows(path: str) -> list[tuple[str, dict[str, Any]]]:
  """(where, object) of a JSON list, JSON Lines or Parquet, all files of a
  pattern.

  Raises:
    DataError: as `files` says, or data.json, data.not_object.
  """
  rows = []
  for file in files.expand(path):
    if file.suffix != ".json":
      for row in files.read_rows(str(file)):
        if isinstance(row.value, errors.DataError):
          raise row.value
        rows.append((row.where, row.value))
      continue
    try:
      values = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
      raise errors.DataError(
          "data.json", f"not JSON: {type(e).__name__}", where=str(file),
          hint="a cut file is the sign of a killed writer") from None
    if not isinstance(values, list):
      raise errors.DataError(
          "data.not_object", "not a list", where=str(file),
          got=type(values).__name__, want="a JSON list of objects")
    for i, value in enumerate(values):
      where = f"{file}[{i}]"
      if not isinstance(value, dict):
        raise errors.DataError(
            "data.not_object", "not an object", where=where,
            got=type(value).__name__)
      rows.append((where, value))
  return rows


def check_fields(
    row: dict[str, Any], fields: Mapping[str, Any], where: str
) -> None:
  """Raises DataError: data.field_missing, data.field_type."""
  for field, kind in fields.items():
    if field not in row:
      raise errors.DataError(
          "data.field_missing", "the file is of something else, or cut",
          where=f"{where}, {field}", got=", ".join(sorted(row))[:200],
          want=", ".join(fields))
    if not isinstance(row[field], kind) or isinstance(row[field], bool):
      raise errors.DataError(
          "data.field_type", "a field has the wrong type",
          where=f"{where}, {field}", got=type(row[field]).__name__)


def answer_file(name: str, generator: str) -> str:
  """What the file of a model's answers is called."""
  return {"alpaca_eval": "model_outputs.json", "gsm8k": "answers.jsonl"}.get(
      name, f"{generator}.jsonl")


def write_answers(
    name: str, questions: Sequence[Question], answers: Sequence[Answer],
    generator: str, time: float,
) -> str:
  """The text of the file of answers, in the order of the questions.

  Args:
    name: of the benchmark.
    questions: R of them.
    answers: R.
    generator: what its tool calls the model.
    time: Unix seconds, told by formats that have it.
  """
  pairs = list(zip(questions, answers, strict=True))
  if name == "alpaca_eval":
    return json.dumps([
        {"instruction": question.row["instruction"],
         "dataset": question.row.get("dataset", ""),
         "output": answer.turns[0], "generator": generator}
        for question, answer in pairs], indent=2, ensure_ascii=False) + "\n"
  make = {"mt_bench": _mt_bench_row, "gsm8k": _gsm8k_row}.get(
      name, _arena_hard_row)
  return "".join(json.dumps(
      make(name, question, answer, generator, time), ensure_ascii=False) + "\n"
      for question, answer in pairs)


def _arena_hard_row(name, question, answer, generator, time):
  user = {"content": question.turns[0], "role": "user"}
  said = {"content": {"answer": answer.turns[0]}, "role": "assistant"}
  row = {"uid": question.key, "ans_id": _answer_id(generator, question.key),
         "model": generator, "messages": [user, said], "tstamp": time}
  if name == "arena_hard_v0.1":
    return row
  row["messages"] = [dict(reversed(turn.items())) for turn in row["messages"]]
  return row | {"metadata": {"token_len": answer.num_tokens}
                | markdown_counts(answer.turns[0])}


def _mt_bench_row(name, question, answer, generator, time):
  return {"question_id": question.key,
          "answer_id": _answer_id(generator, question.key),
          "model_id": generator,
          "choices": [{"index": 0, "turns": list(answer.turns)}],
          "tstamp": time}


def _gsm8k_row(name, question, answer, generator, time):
  return {"question": question.row["question"],
          "answer": question.row["answer"], "output": answer.turns[0],
          "generator": generator}


def _answer_id(generator: str, key: str | int) -> str:
  return hashlib.sha256(f"{generator}\n{key}".encode()).hexdigest()[:22]


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
  """Headers, lists and bold spans outside code, as Arena-Hard counts them."""
  text = re.sub("```([^`]*)```", "", text)
  count = lambda pattern: len(re.findall(pattern, text, re.MULTILINE))
  return {
      "header_count": {
          f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
      "list_count": {"ordered": count(r"^\s*\d+\.\s"),
                     "unordered": count(r"^\s*[-*+]\s")},
      "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"),
                     "__": count(r"__[^_\n]+__")},
  }


_ANSWER_FIELDS = {
    "alpaca_eval": {"instruction": str, "output": str, "generator": str},
    "mt_bench": {"question_id": int, "model_id": str, "choices": list},
    "gsm8k": {"question": str, "output": str, "generator": str},
}
_ARENA_FIELDS = {"uid": str, "model": str, "messages": list}


def read_answers(
    name: str, path: str
) -> tuple[str, dict[str | int, tuple[str, ...]]]:
  """Generator, and question -> turns, of a file of answers.

  Raises:
    DataError: as `read_rows`; data.field_missing, data.field_type;
      benchmark.foreign, answers of several models.
  """
  fields = _ANSWER_FIELDS.get(name, _ARENA_FIELDS)
  generators, turns = set(), {}
  for where, row in read_rows(path):
    check_fields(row, fields, where)
    try:
      if name == "mt_bench":
        generator, said = row["model_id"], row["choices"][0]["turns"]
      elif name in _ANSWER_FIELDS:
        generator, said = row["generator"], [row["output"]]
      else:
        generator = row["model"]
        said = [turn["content"]["answer"] for turn in row["messages"]
                if turn["role"] == "assistant"]
    except (KeyError, IndexError, TypeError) as e:
      raise errors.DataError(
          "data.field_missing", f"an answer without {e}", where=where) from None
    generators.add(generator)
    turns[row[BENCHMARKS[name].key]] = tuple(said)
  if len(generators) != 1:
    raise errors.DataError(
        "benchmark.foreign", "not the answers of one model", where=path,
        got=", ".join(sorted(map(str, generators))) or "no answer")
  return generators.pop(), turns


def read_bundle(folder: pathlib.Path) -> dict[str, Any]:
  """The bundle of a folder of answers.

  Raises:
    CheckpointError: benchmark.bundle, there is none of this version.
  """
  path = folder / "bundle.json"
  try:
    bundle = json.loads(path.read_text("utf-8"))
    version = bundle["version"]
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.CheckpointError(
        "benchmark.bundle", f"no bundle: {type(e).__name__}", where=str(path),
        hint="delete the folder to answer anew") from None
  if version != BUNDLE_VERSION:
    raise errors.CheckpointError(
        "benchmark.bundle", "a bundle of another version", where=str(path),
        got=version, want=BUNDLE_VERSION)
  return bundle
