"""A run without a network, and what it leaves behind: no text, no secret.

One run is killed, resumed and exported in a network namespace of its own;
others fail in several ways. Every prompt, completion and token holds a word
that occurs nowhere else, and none of these words may be found outside the
files that exist to show text.
"""

import json
import random
import shutil
import subprocess
import sys

import pytest
import run_cases

# What exists to show text to people, and the tokenised data themselves.
SHOWN = {"samples.jsonl", "candidates.jsonl", "candidates.html", "report.html",
         "columns.jsonl"}
FLAGS = ("--config.stages=('sft','preference','export')",
         "--config.data.max_quarantined_share=0.1")


class Words:
  """Words that nobody else uses; no tokenizer learns one of them whole."""

  def __init__(self):
    self.rng, self.all = random.Random(7), []

  def new(self) -> str:
    self.all.append("".join(self.rng.choices("ghjkmnpqrstvwxyz", k=24)))
    return self.all[-1]


def write_data(folder, words) -> list[str]:
  """Rows of the quickstart's kind, each text with a word, and a bad one."""
  kwise, sft = [], []
  for i in range(30):
    prompt = f"say {words.new()}"
    right, wrong = words.new(), words.new()
    kwise.append({"prompt_id": f"row-{i}", "prompt": prompt,
                  "completions": [right, wrong], "scores": [1.0, 0.0]})
    sft.append({"prompt_id": f"row-{i}", "prompt": prompt,
                "completion": right})
  kwise.append({"prompt": words.new(), "completions": [words.new(), 3],
                "scores": [1.0, 0.0]})
  folder.mkdir()
  for name, rows in (("kwise", kwise), ("sft", sft)):
    (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows))
  return [f"--config.data.path={folder / 'kwise.jsonl'}",
          f"--config.sft.data_path={folder / 'sft.jsonl'}"]


def hits(folder, words) -> set[str]:
  """The files under a folder that hold one of the words."""
  return {str(path.relative_to(folder)) for path in folder.rglob("*")
          if path.is_file() and path.name not in SHOWN
          and any(word.encode() in path.read_bytes() for word in words.all)}


@pytest.fixture(scope="module")
def network_off():
  """The words before a command that has no network but its own loopback."""
  words = ["unshare", "--map-root-user", "--net"]
  try:
    subprocess.run([*words, "true"], check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as e:
    pytest.skip(f"no network namespace can be made here: {e}")
  return words


@pytest.fixture(scope="module")
def cycle(tmp_path_factory, network_off):
  """A run that was killed and has resumed; its folder, words and outputs."""
  base, words = tmp_path_factory.mktemp("offline"), Words()
  flags = [*write_data(base / "data", words), *FLAGS]
  secrets = {"HF_TOKEN": "hf_" + words.new() + words.new(),
             "MCPO_SERVE_TOKEN": words.new(), "HF_HUB_OFFLINE": "0",
             "HF_HOME": str(base / "hub")}
  (base / "out").mkdir()

  def run(name, *more, verb="train", workdir="run", **extra):
    env = run_cases.environment(base / "cache", **secrets, **extra)
    done = subprocess.run(
        [*network_off, *run_cases.command(
            verb, base / "out" / workdir, *flags, *more)],
        env=env, cwd=run_cases.ROOT, capture_output=True, text=True,
        timeout=300)
    (base / "out" / f"{name}.log").write_text(done.stdout + done.stderr)
    return done

  quarantine = "--config.data.quarantine=true"
  killed = run("killed", quarantine, MCPO_FAULT="step.after@12")
  resumed = run("resumed", quarantine)
  return base, words, run, killed, resumed


def test_train_resume_and_export_need_no_network(cycle):
  base, _, _, killed, resumed = cycle
  assert killed.returncode == -9, killed.stderr[-3000:]
  assert resumed.returncode == 0, resumed.stderr[-3000:]
  assert "preference resumes at step" in resumed.stderr
  assert (base / "out" / "run" / "export" / "model.safetensors").is_file()


def test_the_namespace_has_no_network(network_off):
  code = ("import socket\ntry:\n  socket.create_connection(('1.1.1.1', 53), 2)"
          "\nexcept OSError:\n  print('none')")
  done = subprocess.run([*network_off, sys.executable, "-c", code],
                        capture_output=True, text=True, timeout=60)
  assert done.stdout == "none\n"


def test_no_text_and_no_secret_is_left_outside_what_shows_text(cycle):
  base, words, run, _, resumed = cycle
  # A mistake in the data, other data, another config, a crash, a foreign
  # folder: each failure has its message.
  strict = run("strict", workdir="strict")
  assert (strict.returncode, "data.field_type" in strict.stderr) == (3, True)
  assert "stage sft" not in strict.stderr  # told before anything trains
  other = run("other", "--config.data.quarantine=true",
              "--config.objective.beta=0.7")
  assert (other.returncode, "config.other_run" in other.stderr) == (2, True)
  shutil.copytree(base / "out" / "run", base / "out" / "moved")
  shutil.rmtree(base / "out" / "moved" / "export")
  foreign = run("foreign", f"--out={base / 'data'}", verb="export",
                workdir="moved")
  assert foreign.returncode in (2, 4) and "error[" in foreign.stderr
  crash = run("crash", "--config.data.quarantine=true", "--config.seed=3",
              workdir="crash", MCPO_FAULT="step.before@1:raise")
  assert crash.returncode == 1 and "Traceback" in crash.stderr

  listed = base / "out" / "run" / "quarantine_train.jsonl"
  assert json.loads(listed.read_text())["line"] == "31"
  assert resumed.returncode == 0
  assert hits(base / "out", words) == set()
  assert hits(base / "cache", words) == set()


def test_a_word_would_be_found(cycle):
  base, words, _, _, _ = cycle
  assert hits(base / "data", words) == {"kwise.jsonl", "sft.jsonl"}
