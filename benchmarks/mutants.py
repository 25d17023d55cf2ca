"""Test power: mistakes that a test must catch, each made in a copy.

A mutant is a piece of the source text, what stands there instead, and the test
that must then fail. The copies lie in a temporary folder; the tree itself is
never touched. Before any mutant the tests run once on an unchanged copy.

  python benchmarks/mutants.py --out=benchmarks/mutants.md

Exits with 1 if a mutant survives.
"""

import argparse
import concurrent.futures
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("mcpo_jax", "tests", "configs", "pyproject.toml")


class Mutant(NamedTuple):
  """One mistake and the test that must see it."""

  name: str
  file: str  # in mcpo_jax/
  old: str  # occurs there exactly once
  new: str
  test_file: str  # in tests/
  test: str  # a function of it, with or without [its parameters]

  @property
  def test_id(self) -> str:
    return f"tests/{self.test_file}::{self.test}"


MUTANTS = (
    # --- Tokens, masks and positions -----------------------------------------
    Mutant(
        "label_shift_later", "data/packing.py",
        "previous = where - 1",
        "previous = where",
        "data_packing_test.py", "test_a_small_chunk_by_hand",
    ),
    Mutant(
        "label_shift_earlier", "models/scoring.py",
        "index = reorder(source)[..., None]",
        "index = jnp.maximum(reorder(source) - 1, 0)[..., None]",
        "models_scoring_test.py",
        "test_every_term_equals_that_of_full_logits",
    ),
    Mutant(
        "prompt_in_mask", "data/packing.py",
        "masks.append(np.zeros(size, bool))",
        "masks.append(np.ones(size, bool))",
        "data_packing_test.py", "test_a_small_chunk_by_hand",
    ),
    Mutant(
        "pad_in_mask", "data/packing.py",
        "completion_mask=np.zeros(size, bool)",
        "completion_mask=np.ones(size, bool)",
        "data_packing_test.py", "test_a_small_chunk_by_hand",
    ),
    Mutant(
        "eos_not_in_mask", "data/tokenizer.py",
        "mask += [piece.scored] * len(new)",
        "mask += [piece.scored and token != piece.end for token in new]",
        "data_tokenizer_test.py",
        "test_prompt_and_completion_join_to_the_template_s_own_text",
    ),
    Mutant(
        "ties_are_negatives", "data/packing.py",
        "np.where(scores < scores[preferred], -1, 0)",
        "np.where(scores <= scores[preferred], -1, 0)",
        "data_packing_test.py",
        "test_an_index_with_scores_keeps_ties_out",
    ),
    Mutant(
        "position_in_stream", "data/packing.py",
        "out.positions[where] = np.repeat(position, length) + within",
        "out.positions[where] = where",
        "data_packing_test.py", "test_a_small_chunk_by_hand",
    ),
    Mutant(
        "position_counts_pads", "models/decoder.py",
        "positions = prompt_lengths[:, None] + ages",
        "positions = 0 * prompt_lengths[:, None] + PAGE + ages",
        "models_decoder_test.py",
        "test_cached_decoding_gives_the_logits_of_the_full_forward",
    ),
    Mutant(
        "one_order_for_all_epochs", "data/batches.py",
        "_permutation(seed, int(epoch), num_examples)",
        "_permutation(seed, 0, num_examples)",
        "data_batches_test.py", "test_seeds_and_epochs_differ",
    ),
    # --- The model and what is read from it ----------------------------------
    Mutant(
        "attention_to_pads", "models/decoder.py",
        "stored = (pages.groups >= 0)[..., None] & (place < lengths)",
        "stored = (pages.groups >= 0)[..., None] & (place >= 0)",
        "models_decoder_test.py",
        "test_cached_decoding_gives_the_logits_of_the_full_forward",
    ),
    Mutant(
        "attention_to_other_prompts", "models/spans.py",
        "new_set = _changes(slots.prompt) | padding",
        "new_set = _changes(jnp.minimum(slots.prompt, 0)) | padding",
        "models_decoder_test.py", "test_attention_sees_what_the_rule_says",
    ),
    Mutant(
        "attention_to_other_candidates", "models/spans.py",
        "own = begin(new_set | _changes(slots.candidate))",
        "own = begin(new_set | _changes(jnp.minimum(slots.candidate, 0)))",
        "models_decoder_test.py",
        "test_a_shared_prompt_gives_the_logps_of_separate_texts",
    ),
    Mutant(
        "prompt_of_the_first_query_alone", "models/tiles.py",
        "axis=-1, where=same, initial=2**30)",
        "axis=-1, where=same & (jnp.arange(tile) < 1), initial=2**30)",
        "attention_kernels_test.py", "test_a_kernel_is_attention",
    ),
    Mutant(
        "gradient_without_the_soft_cap", "models/tiles.py",
        "slope * (1 - bent * bent)", "slope * (1 - 0 * bent)",
        "attention_kernels_test.py", "test_a_kernel_is_attention",
    ),
    Mutant(
        "a_key_tile_met_twice", "models/tiles.py",
        "visible = (own | prompt) & (index >= first) & (index < end)",
        "visible = own | prompt",
        "attention_kernels_test.py", "test_a_kernel_is_attention",
    ),
    Mutant(
        "scales_of_norms_of_the_last_stream", "models/decoder.py",
        "return ((ones @ gradient).reshape(-1, shape[-1]).sum(0),)",
        "return ((ones @ gradient).reshape(-1, shape[-1])[-1] / 2,)",
        "models_scoring_test.py",
        "test_gradients_are_those_of_finite_differences",
    ),
    Mutant(
        "adapters_without_their_scale", "models/decoder.py",
        "y = y + (scale * (flat @ a)) @ b", "y = y + (flat @ a) @ b",
        "lora_test.py", "test_adapters_compute_what_merged_weights_compute",
    ),
    Mutant(
        "two_sets_in_one_place", "data/packing.py",
        "    used[stream] = place\n", "    used[stream] = place - 1\n",
        "data_packing_test.py",
        "test_chunks_of_several_lengths_hold_every_candidate",
    ),
    Mutant(
        "a_set_is_cut_although_it_fits", "data/packing.py",
        "if not whole or _spread(", "if _spread(",
        "data_packing_test.py",
        "test_a_whole_set_stays_in_one_chunk_and_is_cut_only_if_it_must_be",
    ),
    Mutant(
        "bfloat16_logits", "models/decoder.py",
        "wide = jnp.promote_types(hidden.dtype, jnp.float32)",
        "wide = hidden.dtype",
        "models_decoder_test.py", "test_logps_are_float32_under_bfloat16",
    ),
    Mutant(
        "bfloat16_log_softmax", "models/scoring.py",
        "return _Law(logits, jax.nn.logsumexp(logits, axis=-1), tokens)",
        "log_z = jax.nn.logsumexp(logits.astype(hidden.dtype), axis=-1)\n"
        "  return _Law(logits, log_z.astype(logits.dtype), tokens)",
        "models_decoder_test.py", "test_logps_are_float32_under_bfloat16",
    ),
    Mutant(
        "logps_of_the_nucleus", "generation/sampler.py",
        "return tokens, logps, of_raw - jax.nn.logsumexp(raw, axis=-1)",
        "return tokens, logps, logps",
        "generation_sampler_test.py", "test_logps_are_those_of_the_scorer",
    ),
    Mutant(
        "one_noise_for_all_tokens", "generation/sampling.py",
        "key = jax.random.fold_in(key, position)",
        "key = jax.random.fold_in(key, 0 * position)",
        "generation_sampling_test.py",
        "test_a_draw_depends_on_its_own_address_alone",
    ),
    Mutant(
        "own_tokens_of_the_sample_before", "models/decoder.py",
        "(age <= ages[..., None]) & (age < window),",
        "(age <= length + ages[..., None]) & (age < window),",
        "models_decoder_test.py",
        "test_cached_decoding_gives_the_logits_of_the_full_forward",
    ),
    Mutant(
        "pages_of_the_prompt_before", "generation/engine.py",
        "owner[owner == group] = -1  # of the group's prompt before",
        "owner[owner == group] = group",
        "generation_engine_test.py",
        "test_a_sample_is_the_same_alone_and_in_any_company",
    ),
    # --- The reference -------------------------------------------------------
    Mutant(
        "reference_of_the_next_row", "training/reference.py",
        "zip(batch.rows, batch.order)",
        "zip(np.roll(batch.rows, -1), batch.order)",
        "training_reference_test.py", "test_the_anchor_follows_the_slots",
    ),
    Mutant(
        "reference_in_record_order", "training/reference.py",
        "self.logps(int(row))[slots]",
        "self.logps(int(row))",
        "training_reference_test.py", "test_the_anchor_follows_the_slots",
    ),
    Mutant(
        "start_gate_open", "training/reference.py",
        "if not gap <= tolerance:",
        "if gap < 0:",
        "training_reference_test.py",
        "test_the_gate_passes_equal_weights_and_stops_others",
    ),
    Mutant(
        "reference_moves_with_the_policy", "training/step.py",
        "return features(params, reference, streams, with_prefix(inputs))",
        "reference = reference and policy_of(params)\n"
        "    return features(params, reference, streams, with_prefix(inputs))",
        "training_step_test.py",
        "test_terms_compare_with_the_weights_of_the_reference",
    ),
    Mutant(
        "gradient_through_the_reference", "models/scoring.py",
        "reference = jax.lax.stop_gradient(reference)",
        "reference = reference",
        "models_scoring_test.py",
        "test_gradients_are_those_of_finite_differences",
    ),
    Mutant(
        "gradient_through_the_anchor", "objectives/implicit.py",
        'jax.lax.stop_gradient(jnp.asarray(batch.anchors["ref"]))',
        'jnp.asarray(batch.anchors["ref"])',
        "objectives_losses_test.py",
        "test_no_gradient_reaches_reference_or_statistics",
    ),
    # --- Noise ---------------------------------------------------------------
    Mutant(
        "key_of_the_visit_before", "kernels/address.py",
        "sets.visit[:, None],",
        "sets.visit[:, None] // 2,",
        "kernels_address_test.py",
        "test_every_part_of_the_address_changes_all_noise",
    ),
    Mutant(
        "key_by_row", "kernels/address.py",
        "sets.example_id[:, :1],",
        "jnp.arange(len(sets.visit))[:, None],",
        "kernels_address_test.py",
        "test_noise_ignores_rows_slots_padding_and_metadata",
    ),
    Mutant(
        "key_by_slot", "kernels/address.py",
        "      sets.candidate_id,\n  )",
        "      jnp.arange(sets.role.shape[1])[None, :],\n  )",
        "kernels_address_test.py",
        "test_noise_ignores_rows_slots_padding_and_metadata",
    ),
    Mutant(
        "noise_shared_by_chains", "kernels/address.py",
        "      purpose,\n      chain,",
        "      purpose,\n      0,",
        "kernels_address_test.py",
        "test_key_purpose_and_chain_change_all_noise",
    ),
    Mutant(
        "noise_shared_by_steps", "kernels/chains.py",
        "move = noise(address.CHAIN_MOVE, j)",
        "move = noise(address.CHAIN_MOVE, 0)",
        "kernels_chains_test.py",
        "test_steps_over_fresh_candidates_are_the_product_of_exact_matrices",
    ),
    Mutant(
        "noise_cut_at_16", "kernels/address.py",
        'jax.random.gumbel(candidate_key, mode="high")',
        "jax.random.gumbel(candidate_key)",
        "kernels_address_test.py", "test_noise_is_a_fixed_number",
    ),
    # --- Weights and draws ---------------------------------------------------
    Mutant(
        "softmax_over_the_batch", "kernels/weights.py",
        "jax.nn.log_softmax(logits, axis=1)",
        "jax.nn.log_softmax(logits, axis=0)",
        "kernels_mc_test.py", "test_info_of_a_hand_worked_row",
    ),
    Mutant(
        "temperature_inverted", "kernels/weights.py",
        "(scores - top) / temperature",
        "(scores - top) * temperature",
        "kernels_mc_test.py",
        "test_temperature_goes_from_the_maximum_to_uniform",
    ),
    Mutant(
        "multiplicity_left_out", "kernels/weights.py",
        "jnp.where(first, 1, jnp.maximum(sets.multiplicity, 1))",
        "jnp.ones_like(sets.multiplicity)",
        "kernels_mc_test.py", "test_random_draws_by_multiplicity_alone",
    ),
    Mutant(
        "multiplicity_of_the_preferred", "kernels/weights.py",
        "jnp.where(first, 1, jnp.maximum(sets.multiplicity, 1))",
        "jnp.maximum(sets.multiplicity, 1)",
        "kernels_mc_test.py", "test_preferred_counts_once",
    ),
    Mutant(
        "multiplicity_spent_twice", "kernels/mc.py",
        "jnp.ones_like(slots) if spent else take(sets.multiplicity)",
        "take(sets.multiplicity)",
        "kernels_mc_test.py",
        "test_taking_the_drawn_keeps_what_belongs_to_them",
    ),
    Mutant(
        "padded_candidate_counted", "kernels/weights.py",
        "negative = jnp.logical_and(sets.role == -1, sets.candidate_mask)",
        "negative = sets.role == -1",
        "objectives_losses_test.py",
        "test_rows_without_a_negative_are_zero_without_gradient[rnce]",
    ),
    Mutant(
        "padded_candidate_drawn", "kernels/mc.py",
        "keys = (tie, rank, ~candidate)",
        "keys = (tie, rank)",
        "kernels_mc_test.py", "test_masked_and_roleless_are_never_drawn",
    ),
    Mutant(
        "preferred_left_out", "kernels/weights.py",
        "return jnp.logical_or(negatives(sets), _preferred(sets))",
        "return negatives(sets)",
        "facts_test.py",
        "test_2_kernel_leaves_the_model_invariant_in_detailed_balance",
    ),
    Mutant(
        "preferred_left_out_of_its_weight", "kernels/weights.py",
        "      include_preferred=True,",
        "      include_preferred=False,",
        "facts_test.py", "test_1_mean_cd_gradient_is_the_rnce_gradient",
    ),
    Mutant(
        "preferred_drawn_is_a_negative", "kernels/mc.py",
        "selected_mask = jnp.logical_and(drawn, is_negative)",
        "selected_mask = jnp.broadcast_to(drawn, is_negative.shape)",
        "kernels_mc_test.py", "test_preferred_drawn_is_masked_and_counted",
    ),
    Mutant(
        "sign_of_the_correction", "kernels/weights.py",
        'sets.anchors["proposal_mu"] - sets.anchors["proposal_q"]',
        'sets.anchors["proposal_q"] - sets.anchors["proposal_mu"]',
        "facts_test.py",
        "test_3_proposals_need_their_correction_on_every_slot",
    ),
    Mutant(
        "no_correction_on_the_preferred", "kernels/weights.py",
        "log_count = log_count + proposal_correction(sets)",
        "log_count += jnp.where(first, 0.0, proposal_correction(sets))",
        "objectives_losses_test.py",
        "test_rnce_correction_concerns_slot_zero_too",
    ),
    Mutant(
        "score_without_the_reference", "kernels/mc.py",
        'beta * (logps - ref_logps) if "reward" in score else logps',
        'beta * logps if "reward" in score else logps',
        "kernels_mc_test.py", "test_kernel_scores_by_hand",
    ),
    # --- Chains --------------------------------------------------------------
    Mutant(
        "metropolis_inverted", "kernels/chains.py",
        "return log_uniform <= log_ratio",
        "return log_uniform <= -log_ratio",
        "kernels_chains_test.py",
        "test_draws_follow_the_law_over_all_orders_of_blocks"
        "[metropolis-persistent]",
    ),
    Mutant(
        "multiplicity_twice_in_acceptance", "kernels/chains.py",
        "accept, current, proposal, log_weights - log_count, transition",
        "accept, current, proposal, log_weights, transition",
        "kernels_chains_test.py",
        "test_draws_follow_the_law_over_all_orders_of_blocks[barker]",
    ),
    Mutant(
        "barker_as_metropolis", "kernels/chains.py",
        'if transition == "barker":',
        'if transition == "none":',
        "kernels_chains_test.py",
        "test_draws_follow_the_law_over_all_orders_of_blocks[barker]",
    ),
    Mutant(
        "drawn_before_attracts", "kernels/chains.py",
        "(log_weights - jnp.log1p(state.history))",
        "(log_weights + jnp.log1p(state.history))",
        "kernels_chains_test.py",
        "test_draws_follow_the_law_over_all_orders_of_blocks[self_repellent]",
    ),
    Mutant(
        "block_used_again", "kernels/chains.py",
        "block = jnp.logical_and(fresh, block_of == j)",
        "block = jnp.logical_and(fresh, block_of == 0)",
        "kernels_chains_test.py",
        "test_steps_over_fresh_candidates_are_the_product_of_exact_matrices",
    ),
    Mutant(
        "chain_meets_itself", "kernels/chains.py",
        "fresh = jnp.logical_and(negative, ~_is_at(current, negative))",
        "fresh = negative",
        "kernels_chains_test.py",
        "test_draws_follow_the_law_over_all_orders_of_blocks"
        "[metropolis-persistent]",
    ),
    Mutant(
        "chains_forget_where_they_stood", "kernels/chains.py",
        "start = jnp.where(there, state.selected, start)",
        "start = jnp.where(there, start, start)",
        "kernels_chains_test.py",
        "test_a_chain_goes_on_where_it_stood_and_never_meets_itself",
    ),
    # --- Objectives ----------------------------------------------------------
    Mutant(
        "beta_twice", "objectives/implicit.py",
        "return beta * (",
        "return beta * beta * (",
        "objectives_losses_test.py", "test_dpo_by_hand",
    ),
    Mutant(
        "beta_left_out", "objectives/implicit.py",
        "return beta * (",
        "return (",
        "objectives_losses_test.py", "test_dpo_by_hand",
    ),
    Mutant(
        "mean_for_sum", "objectives/implicit.py",
        "masked(features.logps, batch) - masked(reference, batch)\n  )",
        "masked(features.logps, batch) - masked(reference, batch)\n"
        "  ) / jnp.maximum(batch.lengths, 1)",
        "objectives_losses_test.py", "test_dpo_by_hand",
    ),
    Mutant(
        "sign_of_the_margin", "objectives/pairs.py",
        "losses = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(margins)",
        "losses = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(-margins)",
        "objectives_losses_test.py", "test_dpo_by_hand",
    ),
    Mutant(
        "chosen_and_rejected_swapped", "objectives/pairs.py",
        "return values[:, 0], values[:, 1]",
        "return values[:, 1], values[:, 0]",
        "objectives_losses_test.py", "test_dpo_by_hand",
    ),
    Mutant(
        "exponents_not_clipped", "objectives/pairs.py",
        "jnp.exp(jnp.clip(exponents, -MAX_EXPONENT, MAX_EXPONENT))",
        "jnp.exp(exponents)",
        "objectives_pairwise_test.py",
        "test_extremes_are_finite_in_value_and_gradient",
    ),
    Mutant(
        "ipo_target_doubled", "objectives/pairwise.py",
        "(pairs.margins(ratios, batch) - 1.0 / (2.0 * beta)) ** 2",
        "(pairs.margins(ratios, batch) - 1.0 / beta) ** 2",
        "objectives_losses_test.py",
        "test_ipo_is_zero_where_the_gap_is_its_target",
    ),
    Mutant(
        "simpo_margin_added", "objectives/reference_free.py",
        "rewards = beta * _mean_logps(features, batch)\n"
        "  margins = pairs.margins(rewards, batch) - beta * gamma_beta_ratio",
        "rewards = beta * _mean_logps(features, batch)\n"
        "  margins = pairs.margins(rewards, batch) + beta * gamma_beta_ratio",
        "objectives_reference_free_test.py",
        "test_value_and_gradient_equal_the_oracle[simpo]",
    ),
    Mutant(
        "aot_not_sorted", "objectives/transport.py",
        "first - jnp.sort(last(second))[ranks]",
        "first - second",
        "objectives_pairwise_test.py", "test_aot_by_hand",
    ),
    Mutant(
        "cd_mean_over_the_moved", "objectives/softmax.py",
        "losses = jnp.mean(excess, axis=1)",
        "losses = jnp.sum(excess, axis=1)"
        " / jnp.maximum(jnp.sum(moved, axis=1), 1)",
        "objectives_losses_test.py",
        "test_value_and_gradient_equal_the_oracle[cd]",
    ),
    Mutant(
        "gradient_through_the_weight", "objectives/softmax.py",
        "jax.lax.stop_gradient(1.0 - p_0)",
        "(1.0 - p_0)",
        "objectives_losses_test.py",
        "test_no_gradient_reaches_reference_or_statistics[cd_out]",
    ),
    Mutant(
        "gradient_through_the_divergence", "objectives/token_level.py",
        "chosen = jax.lax.stop_gradient(values[:, :1])",
        "chosen = values[:, :1]",
        "objectives_token_level_test.py",
        "test_value_and_gradient_equal_the_oracle[tdpo2]",
    ),
    Mutant(
        "plackett_luce_reversed", "objectives/listwise.py",
        "_above(batch), excess + jnp.log(count)[:, None, :], -jnp.inf",
        "_above(batch).swapaxes(1, 2),"
        " excess + jnp.log(count)[:, None, :], -jnp.inf",
        "objectives_listwise_test.py", "test_plackett_luce_by_hand",
    ),
    Mutant(
        "kto_z_of_matched_completions", "objectives/unpaired.py",
        "mismatched = mask & mask[:, :1] & _mismatched(batch)",
        "mismatched = mask & mask[:, :1] & ~_mismatched(batch)",
        "objectives_unpaired_test.py", "test_kto_by_hand",
    ),
    Mutant(
        "bco_shift_of_the_last_visit", "objectives/unpaired.py",
        "jnp.where(desirable, rewards - delta, delta - rewards)",
        "jnp.where(desirable, rewards - old, old - rewards)",
        "objectives_unpaired_test.py", "test_bco_by_hand_over_two_visits",
    ),
    Mutant(
        "average_moved_by_held_out_rows", "objectives/moving.py",
        "row = jnp.where(row < 0, len(stored), row)",
        "row = jnp.where(row < 0, 0, row)",
        "objectives_moving_test.py",
        "test_held_out_prompts_take_the_fresh_estimate_and_leave_none",
    ),
    # --- The step ------------------------------------------------------------
    Mutant(
        "mean_of_the_chunk", "training/step.py",
        "total = jnp.sum(loss) / denominator(sets).astype(loss.dtype)",
        "total = jnp.sum(loss) / jnp.sum(present).astype(loss.dtype)",
        "training_step_test.py",
        "test_more_chunks_leave_the_update_unchanged[rnce-all]",
    ),
    Mutant(
        "divided_twice", "training/step.py",
        "lambda c, x: jnp.sum(c * x), cotangent, values)",
        "lambda c, x: jnp.sum(c * x) / denominator(inputs.sets),\n"
        "          cotangent, values)",
        "training_step_test.py",
        "test_cotangents_give_the_gradient_of_the_fused_path",
    ),
    Mutant(
        "chains_not_written", "training/step.py",
        "memory = remember(memory, sets.row, standing, drawn)",
        "memory = remember(memory, sets.row, standing, standing)",
        "training_memory_test.py",
        "test_without_its_memory_a_chain_goes_another_way",
    ),
    Mutant(
        "chains_of_held_out_rows_written", "training/step.py",
        "counted = jnp.where(row >= 0, row, nowhere)",
        "counted = row",
        "training_memory_test.py",
        "test_what_is_written_is_the_later_of_two_draws_and_nothing_held_out",
    ),
    Mutant(
        "update_that_is_not_finite", "training/step.py",
        "lambda a, b: jnp.where(finite, a, b), new, state",
        "lambda a, b: a, new, state",
        "training_step_test.py",
        "test_a_non_finite_batch_leaves_the_weights",
    ),
    Mutant(
        "damage_not_seen", "commit.py",
        'if digest != files[name]["sha256"]:',
        'if not digest:',
        "commit_test.py", "test_damage_is_named",
    ),
)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=pathlib.Path, help="Markdown file")
  parser.add_argument("--only", metavar="NAME", help="this mutant alone")
  parser.add_argument("--jobs", type=int, default=1, help="tests at a time")
  args = parser.parse_args()
  chosen = [m for m in MUTANTS if args.only in (None, m.name)]
  if not chosen:
    parser.error(f"no mutant {args.only!r}")
  for mutant in chosen:  # before any test runs, as a misfit is refused
    mutate(mutant, (ROOT / "mcpo_jax" / mutant.file).read_text())

  with tempfile.TemporaryDirectory() as folder:
    copies = queue.SimpleQueue()
    for i in range(args.jobs):
      copies.put(copy_tree(pathlib.Path(folder) / str(i)))
    caught = run_tests(
        pathlib.Path(folder) / "0", sorted({m.test_id for m in chosen}))
    if caught:
      raise SystemExit(f"fails without any mutant: {caught}")

    def try_one(mutant):
      copy, start = copies.get(), time.perf_counter()
      path = copy / "mcpo_jax" / mutant.file
      text = path.read_text()
      try:
        path.write_text(mutate(mutant, text))
        caught = run_tests(copy, [mutant.test_id])
      finally:
        path.write_text(text)
        copies.put(copy)
      seconds = time.perf_counter() - start
      print(f"{mutant.name}: {caught or 'SURVIVES'}", file=sys.stderr)
      return mutant, caught, seconds

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
      results = list(pool.map(try_one, chosen))

  text = table(results)
  if args.out:
    args.out.write_text(text)
  sys.stdout.write(text)
  return int(not all(caught for _, caught, _ in results))


def mutate(mutant: Mutant, text: str) -> str:
  """The file's text with the mistake in it.

  Raises:
    SystemExit: the old text does not occur exactly once.
  """
  count = text.count(mutant.old)
  if count != 1:
    raise SystemExit(
        f"{mutant.name}: its text occurs {count} times in {mutant.file}")
  return text.replace(mutant.old, mutant.new)


def copy_tree(folder: pathlib.Path) -> pathlib.Path:
  """What the tests need, in `folder`."""
  folder.mkdir()
  for name in COPIED:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, folder / name,
                      ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(ROOT / name, folder / name)
  return folder


def run_tests(
    folder: pathlib.Path, test_ids: list[str], *, any_end: bool = False
) -> str | None:
  """The first test that fails, None if all pass.

  Args:
    folder: a copy of the tree.
    test_ids: of pytest, in the order in which they run.
    any_end: whether that pytest cannot run them, or not within ten minutes, is
      a failure too.

  Raises:
    SystemExit: pytest could not run them.
  """
  # A file that changes twice a second may keep its size: no bytecode.
  env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
  command = [sys.executable, "-m", "pytest", "-q", "-x", "-p",
             "no:cacheprovider", *test_ids]
  try:
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True,
                          text=True, timeout=600 if any_end else None)
  except subprocess.TimeoutExpired:
    return "it hangs"
  if done.returncode == 0:
    return None
  failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", done.stdout,
                     re.MULTILINE)
  if any_end:
    return failed[1] if failed else f"pytest ends with {done.returncode}"
  if done.returncode != 1 or not failed:
    raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
  return failed[1]


def table(results: list[tuple[Mutant, str | None, float]]) -> str:
  """Markdown, one line a mutant."""
  killed = sum(bool(caught) for _, caught, _ in results)
  lines = [
      f"| {mutant.name} | {mutant.file} | {caught or '**survives**'} "
      f"| {seconds:.0f} |"
      for mutant, caught, seconds in results
  ]
  return f"""# Mutants

Command: `python benchmarks/mutants.py --out=benchmarks/mutants.md`

{killed} of {len(results)} are caught. `benchmarks/mutants.py` says what each \
of them changes.

| mutant | file | caught by | s |
|---|---|---|---|
{chr(10).join(lines)}
"""


if __name__ == "__main__":
  sys.exit(main())
