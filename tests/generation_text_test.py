"""Text as it grows: whole characters, stop strings, any cut into pushes."""

import functools
import gzip
import json

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mcpo_jax.generation.text import TextStream


class Letters:
  """Token i is the i-th of some strings; None is a special token."""

  def __init__(self, *words):
    self.words = words

  def decode(self, ids, skip_special_tokens):
    assert skip_special_tokens
    return "".join(self.words[i] or "" for i in ids)


@functools.cache
def byte_level():
  """A byte-level BPE: characters of several tokens, one special token."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.train_from_iterator(
      ["one two three"], tokenizers.trainers.BpeTrainer(
          vocab_size=270, special_tokens=["<|eos|>"],
          initial_alphabet=alphabet, show_progress=False))
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, eos_token="<|eos|>")


@functools.cache
def byte_fallback():
  """As Llama 2: blanks as ▁, one stripped at the start, bytes as <0x00>."""
  words = ["<s>", "</s>", "▁", "▁the", "▁cup", "a", "é", "!"]
  words += [f"<0x{i:02X}>" for i in range(256)]
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(
      {word: i for i, word in enumerate(words)}, [], byte_fallback=True))
  backend.decoder = tokenizers.decoders.Sequence([
      tokenizers.decoders.Replace("▁", " "),
      tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(" ", 1, 0)])
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def stream(tokenizer, pieces, **options):
  """(stream, texts of its pushes, rest)."""
  one = TextStream(tokenizer, **options)
  return one, [one.push(piece) for piece in pieces], one.finish()


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback])
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_pieces_are_the_text_of_all_tokens(tokenizer, data):
  tokenizer = tokenizer()
  text = tokenizer.encode(
      data.draw(st.text(max_size=6)), add_special_tokens=False)
  ids = text + data.draw(st.lists(
      st.integers(0, len(tokenizer) - 1), max_size=12))
  cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
  pieces = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)])]
  for some in (pieces, [[i] for i in ids]):
    one, told, rest = stream(tokenizer, some)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(told) + rest == whole == one.text
    assert one.num_tokens == len(ids) and not one.stopped


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=20),
       st.lists(st.text("ab c", min_size=1, max_size=4), min_size=1,
                max_size=3))
def test_a_stop_string_ends_the_text_before_it(ids, stop):
  tokenizer = Letters("a", "ab", "b c", "ca", None)
  whole, found, count = "", [], 0
  while not found and count < len(ids):
    whole += tokenizer.words[ids[count]] or ""
    count += 1
    found = [(whole.find(s) + len(s), whole.find(s)) for s in stop
             if s in whole]
  for pieces in ([ids], [[i] for i in ids]):
    one, told, rest = stream(tokenizer, pieces, stop=stop)
    assert one.stopped == bool(found) and one.num_tokens == count
    want = whole[: min(found)[1]] if found else whole
    assert "".join(told) + rest == one.text == want


def test_what_may_become_a_stop_string_is_held_and_no_more():
  tokenizer = Letters("x", "E", "N", "D")
  one, told, rest = stream(
      tokenizer, [[0], [1], [2], [0], [1], [2], [3], [0]], stop=["END"])
  assert told == ["x", "", "", "ENx", "", "", "", ""] and not rest
  assert one.stopped and one.num_tokens == 7 and one.text == "xENx"
  one, told, rest = stream(tokenizer, [[0], [1], [2]], stop=["END"])
  assert told == ["x", "", ""] and rest == "EN" and not one.stopped


def test_a_character_of_several_tokens_comes_whole():
  ids = byte_level().encode("é€", add_special_tokens=False)
  assert len(ids) == 5
  _, told, rest = stream(byte_level(), [[i] for i in ids])
  assert told == ["", "é", "", "", "€"] and not rest
  _, told, rest = stream(byte_level(), [ids[:1], ids[2:3]])
  assert told == ["", ""] and rest == "\ufffd\ufffd"


def test_a_byte_is_told_when_its_run_has_ended_and_stops_at_once():
  ids = byte_fallback().convert_tokens_to_ids(["▁the", "<0x0A>", "▁cup"])
  _, told, _ = stream(byte_fallback(), [[i] for i in ids])
  assert told == ["the", "", "\n cup"]
  one, told, rest = stream(byte_fallback(), [[i] for i in ids], stop=["\n"])
  assert one.num_tokens == 2 and told == ["the", "", ""] and not rest


def test_stop_tokens_are_no_text():
  tokenizer = Letters("a", "b", "STOP")
  one, told, rest = stream(tokenizer, [[0, 1, 2]], stop_ids=(2,))
  assert told == ["ab"] and not rest and one.num_tokens == 3


def test_a_long_text_is_decoded_a_few_tokens_at_a_time(shared):
  origin = shared / "tokenizers" / "deepseek_r1" / "tokenizer.json.gz"
  backend = tokenizers.Tokenizer.from_str(gzip.decompress(
      origin.read_bytes()).decode())
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
  text = json.dumps({"grüße 你好 👩‍🚀": "ça va?"}, ensure_ascii=False) * 40
  ids = tokenizer.encode(text, add_special_tokens=False)
  longest, decode = 0, tokenizer.decode

  class Counting:
    def decode(self, ids, **options):
      nonlocal longest
      longest = max(longest, len(ids))
      return decode(ids, **options)

  one, told, rest = stream(Counting(), [[i] for i in ids], stop=["never"])
  assert "".join(told) + rest == text and longest < 20 < len(ids)
