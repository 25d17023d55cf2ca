"""What each token of a stream sees, as places in its stream.

A set stands in one piece: its prompt, then its candidates side by side. So what
a token sees is two intervals of places, whatever the window: one of its own
run (the prompt of a prompt token, the completion of any other), which ends
with the token itself, and one of the prompt before its completion.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
  from mcpo_jax.models import attention


class Interval(NamedTuple):
  """Places from first up to last, both included; none where last < first."""

  first: jax.Array  # [S, T] int32
  last: jax.Array  # [S, T] int32


def intervals(
    slots: "attention.Slots", window: jax.Array
) -> tuple[Interval, Interval]:
  """The places that each token sees.

  Args:
    slots: [S, T] each.
    window: [] int32; a key at distance window or more, in positions, is not
      seen.

  Returns:
    own: never empty; padding sees itself alone.
    prompt: disjoint from own; empty for tokens of prompts and padding.
  """
  place = jnp.broadcast_to(
      jnp.arange(slots.prompt.shape[1])[None], slots.prompt.shape
  )
  padding = slots.prompt < 0
  new_set = _changes(slots.prompt) | padding
  begin = lambda new: jax.lax.cummax(jnp.where(new, place, 0), axis=1)
  prompt = begin(new_set)
  own = begin(new_set | _changes(slots.candidate))
  # Positions go on after the prompt for each candidate: this is its length.
  end = prompt + slots.positions - (place - own)
  end = jnp.where(padding, prompt, end)
  reach = end + (place - own) - window  # the last place of the prompt too far
  return (
      Interval(jnp.maximum(own, place - window + 1), place),
      Interval(jnp.maximum(prompt, reach + 1), end - 1),
  )


def _changes(x):
  """[S, T] bool, True where a row of x differs from the value before."""
  return jnp.concatenate(
      [jnp.ones_like(x[:, :1], bool), x[:, 1:] != x[:, :-1]], axis=1
  )
