"""Llama 3 8B, aligned by DPO on Nectar.

Reproduces: the baseline beside configs/llama3_8b_nectar_mcpo.py.
Everything is equal but the objective, which compares the best answer of a
prompt with the one of the lowest score.

Data: berkeley-nest/Nectar on the Hugging Face hub.
Hardware: 8 devices of 80 GB. Command:

  python -m mcpo_jax train --config=configs/llama3_8b_nectar_dpo.py \
      --workdir=runs/llama3_8b_nectar_dpo
"""

import ml_collections

from configs import llama3_8b_nectar_mcpo


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = llama3_8b_nectar_mcpo.get_config()
  config.objective.name = "dpo"
  return config
