"""OnMC-PO beside offline MC-PO and online DPO, on restaurant descriptions.

The rows of `compare_online_quickstart.py` on the data of `e2e.py`; samples are
scored by the slots that they tell right.

Data: as `e2e.py`. Hardware: 2 CPU cores, 4 GB; 15 runs, about 20 minutes.
Command:

  python -m mcpo_jax compare --config=configs/compare_online_e2e.py \
      --workdir=runs/compare_online_e2e
"""

import ml_collections

from configs import compare_online_quickstart, e2e


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = e2e.get_config()
  config.stages = ("sft", "preference", "evaluate")
  config.num_epochs = None
  config.num_steps = 120

  config.compare.rows = compare_online_quickstart.ROWS
  config.compare.reference = "MC-PO, offline"
  config.compare.seeds = (0, 1, 2)
  config.compare.jobs = 2
  return config
