"""The data report before any training: what is in the sources, and what is odd.

Bad rows are counted by slug, not raised; a file that cannot be read raises.
"""

import array
import collections
import hashlib
import re
from typing import Any

import numpy as np

from mcpo_jax import errors
from mcpo_jax.data import readers, records
from mcpo_jax.data.records import Record
from mcpo_jax.data.store import Source
from mcpo_jax.data.tokenizer import Tokenizer

MAX_PLACES = 5  # of bad rows that are named
JOINT_ROWS = 200  # whose tokenisation as one text is compared


def _text(part: str | readers.Messages) -> str:
  if isinstance(part, str):
    return part
  return "\n".join(m.get("content") or "" for m in part)


def _hash(text: str) -> int:
  digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
  return int.from_bytes(digest[:8], "little")


def normalise(text: str) -> str:
  """Lower case, words only, one blank between them."""
  return " ".join(re.findall(r"\w+", text.lower()))


def contradicts(record: Record) -> bool:
  """Whether a row's overall scores and ratings order some pair differently.

  Only UltraFeedback has both; see `readers.read_ultrafeedback`.
  """
  overall = record.columns.get("overall_scores")
  if not overall or any(not isinstance(x, int | float) for x in overall):
    return False
  left, right = np.array(overall, float), np.array(record.scores)
  return bool((np.sign(left[:, None] - left) * np.sign(
      right[:, None] - right) < 0).any())


class _Numbers:
  """Many small numbers, summed up at the end."""

  def __init__(self):
    self.values = array.array("d")

  def summary(self) -> dict[str, float] | None:
    if not self.values:
      return None
    values = np.frombuffer(self.values)
    return {"min": float(values.min()), "median": float(np.median(values)),
            "mean": float(values.mean()), "max": float(values.max())}


def _scan(
    sources: list[Source], tokenizer: Tokenizer | None, lengths: dict[str, Any]
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
  """Report of one side, and its prompts' hashes, exact and normalised."""
  counts: collections.Counter = collections.Counter()
  bad: collections.Counter = collections.Counter()
  origins: collections.Counter = collections.Counter()
  places: list[str] = []
  sizes, words, scores = _Numbers(), _Numbers(), _Numbers()
  prompt_tokens, completion_tokens = _Numbers(), _Numbers()
  exact, loose, rows = (array.array("Q") for _ in range(3))
  before = collections.Counter(tokenizer.counts) if tokenizer else None

  def look(record: Record) -> None:
    texts = [_text(c) for c in record.completions]
    sizes.values.append(len(texts))
    words.values.extend(len(t.split()) for t in texts)
    counts["duplicate_completions"] += len(texts) - len(set(texts))
    if record.scores:
      scores.values.extend(record.scores)
      counts["tied_for_best"] += record.scores.count(max(record.scores)) > 1
      counts["rows_without_contrast"] += len(set(record.scores)) < 2
    else:
      counts["rows_without_contrast"] += len(set(texts)) < 2
    counts["label_contradictions"] += contradicts(record)
    origins.update(record.sources or [])
    prompt = _text(record.prompt)
    exact.append(_hash(str(record.prompt)))
    loose.append(_hash(normalise(prompt)))
    rows.append(_hash(str((record.prompt, record.completions))))
    if tokenizer is not None:
      tokens(record)

  def tokens(record: Record) -> None:
    encoded = tokenizer.encode_record(record)
    prompt_tokens.values.append(len(encoded.prompt))
    counts["prompts_too_long"] += (
        len(encoded.prompt) > lengths["max_prompt_length"])
    for k, ids in enumerate(encoded.completions):
      completion_tokens.values.append(len(ids))
      cut = len(ids) > lengths["max_completion_length"]
      counts["completions_cut"] += cut
      counts["completions_with_end"] += (
          not cut and int(ids[-1]) in tokenizer.stop_ids)
      if counts["rows"] < JOINT_ROWS:
        counts["boundary_merges"] += tokenizer.joint_differs(encoded, k)

  for path, format, _, revision in sources:
    for _, record, _ in records.scan(
        path, format=format, revision=revision, counts=counts):
      counts["rows_in"] += 1
      error = record
      if isinstance(record, Record):
        error = None
        try:
          look(record)
        except errors.DataError as e:
          error = e
      if error is None:
        counts["rows"] += 1
      else:
        bad[error.slug] += 1
        if len(places) < MAX_PLACES:
          places.append(f"{error.slug} {error.where}")

  prompts = np.array(exact, np.uint64)
  report = {
      "rows_in": counts["rows_in"],
      "rows": counts["rows"],
      "bad_rows": dict(bad),
      "bad_places": places,
      "completions": int(sum(sizes.values)),
      "candidates": sizes.summary(),
      "words": words.summary(),
      "scores": scores.summary(),
      "origins": dict(origins.most_common(20)),
      "distinct_prompts": len(np.unique(prompts)),
      "duplicate_prompts": len(prompts) - len(np.unique(prompts)),
      "duplicate_rows": len(rows) - len(np.unique(np.array(rows, np.uint64))),
  }
  names = ["duplicate_completions", "tied_for_best", "rows_without_contrast",
           "label_contradictions", "blank_lines", "bom", "crlf_lines"]
  if tokenizer is not None:
    counts.update(tokenizer.counts - before)
    report |= {"prompt_tokens": prompt_tokens.summary(),
               "completion_tokens": completion_tokens.summary()}
    names += ["prompts_too_long", "completions_cut", "completions_with_end",
              "special_token_text", "folded_system", "boundary_merges"]
  report |= {name: int(counts[name]) for name in names}
  return report, prompts, np.array(loose, np.uint64)


def audit(
    train: list[Source],
    eval: list[Source] = (),
    *,
    tokenizer: Tokenizer | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
) -> tuple[dict[str, Any], str]:
  """Reads all sources once and reports what is in them.

  Args:
    train, eval: (path, format, weight, revision) each; weights are ignored.
    tokenizer: adds lengths in tokens, end tokens, spelled control tokens and
      how often one text would merge tokens at the boundary (the first
      JOINT_ROWS rows).
    max_prompt_length, max_completion_length: for what would be cut.

  Returns:
    report: "train", "eval" if there are such sources, and "overlap": eval rows
      whose prompt stands in train, "exact" and "normalised".
    text: the same to read.
  """
  most = {"max_prompt_length": max_prompt_length,
          "max_completion_length": max_completion_length}
  lengths = {k: np.inf if v is None else v for k, v in most.items()}
  report: dict[str, Any] = {}
  report["train"], exact, loose = _scan(list(train), tokenizer, lengths)
  if eval:
    report["eval"], other, other_loose = _scan(list(eval), tokenizer, lengths)
    report["overlap"] = {
        "exact": int(np.isin(other, exact).sum()),
        "normalised": int(np.isin(other_loose, loose).sum())}
  return report, format_report(report)


def _show(value: Any) -> str:
  if isinstance(value, dict) and {"min", "max"} <= value.keys():
    return " / ".join(f"{k} {v:.4g}" for k, v in value.items())
  if isinstance(value, dict):
    return ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
  if isinstance(value, list):
    return "; ".join(value) or "none"
  return "none" if value is None else str(value)


def format_report(report: dict[str, Any]) -> str:
  """The report as lines of text, one group per side."""
  lines = []
  for side, values in report.items():
    lines.append(side)
    lines += [f"  {name.replace('_', ' '):24}{_show(value)}"
              for name, value in values.items()]
  return "\n".join(lines)
