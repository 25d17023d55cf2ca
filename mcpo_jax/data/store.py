"""Tokenised once, kept on disk by content, opened by memory map.

A store is a folder named by a hash of all that decides what is in it: the
sources' bytes, the tokenizer, the settings, this code's version. Rows are
written as they are read, so memory does not grow with them but for a few
numbers each; a folder counts only once it is whole (commit.write_folder).
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from mcpo_jax import commit, errors, hosts
from mcpo_jax.data import files, readers, records
from mcpo_jax.data.records import Record
from mcpo_jax.data.tokenizer import Tokenizer
from mcpo_jax.types import CandidateSet

VERSION = 1  # of what is written; raise it when the same input gives other rows

Source = tuple[str, str, float, str | None]  # path, format, weight, revision

# Name of an array -> (type, what one entry stands for).
_ARRAYS = {
    "tokens": "<i4",  # every row: prompt, then its completions
    "scored": "|u1",  # beside every token: 1 = scored
    "row_start": "<i8",  # [N + 1] first token of a row
    "row_candidate": "<i8",  # [N + 1] first candidate of a row
    "completion_start": "<i8",  # [C] first token of a candidate
    "candidate_id": "<u4",  # [C]
    "multiplicity": "<i4",  # [C]
    "score": "<f4",  # [C]
    "truncated": "|u1",  # [C] 1 = cut, so without an end token
    "preferred": "<i4",  # [N]
    "contrast": "|u1",  # [N] 1 = somebody is better than somebody
    "example_id": "<u4",  # [N, 2]
    "prompt_hash": "<u8",  # [N]
    "row_hash": "<u8",  # [N]
    "named": "|u1",  # [N] 1 = the record brought its prompt_id
    "source": "<i4",  # [N]
    "columns_start": "<i8",  # [N + 1] first byte in columns.jsonl
    "index": "<i8",  # [rows of the store] which row stands there
}


class Limits(NamedTuple):
  """What is done with what is too long."""

  max_prompt_length: int | None
  max_completion_length: int | None
  max_length: int | None
  prompt_overlength: str
  completion_overlength: str


class _Row(NamedTuple):
  """A record tokenised, cut and merged: what is written."""

  prompt: np.ndarray
  completions: list[np.ndarray]
  masks: list[np.ndarray]
  candidate_ids: list[int]
  multiplicity: list[int]
  scores: list[float]
  truncated: list[bool]
  preferred: int


@dataclasses.dataclass(frozen=True)
class Store:
  """Candidate sets by number.

  Attributes:
    key: hex hash of the content.
    report: counts of what was met when the store was made.
  """

  key: str
  report: dict[str, Any]
  arrays: dict[str, np.ndarray]
  columns_file: np.ndarray

  def __len__(self) -> int:
    return len(self.arrays["index"])

  def _span(self, name: str, row: int) -> slice:
    start, stop = self.arrays[name][row : row + 2]
    return slice(int(start), int(stop))

  def _line(self, row: int) -> dict[str, Any]:
    return json.loads(
        self.columns_file[self._span("columns_start", row)].tobytes())

  def candidate_set(self, i: int) -> CandidateSet:
    """The i-th set; identical completions are one with a multiplicity."""
    arrays, row = self.arrays, int(self.arrays["index"][i])
    candidates = self._span("row_candidate", row)
    starts = arrays["completion_start"][candidates].tolist()
    begin, end = arrays["row_start"][row : row + 2].tolist()
    edges = list(zip(starts, [*starts[1:], end]))
    tokens, scored = arrays["tokens"], arrays["scored"]
    return CandidateSet(
        example_id=np.array(arrays["example_id"][row]),
        prompt_id=self._line(row)["prompt_id"],
        prompt=np.array(tokens[begin : starts[0] if starts else end]),
        completions=[np.array(tokens[a:b]) for a, b in edges],
        completion_masks=[np.array(scored[a:b], bool) for a, b in edges],
        candidate_ids=np.array(arrays["candidate_id"][candidates]),
        multiplicity=np.array(arrays["multiplicity"][candidates]),
        scores=np.array(arrays["score"][candidates]),
        preferred=int(arrays["preferred"][row]))

  def truncated(self, i: int) -> np.ndarray:
    """[K] bool, True where the i-th set's completion was cut."""
    row = int(self.arrays["index"][i])
    return self.arrays["truncated"][self._span("row_candidate", row)] > 0

  def columns(self, i: int) -> dict[str, Any]:
    """`prompt`, `prompt_id`, `where` and the record's further columns.

    Columns with an entry per completion are in the record's order:
    `candidate_ids` are indices into them.
    """
    return self._line(int(self.arrays["index"][i]))

  @property
  def token_counts(self) -> np.ndarray:
    """[N] int32 tokens of prompt and all candidates."""
    counts = np.diff(self.arrays["row_start"]).astype(np.int32)
    return counts[self.arrays["index"]]

  @property
  def example_ids(self) -> np.ndarray:
    """[N, 2] uint32."""
    return self.arrays["example_id"][self.arrays["index"]]

  @property
  def prompt_hashes(self) -> np.ndarray:
    """[N] uint64, equal where prompts are."""
    return self.arrays["prompt_hash"][self.arrays["index"]]

  @property
  def max_candidates(self) -> int:
    """Most candidates of any set."""
    return int(np.diff(self.arrays["row_candidate"])[
        self.arrays["index"]].max())

  @property
  def has_contrast(self) -> np.ndarray:
    """[N] bool, True where some candidate is better than another."""
    return self.arrays["contrast"][self.arrays["index"]] > 0

  def contrast_rows(self) -> np.ndarray:
    """[n] int64, the sets that have contrast."""
    return np.flatnonzero(self.has_contrast)


def _uint64(content: str | bytes) -> int:
  content = content.encode() if isinstance(content, str) else content
  return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def example_id(prompt_id: str) -> np.ndarray:
  """[2] uint32, the first 8 bytes of the SHA-256 of the prompt's id."""
  digest = hashlib.sha256(prompt_id.encode()).digest()[:8]
  return np.frombuffer(digest, "<u4").copy()


def text_set(
    tokenizer: Tokenizer, prompt: str | readers.Messages,
    completions: list[str], where: str,
) -> CandidateSet:
  """A prompt and its completions as ids, without preference.

  Raises:
    DataError: as `Tokenizer.encode_record`.
  """
  encoded = tokenizer.encode_record(Record(
      prompt, completions, None, None, "", None, {}, where))
  count = len(completions)
  return CandidateSet(
      np.zeros(2, np.uint32), "", encoded.prompt, encoded.completions,
      encoded.masks, np.arange(count, dtype=np.uint32),
      np.ones(count, np.int32), np.full(count, np.nan, np.float32), -1)


def _source_digest(path: str, revision: str | None) -> str:
  """Hash of a source's content; a hub name with its commit is one."""
  if (split := records.embedded_split(path)) is not None:
    from mcpo_jax.data import quickstart

    parts = [json.dumps(r[:6], default=str) for r in quickstart.records(split)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
  if files.is_hub_name(path):
    return f"{path}@{revision}"
  return "+".join(map(commit.file_sha256, _files_of(path)))


def _files_of(path: str) -> list[pathlib.Path]:
  return [f for p in files.expand(path) for f in (
      sorted(q for q in p.rglob("*") if q.is_file()) if p.is_dir() else [p])]


def _stamps(sources: list[Source]) -> dict[str, tuple[int, ...]]:
  """What changes when somebody writes to a file or puts another in place."""
  local = [p for p, _, _, _ in sources if not (
      p.startswith(records.EMBEDDED) or files.is_hub_name(p))]
  stats = {str(f): f.stat() for p in local for f in _files_of(p)}
  return {name: (s.st_ino, s.st_size, s.st_mtime_ns)
          for name, s in stats.items()}


def _check_sources(sources: list[Source]) -> None:
  seen: dict[str, str] = {}
  for path, _, weight, _ in sources:
    if not weight > 0:
      raise errors.ConfigError(
          "config.range", "the weight of a source", where=f"data, {path}",
          got=weight, want="> 0")
    local = not path.startswith(records.EMBEDDED) and (
        not files.is_hub_name(path))
    for name in files.expand(path) if local else [path]:
      real = os.path.realpath(name) if local else path
      if real in seen:
        raise errors.DataError(
            "data.duplicate_file", "a file is listed twice", where=str(name),
            got=seen[real], hint="give it one weight instead")
      seen[real] = str(name)


def _fit_prompt(prompt, limits, bos_id, where, counts):
  """The prompt within its length, or None if the row is to be skipped."""
  most, policy = limits.max_prompt_length, limits.prompt_overlength
  if most is None or len(prompt) <= most:
    return prompt
  if policy == "error":
    raise errors.DataError(
        "data.prompt_too_long", "the prompt is too long",
        where=f"{where}, prompt", got=len(prompt), want=f"at most {most}",
        hint="raise data.max_prompt_length or set data.prompt_overlength")
  counts["prompts_too_long"] += 1
  if policy == "skip":
    return None
  counts["truncated_prompts"] += 1
  if policy == "right":
    return prompt[:most]
  if bos_id is not None and prompt[0] == bos_id:  # "left" keeps BOS in front
    return np.concatenate([prompt[:1], prompt[len(prompt) - most + 1 :]])
  return prompt[len(prompt) - most :]


def _check_ids(ids, vocab_size, where) -> None:
  bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
  if bad.size:
    raise errors.DataError(
        "data.token_range", "a token id outside the vocabulary",
        where=f"{where}[{bad[0]}]", got=int(ids[bad[0]]),
        want=f"0 to {vocab_size - 1}")


def _tokenise(
    record: Record, tokenizer: Tokenizer, limits: Limits, vocab_size: int,
    counts: collections.Counter,
) -> _Row | None:
  """Tokenises, cuts and merges one record; None if a policy skips it."""
  where = record.where
  # Of what a model wrote and did not end; ids are taken as they come.
  tokenised = record.prompt == "" and "completion_ids" in record.columns
  unended = [] if tokenised else [
      k for k, reason in enumerate(record.columns.get("finish_reasons") or [])
      if reason == "length"]
  encoded = tokenizer.encode_record(record)
  _check_ids(encoded.prompt, vocab_size, f"{where}, prompt")
  prompt = _fit_prompt(encoded.prompt, limits, tokenizer.bos_id, where, counts)
  if prompt is None:
    return None
  room = limits.max_completion_length
  if limits.max_length is not None:
    left = limits.max_length - len(prompt)
    if left < 1:
      raise errors.DataError(
          "data.no_completion_left", "the prompt alone fills the length",
          where=f"{where}, prompt", got=len(prompt),
          want=f"less than {limits.max_length}")
    room = left if room is None else min(room, left)

  groups: dict[bytes, list[int]] = {}
  kept: dict[int, tuple[np.ndarray, np.ndarray, bool]] = {}
  for k, (ids, mask) in enumerate(zip(encoded.completions, encoded.masks)):
    field = f"{where}, completions[{k}]"
    _check_ids(ids, vocab_size, field)
    if k in unended:
      ids, mask = ids[:-1], mask[:-1]
    cut = room is not None and len(ids) > room
    if cut:
      if limits.completion_overlength == "error":
        raise errors.DataError(
            "data.completion_too_long", "the completion is too long",
            where=field, got=len(ids), want=f"at most {room}",
            hint="raise data.max_completion_length or set "
            "data.completion_overlength")
      counts["completions_too_long"] += 1
      if limits.completion_overlength == "skip":
        continue
      ids, mask = ids[:room], mask[:room]
      counts["truncated_completions"] += 1
    if not len(ids):
      counts["completions_without_tokens"] += 1
      continue
    if not mask.any():
      raise errors.DataError(
          "data.mask", "no token of the completion is scored", where=field,
          hint="reasoning fills it up to the length")
    groups.setdefault(ids.tobytes() + mask.tobytes(), []).append(k)
    kept[k] = ids, mask, cut
  lost = record.preferred is not None and record.preferred not in kept
  if lost or record.completions and not groups:
    counts["rows_without_candidates"] += 1
    return None

  members = list(groups.values())
  preferred = next((g for g, ks in enumerate(members)
                    if record.preferred in ks), -1)
  scores = []
  for ks in members:
    values = [record.scores[k] for k in ks] if record.scores else [np.nan]
    scores.append(float(np.mean(values)))
    counts["merged_completions"] += len(ks) - 1
    counts["merged_score_conflicts"] += len(set(values)) > 1
  if preferred >= 0:
    counts["chosen_in_pool"] += len(members[preferred]) > 1
  first = [ks[0] for ks in members]
  return _Row(
      prompt, [kept[k][0] for k in first], [kept[k][1] for k in first], first,
      [len(ks) for ks in members], scores, [kept[k][2] for k in first],
      preferred)


def _contrast(row: _Row) -> bool:
  if row.scores and not np.isnan(row.scores).any():
    return max(row.scores) > min(row.scores)
  return row.preferred >= 0 and len(row.scores) > 1


class _Writer:
  """Appends rows to the files of a folder."""

  def __init__(self, folder: pathlib.Path):
    self.files = {name: open(folder / f"{name}.bin", "wb") for name in _ARRAYS}
    self.columns = open(folder / "columns.jsonl", "wb")
    self.rows = self.candidates = self.tokens = 0
    for name in ("row_start", "row_candidate", "columns_start"):
      self._write(name, [0])

  def _write(self, name: str, values: Any) -> None:
    self.files[name].write(np.asarray(values, _ARRAYS[name]).tobytes())

  def add(self, record: Record, row: _Row, source: int) -> None:
    lengths = [len(c) for c in row.completions]
    start = self.tokens + len(row.prompt)
    self._write("tokens", np.concatenate([row.prompt, *row.completions]))
    self._write("scored", np.concatenate(
        [np.zeros(len(row.prompt), bool), *row.masks]))
    ends = np.cumsum(lengths, dtype=np.int64)
    self._write("completion_start", start + ends - lengths)
    self._write("candidate_id", row.candidate_ids)
    self._write("multiplicity", row.multiplicity)
    self._write("score", row.scores)
    self._write("truncated", row.truncated)
    self._write("preferred", [row.preferred])
    self._write("contrast", [_contrast(row)])
    self._write("example_id", example_id(record.prompt_id))
    prompt_hash = readers.hash_id(
        record.columns.get("prompt_ids", record.prompt))
    self._write("prompt_hash", [_uint64(prompt_hash)])
    self._write("row_hash", [_uint64(readers.hash_id(
        [prompt_hash, sorted(map(str, record.completions))]))])
    self._write("named", [record.prompt_id != prompt_hash])
    self._write("source", [source])
    columns = {k: v for k, v in record.columns.items() if k not in (
        "prompt_ids", "completion_ids", "completion_masks")}
    if record.sources is not None:
      columns["sources"] = record.sources
    columns |= {"prompt": record.prompt, "prompt_id": record.prompt_id,
                "where": record.where}
    self.columns.write(
        json.dumps(columns, ensure_ascii=False, default=str).encode(
            "utf-8", "surrogatepass") + b"\n")
    self.rows += 1
    self.candidates += len(lengths)
    self.tokens = start + sum(lengths)
    self._write("row_start", [self.tokens])
    self._write("row_candidate", [self.candidates])
    self._write("columns_start", [self.columns.tell()])

  def flush(self) -> None:
    for file in [*self.files.values(), self.columns]:
      file.flush()

  def close(self) -> None:
    for file in [*self.files.values(), self.columns]:
      file.close()


def _map(path: pathlib.Path, kind: str) -> np.ndarray:
  if not path.stat().st_size:
    return np.empty(0, kind)
  return np.memmap(path, kind, mode="r")


def _load_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
  arrays = {name: _map(folder / f"{name}.bin", kind)
            for name, kind in _ARRAYS.items()}
  arrays["example_id"] = arrays["example_id"].reshape(-1, 2)
  return arrays


def _open(folder: pathlib.Path, key: str) -> Store | None:
  """The store in a folder, or None if it is not there or damaged.

  On a shared disk the first process has just verified or made it: of the others
  each hashes a share.
  """
  if not folder.exists():
    return None
  part, parts = (0, 1) if hosts.writes() else (hosts.index(), hosts.count())
  try:
    meta = commit.verify(folder, part=part, parts=parts)
  except errors.CheckpointError as e:
    logging.warning("the tokenised data are made anew: %s", e)
    return None
  return Store(key, meta["report"], _load_arrays(folder),
               _map(folder / "columns.jsonl", "|u1"))


def _duplicates(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Rows whose id names another prompt too, or that stand there twice.

  Returns:
    wrong: [n] rows with an id of their own that an earlier row has taken.
    again: [n] rows without one that repeat an earlier row.
  """
  ids = np.ascontiguousarray(arrays["example_id"]).view("<u8").reshape(-1)
  order = np.argsort(ids, kind="stable")
  same = np.flatnonzero(ids[order][1:] == ids[order][:-1]) + 1
  heads = np.ones(len(order), bool)
  heads[same] = False
  group = np.maximum.accumulate(np.where(heads, np.arange(len(order)), 0))
  first, later = order[group[same]], order[same]
  other_prompt = arrays["prompt_hash"][first] != arrays["prompt_hash"][later]
  _, head = np.unique(arrays["row_hash"], return_index=True)
  repeats = np.setdiff1d(np.arange(len(ids)), head)
  single = np.diff(arrays["row_candidate"]) < 2
  named = arrays["named"] > 0
  wrong = later[other_prompt | np.isin(later, repeats[
      named[repeats] & ~single[repeats]])]
  return np.sort(wrong), np.setdiff1d(repeats, wrong)


def _weighted_index(
    source: np.ndarray, keep: np.ndarray, sources: list[Source]
) -> np.ndarray:
  """Rows of every source, repeated and subsampled as its weight says."""
  parts = []
  for s, (_, _, weight, _) in enumerate(sources):
    rows = keep[source[keep] == s]
    whole = int(weight)
    count = round((weight - whole) * len(rows))
    generator = np.random.Generator(np.random.Philox(key=s))
    some = np.sort(generator.permutation(len(rows))[:count])
    parts += [rows] * whole + [rows[some]]
  return np.concatenate(parts)


def build_store(
    sources: list[Source],
    tokenizer: Tokenizer,
    *,
    cache_dir: str | os.PathLike[str],
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    max_length: int | None = None,
    prompt_overlength: str = "error",
    completion_overlength: str = "truncate",
    think: str | None = None,
    vocab_size: int | None = None,
    quarantine_path: str | os.PathLike[str] | None = None,
    quarantine_text: bool = False,
    max_quarantined_share: float = 0.001,
    prompts_only: bool = False,
) -> Store:
  """Opens the store of these sources, and makes it first if it is not there.

  Args:
    sources: (path, format, weight, revision) each; weight 1 takes every row
      once, 2.5 twice and half of them a third time, always the same half.
      Copies of a row share its example_id.
    tokenizer: what makes the ids.
    cache_dir: where stores lie; never written to but for whole stores.
    max_prompt_length, max_completion_length, max_length: tokens, the second
      with the end token; None for no limit. max_length is of both together.
    prompt_overlength: "error", "skip" the row, or cut on the "left" (BOS
      stays) or "right".
    completion_overlength: "error", "skip" the completion, or "truncate": the
      end token is lost and the candidate is flagged.
    think: "keep", "strip" or "mask" reasoning; None as the tokenizer says.
    vocab_size: ids must be below it; None for the tokenizer's.
    quarantine_path: file that bad rows are listed in (file, line, slug, sha256
      of the row as it was read); None stops at them.
    quarantine_text: whether that file also holds the rows' text.
    max_quarantined_share: of all rows; above it the build stops.
    prompts_only: prompts are what is wanted, so a row may have nothing else.

  Returns:
    A Store. rows_in = rows_used + rows_quarantined + rows_skipped.

  Raises:
    DataError or ErrorGroup: bad rows, missing or damaged files,
      data.duplicate_id, data.quarantine (too many), data.too_small (none
      left), data.changed (a file, while it was read).
    ConfigError: config.range; hosts.data, this process has other files.
  """
  choices = {
      "prompt_overlength": (
          prompt_overlength, ("error", "skip", "left", "right")),
      "completion_overlength": (
          completion_overlength, ("error", "skip", "truncate")),
  }
  for name, (value, allowed) in choices.items():
    if value not in allowed:
      raise errors.ConfigError(
          "config.range", "no such choice", where=f"data.{name}", got=value,
          want=", ".join(allowed))
  sources = [(str(p), f, float(w), r) for p, f, w, r in sources]
  _check_sources(sources)
  sources = [  # a branch is looked up once: what is read is what is keyed
      (p, f, w, files.resolve_revision(p, r) if files.is_hub_name(p) else r)
      for p, f, w, r in sources]
  if think is not None:
    tokenizer = dataclasses.replace(tokenizer, think=think)
  vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
  stamps = _stamps(sources)
  limits = Limits(max_prompt_length, max_completion_length, max_length,
                  prompt_overlength, completion_overlength)
  quarantine = quarantine_path is not None
  parts = [
      VERSION, [_source_digest(p, r) for p, _, _, r in sources],
      [(f, w) for _, f, w, _ in sources], tokenizer.key, limits, vocab_size,
      quarantine and max_quarantined_share,
  ] + (["prompts"] if prompts_only else [])
  key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
  folder = pathlib.Path(cache_dir) / f"store-{key[:32]}"
  store = _open(folder, key)
  if store is None and not hosts.writes():
    raise errors.ConfigError(
        "hosts.data", "not the data that the first process has made",
        where=", ".join(path for path, *_ in sources), got=key,
        hint="give all of them the same files")
  if store is None:
    meta: dict[str, Any] = {"key": key}

    def write(temporary: pathlib.Path) -> None:
      meta["report"] = _build(temporary, sources, tokenizer, limits,
                              vocab_size, quarantine, max_quarantined_share,
                              prompts_only)
      after = _stamps(sources)
      for name in stamps:
        if stamps[name] != after.get(name):
          raise errors.DataError(
              "data.changed", "the file changed while it was read", where=name,
              hint="start again when nobody writes to it")

    shutil.rmtree(folder, ignore_errors=True)  # damaged, if there at all
    commit.write_folder(folder, write, meta)
    store = _open(folder, key)
  if quarantine:
    listed = (folder / "quarantine.jsonl").read_text()
    if quarantine_text and listed:
      listed = _with_text(listed, sources)
    try:
      pathlib.Path(quarantine_path).parent.mkdir(parents=True, exist_ok=True)
      commit.write_file(pathlib.Path(quarantine_path), listed)
    except (OSError, errors.ResourceError) as e:  # a full disk, say
      logging.warning("the quarantined rows are not listed: %s", e)
  return store


def _with_text(listed: str, sources: list[Source]) -> str:
  """The lines of a quarantine file with the text of their rows."""
  rows = [json.loads(line) for line in listed.splitlines()]
  raw = _raw_rows(sources, {f"{row['file']}:{row['line']}" for row in rows})
  return "".join(json.dumps(row | {"text": raw[
      f"{row['file']}:{row['line']}"].decode(errors="replace")}) + "\n"
                 for row in rows)


def _raw_rows(sources: list[Source], wanted: set[str]) -> dict[str, bytes]:
  """The bytes that some rows were read from, by their "file:line"."""
  return {where: raw for path, format, _, revision in sources
          for where, _, raw in records.scan(
              path, format=format, revision=revision) if where in wanted}


def _build(
    folder, sources, tokenizer, limits, vocab_size, quarantine, max_share,
    prompts_only,
) -> dict[str, Any]:
  """Writes all files of a store into `folder` and returns the report."""
  counts: collections.Counter = collections.Counter()
  before = collections.Counter(tokenizer.counts)
  found: list[errors.DataError] = []
  writer = _Writer(folder)
  rejected = open(folder / "quarantine.jsonl", "w")

  def reject(error: errors.DataError, where: str, raw: bytes) -> None:
    file, _, line = where.rpartition(":")
    rejected.write(json.dumps({
        "file": file, "line": line, "slug": error.slug,
        "sha256": hashlib.sha256(raw).hexdigest()}) + "\n")
    counts["rows_quarantined"] += 1

  try:
    for s, (path, format, _, revision) in enumerate(sources):
      for where, record, raw in records.scan(
          path, format=format, revision=revision, counts=counts):
        counts["rows_in"] += 1
        error, row = record, None
        if isinstance(record, Record):
          error = None
          try:
            if not (record.completions or prompts_only):
              raise readers.no_layout(
                  ["prompt", *record.columns], where,
                  "there is a prompt and no completion")
            row = _tokenise(record, tokenizer, limits, vocab_size, counts)
          except errors.DataError as e:
            error = e
        if error is not None:
          if quarantine:
            reject(error, where, raw)
          else:
            found.append(error)
            if len(found) == records.MAX_ERRORS:
              break
        elif row is None:
          counts["rows_skipped"] += 1
        elif not found:
          writer.add(record, row, s)
      if len(found) == records.MAX_ERRORS:
        break
    records.raise_errors(found)
    writer.flush()
    arrays = _load_arrays(folder)
    lines = _map(folder / "columns.jsonl", "|u1")
    wrong, again = _duplicates(arrays)
    places = [json.loads(lines[slice(*arrays["columns_start"][
        row : row + 2])].tobytes())["where"] for row in wrong]
    raw = _raw_rows(sources, set(places)) if places and quarantine else {}
    for where in places:
      error = errors.DataError(
          "data.duplicate_id", "the prompt_id stands in an earlier row",
          where=f"{where}, prompt_id",
          hint="give every prompt an id of its own")
      if quarantine:
        reject(error, where, raw[where])
      else:
        found.append(error)
    records.raise_errors(found)
    if counts["rows_quarantined"] > max_share * counts["rows_in"]:
      raise errors.DataError(
          "data.quarantine", "too many rows are bad",
          where=", ".join(p for p, _, _, _ in sources),
          got=f"{counts['rows_quarantined']} of {counts['rows_in']}",
          want=f"a share of at most {max_share}")
    keep = np.setdiff1d(np.arange(writer.rows), wrong)
    known = len(keep) + counts["rows_quarantined"] + counts["rows_skipped"]
    if counts["rows_in"] != known:
      raise errors.DataError(
          "data.lost_rows", "rows are neither used nor listed, which is a bug",
          where=", ".join(p for p, _, _, _ in sources), got=known,
          want=counts["rows_in"])
    if not len(keep):
      raise errors.DataError(
          "data.too_small", "no row is left",
          where=", ".join(p for p, _, _, _ in sources), got=0,
          want="at least 1")
    index = _weighted_index(arrays["source"], keep, sources)
    writer._write("index", index)
    counts["duplicate_rows"] = len(again)
    counts.update(tokenizer.counts - before)
    revisions = {p: r for p, _, _, r in sources if files.is_hub_name(p)}
    return _report(counts, arrays, keep, index) | {"revisions": revisions}
  finally:
    writer.close()
    rejected.close()


_COUNTED = (
    "rows_in", "rows_quarantined", "rows_skipped", "prompts_too_long",
    "truncated_prompts", "completions_too_long", "truncated_completions",
    "rows_without_candidates", "merged_completions", "merged_score_conflicts",
    "completions_without_tokens", "chosen_in_pool", "duplicate_rows",
    "special_token_text", "folded_system", "blank_lines", "bom", "crlf_lines",
)


def _report(counts, arrays, keep, index) -> dict[str, Any]:
  """Counts of what was met, of the kept rows and of the store."""
  scores, starts = arrays["score"], arrays["row_candidate"]
  sizes = np.diff(starts)
  some, top = sizes > 0, np.zeros(len(sizes), int)
  if some.any():  # reduceat does not know empty runs
    best = np.maximum.reduceat(scores, starts[:-1][some])
    top[some] = np.add.reduceat(
        scores == np.repeat(best, sizes[some]), starts[:-1][some])
  sizes = sizes[keep]
  return {name: int(counts[name]) for name in _COUNTED} | {
      "rows_used": len(keep),
      "rows": len(index),
      "completions": int(sizes.sum()),
      "candidates_min": int(sizes.min()),
      "candidates_mean": float(sizes.mean()),
      "candidates_max": int(sizes.max()),
      "tied_for_best": int((top[keep] > 1).sum()),
      "rows_without_contrast": int((arrays["contrast"][keep] == 0).sum()),
      "distinct_prompts": len(np.unique(arrays["prompt_hash"][keep])),
      "tokens": int(np.diff(arrays["row_start"])[keep].sum()),
  }


def training_texts(path: str, format: str = "auto") -> Iterator[str]:
  """The texts of a source, for a tokenizer to learn from."""
  for record in records.read_records(path, format=format):
    for part in [record.prompt, *record.completions]:
      messages = [{"content": part}] if isinstance(part, str) else part
      for message in messages:
        if message.get("content"):
          yield message["content"]
