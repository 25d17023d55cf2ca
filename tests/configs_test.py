"""Every config loads, is locked and explained, and passes the checks."""

import ast
import importlib
import json
import pathlib
import re

import pytest

from mcpo_jax import errors, main, settings

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
VARIANTS = [f.stem for f in FILES if f.stem != "default"]
FULL_SIZE = [v for v in VARIANTS if re.search("_(mcpo|dpo)$", v)]


def _load(name):
  return importlib.import_module(f"configs.{name}").get_config()


def _flat(name):
  return settings.flatten(_load(name).to_dict())


@pytest.mark.parametrize("name", ["default", *VARIANTS])
def test_is_locked(name):
  config = _load(name)
  assert config.is_locked
  with pytest.raises(AttributeError, match="beta_"):
    config.objective.beta_ = 1.0


@pytest.mark.parametrize("name", VARIANTS)
def test_has_the_keys_of_default_and_passes_the_checks(name):
  assert _flat(name).keys() == _flat("default").keys()
  settings.resolve(_load(name).to_dict())


@pytest.mark.parametrize("name, strategy", [
    ("quickstart", "random"), ("quickstart", "max"), ("serve", None),
    ("reward_model_hh", None), ("llama3_8b_nectar_onmcpo", None),
    ("llama3_8b_nectar_mcpo_lora", None),
    ("mistral_7b_ultrafeedback_dpo", None),
])
def test_a_workdirs_config_is_read_back_with_what_is_typed(
    name, strategy, tmp_path):
  config = _load(name)
  if strategy:
    config.kernel.strategy = strategy
    config.kernel.temperature = None
  saved = settings.resolve(config.to_dict())
  (tmp_path / "config.json").write_text(json.dumps(
      {"version": settings.CONFIG_VERSION, "config": saved}))
  got = main.read_config(main.parse([
      "evaluate", f"--workdir={tmp_path}",
      "--config.benchmark.temperature=0.25",
      "--config.evaluation.models=a=b,step:*"]))
  saved["evaluation"]["models"] = ("a=b", "step:*")
  saved["benchmark"]["temperature"] = 0.25
  assert got == saved
  with pytest.raises(errors.ConfigError, match="evaluation.modles") as caught:
    main.read_config(main.parse([
        "evaluate", f"--workdir={tmp_path}", "--config.evaluation.modles=a"]))
  assert caught.value.slug == "config.unknown_key"


def test_every_field_of_default_has_a_comment():
  source = (ROOT / "configs" / "default.py").read_text()
  lines = source.split("\n")
  fields = [
      node
      for node in ast.walk(ast.parse(source))
      if isinstance(node, ast.Assign)
      and isinstance(node.targets[-1], ast.Attribute)
      and "ConfigDict()" not in ast.unparse(node.value)
  ]
  optimizers = sum("_optimizer()" in ast.unparse(f.value) for f in fields)
  leaves = len(_flat("default"))
  per_optimizer = len(_load("default").optimizer)
  assert len(fields) == leaves - (optimizers - 1) * per_optimizer + optimizers
  for field in fields:
    above = lines[field.lineno - 2].strip()
    assert above.startswith("#"), f"line {field.lineno}: {ast.unparse(field)}"


def test_every_optional_field_says_what_none_means():
  lines = (ROOT / "configs" / "default.py").read_text().split("\n")
  comment = ""
  for line in lines:
    if line.strip().startswith("#"):
      comment += " " + line.strip()
      continue
    if "placeholder(" in line:
      assert re.search("None|[Rr]equire|Exactly one", comment), line
    comment = ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports_only_ml_collections_and_configs(path):
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module]
    assert {n.split(".")[0] for n in names} <= {"ml_collections", "configs"}


@pytest.mark.parametrize("name", VARIANTS)
def test_header_states_hardware_and_its_own_command(name):
  header = ast.get_docstring(ast.parse(
      (ROOT / "configs" / f"{name}.py").read_text()))
  assert "Hardware: " in header
  assert "Command" in header
  assert f"--config=configs/{name}.py" in header


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_header_states_what_it_reproduces_and_its_data(name):
  header = importlib.import_module(f"configs.{name}").__doc__
  assert "Reproduces: " in header and "Data: " in header
  assert _load(name).data.path in header


@pytest.mark.parametrize("name", [n for n in FULL_SIZE if n.endswith("_dpo")])
def test_a_dpo_twin_differs_in_the_objective_alone(name):
  ours, other = _flat(name), _flat(name.replace("_dpo", "_mcpo"))
  assert {k for k in ours if ours[k] != other[k]} == {"objective.name"}


def test_there_are_three_full_size_models_and_their_twins():
  assert len(FULL_SIZE) == 6
