"""From a row of a known layout to a Record: one reader per layout.

A reader is `fn(row, where) -> Record`. It checks what it reads and raises
DataError with the field; what a layout calls good is always turned into
"higher is better".
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from mcpo_jax import errors

Messages = list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")


class Record(NamedTuple):
  """One prompt and what was said to it."""

  prompt: str | Messages
  completions: list[str | Messages]
  scores: list[float] | None  # higher is better
  preferred: int | None  # index of the preferred completion
  prompt_id: str  # the row's own, or a hash of the prompt
  sources: list[str] | None
  columns: dict[str, Any]  # further columns, for reward functions
  where: str  # "file:line"


def _fail(slug: str, message: str, where: str, field: str, **more: Any):
  return errors.DataError(slug, message, where=f"{where}, {field}", **more)


def _take(row: dict[str, Any], field: str, where: str) -> Any:
  if field in row:
    return row[field]
  near = difflib.get_close_matches(field, row, n=1)
  raise _fail(
      "data.field_missing", "the row lacks a field", where, field,
      got=sorted(row), want=field,
      hint=f"did you mean {near[0]}?" if near else "")


def _typed(value: Any, kind: type | tuple, want: str, where: str, field: str):
  if isinstance(value, bool) and kind is not bool or not isinstance(
      value, kind):
    raise _fail("data.field_type", "a field has the wrong type", where, field,
                got=type(value).__name__, want=want)
  return value


def _text(value: Any, where: str, field: str) -> str:
  _typed(value, str, "text", where, field)
  if not value.strip():
    raise _fail("data.empty", "the text is empty", where, field)
  return value


def _number(value: Any, where: str, field: str) -> float:
  _typed(value, (int, float), "a number", where, field)
  if not math.isfinite(value):
    raise _fail("data.non_finite", "a number is not finite", where, field,
                got=str(value))
  return float(value)


def _list(value: Any, where: str, field: str) -> list:
  return _typed(value, list, "a list", where, field)


def _one_per_completion(
    value: Any, count: int, where: str, field: str, want: str
) -> list:
  if len(_list(value, where, field)) != count:
    raise _fail("data.length_mismatch", want, where, field, got=len(value),
                want=count)
  return value


def check_messages(
    messages: Any, where: str, field: str, *, last: tuple[str, ...]
) -> Messages:
  """Checks the order of roles.

  Args:
    messages: what stands in the row.
    where, field: for the error.
    last: roles that may end the list.

  Raises:
    DataError: data.field_type, data.empty, data.chat_roles.
  """
  _list(messages, where, field)
  if not messages:
    raise _fail("data.empty", "no message", where, field)
  previous = None
  for turn, message in enumerate(messages):
    place = f"{field}[{turn}]"
    _typed(message, dict, "a message", where, place)
    role = message.get("role")
    wrong = None
    if role not in ROLES:
      wrong = "unknown role"
    elif role in ("system", "developer") and turn:
      wrong = "a system message after the first turn"
    elif role == "user" and previous == "user":
      wrong = "two user turns in a row"
    elif role == "assistant" and previous == "assistant":
      wrong = "two assistant turns in a row"
    elif role == "tool" and previous not in ("assistant", "tool"):
      wrong = "a tool message that answers no assistant"
    if wrong:
      raise _fail("data.chat_roles", f"{wrong} at turn {turn}", where, place,
                  got=role)
    content = message.get("content")
    if not (content is None and message.get("tool_calls")):
      _typed(content, str, "text", where, f"{place}.content")
      if not content.strip() and role != "system" and not message.get(
          "tool_calls"):
        raise _fail("data.empty", "the text is empty", where,
                    f"{place}.content")
    previous = role
  if previous not in last:
    raise _fail(
        "data.chat_roles", f"the last turn, {len(messages) - 1}, has the "
        "wrong role", where, f"{field}[{len(messages) - 1}]", got=previous,
        want=" or ".join(last))
  return messages


def _prompt(value: Any, where: str, field: str = "prompt") -> str | Messages:
  if isinstance(value, list):
    return check_messages(value, where, field, last=("user", "tool"))
  return _text(value, where, field)


def _completion(value: Any, where: str, field: str) -> str | Messages:
  """Text, or messages that end with the assistant; one plain one is text."""
  if not isinstance(value, list):
    return _text(value, where, field)
  check_messages(value, where, field, last=("assistant",))
  if len(value) == 1 and not value[0].get("tool_calls"):
    return value[0]["content"]
  return value


def hash_id(content: Any) -> str:
  """16 hex digits of some JSON; of the prompt, a name where none is given."""
  text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
  return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _record(
    row: dict[str, Any],
    where: str,
    used: tuple[str, ...],
    *,
    prompt: str | Messages,
    completions: list[str | Messages],
    scores: list[float] | None = None,
    preferred: int | None = None,
    sources: list[str] | None = None,
) -> Record:
  if not completions:
    raise _fail("data.too_few_candidates", "the row has no candidates", where,
                "completions", got=0, want="at least 1")
  identity = row.get("prompt_id")
  if identity is None:
    identity = hash_id(prompt)
  elif not isinstance(identity, str | int):
    raise _fail("data.field_type", "a field has the wrong type", where,
                "prompt_id", got=type(identity).__name__, want="text")
  logps = row.get("ref_logps")
  if logps is not None:
    _one_per_completion(logps, len(completions), where, "ref_logps",
                        "one number per completion")
    for i, value in enumerate(logps):
      _number(value, where, f"ref_logps[{i}]")
  columns = {k: v for k, v in row.items()
             if k not in used and k not in ("prompt_id", "sources")}
  return Record(prompt, completions, scores, preferred, str(identity), sources,
                columns, where)


def _numbers(row, field, where, count) -> list[float]:
  values = _one_per_completion(_take(row, field, where), count, where, field,
                               "one number per completion")
  return [_number(v, where, f"{field}[{i}]") for i, v in enumerate(values)]


def read_native(row: dict[str, Any], where: str) -> Record:
  """`prompt`, `completions` and one of three judgements.

  Rank direction: `scores` higher is better; `ranks` 1 is best; `preferred` is
  an index.

  `finish_reasons`, one per completion, say of what a model wrote how it ended:
  after "length" no end token follows the text. Such a completion may be empty.
  """
  prompt = _prompt(_take(row, "prompt", where), where)
  texts = _list(_take(row, "completions", where), where, "completions")
  count = len(texts)
  reasons = _one_per_completion(
      row.get("finish_reasons") or [None] * count, count, where,
      "finish_reasons", "one reason per completion")
  for i, reason in enumerate(reasons):
    if reason not in (None, "stop", "length"):
      raise _fail("data.field_type", "no such reason", where,
                  f"finish_reasons[{i}]", got=reason, want="stop or length")
  completions = [
      text if reason is not None and isinstance(text, str)
      else _completion(text, where, f"completions[{i}]")
      for i, (text, reason) in enumerate(zip(texts, reasons))]
  scores = preferred = None
  if row.get("scores") is not None:
    scores = _numbers(row, "scores", where, count)
  elif row.get("ranks") is not None:
    scores = [-r for r in _numbers(row, "ranks", where, count)]
  elif row.get("preferred") is None:
    _take(row, "scores", where)
    raise _fail("data.field_type", "no judgement: scores, ranks and preferred "
                "are all absent", where, "scores", got=None, want="a list")
  if row.get("preferred") is not None:
    preferred = _typed(row["preferred"], int, "an index", where, "preferred")
    if not 0 <= preferred < max(count, 1):
      raise _fail("data.index_range", "the index names no completion", where,
                  "preferred", got=preferred, want=f"0 to {count - 1}")
  sources = row.get("sources")
  if sources is not None:
    sources = [str(s) for s in _one_per_completion(
        sources, count, where, "sources", "one source per completion")]
  return _record(
      row, where, ("prompt", "completions", "scores", "ranks", "preferred"),
      prompt=prompt, completions=completions, scores=scores,
      preferred=preferred, sources=sources)


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


def parse_transcript(text: str, where: str, field: str) -> Messages:
  r"""Messages of "\n\nHuman: ...\n\nAssistant: ...".

  An empty last assistant turn is the mark where an answer begins, and is left
  out.

  Raises:
    DataError: data.chat_roles if the text does not begin with a turn.
  """
  marks = list(_TURN.finditer(text))
  if not marks or text[: marks[0].start()].strip():
    raise _fail("data.chat_roles", "the text begins with no turn at turn 0",
                where, field, want="'\\n\\nHuman: ' first")
  messages = []
  for mark, end in zip(marks, [m.start() for m in marks[1:]] + [len(text)]):
    role = "user" if mark[1] == "Human" else "assistant"
    messages.append({"role": role, "content": text[mark.end() : end].strip()})
  if messages[-1] == {"role": "assistant", "content": ""}:
    messages.pop()
  return messages


def _is_transcript(value: Any) -> bool:
  return isinstance(value, str) and bool(
      re.match(r"\s*Human:", value)) and "Assistant:" in value


def _split_pair(chosen, rejected, where) -> tuple[Messages, list, list]:
  """The prompt that two conversations share, and their two ends."""
  same = 0
  while same < min(len(chosen), len(rejected)) and (
      chosen[same] == rejected[same]):
    same += 1
  if same == len(chosen) or same == len(rejected):
    same = min(len(chosen), len(rejected)) - 1  # equal, or one continues
  while same and chosen[same - 1].get("role") == "assistant":
    same -= 1
  if not same:
    raise _fail("data.prompt_mismatch", "chosen and rejected share no prompt",
                where, "rejected", want="the same first turns")
  return chosen[:same], chosen[same:], rejected[same:]


def read_pairs(row: dict[str, Any], where: str) -> Record:
  """`chosen` and `rejected`, with `prompt` or with the prompt inside them.

  Each is text or messages. Rank direction: chosen is better; `score_chosen`
  and `score_rejected`, where both are there, are kept if they say the same,
  higher is better.
  """
  chosen = _take(row, "chosen", where)
  rejected = _take(row, "rejected", where)
  prompt = row.get("prompt")
  if isinstance(chosen, list) and isinstance(rejected, list):
    check_messages(chosen, where, "chosen", last=("assistant",))
    check_messages(rejected, where, "rejected", last=("assistant",))
    given = prompt
    if len(chosen) > 1 or len(rejected) > 1:
      if isinstance(given, list):
        _prompt(given, where)
        size = len(given)
        if chosen[:size] == given and rejected[:size] == given:
          chosen, rejected = chosen[size:], rejected[size:]
      else:
        prompt, chosen, rejected = _split_pair(chosen, rejected, where)
        if isinstance(given, str) and (
            prompt[-1]["content"].strip() != given.strip()):
          raise _fail("data.prompt_mismatch", "the prompt is not the turn "
                      "before the completions", where, "prompt")
  elif prompt is None and _is_transcript(chosen):
    return read_hh(row, where)
  if prompt is None:
    prompt = _take(row, "prompt", where)
  scores = [1.0, 0.0]
  used = ("prompt", "chosen", "rejected")
  marks = ("score_chosen", "score_rejected")
  if all(row.get(name) is not None for name in marks):
    scores = [_number(row[name], where, name) for name in marks]
    used += marks
    if scores[0] < scores[1]:
      raise _fail("data.score_contradiction", "the rejected completion has the "
                  "higher score", where, "score_rejected", got=scores[1],
                  want=f"at most {scores[0]}")
  return _record(
      row, where, used, prompt=_prompt(prompt, where),
      completions=[_completion(chosen, where, "chosen"),
                   _completion(rejected, where, "rejected")],
      scores=scores)


def read_hh(row: dict[str, Any], where: str) -> Record:
  """HH transcripts: `chosen` and `rejected` hold whole conversations.

  Rank direction: chosen is better.
  """
  sides = []
  for field in ("chosen", "rejected"):
    text = _text(_take(row, field, where), where, field)
    messages = parse_transcript(text, where, field)
    check_messages(messages, where, field, last=("assistant",))
    sides.append(messages)
  prompt, chosen, rejected = _split_pair(*sides, where)
  return _record(
      row, where, ("chosen", "rejected"),
      prompt=check_messages(prompt, where, "chosen", last=("user",)),
      completions=[_completion(chosen, where, "chosen"),
                   _completion(rejected, where, "rejected")],
      scores=[1.0, 0.0])


def read_nectar(row: dict[str, Any], where: str) -> Record:
  """Nectar: a transcript and `answers` [{answer, model, rank}].

  Rank direction: `rank` 1 is best; scores are the negated ranks.
  """
  text = _text(_take(row, "prompt", where), where, "prompt")
  prompt = (parse_transcript(text, where, "prompt") if _is_transcript(text)
            else [{"role": "user", "content": text}])
  answers = _list(_take(row, "answers", where), where, "answers")
  completions, scores, sources = [], [], []
  for i, answer in enumerate(answers):
    field = f"answers[{i}]"
    _typed(answer, dict, "an object", where, field)
    completions.append(_text(_take(answer, "answer", where), where,
                             f"{field}.answer"))
    scores.append(-_number(_take(answer, "rank", where), where,
                           f"{field}.rank"))
    sources.append(str(answer.get("model", "")))
  return _record(
      row, where, ("prompt", "answers"),
      prompt=check_messages(prompt, where, "prompt", last=("user",)),
      completions=completions, scores=scores, sources=sources)


def ultrafeedback_rating(completion: dict[str, Any]) -> float | None:
  """Mean of the numeric aspect ratings, None if there is none."""
  ratings = []
  for aspect in (completion.get("annotations") or {}).values():
    value = aspect.get("Rating") if isinstance(aspect, dict) else None
    try:
      ratings.append(float(value))
    except (TypeError, ValueError):
      continue  # "N/A"
  ratings = [r for r in ratings if math.isfinite(r)]
  return sum(ratings) / len(ratings) if ratings else None


def read_ultrafeedback(row: dict[str, Any], where: str) -> Record:
  """UltraFeedback raw: `instruction`, `completions` [{response, ...}].

  Rank direction: higher is better. The score is the mean of the numeric aspect
  ratings (1 to 5). `overall_score` is not used: in the published set some
  answers rated 1 carry an overall_score of 10. It is kept as the column
  `overall_scores`, so that the audit can count what contradicts.
  """
  text = _text(_take(row, "instruction", where), where, "instruction")
  answers = _list(_take(row, "completions", where), where, "completions")
  completions, scores, sources = [], [], []
  for i, answer in enumerate(answers):
    field = f"completions[{i}]"
    _typed(answer, dict, "an object", where, field)
    completions.append(_text(_take(answer, "response", where), where,
                             f"{field}.response"))
    _typed(answer.get("annotations") or {}, dict, "an object", where,
           f"{field}.annotations")
    rating = ultrafeedback_rating(answer)
    if rating is None:
      raise _fail("data.field_missing", "no aspect has a numeric Rating", where,
                  f"{field}.annotations")
    scores.append(rating)
    sources.append(str(answer.get("model", "")))
  record = _record(
      row, where, ("instruction", "completions"),
      prompt=[{"role": "user", "content": text}], completions=completions,
      scores=scores, sources=sources)
  overall = [answer.get("overall_score") for answer in answers]
  return record._replace(columns=record.columns | {"overall_scores": overall})


def read_generated_responses(row: dict[str, Any], where: str) -> Record:
  """`all_generated_responses` with `all_rm_scores`.

  Rank direction: a reward model's score, higher is better.
  """
  prompt = _prompt(_take(row, "prompt", where), where)
  name = "all_generated_responses"
  texts = _list(_take(row, name, where), where, name)
  completions = [_completion(text, where, f"{name}[{i}]")
                 for i, text in enumerate(texts)]
  scores = _numbers(row, "all_rm_scores", where, len(completions))
  return _record(row, where, ("prompt", name, "all_rm_scores", "chosen",
                              "rejected"),
                 prompt=prompt, completions=completions, scores=scores)


def read_nemo(row: dict[str, Any], where: str) -> Record:
  """NeMo: `context` and `completions` [{rank, completion}].

  Rank direction: the lower rank is better (0 is best).
  """
  prompt = _prompt(_take(row, "context", where), where, "context")
  entries = _list(_take(row, "completions", where), where, "completions")
  completions, scores = [], []
  for i, entry in enumerate(entries):
    field = f"completions[{i}]"
    _typed(entry, dict, "an object", where, field)
    completions.append(_completion(_take(entry, "completion", where), where,
                                   f"{field}.completion"))
    scores.append(-_number(_take(entry, "rank", where), where,
                           f"{field}.rank"))
  return _record(row, where, ("context", "completions"), prompt=prompt,
                 completions=completions, scores=scores)


def read_unpaired(row: dict[str, Any], where: str) -> Record:
  """`prompt`, `completion`, `label`: one judged completion.

  Rank direction: label true is good (score 1), false is bad (score 0).
  """
  label = _typed(_take(row, "label", where), bool, "true or false", where,
                 "label")
  return _record(
      row, where, ("prompt", "completion", "label"),
      prompt=_prompt(_take(row, "prompt", where), where),
      completions=[_completion(_take(row, "completion", where), where,
                               "completion")],
      scores=[float(label)])


def read_sft(row: dict[str, Any], where: str) -> Record:
  """`messages` that end with the assistant, or `prompt` and `completion`.

  Rank direction: none; the one completion is the preferred one.
  """
  if "messages" in row:
    messages = check_messages(row["messages"], where, "messages",
                              last=("assistant",))
    prompt, completion = messages[:-1], messages[-1:]
    if not prompt:
      raise _fail("data.chat_roles", "no user turn before turn 0", where,
                  "messages[0]", got="assistant")
    used: tuple[str, ...] = ("messages",)
  else:
    prompt = _take(row, "prompt", where)
    completion = _take(row, "completion", where)
    used = ("prompt", "completion")
  return _record(
      row, where, used, prompt=_prompt(prompt, where),
      completions=[_completion(completion, where, "completion")], preferred=0)


def _ids(value: Any, where: str, field: str) -> list[int]:
  _list(value, where, field)
  if not value:
    raise _fail("data.empty", "no token", where, field)
  for i, token in enumerate(value):
    _typed(token, int, "a token id", where, f"{field}[{i}]")
    if not -2**31 <= token < 2**31:
      raise _fail("data.token_range", "no token has such an id", where,
                  f"{field}[{i}]", got=token)
  return value


def read_tokens(row: dict[str, Any], where: str) -> Record:
  """Tokenised already: `prompt_ids` and `completion_ids` [K lists].

  Optional `completion_masks` (K lists of 0 and 1, 1 is scored). Ids are checked
  against the vocabulary later. Rank direction: as in the native layout;
  `scores` higher is better, `ranks` 1 is best, `preferred` an index.
  """
  prompt = _ids(_take(row, "prompt_ids", where), where, "prompt_ids")
  ids = _list(_take(row, "completion_ids", where), where, "completion_ids")
  ids = [_ids(c, where, f"completion_ids[{i}]") for i, c in enumerate(ids)]
  masks = row.get("completion_masks")
  masks = [[1] * len(c) for c in ids] if masks is None else _list(
      masks, where, "completion_masks")
  if len(masks) != len(ids):
    raise _fail("data.mask", "one mask per completion", where,
                "completion_masks", got=len(masks), want=len(ids))
  for i, (mask, tokens) in enumerate(zip(masks, ids)):
    field = f"completion_masks[{i}]"
    if not isinstance(mask, list) or len(mask) != len(tokens):
      raise _fail("data.mask", "one mark per token", where, field,
                  got=len(mask) if isinstance(mask, list) else None,
                  want=len(tokens))
    if any(m not in (0, 1) for m in mask) or not any(mask):
      raise _fail("data.mask", "marks are 0 or 1 and not all 0", where, field)
  names = [f"tokens {i}" for i in range(len(ids))]
  record = read_native(row | {"prompt": "tokens", "completions": names}, where)
  return record._replace(
      prompt="", completions=[""] * len(ids),
      prompt_id=str(row.get("prompt_id") or hash_id(prompt)),
      columns=record.columns | {"completion_masks": masks})


def read_prompts(row: dict[str, Any], where: str) -> Record:
  """`prompt` alone, to be answered.

  Rank direction: none, there is no completion.
  """
  prompt = _prompt(_take(row, "prompt", where), where)
  return _record(row, where, ("prompt",), prompt=prompt,
                 completions=[""])._replace(completions=[])


READERS: dict[str, Callable[[dict[str, Any], str], Record]] = {
    "native": read_native,
    "pairs": read_pairs,
    "nectar": read_nectar,
    "ultrafeedback": read_ultrafeedback,
    "generated_responses": read_generated_responses,
    "nemo": read_nemo,
    "hh": read_hh,
    "unpaired": read_unpaired,
    "sft": read_sft,
    "tokens": read_tokens,
    "prompts": read_prompts,
}


def recognise(row: dict[str, Any], where: str) -> str:
  """The layout that the columns of a row show.

  Raises:
    DataError: data.field_missing with the columns found.
  """
  has = row.keys()
  if {"prompt_ids", "completion_ids"} <= has:
    return "tokens"
  if "all_generated_responses" in has:
    return "generated_responses"
  if "answers" in has:
    return "nectar"
  if "context" in has and "completions" in has:
    return "nemo"
  if "instruction" in has and "completions" in has:
    return "ultrafeedback"
  if "completions" in has:
    return "native"
  if "chosen" in has or "rejected" in has:
    if "prompt" not in has and _is_transcript(row.get("chosen")):
      return "hh"
    return "pairs"
  if "completion" in has and "label" in has:
    return "unpaired"
  if "completion" in has or "messages" in has:
    return "sft"
  if "prompt" in has:
    return "prompts"
  raise no_layout(has, where, "the columns show no known layout")


def no_layout(
    columns: Iterable[str], where: str, message: str
) -> errors.DataError:
  """The refusal of a row whose columns say too little, data.field_missing."""
  known = ("prompt", "completions", "chosen", "rejected", "completion",
           "messages", "answers", "instruction")
  near = next((f"did you mean {m[0]} for {name}? " for name in columns if (
      m := difflib.get_close_matches(name, known, n=1)) and m[0] != name), "")
  return errors.DataError(
      "data.field_missing", message, where=where, got=sorted(columns),
      want="prompt with completions, or chosen and rejected",
      hint=f"{near}layouts: {', '.join(READERS)}")
