"""From nothing to an aligned model on a laptop: 2 CPU cores, under 6 minutes.

The task comes with the project (mcpo_jax/data/quickstart.py): facts about a
hotel in, a sentence that says them all and no others out, and a rule that
scores any sentence. A tokenizer and a 0.7M-parameter model are trained from
scratch on references with human-like slips, then aligned by MC-PO on 8 scored
candidates per prompt, and compared with their start on prompts never seen.

Hardware: 2 CPU cores, 4 GB. Command:

  python -m mcpo_jax train --config=configs/quickstart.py \
      --workdir=runs/quickstart
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = default.get_config()
  config.num_epochs = 2.0

  config.data.path = "embedded:quickstart/train"
  config.data.eval_path = "embedded:quickstart/eval"
  config.data.max_prompt_length = 48
  config.data.max_completion_length = 48
  config.data.stream_length = 256
  config.data.num_streams = 8
  config.sft.data_path = "embedded:quickstart/sft"
  config.sft.num_steps = 1800
  config.sft.optimizer.learning_rate = 3e-3

  config.objective.beta = 0.1
  config.kernel.temperature = 1 / 3

  config.generation.num_samples = 4
  config.reward.name = "slot_coverage"
  config.reward.patterns_path = "embedded:quickstart"

  config.evaluation.every_steps = 50
  config.checkpoint.every_steps = 50
  return config
