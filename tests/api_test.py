"""The public interface: its names, its documented examples, what it does."""

import doctest
import importlib
import inspect
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import run_cases

import mcpo_jax
from mcpo_jax import commit, errors, settings
from mcpo_jax.data import tokenizer as tokenizer_lib
from mcpo_jax.models import config as model_config
from mcpo_jax.models import decoder, hf
from mcpo_jax.types import Features

# What people's notebooks and scripts call: a change here breaks them, so it is
# decided, told in CHANGELOG.md, and then made here too.
SIGNATURES = {
    "McpoError": "(slug, message, *, where, got, want, hint)",
    "Model": "(folder, tokenizer, dtype)",
    "Model.generate":
        "(self, prompts, *, num_samples, max_new_tokens, seed, **sampling)",
    "Model.score": "(self, prompts, completions)",
    "Run": "(workdir)",
    "Run.curve": "(self, name, stage)",
    "Run.model": "(self, stage)",
    "Run.samples": "(self)",
    "Run.summary": "property",
    "check_objective": "(fn, **settings)",
    "draw": "(key, state, scores, sets, *, strategy, temperature, "
            "num_negatives, include_preferred, replace, corrected)",
    "exact": "module",
    "kernel": "(function)",
    "load_config": "(config, overrides)",
    "load_model": "(path, *, dtype)",
    "loss": "(name, **options)",
    "make_sets": "(scores, *, anchors, candidate_mask, lengths)",
    "objective": "(**needs)",
    "reward": "(function)",
    "train": "(config, workdir)",
}
MODULES = ("mcpo_jax.api", "mcpo_jax.kernels.sets", "mcpo_jax.user_code")


def _signature(thing) -> str:
  """Names and kinds, without annotations and defaults."""
  if isinstance(thing, property):
    return "property"
  if inspect.ismodule(thing):
    return "module"
  return str(inspect.Signature([
      p.replace(annotation=p.empty, default=p.empty)
      for p in inspect.signature(thing).parameters.values()]))


def test_public_names_and_signatures_are_those_of_the_table():
  found = {}
  for name in mcpo_jax.__all__:
    thing = getattr(mcpo_jax, name)
    found[name] = _signature(thing)
    assert inspect.getdoc(thing), name
    if inspect.isclass(thing) and not issubclass(thing, Exception):
      found |= {f"{name}.{key}": _signature(value)
                for key, value in vars(thing).items() if key[0] != "_"}
  assert found == SIGNATURES
  assert set(mcpo_jax.__all__) <= set(dir(mcpo_jax))
  with pytest.raises(AttributeError):
    mcpo_jax.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_documented_examples_run(name, monkeypatch):
  monkeypatch.chdir(run_cases.ROOT)
  module = importlib.import_module(name)
  finder = doctest.DocTestFinder(exclude_empty=True)
  more = {"mcpo_jax": mcpo_jax, "np": np, "Features": Features}
  runner = doctest.DocTestRunner()
  for test in finder.find(module, globs=vars(module) | more):
    runner.run(test)
  assert not runner.failures


def test_names_without_jax_are_had_without_jax():
  code = ("import sys, mcpo_jax;"
          "mcpo_jax.objective, mcpo_jax.kernel, mcpo_jax.reward;"
          "c = mcpo_jax.load_config('configs/quickstart.py', {'seed': 3});"
          "assert c['seed'] == 3 and not {'jax', 'numpy'} & set(sys.modules)")
  subprocess.run([sys.executable, "-c", code], check=True, cwd=run_cases.ROOT,
                 env=run_cases.environment(""))


def test_importing_all_of_it_leaves_the_users_logging_alone():
  code = ("import logging, sys;"
          "seen = lambda: (logging.root.handlers[:], logging.root.level,"
          " logging.getLevelName(logging.getLogger('mine').getEffectiveLevel())"
          ", sys.excepthook, logging.getLoggerClass());"
          "before = seen(); import mcpo_jax;"
          "[getattr(mcpo_jax, name) for name in mcpo_jax.__all__];"
          "import mcpo_jax.verbs; assert seen() == before")
  subprocess.run([sys.executable, "-c", code], check=True, cwd=run_cases.ROOT,
                 env=run_cases.environment(""))


def test_overrides_are_values_texts_paths_and_functions(
    tmp_path, monkeypatch):
  from configs import quickstart

  (tmp_path / "my_own.py").write_text(
      "def my_loss(features, batch, state, *, beta=0.1, margin=2.0): ...\n")
  monkeypatch.syspath_prepend(tmp_path)
  import my_own

  got = mcpo_jax.load_config(quickstart.get_config(), {
      "seed": "7", "optimizer.learning_rate": 1, "data.path": tmp_path,
      "stages": ["preference"], "num_epochs": None, "num_steps": 5,
      "objective.name": my_own.my_loss, "objective.margin": 3})
  assert got["seed"] == 7 and got["optimizer"]["learning_rate"] == 1.0
  assert got["data"]["path"] == str(tmp_path)
  assert got["stages"] == ("preference",)
  assert got["objective"] == {
      "name": "my_own:my_loss", "beta": 0.1, "margin": 3.0}
  for overrides, slug, where in (
      ({"seed": 1.5}, "config.type", "seed"),
      ({"stages": 3}, "config.type", "stages"),
      ({"objective.name": lambda: None}, "config.function", "<lambda>"),
      ({"objective.name": errors.nearest}, "config.function", "errors.py"),
      ({"beta": 0.1}, "config.unknown_key", "beta")):
    with pytest.raises(mcpo_jax.McpoError) as caught:
      mcpo_jax.load_config("configs/quickstart.py", overrides)
    assert caught.value.slug == slug and where in caught.value.where


def test_another_systems_name_of_a_key_gets_ours():
  with pytest.raises(mcpo_jax.McpoError) as caught:
    mcpo_jax.load_config("configs/quickstart.py", {"loss_type": "ipo"})
  assert "'objective.name'" in caught.value.hint


def test_a_config_is_found_beside_the_package(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert mcpo_jax.load_config("configs/quickstart.py")["batch_size"] > 1
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "quickstart.py").write_text("1 / 0")
  with pytest.raises(mcpo_jax.McpoError, match="ZeroDivisionError"):
    mcpo_jax.load_config("configs/quickstart.py")


def test_a_loss_refuses_a_setting_that_it_does_not_take():
  with pytest.raises(mcpo_jax.McpoError) as caught:
    mcpo_jax.loss("dpo", beta=0.1, lable_smoothing=0.1)
  assert caught.value.slug == "config.unused"
  assert "label_smoothing" in caught.value.hint


@pytest.mark.parametrize("name", ["cd", "rnce", "simpo", "kto"])
def test_a_loss_needs_nothing_but_its_name(name):
  sets = mcpo_jax.make_sets(
      [[1.0, 0.5]] * 3, anchors={"ref": [[-2.0, -2.0]] * 3})
  features = Features(np.array([[-1.0, -3.0]] * 3))
  assert mcpo_jax.loss(name)(features, sets, ())[0].shape == (3,)


def test_made_up_sets_have_the_roles_of_records():
  nan = float("nan")
  sets = mcpo_jax.make_sets(
      [[0.5, 0.5, 0.1, 0.9], [nan, 1.0, nan, 0.2]], lengths=[[3, 4, 5, 6]] * 2,
      candidate_mask=[[True] * 4, [True, True, True, False]])
  assert sets.role.tolist() == [[1, 0, -1, 0], [1, -1, -1, 0]]
  assert sets.lengths.tolist() == [[3, 4, 5, 6], [3, 4, 5, 0]]
  assert sets.role.dtype == np.int8 and sets.example_id.shape == (2, 2)


def _export(folder, seed):
  """A made-up stage's folder with a tiny model of random weights."""
  texts = ["the cup is red", "colour grey thing kite", "the kite is grey"]
  tokenizer_lib.train_tokenizer(
      texts, vocab_size=280, out_dir=folder / "tokenizer")
  tokenizer = tokenizer_lib.load_tokenizer(folder / "tokenizer")
  config = model_config.ModelConfig(
      family="llama", vocab_size=tokenizer.vocab_size, hidden_size=16,
      intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
      head_dim=4, max_positions=256, bos_token_id=tokenizer.bos_id,
      eos_token_ids=tokenizer.stop_ids, pad_token_id=tokenizer.pad_id)
  params = decoder.init_params(jax.random.key(seed), config)
  hf.save_params(
      folder / "model", params, config, tokenizer_dir=folder / "tokenizer",
      stop_ids=tokenizer.stop_ids)
  commit.write_manifest(folder / "model", {})
  (folder / "result.json").write_text(json.dumps({"step": 8}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A made-up run of two stages."""
  workdir = tmp_path_factory.mktemp("api") / "run"
  for seed, stage in enumerate(("sft", "preference")):
    _export(workdir / stage, seed)
  config = mcpo_jax.load_config("configs/quickstart.py")
  (workdir / "config.json").write_text(json.dumps(
      {"version": settings.CONFIG_VERSION, "config": config}))
  (workdir / "summary.json").write_text(json.dumps({"step": 8, "x": 1}))
  rows = [{"stage": stage, "step": step, "time": 1.0, name: value}
          for stage, step, name, value in (
              ("sft", 5, "loss", 3.0), ("preference", 0, "eval/loss", 0.7),
              ("preference", 1, "loss", 0.5), ("preference", 2, "loss", None))]
  (workdir / "metrics.jsonl").write_text(
      "".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "pref')
  (workdir / "preference" / "samples.jsonl").write_text("".join(
      json.dumps({"step": step, "prompt": "p", "start": "a", "now": now})
      + "\n" for step, now in ((0, "a"), (4, "b"), (4, "c"))))
  return mcpo_jax.Run(workdir)


def test_a_run_tells_what_it_did(run):
  assert run.summary["x"] == 1 and run.config["seed"] == 0
  steps, losses = run.curve("loss")
  assert steps.tolist() == [1, 2]
  assert losses[0] == 0.5 and np.isnan(losses[1])
  assert [x.tolist() for x in run.curve("loss", stage="sft")] == [[5], [3.0]]
  assert [row["now"] for row in run.samples()] == ["b", "c"]
  assert "'step': 8" in repr(run)
  with pytest.raises(mcpo_jax.McpoError) as caught:
    run.curve("eval/los")
  assert "'eval/loss'" in caught.value.hint
  with pytest.raises(mcpo_jax.McpoError) as caught:
    mcpo_jax.Run(run.workdir / "sft")
  assert caught.value.slug == "ckpt.none"


def test_a_model_scores_what_it_samples_as_the_sampler_does(run):
  model = run.model()
  prompts = ["colour red thing cup 1", "colour grey thing kite 22"]
  drawn = model.generate(prompts, num_samples=3, max_new_tokens=24, seed=5)
  assert np.shape(drawn.text) == (2, 3)
  logps = model.score(prompts, drawn.text)
  ended = np.array(drawn.finish_reason) == "stop"
  # A text may be told in other tokens than it was sampled in.
  for i, n in np.argwhere(ended):
    ids = model.tokenizer.hf.backend_tokenizer.encode(
        drawn.text[i][n], add_special_tokens=False).ids
    own = drawn.tokens[i, n][drawn.mask[i, n]]
    if ids == own[:-1].tolist():
      want = drawn.behaviour_raw_logps[i, n].sum()
      np.testing.assert_allclose(logps[i][n], want, rtol=1e-4)
  alone = model.generate(prompts[1:], num_samples=2, max_new_tokens=24, seed=5)
  assert alone.text[0] == drawn.text[1][:2]
  assert [len(x) for x in model.score(prompts, [["a", "b", "c"], []])] == [3, 0]


def test_a_folder_opens_as_the_same_model(run):
  prompts, texts = ["colour red thing cup 1"], [["the cup is red", "no"]]
  model = mcpo_jax.load_model(run.model().folder)
  np.testing.assert_array_equal(
      model.score(prompts, texts)[0], run.model().score(prompts, texts)[0])
  assert run.model("sft").score(prompts, texts)[0][0] != (
      model.score(prompts, texts)[0][0])
  assert "weights" in repr(model)
  with pytest.raises(mcpo_jax.McpoError) as caught:
    model.score(prompts, [["word " * 3000]])
  assert caught.value.slug == "data.completion_too_long"
  with pytest.raises(mcpo_jax.McpoError) as caught:
    run.model("reward_model")
  assert caught.value.slug == "ckpt.none"
