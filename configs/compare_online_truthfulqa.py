"""Offline and online rows on true and false answers, compared by what they say.

Data, start and updates of `compare_truthfulqa.py`, rows as in
`compare_online_protoqa.py`; OnMC-PO draws 8 answers to 64 questions a round. A
sample is scored by the words that it shares with the closest true answer minus
those that it shares with the closest false one (`candidate_margin`), which no
person has looked at. A model trained here must not be evaluated on TruthfulQA:
its questions are these.

Data: as `compare_truthfulqa.py`; elsewhere, give reward.path too. Hardware: 2
CPU cores, 4 GB; a run takes about a minute. Commands:

  python -m mcpo_jax train --config=configs/compare_truthfulqa.py \
      --config.stages=sft --workdir=runs/truthfulqa_start
  python -m mcpo_jax compare --config=configs/compare_online_truthfulqa.py \
      --config.model.path=runs/truthfulqa_start/sft/model \
      --workdir=runs/compare_online_truthfulqa
"""

import ml_collections

from configs import compare_online_protoqa, compare_truthfulqa


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = compare_truthfulqa.get_config()
  config.reward.name = "candidate_margin"
  config.reward.path = config.data.path
  config.generation.num_samples = 4

  config.compare.metric = "score/aligned"
  config.compare.rows = (
      *compare_online_protoqa.OFFLINE,
      "OnMC-PO | online.enabled=True",
      "OnMC-PO, half offline | online.enabled=True online.online_fraction=0.5",
  )
  config.compare.reference = "MC-PO, tau 1"
  config.compare.seeds = (0, 1, 2)
  return config
