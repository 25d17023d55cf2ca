"""Files of benchmarks: real records there and back, and what is none."""

import json

import pytest

from mcpo_jax import errors
from mcpo_jax.evaluation import benchmarks
from mcpo_jax.evaluation.benchmarks import Answer

QUESTIONS = {
    "alpaca_eval": "alpaca_eval/model_outputs.json",
    "arena_hard_v0.1": "arena_hard/question_v0.1.jsonl",
    "arena_hard_v2.0": "arena_hard/question_v2.0.jsonl",
    "mt_bench": "mt_bench/question.jsonl",
}
ANSWERS = QUESTIONS | {
    "arena_hard_v0.1": "arena_hard/model_answer_v0.1.jsonl",
    "arena_hard_v2.0": "arena_hard/model_answer_v2.0.jsonl",
    "mt_bench": "mt_bench/model_answer.jsonl",
}
MADE_ANEW = {"ans_id", "answer_id", "tstamp"}


@pytest.mark.parametrize("name", QUESTIONS)
def test_real_answers_are_written_as_they_were(shared, tmp_path, name):
  folder = shared / "data/eval_formats"
  questions = benchmarks.read_questions(name, str(folder / QUESTIONS[name]))
  path = folder / ANSWERS[name]
  [(_, real)] = benchmarks.read_rows(str(path))
  generator, said = benchmarks.read_answers(name, str(path))
  tokens = real.get("metadata", {}).get("token_len", 7)
  text = benchmarks.write_answers(
      name, questions, [Answer(said[q.key], tokens, False) for q in questions],
      generator, 5.25)
  out = tmp_path / benchmarks.answer_file(name, generator)
  out.write_text(text, encoding="utf-8")
  [(_, ours)] = benchmarks.read_rows(str(out))
  keep = lambda row: {k: v for k, v in row.items() if k not in MADE_ANEW}
  # As text, so that the order of fields counts too.
  assert json.dumps(keep(ours)) == json.dumps(keep(real))
  assert list(ours) == list(real)
  assert {k: type(v) for k, v in ours.items()} == {
      k: type(v) for k, v in real.items()}
  assert benchmarks.read_answers(name, str(out)) == (generator, said)
  if name == "mt_bench":
    assert len(questions[0].turns) == len(said[101]) == 2


def test_ids_of_answers_differ_by_model_and_question():
  questions = [benchmarks.Question(k, "c", ("q",), {}) for k in ("a", "b")]
  ids = [json.loads(line)["ans_id"] for generator in ("m", "n")
         for line in benchmarks.write_answers(
             "arena_hard_v0.1", questions, [Answer(("x",), 1, False)] * 2,
             generator, 0.0).splitlines()]
  assert len(set(ids)) == 4 and {len(i) for i in ids} == {22}


def test_markdown_is_counted_outside_code():
  text = ("# a\n## b\n## c\n#d\n1. x\n 2. y\n- z\n* w\n**bold** __b__ **no\n**"
          "\n```\n# code\n- item\n**x**\n```\n")
  assert benchmarks.markdown_counts(text) == {
      "header_count": {"h1": 1, "h2": 2, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
      "list_count": {"ordered": 2, "unordered": 2},
      "bold_count": {"**": 1, "__": 1}}


def gsm8k(path, rows=3):
  path.write_text("".join(json.dumps(
      {"question": f"q{i}", "answer": f"so\n#### {i}"}) + "\n"
      for i in range(rows)))
  return str(path)


def test_gsm8k_keeps_question_answer_and_output(tmp_path):
  questions = benchmarks.read_questions("gsm8k", gsm8k(tmp_path / "q.jsonl"))
  out = tmp_path / "answers.jsonl"
  out.write_text(benchmarks.write_answers(
      "gsm8k", questions, [Answer((f"#### {i}",), 2, False)
                           for i in range(3)], "m", 0.0))
  assert benchmarks.read_answers("gsm8k", str(out)) == ("m", {
      f"q{i}": (f"#### {i}",) for i in range(3)})


@pytest.mark.parametrize("name, file, text, slug", [
    ("mt_bench", "q.jsonl", '{"uid": "a", "category": "c", "prompt": "p"}\n',
     "data.field_missing"),
    ("mt_bench", "q.jsonl", '{"question_id": 1, "category": "c", "turns": []}',
     "data.field_type"),
    ("mt_bench", "q.jsonl",
     '{"question_id": 1, "category": "c", "turns": ["a", 2]}',
     "data.field_type"),
    ("mt_bench", "q.jsonl",
     '{"question_id": true, "category": "c", "turns": ["a"]}',
     "data.field_type"),
    ("alpaca_eval", "q.json", '[{"instruction": "a"}, {"instruction": "a"}]',
     "data.duplicate_key"),
    ("alpaca_eval", "q.json", '{"instruction": "a"}', "data.not_object"),
    ("alpaca_eval", "q.json", '[1]', "data.not_object"),
    ("alpaca_eval", "q.json", '[{"instruction": ', "data.json"),
    ("alpaca_eval", "q.json", '[]', "data.too_small"),
    ("gsm8k", "q.jsonl", '{"question": "q", "answer": 3}', "data.field_type"),
    ("gsm8k", "q.jsonl", '{"question": "q", "ans', "data.json"),
    ("gsm8k", "none.jsonl", None, "data.no_files"),
])
def test_what_are_no_questions_is_refused(tmp_path, name, file, text, slug):
  path = tmp_path / file
  if text is not None:
    path.write_text(text)
  with pytest.raises(errors.DataError) as e:
    benchmarks.read_questions(name, str(path))
  assert e.value.slug == slug and file in e.value.where


@pytest.mark.parametrize("rows, slug", [
    ([{"instruction": "a", "output": "x", "generator": "m"},
      {"instruction": "b", "output": "x", "generator": "n"}],
     "benchmark.foreign"),
    ([], "benchmark.foreign"),
    ([{"instruction": "a", "output": None, "generator": "m"}],
     "data.field_type"),
    ([{"instruction": "a"}], "data.field_missing"),
])
def test_what_are_no_answers_of_one_model_is_refused(tmp_path, rows, slug):
  path = tmp_path / "answers.json"
  path.write_text(json.dumps(rows))
  with pytest.raises(errors.DataError) as e:
    benchmarks.read_answers("alpaca_eval", str(path))
  assert e.value.slug == slug


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"version": 7}'])
def test_what_is_no_bundle_is_refused(tmp_path, text):
  if text is not None:
    (tmp_path / "bundle.json").write_text(text)
  with pytest.raises(errors.CheckpointError) as e:
    benchmarks.read_bundle(tmp_path)
  assert e.value.slug == "benchmark.bundle"
