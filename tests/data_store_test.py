"""The store: keyed by content, whole or not there, the same when reopened."""

import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest

from mcpo_jax import commit, errors, hosts
from mcpo_jax.data import readers, records, tokenizer
from mcpo_jax.data import store as store_lib

ROWS = [
    {"prompt": f"name {i}", "completions": ["one", "two", "one", "three"][:k],
     "scores": [1.0, 0.5, 0.0, i / 9][:k], "extra": i, "prompt_id": f"p{i}",
     "sources": ["a", "b", "c", "d"][:k]}
    for i, k in enumerate([2, 4, 3, 2, 4])]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tok")
  tokenizer.train_tokenizer(
      ["name one two three"] * 2, vocab_size=300, out_dir=folder)
  return tokenizer.load_tokenizer(folder)


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


@pytest.fixture
def path(tmp_path):
  return write(tmp_path / "x.jsonl", ROWS)


def build(tok, tmp_path, *sources, **settings):
  sources = [(s, "auto", 1.0, None) if isinstance(s, str) else s
             for s in sources]
  return store_lib.build_store(
      sources, tok, cache_dir=tmp_path / "cache", **settings)


def same(a, b):
  for x, y in zip(a, b):
    if isinstance(x, list):
      same(x, y)
    else:
      np.testing.assert_array_equal(x, y)


def test_on_a_shared_disk_each_process_hashes_its_share(
    tok, tmp_path, path, monkeypatch):
  build(tok, tmp_path, path)
  folder, = (tmp_path / "cache").iterdir()
  sha256, hashed = commit.file_sha256, []
  monkeypatch.setattr(commit, "file_sha256", lambda file: (
      hashed.append(file) if file.parent == folder else None, sha256(file))[1])
  seen = []
  for i in range(3):
    monkeypatch.setattr(hosts, "_place", hosts.Place(i, 3, None))
    hashed.clear()
    build(tok, tmp_path, path)
    seen.append({file.name for file in hashed})
  assert seen[0] == {*commit.files_of(folder)}  # the first goes ahead
  assert seen[1] and seen[2] and not seen[1] & seen[2]
  assert len(seen[1] | seen[2]) < len(seen[0])
  hosts.set_apart(True)
  try:
    hashed.clear()
    build(tok, tmp_path, path)
  finally:
    hosts.set_apart(False)
  assert {file.name for file in hashed} == seen[0]


def test_sets_hold_what_the_tokenizer_says(tok, tmp_path, path):
  store = build(tok, tmp_path, path)
  assert len(store) == len(ROWS)
  for i, record in enumerate(records.read_records(path)):
    one, encoded = store.candidate_set(i), tok.encode_record(record)
    np.testing.assert_array_equal(one.prompt, encoded.prompt)
    assert one.prompt.dtype == np.int32
    for k, candidate in enumerate(one.candidate_ids):
      np.testing.assert_array_equal(
          one.completions[k], encoded.completions[candidate])
      assert one.completion_masks[k].all()
    assert one.prompt_id == f"p{i}"
    np.testing.assert_array_equal(
        one.example_id, store_lib.example_id(f"p{i}"))
    columns = store.columns(i)
    assert columns["prompt"] == record.prompt and columns["extra"] == i
    assert columns["sources"] == record.sources
    assert store.token_counts[i] == len(one.prompt) + sum(
        map(len, one.completions))


def test_identical_completions_are_merged_with_their_mean(tok, tmp_path, path):
  store = build(tok, tmp_path, path)
  one = store.candidate_set(1)  # one, two, one, three
  assert one.candidate_ids.tolist() == [0, 1, 3]
  assert one.multiplicity.tolist() == [2, 1, 1]
  np.testing.assert_allclose(one.scores, [0.5, 0.5, 1 / 9])
  assert store.report["merged_completions"] == 3
  assert store.report["merged_score_conflicts"] == 3
  assert store.max_candidates == 3


def test_rows_without_contrast_are_kept_and_flagged(tok, tmp_path):
  rows = [ROWS[0], ROWS[3] | {"scores": [1, 1]},
          {"prompt": "x", "completion": "y"},
          {"prompt": "z", "completions": ["a", "b"], "preferred": 1}]
  store = build(tok, tmp_path, write(tmp_path / "x.jsonl", rows))
  assert len(store) == 4
  assert store.contrast_rows().tolist() == [0, 3]
  assert store.report["rows_without_contrast"] == 2
  assert store.candidate_set(3).preferred == 1
  assert np.isnan(store.candidate_set(3).scores).all()


def test_a_store_is_made_once_and_reopened_equal(
    tok, tmp_path, path, monkeypatch):
  first = build(tok, tmp_path, path)
  monkeypatch.setattr(store_lib, "_build", None)  # may not be called again
  again = build(tok, tmp_path, path)
  assert first.key == again.key and first.report == again.report
  for i in range(len(first)):
    same(first.candidate_set(i), again.candidate_set(i))


def test_the_key_follows_content_and_settings(tok, tmp_path, path):
  base = build(tok, tmp_path, path).key
  copy = shutil.copy(path, tmp_path / "other_name.jsonl")
  assert build(tok, tmp_path, str(copy)).key == base
  changed = write(tmp_path / "y.jsonl", [*ROWS[:4], ROWS[4] | {"extra": 9}])
  keys = {base, build(tok, tmp_path, changed).key}
  for settings in ({"max_prompt_length": 99}, {"max_completion_length": 99},
                   {"max_length": 99}, {"prompt_overlength": "left"},
                   {"completion_overlength": "skip"}, {"think": "mask"},
                   {"vocab_size": 999}):
    keys.add(build(tok, tmp_path, path, **settings).key)
  keys.add(build(tok, tmp_path, (path, "auto", 2.0, None)).key)
  assert len(keys) == 10


def test_a_damaged_store_is_made_again(tok, tmp_path, path):
  store = build(tok, tmp_path, path)
  wanted = [store.candidate_set(i) for i in range(len(store))]
  [folder] = (tmp_path / "cache").iterdir()
  for damage in (lambda: (folder / "tokens.bin").write_bytes(b"1234"),
                 lambda: (folder / "manifest.json").unlink(),
                 lambda: (folder / "score.bin").unlink(),
                 lambda: (folder / "score.bin").write_bytes(bytes(len(
                     (folder / "score.bin").read_bytes())))):
    damage()
    again = build(tok, tmp_path, path)
    for i, one in enumerate(wanted):
      same(again.candidate_set(i), one)


def test_a_build_that_dies_leaves_nothing_that_counts(
    tok, tmp_path, path, monkeypatch):
  def dies(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(store_lib, "_report", dies)
    with pytest.raises(KeyboardInterrupt):
      build(tok, tmp_path, path)
  assert not list((tmp_path / "cache").iterdir())
  assert len(build(tok, tmp_path, path)) == len(ROWS)


@pytest.mark.parametrize("change", ["replaced", "cut", "longer", "removed"])
def test_a_file_that_changes_while_it_is_read_makes_no_store(
    tok, tmp_path, path, monkeypatch, change):
  tokenise = store_lib._tokenise
  file = tmp_path / "x.jsonl"

  def first_changes(record, *args):
    if record.prompt_id == "p0":
      if change == "replaced":
        write(tmp_path / "new", ROWS[::-1])
        (tmp_path / "new").replace(file)
      elif change == "cut":  # between two rows: no JSON is damaged
        os.truncate(file, file.read_bytes().index(b"\n") + 1)
      elif change == "longer":
        with open(file, "a") as stream:
          stream.write(json.dumps(ROWS[1] | {"prompt_id": "p9"}) + "\n")
      else:
        file.unlink()
    return tokenise(record, *args)

  monkeypatch.setattr(store_lib, "_tokenise", first_changes)
  with pytest.raises(errors.DataError) as caught:
    build(tok, tmp_path, path)
  assert caught.value.slug == (
      "data.no_files" if change == "removed" else "data.changed")
  assert "x.jsonl" in caught.value.where
  assert not list((tmp_path / "cache").iterdir())


def test_a_store_that_is_open_needs_neither_its_files_nor_its_folder(
    tok, tmp_path, path):
  store = build(tok, tmp_path, path)
  before = [store.candidate_set(i) for i in range(len(store))]
  (tmp_path / "x.jsonl").write_text("{")
  shutil.rmtree(tmp_path / "cache")
  for i, one in enumerate(before):
    same(one, store.candidate_set(i))
    assert store.columns(i)["extra"] == i


def test_weights_repeat_and_subsample_the_same_rows_every_time(tok, tmp_path):
  paths = [write(tmp_path / f"{name}.jsonl", [
      {"prompt": f"{name} {i}", "chosen": "a", "rejected": "b"}
      for i in range(10)]) for name in "xy"]
  sources = [(paths[0], "pairs", 2.5, None), (paths[1], "auto", 0.3, None)]
  store = build(tok, tmp_path, *sources)
  prompts = [store.columns(i)["prompt"] for i in range(len(store))]
  assert len(store) == 25 + 3 and store.report["rows_used"] == 20
  counts = sorted(prompts.count(f"x {i}") for i in range(10))
  assert counts == [2] * 5 + [3] * 5
  shutil.rmtree(tmp_path / "cache")
  again = build(tok, tmp_path, *sources)
  assert prompts == [again.columns(i)["prompt"] for i in range(len(again))]
  with pytest.raises(errors.ConfigError):
    build(tok, tmp_path, (paths[0], "auto", 0.0, None))


@pytest.mark.parametrize("policy, prompt", [
    ("left", [0, -3, -2, -1]), ("right", [0, 1, 2, 3])])
def test_long_prompts_are_cut_where_asked(tok, tmp_path, path, policy, prompt):
  whole = build(tok, tmp_path, path).candidate_set(0).prompt
  store = build(tok, tmp_path, path, max_prompt_length=4,
                prompt_overlength=policy)
  assert store.candidate_set(0).prompt.tolist() == whole[prompt].tolist()
  assert whole[0] == tok.bos_id
  assert store.report["truncated_prompts"] == len(ROWS)


def test_long_rows_are_errors_or_skipped_and_counted(tok, tmp_path):
  rows = [*ROWS, ROWS[0] | {"prompt": "name " * 40, "prompt_id": "long"}]
  path = write(tmp_path / "x.jsonl", rows)
  with pytest.raises(errors.DataError) as e:
    build(tok, tmp_path, path, max_prompt_length=20)
  assert e.value.slug == "data.prompt_too_long" and "x.jsonl:6" in e.value.where
  store = build(tok, tmp_path, path, max_prompt_length=20,
                prompt_overlength="skip")
  report = store.report
  assert len(store) == 5 and report["rows_skipped"] == 1
  assert report["rows_in"] == 6 == report["rows_used"] + report["rows_skipped"]


def test_long_completions_lose_their_end_and_are_flagged(tok, tmp_path):
  path = write(tmp_path / "x.jsonl", [
      {"prompt": "a", "chosen": "one " * 20, "rejected": "two"}])
  store = build(tok, tmp_path, path, max_completion_length=5)
  one = store.candidate_set(0)
  assert store.truncated(0).tolist() == [True, False]
  assert len(one.completions[0]) == 5 and tok.end_id not in one.completions[0]
  assert one.completions[1][-1] == tok.end_id
  with pytest.raises(errors.DataError) as e:
    build(tok, tmp_path, path, max_completion_length=5,
          completion_overlength="error")
  assert e.value.slug == "data.completion_too_long"
  skipped = build(tok, tmp_path, path, max_completion_length=5,
                  completion_overlength="skip")
  assert skipped.candidate_set(0).candidate_ids.tolist() == [1]
  assert skipped.report["rows_without_contrast"] == 1


def test_masked_reasoning_is_kept_unscored(tmp_path, tok):
  path = write(tmp_path / "x.jsonl", [
      {"prompt": "a", "chosen": "<think>hm</think> one", "rejected": "two"}])
  one = build(tok, tmp_path, path, think="mask").candidate_set(0)
  scored = tok.decode(one.completions[0][one.completion_masks[0]])
  assert scored.strip() == "one"
  assert "hm" in tok.decode(one.completions[0])


def test_tokenised_rows_pass_through(tok, tmp_path):
  path = write(tmp_path / "x.jsonl", [{
      "prompt_ids": [5, 6, 7], "completion_ids": [[8, 9], [10]],
      "completion_masks": [[0, 1], [1]], "scores": [0, 1]}])
  one = build(tok, tmp_path, path).candidate_set(0)
  assert one.prompt.tolist() == [5, 6, 7]
  assert [c.tolist() for c in one.completions] == [[8, 9], [10]]
  assert [m.tolist() for m in one.completion_masks] == [[False, True], [True]]


def test_repeated_rows_without_ids_are_kept_and_counted(tok, tmp_path):
  row = {"prompt": "a", "chosen": "b", "rejected": "c"}
  path = write(tmp_path / "x.jsonl", [row, row | {"rejected": "d"}, row])
  store = build(tok, tmp_path, path)
  assert len(store) == 3
  assert store.report["duplicate_rows"] == 1
  assert store.report["distinct_prompts"] == 1
  assert len(np.unique(store.prompt_hashes)) == 1


def test_references_of_one_prompt_share_its_id(tok, tmp_path):
  path = write(tmp_path / "x.jsonl", [
      {"prompt": "a", "completion": c, "prompt_id": "p"} for c in "xyz"])
  store = build(tok, tmp_path, path)
  assert len(store) == 3 and len(np.unique(store.example_ids, axis=0)) == 1


def test_repeated_ids_are_quarantined_by_place(tok, tmp_path):
  path = write(tmp_path / "x.jsonl", [*ROWS, ROWS[2]])
  listed = tmp_path / "q.jsonl"
  store = build(tok, tmp_path, path, quarantine_path=listed,
                max_quarantined_share=0.5)
  assert len(store) == 5 and store.report["rows_quarantined"] == 1
  assert json.loads(listed.read_text())["line"] == "6"
  assert json.loads(listed.read_text())["slug"] == "data.duplicate_id"


def test_memory_does_not_grow_with_the_rows(tok, tmp_path):
  peaks = []
  for count in (50, 5000):
    path = tmp_path / f"{count}.jsonl"
    with open(path, "w") as file:
      for i in range(count):
        file.write(json.dumps({
            "prompt": f"{i} ", "chosen": "one two " * 40,
            "rejected": "three " * 40}) + "\n")
    tracemalloc.start()
    build(tok, tmp_path, str(path))
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  # Buffers that hash files come and go; the text alone is 2 MB more.
  assert peaks[1] < peaks[0] + 1_200_000


def test_real_sets_keep_their_counts(tok, tmp_path, shared):
  store = build(tok, tmp_path, str(
      shared / "data/kwise/pandalm.train.jsonl.gz"))
  assert len(store) == 91 and store.report["completions"] == 387
  assert len(store.contrast_rows()) == 91 - 4
  assert store.report["candidates_max"] == 5


def test_training_texts_are_prompts_and_completions(tmp_path):
  path = write(tmp_path / "x.jsonl", [
      {"messages": [{"role": "user", "content": "q"},
                    {"role": "assistant", "content": "r"}]},
      {"prompt": "a", "chosen": "b", "rejected": "c"}])
  assert list(store_lib.training_texts(path)) == ["q", "r", "a", "b", "c"]


def test_hash_ids_are_stable():
  assert readers.hash_id("a") == readers.hash_id("a") != readers.hash_id("b")
  assert store_lib.example_id("p").dtype == np.uint32
