"""Text to token ids: chat templates, joined at id level, with spans scored.

Prompt ids are the rendered template up to where the assistant begins;
completion ids are tokenised on their own and end with one end-of-turn token,
the template's own if it has one, else EOS. So a prompt and its completions
always meet at the same place, and masks come from spans, never from ids.

Text of users and models that spells a control token ("<|im_end|>") is encoded
as plain text: the string is cut after its first character before tokenising.
"""

import collections
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from mcpo_jax import commit, errors
from mcpo_jax.data import templates
from mcpo_jax.data.readers import Messages, Record

# What `load_tokenizer` and `train_tokenizer` take for "no template".
NO_TEMPLATE = "none"

DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'system' %}<|system|>{{ message['content'] }}"
    "{% elif message['role'] == 'tool' %}<|tool|>{{ message['content'] }}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# "Today" for templates that ask: the day that Llama 3.1's template names where
# it is given none.
DEFAULT_DATE = "2024-07-26"

_PROBE = "zqprobeqz"
_BREAK = "\ufdd0\ufdd1"  # noncharacters: no text for interchange holds them
_THINK = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
# What looks like a control token in a template: <|x|>, <start_of_x>, [INST].
_TURN_MARK = re.compile(r"<\|[^|<>]+\|>|</?[a-z]+_of_[a-z]+>|\[/?[A-Z]{3,}\]")
_THINK_TAGS = ("<think>", "</think>")


class Encoded(NamedTuple):
  """A record as token ids, nothing cut yet."""

  prompt: np.ndarray  # [P] int32
  completions: list[np.ndarray]  # K arrays [C_k] int32, with the end token
  masks: list[np.ndarray]  # K arrays [C_k] bool, True = scored


class _Piece(NamedTuple):
  text: str
  scored: bool
  end: int | None = None  # token id that follows the text


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A Hugging Face tokenizer with its chat template and our settings.

  Attributes:
    hf: the transformers tokenizer.
    template: chat template or None for plain text.
    template_kwargs: further variables of the template.
    date: ISO day that templates take for today.
    think: "keep", "strip" or "mask" `<think>…</think>` in completions.
    scored: "last" assistant turn or "all" of them.
    special_text: "plain" encodes spelled control tokens as text, "control"
      lets them be control tokens.
    bos: "auto" asks that BOS stands once where the tokenizer adds one, "add"
      puts it there, "none" does not look.
    adds_bos: whether plain text gets BOS from the tokenizer itself.
    prefixes_space: whether it puts a blank before a text (SentencePiece).
    controls: finds control tokens that are spelled out in a text.
    end_id: the token that ends a completion.
    counts: what was met so far ("special_token_text", "folded_system").
  """

  hf: Any
  template: str | None
  template_kwargs: dict[str, Any]
  date: str
  think: str
  scored: str
  special_text: str
  bos: str
  adds_bos: bool
  prefixes_space: bool
  controls: re.Pattern[str] | None
  end_id: int
  counts: collections.Counter

  @property
  def bos_id(self) -> int | None:
    return self.hf.bos_token_id

  @property
  def eos_id(self) -> int:
    return self.hf.eos_token_id

  @property
  def pad_id(self) -> int:
    """Fills empty slots; no mask depends on it, so EOS will do."""
    pad = self.hf.pad_token_id
    return self.eos_id if pad is None else pad

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """Tokens that end a completion: EOS and the template's end of turn."""
    return tuple(sorted({self.eos_id, self.end_id}))

  @property
  def vocab_size(self) -> int:
    """Number of ids: one more than the highest."""
    return max(len(self.hf), max(self.hf.get_vocab().values()) + 1)

  @property
  def key(self) -> str:
    """Hex hash of all that decides the ids."""
    parts = {
        "vocab": self.hf.backend_tokenizer.to_str(),
        "special": self.hf.special_tokens_map,
        "template": self.template,
        "kwargs": self.template_kwargs,
        "settings": [self.date, self.think, self.scored, self.special_text,
                     self.bos],
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes the tokenizer and its template as transformers loads them."""
    self.hf.save_pretrained(str(folder))

  def decode(self, ids: Iterable[int]) -> str:
    """Text of ids without control tokens."""
    return self.hf.decode([int(i) for i in ids], skip_special_tokens=True)

  @property
  def opens_thinking(self) -> bool:
    """Whether prompts end in <think>: completions begin in a thought."""
    if self.template is None:
      return False
    message = {"role": "user", "content": "x"}
    text = self._render([message], None, "prompt")
    return text.rstrip().endswith("<think>")

  def encode_prompt(
      self,
      prompt: str | Messages,
      *,
      tools: list[dict[str, Any]] | None = None,
      where: str = "prompt",
  ) -> np.ndarray:
    """Ids [P] int32 of a prompt, up to where the assistant begins.

    Raises:
      DataError: data.chat_template, data.bos.
      ModelDirError: hf.template, the template uses too much.
    """
    _, text = self._open(prompt, tools, where)
    return self._prompt_ids(text, where)

  def encode_record(self, record: Record) -> Encoded:
    """Ids of a prompt and all its completions.

    Raises:
      DataError: data.chat_template, data.template_prefix, data.bos, data.empty
        (nothing is left after reasoning was stripped), data.token_range is not
        looked at here.
    """
    columns, where = record.columns, record.where
    if record.prompt == "" and "prompt_ids" in columns:  # tokenised already
      return Encoded(
          np.array(columns["prompt_ids"], np.int64),
          [np.array(c, np.int64) for c in columns["completion_ids"]],
          [np.array(m, bool) for m in columns["completion_masks"]])
    tools = columns.get("tools") or None
    prompt, earlier = record.prompt, []
    if self.scored == "all" and isinstance(prompt, list):
      start = next((i for i, m in enumerate(prompt)
                    if m["role"] == "assistant"), len(prompt))
      prompt, earlier = prompt[:start], prompt[start:]
    messages, text = self._open(prompt, tools, where)
    probes: dict[int, str] = {}
    pieces = [
        self._completion(messages, text, earlier, completion, tools, probes,
                         f"{where}, completions[{k}]")
        for k, completion in enumerate(record.completions)
    ]
    return Encoded(self._prompt_ids(text, where), *self._join(pieces))

  def joint_differs(self, encoded: Encoded, k: int) -> bool:
    """Whether tokenising prompt and completion k as one text merges them."""
    pair = [int(i) for i in [*encoded.prompt, *encoded.completions[k]]]
    text = self.hf.decode(pair, skip_special_tokens=False)
    return self._encode([text])[0] != pair

  # Rendering.

  def render(
      self,
      messages: Messages,
      *,
      tools: list[dict[str, Any]] | None,
      add_generation_prompt: bool,
  ) -> str:
    """The template's text, from transformers' sandbox, with a fixed today.

    Raises:
      templates.TemplateError, ModelDirError: see `templates.render`.
    """
    kwargs = dict(self.template_kwargs)
    day = datetime.date.fromisoformat(self.date)
    kwargs.setdefault("date_string", day.strftime("%d %b %Y"))
    if self.template == DEFAULT_CHAT_TEMPLATE:  # our own needs no guard
      try:
        return self.hf.apply_chat_template(
            messages, tools=tools, tokenize=False, chat_template=self.template,
            add_generation_prompt=add_generation_prompt, **kwargs)
      except Exception as e:  # as the guarded ones
        raise templates.TemplateError(type(e).__name__, str(e)) from None
    return templates.render(
        _freeze(self.template, day), messages, tools=tools,
        add_generation_prompt=add_generation_prompt,
        **self.hf.special_tokens_map | kwargs)

  def _open(self, prompt, tools, where) -> tuple[Messages, str]:
    """Messages with broken control text, and the rendered prompt."""
    if isinstance(prompt, str):
      prompt = [{"role": "user", "content": prompt}]
    if self.template is None:
      if len(prompt) > 1 or tools:
        raise errors.DataError(
            "data.chat_template", "several turns need a chat template",
            where=f"{where}, prompt", got=f"{len(prompt)} messages",
            want="one user turn", hint="set tokenizer.chat_template")
      return [], self._plain(prompt[0]["content"], where)
    messages = self._plain(prompt, where)
    text = None
    try:
      text = self._render(messages, tools, where)
    except errors.DataError:
      if messages[0]["role"] != "system":
        raise
    if messages[0]["role"] == "system" and (
        text is None or messages[0]["content"].strip() not in text):
      messages = _fold_system(messages, where)
      self.counts["folded_system"] += 1
      text = self._render(messages, tools, where)
    return messages, text

  def _render(self, messages, tools, where, add_generation_prompt=True) -> str:
    try:
      return self.render(messages, tools=tools,
                         add_generation_prompt=add_generation_prompt)
    except templates.TemplateError as e:
      raise errors.DataError(  # what the template says may hold the prompt
          "data.chat_template", f"the chat template refuses the messages: "
          f"{e.kind}", where=where, hint="set tokenizer.chat_template"
      ) from None
    except errors.ModelDirError as e:
      e.where = where
      raise

  def _plain(self, value: Any, where: str) -> Any:
    """Breaks spelled control tokens in every text of a value."""
    if isinstance(value, str):
      if _BREAK[0] in value:
        raise errors.DataError(
            "data.encoding", "the text holds the noncharacter U+FDD0",
            where=where)
      if self.special_text == "control" or self.controls is None:
        return value
      text, count = self.controls.subn(
          lambda m: m[0][0] + _BREAK + m[0][1:], value)
      self.counts["special_token_text"] += count
      return text
    if isinstance(value, dict):
      # A content of None, beside tool calls, is taken out by transformers, and
      # templates that ask for it fail: it becomes an empty one.
      return {k: v if k == "role" else "" if k == "content" and v is None
              else self._plain(v, where) for k, v in value.items()}
    if isinstance(value, list):
      return [self._plain(v, where) for v in value]
    return value

  # Completions.

  def _completion(
      self, messages, opened, earlier, completion, tools, probes, where
  ) -> list[_Piece]:
    """The text of one completion, in pieces that are scored or not.

    Args:
      messages, opened: the prompt and its rendered text.
      earlier: turns before the completion that are not in the prompt.
      completion: text or turns.
      tools: for the template.
      probes: rendered assistant turns after `earlier`, shared by the
        completions of a record.
      where: for errors.
    """
    turns = [*earlier]
    turns += (completion if isinstance(completion, list) else
              [{"role": "assistant", "content": completion}])
    if self.template is None:
      if len(turns) > 1 or turns[0].get("tool_calls"):
        raise errors.DataError(
            "data.chat_template", "several turns need a chat template",
            where=where, hint="set tokenizer.chat_template")
      text = self._plain(turns[0]["content"], where)
      return [*self._reasoned("", text, "", where),
              _Piece("", True, self.end_id)]
    return self._turn_pieces(
        messages, opened, self._plain(turns, where), tools,
        probes if isinstance(completion, str) else {}, where)

  def _turn_pieces(
      self, messages, done, turns, tools, probes, where
  ) -> list[_Piece]:
    """Spans of all turns after the prompt, context unscored between them."""
    pieces = []
    for j, turn in enumerate(turns):
      last = j == len(turns) - 1
      if turn["role"] != "assistant" or not (last or self.scored == "all"):
        continue
      history = [*messages, *turns[:j]]
      before = self._render(history, tools, where) if j else done
      pieces.append(_Piece(_suffix(before, done, where), False))
      content, probe = turn.get("content") or "", turn
      called = bool(turn.get("tool_calls"))
      if not called:
        probe = {**turn, "content": _PROBE}
      if called or j not in probes:
        full = self._render([*history, probe], tools, where,
                            add_generation_prompt=False)
        probes[j] = _suffix(full, before, where)
      said = probes[j]
      if called:
        body, tail, end = self._cut_end(said, search_last=True)
        pieces += [_Piece(body, True), _Piece("", True, end)]
        done = before + body + tail
        continue
      lead, found, tail = said.partition(_PROBE)
      if not found or _PROBE in tail:
        raise errors.DataError(
            "data.chat_template", "the template does not show an assistant "
            "turn once", where=where, hint="set tokenizer.chat_template")
      body, shown, end = self._cut_end(tail, search_last=False)
      if "<think>" in lead and "</think>" in content and self.think != "strip":
        lead = lead[: lead.index("<think>")]
      pieces += [*self._reasoned(lead, content, body, where),
                 _Piece("", True, end)]
      done = before + lead + content + body + shown
    return pieces

  def _cut_end(self, text: str, *, search_last: bool) -> tuple[str, str, int]:
    """(text before the end-of-turn, its string, its id) of a turn's text."""
    if self.controls is not None:
      marks = list(self.controls.finditer(text))
      if marks:
        mark = marks[-1 if search_last else 0]
        if not search_last or not text[mark.end() :].strip():
          return text[: mark.start()], mark[0], (
              self.hf.convert_tokens_to_ids(mark[0]))
    return text.rstrip(), "", self.eos_id

  def _reasoned(self, lead, text, body, where) -> list[_Piece]:
    """A completion's text as pieces, reasoning kept, removed or unscored."""
    if self.think == "strip":
      text = _THINK.sub("", text)
      text = text.split("</think>")[-1].lstrip() if "</think>" in text else text
      if not text.strip():
        raise errors.DataError(
            "data.empty", "nothing is left after the reasoning was stripped",
            where=where)
    text = lead + text + body
    if self.think != "mask":
      return [_Piece(text, True)]
    pieces, start = [], 0
    for mark in _THINK.finditer(text):
      pieces += [_Piece(text[start : mark.start()], True),
                 _Piece(mark[0], False)]
      start = mark.end()
    if not pieces and "</think>" in text:  # the prompt opened it
      start = text.index("</think>") + len("</think>")
      pieces.append(_Piece(text[:start], False))
    return [*pieces, _Piece(text[start:], True)]

  # Ids.

  def _prompt_ids(self, text: str, where: str) -> np.ndarray:
    head, *broken = text.split(_BREAK)
    ids = self._encode([head])[0]
    for more in self._inner_ids(broken):
      ids = ids + more
    bos = self.bos_id
    wanted = bos is not None and self.adds_bos and self.bos != "none"
    if wanted and ids[:1] != [bos] and (
        self.template is None or self.bos == "add"):
      ids = [bos, *ids]
    twice = bos is not None and ids[:2] == [bos, bos]
    if twice or wanted and ids[:1] != [bos]:
      raise errors.DataError(
          "data.bos", "BOS stands twice" if twice else "BOS is missing",
          where=f"{where}, prompt", got=ids[:3], want=f"{bos} once",
          hint="set a tokenizer.chat_template that begins with bos_token")
    return np.array(ids, np.int64)

  def _join(
      self, completions: list[list[_Piece]]
  ) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids and scored masks of completions that are given in pieces."""
    encoded = iter(self._inner_ids(
        [piece.text for pieces in completions for piece in pieces]))
    all_ids, masks = [], []
    for pieces in completions:
      ids, mask = [], []
      for piece in pieces:
        new = next(encoded)
        if piece.end is not None:
          new = [*new, piece.end]
        ids += new
        mask += [piece.scored] * len(new)
      all_ids.append(np.array(ids, np.int64))
      masks.append(np.array(mask, bool))
    return all_ids, masks

  def _inner_ids(self, texts: list[str]) -> list[list[int]]:
    """Ids of texts that do not begin a sequence; cut at broken control text.

    A SentencePiece model puts a blank before what it takes for the beginning.
    Behind an anchor it does not: there a line feed is a token of its own.
    """
    parts = [[p for p in text.split(_BREAK) if p] for text in texts]
    flat = [p for part in parts for p in part]
    if self.prefixes_space:
      anchor, *ids = self._encode(["\n", *("\n" + p for p in flat)])
      ids = [i[len(anchor):] if i[: len(anchor)] == anchor
             else self._encode([p])[0] for i, p in zip(ids, flat)]
    else:
      ids = self._encode(flat)
    rest = iter(ids)
    return [[i for _ in part for i in next(rest)] for part in parts]

  def _encode(self, texts: list[str]) -> list[list[int]]:
    batch = self.hf.backend_tokenizer.encode_batch(
        texts, add_special_tokens=False)
    return [encoding.ids for encoding in batch]


def _suffix(full: str, start: str, where: str) -> str:
  if not full.startswith(start):
    raise errors.DataError(
        "data.template_prefix", "the rendered conversation does not begin with "
        "the rendered prompt", where=where,
        hint="the chat template rewrites earlier turns; set "
        "tokenizer.chat_template")
  return full[len(start) :]


def _fold_system(messages: Messages, where: str) -> Messages:
  """Puts a system message into the first user turn."""
  if len(messages) < 2 or messages[1]["role"] != "user":
    raise errors.DataError(
        "data.chat_roles", "a system message without a user turn after it",
        where=f"{where}, prompt[0]")
  system, user = messages[0]["content"], messages[1]["content"]
  content = f"{system}\n\n{user}" if system.strip() else user
  return [{**messages[1], "content": content}, *messages[2:]]


def _freeze(template: str, day: datetime.date) -> str:
  """The template with `strftime_now` answering for a fixed day."""
  if "strftime_now" not in template:
    return template
  replaced = "".join(
      f"|replace({'%' + code!r}, {day.strftime('%' + code)!r})"
      for code in ("-d", "-m", *"aAbBdeHIjmMpSuUwWyY"))
  return ("{% macro strftime_now(format) %}{{ format" + replaced
          + "}}{% endmacro %}{{ '' }}" + template)


def load_tokenizer(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    date: str = DEFAULT_DATE,
    think: str = "keep",
    scored: str = "last",
    special_text: str = "plain",
    bos: str = "auto",
) -> Tokenizer:
  """Loads a tokenizer directory or a tokenizer from the hub.

  Args:
    path: directory that transformers' AutoTokenizer loads, or a hub name. No
      code of the repository is run.
    revision: of a hub name.
    chat_template: text or file that replaces the tokenizer's own; "none" for
      plain text. A prompt that is a string counts as one user turn.
    chat_template_kwargs: further variables of the template, for example
      {"enable_thinking": False}.
    date, think, scored, special_text, bos: see `Tokenizer`.

  Raises:
    ModelDirError: hf.tokenizer, hf.template.
    CheckpointError: a folder that we wrote has changed, see `commit.verify`.
    ConfigError: config.range.
  """
  choices = {
      "think": (think, ("keep", "strip", "mask")),
      "scored": (scored, ("last", "all")),
      "special_text": (special_text, ("plain", "control")),
      "bos": (bos, ("auto", "add", "none")),
  }
  for name, (value, allowed) in choices.items():
    if value not in allowed:
      raise errors.ConfigError(
          "config.range", "no such choice", where=name, got=value,
          want=", ".join(allowed))
  import transformers

  commit.verify_once(pathlib.Path(path))
  try:
    hf = transformers.AutoTokenizer.from_pretrained(
        str(path), revision=revision, trust_remote_code=False)
    backend = hf.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    first = backend.encode("a", add_special_tokens=False).tokens[:1]
    adds_bos = hf("a")["input_ids"][:1] == [hf.bos_token_id]
  except BaseException as e:  # many kinds; panics of tokenizers among them
    if isinstance(e, (KeyboardInterrupt, SystemExit)):
      raise
    raise errors.ModelDirError(
        "hf.tokenizer", f"no tokenizer can be loaded: {type(e).__name__}",
        where=str(path), want="a folder with tokenizer.json",
        hint="offline only local folders and sets fetched before can be read",
    ) from None
  if hf.eos_token_id is None:
    raise errors.ModelDirError(
        "hf.tokenizer", "the tokenizer names no EOS token", where=str(path))

  template = hf.chat_template if chat_template is None else chat_template
  if isinstance(template, dict):
    template = template.get("default", next(iter(template.values())))
  template = hf.chat_template = _template_text(template)

  added = hf.added_tokens_decoder.values()
  controls = {str(t) for t in added if t.special or (
      template and str(t) in template)}
  controls |= set(hf.all_special_tokens)
  controls -= {*_THINK_TAGS, ""}
  tokenizer = Tokenizer(
      hf=hf, template=template,
      template_kwargs=dict(chat_template_kwargs or {}), date=date, think=think,
      scored=scored, special_text=special_text, bos=bos,
      adds_bos=adds_bos, prefixes_space="".join(first).startswith("▁"),
      controls=re.compile("|".join(re.escape(c) for c in sorted(
          controls, key=lambda c: (-len(c), c)))) if controls else None,
      end_id=hf.eos_token_id, counts=collections.Counter())
  if template is None:
    return tokenizer
  return dataclasses.replace(tokenizer, end_id=_end_of_turn(tokenizer, path))


def _end_of_turn(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> int:
  """Id of the token that the template sets after an assistant turn."""
  turns = [{"role": "user", "content": "a"},
           {"role": "assistant", "content": _PROBE}]
  try:
    full = tokenizer.render(turns, tools=None, add_generation_prompt=False)
    if _PROBE not in full:
      raise templates.TemplateError(
          "No turn", "it does not show the assistant's turn")
  except templates.TemplateError as e:
    raise errors.ModelDirError(
        "hf.template", f"the chat template fails: {e}", where=str(path),
        hint="set tokenizer.chat_template") from None
  except errors.ModelDirError as e:  # it uses too much
    e.where = str(path)
    raise
  return tokenizer._cut_end(full.rpartition(_PROBE)[2], search_last=False)[2]


def _template_text(template: str | None) -> str | None:
  """A template given as text or as a file; None for "none"."""
  if template == NO_TEMPLATE:
    return None
  if template and "\n" not in template and os.path.isfile(template):
    return pathlib.Path(template).read_text()
  return template


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    out_dir: str | os.PathLike[str],
    chat_template: str | None = None,
) -> str:
  """Trains a byte-level BPE and writes it as a folder transformers loads.

  Args:
    texts: what to learn from.
    vocab_size: at most so many tokens, at least 256 + the control tokens.
    out_dir: folder to write.
    chat_template: text or file; None for DEFAULT_CHAT_TEMPLATE, "none" for
      none. Its turn markers (`<|user|>`, `[INST]`, ...) become control
      tokens beside BOS, EOS and PAD.

  Returns:
    `out_dir`.

  Raises:
    ConfigError: config.range if the vocabulary is too small for bytes.
  """
  import tokenizers
  import transformers

  template = _template_text(
      DEFAULT_CHAT_TEMPLATE if chat_template is None else chat_template)
  special = ["<|bos|>", "<|eos|>", "<|pad|>"]
  special += dict.fromkeys(
      m for m in _TURN_MARK.findall(template or "") if m not in special)
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  if vocab_size < len(alphabet) + len(special):
    raise errors.ConfigError(
        "config.range", "the vocabulary is too small", where="vocab_size",
        got=vocab_size, want=f"at least {len(alphabet) + len(special)}")
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet,
      show_progress=False))
  hf = transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, bos_token=special[0], eos_token=special[1],
      pad_token=special[2], additional_special_tokens=special[3:])
  hf.chat_template = template
  hf.save_pretrained(str(out_dir))
  return str(out_dir)
