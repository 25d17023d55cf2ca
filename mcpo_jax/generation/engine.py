"""Continuous batching: requests come, slots decode, slots are refilled.

Groups of slots decode side by side. A group holds one prompt, prefilled once,
and its slots decode samples of that prompt, each with a cache of its own
tokens alone; a slot whose sample ends takes the prompt's next sample, a group
whose samples have all ended takes the next prompt. Shapes never change, so few
programs are compiled however requests come. Token ids only, one thread.
"""

from typing import NamedTuple

import numpy as np

from mcpo_jax.generation.sampling import Sampling


class Request(NamedTuple):
  """Samples of one prompt."""

  request_id: int  # chosen by the caller, not in use
  prompt: np.ndarray  # [P] int32
  # With the seed and the index of the sample the address of its draws.
  prompt_id: np.ndarray  # [2] uint32
  sample_indices: np.ndarray  # [N] int32
  sampling: Sampling  # max_new_tokens set; `stop` is for whoever reads text
  seed: int


class Progress(NamedTuple):
  """What one sample has grown by since it was told last."""

  request_id: int
  sample: int  # place in sample_indices
  tokens: np.ndarray  # [n] int32, the stop token included
  behaviour_logps: np.ndarray  # [n] nats, of the law that was drawn from
  behaviour_raw_logps: np.ndarray  # [n] nats, of the raw policy
  # None while it goes on; "stop": its last token is a stop token; "length".
  finish_reason: str | None
  version: int  # of the weights that wrote it, all of it


class Engine:
  """The slots and the queue before them.

  update(models, version) -> None: models is a tuple of (params, weight);
    refused (ServiceError `service.busy`) while a sample is under way: the
    caller stops submitting, steps until `idle`, then updates. So a sample is
    of one version.
  submit(request) -> None: queues it. ServiceError `request.*` for what can not
    be served: checked before anything is compiled.
  cancel(request_id, sample=None) -> None: frees its slots at once; nothing
    more is told of it. With `sample`, that sample alone (a stop string).
  step(max_tokens) -> list[Progress]: refills what is free, decodes at most
    max_tokens tokens in every slot, fewer when a slot ends that someone waits
    for. NonFiniteError `generation.non_finite`: the model gave NaN or
    infinity; no sample of that step is told.
  idle -> bool, num_active -> int (samples), num_waiting -> int (samples).
  """
