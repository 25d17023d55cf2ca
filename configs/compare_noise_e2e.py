"""What wrong labels do: MC-PO and DPO with 20 and 40 % of the labels wrong.

Every row is `e2e.py` on data in which so many prompts prefer a wrong candidate
(`benchmarks/label_noise.py`); what is compared is the score of samples by the
rule, which no label touches. All rows and seeds have one start.

Data: as `e2e.py`. Hardware: 2 CPU cores, 4 GB. Commands, the second for 40 too:

  python -m mcpo_jax train --config=configs/compare_noise_e2e.py \
      --config.stages=sft --workdir=runs/e2e_start
  python benchmarks/label_noise.py --share=0.2 --out=runs/noise/20.jsonl \
      --data=../shared/data/kwise/e2e_slots.train.jsonl.gz
  python -m mcpo_jax compare --config=configs/compare_noise_e2e.py \
      --config.model.path=runs/e2e_start/sft/model \
      --workdir=runs/compare_noise_e2e
"""

import ml_collections

from configs import e2e


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = e2e.get_config()
  config.stages = ("preference", "evaluate")

  dpo = "objective.name=dpo kernel.temperature=None"
  config.compare.rows = (
      "MC-PO, clean",
      f"DPO worst, clean | {dpo}",
      "MC-PO, 20 % wrong | data.path=runs/noise/20.jsonl",
      f"DPO worst, 20 % wrong | {dpo} data.path=runs/noise/20.jsonl",
      "MC-PO, 40 % wrong | data.path=runs/noise/40.jsonl",
      f"DPO worst, 40 % wrong | {dpo} data.path=runs/noise/40.jsonl",
  )
  config.compare.reference = "MC-PO, clean"
  config.compare.seeds = (0, 1, 2)
  return config
