"""The rows of bad configs and command lines, which no JAX is needed to refuse.

A row is a `Case`, as in bad_input_test.py, which runs these rows with all
others; here they can also be run by themselves, which counts the seconds and
shows what was imported:

  python tests/bad_configs.py
"""

import contextlib
import json
import pathlib
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from typing import Any, NamedTuple

from mcpo_jax import errors, main

Use = Callable[[], Any]


class Case(NamedTuple):
  """One bad input and what it must get."""

  id: str
  make: Callable[[pathlib.Path], Use]
  error: type[errors.McpoError] | None
  slug: str | None
  where: str
  exit_code: int


def listing(folder: pathlib.Path) -> dict[str, bytes]:
  """Name -> content; of a lock, which tells who came last, the name alone."""
  return {str(p.relative_to(folder)): b"" if p.name == ".lock" else (
      p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def check(case: Case, base: pathlib.Path) -> None:
  """Uses a row's input, in a folder under `base`; its refusal must be the one
  that the row names, and nothing may be lost."""
  folder = base / "in"
  folder.mkdir()
  use = case.make(folder)
  before = listing(folder)
  if case.error is None:
    assert use()
  else:
    try:
      use()
    except errors.McpoError as e:
      error = e
    else:
      raise AssertionError(f"{case.id} was accepted")
    assert isinstance(error, case.error), error
    assert error.slug == case.slug
    assert case.where in error.where
    assert error.exit_code == case.exit_code
    assert len(str(error)) < 2000
    assert not list(base.rglob("*.tmp"))
    cache = base / "cache"
    assert not cache.exists() or not list(cache.iterdir())
  assert listing(folder) == before


QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"


def resolved(folder: pathlib.Path, *overrides: str) -> dict[str, Any]:
  """The quickstart's config, with `name=value` overrides."""
  return main.read_config(main.parse([
      "train", f"--config={QUICKSTART}", f"--workdir={folder / 'run'}",
      f"--config.cache_dir={folder.parent / 'cache'}",
      *(f"--config.{o}" for o in overrides)]))


def set_(*overrides: str):
  return lambda folder: lambda: resolved(folder, *overrides)


def typed(*words: str):
  """What is typed; {} stands for the folder."""
  return lambda folder: lambda: main.run(
      [w.replace("{}", str(folder)) for w in words])


def config_file(*lines: str, beside: str | None = None):
  """A config file with these lines in its get_config()."""
  def make(folder):
    code = folder.parent / "code"
    code.mkdir()
    if beside:
      (code / beside).write_text("{}")
    (code / "mine.py").write_text("\n  ".join([
        "from configs import quickstart\ndef get_config():",
        "config = quickstart.get_config()", *lines, "return config"]))
    return typed("train", f"--config={code / 'mine.py'}", "--workdir={}/r")(
        folder)

  return make


def read_back(text: str):
  def make(folder):
    (folder / "config.json").write_text(text)
    return typed("evaluate", "--workdir={}")(folder)

  return make


def warns(override: str):
  def make(folder):
    def use():
      with unittest.TestCase().assertLogs("absl", "WARNING") as logs:
        resolved(folder, override)
      return "config.precision" in logs.output[0]

    return use

  return make


def elsewhere(folder):
  """A config that lies beside another folder than the one that one is in."""
  (folder / "mine.py").write_text("")
  (folder / "deeper").mkdir()

  def use():
    with contextlib.chdir(folder / "deeper"):
      main.run(["train", "--config=mine.py", "--workdir=r"])

  return use


def serve(token: str):
  """The verb without weights, with this text in its token file."""
  def make(folder):
    path = folder / "token"
    path.write_text(token)
    return typed("serve", RUN[0], f"--config.serve.token_path={path}")(folder)

  return make


def refused(case_id, make, slug, where):
  return Case(case_id, make, errors.ConfigError, slug, where, 2)


def out_of_range(case_id, override):
  return refused(case_id, set_(override), "config.range",
                 override.split("=")[0])


TOKEN = "hf_" + "aB3" * 12
COMMIT = "0123456789abcdef" * 2 + "01234567"
RUN = ("--config=" + str(QUICKSTART), "--workdir={}/run")

ROWS = [
    refused("C1 typed", set_("objective.btea=1"), "config.unknown_key",
            "objective.btea"),
    refused("C1 group", set_("optimiser.name=sgd"), "config.unknown_key",
            "optimiser.name"),
    refused("C1 file", config_file("config.objective.btea = 1"),
            "config.unknown_key", "mine.py:4"),
    refused("C2 int", set_("batch_size=1.5"), "config.type", "batch_size"),
    refused("C2 float", set_("objective.beta=abc"), "config.type",
            "objective.beta"),
    refused("C2 bool", set_("data.quarantine=2"), "config.type",
            "data.quarantine"),
    refused("C2 group", set_("model=3"), "config.type", "model"),
    refused("C2 file", config_file("config.batch_size = '100'"),
            "config.type", "mine.py:4"),
    refused("C2 json", set_("tokenizer.chat_template_kwargs=[1]"),
            "config.type", "tokenizer.chat_template_kwargs"),
    refused("C2 date", set_("tokenizer.date=yesterday"), "config.type",
            "tokenizer.date"),
    *(out_of_range(f"C3 {o}", o) for o in (
        "objective.beta=nan", "optimizer.learning_rate=inf",
        "sft.num_steps=-5", "batch_size=None", "data.stream_length=None")),
    *(out_of_range(f"C4 {o}", o) for o in (
        "objective.beta=0", "optimizer.learning_rate=-1",
        "optimizer.warmup_ratio=1.5", "kernel.temperature=0",
        "kernel.num_negatives=0", "generation.top_p=0",
        "generation.top_p=1.1", "generation.temperature=-1",
        "generation.num_samples=0", "evaluation.num_display=0",
        "seed=-1", "batch_size=" + "9" * 400, "objective.name=mpco",
        "model.family=lama", "data.prompt_overlength=cut",
        "data.completion_overlength=left", "export.dtype=float16",
        "data.format=natve", "tokenizer.bos=always", "data.path=a.jsonl*0",
        "data.eval_path=a.jsonl*nan", "sft.data_path=a.jsonl,,b.jsonl")),
    refused("C6 zero", set_("mesh.data=0"), "config.mesh", "mesh"),
    refused("C6 two", set_("mesh.fsdp=-1"), "config.mesh", "mesh"),
    refused("C6 kv", set_("model.num_kv_heads=3"), "config.divisible",
            "model.num_kv_heads"),
    refused("C7 context", set_("model.max_position_embeddings=95"),
            "config.length", "model.max_position_embeddings"),
    refused("C7 sample", set_("generation.max_new_tokens=465"),
            "config.length", "model.max_position_embeddings"),
    refused("C7 stream", set_("data.stream_length=95"), "config.length",
            "data.stream_length"),
    refused("C9", set_("reference.path=./none"), "config.reference",
            "reference.path"),
    # No key names dropout; a model that brings it is refused, row H10.
    refused("C8", set_("model.dropout=0.1"), "config.unknown_key",
            "model.dropout"),
    Case("C9 hub", lambda folder: lambda: resolved(
        folder, "reference.path=owner/name"), None, None, "", 0),
    refused("C11 steps", set_("num_steps=3"), "config.conflict", "num_steps"),
    refused("C11 order", set_("stages=preference,sft"), "config.conflict",
            "stages"),
    refused("C11 strategy", set_("kernel.strategy=random"), "config.unused",
            "kernel.temperature"),
    refused("C11 objective", set_("objective.gamma_beta_ratio=1"),
            "config.unused", "objective.gamma_beta_ratio"),
    refused("C11 revision", set_("data.revision=main"), "config.unused",
            "data.revision"),
    refused("C11 text", set_("data.quarantine_text=true"), "config.unused",
            "data.quarantine_text"),
    refused("C13 model", config_file(beside="model.safetensors"),
            "config.untrusted_code", "mine.py"),
    refused("C13 run", config_file(beside="config.json"),
            "config.untrusted_code", "mine.py"),
    refused("C14", set_(f"cache_dir={TOKEN}"), "config.secret", "cache_dir"),
    refused("C14 hex", set_(f"reward.name={COMMIT}"), "config.secret",
            "reward.name"),
    Case("C14 commit", lambda folder: lambda: resolved(
        folder, "model.path=owner/name", f"model.revision={COMMIT}"),
         None, None, "", 0),
    Case("C14 folder", lambda folder: lambda: resolved(
        folder, f"model.path=/hub/snapshots/{COMMIT}"), None, None, "", 0),
    refused("C15 read", read_back('{"version": 99, "config": {}}'),
            "config.version", "config.json"),
    refused("C15 cut", read_back('{"vers'), "config.invalid", "config.json"),
    *(out_of_range(f"A1 {o}", o) for o in (
        "lora.rank=0", "lora.rank=-2")),
    refused("A1 target", set_("lora.rank=4", "lora.targets=q_proj,q_porj"),
            "config.range", "lora.targets"),
    refused("A1 alpha", set_("lora.rank=4", "lora.alpha=0"), "config.range",
            "lora.alpha"),
    refused("A1 base", set_("lora.rank=4", "stages=preference"),
            "config.missing", "model.path"),
    refused("A2 alpha", set_("lora.alpha=8"), "config.unused", "lora.alpha"),
    refused("A2 targets", set_("lora.targets=q_proj"), "config.unused",
            "lora.targets"),
    refused("A2 rank", lambda folder: lambda: resolved(
        folder, f"model.path={folder}", f"model.adapter_path={folder}",
        "stages=preference", "lora.rank=2"), "config.unused", "lora.rank"),
    refused("A3 base", set_("reference.source=lora_base"), "config.conflict",
            "reference.source"),
    refused("A3 path", lambda folder: lambda: resolved(
        folder, f"reference.path={folder}", "lora.rank=2",
        "reference.source=lora_base"), "config.unused", "reference.path"),
    refused("A4 folder", set_(
        "model.path=./base", "model.adapter_path=./none", "stages=preference"),
            "config.missing", "model.adapter_path"),
    refused("A4 base", lambda folder: lambda: resolved(
        folder, f"model.adapter_path={folder}", "stages=preference"),
            "config.missing", "model.path"),
    refused("A4 sft", lambda folder: lambda: resolved(
        folder, f"model.path={folder}", f"model.adapter_path={folder}"),
            "config.conflict", "model.adapter_path"),
    refused("A4 twice", lambda folder: lambda: resolved(
        folder, f"model.path={folder}", f"model.adapter_path={folder}",
        f"reference.path={folder}", "stages=preference"), "config.conflict",
            "reference.path"),
    Case("C16", warns("model.param_dtype=bfloat16"), None, None, "", 0),
    *(refused(f"C17 {o}", set_(o), "config.retention", o.split("=")[0])
      for o in ("checkpoint.keep=1", "checkpoint.keep=0",
                "checkpoint.every_steps=0")),
    *(refused(f"moments {name}", set_(
        f"optimizer.name={name}", "optimizer.moment_dtype=bfloat16"),
        "config.unused", "optimizer.moment_dtype")
      for name in ("rmsprop", "adafactor")),
    refused("profile", typed("audit", *RUN, "--profile"), "cli.flag",
            "--profile"),
    refused("L1", typed("train", *RUN, "--wrkdir=x"), "cli.flag", "--wrkdir"),
    refused("L1 verb", typed("trian", *RUN), "cli.verb", ""),
    refused("L1 word", typed("train", "more", *RUN), "cli.flag", "more"),
    refused("L2", typed("train", "--workdir={}/run"), "config.missing",
            "--config"),
    refused("L2 workdir", typed("train", RUN[0]), "cli.flag", "--workdir"),
    refused("L2 out", typed("export", *RUN), "cli.flag", "--out"),
    refused("L2 topology", typed("plan", RUN[0]), "cli.flag", "--topology"),
    refused("L2 unplanned", typed("train", *RUN, "--topology=v5e:4x4"),
            "cli.flag", "--topology"),
    refused("L plan", typed("plan", RUN[0], "--topology=v5e:16"),
            "plan.topology", "--topology"),
    refused("L price", typed("plan", RUN[0], "--topology=v5e:4x4",
                              "--price-per-chip-hour=cheap"),
            "cli.flag", "--price-per-chip-hour"),
    refused("L3", typed("train", "--config={}/quikstart.py", RUN[1]),
            "config.missing", "quikstart.py"),
    refused("L2 serve", serve("x" * 16), "config.missing", "model.path"),
    *(Case(f"L4 {verb[0]}", typed(*verb, *RUN), errors.CheckpointError,
           "ckpt.none", "run", 5)
      for verb in (("evaluate",), ("export", "--out={}/out"))),
    refused("L5", typed("train", *RUN, "--fresh=1", "--resume=1"),
            "cli.flag", "--fresh"),
    refused("L7 host", set_("serve.host=0.0.0.0"), "config.conflict",
            "serve.host"),
    refused("L7 name", set_("serve.host=example.org"), "config.range",
            "serve.host"),
    Case("L7 inside", lambda folder: lambda: resolved(
        folder, "serve.host=::1"), None, None, "", 0),
    refused("L7 token", serve(""), "config.missing", "serve.token_path"),
    refused("L7 weak", serve("x" * 15), "config.range", "serve.token_path"),
    refused("L8", elsewhere, "config.missing", "mine.py"),
]


def main_alone() -> None:
  """Checks every row; prints the seconds of each and what was imported."""
  seconds = {}
  for case in ROWS:
    with tempfile.TemporaryDirectory() as base:
      start = time.perf_counter()
      check(case, pathlib.Path(base))
      seconds[case.id] = time.perf_counter() - start
  print(json.dumps({"seconds": seconds, "jax": "jax" in sys.modules}))


if __name__ == "__main__":
  main_alone()
