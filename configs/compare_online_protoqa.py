"""Offline and online rows on survey answers, compared by what they say.

Data, start and updates of `compare_protoqa.py`. A sample has the share of
people who gave the survey's answer that it is like, or 0 (`nearest_candidate`):
online rows learn from that, and all rows are compared by it, on questions that
are held out. Few samples of the start are a known answer: rounds of OnMC-PO
draw 32 for each of 352 questions, and at one in ten some are.

Data: as `compare_protoqa.py`; elsewhere, give reward.path too. Hardware: 2 CPU
cores, 4 GB; a run takes under a minute. Commands:

  python -m mcpo_jax train --config=configs/compare_protoqa.py \
      --config.stages=sft --workdir=runs/protoqa_start
  python -m mcpo_jax compare --config=configs/compare_online_protoqa.py \
      --config.model.path=runs/protoqa_start/sft/model \
      --workdir=runs/compare_online_protoqa
"""

import ml_collections

from configs import compare_protoqa

OFFLINE = (
    "SFT continued | objective.name=sft",
    "DPO, worst negative | objective.name=dpo",
    "RNCE, all negatives | objective.name=rnce",
    "MC-PO, tau 1",
)


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = compare_protoqa.get_config()
  config.reward.name = "nearest_candidate"
  config.reward.path = config.data.path
  config.generation.num_samples = 4

  config.compare.metric = "score/aligned"
  config.compare.rows = (
      *OFFLINE,
      f"OnMC-PO | {compare_protoqa.ONLINE}",
      "OnMC-PO, half offline | online.enabled=True online.online_fraction=0.5",
  )
  config.compare.reference = "MC-PO, tau 1"
  config.compare.seeds = (0, 1, 2)
  return config
