"""The explorer: rows from a batch, and a page that shows them safely."""

import html.parser
import json
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from mcpo_jax import errors, types
from mcpo_jax.data import packing
from mcpo_jax.evaluation import explorer

CANARY = "</script><script>alert('x')</script><!--<script>&amp; \u2028 é"


def candidate_set(number, scores, policy_step):
  count = len(scores)
  return types.CandidateSet(
      example_id=np.array([number, 0], np.uint32), prompt_id=f"id-{number}",
      prompt=np.array([1, 2], np.int32),
      completions=[np.arange(3 + k, dtype=np.int32) for k in range(count)],
      completion_masks=[np.ones(3 + k, bool) for k in range(count)],
      candidate_ids=np.arange(count, dtype=np.uint32),
      multiplicity=np.arange(1, count + 1, dtype=np.int32),
      scores=np.array(scores, np.float32), preferred=-1,
      policy_step=policy_step)


def rows_of(**changes):
  """Rows of two sets, of 3 and of 2 candidates, in a batch of three rows."""
  sets = [candidate_set(0, [0.25, 1.0, 0.5], 7),
          candidate_set(1, [np.nan, 2.0], 7)]
  order = [[1, 0, 2], [1, 0]]
  meta = packing.make_set_batch(
      sets, np.zeros(2, np.int32), num_slots=3, order=order)
  values = {
      "logps": np.array([[-1, -2, -3], [-4, -5, 0], [0, 0, 0]], np.float32),
      "ref_logps": np.array([[-2, -2, -2], [-1, -1, 0], [0, 0, 0]]),
      "log_weights": np.log([[0, 0.75, 0.25], [0, 1, 0], [1, 1, 1]]),
      "selected": np.array([[1, 1, 2], [1, 0, 0], [0, 0, 0]]),
      "selected_mask": np.array(
          [[True] * 3, [True, False, False], [False] * 3])}
  messages = [{"role": "system", "content": "be short"},
              {"role": "user", "content": "why?"}]
  return explorer.explorer_rows(
      5, sets, order, meta, [f"one {CANARY}", messages],
      [["a", "b", CANARY], ["c", "d"]],
      [["policy", "data", "policy"], ["policy", "policy"]],
      **(values | changes))


@pytest.fixture(autouse=True)
def _quiet_log_of_zero():
  with np.errstate(divide="ignore"):
    yield


def test_rows_hold_the_slots_of_every_set_in_order():
  one, two = rows_of()
  assert (one["step"], one["prompt_id"]) == (5, "id-0")
  each = lambda key: [c[key] for c in one["candidates"]]
  assert each("text") == ["b", "a", CANARY]
  assert each("score") == [1.0, 0.25, 0.5]
  assert each("logp") == [-1.0, -2.0, -3.0]
  assert each("ref_logp") == [-2.0, -2.0, -2.0]
  np.testing.assert_allclose(each("weight"), [0, 0.75, 0.25])
  assert each("drawn") == [0, 2, 1]
  assert each("role") == [1, -1, -1]
  assert each("source") == ["data", "policy", "policy"]
  assert each("policy_step") == [-1, 7, 7]
  assert each("multiplicity") == [2, 1, 3]
  assert each("length") == [4, 3, 5]
  assert two["prompt"] == "system: be short\n\nuser: why?"
  assert [c["score"] for c in two["candidates"]] == [2.0, None]
  assert [c["drawn"] for c in two["candidates"]] == [0, 1]
  assert len(two["candidates"]) == 2


def test_what_is_not_known_is_null():
  one = rows_of(logps=None, ref_logps=None, log_weights=None)[0]
  for candidate in one["candidates"]:
    assert candidate["logp"] is candidate["ref_logp"] is None
    assert candidate["weight"] == 0.0


class Page(html.parser.HTMLParser):
  """Elements, the text of scripts, and what is loaded from elsewhere."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.scripts, self.loads, self.title = [], [], [], ""
    self.inside = None
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.inside = tag
    self.loads += [v for k, v in attrs if k in ("src", "href")]

  def handle_endtag(self, tag):
    self.inside = None

  def handle_data(self, data):
    if self.inside == "script":
      self.scripts.append(data)
    elif self.inside == "title":
      self.title += data


@pytest.fixture
def page(tmp_path):
  path = tmp_path / "candidates.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows_of()))
  explorer.write_explorer(path, tmp_path / "out.html", f"run {CANARY}")
  return tmp_path / "out.html"


def test_the_page_holds_the_rows_and_nothing_of_them_is_markup(page):
  text = page.read_text("utf-8")
  found = Page(text)
  assert found.tags.count("script") == 2 and len(found.scripts) == 2
  assert json.loads(found.scripts[0]) == rows_of()
  assert "alert('x')" not in found.scripts[1]
  assert found.title == f"run {CANARY}"
  assert not found.loads and "http" not in text.replace("http-equiv", "")
  assert "innerHTML" not in text and "default-src 'none'" in text


def test_no_rows_are_a_page_too(tmp_path):
  (tmp_path / "none.jsonl").write_text("")
  explorer.write_explorer(tmp_path / "none.jsonl", tmp_path / "x.html", "none")
  assert json.loads(Page((tmp_path / "x.html").read_text()).scripts[0]) == []


@pytest.mark.parametrize("line, slug", [
    ('{"step": 1', "data.json"),
    ('{"step": 1, "prompt_id": "", "prompt": ""}', "data.field_missing"),
    ('{"step": 1, "prompt_id": "", "prompt": "", "candidates": [{}]}',
     "data.field_missing"),
    ('{"step": NaN, "prompt_id": "", "prompt": "", "candidates": []}',
     "data.non_finite"),
])
def test_what_is_no_row_is_refused_with_its_line(tmp_path, line, slug):
  path = tmp_path / "candidates.jsonl"
  path.write_text(json.dumps(rows_of()[0]) + "\n" + line + "\n")
  with pytest.raises(errors.DataError) as caught:
    explorer.write_explorer(path, tmp_path / "out.html", "")
  assert caught.value.slug == slug and "jsonl:2" in caught.value.where
  assert not (tmp_path / "out.html").exists()


# What the script of the page does, by the script itself.

CHECK = """
const rows = JSON.parse(require("fs").readFileSync(0, "utf-8"));
const score = COLUMNS.findIndex(c => c[0] === "score");
const texts = down => sorted(rows[0].candidates, score, down).map(
  c => c.text.slice(0, 1));
console.log(JSON.stringify([
  select(rows, "", "", "step"), select(rows, "SHORT why", "", "step"),
  select(rows, "alert('x')", "", "step"), select(rows, "data", "5", "step"),
  select(rows, "", "4", "step"), select(rows, "", "", "spread"),
  select(rows, "", "", "weight"), texts(false), texts(true),
  sorted(rows[1].candidates, score, true).map(c => c.score),
  sorted(rows[1].candidates, score, false).map(c => c.score), show(null, 2),
  show(0.125, 2)]));
"""


def test_the_script_filters_and_sorts(page):
  node = shutil.which("node")
  if node is None:
    pytest.skip("needs node")
  script = Page(page.read_text("utf-8")).scripts[1]
  done = subprocess.run(
      [node, "-e", script + CHECK], input=json.dumps(rows_of()),
      capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == [
      [0, 1], [1], [0], [0], [], [0, 1], [1, 0], ["a", "<", "b"],
      ["b", "<", "a"], [2, None], [2, None], "–", "0.13"]


def test_the_page_is_part_of_the_package():
  text = (pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text()
  assert '"**/*.html"' in text
