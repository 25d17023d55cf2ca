"""Pools that an objective or a chain cannot use are refused before training."""

import numpy as np
import pytest
import training_cases as cases

from configs import default
from mcpo_jax import errors, settings
from mcpo_jax.stages import pools


class Store:
  """Three sets of 3, 4 and 5 candidates."""

  def __init__(self, **changes):
    self._changes = changes

  def candidate_set(self, i):
    one = cases.candidate_set(np.random.default_rng(i), i + 1, 3 + i)
    return one._replace(scores=one.scores / 9)._replace(**(
        {k: v(one) for k, v in self._changes.items()} if i == 1 else {}))


def check(store, **values):
  config = default.get_config()
  config.stages, config.num_steps = ("preference",), 3
  config.data.path = "rows.jsonl"
  config.update_from_flattened_dict(
      {key.replace("__", "."): value for key, value in values.items()})
  pools.check_pools(
      settings.resolve(config.to_dict()), {"train": (store, np.arange(3))})


def unknown(one):
  return np.append(one.scores[:-1], np.float32(np.nan))


def test_an_unknown_score_is_refused_where_it_would_be_read():
  store = Store(scores=unknown)
  for name in ("infonca", "reward_rpo", "plackett_luce"):
    with pytest.raises(errors.DataError) as caught:
      check(store, objective__name=name)
    assert caught.value.slug == "data.field_missing"
    assert caught.value.where == "prompt_id p2, scores"
  check(store, objective__name="dpo")
  check(Store(), objective__name="infonca")


def test_win_rates_lie_between_0_and_1():
  store = Store(scores=lambda one: one.scores * 9)
  with pytest.raises(errors.DataError) as caught:
    check(store, objective__name="sppo", objective__form="win_rate")
  assert caught.value.slug == "data.score_range"
  check(store, objective__name="sppo")
  check(Store(), objective__name="sppo", objective__form="win_rate")


def test_a_chain_longer_than_every_pool_is_refused():
  check(Store(), kernel__num_steps=4, kernel__block_size=1)
  with pytest.raises(errors.ConfigError) as caught:
    check(Store(), kernel__num_steps=5, kernel__block_size=1)
  assert (caught.value.slug, caught.value.where, caught.value.got) == (
      "config.range", "kernel.block_size", 5)
