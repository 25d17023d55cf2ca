"""Sets that carry another prompt's completion along."""

import numpy as np
import pytest
import run_cases

from mcpo_jax import errors, types
from mcpo_jax.data import mismatched, packing, store
from mcpo_jax.data import tokenizer as tokenizer_lib


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  run_cases.write_data(folder, rows=9)
  path = str(folder / "kwise.jsonl")
  tokenizer_lib.train_tokenizer(
      store.training_texts(path, "native"), vocab_size=300,
      out_dir=folder / "tokenizer", chat_template=None)
  return store.build_store(
      [(path, "native", 1.0, None)],
      tokenizer_lib.load_tokenizer(str(folder / "tokenizer")),
      cache_dir=folder / "cache")


@pytest.mark.parametrize("seed", range(4))
def test_partners_are_others_of_another_prompt_fixed_by_the_seed(seed):
  hashes = np.array([5, 5, 5, 7, 9, 5, 8], np.uint64)
  partner = mismatched.partners(hashes, seed)
  assert (hashes[partner] != hashes).all()
  np.testing.assert_array_equal(partner, mismatched.partners(hashes, seed))


def test_the_partner_depends_on_the_seed():
  hashes = np.arange(20, dtype=np.uint64)
  assert (mismatched.partners(hashes, 0) != mismatched.partners(
      hashes, 1)).any()


def test_one_prompt_alone_is_refused():
  with pytest.raises(errors.DataError) as caught:
    mismatched.partners(np.array([3, 3], np.uint64), 0)
  assert caught.value.slug == "data.too_small"


def test_the_set_gains_the_partners_best_as_its_last_candidate(data):
  more = mismatched.with_mismatched(data, 3)
  assert more.key != data.key and len(more) == len(data)
  assert more.max_candidates == data.max_candidates + 1
  for row in range(len(data)):
    plain, one = data.candidate_set(row), more.candidate_set(row)
    other = data.candidate_set(int(more.partner[row]))
    best = int(np.nanargmax(other.scores))
    np.testing.assert_array_equal(one.completions[-1], other.completions[best])
    assert one.candidate_ids[-1] == types.MISMATCHED_ID
    assert np.isnan(one.scores[-1])
    np.testing.assert_array_equal(one.scores[:-1], plain.scores)
    order, role = packing.order_candidates(one, preferred="best")
    assert role[order.index(len(order) - 1)] == 0  # neither good nor bad


def test_it_is_no_negative_where_only_an_index_says_what_is_preferred(data):
  one = mismatched.with_mismatched(data, 3).candidate_set(0)
  one = one._replace(scores=np.full_like(one.scores, np.nan), preferred=1)
  role = packing.roles(one, 1)
  np.testing.assert_array_equal(role, [-1, 1, -1, -1, 0])
