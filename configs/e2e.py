"""The quickstart's shape on real data: restaurant descriptions by people.

Prompts are meaning representations of the E2E set, completions the sentences
that people wrote for them and for their neighbours, scores the share of slots
told right. From scratch: tokenizer, SFT on all references, MC-PO on 8 scored
candidates per prompt, evaluation on the 15 % of the prompts that are held out,
export. The references of held-out prompts are left out of SFT.

Data: kwise/e2e_slots, sft/e2e_references and verifiable/e2e_slot_patterns of
the project's data folder, expected beside the checkout; elsewhere, give the
three paths. Hardware: 2 CPU cores, 4 GB, under 15 minutes. Command:

  python -m mcpo_jax train --config=configs/e2e.py --workdir=runs/e2e \
      --config.data.path=../shared/data/kwise/e2e_slots.train.jsonl.gz \
      --config.sft.data_path=../shared/data/sft/e2e_references.train.jsonl.gz \
      --config.reward.patterns_path=../shared/data/verifiable/e2e_slot_patterns.json
"""

import ml_collections

from configs import default

_DATA = "../shared/data"


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = default.get_config()
  config.num_epochs = 2.0

  config.data.path = f"{_DATA}/kwise/e2e_slots.train.jsonl.gz"
  config.data.eval_fraction = 0.15
  config.data.max_prompt_length = 64
  config.data.max_completion_length = 96
  config.data.stream_length = 320
  config.data.num_streams = 8
  config.sft.data_path = f"{_DATA}/sft/e2e_references.train.jsonl.gz"
  config.sft.num_steps = 1800
  config.sft.optimizer.learning_rate = 3e-3

  config.objective.beta = 0.1
  config.kernel.temperature = 1 / 3

  config.generation.num_samples = 4
  config.reward.name = "slot_coverage"
  config.reward.patterns_path = f"{_DATA}/verifiable/e2e_slot_patterns.json"

  config.evaluation.every_steps = 25
  config.checkpoint.every_steps = 25
  return config
