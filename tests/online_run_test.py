"""OnMC-PO by the command line: real processes, killed with real signals."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import run_cases
import serve_cases

from mcpo_jax.training import rounds as rounds_lib

ONLINE = [
    "--config.online.enabled=True", "--config.online.prompts_per_round=10",
    "--config.online.num_candidates=4", "--config.reward.name=None",
    "--config.reward.name=online_rewards:letters",
    "--config.generation.max_new_tokens=9", "--config.stages=sft,preference",
    "--config.data.eval_fraction=0.0",
]
PATH = f"{run_cases.ROOT}:{run_cases.ROOT / 'tests'}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with data and a cache that all runs here share: one SFT start."""
  folder = tmp_path_factory.mktemp("online runs")
  return folder, run_cases.write_data(folder / "data")


def train(home, name, *flags, **extra):
  folder, data = home
  return run_cases.run("train", folder / name, folder / "cache", *data,
                       *ONLINE, *flags, PYTHONPATH=PATH, **extra)


def succeed(home, name, *flags, **extra) -> pathlib.Path:
  done = train(home, name, *flags, **extra)
  assert done.returncode == 0, done.stderr[-3000:]
  return home[0] / name


def losses(folder):
  return {r["step"]: r["loss"] for r in run_cases.metrics(folder)
          if r["stage"] == "preference" and "loss" in r}


def pools(folder):
  return [rounds_lib.read_pool(p) for p in sorted(
      (folder / "preference" / "rounds").glob("[0-9]*"))]


# A network of its own, without any way out, where a user may make one.
ALONE = ["unshare", "-rn"]
if shutil.which("unshare") is None or subprocess.run(
    [*ALONE, "true"], capture_output=True).returncode:
  ALONE = []


@pytest.fixture(scope="module")
def unbroken(home):
  """Ran without a network, and was not told to expect none."""
  folder, data = home
  done = subprocess.run(
      [*ALONE, *run_cases.command("train", folder / "unbroken", *data,
                                  *ONLINE)],
      env=run_cases.environment(
          folder / "cache", PYTHONPATH=PATH, HF_HUB_OFFLINE="0"),
      cwd=run_cases.ROOT, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  return folder / "unbroken"


@pytest.mark.skipif(not ALONE, reason="needs user namespaces")
def test_f25_a_run_needs_no_network(unbroken):
  with socket.create_server(("127.0.0.1", 0)) as here:
    address = here.getsockname()
    reach = f"import socket; socket.create_connection({address!r})"
    assert not subprocess.run([sys.executable, "-c", reach]).returncode
    there = subprocess.run([*ALONE, sys.executable, "-c", reach],
                           capture_output=True, text=True)
  assert "Network is unreachable" in there.stderr
  assert run_cases.summary(unbroken)["step"] == 8


def test_every_candidate_says_where_it_came_from(unbroken):
  made = pools(unbroken)
  assert [p.policy_step for p in made] == [0, 2, 4, 6]
  for number, pool in enumerate(made):
    assert len(pool.sets) == 10
    assert len({s.candidates.prompt_id for s in pool.sets}) == 10
    for one in pool.sets:
      own = one.candidates
      assert set(one.sources) == {"policy"}
      assert own.multiplicity.sum() <= 4
      assert own.policy_step == 2 * number
      assert np.all(own.candidate_ids // 4096 == number + 1)
      assert set(one.finish_reasons) <= {"stop", "length"}
      # Temperature 1, nothing cut off: the law drawn from is the policy's.
      np.testing.assert_allclose(
          own.behaviour_logps, own.behaviour_raw_logps, rtol=1e-5)
      assert len(one.anchors["ref"]) == len(one.texts) == len(own.scores)
  # The first round's writer is the reference.
  for one in made[0].sets:
    np.testing.assert_allclose(
        one.anchors["ref"], one.candidates.behaviour_raw_logps, atol=1e-4)
  rows = [r for r in run_cases.metrics(unbroken) if "candidates/score" in r]
  assert [r["step"] for r in rows] == [1, 3, 5, 7]
  assert all(0 < r["generate/logp_gap"] < 1e-4 for r in rows)
  assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.nightly
def test_a_run_stopped_in_a_round_keeps_the_parts_that_are_done(home, unbroken):
  """The third round is sampled in parts of 4, 4 and 2 prompts."""
  parts = "--config.online.prompts_per_part=4"
  done = train(home, "stopped", parts, MCPO_FAULT="online.part@8:term")
  assert done.returncode == 75
  assert "preference is saved at step 4" in done.stderr
  folder = home[0] / "stopped"
  made = sorted((folder / "preference/rounds/000002.samples").iterdir())
  assert [p.name for p in made] == ["000000", "000004"]
  before = [p.stat().st_mtime_ns for p in made]
  done = train(home, "stopped", parts, MCPO_FAULT="online.scored@1:term")
  assert done.returncode == 75
  assert [p.stat().st_mtime_ns for p in made] == before  # and are taken
  succeed(home, "stopped", parts)
  # In other company the samples are the same, their log-probs up to rounding.
  assert losses(folder) == pytest.approx(losses(unbroken), abs=1e-5)


@pytest.mark.parametrize("fault", [
    "online.committed@3",  # the folder is there, no update has used it
    *(pytest.param(fault, marks=pytest.mark.nightly) for fault in (
        "reward.reply@3",  # samples and scores are there, no candidates
        "step.drawn@6")),  # inside a round, no checkpoint of this step
])
def test_a_run_killed_in_a_round_ends_with_the_same_weights(
    home, unbroken, tmp_path, fault):
  name = f"killed {fault}"
  assert train(home, name, MCPO_FAULT=fault).returncode == -9
  folder = succeed(home, name)
  assert (run_cases.summary(folder)["params/sha256"]
          == run_cases.summary(unbroken)["params/sha256"])
  assert losses(folder) == losses(unbroken)
  for one, other in zip(pools(folder), pools(unbroken)):
    assert str(one.sets) == str(other.sets)


def test_a_run_with_a_lag_and_moving_weights_goes_on_where_it_was_killed(home):
  flags = ["--config.online.policy_lag=1", "--config.reference.source=ema",
           "--config.online.replay_rounds=1", "--config.num_steps=6",
           "--config.checkpoint.every_steps=3",
           "--config.generation.num_devices=1"]  # one trains, one samples
  two = {"XLA_FLAGS": run_cases.environment("")["XLA_FLAGS"]
         + " --xla_force_host_platform_device_count=2"}
  whole = succeed(home, "lag", *flags, **two)
  assert [p.policy_step for p in pools(whole)] == [0, 0, 2]
  killed = train(
      home, "lag killed", *flags, MCPO_FAULT="step.before@5", **two)
  assert killed.returncode == -9
  again = succeed(home, "lag killed", *flags, **two)
  assert losses(again) == losses(whole)
  assert (run_cases.summary(again)["params/sha256"]
          == run_cases.summary(whole)["params/sha256"])


@pytest.mark.parametrize("name, flags", [
    ("spin", ["--config.objective.name=spin", "--config.kernel.strategy=random",
              "--config.online.preferred=data", "--config.reward.name=None",
              "--config.online.num_candidates=2"]),
    pytest.param("inpo rounds", [
        "--config.objective.name=inpo", "--config.kernel.strategy=random",
        "--config.online.num_candidates=3"], marks=pytest.mark.nightly),
    ("rso, half offline", [
        "--config.objective.name=rso", "--config.kernel.strategy=random",
        "--config.online.rejection_beta=0.5", "--config.online.num_samples=5",
        "--config.online.online_fraction=0.5"]),
    ("ipo_md", ["--config.objective.name=ipo",
                "--config.kernel.strategy=random",
                "--config.online.mixture=0.25",
                "--config.online.num_candidates=2"]),
    pytest.param("corrected", [
        "--config.proposal.correction=True", "--config.data.eval_fraction=0.2",
        ], marks=pytest.mark.nightly),
    pytest.param("accelerated", [
        "--config.objective.name=dpo", "--config.kernel.strategy=random",
        "--config.reference.source=previous_round",
        "--config.online.extrapolation=0.3",
        "--config.online.judge=online_rewards:shortest",
        ], marks=pytest.mark.nightly),
])
def test_methods_of_rounds_run_from_a_config(home, name, flags):
  flags = ["--config.kernel.temperature=None", "--config.num_steps=4", *flags]
  if name == "ipo_md":  # records that are a prompt and nothing else
    path = home[0] / "prompts.jsonl"
    path.write_text("".join(
        json.dumps({"prompt": f"colour of thing {i}"}) + "\n"
        for i in range(12)))
    flags.append(f"--config.data.path={path}")
  folder = succeed(home, name, *flags)
  made = pools(folder)
  assert [p.policy_step for p in made] == [0, 2]
  for one in (s for p in made for s in p.sets):
    own, count = one.candidates, len(one.texts)
    if name == "spin":
      assert one.sources[0] == "data" and set(one.sources[1:]) <= {"policy"}
      assert own.preferred == 0 and np.isnan(own.scores).all()
      assert one.texts[0].startswith("the ") and "prev" in one.anchors
    elif name == "inpo rounds":
      np.testing.assert_allclose(
          one.anchors["prev"], own.behaviour_raw_logps, atol=1e-4)
      assert "ref" in one.anchors
    elif name == "rso, half offline":
      assert own.multiplicity.sum() == 4
      assert "data" in one.sources and np.isfinite(own.scores).all()
    elif name == "corrected":
      np.testing.assert_array_equal(
          one.anchors["proposal_q"], own.behaviour_logps)
      np.testing.assert_array_equal(
          one.anchors["proposal_mu"], one.anchors["ref"])
    elif name == "accelerated":  # the writer is the reference
      np.testing.assert_allclose(
          one.anchors["ref"], own.behaviour_raw_logps, atol=1e-4)
    assert count <= 5
  if name == "ipo_md":  # what was drawn from is not the policy
    later = [s.candidates for s in made[1].sets]
    assert any(np.abs(s.behaviour_logps - s.behaviour_raw_logps).max() > 1e-6
               for s in later)
  if name == "accelerated":  # minus the words of a sample
    judged = [r for r in run_cases.metrics(folder) if "judge/mean" in r]
    assert len(judged) == 2
    assert all(r["judge/mean"] < 0 < r["judge/sem"] for r in judged)
  values = [r["loss"] for r in run_cases.metrics(folder) if "loss" in r]
  assert np.isfinite(values).all()


class Run:
  """A run in the background, whose messages can be read as it goes on."""

  def __init__(self, home, name, *flags, **extra):
    folder, data = home
    self.workdir, self._log = folder / name, folder / f"{name}.log"
    with open(self._log, "a") as log:
      self._began = log.tell()
      self.process = subprocess.Popen(
          run_cases.command("train", self.workdir, *data, *ONLINE, *flags),
          env=run_cases.environment(
              folder / "cache", PYTHONPATH=PATH,
              MCPO_SERVE_TOKEN=serve_cases.TOKEN, **extra),
          cwd=run_cases.ROOT, stdout=log, stderr=log)

  @property
  def said(self):
    return self._log.read_text()[self._began:]

  def wait_for(self, text):
    serve_cases.wait_for(
        lambda: text in self.said or self.process.poll() is not None, 240)
    assert text in self.said, self.said[-3000:]

  def end(self):
    return self.process.wait(240)


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as one:
    return one.getsockname()[1]


@pytest.mark.nightly
def test_f12_f13_the_server_dies_two_deaths_and_the_trainer_one(
    home, unbroken, tmp_path):
  """Nobody is there at the start; the server dies in a request, comes back
  with newer weights, dies while it takes the next ones, comes back with the
  weights of the start and is slow; the trainer dies too and its successor
  brings older weights. All of it leads to the weights of a run that samples by
  itself."""
  port = free_port()
  model = unbroken / "sft" / "model"
  start = f"--config.model.path={model}"
  newer = serve_cases.trained(
      tmp_path / "newer", unbroken / "preference" / "model", 8)
  how = {"port": port, "serve.num_slots": 64, "data.max_prompt_length": 48}
  flags = [f"--config.generation.url=http://127.0.0.1:{port}",
           "--config.checkpoint.every_steps=8"]
  one = Run(home, "by server", *flags, MCPO_FAULT="online.scored@3")
  one.wait_for("ConnectionError; it is asked again")
  assert not serve_cases.listening(one.process.pid)
  for words, fault in (
      ([start], "gen.request@2"),  # in a request
      ([f"--workdir={newer}", f"--config.tokenizer.path={model}"],
       "gen.update@2")):  # of the second round's weights
    server = serve_cases.Process(tmp_path, *words, fault=fault, **how)
    assert server.process.wait(240) == -signal.SIGKILL
    assert one.process.poll() is None, one.said[-3000:]
  last = serve_cases.Process(
      tmp_path, start, fault="gen.reply@1:sleep=2", **how)
  assert one.end() == -signal.SIGKILL  # in round 2, of version 4
  serve_cases.wait_for(lambda: not sum(last.metrics()[
      f"mcpo_samples_{state}"] for state in ("active", "waiting")))
  assert last.ask("/v1/models")[1]["data"][0]["policy_version"] == 4
  assert list((one.workdir / "spool").iterdir())

  two = Run(home, "by server", *flags)
  assert two.end() == 0, two.said[-3000:]
  assert last.process.poll() is None  # never restarted
  assert "version 2 after 4" in last.log.read_text()
  last.kill()
  assert (run_cases.summary(two.workdir)["params/sha256"]
          == run_cases.summary(unbroken)["params/sha256"])
  assert not list(two.workdir.glob("**/.*.tmp"))
  (left,) = (two.workdir / "spool").iterdir()  # one version, of the last round
  assert left.name.startswith("6-")


def test_f11_a_dead_reward_server_ends_the_run_and_the_next_one_goes_on(
    home, unbroken):
  port = free_port()
  serve = lambda *words: subprocess.Popen(
      [sys.executable, run_cases.ROOT / "tests" / "reward_server.py",
       str(port), *words], stdout=subprocess.PIPE, text=True)
  flags = ["--config.reward.name=remote", "--config.reward.patience_s=3",
           f"--config.reward.url=http://127.0.0.1:{port}/"]
  dies = serve("3")
  one = Run(home, "by reward", *flags, "--config.checkpoint.every_steps=8")
  assert one.end() == 7, one.said[-3000:]
  assert dies.wait() == -signal.SIGKILL
  rounds = one.workdir / "preference" / "rounds"
  samples = rounds / "000002.samples"
  last = one.said.splitlines()[-1]
  assert last.startswith("error[reward.unreachable]") and str(samples) in last
  assert "Traceback" not in one.said and "it is asked again" in one.said
  assert sorted(p.name for p in rounds.iterdir()) == [
      "000000", "000001", "000002.samples"]
  assert len((samples / "000000/samples.jsonl").read_text().splitlines()) == 10
  assert max(losses(one.workdir)) == 4  # nothing was trained on
  seconds = json.loads((samples / "000000/manifest.json").read_text())[
      "meta"]["seconds"]

  alive = serve()
  two = Run(home, "by reward", *flags)
  assert two.end() == 0, two.said[-3000:]
  alive.kill()
  asked, _ = alive.communicate()
  assert "preference resumes at step 4" in two.said  # saved, for the failure
  assert len(asked.split()) == 2  # of rounds 2 and 3
  told = {r["online/round"]: r for r in run_cases.metrics(two.workdir)
          if "online/round" in r}
  assert told[2]["generate/seconds"] == seconds  # sampled before, not again
  assert (run_cases.summary(two.workdir)["params/sha256"]
          == run_cases.summary(unbroken)["params/sha256"])
  assert losses(two.workdir) == losses(unbroken)
  assert not samples.exists()


def test_a_reward_that_sees_no_difference_ends_the_run(home):
  done = train(home, "tied", "--config.reward.name=online_rewards:indifferent")
  assert done.returncode == 7
  assert "error[reward.tie]" in done.stderr
  assert "Traceback" not in done.stderr


def test_an_alarm_can_stop_the_run(home):
  flags = ["--config.online.alarm=stop", "--config.online.max_tied_share=0.0",
           "--config.reward.name=online_rewards:shortest",
           "--config.online.num_candidates=2"]
  done = train(home, "alarmed", *flags)
  assert done.returncode == 7, done.stderr[-2000:]
  assert "error[alarm.tied]" in done.stderr
  assert "a finer reward" in done.stderr


@pytest.mark.parametrize("slug, where, flags", [
    ("config.conflict", "reference.source",
     ["--config.reference.source=cached"]),
    ("config.divisible", "online.prompts_per_round",
     ["--config.online.prompts_per_round=9"]),
    ("config.missing", "reward.name", ["--config.reward.name=None"]),
    ("config.conflict", "online.num_samples",
     ["--config.online.rejection_beta=0.5"]),
    ("config.conflict", "proposal.correction",
     ["--config.proposal.correction=True", "--config.generation.top_p=0.9"]),
    ("config.unused", "reference.source",
     ["--config.online.enabled=False", "--config.reference.source=ema"]),
    ("config.conflict", "kernel.init", ["--config.kernel.init=persistent"]),
    ("config.conflict", "objective.name", [
        "--config.objective.name=kto", "--config.kernel.temperature=None"]),
])
def test_settings_that_rounds_cannot_serve_are_refused(slug, where, flags):
  from mcpo_jax import errors, main

  with pytest.raises(errors.McpoError) as e:
    main.read_config(main.parse(run_cases.command(
        "train", "x", "--config.data.path=x", "--config.sft.data_path=x",
        *ONLINE, *flags)[3:]))
  found = getattr(e.value, "errors", [e.value])
  assert (slug, where) in [(x.slug, x.where) for x in found]


def test_the_explorer_has_what_every_update_saw(unbroken):
  rows = [json.loads(line) for line in (
      unbroken / "preference" / "candidates.jsonl").read_text().splitlines()]
  assert [r["step"] for r in rows] == sorted(
      list(range(8)) * 5)  # 8 updates of 5 sets
  for row in rows:
    assert sum(c["drawn"] for c in row["candidates"]) == 1
    assert sum(c["weight"] for c in row["candidates"]) == pytest.approx(1)
    assert row["candidates"][0]["role"] == 1 and row["prompt"]
    assert {c["source"] for c in row["candidates"]} == {"policy"}
  page = (unbroken / "candidates.html").read_text()
  assert json.dumps(rows[-1]["prompt_id"]) in page and "http:" not in page


def test_pools_are_records_that_training_reads_back(unbroken, home):
  """A round's file is a record file: the native layout, offline again."""
  path = unbroken / "preference" / "rounds" / "000001" / "candidates.jsonl"
  line = json.loads(path.read_text().splitlines()[0])
  assert {"prompt", "completions", "scores", "prompt_id", "sources"} <= set(
      line)
