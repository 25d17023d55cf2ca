"""What the kernel's settings do, one at a time, on restaurant descriptions.

Every row is `e2e.py` (MC-PO, temperature 1/3, one negative out of all
candidates in one step, weighted by the reward) with one setting changed: the
temperature, the number of negatives M, the number of candidates L that one is
drawn from, the steps k of the chain, what weighs a candidate.

All rows and seeds have one start. Data: as `e2e.py`. Hardware: 2 CPU cores,
4 GB. Commands:

  python -m mcpo_jax train --config=configs/compare_kernel_e2e.py \
      --config.stages=sft --workdir=runs/e2e_start
  python -m mcpo_jax compare --config=configs/compare_kernel_e2e.py \
      --config.model.path=runs/e2e_start/sft/model \
      --workdir=runs/compare_kernel_e2e
"""

import ml_collections

from configs import e2e


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = e2e.get_config()
  config.stages = ("preference", "evaluate")

  config.compare.rows = (
      "MC-PO",
      "temperature 3 | kernel.temperature=3.0",
      "L = 2 | kernel.block_size=2",
      "M = 4 | kernel.num_negatives=4",
      "weighed by log-prob | kernel.score=policy_logp",
      "k = 2 | kernel.num_steps=2 kernel.block_size=2",
      "temperature 0.1 | kernel.temperature=0.1",
      "temperature 1 | kernel.temperature=1.0",
      "L = 4 | kernel.block_size=4",
      "M = 2 | kernel.num_negatives=2",
      "weighed by reward per token | kernel.score=reward_per_token",
  )
  config.compare.reference = "MC-PO"
  config.compare.seeds = (0, 1, 2)
  return config
