"""Weights in a Hugging Face folder behind an HTTP interface.

Hardware: any; a model of 0.5 billion parameters needs about 4 GB.
Command, with a token in a file:

  python -m mcpo_jax serve --config=configs/serve.py \\
      --config.model.path=FOLDER --config.serve.token_path=TOKEN_FILE

What a run has trained is served with the run's own config and --workdir.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = default.get_config()
  # None that needs data: the verb serve runs no stage.
  config.stages = ("export",)
  # Longest prompt and completion of a request.
  config.data.max_prompt_length = 1024
  config.data.max_completion_length = 1024
  config.model.max_position_embeddings = 2048
  return config
