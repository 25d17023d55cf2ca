"""MC-PO beside its controls at equal updates, on the data in the package.

Every row is `quickstart.py` with the settings of its line: the same start,
prompts, order and number of updates.

Hardware: 2 CPU cores, 4 GB; 12 runs, about 12 minutes. Command:

  python -m mcpo_jax compare --config=configs/compare_quickstart.py \
      --workdir=runs/compare_quickstart
"""

import ml_collections

from configs import quickstart


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = quickstart.get_config()
  config.stages = ("sft", "preference", "evaluate")

  config.compare.rows = (
      "MC-PO",
      "SFT continued | objective.name=sft objective.beta=None"
      " kernel.temperature=None",
      "DPO, random negative | objective.name=dpo kernel.strategy=random"
      " kernel.temperature=None",
      "DPO, worst negative | objective.name=dpo kernel.temperature=None",
  )
  config.compare.reference = "DPO, random negative"
  config.compare.seeds = (0, 1, 2)
  config.compare.jobs = 2
  return config
