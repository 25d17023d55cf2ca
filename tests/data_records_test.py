"""Readers on real rows of every layout, and the files they come from."""

import gzip
import json
import subprocess
import sys
import types

import pytest

from mcpo_jax import errors
from mcpo_jax.data import files, readers, records

USER = {"role": "user", "content": "Hi?"}
GOOD = {"role": "assistant", "content": "Good."}
POOR = {"role": "assistant", "content": "Poor."}


def rows(path, **kwargs):
  return list(records.read_records(str(path), **kwargs))


def write(path, *lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def read(tmp_path, row, **kwargs):
  [record] = rows(write(tmp_path / "x.jsonl", row), **kwargs)
  return record


def test_native_scores_are_higher_better(shared):
  first = rows(shared / "data/kwise/pandalm.train.jsonl.gz")[0]
  assert isinstance(first.prompt, list) and first.prompt[-1]["role"] == "user"
  assert len(first.completions) == len(first.scores) == len(first.sources)
  assert first.prompt_id == "pandalm-0841598a05ff"
  assert first.where.endswith("pandalm.train.jsonl.gz:1")


def test_native_ranks_are_one_is_best(tmp_path):
  record = read(tmp_path, {"prompt": "a", "completions": ["b", "c", "d"],
                           "ranks": [2, 1, 3], "note": 5,
                           "ref_logps": [-1, -2, -3]})
  assert record.scores == [-2, -1, -3]
  assert record.columns["note"] == 5
  assert record.columns["ref_logps"] == [-1, -2, -3]


def test_native_preferred_is_an_index(tmp_path):
  record = read(
      tmp_path, {"prompt": "a", "completions": ["b", "c"], "preferred": 1})
  assert record.preferred == 1 and record.scores is None


def test_nectar_ranks_and_turns(shared):
  path = shared / "data/input_formats/nectar_layout.jsonl"
  raw = [json.loads(line) for line in path.read_text().split("\n") if line]
  found = rows(path)
  assert len(found) == 6 and sum(len(r.completions) for r in found) == 32
  for row, record in zip(raw, found):
    best = min(row["answers"], key=lambda a: a["rank"])
    top = max(range(len(record.scores)), key=record.scores.__getitem__)
    assert record.completions[top] == best["answer"]
    assert record.sources[top] == best["model"]
    assert [m["role"] for m in record.prompt] == (
        ["user", "assistant"] * 9)[: len(record.prompt)]
    assert len(record.prompt) == row["prompt"].count("\n\nHuman:") * 2 - 1
    assert record.columns["turns"] == row["turns"]
  assert rows(path, format="nectar") == found


def test_ultrafeedback_uses_ratings_not_the_overall_score(shared, tmp_path):
  path = shared / "data/input_formats/ultrafeedback_layout.jsonl"
  found = rows(path)
  assert found[0].scores == [5.0, 3.0, 1.0, 1.0]
  assert found[0].prompt[0]["content"].startswith("What happens to you")
  row = json.loads(path.read_text().split("\n")[0])
  row["completions"][2]["overall_score"] = 10  # the known slip: 1 became 10
  assert read(tmp_path, row).scores == [5.0, 3.0, 1.0, 1.0]


def test_ultrafeedback_binarised_takes_the_shared_turn_off(tmp_path):
  record = read(tmp_path, {
      "prompt": "Hi?", "prompt_id": "u", "chosen": [USER, GOOD],
      "rejected": [USER, POOR], "messages": [USER, GOOD],
      "score_chosen": 8.5, "score_rejected": 6.0})
  assert record.prompt == [USER]
  assert record.completions == ["Good.", "Poor."]
  assert record.scores == [8.5, 6.0]


@pytest.mark.parametrize("row", [
    {"prompt": "Hi?", "chosen": "Good.", "rejected": "Poor."},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]},
    {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, POOR]},
    {"chosen": [USER, GOOD], "rejected": [USER, POOR]},
    {"chosen": "\n\nHuman: Hi?\n\nAssistant: Good.",
     "rejected": "\n\nHuman: Hi?\n\nAssistant: Poor."},
])
def test_pairs_in_every_shape_mean_the_same(tmp_path, row):
  record = read(tmp_path, row)
  assert record.completions == ["Good.", "Poor."]
  assert record.scores == [1.0, 0.0]
  assert record.prompt in ("Hi?", [USER])


def test_a_pair_that_diverges_early_keeps_its_turns(tmp_path):
  other = {"role": "user", "content": "And?"}
  record = read(tmp_path, {"chosen": [USER, GOOD, other, GOOD],
                           "rejected": [USER, POOR, other, POOR]})
  assert record.prompt == [USER]
  assert record.completions == [[GOOD, other, GOOD], [POOR, other, POOR]]


def test_a_rejected_completion_with_the_higher_score_is_refused(tmp_path):
  with pytest.raises(errors.DataError) as e:
    read(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c",
                    "score_chosen": 1, "score_rejected": 2})
  assert e.value.slug == "data.score_contradiction"


def test_hh_transcripts(shared):
  path = shared / "data/input_formats/hh_rlhf_raw.jsonl"
  raw = [json.loads(line) for line in path.read_text().split("\n") if line]
  found = rows(path)
  assert len(found) == 20
  for row, record in zip(raw, found):
    assert record.scores == [1.0, 0.0]
    assert record.prompt[-1]["role"] == "user"
    for side, completion in zip(("chosen", "rejected"), record.completions):
      if isinstance(completion, str):
        assert row[side].rstrip().endswith(completion)
        text = "".join(
            f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: "
            f"{m['content']}" for m in record.prompt)
        assert row[side].replace(" ", "").startswith(text.replace(" ", ""))


def test_generated_responses_and_nemo(tmp_path):
  one = read(tmp_path, {
      "prompt": "a", "all_generated_responses": ["b", "c"],
      "all_rm_scores": [0.1, 0.2], "chosen": [GOOD], "rejected": [POOR]})
  assert (one.completions, one.scores) == (["b", "c"], [0.1, 0.2])
  two = read(tmp_path, {"context": [USER], "completions": [
      {"rank": 1, "completion": [POOR]}, {"rank": 0, "completion": [GOOD]}]})
  assert two.completions == ["Poor.", "Good."]
  assert two.scores == [-1.0, 0.0]


def test_unpaired_and_sft(tmp_path, shared):
  bad = read(tmp_path, {"prompt": "a", "completion": "b", "label": False})
  assert (bad.completions, bad.scores, bad.preferred) == (["b"], [0.0], None)
  talk = read(tmp_path, {"messages": [USER, GOOD, USER, POOR]})
  assert talk.prompt == [USER, GOOD, USER]
  assert (talk.completions, talk.preferred) == (["Poor."], 0)
  real = rows(shared / "data/sft/e2e_references.train.jsonl.gz")
  assert len(real) == 7434 and real[0].columns == {"score": 1.0}


def test_rows_without_an_id_are_named_by_their_prompt(tmp_path):
  found = rows(write(
      tmp_path / "x.jsonl",
      {"prompt": "a", "chosen": "b", "rejected": "c"},
      {"prompt": "a", "chosen": "d", "rejected": "c"},
      {"prompt": "b", "chosen": "b", "rejected": "c"}))
  ids = [r.prompt_id for r in found]
  assert ids[0] == ids[1] != ids[2]


def test_a_format_that_is_named_is_not_guessed(tmp_path):
  path = write(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"})
  assert rows(path, format="sft")
  with pytest.raises(errors.DataError):
    rows(path, format="pairs")
  with pytest.raises(errors.ConfigError):
    rows(path, format="pear")


@pytest.mark.parametrize("name", readers.READERS)
def test_every_reader_says_which_way_its_ranks_go(name):
  doc = readers.READERS[name].__doc__
  assert "Rank direction:" in " ".join(doc.split())


# Files.


def test_lines_are_split_on_line_feeds_only(tmp_path):
  text = "a\u2028b\u0085c\x0b\x0cd"
  row = {"prompt": text, "completion": "x"}
  path = tmp_path / "x.jsonl"
  path.write_text(json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(row))
  assert [r.prompt for r in rows(path)] == [text, text]


def test_every_container_gives_the_same_records(tmp_path):
  pa = pytest.importorskip("pyarrow")
  import datasets
  import pyarrow.parquet as pq

  data = [{"prompt": [USER], "completions": ["b", "c"],
           "scores": [float(i), 0.5]} for i in range(7)]
  plain = write(tmp_path / "x.jsonl", *data)
  packed = tmp_path / "y.jsonl.gz"
  packed.write_bytes(gzip.compress(plain.read_bytes()))
  zst = tmp_path / "z.jsonl.zst"
  with pa.CompressedOutputStream(str(zst), "zstd") as stream:
    stream.write(plain.read_bytes())
  pq.write_table(pa.Table.from_pylist(data), tmp_path / "x.parquet",
                 row_group_size=3)
  datasets.Dataset.from_list(data).save_to_disk(str(tmp_path / "saved"))
  wanted = [r[:6] for r in rows(plain)]
  for path in (packed, zst, tmp_path / "x.parquet", tmp_path / "saved"):
    assert [r[:6] for r in rows(path)] == wanted, path
  assert rows(tmp_path / "x.parquet")[3].where.endswith("x.parquet:1/0")


def test_a_pattern_reads_its_files_in_order(tmp_path):
  for name in "ba":
    write(tmp_path / f"{name}.jsonl", {"prompt": name, "completion": "x"})
  assert [r.prompt for r in rows(tmp_path / "*.jsonl")] == ["a", "b"]


def test_the_embedded_sets_are_records():
  for split in ("train", "eval", "sft"):
    first = next(records.read_records(f"embedded:quickstart/{split}"))
    assert isinstance(first, records.Record)
  with pytest.raises(errors.DataError):
    rows("embedded:quickstart/none")


def test_reading_imports_neither_jax_nor_datasets():
  code = ("import sys; from mcpo_jax.data import audit, batches, packing, "
          "records, store, tokenizer; "
          "assert not {'jax', 'datasets', 'transformers'} & set(sys.modules)")
  subprocess.run([sys.executable, "-c", code], check=True)


# The hub: a fake stands in for it.


@pytest.fixture
def hub(monkeypatch):
  """Lets `dataset_info` answer; returns what to set."""
  import huggingface_hub

  answer = types.SimpleNamespace(error=None)

  def dataset_info(self, name, revision=None, timeout=None):
    if answer.error:
      raise answer.error
    return types.SimpleNamespace(sha="c0ffee")

  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
  return answer


def test_a_hub_name_is_loaded_at_its_commit(hub, monkeypatch):
  import datasets

  def load_dataset(name, split, revision):
    assert (name, split, revision) == ("owner/set", "train_prefs", "c0ffee")
    return datasets.Dataset.from_list(
        [{"prompt": "a", "chosen": "b", "rejected": "c"}])

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  [record] = rows("owner/set:train_prefs", revision="main")
  assert record.completions == ["b", "c"]
  assert record.where == "owner/set:train_prefs:0"


@pytest.mark.parametrize("kind, status, slug", [
    ("GatedRepoError", 403, "data.hub_gated"),
    ("RepositoryNotFoundError", 404, "data.hub_missing"),
    ("RepositoryNotFoundError", 401, "data.hub_unauthorised"),
    ("RevisionNotFoundError", 404, "data.hub_missing"),
    (None, 0, "data.hub"),
])
def test_what_the_hub_refuses_is_named_with_its_page(hub, kind, status, slug):
  from huggingface_hub import errors as hub_errors

  hub.error = ConnectionError("no network")
  if kind:
    cls = getattr(hub_errors, kind)
    hub.error = cls.__new__(cls)  # its signature needs a whole HTTP response
    hub.error.response = types.SimpleNamespace(status_code=status)
  with pytest.raises(errors.DataError) as e:
    rows("owner/set")
  assert e.value.slug == slug
  assert kind is None or "huggingface.co/datasets/owner/set" in e.value.hint


def test_a_hub_name_offline_is_a_clear_error():
  with pytest.raises(errors.DataError) as e:
    rows("owner/set-that-was-never-fetched")
  assert e.value.slug == "data.hub"
  assert "HF_HUB_OFFLINE" in e.value.hint


def test_a_missing_local_file_is_not_taken_for_a_hub_name():
  assert not files.is_hub_name("data/train.jsonl")
  assert not files.is_hub_name("a/b/c")
  assert files.is_hub_name("berkeley-nest/Nectar")


def test_a_store_of_a_hub_set_is_keyed_by_its_commit(
    hub, monkeypatch, tmp_path):
  import datasets

  from mcpo_jax.data import store, tokenizer

  monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: (
      datasets.Dataset.from_list(
          [{"prompt": "a", "chosen": "b", "rejected": "c"}])))
  tok = tokenizer.load_tokenizer(tokenizer.train_tokenizer(
      ["a"], vocab_size=300, out_dir=tmp_path / "tok"))
  built = store.build_store(
      [("owner/set", "auto", 1.0, "main")], tok, cache_dir=tmp_path / "cache")
  assert built.report["revisions"] == {"owner/set": "c0ffee"}
