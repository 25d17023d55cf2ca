"""A reward model from scratch on real pairs: which reply did people choose?

Prompts are dialogues of Anthropic's harmlessness set, completions the reply
that was chosen and the one that was rejected: 774 pairs, of which 40 % are
held out. A 0.4M-parameter decoder imitates chosen replies first, of these
dialogues and of four other sets; then the head on its last token learns from
470 pairs, four times each. More passes fit them and order others no better.

Held-out accuracy (seed 0): 0.632, 95 % interval 0.576 to 0.684, 304 pairs.

Data: kwise/*.train.jsonl.gz of the project's data folder, expected beside the
checkout; elsewhere, give sft.data_path and reward_model.data_path.
Hardware: 2 CPU cores, 2 GB, under 3 minutes. Command:

  python -m mcpo_jax train --config=configs/reward_model_hh.py \
      --workdir=runs/reward_model_hh
"""

import ml_collections

from configs import default

_DATA = "../shared/data/kwise"


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = default.get_config()
  config.stages = ("sft", "reward_model")

  config.tokenizer.vocab_size = 2000
  config.model.hidden_size = 96
  config.model.num_layers = 2
  config.model.intermediate_size = 256
  config.model.max_position_embeddings = 1024

  config.data.eval_fraction = 0.4
  config.data.max_prompt_length = 96
  config.data.max_completion_length = 96
  config.data.prompt_overlength = "left"
  config.data.stream_length = 384
  config.data.num_streams = 8

  config.sft.data_path = ",".join(
      f"{_DATA}/{name}.train.jsonl.gz"
      for name in ("hh_harmless_pairs", "oasst_ranked", "pandalm",
                   "llmbar_pairs", "truthfulqa"))
  config.sft.num_steps = 300
  config.sft.optimizer.learning_rate = 3e-3

  config.reward_model.data_path = f"{_DATA}/hh_harmless_pairs.train.jsonl.gz"
  config.reward_model.eval_fraction = 0.4
  config.reward_model.num_steps = 60
  config.reward_model.optimizer.learning_rate = 3e-4
  config.reward_model.optimizer.weight_decay = 0.1

  config.evaluation.every_steps = 20
  return config
