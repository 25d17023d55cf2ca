"""Which negatives, on survey answers: 6 to 11 candidates of a word or two.

A 0.4M-parameter decoder imitates the most frequent answer of each question for
a few epochs (longer, and it knows its questions by heart), then learns from the
shares of people who gave each answer. All rows and seeds have one start. Rows
differ from DPO with a random negative in the law of the negative or in the
objective alone, and OnMC-PO in that it learns from answers of its own, see
`compare_online_protoqa.py`; what is compared is how often the most frequent
answer of a held-out question gets a higher reward than one that fewer people
gave.

Data: kwise/protoqa of the project's data folder, expected beside the checkout;
elsewhere, give data.path and sft.data_path, and OnMC-PO's row its reward.path.
Hardware: 2 CPU cores, 4 GB; a run takes under a minute. Commands:

  python -m mcpo_jax train --config=configs/compare_protoqa.py \
      --config.stages=sft --workdir=runs/protoqa_start
  python -m mcpo_jax compare --config=configs/compare_protoqa.py \
      --config.model.path=runs/protoqa_start/sft/model \
      --workdir=runs/compare_protoqa
"""

import ml_collections

from configs import default

_DATA = "../shared/data/kwise/protoqa.train.jsonl.gz"
ONLINE = ("online.enabled=True online.prompts_per_round=352"
          " online.num_candidates=32")
ROWS = (
    "DPO, random negative | objective.name=dpo kernel.strategy=random",
    "DPO, worst negative | objective.name=dpo",
    "MC-PO, tau 1",
    "MC-PO, tau 1/3 | kernel.temperature=0.333333",
    "MC-PO, largest weight | kernel.strategy=max",
    "MC-PO, smallest weight | kernel.strategy=min",
    "RNCE, all negatives | objective.name=rnce",
    "SimPO | objective.name=simpo objective.beta=2.0",
    "SFT continued | objective.name=sft",
)


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = default.get_config()
  config.stages = ("preference", "evaluate")
  config.num_steps = 90

  config.tokenizer.vocab_size = 1500
  config.model.hidden_size = 96
  config.model.num_layers = 2
  config.model.intermediate_size = 256

  config.data.path = _DATA
  config.data.eval_fraction = 0.3
  config.data.max_prompt_length = 64
  config.data.max_completion_length = 16
  config.data.prompt_overlength = "left"
  config.data.stream_length = 256
  config.data.num_streams = 8
  config.sft.data_path = _DATA
  config.sft.num_steps = 80
  config.sft.optimizer.learning_rate = 3e-3

  config.evaluation.every_steps = 30
  config.checkpoint.every_steps = 90

  config.compare.metric = "eval/accuracy"
  config.compare.rows = (
      *ROWS,
      f"OnMC-PO | {ONLINE} reward.name=nearest_candidate reward.path={_DATA}",
  )
  config.compare.reference = "DPO, random negative"
  config.compare.seeds = (0, 1, 2, 3, 4)
  return config
