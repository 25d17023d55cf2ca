"""The catalogue of bad inputs: one table, one test per row.

A row is (id, make, class, slug, where, exit code). `make(folder)` writes its
input under `folder` and returns a function without arguments that uses it: the
test calls that function and looks at the refusal. A row whose class is None is
accepted: what the function returns must then be true.

Nothing is lost: no row may change a file that was there, or leave one behind.
To add rows, append to TABLE; `where` must occur in the error's `where`.
"""

import gzip
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import models_folders
import pytest

from mcpo_jax import errors
from mcpo_jax.data import batches, files, records, tokenizer
from mcpo_jax.data import store as store_lib

Use = Callable[[], Any]


class Case(NamedTuple):
  """One bad input and what it must get."""

  id: str
  make: Callable[[pathlib.Path], Use]
  error: type[errors.McpoError] | None
  slug: str | None
  where: str
  exit_code: int


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
]


# The test.


def _listing(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes()
          for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.id)
def test_bad_input_gets_its_refusal_and_nothing_is_lost(case, tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  use = case.make(folder)
  before = _listing(folder)
  if case.error is None:
    assert use()
  else:
    with pytest.raises(case.error) as raised:
      use()
    error = raised.value
    assert error.slug == case.slug
    assert case.where in error.where
    assert error.exit_code == case.exit_code
    assert len(str(error)) < 2000
    assert not list(tmp_path.rglob("*.tmp"))
    cache = tmp_path / "cache"
    assert not cache.exists() or not list(cache.iterdir())
  assert _listing(folder) == before


def test_ids_and_slugs_of_the_table_are_sound():
  ids = [case.id for case in TABLE]
  assert len(ids) == len(set(ids))
  wanted = {f"D{n}" for n in [*range(1, 32), 33, 36]}
  assert wanted <= {i.split()[0] for i in ids}


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
  lines = [PAIR | {"prompt": str(i)} for i in range(8)]
  lines[3] = PAIR | {"chosen": None}
  lines[5] = "{"
  listed = tmp_path / "out" / "quarantine.jsonl"
  use = _read(*lines, quarantine_path=listed, max_quarantined_share=0.25)
  store = use(tmp_path)()
  rows = [json.loads(line) for line in listed.read_text().splitlines()]
  assert [(r["line"], r["slug"]) for r in rows] == [
      ("4", "data.field_type"), ("6", "data.json")]
  assert all(len(r["sha256"]) == 64 for r in rows)
  report = store.report
  assert report["rows_in"] == 8 == report["rows_used"] + report[
      "rows_quarantined"] + report["rows_skipped"]
  assert "prompt" not in listed.read_text()


def test_quarantine_stops_above_its_share(tmp_path):
  lines = [PAIR | {"prompt": str(i)} for i in range(8)] + ["{"]
  use = _read(*lines, quarantine_path=tmp_path / "q.jsonl")(tmp_path)
  with pytest.raises(errors.DataError) as raised:
    use()
  assert raised.value.slug == "data.quarantine"
  assert not (tmp_path / "q.jsonl").exists()
