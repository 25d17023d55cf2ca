"""Mistral 7B, aligned by DPO on UltraFeedback.

Reproduces: the baseline beside configs/mistral_7b_ultrafeedback_mcpo.py.
Everything is equal but the objective, which compares the best answer of a
prompt with the one of the lowest score.

Data: openbmb/UltraFeedback on the Hugging Face hub.
Hardware: 8 devices of 80 GB. Command:

  python -m mcpo_jax train --config=configs/mistral_7b_ultrafeedback_dpo.py \
      --workdir=runs/mistral_7b_ultrafeedback_dpo
"""

import ml_collections

from configs import mistral_7b_ultrafeedback_mcpo


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = mistral_7b_ultrafeedback_mcpo.get_config()
  config.objective.name = "dpo"
  return config
