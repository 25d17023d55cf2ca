"""The public interface under a type checker, from inside and from outside."""

import subprocess
import sys
import tomllib

import run_cases

# What a user's script may look like, and lines that must be found wrong.
SCRIPT = '''
import mcpo_jax

run: mcpo_jax.Run = mcpo_jax.train(mcpo_jax.load_config("a.py"), "workdir")
texts: list[list[str]] | None = run.model("sft").generate(["a"]).text
steps, values = run.curve("loss")
number: int = run.curve("loss")  # wrong
run.summery  # wrong
mcpo_jax.load_confg  # wrong
mcpo_jax.train("a.py", "workdir")  # wrong
'''


def test_the_public_modules_and_their_use_have_sound_types(tmp_path):
  script = tmp_path / "script.py"
  script.write_text(SCRIPT)
  options = tomllib.loads((run_cases.ROOT / "pyproject.toml").read_text())
  done = subprocess.run(
      [sys.executable, "-m", "mypy", "--cache-dir=/dev/null",
       *options["tool"]["mypy"]["files"], str(script)],
      cwd=run_cases.ROOT, env=run_cases.environment(tmp_path),
      capture_output=True, text=True)
  wrong = [i for i, line in enumerate(SCRIPT.splitlines(), 1)
           if "# wrong" in line]
  found = [line for line in done.stdout.splitlines() if ": error:" in line]
  places = [line.split(": ")[0] for line in found]
  assert places == [f"{script}:{i}" for i in wrong], done.stdout + done.stderr
