"""From sampled ids to text, as it grows; stop strings.

A token is no text of its own: a character may need several, and a blank may
depend on what stands before. So the last few tokens are decoded together with
the new ones, and what could still change is held back.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

# What decoders write for bytes that are no character, or not yet.
_BROKEN = "\ufffd"
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class TextStream:
  """The text of one sample.

  The texts of push and finish, joined, are the text of all its tokens decoded
  at once, however the tokens were cut into pushes; stop tokens are left out.

  Attributes:
    text: all that was told so far; after `finish` the whole text.
    stopped: a stop string has come. Further tokens are ignored.
    num_tokens: tokens so far, up to and including the one that completed the
      stop string.
  """

  def __init__(
      self, tokenizer: Any, stop: Sequence[str] = (),
      stop_ids: Iterable[int] = (),
  ):
    """Begins an empty text.

    Args:
      tokenizer: of transformers, or what has its decode(ids,
        skip_special_tokens=True). Byte tokens ("<0x0A>") are known by its
        convert_ids_to_tokens, where it has one.
      stop: texts that end the sample, none of them empty. They are left out
        of its text. Of several that one token completes, the first to end
        holds, of those the longest.
      stop_ids: tokens that end the sample.
    """
    self._tokenizer, self._stop = tokenizer, tuple(stop)
    self._stop_ids = frozenset(stop_ids)
    self._name = getattr(
        tokenizer, "convert_ids_to_tokens", lambda token: None)
    self._head: list[int] = []  # tokens of the end of _sure, for context
    self._open: list[int] = []  # tokens after them
    self._sure = ""  # text of the tokens before _open
    self._rest = ""  # text of _open, as it looks now
    self._told = 0  # characters
    self.stopped, self.num_tokens = False, 0

  @property
  def text(self) -> str:
    return (self._sure + self._rest)[: self._told]

  def push(self, tokens: Iterable[int]) -> str:
    """Takes tokens; returns the text that is certain now and was not told.

    Nothing of an unfinished character is certain, and nothing that may yet
    become a stop string.
    """
    tokens = [int(token) for token in tokens]
    # With stop strings one by one: which token completes one is to be known.
    pieces = [[token] for token in tokens] if self._stop else [tokens]
    before = self._told
    for piece in filter(None, pieces):
      if self.stopped:
        break
      self.num_tokens += len(piece)
      self._take([t for t in piece if t not in self._stop_ids])
    if not self.stopped:
      self._told = max(self._told, len(self._sure) - self._held())
    return self.text[before:]

  def finish(self) -> str:
    """The rest of the text, without the stop string."""
    before, self._told = self._told, len(self._sure + self._rest)
    return self.text[before:]

  def _take(self, tokens: list[int]) -> None:
    if not tokens:
      return
    self._open += tokens
    head = self._decode(self._head)
    self._rest = self._decode(self._head + self._open)[len(head):]
    self._look_for_stop()
    # A decoder that joins byte tokens writes a run of them as broken as soon
    # as one byte in it is: even a whole character can still change then. No
    # text, as of a special token, does not end a run.
    last = tokens[-1]
    closed = self._decode([last]) and not _BYTE_TOKEN.fullmatch(
        self._name(last) or "")
    if closed and not self._rest.endswith(_BROKEN):
      self._sure, self._rest = self._sure + self._rest, ""
      self._head, self._open = self._open, []

  def _decode(self, tokens: list[int]) -> str:
    return self._tokenizer.decode(tokens, skip_special_tokens=True)

  def _look_for_stop(self) -> None:
    text = self._sure + self._rest.rstrip(_BROKEN)
    found = [(start + len(stop), start) for stop in self._stop
             if (start := text.find(stop, self._told)) >= 0]
    if found:
      self._sure, self._rest = text[: min(found)[1]], ""
      self.stopped = True

  def _held(self) -> int:
    """Characters at the end of the certain text that may begin a stop."""
    return max((n for stop in self._stop for n in range(1, len(stop))
                if self._sure.endswith(stop[:n])), default=0)
