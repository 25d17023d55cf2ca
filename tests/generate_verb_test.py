"""The verb generate: candidates as records that training reads, to the byte
the same however often a run was killed and in however many parts it was made.
"""

import json
import types

import numpy as np
import pytest
import run_cases

from configs import quickstart
from mcpo_jax import errors, settings, verbs
from mcpo_jax.data import store as store_lib
from mcpo_jax.data import tokenizer as tokenizer_lib
from mcpo_jax.evaluation import samples
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.stages import generate, results
from mcpo_jax.types import GenerationResult

REWARD = """
def named_thing(prompts, completions, thing, **columns):
  return [len(c) + 10.0 * (t in c) for c, t in zip(completions, thing)]
"""


# The command line.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A folder with a tiny model, prompts and a reward; flags that name them."""
  folder = tmp_path_factory.mktemp("generate")
  data = run_cases.write_data(folder / "data")
  done = run_cases.run("train", folder / "start", folder / "cache", *data,
                       "--config.stages=sft")
  assert done.returncode == 0, done.stderr[-3000:]
  rows = [{"prompt": f"colour red thing {thing} {i}", "thing": thing}
          for i in range(2) for thing in run_cases.THINGS]
  (folder / "prompts.jsonl").write_text(
      "".join(json.dumps(row) + "\n" for row in rows))
  (folder / "own_reward.py").write_text(REWARD)
  return folder, [
      f"--config.model.path={folder / 'start/sft/model'}",
      "--config.data.eval_fraction=0.0", "--config.reward.patterns_path=None",
      "--config.reward.name=own_reward:named_thing"]


def run(model, verb, workdir, *flags, **extra):
  folder, own = model
  return run_cases.run(
      verb, folder / workdir, folder / "cache", *own, *flags,
      PYTHONPATH=f"{run_cases.ROOT}:{folder}", **extra)


@pytest.fixture(scope="module")
def sample(model):
  """(workdir, *flags) -> the finished process of `generate`."""
  return lambda workdir, *flags, **extra: run(
      model, "generate", workdir,
      f"--config.data.path={model[0] / 'prompts.jsonl'}",
      "--config.generate.temperatures=0.5,1.5",
      "--config.generate.prompts_per_shard=3", *flags, **extra)


def test_parts_and_a_killed_run_make_the_file_of_one_that_never_stopped(
    model, sample):
  folder = model[0]
  file = "generate/candidates.jsonl"
  whole = sample("whole")
  assert whole.returncode == 0, whole.stderr[-3000:]

  parts = "--config.generate.num_parts=2"
  killed = sample("part0", parts, MCPO_FAULT="generate.shard@2")
  assert killed.returncode == -9
  assert not (folder / "part0/generate").exists()
  assert len(list((folder / "part0/generating").glob("*.jsonl"))) == 1
  again = sample("part0", parts)
  assert again.returncode == 0, again.stderr[-3000:]
  assert "generate goes on: 1 of 2 shards are there" in again.stderr
  assert not (folder / "part0/generating").exists()
  other = sample("part1", parts, "--config.generate.part=1")
  assert other.returncode == 0, other.stderr[-3000:]
  assert (folder / "whole" / file).read_bytes() == b"".join(
      (folder / part / file).read_bytes() for part in ("part0", "part1"))

  rows = [json.loads(line) for line in
          (folder / "whole" / file).read_text("utf-8").splitlines()]
  assert [row["thing"] for row in rows] == [*run_cases.THINGS] * 2
  for row in rows:
    assert row["temperatures"] == [0.5, 0.5, 1.5, 1.5]
    assert row["scores"] == [
        len(text) + 10.0 * (row["thing"] in text)
        for text in row["completions"]]
    assert row["policy_step"] == 0  # of given weights
  summary = run_cases.summary(folder / "whole")
  assert summary["generate/num_completions"] == 4 * 14
  assert summary["generate/score_ci95_low"] < summary["generate/score"]
  assert summary["generate/params_sha256"] == rows[0]["params_sha256"]


def test_training_reads_the_parts_by_a_pattern(model, sample):
  files = model[0] / "part*" / "generate" / "candidates.jsonl"
  done = run(
      model, "train", "trained", f"--config.data.path={files}",
      "--config.data.format=native", "--config.stages=preference",
      "--config.num_steps=2", "--config.log.every_steps=1")
  assert done.returncode == 0, done.stderr[-3000:]
  losses = [row["loss"] for row in run_cases.metrics(model[0] / "trained")
            if "loss" in row]
  assert len(losses) == 2 and losses[0] == pytest.approx(np.log(2), abs=1e-5)


def test_other_settings_do_not_go_on_with_the_same_candidates(tmp_path):
  path = tmp_path / "settings.json"
  old = {"temperatures": [0.5, 1.0], "prompts_per_shard": 3, "data": "a"}
  generate.check_same(path, old)  # nothing is there yet
  path.write_text(json.dumps(old))
  generate.check_same(path, old)
  with pytest.raises(errors.ConfigError) as caught:
    generate.check_same(path, old | {"prompts_per_shard": 2, "data": "b"})
  assert caught.value.slug == "config.other_run"
  assert caught.value.got == "prompts_per_shard: 3 -> 2; data: 'a' -> 'b'"


def test_random_weights_are_not_sampled_from(tmp_path):
  config = {"model": {"path": None}}
  with pytest.raises(errors.ConfigError) as caught:
    verbs.generate(config, tmp_path / "run")
  assert caught.value.where == "model.path"
  assert not (tmp_path / "run").exists()


def resolve(**group):
  config = quickstart.get_config()
  config.generate.update(group)
  return settings.resolve(config.to_dict())["generate"]


@pytest.mark.parametrize("group, where", [
    ({"temperatures": ("hot",)}, "generate.temperatures"),
    ({"temperatures": ("1", "1.0")}, "generate.temperatures"),
    ({"temperatures": ("-1",)}, "generate.temperatures"),
    ({"temperatures": ("nan",)}, "generate.temperatures"),
    ({"num_parts": 2, "part": 2}, "generate.part"),
    ({"data_format": "native"}, "generate.data_format"),
    ({"data_path": "x", "data_format": "tokens"}, "generate.data_format"),
    ({"data_path": "x*-1"}, "generate.data_path"),
])
def test_wrong_settings_are_refused(group, where):
  with pytest.raises(errors.ConfigError) as caught:
    resolve(**group)
  assert caught.value.where == where


def test_prompts_and_temperature_are_by_default_those_of_the_run():
  got = resolve()
  assert got["data_path"] == "embedded:quickstart/train"
  assert got["temperatures"] == (1.0,)
  assert resolve(temperatures=("0.5", "0"))["temperatures"] == (0.5, 0.0)


# What it is made of, without a model.


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tok")
  tokenizer_lib.train_tokenizer(
      ["a b c d e"], vocab_size=300, out_dir=folder)
  return tokenizer_lib.load_tokenizer(folder)


def store(tok, folder, rows, **settings):
  folder.mkdir(exist_ok=True)
  (folder / "rows.jsonl").write_text(
      "".join(json.dumps(row) + "\n" for row in rows))
  return store_lib.build_store(
      [(str(folder / "rows.jsonl"), "auto", 1.0, None)], tok,
      cache_dir=folder / "cache", **settings)


ROWS = [
    {"prompt": "b a", "answer": "7"},
    {"prompt_id": "two", "prompt": "a", "completions": ["c", "d"],
     "scores": [1, 0], "ref_logps": [-1, -2], "notes": ["good", "bad"],
     "levels": [1, 2, 3]},
    {"prompt_id": "two", "prompt": "a", "completion": "e"},
    {"prompt": [{"role": "user", "content": "c"}]},
]


def test_prompts_come_from_any_layout_once_each(tok, tmp_path):
  data = store(tok, tmp_path, ROWS, prompts_only=True)
  rows = generate.prompt_rows(data)
  assert rows.tolist() == [0, 1, 3]
  assert [len(data.candidate_set(i).completions) for i in rows] == [0, 2, 0]
  assert data.report["completions"] == 3
  for i, prompt in ((0, "b a"), (1, "a"), (3, ROWS[3]["prompt"])):
    np.testing.assert_array_equal(
        data.candidate_set(i).prompt, tok.encode_prompt(prompt))
  assert not data.has_contrast[[0, 2, 3]].any() and data.has_contrast[1]


def test_prompts_alone_are_refused_where_completions_are_needed(tok, tmp_path):
  with pytest.raises(errors.DataError) as caught:
    store(tok, tmp_path, ROWS[:1])
  assert caught.value.slug == "data.field_missing"


def test_ids_without_text_are_refused(tok, tmp_path):
  data = store(tok, tmp_path, [
      {"prompt_ids": [5, 6], "completion_ids": [[7]], "preferred": 0}])
  with pytest.raises(errors.DataError) as caught:
    generate.prompt_rows(data)
  assert caught.value.slug == "data.field_missing"


class FakeService:
  """Writes n times "c" for sample n of a prompt; the stop token after it, but
  for sample 2. Colder by 1 nat a token than the policy."""

  def generate(self, prompts, *, num_samples, sampling, seed, require_version,
               prompt_ids):
    assert isinstance(sampling, Sampling)
    counts = [n + (n != 2) for n in range(num_samples)]
    mask = np.tile(np.arange(9) < np.array(counts)[:, None],
                   (len(prompts), 1, 1))
    reasons = ["length" if n == 2 else "stop" for n in range(num_samples)]
    return GenerationResult(
        tokens=mask.astype(np.int32), mask=mask,
        text=[["c" * n for n in range(num_samples)] for _ in prompts],
        behaviour_logps=np.where(mask, -1.0, 99.0),
        behaviour_raw_logps=np.where(mask, -2.0, 99.0),
        finish_reason=[reasons] * len(prompts),
        policy_version=require_version)


@pytest.fixture
def written(tok, tmp_path):
  """Records of 2 prompts, 3 samples at 2 temperatures."""
  data = store(tok, tmp_path / "in", ROWS[:2], prompts_only=True)
  prompts = samples.PromptSet(
      tokens=[data.candidate_set(i).prompt for i in range(2)],
      prompt_ids=data.example_ids, prompts=["b a", "a"], columns={})
  config = {
      "seed": 3, "generate": {"temperatures": (0.5, 1.0)},
      "generation": dict(Sampling()._asdict(), num_samples=3)}
  draws = generate.draw(
      config, FakeService(),
      lambda prompts, completions, **_: [len(c) for c in completions], prompts,
      7)
  weights = results.Weights("run/sft", None, 7)
  return [generate.record(data, row, row, draws, weights, "abc")
          for row in range(2)]


def test_a_record_says_where_each_completion_came_from(written):
  one, two = written
  assert one["completions"] == ["", "c", "cc"] * 2  # equal ones stay apart
  assert one["scores"] == [0.0, 1.0, 2.0] * 2
  assert one["lengths"] == [1, 2, 2] * 2
  assert one["behaviour_logps"] == [-1.0, -2.0, -2.0] * 2
  assert one["behaviour_raw_logps"] == [-2.0, -4.0, -4.0] * 2
  assert one["finish_reasons"] == ["stop", "stop", "length"] * 2
  assert one["temperatures"] == [0.5] * 3 + [1.0] * 3
  assert one["sample_indices"] == [0, 1, 2] * 2
  assert one["seeds"] == [generate.temperature_seed(3, 0.5)] * 3 + [
      generate.temperature_seed(3, 1.0)] * 3
  assert one["seeds"][0] != one["seeds"][3]
  assert (one["policy_step"], one["params_sha256"]) == (7, "abc")
  assert one["answer"] == "7" and two["levels"] == [1, 2, 3]
  # Lists about the completions that the record had are not carried over.
  assert "notes" not in two and "ref_logps" not in two
  assert two["prompt_id"] == "two"


def test_a_record_is_read_back_as_it_was_sampled(tok, tmp_path, written):
  data = store(tok, tmp_path / "out", written)
  one = data.candidate_set(1)
  end = tok.end_id
  said = tok.hf.encode("c", add_special_tokens=False)
  assert [c.tolist() for c in one.completions] == [
      [end], [*said, end], tok.hf.encode("cc", add_special_tokens=False)]
  np.testing.assert_array_equal(one.multiplicity, [2, 2, 2])
  np.testing.assert_array_equal(one.scores, [0, 1, 2])
  assert not data.truncated(1).any()  # its log-probs are of all of it


def test_reasons_to_finish_are_checked(tok, tmp_path):
  row = {"prompt": "a", "completions": ["c", ""], "scores": [1, 0]}
  for reasons, slug in ((["stop"], "data.length_mismatch"),
                        (["stop", "eos"], "data.field_type"),
                        ([None, None], "data.empty"), (None, "data.empty")):
    with pytest.raises(errors.DataError) as caught:
      store(tok, tmp_path, [row | {"finish_reasons": reasons}])
    assert caught.value.slug == slug
  row["finish_reasons"] = ["stop", "length"]
  for more in ({}, {"completion_ids": ["x", "y"]}):  # a column and no layout
    data = store(tok, tmp_path / f"with {len(more)}", [row | more])
    assert len(data.candidate_set(0).completions) == 1  # without a token: none
    assert data.report["completions_without_tokens"] == 1


def test_the_summary_counts_by_hand(written):
  written[1]["scores"] = [1.0] * 6
  got = generate.summarize(written, seed=0)
  assert got["generate/num_prompts"] == 2
  assert got["generate/num_completions"] == 12
  assert got["generate/tokens"] == 20
  assert got["generate/mean_length"] == 20 / 12
  assert got["generate/stop_share"] == 8 / 12
  assert got["generate/empty_share"] == 4 / 12
  assert got["generate/repeated_share"] == 6 / 12
  assert got["generate/score"] == 1.0 == got["generate/score_ci95_low"]


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4])
def test_parts_share_the_shards_in_order(num_parts):
  rows = np.arange(100, 110)
  parts = [generate.shards_of(rows, size=3, num_parts=num_parts, part=part)
           for part in range(num_parts)]
  assert all(parts)
  merged = {n: rows for part in parts for n, rows in part.items()}
  assert [*merged] == [0, 1, 2, 3]
  np.testing.assert_array_equal(np.concatenate([*merged.values()]), rows)


def test_more_parts_than_shards_are_refused():
  with pytest.raises(errors.ConfigError) as caught:
    generate.shards_of(np.arange(10), size=3, num_parts=5, part=0)
  assert caught.value.where == "generate.num_parts"


def test_a_finished_model_of_the_workdir_comes_before_given_weights(
    tmp_path, monkeypatch):
  monkeypatch.setattr(
      generate.results, "finished", lambda run, stage: stage)
  given = types.SimpleNamespace(
      workdir=tmp_path / "run", model_dir="given",
      config={"model": {"path": "given"}})
  assert results.find_weights(given) == ("given", "given", 0)
  for stage, step in (("sft", 5), ("preference", 9)):
    (tmp_path / "run" / stage).mkdir(parents=True)
    (tmp_path / "run" / stage / "result.json").write_text(
        json.dumps({"step": step}))
    assert results.find_weights(given) == (f"run/{stage}", stage, step)
