"""Inputs made up at random, for everything that reads what others wrote.

A target takes a `random.Random` and a folder of its own, makes one input and
uses it. It gives the slug of the refusal, or None of what was understood; all
else that it raises is a fault. The randomness is that of hypothesis, which
finds the smallest input that fails, or one with a seed, which is faster.

`fuzz_test.py` runs every target for a while, `benchmarks/fuzz.py` for longer.
"""

import collections
import dataclasses
import functools
import gzip
import json
import math
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import models_folders

from mcpo_jax import commit, errors, main, settings, storage
from mcpo_jax.data import files, readers, templates, tokenizer
from mcpo_jax.data import store as store_lib
from mcpo_jax.models import config as config_lib
from mcpo_jax.models import hf, peft, shards

Random = random.Random

_USER = {"role": "user", "content": "a b"}
_BOT = {"role": "assistant", "content": "c"}
# A good row of every layout.
ROWS: dict[str, dict[str, Any]] = {
    "native": {"prompt": "a b", "completions": ["c", "d", "c"],
               "scores": [1, 0.5, 0], "prompt_id": "p", "sources": ["x"] * 3,
               "finish_reasons": ["stop", "length", None]},
    "pairs": {"prompt": [_USER], "chosen": [_BOT], "rejected": "d",
              "score_chosen": 1.0, "score_rejected": 0.5},
    "nectar": {"prompt": "\n\nHuman: a\n\nAssistant: ", "answers": [
        {"answer": "c", "model": "x", "rank": 1.0},
        {"answer": "d", "model": "y", "rank": 2.0}]},
    "ultrafeedback": {"instruction": "a", "completions": [
        {"response": "c", "model": "x", "overall_score": 7.5,
         "annotations": {"honesty": {"Rating": "3"}, "b": {"Rating": "N/A"}}}]},
    "generated_responses": {"prompt": "a", "all_generated_responses": [
        "c", "d"], "all_rm_scores": [0.25, -1]},
    "nemo": {"context": [_USER], "completions": [
        {"completion": [_BOT], "rank": 0}, {"completion": "d", "rank": 1}]},
    "hh": {"chosen": "\n\nHuman: a\n\nAssistant: c",
           "rejected": "\n\nHuman: a\n\nAssistant: d"},
    "unpaired": {"prompt": "a", "completion": "c", "label": True},
    "sft": {"messages": [_USER, _BOT, _USER, {
        "role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "r"}, _BOT], "tools": [{"name": "f"}]},
    "tokens": {"prompt_ids": [3, 4], "completion_ids": [[5, 6], [7]],
               "completion_masks": [[1, 0], [1]], "preferred": 0},
    "prompts": {"prompt": "a"},
}
_VALUES = (
    None, True, False, 0, 1, 2, 7, -1, 2**31, 2**53, 2**64, 10**40, 0.5, -0.0,
    1e-30, 1e308, math.inf, math.nan, "", " ", "a", "c d", "user", "system",
    "tool", "\ud800", "\ufdd0\ufdd1", "<|eos|>", "<think>a</think>", "</think>",
    "\n\nHuman: a\n\nAssistant: b", "\x00", "é\u0301", "x" * 300, "../x",
    "F32", "model.safetensors", "llama", "NaN", "1e5", "2024-01-01")


def value(rng: Random, depth: int = 3) -> Any:
  """Any JSON."""
  kind = rng.randrange(8) if depth else 0
  if kind == 6:
    return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
  if kind == 7:
    return {rng.choice(("role", "content", "a", "Rating", "id")): value(
        rng, depth - 1) for _ in range(rng.randrange(4))}
  return rng.choice(_VALUES)


def changed(rng: Random, tree: Any, times: int = 2) -> Any:
  """A JSON value with up to so many changes: something else, gone, or there
  twice."""
  tree = json.loads(json.dumps(tree))
  for _ in range(rng.randrange(times + 1)):
    node, above, key = tree, None, None
    while isinstance(node, (dict, list)) and node and (
        above is None or rng.randrange(4)):
      above, key = node, rng.choice(
          list(node) if isinstance(node, dict) else range(len(node)))
      node = above[key]
    if above is None:
      return value(rng)
    what = rng.randrange(4)
    if what == 0:
      del above[key]
    elif what == 1 and isinstance(above, list):
      above.insert(key, node)
    elif what == 1:
      above[rng.choice(("a", key + "s", key[:-1]))] = node
    else:
      above[key] = value(rng)
  return tree


def flipped(rng: Random, content: bytes, times: int = 3) -> bytes:
  """Bytes with a few others in place of some, or cut, or with more."""
  content = bytearray(content)
  for _ in range(rng.randrange(times + 1)):
    at = rng.randrange(len(content) + 1)
    content[at:at + rng.choice((0, 1, 1, 8))] = bytes(
        rng.randrange(256) for _ in range(rng.choice((0, 1, 1, 8))))
  return bytes(content[:rng.randrange(len(content) + 1)] if rng.randrange(
      8) == 0 else content)


def text_of(rng: Random, tree: Any) -> bytes:
  """JSON, now and then with changes in its bytes."""
  content = json.dumps(tree, ensure_ascii=rng.randrange(2) == 0).encode(
      "utf-8", "surrogatepass")
  return flipped(rng, content) if rng.randrange(3) == 0 else content


def _line(rng: Random) -> tuple[str, bytes]:
  """A layout and a line of it."""
  name = rng.choice(list(ROWS))
  return name, text_of(rng, changed(rng, ROWS[name])).replace(b"\n", b" ")


@functools.cache
def _tokenizer() -> tokenizer.Tokenizer:
  folder = tempfile.mkdtemp(prefix="fuzz_tokenizer")
  return tokenizer.load_tokenizer(tokenizer.train_tokenizer(
      ["a b c d e"] * 2, vocab_size=300, out_dir=folder))


def _check_record(record: readers.Record) -> None:
  """What everything behind a reader relies on."""
  count = len(record.completions)
  assert isinstance(record.prompt_id, str)
  assert record.scores is None or len(record.scores) == count and all(
      map(math.isfinite, record.scores))
  assert record.preferred is None or 0 <= record.preferred < count
  assert record.sources is None or len(record.sources) == count


_LIMITS = store_lib.Limits(40, 30, 60, "skip", "truncate")


def record_line(rng: Random, folder: pathlib.Path) -> str | None:
  """A line of any layout: parsed, read, tokenised."""
  del folder
  name, line = _line(rng)
  row = files.parse_line(line, "x.jsonl:1")
  if isinstance(row, errors.DataError):
    return row.slug
  if rng.randrange(2):
    name = readers.recognise(row, "x.jsonl:1")
  record = readers.READERS[name](row, "x.jsonl:1")
  _check_record(record)
  made = store_lib._tokenise(
      record, _tokenizer(), _LIMITS, 300, collections.Counter())
  if made is not None:
    assert len(made.completions) == len(made.scores) == len(made.masks)
    assert all(len(c) and m.any() for c, m in zip(made.completions, made.masks))
  return None


def record_file(rng: Random, folder: pathlib.Path) -> str | None:
  """A file of lines, perhaps compressed, perhaps under a wrong name; some of
  its bytes may be others. All of its rows are counted."""
  name = rng.choice(("x.jsonl", "x.jsonl", "x.jsonl.gz", "x.parquet"))
  rows = [_line(rng)[1] for _ in range(rng.randrange(5))]
  content = b"\n".join(rows) + rng.choice((b"", b"\n", b"\r\n", b"\n\n"))
  if rng.randrange(3) == 0:
    content = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe")) + content
  if name.endswith(".gz") != (rng.randrange(10) == 0):
    content = flipped(rng, gzip.compress(content))
  if name.endswith(".parquet") and rng.randrange(10):
    content = flipped(rng, _parquet())
  (folder / name).write_bytes(content)
  report = store_lib.build_store(
      [(str(folder / name), "auto", 1.0, None)], _tokenizer(),
      cache_dir=folder / "cache", quarantine_path=folder / "q.jsonl",
      quarantine_text=rng.randrange(2) == 0, max_quarantined_share=1.0,
      prompts_only=True).report
  assert report["rows_in"] == report["rows_used"] + report[
      "rows_quarantined"] + report["rows_skipped"]
  return None


@functools.cache
def _parquet() -> bytes:
  import pyarrow as pa
  import pyarrow.parquet as pq

  sink = pa.BufferOutputStream()
  rows = [ROWS["native"] | {"prompt_id": str(i)} for i in range(3)]
  pq.write_table(pa.Table.from_pylist(rows), sink, write_page_checksum=True)
  return sink.getvalue().to_pybytes()


_QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"


@functools.cache
def _resolved() -> dict[str, Any]:
  return main.read_config(main.parse(
      ["train", f"--config={_QUICKSTART}", "--workdir=none"]))


def config_typed(rng: Random, folder: pathlib.Path) -> str | None:
  """Overrides of any keys by any texts."""
  words = ["train", f"--config={_QUICKSTART}", f"--workdir={folder / 'run'}"]
  keys = list(settings.KEYS)
  for _ in range(rng.randrange(4)):
    key = rng.choice(keys)
    if rng.randrange(8) == 0:
      key = rng.choice((key[:-1], key + "s", key.split(".")[0], "", ".", key
                        + ".a"))
    text = rng.choice((
        str(value(rng, 2)), rng.choice(("mc", "dpo", "kto", "rnce", "resident",
        "step", "3", "0.3", "a.jsonl*2", "None", "true", "{}", "[1]", "-1",
        "sft,preference", "mine:loss", "9" * 30, "judge", "remote*-2"))))
    words.append(f"--config.{key}={text}")
  if rng.randrange(4) == 0:
    words[rng.randrange(len(words))] = str(value(rng))
  config = main.read_config(main.parse(words))
  settings.flatten(json.loads(json.dumps(config)))
  return None


def config_saved(rng: Random, folder: pathlib.Path) -> str | None:
  """The config that a workdir keeps."""
  path = folder / "config.json"
  saved = {"version": settings.CONFIG_VERSION, "config": _resolved()}
  path.write_bytes(text_of(rng, changed(rng, saved)))
  config = main.read_config(main.parse(["evaluate", f"--workdir={folder}"]))
  assert settings.flatten(config).keys() >= {
      key for key in settings.KEYS if not key.startswith("objective.")}
  return None


@functools.cache
def _base(kind: str) -> pathlib.Path:
  base = pathlib.Path(tempfile.mkdtemp(prefix=f"fuzz_{kind}"))
  if kind == "tokenizer":
    return pathlib.Path(tokenizer.train_tokenizer(
        ["a b c d e"], vocab_size=300, out_dir=base,
        chat_template=tokenizer.DEFAULT_CHAT_TEMPLATE + "{# #}"))
  if kind == "adapter":
    return pathlib.Path(models_folders._kept_adapters())
  return models_folders.export(base)


def _copied(rng: Random, kind: str, folder: pathlib.Path) -> pathlib.Path:
  """A folder of this kind, one of its files changed."""
  there = folder / "in"
  shutil.copytree(_base(kind), there)
  path = rng.choice(sorted(
      p for p in there.iterdir() if p.suffix in (".json", ".safetensors")
      and p.name != commit.MANIFEST))
  content = path.read_bytes()
  if path.suffix == ".json":
    content = text_of(rng, changed(rng, json.loads(content)))
  elif rng.randrange(2):
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(changed(rng, json.loads(content[8:8 + size]))).encode()
    content = len(header).to_bytes(8, "little") + header + content[8 + size:]
  else:
    content = flipped(rng, content)
  path.write_bytes(content)
  return there


def model_folder(rng: Random, folder: pathlib.Path) -> str | None:
  """Index, headers, shards and configs of a model; all of it is read."""
  there = _copied(rng, "model", folder)
  config = hf.load_config(there)
  hf.check_tokenizer(there, config)
  for name, shape in (opened := shards.Shards(there)).shapes.items():
    opened.read(name, (slice(None),) * len(shape))
  return None


def model_in_store(rng: Random, folder: pathlib.Path) -> str | None:
  """The same at a place in an object store, whose headers we read ourselves."""
  there = _copied(rng, "model", folder)
  with mock.patch.object(storage, "_cache", folder / "cache"):
    copy = hf.resolve_model(f"file://{there}")
    for name, shape in (opened := shards.Shards(copy)).shapes.items():
      opened.read(name, (slice(None),) * len(shape))
  return None


def model_config(rng: Random, folder: pathlib.Path) -> str | None:
  """A config.json of any family; what it says must make sense."""
  del folder
  raw = _configs()[rng.randrange(len(_configs()))]
  config = config_lib.from_hf(changed(rng, raw, 3))
  sizes = (config.vocab_size, config.hidden_size, config.intermediate_size,
           config.num_layers, config.num_heads, config.num_kv_heads,
           config.head_dim, config.max_positions)
  assert all(type(size) is int and size > 0 for size in sizes)
  assert config.num_heads % config.num_kv_heads == 0
  assert all(type(x) is float or type(x) is int for x in (
      config.rms_norm_eps, config.rope_theta, config.initializer_range))
  assert all(type(i) is int for i in config.eos_token_ids)
  hash(config)  # it is a static argument
  return None


@functools.cache
def _configs() -> list[dict[str, Any]]:
  """A config.json of each family."""
  return [json.loads(json.dumps(config_lib.to_hf(dataclasses.replace(
      config_lib.from_hf({
          "model_type": family, "vocab_size": 24, "hidden_size": 16,
          "intermediate_size": 8, "num_hidden_layers": 3,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
          "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
      eos_token_ids=(2, 5)), dtype="float32")))
          for family in config_lib.FAMILIES]


def adapter_folder(rng: Random, folder: pathlib.Path) -> str | None:
  """Config and weights of adapters."""
  peft.Adapters(_copied(rng, "adapter", folder))
  return None


def tokenizer_folder(rng: Random, folder: pathlib.Path) -> str | None:
  """A tokenizer, and a text through it."""
  loaded = tokenizer.load_tokenizer(_copied(rng, "tokenizer", folder))
  loaded.encode_prompt("a <|eos|> é")
  return None


_PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m }}",
    "{% if m.role == 'user' %}", "{% else %}", "{% endif %}", "{{ bos_token }}",
    "{% set x = 'a' * 999999999 %}", "{{ range(10**9) }}", "{{ x }}",
    "{% for i in range(9999) %}", "{{ ''.__class__ }}", "{{ m | tojson }}",
    "{% macro f() %}{{ f() }}{% endmacro %}", "{{ f() }}", "{{ 1 / 0 }}",
    "{{ raise_exception('a') }}", "{% generation %}", "{% endgeneration %}",
    "{% break %}", "{{ messages.append(1) }}", "{{ cycler }}", "{{", "}}",
    "{%", "%}", "{# ", "\n", "<|user|>", "{{ 'a'.encode() }}",
    "{{ '%999999999d' % 1 }}", "{{ lipsum(99) }}", "{{ 9**9**7 }}",
    "{% import 'os' as os %}", "{% set ns = namespace(a=1) %}",
    "{{ messages | map(attribute='role') | join }}")


def chat_template(rng: Random, folder: pathlib.Path) -> str | None:
  """A template put together from pieces, good and bad."""
  del folder
  text = "".join(rng.choice(_PIECES) for _ in range(rng.randrange(1, 9)))
  try:
    made = templates.render(
        text, [_USER, {"role": "assistant", "content": "c"}], bos_token="<s>")
  except templates.TemplateError as e:
    return e.kind
  assert isinstance(made, str) and len(made) < 2 * templates.OUTPUT
  return None


def manifest(rng: Random, folder: pathlib.Path) -> str | None:
  """The manifest of a committed folder."""
  there = folder / "committed"
  commit.write_folder(
      there, lambda new: (new / "a").write_text("abc"), {"step": 3})
  path = there / commit.MANIFEST
  if rng.randrange(8):
    path.write_bytes(text_of(rng, changed(rng, json.loads(path.read_bytes()))))
  assert commit.verify(there) == {"step": 3}
  return None


def http_body(rng: Random, folder: pathlib.Path) -> str | None:
  """What is asked of the server, as its parser reads it."""
  import request_cases  # slow

  del folder
  path = rng.choice(request_cases.PATHS[:2])
  return request_cases.check_body(request_cases.body(rng, path), path)


TARGETS: dict[str, Callable[[Random, pathlib.Path], str | None]] = {
    function.__name__: function for function in (
        record_line, record_file, config_typed, config_saved, model_folder,
        model_in_store, model_config, adapter_folder, tokenizer_folder,
        chat_template, manifest, http_body)}


def run(name: str, rng: Random) -> str | None:
  """One input of a target: the slug of its refusal, None if it was taken."""
  with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
    try:
      return TARGETS[name](rng, pathlib.Path(folder))
    except errors.McpoError as e:
      assert e.slug and len(str(e)) < 10_000
      return e.slug
