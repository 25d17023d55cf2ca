"""OnMC-PO by the command line: real processes, killed with real signals."""

import json
import pathlib
import subprocess

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


@pytest.fixture(scope="module")
def unbroken(home):
  return succeed(home, "unbroken")


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


@pytest.mark.parametrize("fault", [
    "online.scored@3",     # candidates are there, their folder is not
    "online.committed@3",  # the folder is there, no update has used it
    "step.drawn@6",        # inside a round, no checkpoint of this step
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
    ("inpo rounds", ["--config.objective.name=inpo",
                     "--config.kernel.strategy=random",
                     "--config.online.num_candidates=3"]),
    ("rso, half offline", [
        "--config.objective.name=rso", "--config.kernel.strategy=random",
        "--config.online.rejection_beta=0.5", "--config.online.num_samples=5",
        "--config.online.online_fraction=0.5"]),
    ("ipo_md", ["--config.objective.name=ipo",
                "--config.kernel.strategy=random",
                "--config.online.mixture=0.25",
                "--config.online.num_candidates=2"]),
    ("corrected", ["--config.proposal.correction=True",
                   "--config.data.eval_fraction=0.2"]),
    ("accelerated", ["--config.objective.name=dpo",
                     "--config.kernel.strategy=random",
                     "--config.reference.source=previous_round",
                     "--config.online.extrapolation=0.3",
                     "--config.online.judge=online_rewards:shortest"]),
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


def test_a_server_that_dies_and_comes_back_changes_nothing(
    home, unbroken, tmp_path):
  """The candidates come from another process, killed in mid-run."""
  start = f"--config.model.path={unbroken / 'sft' / 'model'}"
  flags = {"serve.num_slots": 64, "data.max_prompt_length": 48}
  server = serve_cases.Process(tmp_path, start, **flags)
  folder, data = home
  trainer = subprocess.Popen(
      run_cases.command(
          "train", folder / "by server", *data, *ONLINE,
          f"--config.generation.url=http://127.0.0.1:{server.port}"),
      env=run_cases.environment(
          folder / "cache", PYTHONPATH=PATH,
          MCPO_SERVE_TOKEN=serve_cases.TOKEN),
      cwd=run_cases.ROOT, stderr=subprocess.PIPE, text=True)
  rounds = folder / "by server" / "preference" / "rounds"
  serve_cases.wait_for(
      lambda: (rounds / "000001").exists() or trainer.poll() is not None, 120)
  server.kill()
  server = serve_cases.Process(
      tmp_path, start, port=server.port, **flags)
  _, said = trainer.communicate(timeout=120)
  assert trainer.returncode == 0, said[-3000:]
  assert server.metrics()["mcpo_weight_updates_total"] >= 1
  server.kill()
  assert (run_cases.summary(folder / "by server")["params/sha256"]
          == run_cases.summary(unbroken)["params/sha256"])
  assert not list((folder / "by server").glob("**/.*.tmp"))


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
