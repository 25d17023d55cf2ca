"""From sampled ids to text, as it grows; stop strings.

class TextStream: one sample.
  TextStream(tokenizer, stop, stop_ids): tokenizer has
    decode(ids, skip_special_tokens=True).
  push(tokens) -> str: the text that is certain now (nothing of an unfinished
    character, nothing that may yet become a stop string).
  stopped -> bool: a stop string has come; `num_tokens` -> int: tokens up to and
    including the one that completed it.
  finish() -> str: the rest, without the stop string.
  text -> str: all so far.
The texts of push and finish joined are the text of all tokens at once.
"""
