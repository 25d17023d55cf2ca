"""Mistakes at the start: told quickly, without JAX, and all at once."""

import ast
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import default
from mcpo_jax import (
  config_file,
  config_keys,
  errors,
  main,
  registry,
  settings,
)
from mcpo_jax.data import readers, tokenizer
from mcpo_jax.models import config as config_lib
from mcpo_jax.training import setup

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = "--config=configs/quickstart.py"
TOKEN = "hf_" + "aB3" * 12

# Runs the command line, then writes what it cost and whether JAX was imported.
PROBE = """
import json, os, resource, sys
from mcpo_jax import main
code = 0
try:
  main.main()
except SystemExit as e:
  code = e.code
used = resource.getrusage(resource.RUSAGE_SELF)
with open(os.environ["PROBE"], "w") as file:
  json.dump([used.ru_utime + used.ru_stime, "jax" in sys.modules], file)
sys.exit(code)
"""


def resolve(*overrides):
  return main.read_config(main.parse([
      "train", f"--config={ROOT / 'configs' / 'quickstart.py'}",
      "--workdir=none", *overrides]))


@pytest.fixture
def typed(tmp_path):
  """words -> the finished command line, which must be quick and without JAX."""

  def run(*words, most=2.0):
    there = tmp_path / "probe.json"
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words], cwd=ROOT, capture_output=True,
        text=True, timeout=120, env=os.environ | {"PROBE": str(there)})
    seconds, with_jax = json.loads(there.read_text())
    assert seconds < most and not with_jax
    return done

  return run


@pytest.mark.parametrize("words, code, slug", [
    (("train", CONFIG, "--config.objective.btea=1"), 2, "cli.flag"),
    (("train", CONFIG, "--workdir=none", "--config.objective.btea=1"), 2,
     "config.unknown_key"),
    (("train", CONFIG, "--workdir=none", "--config.batch_size=0"), 2,
     "config.range"),
    (("train", "--config=configs/none.py", "--workdir=none"), 2,
     "config.missing"),
    (("export", CONFIG, "--workdir=none", "--out=none"), 5, "ckpt.none"),
    ((), 2, "cli.verb"),
])
def test_a_mistake_is_answered_quickly_and_without_a_traceback(
    typed, words, code, slug):
  done = typed(*words)
  assert done.returncode == code
  assert done.stderr.startswith(f"error[{slug}]: ")
  assert done.stderr.count("\n") == 1 and not done.stdout
  assert not (ROOT / "none").exists()


def test_debug_shows_the_traceback_and_keeps_the_exit_code(typed):
  done = typed("train", CONFIG, "--workdir=none", "--config.seed=-1", "--debug")
  assert done.returncode == 2
  assert "Traceback" in done.stderr and "error[config.range]" in done.stderr


def test_l6_help_names_every_verb_and_flag_and_needs_no_jax(typed):
  done = typed("train", "--help", most=1.0)
  assert done.returncode == 0 and not done.stderr
  for word in [*main.VERBS, *(f"--{flag}" for flag in main.FLAGS)]:
    assert word in done.stdout


def test_a_secret_is_refused_and_not_repeated(typed):
  for override in (f"--config.cache_dir={TOKEN}", f"--config.seed={TOKEN}"):
    done = typed("train", CONFIG, "--workdir=none", override)
    assert done.returncode == 2 and TOKEN not in done.stderr


def test_l11_a_closed_pipe_is_no_traceback():
  for closed, code in (("1>&-", 0), ("", 141)):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        f'"{sys.executable}" -m mcpo_jax --help {closed}', shell=True, cwd=ROOT,
        stdout=write, stderr=subprocess.PIPE, text=True, timeout=120,
        env=os.environ | {"PYTHONUNBUFFERED": ""})
    os.close(write)
    assert (done.returncode, done.stderr) == (code, "")


# Several at once, the nearest name, types.


def test_all_mistakes_are_told_at_once():
  with pytest.raises(errors.ErrorGroup) as caught:
    resolve("--config.batch_size=0", "--config.objective.beta=nan",
            "--config.stages=sft,prefrence", "--config.data.path=a*-1",
            "--config.mesh.data=0", "--config.kernel.strategy=random")
  assert {e.where for e in caught.value.errors} == {
      "batch_size", "objective.beta", "stages", "data.path", "mesh",
      "kernel.temperature"}
  assert str(caught.value).count("error[") == 6
  with pytest.raises(errors.ErrorGroup) as caught:
    resolve("--config.bach_size=3", "--config.seed=x", "--config.seed=1.5")
  assert [e.slug for e in caught.value.errors] == [
      "config.unknown_key", "config.type", "config.type"]


@pytest.mark.parametrize("words, near", [
    (["--config.objective.btea=1"], "'objective.beta'"),
    (["--config.learning_rate=1"], "learning_rate'"),
    (["--wrkdir=x"], "'workdir'"),
    (["--config.objective.name=mpco"], "'mcpo'"),
    (["--config.data.format=necter"], "'nectar'"),
])
def test_an_unknown_name_gets_the_nearest_one(words, near):
  with pytest.raises(errors.ConfigError) as caught:
    resolve(*words)
  assert near in caught.value.hint


@pytest.mark.parametrize("key, text, value", [
    ("seed", "7", 7), ("optimizer.learning_rate", "3", 3.0),
    ("optimizer.learning_rate", "1e-5", 1e-5),
    ("data.quarantine", "true", True), ("data.quarantine", "0", False),
    ("num_epochs", "None", None),
    ("cache_dir", "a=b c", "a=b c"),
    ("stages", "sft,preference", ("sft", "preference")),
    ("stages", "('sft', 'preference')", ("sft", "preference")),
    ("kernel.temperature", "2", 2.0),
])
def test_typed_text_becomes_the_fields_type(key, text, value):
  config = default.get_config()
  config.num_epochs = 1.0
  config_file.override(config, key, text)
  got = settings.flatten(config.to_dict())[key]
  assert got == value and type(got) is type(value)


@pytest.mark.parametrize("key, text", [
    ("seed", "1.5"), ("seed", "1e3"), ("optimizer.learning_rate", "abc"),
    ("optimizer.learning_rate", ""), ("data.quarantine", "2"),
    ("num_epochs", "none"), ("model", "3"),
])
def test_text_of_another_type_is_refused(key, text):
  with pytest.raises(errors.ConfigError) as caught:
    config_file.override(default.get_config(), key, text)
  assert (caught.value.slug, caught.value.where) == ("config.type", key)


def test_a_blank_stands_for_the_equals_sign():
  command = main.parse(["train", "--config.optimizer.b1", "0.5", "--workdir",
                        "a b", "--config.seed", "-1", "--debug"])
  assert command.overrides == [("optimizer.b1", "0.5"), ("seed", "-1")]
  assert command.flags == {"workdir": "a b", "debug": "true"}
  for words in (["--config.cache_dir", "--workdir=x"], ["--workdir"]):
    with pytest.raises(errors.ConfigError) as caught:
      main.parse(["train", *words])
    assert caught.value.slug == "cli.flag" and caught.value.where == words[0]


@pytest.mark.parametrize(
    "key", [k for k, s in config_keys.KEYS.items() if not s.optional])
def test_a_field_that_must_be_set_cannot_be_none(key):
  config = default.get_config().to_dict()
  *groups, name = key.split(".")
  node = config
  for group in groups:
    node = node[group]
  node[name] = None
  with pytest.raises(errors.McpoError) as caught:
    settings.resolve(config)
  listed = getattr(caught.value, "errors", [caught.value])
  assert key in [e.where for e in listed]


def test_a_config_with_other_keys_is_refused():
  config = default.get_config().to_dict()
  config["kernel"]["temprature"] = config["kernel"].pop("temperature")
  with pytest.raises(errors.ErrorGroup) as caught:
    settings.resolve(config)
  assert [(e.slug, e.where) for e in caught.value.errors] == [
      ("config.unknown_key", "kernel.temprature"),
      ("config.missing", "kernel.temperature")]


# The tables of config_keys.py agree with what they speak of.


def test_every_key_of_the_default_config_has_a_range_and_no_other_has():
  flat = settings.flatten(default.get_config().to_dict())
  assert flat.keys() == config_keys.KEYS.keys()
  limits = {k for k in flat if k.startswith("watchdog.")}  # None: no limit
  assert {k for k, v in flat.items() if v is None} | limits == {
      k for k, s in config_keys.KEYS.items() if s.optional}


def test_known_names_are_those_of_the_readers_and_the_models():
  assert set(config_keys.FORMATS) == {"auto", *readers.READERS}
  assert set(config_keys.FAMILIES) == set(config_lib.FAMILIES)
  for entry in (*registry.OBJECTIVES.values(), *registry.REWARDS.values()):
    assert importlib.util.find_spec(entry.place.split(":")[0])


def test_every_key_is_read_somewhere():
  """By its name, as a word, an argument or a field outside the checks."""
  words = set()
  for file in (ROOT / "mcpo_jax").rglob("*.py"):
    if file.parent.name != "settings" and file.name != "config_keys.py":
      for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant):
          words.add(node.value)
        elif isinstance(node, ast.arg):
          words.add(node.arg)
        elif isinstance(node, ast.AnnAssign):  # a field of a named tuple
          words.add(getattr(node.target, "id", None))
  parts = {part for key in config_keys.KEYS for part in key.split(".")}
  assert not parts - words


# Sources.


@pytest.mark.parametrize("text, sources", [
    ("a.jsonl", [("a.jsonl", 1.0)]),
    ("a.jsonl*2.5, b.jsonl", [("a.jsonl", 2.5), ("b.jsonl", 1.0)]),
    ("d/*.jsonl", [("d/*.jsonl", 1.0)]),
    ("d/*.jsonl*2,d/*", [("d/*.jsonl", 2.0), ("d/*", 1.0)]),
    ("embedded:quickstart/train", [("embedded:quickstart/train", 1.0)]),
])
def test_a_path_names_sources_and_their_weights(text, sources):
  assert settings.parse_sources(text) == sources


@pytest.mark.parametrize(
    "text", ["a*0", "a*-1", "a*nan", "a*inf", "*2", "a,,b", "a,", " "])
def test_a_bad_weight_or_an_empty_path_is_refused(text):
  with pytest.raises(errors.ConfigError) as caught:
    settings.parse_sources(text)
  assert caught.value.slug == "config.range"


def test_stores_and_tokenizers_follow_the_config(tmp_path):
  for name, rows in (("a", 2), ("b", 3)):
    (tmp_path / f"{name}.jsonl").write_text("".join(
        json.dumps({"prompt": f"{name} {i}", "chosen": "c", "rejected": "d"})
        + "\n" for i in range(rows)))
  tokenizer.train_tokenizer(["a b c"], vocab_size=300, out_dir=tmp_path / "t")
  path = f"{tmp_path}/a.jsonl*2,{tmp_path}/b.jsonl"
  config = resolve(
      f"--config.tokenizer.path={tmp_path / 't'}",
      "--config.tokenizer.bos=none",
      f"--config.data.path={path}", "--config.stages=preference")
  assert sorted(setup.training_texts(config)) == sorted(
      [text for name, rows in (("a", 2), ("b", 3)) for i in range(rows)
       for text in (f"{name} {i}", "c", "d")])
  own = setup.open_tokenizer(config, tmp_path, None)
  assert own.bos == "none"
  run = setup.Run(config, tmp_path, tmp_path / "cache", None, None, own, {})
  assert len(setup.open_store(run, path, "auto", name="train")) == 2 * 2 + 3
