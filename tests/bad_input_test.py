"""The catalogue of bad inputs: one table, one test per row.

A row is (id, make, class, slug, where, exit code). `make(folder)` writes its
input under `folder` and returns a function without arguments that uses it: the
test calls that function and looks at the refusal. A row whose class is None is
accepted: what the function returns must then be true.

Nothing is lost: no row may change a file that was there, or leave one behind.
To add rows, append to TABLE; `where` must occur in the error's `where`.
"""

import contextlib
import errno
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import unittest
import unittest.mock
from typing import Any

import bad_checkpoints
import bad_configs
import jax
import models_folders
import numpy as np
import pytest
from bad_configs import Case, Use, refused, resolved

from mcpo_jax import commit, errors, sharding
from mcpo_jax.data import batches, files, records, tokenizer
from mcpo_jax.data import store as store_lib
from mcpo_jax.generation import server
from mcpo_jax.models import config as config_lib
from mcpo_jax.models import decoder
from mcpo_jax.training import loop, reference, setup

# Data records.

PAIR = {"prompt": "a b", "chosen": "c", "rejected": "d"}
KWISE = {"prompt": "a b", "completions": ["c", "d", "e"],
         "scores": [0.5, 1, 0]}
USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant",
                                               "content": "b"}


@pytest.fixture(scope="session", autouse=True)
def _tiny(tmp_path_factory):
  """Trains the tokenizer that `_tokenizer` loads."""
  folder = tmp_path_factory.mktemp("tiny")
  tokenizer.train_tokenizer(["a b c d e"], vocab_size=300, out_dir=folder)
  _TINY.append(tokenizer.load_tokenizer(folder))


_TINY: list[tokenizer.Tokenizer] = []


def _write(path: pathlib.Path, content: str | bytes) -> str:
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  return str(path)


def _store(folder: pathlib.Path, *paths: str, **settings: Any) -> Any:
  sources = [(p, "auto", 1.0, None) for p in paths]
  return store_lib.build_store(
      sources, _TINY[0], cache_dir=folder.parent / "cache", **settings)


def _read(*lines: Any, name: str = "x.jsonl", **settings: Any):
  """A row that writes lines (text, bytes or objects) and reads them."""

  def make(folder: pathlib.Path) -> Use:
    raw = b"\n".join(
        line if isinstance(line, bytes) else line.encode() if isinstance(
            line, str) else json.dumps(line).encode() for line in lines)
    path = _write(folder / name, raw)
    return lambda: _store(folder, path, **settings)

  return make


def _row(base: dict[str, Any], **changes: Any):
  """A row whose second line is `base` with changes; ... drops a field."""
  row = {k: v for k, v in (base | changes).items() if v is not ...}
  return _read(PAIR if "chosen" in base else KWISE | {"prompt": "z"}, row)


def _accepted(lines, check, **settings):
  """An input that must be accepted and reported: check(store)."""

  def make(folder):
    use = _read(*lines, **settings)(folder)
    return lambda: check(use())

  return make


def _report(**wanted: int):
  return lambda store: {k: store.report[k] for k in wanted} == wanted


def _data(case_id, make, slug, where="x.jsonl:2"):
  return Case(case_id, make, errors.DataError, slug, where, 3)


def _ok(case_id, lines, check, **settings):
  return Case(case_id, _accepted(lines, check, **settings), None, None, "", 0)


def _too_long(folder):
  path = folder / "x.jsonl"
  with open(path, "wb") as file:
    file.write(b'{"prompt": "')
    for _ in range(files.MAX_LINE_BYTES // 2**20 + 1):
      file.write(b"a" * 2**20)
    file.write(b'"}\n')
  return lambda: list(records.read_records(str(path)))


def _parquet(change=lambda data: data, **columns):
  def make(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns_ = columns or {k: [v] * 50 for k, v in PAIR.items()}
    path = folder / "x.parquet"
    pq.write_table(pa.table(columns_), path, write_page_checksum=True)
    path.write_bytes(change(path.read_bytes()))
    return lambda: _store(folder, str(path))

  return make


def _flip(data: bytes) -> bytes:
  return data[:12] + bytes([data[12] ^ 0xFF]) + data[13:]


def _extension(folder):
  import pyarrow as pa
  import pyarrow.parquet as pq

  path = folder / "x.parquet"
  column = pa.ExtensionArray.from_storage(
      pa.uuid(), pa.array([b"0" * 16], pa.binary(16)))
  pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"],
                           "extra": column}), path)
  return lambda: _store(folder, str(path))


def _broken_set(folder):
  _write(folder / "state.json", "{}")
  return lambda: _store(folder, str(folder))


def _binary_set(folder):
  import datasets

  datasets.Dataset.from_list([PAIR | {"extra": b"\x80\x04."}]).save_to_disk(
      str(folder / "set"))
  return lambda: _store(folder, str(folder / "set"))


def _two_files(first, second):
  def make(folder):
    _write(folder / "x1.jsonl", json.dumps(first))
    _write(folder / "x2.jsonl", json.dumps(second))
    return lambda: _store(folder, str(folder / "*.jsonl"))

  return make


def _bytes(name, content):
  def make(folder):
    path = _write(folder / name, content)
    return lambda: _store(folder, path)

  return make


def _listed_twice(folder):
  path = _write(folder / "x.jsonl", json.dumps(PAIR))
  return lambda: _store(folder, path, str(folder / "*.jsonl"))


def _masked(**changes):
  row = {"prompt_ids": [3, 4], "completion_ids": [[5, 6], [7]],
         "scores": [1, 0]} | changes
  return _read(PAIR, row)


# Configs and the command line: what needs JAX, beside bad_configs.py.

_held = []  # locks and ports of a run that is still at work


def _claimed(*overrides: str, release: bool, **changes: Any):
  """A workdir that a run has, or had; changes to its config.json."""
  def make(folder):
    config, workdir = resolved(folder), folder / "run"
    setup.claim(config, workdir)
    setup.store_config(config, workdir)
    file = commit._locks.pop(workdir.resolve())
    file.close() if release else _held.append(file)
    path = workdir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return lambda: setup.claim(resolved(folder, *overrides), workdir)

  return make


def _three_streams_on_eight_devices(folder):
  """Refused twice: the first refusal does not claim the workdir's config."""
  workdir = folder.parent / "run"
  with contextlib.suppress(errors.ConfigError):
    setup.open_run(resolved(folder, "data.num_streams=3"), workdir)
  commit._locks.clear()
  return lambda: setup.open_run(
      resolved(folder, "data.num_streams=3", "seed=1"), workdir)


def _odd_vocab_on_eight_devices(folder):
  config = config_lib.from_hf({
      "model_type": "llama", "vocab_size": 41, "hidden_size": 16,
      "intermediate_size": 24, "num_hidden_layers": 3,
      "num_attention_heads": 2, "num_key_value_heads": 2,
      "bos_token_id": 0, "eos_token_id": 1})
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=8)
  return lambda: sharding.infer_shardings(
      decoder.param_shapes(config, dtype="float32"), decoder.PARAM_RULES, mesh)


def _pad_is_eos(folder):
  there = folder.parent / "tokenizer"
  shutil.copytree(_TINY[0].hf.name_or_path, there)
  path = there / "tokenizer_config.json"
  path.write_text(json.dumps(
      json.loads(path.read_text()) | {"pad_token": "<|eos|>"}))
  same = tokenizer.load_tokenizer(there)
  data = _write(folder / "x.jsonl", json.dumps(PAIR))

  def use():
    store = store_lib.build_store(
        [(data, "auto", 1.0, None)], same, cache_dir=folder.parent / "cache")
    return same.pad_id == same.eos_id and all(
        c[-1] == same.end_id for c in store.candidate_set(0).completions)

  return use


def _data_changed(folder):
  """A run resumes, its data have got one more row."""
  row = json.dumps(PAIR)
  path = _write(folder / "x.jsonl", row)
  cache = folder.parent / "other"
  build = lambda: store_lib.build_store(
      [(path, "auto", 1.0, None)], _TINY[0], cache_dir=cache)
  saved = {"data": build().key}
  _write(folder / "x.jsonl", f"{row}\n{row.replace('a b', 'z')}")
  return lambda: loop.check_same_run(saved, {"data": build().key}, folder)


def _ref_cache(**changes: np.ndarray):
  """A committed shard of log-probs of two rows, with other arrays in it."""
  def make(folder):
    arrays = {"token_logps": np.array([-1, -2, -3], "f4"),
              "sums": np.array([-1, -5], "f4"),
              "starts": np.array([[0, 0], [1, 1], [2, 3]])} | changes

    def write(shard):
      for name, array in arrays.items():
        np.save(shard / f"{name}.npy", array)

    commit.write_folder(folder / "00000000", write, {})
    return lambda: reference.ReferenceCache(folder, 2)

  return make


def _bos_from_both(folder):
  """The template sets BOS, and so does the tokenizer's own post-processor."""
  there = folder.parent / "tokenizer"
  shutil.copytree(_TINY[0].hf.name_or_path, there)
  path = there / "tokenizer.json"
  bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
  sequence = {"Sequence": {"id": "A", "type_id": 0}}
  path.write_text(json.dumps(json.loads(path.read_text()) | {
      "post_processor": {
          "type": "TemplateProcessing", "single": [bos, sequence],
          "pair": [bos, sequence], "special_tokens": {"<|bos|>": {
              "id": "<|bos|>", "ids": [_TINY[0].bos_id],
              "tokens": ["<|bos|>"]}}}}))
  both = tokenizer.load_tokenizer(there)
  return lambda: both.adds_bos and (
      both.encode_prompt("a").tolist().count(both.bos_id) == 1)


def _port_in_use(folder):
  first = server.bind("127.0.0.1", 0)
  first.listen()
  _held.append(first)
  return lambda: server.bind("127.0.0.1", first.getsockname()[1])


def _no_device(folder):
  def use():
    with unittest.mock.patch.object(jax, "devices", side_effect=RuntimeError(
        "Unknown backend cuda. Available: cpu")):
      setup.check_devices()

  return use


# Table G, what a server is asked for, is in generation_server_test.py.
MACHINERY = [
    refused("C5", _three_streams_on_eight_devices, "config.divisible",
            "data.num_streams"),
    refused("C5 tokens", lambda folder: lambda: setup.open_run(
        resolved(folder, "mesh.context=8", "data.stream_length=576"),
        folder.parent / "run"), "config.divisible", "data.stream_length"),
    refused("C6 devices", lambda folder: lambda: sharding.make_mesh(
        data=3, fsdp=1, tensor=-1), "config.mesh", "mesh"),
    refused("C6 vocab", _odd_vocab_on_eight_devices, "config.divisible",
            "lm_head/kernel"),
    _data("D32", _data_changed, "data.changed_since_checkpoint", ""),
    _data("D34 nan", _ref_cache(sums=np.array([-1, np.nan], "f4")),
          "data.ref_cache", "00000000"),
    _data("D34 rows", _ref_cache(starts=np.array([[0, 0], [2, 3]])),
          "data.ref_cache", "00000000"),
    _data("D34 tokens", _ref_cache(token_logps=np.array([-1, -2], "f4")),
          "data.ref_cache", "00000000"),
    Case("K17 objects", _ref_cache(sums=np.array([{}, {}])),
         errors.CheckpointError, "ckpt.unsafe_format", "00000000", 5),
    _data("D35 offline", lambda folder: lambda: _store(
        folder, "owner/set-that-was-never-fetched"), "data.hub", "owner/set"),
    Case("H13", _bos_from_both, None, None, "", 0),
    Case("C10", _pad_is_eos, None, None, "", 0),
    refused("C12", _claimed("objective.beta=0.7", release=True),
            "config.other_run", "config.json"),
    refused("C15 resume", _claimed(release=True, version=99),
            "config.version", "config.json"),
    _data("L3 data", lambda folder: lambda: setup.check_sources(resolved(
        folder, f"data.path={folder}/kwsie.jsonl*2")), "data.no_files",
          "kwsie.jsonl"),
    Case("L7 port", _port_in_use, errors.ResourceError, "serve.port",
         "serve.port", 6),
    Case("L9", _no_device, errors.ResourceError, "device", "", 6),
    Case("L12", _claimed(release=False), errors.CheckpointError,
         "ckpt.locked", "run", 5),
]

_LINE = json.dumps(PAIR)
_GZIP = gzip.compress(_LINE.encode() * 50)

TABLE = [
    _data("D1 cut", _read(PAIR, _LINE[:20]), "data.json", "x.jsonl:2:"),
    _ok("D1 whole", [PAIR, PAIR | {"prompt": "z"}], _report(rows=2)),
    _ok("D2", ["\ufeff" + _LINE + "\r", "", "  ", PAIR | {"prompt": "z"}],
        _report(rows=2, blank_lines=2, bom=1, crlf_lines=1)),
    _data("D3", _read(PAIR, b'{"prompt": "\xff"}'), "data.encoding"),
    _data("D4", _read(PAIR, _LINE.replace("a b", "\\ud800")),
          "data.surrogate", "x.jsonl:2, prompt"),
    _data("D5 nan", _row(KWISE, scores=[float("nan"), 1, 0]),
          "data.non_finite", "x.jsonl:2, scores[0]"),
    _data("D5 infinity", _row(KWISE, scores=[1, float("inf"), 0]),
          "data.non_finite", "scores[1]"),
    _data("D6", _read(PAIR, _LINE[:-1] + ', "prompt": "x"}'),
          "data.duplicate_key", "x.jsonl:2, prompt"),
    _data("D7 deep", _read(PAIR, '{"a":' + "[" * 200_000), "data.too_deep"),
    _data("D7 long", _too_long, "data.line_too_long", "x.jsonl:1"),
    _data("D8 list", _read(PAIR, "[1]"), "data.not_object"),
    _data("D8 array", _read(f"[{_LINE}]"), "data.not_object", "x.jsonl:1"),
    _data("D9 prompt", _row(PAIR, prompt=...), "data.field_missing",
          "x.jsonl:2, prompt"),
    _data("D9 rejected", _row(PAIR, rejected=..., rejcted="d"),
          "data.field_missing", "rejected"),
    _data("D9 scores", _row(KWISE, scores=...), "data.field_missing",
          "scores"),
    _data("D9 unknown", _read(PAIR, {"promt": "a"}), "data.field_missing"),
    _data("D10 null", _row(PAIR, chosen=None), "data.field_type", "chosen"),
    _data("D10 number", _row(PAIR, prompt=3), "data.field_type", "prompt"),
    _data("D10 object", _row(KWISE, completions=["a", {}, "b"]),
          "data.field_type", "completions[1]"),
    _data("D10 score", _row(KWISE, scores=[True, "1", 0]), "data.field_type",
          "scores[0]"),
    _data("D11 prompt", _row(PAIR, prompt=" \n"), "data.empty", "prompt"),
    _data("D11 completion", _row(KWISE, completions=["a", "", "b"]),
          "data.empty", "completions[1]"),
    _ok("D12 equal", [PAIR, PAIR | {"prompt": "z", "rejected": "c"}],
        lambda s: s.report["rows_without_contrast"] == 1 and (
            s.report["merged_score_conflicts"] == 1
            and s.contrast_rows().tolist() == [0])),
    _ok("D12 identical", [KWISE | {"completions": ["c"] * 3}],
        lambda s: s.candidate_set(0).multiplicity.tolist() == [3]
        and not len(s.contrast_rows())),
    _ok("D13", [{"prompt": "a", "completions": ["b", "c", "b"],
                 "preferred": 0}],
        lambda s: s.report["chosen_in_pool"] == 1 and (
            s.candidate_set(0).multiplicity.tolist() == [2, 1])),
    _data("D14", _row(KWISE, completions=[], scores=[]),
          "data.too_few_candidates", "completions"),
    _ok("D15", [KWISE, KWISE | {"prompt": "z", "completions": ["c", "d"],
                                "scores": [1, 0]}],
        _report(candidates_min=2, candidates_max=3)),
    _data("D16 length", _row(KWISE, scores=[1, 0]), "data.length_mismatch",
          "scores"),
    _data("D16 null", _row(KWISE, scores=[1, None, 0]), "data.field_type",
          "scores[1]"),
    _data("D17 high", _row(KWISE, scores=..., preferred=3),
          "data.index_range", "preferred"),
    _data("D17 negative", _row(KWISE, scores=..., preferred=-1),
          "data.index_range", "preferred"),
    _data("D18 role", _row(PAIR, prompt=[{"role": "owl", "content": "a"}]),
          "data.chat_roles", "prompt[0]"),
    _data("D18 users", _row(PAIR, prompt=[USER, USER]), "data.chat_roles",
          "prompt[1]"),
    _data("D18 last", _read(PAIR, {"messages": [USER, BOT, USER]}),
          "data.chat_roles", "messages[2]"),
    _data("D18 system", _row(PAIR, prompt=[
        USER, BOT, {"role": "system", "content": "x"}, USER]),
          "data.chat_roles", "prompt[2]"),
    _data("D19", _read(PAIR, {"chosen": [USER, BOT], "rejected": [
        {"role": "user", "content": "other"}, BOT]}), "data.prompt_mismatch",
          "rejected"),
    _data("D20", _read(PAIR, PAIR | {"prompt": "a " * 50}, max_length=20),
          "data.no_completion_left", "x.jsonl:2, prompt"),
    _ok("D21", [PAIR | {"chosen": "c " * 50}],
        lambda s: s.report["truncated_completions"] == 1
        and s.truncated(0).tolist() == [True, False] and (
            s.candidate_set(0).completions[0][-1] != _TINY[0].end_id),
        max_completion_length=6),
    _ok("D22", [PAIR | {"prompt": "a", "chosen": " b"}],
        lambda s: len(s.candidate_set(0).completions) == 2),
    _ok("D23", [PAIR | {"prompt": "a <|eos|> b"}],
        lambda s: s.report["special_token_text"] == 1
        and _TINY[0].eos_id not in s.candidate_set(0).prompt),
    _data("D24", lambda folder: lambda: tokenizer.load_tokenizer(
        _TINY[0].hf.name_or_path, chat_template="{{ bos_token }}"
        + tokenizer.DEFAULT_CHAT_TEMPLATE).encode_prompt("a"),
          "data.bos", "prompt"),
    _data("D25 high", _masked(prompt_ids=[3, 9999]), "data.token_range",
          "prompt[1]"),
    _data("D25 negative", _masked(completion_ids=[[5, 6], [-1]]),
          "data.token_range", "completions[1][0]"),
    _data("D25 huge", _masked(completion_ids=[[5, 6], [2**70]]),
          "data.token_range", "completion_ids[1][0]"),
    _data("D10 annotations", _read(KWISE | {"prompt": "z"}, {
        "instruction": "a", "completions": [
            {"response": "b", "annotations": "good"}]}),
          "data.field_type", "completions[0].annotations"),
    _ok("D10 a column of the user's own",
        [KWISE | {"prompt_ids": "p"}, KWISE | {"prompt": "z"}],
        lambda store: len(store) == 2),
    _data("D26 length", _masked(completion_masks=[[1], [1]]), "data.mask",
          "completion_masks[0]"),
    _data("D26 zero", _masked(completion_masks=[[0, 0], [1]]), "data.mask"),
    _data("D26 two", _masked(completion_masks=[[2, 1], [1]]), "data.mask"),
    _data("D27 cut", _parquet(lambda d: d[:-30]), "data.parquet",
          "x.parquet"),
    _data("D27 empty", _parquet(lambda d: b""), "data.parquet", "x.parquet"),
    _data("D27 flipped", _parquet(_flip), "data.parquet", "x.parquet"),
    _data("D28 extension", _extension, "data.unsafe_type", "extra"),
    _data("D28 pickled", _parquet(prompt=["a"], extra=[b"\x80\x04."]),
          "data.unsafe_type", "extra"),
    _data("D29", _two_files(KWISE | {"extra": 1},
                            KWISE | {"prompt": "z", "extra": "1"}),
          "data.schema_drift", "x2.jsonl, extra"),
    _data("D30 missing", lambda folder: lambda: _store(
        folder, str(folder / "none.jsonl")), "data.no_files", "none.jsonl"),
    _data("D30 pattern", lambda folder: lambda: _store(
        folder, str(folder / "*.jsonl")), "data.no_files", "*.jsonl"),
    _data("D30 directory", lambda folder: lambda: _store(
        folder, str(folder)), "data.unreadable", ""),
    _data("D30 set", _broken_set, "data.unreadable", ""),
    _data("D28 set", _binary_set, "data.unsafe_type", "extra"),
    _data("D30 no rows", _read(""), "data.too_small", "x.jsonl"),
    _data("D31 cut", _bytes("x.jsonl.gz", _GZIP[:-20]), "data.compression",
          "x.jsonl.gz"),
    _data("D31 plain", _bytes("x.jsonl.gz", _LINE), "data.compression",
          "x.jsonl.gz"),
    _data("D31 packed", _bytes("x.jsonl", _GZIP), "data.compression",
          "x.jsonl"),
    _data("D33", lambda folder: lambda: batches.plan(3, batch_size=4),
          "data.too_small", ""),
    _data("D36 file", _listed_twice, "data.duplicate_file", "x.jsonl"),
    _data("D36 id", _read(KWISE | {"prompt_id": "p"},
                          KWISE | {"prompt": "z", "prompt_id": "p"}),
          "data.duplicate_id", "x.jsonl:2, prompt_id"),
    *models_folders.cases(Case),
    *bad_configs.ROWS,
    *bad_checkpoints.ROWS,
    *MACHINERY,
]


# The test.


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.id)
def test_bad_input_gets_its_refusal_and_nothing_is_lost(case, tmp_path):
  bad_configs.check(case, tmp_path)


def test_no_two_rows_have_one_id():
  ids = [case.id for case in TABLE]
  assert len(ids) == len(set(ids))


def test_a_mistake_of_the_user_is_told_within_two_seconds_and_without_jax():
  done = subprocess.run(
      [sys.executable, bad_configs.__file__], capture_output=True, text=True,
      timeout=120, env=os.environ | {"PYTHONPATH": str(
          bad_configs.QUICKSTART.parents[1])})
  assert done.returncode == 0, done.stderr
  seen = json.loads(done.stdout)
  assert seen["seconds"].keys() == {case.id for case in bad_configs.ROWS}
  assert max(seen["seconds"].values()) < 2.0 and not seen["jax"]


def test_several_bad_rows_are_listed_at_once(tmp_path):
  bad = [PAIR | {"chosen": None, "prompt": str(i)} for i in range(30)]
  use = _read(PAIR, *bad)(tmp_path)
  with pytest.raises(errors.ErrorGroup) as raised:
    use()
  assert len(raised.value.errors) == records.MAX_ERRORS
  assert raised.value.exit_code == 3
  assert "x.jsonl:21, chosen" in str(raised.value)


def test_messages_never_hold_text_of_prompts_or_completions(tmp_path):
  canary = "QUOKKA-7731"
  for row in ({"prompt": canary, "chosen": canary, "rejected": 3},
              {"prompt": canary, "completions": [canary], "scores": []},
              {"messages": [{"role": "user", "content": canary}]},
              {"prompt": [{"role": "owl", "content": canary}],
               "completion": canary}):
    with pytest.raises(errors.DataError) as raised:
      _read(row)(tmp_path)()
    assert canary not in str(raised.value)


def test_quarantine_lists_bad_rows_and_loses_none(tmp_path):
  lines = [PAIR | {"prompt": str(i), "prompt_id": str(i)} for i in range(9)]
  lines[3] = PAIR | {"chosen": None}
  lines[5] = "{"
  lines[7]["prompt_id"] = "6"
  raw = [x if isinstance(x, str) else json.dumps(x) for x in lines]
  for text in (False, True):  # the second time the store is there already
    listed = tmp_path / "out" / "quarantine.jsonl"
    use = _read(*lines, quarantine_path=listed, quarantine_text=text,
                max_quarantined_share=1 / 3)
    report = use(tmp_path)().report
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(r["line"], r["slug"]) for r in rows] == [
        ("4", "data.field_type"), ("6", "data.json"),
        ("8", "data.duplicate_id")]
    for row in rows:
      line = raw[int(row["line"]) - 1]
      assert row["sha256"] == hashlib.sha256(line.encode()).hexdigest()
      assert row.get("text") == (line if text else None)
    assert report["rows_in"] == 9 == report["rows_used"] + report[
        "rows_quarantined"] + report["rows_skipped"]


def test_a_row_that_is_lost_is_noticed(tmp_path, monkeypatch):
  monkeypatch.setattr(store_lib._Writer, "add", lambda *args: None)
  with pytest.raises(errors.DataError) as raised:
    _read(PAIR)(tmp_path)()
  assert raised.value.slug == "data.lost_rows"


def test_a_full_disk_for_the_list_of_bad_rows_does_not_stop(
    tmp_path, monkeypatch):
  write = commit.write_file

  def full(path, text, **options):
    if path.name == "q.jsonl":
      raise OSError(errno.ENOSPC, "No space left on device")
    write(path, text, **options)

  monkeypatch.setattr(commit, "write_file", full)
  lines = [PAIR | {"prompt": str(i)} for i in range(8)] + ["{"]
  with unittest.TestCase().assertLogs("absl", "WARNING") as logs:
    store = _read(*lines, quarantine_path=tmp_path / "q.jsonl",
                  max_quarantined_share=0.5)(tmp_path)()
  assert len(store) == 8 and "No space left" in logs.output[0]


@pytest.mark.parametrize("bad, share, stops", [
    (1, 0.1, False), (1, 0.0999, True), (2, 0.1, True), (0, 0.0, False)])
def test_quarantine_stops_above_its_share(tmp_path, bad, share, stops):
  lines = [PAIR | {"prompt": str(i)} for i in range(10 - bad)] + ["{"] * bad
  use = _read(*lines, quarantine_path=tmp_path / "q.jsonl",
              max_quarantined_share=share)(tmp_path)
  if not stops:
    assert use().report["rows_quarantined"] == bad
    return
  with pytest.raises(errors.DataError) as raised:
    use()
  assert raised.value.slug == "data.quarantine"
  assert raised.value.got == f"{bad} of 10"
  assert not (tmp_path / "q.jsonl").exists()
