"""OnMC-PO beside offline MC-PO and online DPO, on the data in the package.

Every row takes the same number of updates from the same start, on the prompts
of `quickstart.py`; the online rows draw equally many tokens: 8 samples of 16
prompts an update, or 2 of 64. Their samples are scored by the task's rule.

Hardware: 2 CPU cores, 4 GB; 15 runs, about 15 minutes. Command:

  python -m mcpo_jax compare --config=configs/compare_online_quickstart.py \
      --workdir=runs/compare_online_quickstart
"""

import ml_collections

from configs import quickstart

ROWS = (
    "MC-PO, offline",
    "OnMC-PO | online.enabled=True",
    "OnMC-PO, half offline | online.enabled=True online.online_fraction=0.5",
    "Online DPO, best of 8 against worst | online.enabled=True"
    " objective.name=dpo kernel.temperature=None",
    "Online DPO, pairs | online.enabled=True objective.name=dpo"
    " kernel.temperature=None online.num_candidates=2 batch_size=64"
    " online.prompts_per_round=256",
)


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = quickstart.get_config()
  config.stages = ("sft", "preference", "evaluate")
  config.num_epochs = None
  config.num_steps = 120

  config.compare.rows = ROWS
  config.compare.reference = "MC-PO, offline"
  config.compare.seeds = (0, 1, 2)
  config.compare.jobs = 2
  return config
