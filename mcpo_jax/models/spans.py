"""What each token of a stream sees, as places in its stream.

A set stands in one piece: its prompt, then its candidates side by side. So what
a token sees is two intervals of places, whatever the window: one of its own
run (the prompt of a prompt token, the completion of any other), which ends
with the token itself, and one of the prompt before its completion.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Slots(NamedTuple):
  """Where each token of a stream belongs; the fields of types.Streams."""

  positions: jax.Array  # [S, T] int32
  prompt: jax.Array  # [S, T] int32, -1 on padding
  candidate: jax.Array  # [S, T] int32, -1 on prompt and padding


# What attention's kernels call their output, and its log-sum-exp, for
# rematerialisation: to compute them anew costs more than any elementwise part.
OUTPUT = "attention"


class Interval(NamedTuple):
  """Places from first up to last, both included; none where last < first."""

  first: jax.Array  # [S, T] int32
  last: jax.Array  # [S, T] int32


class Runs(NamedTuple):
  """Where the run and the set of each token begin."""

  own: jax.Array  # [S, T] int32, first place of the run
  prompt: jax.Array  # [S, T] int32, first place of the set
  end: jax.Array  # [S, T] int32, place after the prompt; `prompt` inside it


def runs(slots: Slots) -> Runs:
  """The runs of streams [S, T]; each token of padding is one."""
  place = _places(slots.prompt)
  padding = slots.prompt < 0
  new_set = _changes(slots.prompt) | padding
  begin = lambda new: jax.lax.cummax(jnp.where(new, place, 0), axis=1)
  prompt = begin(new_set)
  own = begin(new_set | _changes(slots.candidate))
  # Positions go on after the prompt for each candidate: this is its length.
  end = prompt + slots.positions - (place - own)
  return Runs(own, prompt, jnp.where(padding, prompt, end))


def intervals(of: Runs, window: jax.Array) -> tuple[Interval, Interval]:
  """The places that each token sees.

  Args:
    of: [S, T] each.
    window: [] int32; a key at distance window or more, in positions, is not
      seen.

  Returns:
    own: never empty; padding sees itself alone.
    prompt: disjoint from own; empty for tokens of prompts and padding.
  """
  place = _places(of.own)
  # The last place of the prompt that is too far.
  reach = of.end + (place - of.own) - window
  return (
      Interval(jnp.maximum(of.own, place - window + 1), place),
      Interval(jnp.maximum(of.prompt, reach + 1), of.end - 1),
  )


def _places(x):
  return jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape)


def _changes(x):
  """[S, T] bool, True where a row of x differs from the value before."""
  return jnp.concatenate(
      [jnp.ones_like(x[:, :1], bool), x[:, 1:] != x[:, :-1]], axis=1
  )
