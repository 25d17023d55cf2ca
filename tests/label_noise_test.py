"""Wrong labels of benchmarks/label_noise.py: how many, and what they change."""

from benchmarks import label_noise

ROWS = [{"prompt_id": f"p{i}", "scores": [0.2, 1.0, 0.5, 1.0]}
        for i in range(400)]


def _changed(share):
  noisy = label_noise.with_noise(ROWS, share, seed=3)
  return {row["prompt_id"]: row["scores"] for row, old in zip(noisy, ROWS)
          if row["scores"] != old["scores"]}


def test_a_worse_candidate_and_all_of_the_best_change_places():
  changed = _changed(1.0)
  assert len(changed) == len(ROWS)
  assert sorted(set(map(tuple, changed.values()))) == [
      (0.2, 0.5, 1.0, 0.5), (1.0, 0.2, 0.5, 0.2)]


def test_the_share_is_kept_and_more_noise_has_the_wrong_labels_of_less():
  assert _changed(0.0) == {}
  few, many = _changed(0.2), _changed(0.4)
  assert 60 <= len(few) <= 100 and 130 <= len(many) <= 190
  assert few.items() <= many.items()
  assert ROWS[0]["scores"] == [0.2, 1.0, 0.5, 1.0]


def test_where_all_are_equal_nothing_is_wrong():
  rows = [{"prompt_id": "a", "scores": [0.5, 0.5]}]
  assert label_noise.with_noise(rows, 1.0, seed=0) == rows
