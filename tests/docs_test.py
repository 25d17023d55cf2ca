"""Pages tell the truth: what they name exists, generated ones are current."""

import importlib.util
import pathlib
import re

import pytest

from configs import default
from mcpo_jax import main, settings

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"),
                *(ROOT / "launch").glob("*.md")])
KEYS = settings.flatten(default.get_config().to_dict())
# Of objectives of the user's own, in examples.
OWN_KEYS = {"objective.margin"}


def test_the_page_of_settings_is_that_of_the_default_config():
  spec = importlib.util.spec_from_file_location(
      "docs_configs", ROOT / "docs" / "configs.py")
  configs = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(configs)
  page = configs.render(configs.SOURCE.read_text())
  assert configs.TARGET.read_text() == page, "run: python docs/configs.py"
  shown = re.findall(r"^\| `([\w.]+)` \|", page, re.M)
  for group in ("optimizer", "sft.optimizer", "reward_model.optimizer"):
    shown += [f"{group}.{name.removeprefix('optimizer.')}" for name in shown
              if name.startswith("optimizer.")
              and group != "optimizer"]
  assert sorted(shown) == sorted(KEYS)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)#]+?)(?:#[\w-]*)?\)", page.read_text()):
    if not re.match(r"https?:", target):
      assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_settings_and_verbs_that_a_page_names_exist(page):
  text = page.read_text()
  for key in re.findall(r"--config\.([\w.]+)=", text):
    assert key in KEYS or key in OWN_KEYS or key == "a.b" or (
        key == "group.field"), f"{page.name}: {key}"
  for verb in re.findall(r"python -m mcpo_jax (\w+)", text):
    assert verb in main.VERBS, f"{page.name}: {verb}"
