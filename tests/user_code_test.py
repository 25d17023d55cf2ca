"""Functions of the user's own: found, read without importing, loaded."""

import hashlib
import linecache
import math
import subprocess
import sys

import pytest

import mcpo_jax
from mcpo_jax import errors, registry, user_code
from mcpo_jax.rewards import functions
from mcpo_jax.stages import sampling

GOOD = '''
import mcpo_jax
import not_installed_anywhere

@mcpo_jax.objective(anchors=("ref", "prev"), strategies=["all", "random"],
                    terms=(), separable=True)
def my_loss(features, batch, state, *, beta=0.1, steps=3, flag=False,
            form="log", shift=-2, cap=None, progress):
  return features, batch, state

def plain(features, batch, state, *, progress=None):
  return "plain"

def first_state(num_examples):
  return num_examples

@mcpo_jax.objective(state="my_file:first_state", contrast=False)
def with_state(features, batch, state): ...
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
  (tmp_path / "my_file.py").write_text(GOOD)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def _write(folder, text):
  (folder / "my_file.py").write_text(text)


def test_an_entry_is_read_without_importing_the_file(folder):
  entry = user_code.read_objective("my_file:my_loss")
  any_number = registry.Setting(low=-math.inf, open_low=True)
  assert entry == registry.Objective(
      place=f"{folder / 'my_file.py'}:my_loss",
      settings={
          "beta": any_number._replace(default=0.1),
          "steps": any_number._replace(default=3),
          "flag": registry.Setting(False, choices=(True, False)),
          "form": registry.Setting("log"),
          "shift": any_number._replace(default=-2),
          "cap": registry.Setting(optional=True),
      },
      anchors=("ref", "prev"), strategy="all", strategies=("all", "random"),
      progress=True)


def test_without_a_declaration_it_needs_the_reference_and_a_negative(folder):
  entry = user_code.read_objective("my_file:plain")
  assert entry.anchors == ("ref",) and entry.contrast and not entry.separable
  assert entry.strategy == "mc" and entry.progress and not entry.settings


def test_a_kernel_of_ones_own_takes_what_ours_take(folder):
  (folder / "kernels.py").write_text(
      "def good(key, state, scores, sets, *, temperature, num_negatives,\n"
      "         include_preferred): ...\n"
      "def bad(key, scores, sets): ...\n")
  assert user_code.check_kernel("kernels:good").function.name == "good"
  with pytest.raises(errors.ConfigError) as e:
    user_code.check_kernel("kernels:bad")
  assert e.value.slug == "config.function" and "kernels.py:3" in e.value.where


def test_the_place_of_a_state_is_found_too(folder):
  entry = user_code.read_objective("my_file:with_state")
  assert entry.state == f"{folder / 'my_file.py'}:first_state"
  assert not entry.contrast


def test_files_are_looked_for_here_then_as_modules(
    folder, tmp_path):
  other = tmp_path / "configs"
  other.mkdir()
  (other / "my_file.py").write_text(GOOD.replace("beta=0.1", "beta=0.2"))
  (other / "second.py").write_text(GOOD.replace("beta=0.1", "beta=0.3"))
  read = lambda name: user_code.read_objective(
      name).settings["beta"].default
  assert read("my_file:my_loss") == 0.1
  assert read("configs/second:my_loss") == 0.3
  assert read("configs/my_file:my_loss") == 0.2
  assert read("configs/my_file.py:my_loss") == 0.2
  assert read(f"{other}/second:my_loss") == 0.3
  entry = user_code.find("mcpo_jax.objectives.pairwise:dpo_loss", where="x")
  assert entry.place == "mcpo_jax.objectives.pairwise:dpo_loss"


def test_finding_a_module_imports_nothing():
  code = (
      "import sys; from mcpo_jax import objective_names as n, user_code as u;"
      "import mcpo_jax; mcpo_jax.objective;"
      "u.find('mcpo_jax.objectives.pairwise:dpo_loss', where='');"
      "n.find_objective('sft->dpo');"
      "assert not {'jax', 'numpy', 'mcpo_jax.objectives'} & set(sys.modules)")
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name, got", [
    ("my_file:my_los", "my_los"), ("my_fil:my_loss", "my_fil"),
    ("my_file:", "my_file:"), (":my_loss", ":my_loss"),
    ("my_file:a b", "my_file:a b"), ("json.nothing:f", "json.nothing"),
    ("math:sqrt", "math"), ("my_file.py.py:my_loss", "my_file.py.py"),
])
def test_what_is_not_there_is_named(folder, name, got):
  with pytest.raises(errors.ConfigError) as e:
    user_code.find(name, where="objective.name")
  assert e.value.slug == "config.range" and e.value.where == "objective.name"
  assert e.value.got == got and e.value.want
  if got == "my_los":
    assert "my_loss" in e.value.hint


HEAD = "@objective({})\ndef my_loss(features, batch, state): ..."


@pytest.mark.parametrize("text, line, got", [
    ("def my_loss(features, batch, state, beta=0.1): ...", 1, "beta"),
    ("def my_loss(features, batch): ...", 1, ["features", "batch"]),
    ("def my_loss(features, batch, state=()): ...", 1,
     ["features", "batch", "state"]),
    ("def my_loss(features, batch, state, **kwargs): ...", 1, "kwargs"),
    ("def my_loss(features, batch, state, *rest, a=1): ...", 1, "rest"),
    ("def my_loss(features, batch, state, *,\n  beta): ...", 2, "beta"),
    ("\ndef my_loss(features, batch, state, *,\n  b=1 / 3): ...", 3, "1 / 3"),
    ("def my_loss(features, batch, state, *, b=(1, 2)): ...", 1, "(1, 2)"),
    ("def my_loss(features, batch, state, *, b=1e999): ...", 1, "1e309"),
    (HEAD.format("anchor=('ref',)"), 1, "anchor"),
    (HEAD.format("anchors=('reff',)"), 1, "reff"),
    (HEAD.format("anchors='ref'"), 1, "ref"),
    (HEAD.format("terms=TERMS"), 1, "TERMS"),
    (HEAD.format("**needs"), 1, "needs"),
    (HEAD.format("pairwise=1"), 1, 1),
    (HEAD.format("strategy='best'"), 1, "best"),
    (HEAD.format("strategies=[['mc']]"), 1, ["mc"]),
    (HEAD.format("state=3"), 1, 3),
    (HEAD.format("settings=()"), 1, "settings"),
    ("def my_loss(features, batch, state:", 1, None),
])
def test_what_cannot_be_used_is_refused_with_its_line(folder, text, line, got):
  _write(folder, text)
  with pytest.raises(errors.ConfigError) as e:
    user_code.read_objective("my_file:my_loss")
  assert e.value.slug == "config.function"
  assert e.value.where == f"my_file.py:{line}"
  assert e.value.got == got
  assert e.value.want or got is None


def test_a_kernel_has_other_arguments(folder):
  _write(folder, "def walk(key, state, scores, sets, *, steps=2): ...")
  source = user_code.find("my_file:walk", where="kernel.strategy")
  settings = user_code.read_settings(
      source, ("key", "state", "scores", "sets"))
  assert settings["steps"].default == 2
  with pytest.raises(errors.ConfigError):
    user_code.read_settings(source, user_code.OBJECTIVE_ARGUMENTS)


def test_a_changed_file_is_loaded_anew_and_hashed_anew(folder):
  seen = []
  for value in (1, 2, 1):
    text = f"runs = []\ndef f():\n  runs.append(0)\n  return {value}, len(runs)"
    _write(folder, text)
    source = user_code.find("my_file:f", where="")
    assert source.sha256 == hashlib.sha256(text.encode()).hexdigest()
    seen.append(user_code.load(source.place)())
  # The first text is the same module again.
  assert seen == [(1, 1), (2, 1), (1, 2)]


@pytest.mark.parametrize("text", [
    "import not_installed_anywhere", "1 / 0", "f = 3", "g = print",
    "raise SystemError",
])
def test_what_fails_when_imported_is_named(folder, text):
  _write(folder, text)
  with pytest.raises(errors.ConfigError) as e:
    user_code.load(f"{folder / 'my_file.py'}:f")
  assert e.value.slug == "config.function" and "my_file.py:f" in e.value.where


def test_functions_of_modules_are_loaded():
  assert user_code.load("math:sqrt")(4.0) == 2.0
  with pytest.raises(errors.ConfigError):
    user_code.load("no_such_module:f")


CELL = """
@mcpo_jax.objective(anchors=("ref",), pairwise=True)
def cell_loss(features, batch, state, *, beta=0.1, margin=2):
  return margin
"""


@pytest.fixture
def cell(monkeypatch):
  """run(text) runs it as a notebook runs a cell."""
  main, count = sys.modules["__main__"], iter(range(9))

  def run(text):
    name = f"<cell {next(count)}>"
    lines = text.splitlines(keepends=True)
    monkeypatch.setitem(linecache.cache, name, (len(text), None, lines, name))
    space = {"mcpo_jax": mcpo_jax, "__name__": "__main__"}
    exec(compile(text, name, "exec"), space)
    for key, value in space.items():
      monkeypatch.setattr(main, key, value, raising=False)
    return space

  return run


def test_a_function_of_a_cell_is_read_and_loaded_as_it_stands_now(cell):
  hashes = []
  for margin in (2, 3, 2):
    loss = cell(CELL.replace("margin=2", f"margin={margin}"))["cell_loss"]
    name = user_code.name_of(loss)
    assert name == "__main__:cell_loss"
    entry = user_code.read_objective(name)
    assert entry.settings["margin"].default == margin and entry.pairwise
    assert user_code.load(entry.place)(0, 0, 0, margin=margin) == margin
    hashes.append(user_code.find(name, where="").sha256)
    assert user_code.source_hash(name) == hashes[-1]
  assert hashes[0] == hashes[2] != hashes[1]
  with pytest.raises(errors.ConfigError) as e:
    cell("def bad(features, batch): ...")
    user_code.read_objective("__main__:bad")
  assert e.value.where == "__main__:1"


@pytest.mark.parametrize("text", ["", "other = 3", "other = lambda: 3",
                                  "class other: ...", "other = print"])
def test_what_no_cell_defines_is_named(cell, text):
  cell(text)
  with pytest.raises(errors.ConfigError) as e:
    user_code.find("__main__:other", where="objective.name")
  assert (e.value.slug, e.value.got) == ("config.range", "other")


def test_kernels_and_rewards_are_looked_at_where_they_are_declared(cell):
  with pytest.raises(errors.ConfigError) as e:
    cell("@mcpo_jax.kernel\ndef walk(key, scores): ...")
  assert e.value.where == "__main__:walk" and "state" in e.value.want
  kernel = cell(
      "@mcpo_jax.kernel\ndef walk(key, state, scores, sets, *, temperature,"
      "\n         num_negatives, include_preferred): ...")["walk"]
  assert user_code.check_kernel(user_code.name_of(kernel)).place == (
      "__main__:walk")
  with pytest.raises(errors.ConfigError) as e:
    cell("@mcpo_jax.reward\ndef short(prompts, completions): ...")
  assert "**columns" in e.value.want
  reward = cell("@mcpo_jax.reward\ndef short(prompts, completions, **columns):"
                "\n  return [-len(c) for c in completions]")["short"]
  loaded = functions.load_reward(user_code.name_of(reward))
  assert loaded(["p", "p"], ["ab", "c"]) == [-2, -1]


def test_the_decorator_gives_the_function_back():
  def loss(features, batch, state): ...

  declared = mcpo_jax.objective(anchors=(), pairwise=True)(loss)
  assert declared is loss
  needs = user_code.needs_of(loss)
  assert needs.anchors == () and needs.pairwise and not needs.separable
  with pytest.raises(errors.ConfigError):
    mcpo_jax.objective(anchors=("reff",))


def test_needs_of_a_loss_of_the_house_are_the_registrys():
  loss = user_code.load("mcpo_jax.objectives.pairwise:dpo_loss")
  assert user_code.needs_of(loss) == registry.OBJECTIVES["dpo"]


def test_what_a_run_keeps_of_own_rewards_changes_with_their_files(folder):
  config = {"reward": {"name": "length,math:sqrt,my_file:plain*-1"}}
  seen = []
  for text in (GOOD, GOOD + "# changed"):
    _write(folder, text)
    seen.append(sampling.own_rewards(config))
    assert seen[-1] == {
        "math:sqrt": None,
        "my_file:plain": hashlib.sha256(text.encode()).hexdigest()}
  assert seen[0] != seen[1]
  assert sampling.own_rewards({"reward": {"name": None}}) == {}
