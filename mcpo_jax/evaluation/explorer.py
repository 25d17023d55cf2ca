"""The candidate explorer: a run's sets, candidates and draws in one HTML file.

A row is one set at one step:

  {"step", "prompt_id", "prompt": text, "candidates": [{"text", "score",
   "logp", "ref_logp" (nats, null where unknown), "weight" (of the kernel, 0
   outside its set), "drawn" (how often), "role" (1 chosen, -1 rejected, 0
   neither), "source", "policy_step", "multiplicity", "length" (tokens)}]}
"""

import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mcpo_jax import commit, errors, types
from mcpo_jax.data import files

PAGE = pathlib.Path(__file__).with_name("explorer.html")  # with two marks
_FIELDS = {"step", "prompt_id", "prompt", "candidates"}
_CANDIDATE_FIELDS = {
    "text", "score", "logp", "ref_logp", "weight", "drawn", "role", "source",
    "policy_step", "multiplicity", "length"}


def explorer_rows(
    step: int,
    sets: Sequence[types.CandidateSet],
    order: Sequence[Sequence[int]],
    meta: types.SetBatch,
    prompts: Sequence[Any],
    texts: Sequence[Sequence[str]],
    sources: Sequence[Sequence[str]],
    *,
    logps: np.ndarray | None,
    ref_logps: np.ndarray | None,
    log_weights: np.ndarray | None,
    selected: np.ndarray,
    selected_mask: np.ndarray,
) -> list[dict[str, Any]]:
  """The rows of one optimizer batch.

  Args:
    step: updates before this one.
    sets: the sets of the batch; `meta` and the arrays may have further rows.
    order: slot -> candidate of each set.
    meta: SetBatch [B, K] on the host.
    prompts: text or messages of each set.
    texts: of each set's candidates, in the set's own order.
    sources: where each candidate came from, likewise: "data" is of no policy.
    logps: [B, K] nats, of the policy; None: not scored at this step.
    ref_logps: [B, K] nats, of the reference; None: there is none.
    log_weights: [B, K] of the kernel, -inf outside its set; None: it has none.
    selected: [B, M] slots that were drawn.
    selected_mask: [B, M] bool, False: nothing was drawn there.

  Returns:
    One row per set; candidates in slot order, the preferred first.
  """
  rows = []
  for b, (one, slots, prompt) in enumerate(zip(sets, order, prompts)):
    drawn = np.bincount(selected[b][selected_mask[b]], minlength=len(slots))
    number = lambda values, k, b=b: (
        float(values[b, k])
        if values is not None and np.isfinite(values[b, k]) else None)
    rows.append({
        "step": step,
        "prompt_id": one.prompt_id,
        "prompt": prompt if isinstance(prompt, str) else "\n\n".join(
            f"{m['role']}: {m.get('content') or ''}" for m in prompt),
        "candidates": [{
            "text": texts[b][c],
            "score": number(meta.scores, k),
            "logp": number(logps, k),
            "ref_logp": number(ref_logps, k),
            "weight": 0.0 if log_weights is None else float(
                np.exp(log_weights[b, k])),
            "drawn": int(drawn[k]),
            "role": int(meta.role[b, k]),
            "source": sources[b][c],
            "policy_step": -1 if sources[b][c] == "data" else one.policy_step,
            "multiplicity": int(meta.multiplicity[b, k]),
            "length": int(meta.lengths[b, k]),
        } for k, c in enumerate(slots)]})
  return rows


def write_explorer(
    rows_path: pathlib.Path, out_path: pathlib.Path, title: str
) -> None:
  """Writes the page of a file of rows; it needs nothing but a browser.

  Args:
    rows_path: JSON Lines as of `explorer_rows`.
    out_path: of the HTML file, replaced at once.
    title: of the page.

  Raises:
    DataError: a line is no row; data.non_finite, a number is none.
  """
  rows = []
  for row in files.read_rows(str(rows_path)):
    if isinstance(row.value, errors.DataError):
      raise row.value
    rows.append(embed(row.value, row.where))
  page = PAGE.read_text("utf-8").replace("{{title}}", html.escape(title))
  # Last, so that no row is looked through for the other mark.
  page = page.replace("{{rows}}", f"[{','.join(rows)}]")
  commit.write_file(pathlib.Path(out_path), page)


def embed(row: dict[str, Any], where: str) -> str:
  """A row as JSON that may stand in a script element: no "<" ends it.

  Raises:
    DataError: data.field_missing, data.non_finite.
  """
  missing = _FIELDS - row.keys()
  for one in () if missing else row["candidates"]:
    missing |= _CANDIDATE_FIELDS - one.keys()
  if missing:
    raise errors.DataError(
        "data.field_missing", "not a row of the explorer", where=where,
        got=sorted(row), want=", ".join(sorted(missing)))
  try:
    text = json.dumps(row, allow_nan=False, separators=(",", ":"))
  except ValueError:
    raise errors.DataError(
        "data.non_finite", "a number of the row is not finite", where=where,
        hint="unknown numbers are null") from None
  return text.replace("<", "\\u003c")
