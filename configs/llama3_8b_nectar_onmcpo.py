"""Llama 3 8B, aligned by OnMC-PO on Nectar's prompts.

Reproduces: the online setting of arXiv 2502.04567: candidates are sampled from
the policy while it trains and scored by a reward model. The paper leaves the
size of a round and the number of samples open; here a round is 512 prompts of 8
samples, four updates. No run of this config has been reported yet.

Data: berkeley-nest/Nectar and Skywork/Skywork-Reward-Llama-3.1-8B-v0.2 on the
Hugging Face hub. Hardware: 8 devices of 80 GB, as
configs/llama3_8b_nectar_mcpo.py, with the reward model and the reference
sharded beside the policy. Command, on one host:

  python -m mcpo_jax train --config=configs/llama3_8b_nectar_onmcpo.py \
      --workdir=runs/llama3_8b_nectar_onmcpo
"""

import ml_collections

from configs import llama3_8b_nectar_mcpo


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = llama3_8b_nectar_mcpo.get_config()
  config.num_epochs = 0.25

  config.online.enabled = True
  config.online.prompts_per_round = 512
  config.online.num_candidates = 8
  config.generation.max_new_tokens = 1024
  config.reward.name = "reward_model"
  config.reward.path = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
  config.reward.missing_eos_penalty = 10.0
  return config
