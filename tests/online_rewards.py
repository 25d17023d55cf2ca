"""Rewards of one's own, for runs in tests that name them by import path."""

import zlib


def letters(prompts, completions, **columns):
  """Any text but an equal one gets another score, in [0, 1)."""
  return [zlib.crc32(f"{p}|{c}".encode()) / 2**32
          for p, c in zip(prompts, completions)]


def shortest(prompts, completions, **columns):
  """In words."""
  return [-float(len(c.split())) for c in completions]


def indifferent(prompts, completions, **columns):
  """The same for all."""
  return [0.5] * len(completions)
