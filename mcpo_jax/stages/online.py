"""On-policy candidates of the preference stage: sampled, scored, compared."""

import functools
import math
import time
from typing import Any

import jax
import numpy as np
from absl import logging

from mcpo_jax import (
    errors,
    faults,
    hosts,
    objective_names,
    preempt,
    registry,
    sharding,
)
from mcpo_jax.data import batches, packing
from mcpo_jax.data import store as store_lib
from mcpo_jax.evaluation import samples
from mcpo_jax.rewards import functions
from mcpo_jax.stages import references, sampling
from mcpo_jax.training import alarms, candidates, reference, setup
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import metrics as metrics_lib
from mcpo_jax.training import rounds as rounds_lib
from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training.candidates import Candidate

# Sets of a round whose samples are scored to be compared with the sampler: all
# of them would cost what the sampler's own scores save.
_GAP_SETS = 8


def plan_of(config: dict[str, Any], num_steps: int) -> rounds_lib.Plan:
  """The rounds of a config whose preference stage takes `num_steps`."""
  online, source = config["online"], config["reference"]["source"]
  steps = (online["prompts_per_round"] * online["epochs_per_round"]
           // config["batch_size"])
  return rounds_lib.Plan(
      num_prompts=online["prompts_per_round"], num_steps=steps,
      num_rounds=math.ceil(num_steps / steps), lag=online["policy_lag"],
      replay=online["replay_rounds"],
      ema_decay=(config["reference"]["ema_decay"] if source == "ema"
                 else None),
      extrapolation=online["extrapolation"])


def num_drawn(options: dict[str, Any]) -> int:
  """Samples of a prompt that enter its set, of the config's group online."""
  if options["preferred"] == "data":
    return options["num_candidates"] - 1
  return max(1, round(options["num_candidates"] * options["online_fraction"]))


def make_rounds(
    run: setup.Run,
    stage: stage_lib.Stage,
    model: stage_lib.Model,
    start,
    data: store_lib.Store,
    rows: np.ndarray,
) -> rounds_lib.Rounds:
  """The rounds of a run: what `training.loop.train` takes its batches from.

  Args:
    run, stage, model: settings.
    start: () -> the first weights.
    data: whose prompts are sampled for.
    rows: of the prompts to train on.

  Raises:
    DataError: data.too_small, a round has more prompts than there are.
  """
  config = run.config
  plan = plan_of(config, stage.num_steps)
  if len(rows) < plan.num_prompts:
    raise errors.DataError(
        "data.too_small", "a round samples different prompts", got=len(rows),
        where="data.path", want=f"at least {plan.num_prompts}",
        hint="lower online.prompts_per_round")
  folder = run.workdir / "preference" / "rounds"
  fill = Filler(run, stage, model, start, data, rows, plan, folder)
  index_of = {int(row): i for i, row in enumerate(rows)}
  preferred = config["data"]["preferred"]
  if config["online"]["preferred"] == "data":
    preferred = "index"

  def arrange(sets, rows, visits):
    return batch_lib.arrange(
        sets, rows, visits, seed=stage.seed, num_slots=stage.num_slots,
        preferred=preferred, top_k=config["data"]["top_k"],
        places=np.array([index_of[int(row)] for row in rows]))

  limits = alarms.Limits(**{
      name: config["online"][name] for name in alarms.Limits._fields})

  def check(step, pool):
    history = metrics_lib.read(run.workdir, "preference")
    rounds = [row for row in history if "candidates/score" in row]
    updates = [row for row in history
               if "loss" in row and row["step"] > step - plan.num_steps]
    alarms.tell(
        alarms.find_alarms([*rounds, pool.metrics], updates, limits),
        step=step, stop=config["online"]["alarm"] == "stop")

  mirror = config["checkpoint"]["mirror"]
  return rounds_lib.Rounds(
      plan, folder, fill, batch_size=stage.batch_size, seed=stage.seed,
      arrange=arrange, check=check,
      mirror=mirror and f"{mirror}/preference/rounds")


class Filler:
  """Makes the pool of a round; `rounds.Fill`."""

  def __init__(self, run, stage, model, start, data, rows, plan, folder):
    """Loads the reward, the judge and, where it is fixed, the reference."""
    self._folder = folder
    config = run.config
    self._options, self._stage, self._model = config["online"], stage, model
    self._config, self._data, self._rows = config, data, rows
    self._plan = plan
    self._reward = sampling.load_reward(config, run.tokenizer)
    self._judge = None
    if self._options["judge"] is not None:
      self._judge = sampling.load_reward(config | {
          "reward": config["reward"] | {"name": self._options["judge"]}},
          run.tokenizer)
    self._source = config["reference"]["source"]
    self._fixed = None
    if self._source in ("resident", "lora_base"):
      self._fixed, self._reference_model = references.reference_params(
          run, model, start)
    else:
      self._reference_model = model
    self._service = sampling.make_online_service(run, model, start())
    self._opens_thinking = run.tokenizer.opens_thinking
    self._decode = run.tokenizer.hf.decode
    self._score = {}  # architecture -> compiled scorer

  def __call__(
      self, number: int, weights: rounds_lib.Weights, step: int
  ) -> rounds_lib.Pool:
    """Samples, scores and compares the candidates of one round."""
    weights = rounds_lib.Weights(
        self._model.policy(weights.policy),
        weights.moving and self._model.policy(weights.moving))
    rows = self._rows[prompts_of_round(
        number, self._plan.num_prompts, len(self._rows),
        seed=self._stage.seed)]
    prompts = sampling.prompt_set(self._data, rows)
    drawn, seconds = self._drawn(number, prompts, weights, step)
    tokens = sum(len(c.tokens) for own in drawn for c in own)

    told = [[c for c in own if not self._is_empty(c)] for own in drawn]
    others = [self._of_record(number, int(row)) for row in rows]
    if self._reward is not None:
      told, others = self._scored(prompts, told, others)
    sets = [self._pool_set(number, int(row), prompt, own, more, step)
            for row, prompt, own, more in zip(
                rows, prompts.prompts, told, others)]
    sets, gap = self._with_anchors(sets, drawn, weights)
    metrics = candidates.round_metrics(sets, drawn, told)
    if self._judge is not None:
      means = np.array([scores.mean() for scores in self._scores(
          self._judge, prompts, told) if len(scores)])
      metrics |= {"judge/mean": float(means.mean()),
                  "judge/sem": float(means.std() / math.sqrt(len(means)))}
    metrics |= gap | {
        "online/round": number, "online/policy_step": step,
        "generate/tokens": tokens, "generate/seconds": seconds,
        "generate/tokens_per_sec": tokens / seconds}
    logging.info(
        "round %d: %d prompts, %d tokens in %.1f s, score %.4g, %.0f %% tied",
        number, len(rows), tokens, seconds, metrics["candidates/score"],
        100 * metrics["candidates/tied_share"])
    return rounds_lib.Pool(sets, step, metrics)

  def _is_empty(self, one: Candidate) -> bool:
    """Whether the reward would see nothing of it: no text, or a thought that
    was cut off. Such samples are counted, and are no candidates."""
    return not functions.visible_part(
        one.text, self._config["reward"]["thinking"],
        opened=self._opens_thinking).strip()

  def _reference(self, weights):
    """The reference's weights in this round."""
    if self._fixed is not None:
      return self._fixed
    return weights.moving if self._source == "ema" else weights.policy

  def _drawn(self, number, prompts, weights, step):
    """The samples of each prompt, not scored yet, and the seconds they took.
    They are drawn and written in parts, so that a run that is stopped in a
    round keeps them, and lie there until they are scored: a reward may be away
    for long."""
    folder = rounds_lib.samples_of(rounds_lib.place_of(self._folder, number))
    size = self._options["prompts_per_part"]
    drawn, seconds = [], 0.0
    for first in range(0, len(prompts.prompts), size):
      preempt.check()
      place, some = folder / f"{first:06d}", slice(first, first + size)
      if not hosts.on_all_disks(
          "samples", functools.partial(rounds_lib.is_there, place)):
        part = samples.PromptSet(
            prompts.tokens[some], prompts.prompt_ids[some],
            prompts.prompts[some], {})
        began = time.perf_counter()
        sampled = self._sample(number, part, weights, step)
        own = time.perf_counter() - began
        candidates.write_samples(
            place, part.prompts,
            [self._sampled(number, i, sampled)
             for i in range(len(part.prompts))],
            {"policy_step": step, "seconds": own})
        hosts.wait_for_first("samples")
        faults.point("online.part")
      more, meta = candidates.read_samples(place)
      drawn, seconds = drawn + more, seconds + meta["seconds"]
    preempt.check()
    return drawn, seconds

  def _sample(self, number, prompts, weights, step):
    share = self._options["mixture"]
    models = weights.policy
    if share:
      models = ((weights.policy, 1.0 - share),
                (self._reference(weights), share))
    self._service.update(models, step)
    return self._service.generate(
        prompts.tokens, prompt_ids=prompts.prompt_ids,
        num_samples=self._options["num_samples"] or num_drawn(self._options),
        sampling=sampling.law(self._config),
        seed=round_seed(self._stage.seed, number), require_version=step)

  def _sampled(self, number, i, sampled) -> list[Candidate]:
    """The samples of prompt i, not scored yet."""
    first = candidates.IDS_PER_ROUND * (number + 1)
    return [
        Candidate(
            tokens=sampled.tokens[i, n][mask], mask=np.ones(mask.sum(), bool),
            text=sampled.text[i][n], candidate_id=first + n,
            score=float("nan"), source="policy",
            finish_reason=sampled.finish_reason[i][n],
            behaviour_logp=float(sampled.behaviour_logps[i, n][mask].sum()),
            raw_logps=sampled.behaviour_raw_logps[i, n][mask])
        for n, mask in enumerate(sampled.mask[i])]

  def _of_record(self, number, row) -> list[Candidate]:
    """The completions of the record that join the samples."""
    options, record = self._options, self._data.candidate_set(row)
    count = 0
    if options["preferred"] == "score":
      count = min(options["num_candidates"] - num_drawn(options),
                  len(record.completions))
    chosen = np.sort(self._rng(number, row).permutation(
        len(record.completions))[:count])
    if options["preferred"] == "data":
      chosen = packing.order_candidates(
          record, preferred=self._config["data"]["preferred"])[0][:1]
    return [
        Candidate(
            tokens=record.completions[k], mask=record.completion_masks[k],
            text=self._decode(record.completions[k].tolist(),
                              skip_special_tokens=True),
            candidate_id=int(record.candidate_ids[k]), score=float("nan"),
            source="data")
        for k in chosen]

  def _rng(self, number, row) -> np.random.Generator:
    """Of the host's choices for one prompt in one round."""
    name = self._data.candidate_set(row).example_id
    return np.random.default_rng([self._stage.seed, number, *map(int, name)])

  def _scored(self, prompts, told, others):
    """Samples and record completions with scores of one call of this run's
    reward: a record's own scores may be of another kind."""
    both = [own + more for own, more in zip(told, others)]
    both = [[c._replace(score=float(s)) for c, s in zip(group, scores)]
            for group, scores in zip(
                both, self._scores(self._reward, prompts, both))]
    return ([group[:len(own)] for group, own in zip(both, told)],
            [group[len(own):] for group, own in zip(both, told)])

  def _scores(self, reward, prompts, groups) -> list[np.ndarray]:
    """The scores of each prompt's candidates."""
    index = [i for i, group in enumerate(groups) for _ in group]
    flat = [c for group in groups for c in group]
    scores = functions.score(
        reward, [prompts.prompts[i] for i in index], [c.text for c in flat],
        **{name: [column[i] for i in index]
           for name, column in prompts.columns.items()},
        finish_reasons=[c.finish_reason or "stop" for c in flat],
        lengths=[len(c.tokens) for c in flat])
    faults.point("reward.reply")
    ends = np.cumsum([len(group) for group in groups])
    return np.split(scores, ends[:-1])

  def _pool_set(self, number, row, prompt, own, others, step):
    options, preferred = self._options, -1
    if options["rejection_beta"] is not None:
      own = [own[i] for i in candidates.reject(
          np.array([c.score for c in own]), min(num_drawn(options), len(own)),
          beta=options["rejection_beta"], rng=self._rng(number, row))]
    both = own + others
    if options["preferred"] == "data":
      both, preferred = [
          c._replace(score=float("nan")) for c in others + own], 0
    return candidates.pool_set(
        self._data.candidate_set(row), both, row=row, prompt=prompt,
        policy_step=step, preferred=preferred)

  def _with_anchors(self, sets, drawn, weights):
    """The sets with all anchors that the run reads, and the largest gap
    between the log-probs of sampler and trainer."""
    stage, gap = self._stage, {}
    names = {}
    if self._source is not None:
      names["ref"] = self._reference(weights), self._reference_model
    if "prev" in stage.entry.anchors:
      names["prev"] = weights.policy, self._model
    for name, (params, model) in names.items():
      logps = self._logps(model, params, [s.candidates for s in sets])[1]
      sets = [one._replace(anchors=one.anchors | {name: own})
              for one, own in zip(sets, logps)]
    if stage.corrected:
      sets = [one._replace(anchors=one.anchors | {
          "proposal_mu": one.anchors["ref"],
          "proposal_q": one.candidates.behaviour_logps}) for one in sets]
    some = sets[:_GAP_SETS]
    tokens = self._logps(
        self._model, weights.policy, [s.candidates for s in some])[0]
    raw = {(i, c.candidate_id): c.raw_logps
           for i, own in enumerate(drawn[:len(some)]) for c in own}
    gaps = [np.abs(raw[i, int(k)] - logps)
            for i, (one, own) in enumerate(zip(some, tokens))
            for k, source, logps in zip(
                one.candidates.candidate_ids, one.sources, own)
            if source == "policy"]
    if gaps:
      gaps = np.concatenate(gaps)
      gap = {"generate/logp_gap": float(gaps.max()),
             "generate/logp_gap_mean": float(gaps.mean())}
    return sets, gap

  def _logps(self, model, params, sets):
    """Per set its candidates' log-probs: per token, and summed [K]."""
    if model.config not in self._score:
      self._score[model.config] = jax.jit(
          model.token_logps, out_shardings=sharding.replicated(model.mesh))
    score = self._score[model.config]
    tokens, sums, starts = reference.score_sets(
        sets, lambda chunk: np.asarray(score(params, model.put(chunk))),
        model.pack)
    if not np.isfinite(sums).all():
      raise errors.NonFiniteError(
          "model.non_finite", "a log-prob of a candidate is not finite",
          where="online round")
    per_token = []
    for one, (_, begin) in zip(sets, starts):
      ends = begin + np.cumsum([0, *(len(c) for c in one.completions)])
      per_token.append([tokens[a:b] for a, b in zip(ends, ends[1:])])
    return per_token, [sums[a:b] for a, b in zip(
        starts[:-1, 0], starts[1:, 0])]


def prompts_of_round(
    number: int, num_prompts: int, num_examples: int, *, seed: int
) -> np.ndarray:
  """[num_prompts] different examples. Rounds walk through a permutation of all
  and then through another one; what is left of one is less than a round."""
  epoch, place = divmod(number, num_examples // num_prompts)
  picked, _ = batches.example_indices(
      place, batch_size=num_prompts, num_examples=num_examples,
      seed=seed + epoch)
  return picked


def round_seed(seed: int, number: int) -> int:
  """Of the noise of a round's samples: the same prompt is drawn anew."""
  return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def make_references(
    run: setup.Run, model: stage_lib.Model, start, stores
) -> dict[str, stage_lib.Reference]:
  """For "train" the weights that some objectives read whole; candidates bring
  their anchors along. For "eval", whose sets are fixed, what the policy is
  compared with at the end: the start, or the weights of reference.path."""
  compared = dict.fromkeys(("train", "eval"), stage_lib.NO_REFERENCE)
  if run.config["reference"]["source"] is None:
    return compared
  entry = objective_names.find_objective(run.config["objective"]["name"])
  if registry.REFERENCE_TERMS & set(entry.terms):
    params, other = references.reference_params(run, model, start)
    resident = references.host_sequence_logps(other, params)
    return {"train": stage_lib.Reference(None, params, other.config),
            "eval": stage_lib.Reference(resident, params, other.config)}
  if "eval" in stores:
    cache = references.open_reference(run, model, start, stores["eval"][0])
    compared["eval"] = stage_lib.Reference(cache.anchor)
  return compared
