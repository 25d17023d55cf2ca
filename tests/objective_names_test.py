"""What `objective.name` may be: plain, mixed, blended, the user's own."""

import numpy as np
import objectives_batches as batches
import pytest

from mcpo_jax import errors, objective_names, registry
from mcpo_jax.objectives import mixture
from mcpo_jax.types import Features

MINE = '''
import mcpo_jax

@mcpo_jax.objective(anchors=("prev",), state="my_file:first")
def counted(features, batch, state, *, beta=5.0, scale=2.0):
  zeros = features.logps[:, 0] * 0
  return zeros + beta * scale, {}, state + 1

def first(num_examples):
  return num_examples

def moving(features, batch, state, *, progress): ...

@mcpo_jax.objective(parameters="my_file:first")
def learned(features, batch, state): ...
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
  (tmp_path / "my_file.py").write_text(MINE)
  monkeypatch.chdir(tmp_path)
  return tmp_path


find = objective_names.find_objective


def test_a_plain_name_is_its_entry():
  for name, entry in registry.OBJECTIVES.items():
    assert find(name) is entry


def test_a_mixture_needs_what_its_members_need():
  entry = find("dpo, sppo * 0.5,sft*0.1")
  assert entry.members == ((1.0, "dpo"), (0.5, "sppo"), (0.1, "sft"))
  assert entry.anchors == ("ref", "prev") and entry.pairwise
  assert not entry.contrast and entry.reduce == "sets"
  assert entry.strategy == "fixed_worst" and not entry.progress
  assert "all" not in entry.strategies and "pool" not in entry.strategies
  assert entry.place.endswith(":mixture_loss")
  assert find("dpo,wpo").terms == ("collision",)
  assert find("dpo,simpo").contrast and find("dpo,simpo").separable
  assert not find("dpo,kto").separable and find("dpo,kto").mismatched
  assert find("ipo,reward_rpo").scores
  assert find("infonca,sft").strategies == ("pool",)
  assert find("sft,mcpo").strategy == "mc"
  assert find("mcpo,compositional").strategies == ("random", "all")
  assert find("dpo,sparse_po").parameters


def test_a_blend_takes_the_progress_of_training():
  entry = find("sft*2 -> dpo")
  assert entry.members == ((2.0, "sft"), (1.0, "dpo")) and entry.progress
  assert entry.place.endswith(":blended_loss")
  assert not entry.contrast and entry.strategy == "fixed_worst"


def test_settings_are_those_of_all_members():
  settings = find("dpo,robust_dpo,alphapo,f_dpo").settings
  assert settings["beta"].default is None  # 0.1 and 2.5
  assert settings["label_smoothing"].default is None  # 0 and 0.1
  # [-10, 10] of one, (0, 1) of the other.
  assert settings["alpha"] == registry.Setting(
      None, 0.0, 1.0, open_low=True, open_high=True)
  assert find("dpo,ipo").settings["beta"].default == 0.1
  assert find("infonca,exo_reward").settings["reward_temperature"].low == 0.0
  # One is of words that the other does not know.
  assert "form" not in find("rso,sppo").settings
  assert find("rso,dpo").settings["form"].default == "sigmoid"


def test_members_keep_their_defaults_unless_set():
  name = "dpo,simpo*0.5"
  dpo, simpo = objective_names.members(name, {})
  assert (dpo.settings["beta"], simpo.settings["beta"]) == (0.1, 2.0)
  assert simpo.weight == 0.5 and simpo.entry.per_token
  dpo, simpo = objective_names.members(
      name, {"beta": 0.7, "label_smoothing": 0.2, "gamma_beta_ratio": None})
  assert dpo.settings == {"beta": 0.7, "label_smoothing": 0.2}
  assert simpo.settings == {"beta": 0.7, "gamma_beta_ratio": 0.5}
  (alone,) = objective_names.members("dpo", {"beta": 0.2})
  assert alone.weight == 1.0 and alone.settings["beta"] == 0.2


@pytest.mark.parametrize("name, slug", [
    ("dop", "config.range"), ("", "config.range"), ("dpo,", "config.range"),
    ("dpo,dop", "config.range"), ("dpo*2", "config.range"),
    ("dpo*0,sft", "config.range"), ("dpo*x,sft", "config.range"),
    ("dpo*-1,sft", "config.range"), ("dpo*inf,sft", "config.range"),
    ("dpo*nan,sft", "config.range"), ("dpo,dpo*2", "config.range"),
    ("sft->", "config.range"), ("sft->dpo->ipo", "config.range"),
    ("sft->dpo,ipo", "config.range"), ("dpo->dpo", "config.range"),
    ("infonca,dpo", "config.conflict"), ("rnce,dpo", "config.conflict"),
    ("mcpo,cd", "config.conflict"), ("my_file:moving,dpo", "config.conflict"),
    ("my_file:learned,sparse_po", "config.conflict"),
    ("my_file:nothing,dpo", "config.range"),
])
def test_what_does_not_go_together_is_refused(folder, name, slug):
  with pytest.raises(errors.ConfigError) as e:
    find(name)
  assert e.value.slug == slug and e.value.where == "objective.name"
  if name == "dop":
    assert "dpo" in e.value.hint


def test_bound_losses_have_their_settings(folder, x64):
  logps, sets = batches.random_batch(0)
  sets = sets._replace(anchors=sets.anchors | {"prev": sets.anchors["ref"]})
  name = "dpo,my_file:counted*0.5,sft*0.1"
  loss = objective_names.bind(
      name, {"scale": 3.0}, include_preferred=True)
  state = objective_names.first_state(name, 7)
  assert state == ((), 7, ())
  losses, aux, state = loss(Features(logps), sets, state)
  assert state == ((), 8, ())
  dpo, _, _ = objective_names.bind("dpo", {})(Features(logps), sets, ())
  sft, _, _ = objective_names.bind("sft", {})(Features(logps), sets, ())
  nll = sft / np.maximum(sets.lengths[:, 0], 1)
  np.testing.assert_allclose(losses[:4], (dpo + 7.5 + 0.1 * nll)[:4])
  assert "rewards/margins" in aux


def test_what_concerns_the_draw_goes_to_those_that_ask():
  loss = objective_names.bind("cd", {"beta": 0.2}, include_preferred=True,
                              corrected=False)
  assert loss.keywords == {"beta": 0.2, "include_preferred": True}
  loss = objective_names.bind("rnce", {}, include_preferred=True,
                              corrected=True)
  assert loss.keywords == {"beta": 0.1, "corrected": True}


def test_a_bound_blend_takes_progress(x64):
  logps, sets = batches.random_batch(1)
  loss = objective_names.bind("sft->dpo", {"beta": 0.2})
  assert loss.func is mixture.blended_loss
  state = objective_names.first_state("sft->dpo", 7)
  losses, _, state = loss(Features(logps), sets, state, progress=1.0)
  want, _, _ = objective_names.bind("dpo", {"beta": 0.2})(
      Features(logps), sets, ())
  np.testing.assert_array_equal(losses, want)
  assert state == ((), ())


def test_files_of_ones_own_are_hashed(folder):
  assert objective_names.source_hashes("dpo,sft") == {}
  before = objective_names.source_hashes(
      "dpo,my_file:counted")
  assert set(before) == {"my_file:counted"}
  (folder / "my_file.py").write_text(MINE + "\n")
  assert objective_names.source_hashes(
      "my_file:counted") != before
