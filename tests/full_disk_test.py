"""A disk that fills under a run: it stops, loses nothing, and goes on."""

import subprocess
import time

import pytest
import run_cases
import small_disk

from mcpo_jax import commit


@pytest.mark.nightly
def test_a_run_stops_when_its_disk_is_full_and_goes_on_when_there_is_room(
    tmp_path):
  flags = [*run_cases.write_data(tmp_path / "data"),
           "--config.sft.num_steps=300", "--config.stages=sft"]
  with small_disk.of(tmp_path / "disk", megabytes=18) as disk:
    steps = disk / "run/sft/checkpoints"
    process = subprocess.Popen(
        run_cases.command("train", disk / "run", *flags),
        env=run_cases.environment(tmp_path / "cache"), cwd=run_cases.ROOT,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (steps / "4" / commit.MANIFEST).exists():
      assert process.poll() is None, process.stderr.read()[-3000:]
      time.sleep(0.01)
    rest = open(disk / "rest", "wb", buffering=0)
    try:
      while rest.write(b"0" * 2**16):
        pass
    except OSError:
      pass
    rest.close()
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 6, said[-3000:]
    assert "error[ckpt.disk_full]" in said and "bytes free" in said
    assert "Traceback" not in said, said[-6000:]
    there = sorted(int(p.parent.name)
                   for p in steps.glob(f"*/{commit.MANIFEST}"))
    for step in there:
      commit.verify(steps / str(step))
    assert len(there) >= 2
    (disk / "rest").unlink()
    again = run_cases.run(
        "train", disk / "run", tmp_path / "cache", *flags)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"sft resumes at step {there[-1]}" in again.stderr
