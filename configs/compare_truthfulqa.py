"""Which negatives, on true and false answers: up to 42 candidates a question.

The rows of `compare_protoqa.py`; scores are people's labels, 1 for true and
informative, 0.5 for true alone, 0 for false; what OnMC-PO samples is scored by
a rule, see `compare_online_truthfulqa.py`. A model trained here must not be
evaluated on TruthfulQA: its questions are these.

Data: kwise/truthfulqa of the project's data folder, expected beside the
checkout; elsewhere, give data.path and sft.data_path, and OnMC-PO's row its
reward.path. Hardware: 2 CPU cores, 4 GB; a run takes about a minute. Commands:

  python -m mcpo_jax train --config=configs/compare_truthfulqa.py \
      --config.stages=sft --workdir=runs/truthfulqa_start
  python -m mcpo_jax compare --config=configs/compare_truthfulqa.py \
      --config.model.path=runs/truthfulqa_start/sft/model \
      --workdir=runs/compare_truthfulqa
"""

import ml_collections

from configs import compare_protoqa

_DATA = "../shared/data/kwise/truthfulqa.train.jsonl.gz"


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = compare_protoqa.get_config()
  config.data.path = _DATA
  config.sft.data_path = _DATA
  config.data.max_completion_length = 64
  config.data.stream_length = 512
  config.compare.rows = (
      *compare_protoqa.ROWS,
      "OnMC-PO | online.enabled=True reward.name=candidate_margin"
      f" reward.path={_DATA}",
  )
  return config
