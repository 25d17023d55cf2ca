"""Which negatives, and which objective: 15 rows on restaurant descriptions.

Every row is `e2e.py` with the settings of its line: the same start, prompts,
order and number of updates. Rows that differ from DPO with a random negative in
the law of the negative alone come first, with five seeds; then other
objectives at their usual strength for scores in [0, 1], with three.

Data: as `e2e.py`. Hardware: 2 CPU cores, 4 GB; 59 runs, about 40 minutes.
Command:

  python -m mcpo_jax compare --config=configs/compare_e2e.py \
      --workdir=runs/compare_e2e
"""

import ml_collections

from configs import e2e


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = e2e.get_config()
  config.stages = ("sft", "preference", "evaluate")

  config.compare.rows = (
      "SFT continued | objective.name=sft objective.beta=None"
      " kernel.temperature=None",
      "DPO, worst negative | objective.name=dpo kernel.temperature=None",
      "DPO, random negative | objective.name=dpo kernel.strategy=random"
      " kernel.temperature=None",
      "MC-PO, tau 1 | kernel.temperature=1.0",
      "MC-PO, tau 1/3",
      "MC-PO, largest weight | kernel.strategy=max kernel.temperature=None",
      "MC-PO, smallest weight | kernel.strategy=min kernel.temperature=None",
      "RNCE, all negatives | objective.name=rnce kernel.temperature=None"
      " | seeds=0,1,2",
      "CD | objective.name=cd kernel.temperature=1.0 | seeds=0,1,2",
      "MC-PO, 4-step chain | kernel.num_steps=4 kernel.block_size=1"
      " | seeds=0,1,2",
      "SimPO | objective.name=simpo objective.beta=2.0"
      " kernel.temperature=None | seeds=0,1,2",
      "IPO | objective.name=ipo kernel.temperature=None | seeds=0,1,2",
      "KTO | objective.name=kto kernel.temperature=None | seeds=0,1,2",
      "InfoNCA | objective.name=infonca objective.reward_temperature=0.1"
      " kernel.temperature=None | seeds=0,1,2",
      "Plackett-Luce | objective.name=plackett_luce kernel.temperature=None"
      " | seeds=0,1,2",
  )
  config.compare.reference = "DPO, random negative"
  config.compare.seeds = (0, 1, 2, 3, 4)
  config.compare.jobs = 2
  return config
