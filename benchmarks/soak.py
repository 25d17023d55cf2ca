"""Runs that are killed again and again, beside the same run left alone.

Each phase is one tiny command line. It runs once unbroken; then it is killed by
SIGKILL, at named points (`faults`) and at random times, and started again by
the same line until it ends. Every update of every attempt, also those that are
lost and done again, leaves SHA-256s of weights, of all other state, of the
batch and of the drawn negatives; all must be those of the unbroken run, and
so must the metrics and every file of the result.

  python benchmarks/soak.py --kills=50 --seed=0 --out=soak.md
  python benchmarks/soak.py --every=200     goodput, a failure every 200 updates

Phases take turns, and the table is written after every life, so a soak that is
stopped leaves what it has seen.

Exits with 1 if a verified step was lost, a hash differs or a point was never
reached. An attempt is a fork of a process that has imported everything and
touched no device, so it starts faster than the command line does.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import queue
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLACES = [str(ROOT / name) for name in (".", "tests", "benchmarks")]
sys.path[:0] = PLACES
# What JAX and fsspec read when they are imported; the server of forks finds it.
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1",
               "TRANSFORMERS_VERBOSITY": "error",
               "FSSPEC_FILE_AUTO_MKDIR": "true",  # stores have no folders
               "PYTHONPATH": os.pathsep.join(PLACES)}
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(
    pathlib.Path(tempfile.gettempdir()) / "mcpo_jax_test_programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import run_cases  # noqa: E402
import tokenizers  # noqa: E402, F401
import transformers.models.auto.tokenization_auto  # noqa: E402, F401

from mcpo_jax import commit, errors, main, verbs  # noqa: E402, F401
from mcpo_jax.training import update  # noqa: E402

YEAR = 365 * 24 * 3600
FAILURES = 3  # of a run whose goodput is told
ANYWHERE = 12  # a point of every update is met up to this time
KILLS = 10  # of one life at most


class Phase(NamedTuple):
  """A command line, and where it can be killed."""

  verb: str
  flags: tuple[str, ...]  # {life}: the folder of all that one life makes
  points: dict[str, int]  # in the order they are met: up to which time
  devices: int = 1
  starts: bool = False  # from {start}, the model of a short run before all
  served: bool = False  # by a process of its own at {port}; it dies at gen.*


STEPS = {
    "data.next": ANYWHERE, "step.before": ANYWHERE, "step.drawn": ANYWHERE,
    "step.accumulate": 4, "step.after": ANYWHERE,
    "ckpt.begin": 3, "ckpt.shard": 3, "ckpt.manifest": 3, "ckpt.rename": 3,
    "ckpt.gc": 1}
SAMPLES = {"online.part": 4, "reward.reply": 2, "online.scored": 2,
           "online.committed": 2}
# Points that are met only where an attempt before was killed at another one.
AFTER = {"export.moved": "export.written", "folder.moved": "export.move"}
OFFLINE = ("--config.data.eval_fraction=0.0", "--config.num_steps=16")
ROUNDS = (
    *OFFLINE[:1], "--config.online.enabled=True",
    "--config.online.prompts_per_round=10",
    "--config.online.prompts_per_part=4", "--config.online.num_candidates=4",
    "--config.reward.name=online_rewards:letters",
    "--config.generation.max_new_tokens=9", "--config.stages=sft,preference")
PHASES = {
    "offline": Phase(
        "train", ("--config.stages=sft,preference,export",
                  "--config.num_steps=16"),
        {"file.rename": 5, "folder.write": 4, "folder.manifest": 4,
         "folder.rename": 4, "folder.move": 4} | STEPS
        | {"step.first_chunk": ANYWHERE, "reference.shard": 1,
           "export.write": 1, "export.manifest": 1, "export.rename": 1,
           "export.move": 1, "export.begin": 1, "export.written": 1,
           "export.moved": 1}),
    "mirrored": Phase(
        "train", (*OFFLINE, "--config.stages=sft,preference",
                  "--config.checkpoint.mirror=file://{life}/store",
                  "--config.kernel.init=persistent"),
        STEPS | {"store.manifest": 3}),
    "state": Phase(
        "train", (*OFFLINE, "--config.stages=sft,preference",
                  "--config.objective.name=bco",
                  "--config.kernel.temperature=None"), STEPS),
    "window": Phase(
        "train", (*OFFLINE, "--config.stages=sft,preference",
                  "--config.kernel.refresh=epoch"), STEPS),
    "lora": Phase(
        "train", (*OFFLINE, "--config.stages=preference",
                  "--config.model.path={start}", "--config.lora.rank=3",
                  "--config.reference.source=lora_base"),
        STEPS | {"export.move": 1, "folder.moved": 1}, starts=True),
    "online": Phase("train", ROUNDS, STEPS | SAMPLES),
    "overlapped": Phase(
        "train", (*ROUNDS, "--config.online.policy_lag=1",
                  "--config.generation.num_devices=1"),
        STEPS | SAMPLES, devices=2),
    "served": Phase(
        "train", (*ROUNDS, "--config.generation.url=http://127.0.0.1:{port}"),
        SAMPLES | {"gen.update": 3, "gen.request": ANYWHERE,
                   "gen.reply": ANYWHERE}, starts=True, served=True),
    "long": Phase("train", (
        *OFFLINE, "--config.stages=preference",
        "--config.checkpoint.every_steps=5"), {"step.after": 1}),
    "generate": Phase(
        "generate", ("--config.generate.prompts_per_shard=4",
                     "--config.generation.max_new_tokens=9",
                     "--config.generate.data_path={data}/kwise.jsonl",
                     "--config.model.path={start}"),
        {"generate.shard": 5}, starts=True),
    "benchmark": Phase(
        "train", ("--config.stages=sft,preference,evaluate",
                  "--config.num_steps=2", "--config.benchmark.name=gsm8k",
                  "--config.benchmark.questions_path={data}/gsm8k.jsonl",
                  "--config.benchmark.max_new_tokens=6"),
        {"benchmark.part": 4}),
}


# --- one attempt, in a process of its own -------------------------------------


def attempt(argv, environment, log, records, jumps, pause) -> None:
  """The command line, with every update written down in `records`, and so many
  seconds longer; if it `jumps`, the clock goes back by a year after the third.
  """
  os.environ.update(environment)
  for stream in (1, 2):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
  sys.argv = ["mcpo_jax", *argv]
  watch(records, jumps, pause)
  main.main()


def watch(path: pathlib.Path, jumps: bool, pause: float) -> None:
  """Has `run_step` append a line of hashes for each update."""
  run_step, file, clock = update.run_step, open(path, "a"), time.time

  def watched(stage, model, functions, state, batch, reference):
    state, metrics = run_step(stage, model, functions, state, batch, reference)
    time.sleep(pause)
    rest = state._replace(params=(), step=())
    file.write(json.dumps({
        "stage": stage.name, "step": int(state.step),
        "at": time.monotonic(), "cpu": time.process_time(),
        "params": digest(state.params), "state": digest(rest),
        "batch": digest([batch.meta.example_id, batch.meta.visit,
                         batch.meta.candidate_id]),
        "negatives": digest([metrics["kernel/selected"],
                             metrics["kernel/selected_mask"]])}) + "\n")
    file.flush()
    if jumps and int(state.step) == 3:
      time.time = lambda: clock() - YEAR
    return state, metrics

  update.run_step = watched


def digest(tree: Any) -> str:
  """SHA-256 of the leaves: types, shapes and bytes."""
  out = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get(tree)):
    leaf = np.asarray(leaf)
    out.update(f"{leaf.dtype}{leaf.shape}".encode())
    out.update(np.ascontiguousarray(leaf).tobytes())
  return out.hexdigest()


# An exit code can be read once, and a start reads those of all processes: of
# two threads that read at once, one would be told 255.
_EXIT_CODES = threading.Lock()


def started(process):
  """The process, which now runs."""
  with _EXIT_CODES:
    process.start()
  return process


def ended(process, seconds: float | None = None) -> int | None:
  """Its exit code; None where it still runs after so many seconds."""
  multiprocessing.connection.wait([process.sentinel], seconds)
  with _EXIT_CODES:
    return process.exitcode


# --- one life: attempts on one workdir until the run ends ---------------------


class Kill(NamedTuple):
  """What is to happen to an attempt."""

  point: str | None  # None: at a random time
  count: int = 1  # which time the point is met
  seconds: float = 0.0  # after the start


class Outcome(NamedTuple):
  """What became of one kill."""

  phase: str
  point: str  # "random" for a random time
  restart_seconds: float | None  # to the first update; None: there was none
  resumed: bool  # the next attempt began at a checkpoint, not at a start
  redone: int  # updates done before the kill and again after it
  lost: int  # verified steps that the next attempt did not begin at


class Phases:
  """The runs of one phase below a folder."""

  def __init__(self, name: str, folder: pathlib.Path, context):
    """Writes the data; runs nothing yet."""
    self.name, self.phase, self._context = name, PHASES[name], context
    self.folder = folder / name
    self._data = run_cases.write_data(self.folder / "data")
    (self.folder / "data" / "gsm8k.jsonl").write_text("".join(
        json.dumps({"question": f"{i}?", "answer": f"#### {i}"}) + "\n"
        for i in range(70)))  # two parts
    with socket.create_server(("127.0.0.1", 0)) as free:
      self._port = free.getsockname()[1]
    self._server = None  # the process
    self.pause = 0.0  # after each update
    self.problems: list[str] = []
    self.wanted: list[str | None] = []  # kills that are still to come
    self.outcomes: list[Outcome] = []
    self.idle = 0  # lives in a row in which no kill came to its place
    self.unbroken: dict[str, str] = {}  # files of its result
    self._lives = 0
    self.known: dict[tuple[str, int], dict[str, Any]] = {}
    self.updates = 0  # of all attempts

  def run_unbroken(self) -> None:
    """The run that all others are compared with."""
    if self.phase.starts:
      self._whole("start", "train", "--config.stages=sft")
    self.seconds = self._whole("unbroken", self.phase.verb, *self.phase.flags)
    for row in self._rows("unbroken", 0):
      self.known[row["stage"], row["step"]] = row
    self.unbroken = result_of(self.folder / "unbroken" / "run")

  def _whole(
      self, life: str, verb: str, *flags: str, jumps: bool = False) -> float:
    """A run that nothing kills; the seconds it took."""
    began = time.monotonic()
    if life != "start":
      self._serve(life)
    code = ended(self._start(life, 0, None, verb, *flags, jumps=jumps))
    self._stop_server()
    if code:
      raise SystemExit(f"{self.name} does not run by itself:\n"
                       + self._said(life)[-3000:])
    return time.monotonic() - began

  def jump(self) -> None:
    """A run whose clock is set back in the middle of each stage."""
    self._whole("clock", self.phase.verb, *self.phase.flags, jumps=True)
    self._compare(self._rows("clock", 0), "with a clock that jumps")
    self._compare_results(
        result_of(self.folder / "clock" / "run"), "with a clock that jumps")

  def _start(self, life: str, number: int, kill: Kill | None, *words: str,
             jumps: bool = False):
    verb, *flags = words or (self.phase.verb, *self.phase.flags)
    data = [] if verb == "generate" else self._data
    return self._process(
        life, f"{number}.jsonl", kill,
        [verb, *run_cases.TINY, *data, *flags, "--workdir={life}/run"], jumps)

  def _serve(self, life: str, kill: Kill | None = None) -> None:
    """Has the server of a phase run, with what is to happen to it."""
    if self.phase.served and (kill or self._server is None):
      self._stop_server()
      self._server = self._process(life, "server.jsonl", kill, [
          "serve", "--config=configs/serve.py",
          "--config.model.path={start}", "--config.serve.port={port}",
          "--config.serve.num_slots=64", "--config.data.max_prompt_length=48",
          "--config.data.max_completion_length=24"])

  def _stop_server(self) -> None:
    if self._server is not None:
      self._server.kill()
      ended(self._server)
      self._server = None

  def _process(self, life: str, records: str, kill: Kill | None,
               argv: list[str], jumps: bool = False):
    folder = self.folder / life
    folder.mkdir(exist_ok=True)
    places = {"life": folder, "data": self.folder / "data", "port": self._port,
              "start": self.folder / "start" / "run" / "sft" / "model"}
    environment = {
        "MCPO_CACHE": str(folder / "cache"), "MCPO_FAULT": "",
        "MCPO_SERVE_TOKEN": "a token of the soak",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 "
        f"--xla_force_host_platform_device_count={self.phase.devices}"}
    if kill and kill.point:
      environment["MCPO_FAULT"] = f"{kill.point}@{kill.count}"
    process = self._context.Process(target=attempt, args=(
        [word.format(**places) for word in argv], environment, folder / "log",
        folder / records, jumps, self.pause))
    return started(process)

  def _attempt(self, life: str, number: int, kill: Kill | None):
    """One attempt under a kill: the exit code, and whether the kill has
    happened."""
    of_server = self.phase.served and kill is not None and (
        kill.point or "").startswith("gen.")
    self._serve(life, kill if of_server else None)
    process = self._start(life, number, None if of_server else kill)
    if of_server:
      ready = multiprocessing.connection.wait(
          [process.sentinel, self._server.sentinel])
      if self._server.sentinel not in ready:
        return ended(process), False
      code = ended(self._server)
      if code != -signal.SIGKILL:
        self.problems.append(f"{self.name}: the server ended with {code}")
      self._server = None
      self._serve(life)
    code = ended(process, kill.seconds if kill and (
        of_server or not kill.point) else None)
    if code is None:
      process.kill()
      code = ended(process)
    return code, of_server or code == -signal.SIGKILL

  def _said(self, life: str) -> str:
    return (self.folder / life / "log").read_text(errors="replace")

  def _rows(self, life: str, number: int) -> list[dict[str, Any]]:
    path = self.folder / life / f"{number}.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]

  def live(self, kills: list[Kill]) -> tuple[list[Outcome], list[Kill]]:
    """One run under these kills; what became of them, and those whose place
    was never reached."""
    self._lives += 1
    life = f"life {self._lives}"
    workdir = self.folder / life / "run"
    outcomes, missed, done = [], [], set()
    pending: Outcome | None = None
    verified: dict[str, int] = {}
    for number, kill in enumerate([*kills, None]):
      began = time.monotonic()
      code, happened = self._attempt(life, number, kill)
      rows = self._rows(life, number)
      self._compare(rows, f"{life}, attempt {number}")
      if pending is not None:
        steps = {(row["stage"], row["step"]) for row in rows}
        outcomes.append(pending._replace(
            restart_seconds=rows[0]["at"] - began if rows else None,
            resumed=bool(rows) and rows[0]["step"] > 1,
            redone=len(steps & done), lost=self._lost(verified, rows)))
        pending = None
      done = {(row["stage"], row["step"]) for row in rows}
      if happened:
        pending = Outcome(self.name, kill.point or "random", None, False, 0, 0)
      if code == 0:
        if pending:  # a server's death that the run has outlived
          outcomes.append(pending)
        missed = kills[number + happened:]
        break
      if code != -signal.SIGKILL:
        self.problems.append(
            f"{self.name} ends with {code}: "
            + self._said(life).strip().splitlines()[-1])
        break
      now = verified_steps(workdir)
      for stage, step in verified.items():
        if now.get(stage, -1) < step:
          self.problems.append(f"{self.name}: step {step} of {stage} is gone")
      verified = now
    self._stop_server()
    self._compare_results(result_of(workdir), life)
    self.problems += [f"{self.name}, {life}: {path} is left over"
                      for path in left_over(self.folder / life)]
    shutil.rmtree(self.folder / life / "cache", ignore_errors=True)
    return outcomes, missed

  def _compare(self, rows, where: str) -> None:
    """Every hash of every update against those of the unbroken run; without
    one, against those of the first time."""
    self.updates += len(rows)
    for row in rows:
      known = self.known.setdefault((row["stage"], row["step"]), row)
      other = [key for key in ("params", "state", "batch", "negatives")
               if known[key] != row[key]]
      if other:
        self.problems.append(
            f"{self.name}, {where}: {', '.join(other)} of {row['stage']} "
            f"{row['step']} differ")

  def _compare_results(self, result: dict[str, str], life: str) -> None:
    if not self.unbroken:
      return
    for name in sorted(result.keys() | self.unbroken.keys()):
      if result.get(name) != self.unbroken.get(name):
        self.problems.append(f"{self.name}, {life}: {name} differs")

  def _lost(self, verified: dict[str, int], rows) -> int:
    """Verified steps that an attempt did again."""
    first = {}
    for row in rows:
      first.setdefault(row["stage"], row["step"])
    return sum(max(0, step + 1 - first[stage])
               for stage, step in verified.items() if stage in first)


def verified_steps(workdir: pathlib.Path) -> dict[str, int]:
  """Stage -> the newest step on disk whose content is what was written."""
  newest = {}
  for stage in ("sft", "preference"):
    for path in (workdir / stage / "checkpoints").glob("*"):
      if not path.name.isdecimal():
        continue
      try:
        commit.verify(path)
      except (errors.CheckpointError, ValueError):
        continue
      newest[stage] = max(newest.get(stage, 0), int(path.name))
  return newest


def left_over(folder: pathlib.Path) -> list[str]:
  """What killed writers left, and nobody took away."""
  found = [path for path in folder.rglob("*")
           if path.suffix == ".tmp" or "-checkpoint-tmp" in path.name
           or path.parent.name == "checkpoints" and path.name.isdecimal()
           and not (path / commit.MANIFEST).exists()]
  return [str(path.relative_to(folder)) for path in found]


# Told of one launch, or with times and speeds in it, or with the rounding of a
# server's log-probs, which depends on the company in its slots. What a manifest
# says of other files is seen of these.
_OWN = (".lock", "launches.jsonl", "report.html", commit.MANIFEST)
_SPEEDS = re.compile(
    "time|perf/.*|generate/(seconds|tokens_per_sec|logp_gap.*)")


def result_of(workdir: pathlib.Path) -> dict[str, str]:
  """File -> SHA-256 of what a run leaves: all but checkpoints, with the
  metrics without times and speeds."""
  out = {}
  for path in sorted(workdir.rglob("*")):
    name = str(path.relative_to(workdir))
    if not path.is_file() or "checkpoints/" in name or path.name in _OWN:
      continue
    if name == "config.json":  # beside the config the run's own name
      text = json.dumps(json.loads(path.read_text())["config"]).encode()
    elif name == "metrics.jsonl":
      rows = [{key: value for key, value in json.loads(line).items()
               if not _SPEEDS.fullmatch(key)}
              for line in path.read_text().splitlines()]
      text = json.dumps(rows).encode()
    else:
      text = path.read_bytes()
    text = text.replace(str(workdir.parent).encode(), b"")
    out[name] = hashlib.sha256(text).hexdigest()
  return out


# --- the soak -----------------------------------------------------------------


def plan(phase: Phase, kills: int, rng: random.Random) -> list[str | None]:
  """Two of three at named points, each of them before any comes again, and
  the others, None, at random times."""
  named, points = [], list(phase.points)
  while len(named) < kills - kills // 3:
    named += rng.sample(points, len(points))
  return [None if i % 3 == 2 else named[i - i // 3] for i in range(kills)]


def soak(phase: Phases, rng: random.Random) -> None:
  """One life of a phase, under the next of its kills."""
  some, phase.wanted = phase.wanted[:KILLS], phase.wanted[KILLS:]
  points = phase.phase.points
  named = sorted(filter(None, some), key=list(points).index)
  for _ in range(len(some) - len(named)):
    named.insert(rng.randrange(len(named) + 1), None)
  kills = []
  for name in named:
    before = AFTER.get(name)
    if before and not (kills and kills[-1].point == before):
      kills.append(Kill(before))
    most = 1 if phase.idle > 1 else points.get(name)
    kills.append(Kill(
        name, rng.randint(1, most) if name else 1,
        # Earlier after a life too short for it: the machine may be faster now.
        rng.uniform(0.1, max(0.2, 0.8 * phase.seconds / 2**phase.idle))))
  found, missed = phase.live(kills)
  phase.outcomes += found
  phase.idle = 0 if found else phase.idle + 1
  phase.wanted = [kill.point for kill in missed] + phase.wanted
  print(f"{phase.name}: {len(phase.outcomes)}, {len(phase.wanted)} to come",
        *found, *phase.problems, sep="\n  ", flush=True)
  if phase.wanted and phase.idle == 5:
    phase.problems.append(f"{phase.name}: never reached: {phase.wanted}")
    phase.wanted = []


def table(phases: list[Phases]) -> str:
  """Markdown: a line per phase, and the points."""
  lines = [
      "| phase | kills | at named points | at random times | went on from a "
      "checkpoint | verified steps lost | updates compared | restart to first "
      "update, median | updates done again, mean (max) | wrong |",
      "|---" * 10 + "|"]
  outcomes = [one for phase in phases for one in phase.outcomes]
  problems = [problem for phase in phases for problem in phase.problems]
  for name, some, own in [
      *((p.name, p.outcomes, [p]) for p in phases), ("all", outcomes, phases)]:
    at_random = sum(o.point == "random" for o in some)
    seconds = [o.restart_seconds for o in some if o.restart_seconds]
    redone = [o.redone for o in some]
    lines.append(
        f"| {name} | {len(some)} | {len(some) - at_random} | {at_random} | "
        f"{sum(o.resumed for o in some)} | {sum(o.lost for o in some)} | "
        f"{sum(p.updates for p in own)} | "
        + (f"{np.median(seconds):.1f} s" if seconds else "–")
        + (f" | {np.mean(redone):.1f} ({max(redone)})" if some else " | –")
        + f" | {sum(len(p.problems) for p in own)} |")
  counts = collections.Counter(o.point for o in outcomes)
  never = sorted(points_of(p.name for p in phases) - counts.keys())
  lines += ["", "Kills by point: " + ", ".join(
      f"`{name}` {count}" for name, count in sorted(counts.items())) + ".",
            "", f"Points of these phases without a kill: {len(never)}"
            + "".join(f", `{name}`" for name in never) + "."]
  return "\n".join([*lines, *(f"\n- {problem}" for problem in problems)]) + "\n"


def points_of(phases: Iterable[str]) -> set[str]:
  """The points at which phases can be killed."""
  return {point for name in phases for point in PHASES[name].points}


def goodput(phase: Phases, every: int) -> str:
  """Failures, one every so many updates, and a save every fifth."""
  outcomes, missed = phase.live([Kill("step.after", every)] * FAILURES)
  assert not missed, missed
  useful = len(phase.known)
  done = phase.updates
  restart = float(np.median([o.restart_seconds for o in outcomes]))
  redone = np.mean([o.redone for o in outcomes])
  share = lambda seconds: every * seconds / (
      (every + redone) * seconds + restart)
  return "\n".join([
      f"A failure every {every} updates, a save every 5, {phase.pause} s added "
      f"to an update: {useful} updates, "
      f"{done} done, goodput {useful / done:.1%} of the updates. A failure "
      f"costs {redone:.1f} updates (at most "
      f"{max(o.redone for o in outcomes)}) and "
      f"{restart:.1f} s to the first update, so of the time "
      + ", ".join(f"{share(s):.1%} where an update takes {s} s"
                  for s in (1, 10)) + ".",
      *(f"\n- {problem}" for problem in phase.problems)]) + "\n"


def parse() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--kills", type=int, default=50, help="of all phases")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--phases", default=",".join(
      name for name in PHASES if name != "long"))
  parser.add_argument("--every", type=int, help="updates between failures")
  parser.add_argument("--pause", type=float, default=0.0,
                      help="seconds that --every adds to an update")
  parser.add_argument("--lanes", type=int, default=2, help="runs at a time")
  parser.add_argument("--folder", help="of the runs, kept")
  parser.add_argument("--out", help="file for the table")
  return parser.parse_args()


def soak_all(options: argparse.Namespace, folder: pathlib.Path) -> bool:
  """All phases; prints the table. Whether nothing was wrong."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["soak"])  # this, by its name as a module
  if options.every:
    steps = f"--config.num_steps={FAILURES * options.every}"
    PHASES["long"] = PHASES["long"]._replace(
        flags=(*PHASES["long"].flags, steps))
    phase = Phases("long", folder, context)
    phase.pause = options.pause
    text = goodput(phase, options.every)
    print(text)
    return not phase.problems
  names = options.phases.split(",")
  phases = [Phases(name, folder, context) for name in names]
  turns, writing = queue.SimpleQueue(), threading.Lock()
  streams = {name: random.Random(f"{options.seed} {name}") for name in names}
  for i, phase in enumerate(phases):
    share = options.kills // len(names) + (i < options.kills % len(names))
    phase.wanted = plan(phase.phase, share, streams[phase.name])
    turns.put(phase)

  def write() -> str:
    with writing:
      text = table(phases)
      if options.out:
        pathlib.Path(options.out).write_text(text)
      return text

  def lane() -> None:
    with contextlib.suppress(queue.Empty):
      while phase := turns.get_nowait():
        if not phase.unbroken:
          phase.run_unbroken()
          if phase.name == "offline":
            phase.jump()
        soak(phase, streams[phase.name])
        write()
        if phase.wanted:
          turns.put(phase)

  with concurrent.futures.ThreadPoolExecutor(options.lanes) as pool:
    for one in [pool.submit(lane) for _ in range(options.lanes)]:
      one.result()
  print(write())
  return not any(phase.problems for phase in phases) and not any(
      one.lost for phase in phases for one in phase.outcomes)


if __name__ == "__main__":
  typed = parse()
  with tempfile.TemporaryDirectory() as temporary:
    fine = soak_all(typed, pathlib.Path(typed.folder or temporary))
  sys.exit(not fine)
