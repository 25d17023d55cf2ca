"""Reward models of Hugging Face folders: texts in, scores out.

A reward model brings its own tokenizer and chat template; ids of the policy
never reach it.
"""

import functools
import json
import math
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from mcpo_jax import errors, sharding, types
from mcpo_jax.data import packing, store
from mcpo_jax.data import tokenizer as tokenizer_lib
from mcpo_jax.data.readers import Messages
from mcpo_jax.models import decoder, hf
from mcpo_jax.models import reward as model_lib
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.rewards.functions import Reward

_TOKENS = 8192  # of one forward pass on one device, about
# Every rule then splits the width alone. The vocabulary often does not divide:
# reward models add a token for padding.
_RULES = [(r"embed/embedding$", P(None, "fsdp")), *decoder.PARAM_RULES]
_PROMPT, _COMPLETION = "What is two plus two?", "It is four."


def make_reward_model(path: str) -> Reward:
  """The scores of a reward model, on all devices of this process.

  Weights lie as `load_weights` says; activations have their dtype, and the
  head's products are summed in float32.

  Args:
    path: a folder or a hub name, of a sequence classification with one label
      and its tokenizer.

  Raises:
    ModelDirError: those of hf.resolve_model, hf.load_config,
      hf.check_tokenizer and hf.load_params; `hf.template`, see `tail_ids`;
      `hf.score` if the score of a fixed text is not finite, or not twice the
      same.
    DataError: data.bos, the template puts BOS twice, or not at all.
  """
  folder = hf.resolve_model(path)
  config = model_lib.load_config(folder)
  hf.check_tokenizer(folder, config)
  tokenizer = tokenizer_lib.load_tokenizer(folder)
  tail = tail_ids(tokenizer, where=str(folder))
  params = load_weights(folder, config)
  table = params["embed"]["embedding"]
  mesh = table.sharding.mesh
  token_scores = jax.jit(functools.partial(
      model_lib.token_scores, config=config, compute_dtype=table.dtype))

  def reward_model(
      prompts: Sequence[str | Messages], completions: Sequence[str], **columns
  ) -> list[float]:
    del columns
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
      groups.setdefault(json.dumps(prompt, sort_keys=True), []).append(i)
    members = list(groups.values())
    sets = [
        store.text_set(tokenizer, prompts[some[0]],
                       [completions[i] for i in some], "reward model")
        for some in members]
    sets = [
        model_lib.mark_last(one, pad_id=config.pad_token_id,
                            end_id=tokenizer.end_id, tail=tail)
        for one in sets]
    out = np.zeros(len(completions))
    for chunk in _pack(sets, config.max_positions, mesh.size):
      with jax.set_mesh(mesh):
        values = np.asarray(token_scores(params, streams=sharding.put_global(
            chunk, sharding.batch_sharding(mesh))))
      for s, t in np.argwhere(chunk.completion_mask):
        row, slot = chunk.prompt_slot[s, t], chunk.candidate_slot[s, t]
        out[members[row][slot]] = values[s, t]
    return out.tolist()

  first, again = (reward_model([_PROMPT], [_COMPLETION]) for _ in range(2))
  if not np.isfinite(first).all() or first != again:
    raise errors.ModelDirError(
        "hf.score", "a fixed text has no finite score, or not twice the same",
        where=str(folder), got=(first, again))
  return reward_model


def load_weights(folder: pathlib.Path, config: ModelConfig) -> types.Params:
  """The weights, split over the devices of this process.

  No device holds the whole model, so that it fits beside a policy.

  Args:
    folder: of a reward model.
    config: from model_lib.load_config.

  Returns:
    bfloat16 if that is the folder's dtype, else float32. The mesh has all
    devices, or as many of them as divide the width.

  Raises:
    ModelDirError: those of hf.load_params.
  """
  devices = jax.local_devices()
  mesh = sharding.make_mesh(
      data=1, fsdp=-1, tensor=1,
      devices=devices[:math.gcd(config.hidden_size, len(devices))])
  shardings = sharding.infer_shardings(
      decoder.param_shapes(config), _RULES, mesh)
  return hf.load_params(folder, config, shardings=shardings,
                        dtype=hf.weights_dtype(folder))


def tail_ids(tokenizer: tokenizer_lib.Tokenizer, *, where: str) -> list[int]:
  """What the chat template puts after the token that ends a completion.

  Where it puts something, a line feed mostly, that is what transformers
  scores, so it is what a reward model is trained on and asked for.

  Args:
    tokenizer: of the reward model.
    where: for errors.

  Raises:
    ModelDirError: `hf.template`, a conversation that is rendered as a whole
      does not begin with the ids that prompt and completion are given here.
    DataError: data.bos.
  """
  if tokenizer.template is None:
    return []
  one = store.text_set(tokenizer, _PROMPT, [_COMPLETION], "reward model")
  ids = [*one.prompt.tolist(), *one.completions[0].tolist()]
  text = tokenizer.render(
      [{"role": "user", "content": _PROMPT},
       {"role": "assistant", "content": _COMPLETION}],
      tools=None, add_generation_prompt=False)
  whole = tokenizer.hf(text, add_special_tokens=False)["input_ids"]
  if whole[:len(ids)] != ids:
    raise errors.ModelDirError(
        "hf.template", "a prompt, a completion and the token that ends it are "
        "not how the chat template renders them", where=where, got=whole,
        want=ids, hint="a template for reward models ends the assistant's turn")
  return whole[len(ids):]


def _pack(
    sets: list[types.CandidateSet], max_positions: int, num_devices: int
) -> list[types.Streams]:
  """Chunks of a few shapes: lengths, and numbers of streams on each device,
  are powers of two.

  Raises:
    DataError: data.completion_too_long, a text exceeds the model's context.
  """
  sizes = [[len(one.prompt) + len(c) for c in one.completions] for one in sets]
  longest = max(map(max, sizes), default=0)
  if longest > max_positions:
    raise errors.DataError(
        "data.completion_too_long", "a prompt with its completion is longer "
        "than the reward model's context", where="reward_model", got=longest,
        want=f"at most {max_positions} tokens")
  length = max(64, _power_of_two(longest))
  needed = _power_of_two(-(-sum(map(sum, sizes)) // (num_devices * length)))
  slots = [list(range(len(one.completions))) for one in sets]
  return packing.pack_streams(
      sets, slots, slots, stream_length=length, pad_id=0,
      num_streams=num_devices * min(needed, max(1, _TOKENS // length)))


def _power_of_two(size: int) -> int:
  """The smallest that is not below `size`, at least 1."""
  return 1 << max(size - 1, 0).bit_length()
