"""An objective and a kernel of one's own, from a file to a trained model."""

import json

import run_cases

OWN = '''
import jax
import jax.numpy as jnp
import mcpo_jax
from mcpo_jax.kernels import mc
from mcpo_jax.objectives import implicit, pairs


@mcpo_jax.objective(anchors=("ref",), pairwise=True, separable=True)
def my_loss(features, batch, state, *, beta=0.1, margin=1.0):
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  losses = jax.nn.softplus(margin - pairs.margins(rewards, batch))
  aux = implicit.preference_aux(rewards, features.logps, batch)
  return losses * pairs.valid(batch), aux, state


def shortest(key, state, scores, sets, *, temperature, num_negatives,
             include_preferred):
  return mc.draw(
      key, state, -1.0 * sets.lengths, sets, strategy="max",
      temperature=temperature, num_negatives=num_negatives,
      include_preferred=include_preferred, replace=False)
'''


def test_ones_own_loss_and_kernel_train_and_a_changed_file_is_refused(tmp_path):
  flags = run_cases.write_data(tmp_path / "data")
  own = tmp_path / "my_file.py"
  own.write_text(OWN)
  name = str(own.with_suffix(""))
  flags += [f"--config.objective.name={name}:my_loss",
            "--config.objective.margin=2", f"--config.kernel.strategy={name}"
            ":shortest", "--config.stages=preference"]
  done = run_cases.run("train", tmp_path / "run", tmp_path / "cache", *flags)
  assert done.returncode == 0, done.stderr
  first = next(r for r in run_cases.metrics(tmp_path / "run") if "loss" in r)
  # Equal policies: log(1 + exp(margin)).
  assert abs(first["loss"] - 2.126928) < 1e-3
  saved = json.loads((tmp_path / "run" / "config.json").read_text())
  assert saved["config"]["objective"]["margin"] == 2

  own.write_text(OWN + "\n# another law\n")
  (tmp_path / "run/preference/result.json").unlink()
  again = run_cases.run("train", tmp_path / "run", tmp_path / "cache", *flags)
  assert again.returncode == 5
  assert "ckpt.run_id" in again.stderr and "own_code" in again.stderr

  wrong = run_cases.run("train", tmp_path / "other", tmp_path / "cache", *flags,
                        "--config.objective.gamma=2")
  assert wrong.returncode == 2 and "config.unknown_key" in wrong.stderr
