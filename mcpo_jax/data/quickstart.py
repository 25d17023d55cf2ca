"""The embedded task: facts about a hotel in, one or two sentences out.

A prompt is a meaning representation such as

  type[inn], name[Red Maple], area[harbour], price[cheap], pets[no]

and a good completion tells every slot and no other: "Red Maple is a cheap inn
by the harbour. It does not allow pets." The rule of quickstart_patterns.json
(rewards/slot_coverage.py) scores any text. Here texts are written from what
they are meant to tell, so their scores are known by construction.

Three splits, the same on every machine:

  train  prompts with NUM_CANDIDATES scored completions of graded quality
  sft    references for the prompts of train, with slips as people make them
  eval   as train, for other prompts
"""

import json
import pathlib
import random
from collections.abc import Iterator

from mcpo_jax.data.readers import Record

PATTERNS_PATH = pathlib.Path(__file__).with_name("quickstart_patterns.json")
SPLITS = ("train", "sft", "eval")

NUM_TRAIN, NUM_EVAL = 800, 240
NUM_REFERENCES = 6  # per prompt of train
REFERENCE_SLIPS = ((), ("missing",), ("wrong",), ("missing", "missing"))
REFERENCE_WEIGHTS = (50, 30, 10, 10)

# What is wrong with each candidate. "other" is a sentence for another prompt.
NUM_CANDIDATES = 8
WITH_PERFECT = (
    (),
    (),
    ("missing",),
    ("wrong",),
    ("extra",),
    ("missing", "wrong"),
    ("wrong", "extra"),
    ("other",),
)
WITHOUT_PERFECT = (
    ("missing",),
    ("wrong",),
    ("missing", "missing"),
    ("missing", "wrong"),
    ("wrong", "extra"),
    ("missing", "wrong", "wrong"),
    ("missing", "wrong", "extra"),
    ("other",),
)
PERFECT_SHARE = 0.6  # of the prompts

SLOTS = (
    "type", "name", "area", "near", "price", "rating", "breakfast", "pets",
    "pool",
)  # in the order of a prompt

# How a value is told: as an adjective, after the noun, or as a verb phrase.
# Every phrase is found by the pattern of its value and by no other.
NOUNS = {
    "hotel": ("hotel",),
    "guest house": ("guest house", "guesthouse", "pension"),
    "hostel": ("hostel",),
    "inn": ("inn",),
    "apartment": ("apartment", "flat"),
    None: ("place", "place to stay", "property"),
}
ADJECTIVES = {
    ("price", "cheap"): ("cheap", "low-cost", "inexpensive"),
    ("price", "moderate"): ("mid-priced", "moderately priced", "mid-range"),
    ("price", "expensive"): ("expensive", "high-priced", "pricey"),
    ("rating", "low"): ("poorly rated", "poorly reviewed"),
    ("rating", "medium"): ("average-rated",),
    ("rating", "high"): ("highly rated", "top-rated", "well reviewed"),
}
AFTER_NOUN = {
    ("area", "old town"): ("in the old town", "in the historic quarter"),
    ("area", "harbour"): ("by the harbour", "on the waterfront"),
    ("area", "station"): ("beside the station", "in the railway quarter"),
    ("area", "hillside"): ("on the hillside", "up in the hills"),
    ("area", "university"): ("in the student quarter", "by the university"),
    ("near", None): ("near {}", "close to {}", "not far from {}", "next to {}"),
    ("breakfast", "yes"): ("with breakfast", "with a free breakfast"),
    ("breakfast", "no"): ("without breakfast",),
    ("pets", "yes"): ("where pets are welcome", "where animals are allowed"),
    ("pets", "no"): ("where pets are not allowed", "where pets are banned"),
    ("pool", "yes"): ("with a pool", "with its own pool"),
    ("pool", "no"): ("without a pool", "with no pool"),
}
VERBS = {
    ("area", "old town"): ("lies in the old town", "is in the historic centre"),
    ("area", "harbour"): ("lies by the harbour", "stands on the waterfront"),
    ("area", "station"): ("is beside the station", "is right by the railway"),
    ("area", "hillside"): ("lies on the hillside", "stands on a hill"),
    ("area", "university"): ("is by the university", "is close to the campus"),
    ("near", None): ("is near {}", "is a short walk from {}", "faces {}"),
    ("price", "cheap"): ("costs little", "has low prices"),
    ("price", "moderate"): ("has moderate prices", "has fair prices"),
    ("price", "expensive"): ("costs a lot", "has high prices"),
    ("rating", "low"): ("gets poor reviews", "has bad ratings"),
    ("rating", "medium"): ("gets mixed reviews", "has average ratings"),
    ("rating", "high"): ("gets great reviews", "has excellent ratings"),
    ("breakfast", "yes"): ("serves breakfast", "includes breakfast"),
    ("breakfast", "no"): ("does not serve breakfast", "offers no breakfast"),
    ("pets", "yes"): ("welcomes pets", "allows animals", "is pet friendly"),
    ("pets", "no"): ("does not allow pets", "takes no pets", "bans animals"),
    ("pool", "yes"): ("has a pool", "offers a swimming pool"),
    ("pool", "no"): ("has no pool", "does not have a pool"),
}
# {noun}: article, adjectives, noun; {place}: its words after it, or nothing.
OPENINGS = (
    "{name} is {noun}{place}.",
    "There is {noun} called {name}{place}.",
    "Looking for {noun}{place}? Try {name}.",
    "You can stay at {name}, {noun}{place}.",
    "For {noun}{place}, choose {name}.",
    "{noun}{place} is {name}.",
    "{name}{place} is {noun}.",
)
SUBJECTS = ("It", "The place", "This one")


def records(split: str) -> Iterator[Record]:
  """Yields the records of a split, always the same.

  Args:
    split: "train", "eval" or "sft".

  Yields:
    Records whose prompt is one user message. Of train and eval with
    NUM_CANDIDATES completions, scores in [0, 1] (higher is better) and, in
    `sources`, what is wrong with each ("perfect", "missing+wrong", ...). Of sft
    with one completion; several records share a prompt and its prompt_id.

  Raises:
    KeyError: no such split.
  """
  values = _values()
  meanings = _meanings(values)
  first, last = {
      "train": (0, NUM_TRAIN),
      "sft": (0, NUM_TRAIN),
      "eval": (NUM_TRAIN, NUM_TRAIN + NUM_EVAL),
  }[split]
  write = _references if split == "sft" else _candidates
  for index in range(first, last):
    rng = random.Random(f"quickstart {split} {index}")
    meaning = meanings[index]
    mr = ", ".join(f"{slot}[{value}]" for slot, value in meaning.items())
    for row in write(meaning, meanings, values, rng):
      yield Record(
          prompt=[{"role": "user", "content": mr}],
          prompt_id=f"hotel-{index:04d}",
          columns={},
          where=f"embedded:quickstart/{split}:{index + 1}",
          **row,
      )


def _values() -> dict[str, list[str]]:
  """slot -> its values, as the rule knows them."""
  rules = json.loads(PATTERNS_PATH.read_text(encoding="utf-8"))
  values = {slot: list(found) for slot, found in rules["patterns"].items()}
  values |= {"name": rules["names"], "near": rules["nears"]}
  return {slot: values[slot] for slot in SLOTS}


def _meanings(values) -> list[dict[str, str]]:
  """Distinct meaning representations: a name and 3 to 5 further slots."""
  rng = random.Random("quickstart meanings")
  found = {}
  while len(found) < NUM_TRAIN + NUM_EVAL:
    others = [slot for slot in SLOTS if slot != "name"]
    slots = set(rng.sample(others, rng.randint(3, 5)))
    meaning = {
        slot: rng.choice(values[slot])
        for slot in SLOTS
        if slot == "name" or slot in slots
    }
    found.setdefault(tuple(meaning.items()), meaning)
  return list(found.values())


def _candidates(meaning, meanings, values, rng):
  """One row: NUM_CANDIDATES different texts with their scores."""
  perfect = rng.random() < PERFECT_SHARE
  plans = list(WITH_PERFECT if perfect else WITHOUT_PERFECT)
  rng.shuffle(plans)
  told = {}  # text -> (score, source)
  for plan in plans:
    while True:
      if plan == ("other",):
        said = rng.choice([m for m in meanings if m != meaning])
      else:
        said = _slip(meaning, plan, values, rng)
      text = _text(said, rng)
      if text not in told:
        break
    told[text] = (_score(meaning, said), "+".join(plan) or "perfect")
  scores, sources = zip(*told.values())
  yield {
      "completions": list(told),
      "scores": list(scores),
      "preferred": None,
      "sources": list(sources),
  }


def _references(meaning, meanings, values, rng):
  """NUM_REFERENCES rows of one text each, as careless people write them."""
  del meanings
  for _ in range(NUM_REFERENCES):
    plan = rng.choices(REFERENCE_SLIPS, REFERENCE_WEIGHTS)[0]
    text = _text(_slip(meaning, plan, values, rng), rng)
    yield {
        "completions": [text],
        "scores": None,
        "preferred": 0,
        "sources": None,
    }


def _slip(meaning, plan, values, rng) -> dict[str, str]:
  """What a text tells that makes these mistakes, each in another slot.

  The name may be wrong but is never missing.
  """
  said = dict(meaning)
  asked = rng.sample(list(meaning), len(meaning))
  for mistake in plan:
    if mistake == "extra":
      slot = rng.choice([s for s in SLOTS if s not in meaning])
      said[slot] = rng.choice(values[slot])
      continue
    slot = next(s for s in asked if mistake == "wrong" or s != "name")
    asked.remove(slot)
    if mistake == "missing":
      del said[slot]
    else:
      said[slot] = rng.choice([v for v in values[slot] if v != meaning[slot]])
  return said


def _score(meaning, said) -> float:
  """right / (slots of the meaning + slots told without being asked for)."""
  right = sum(said.get(slot) == value for slot, value in meaning.items())
  extra = sum(slot not in meaning for slot in said)
  return right / (len(meaning) + extra)


def _text(said, rng) -> str:
  """Writes what is to be told, in one of many ways."""
  noun = rng.choice(NOUNS[said.get("type")])
  adjectives, places, verbs = [], [], []
  facts = [f for f in said.items() if f[0] not in ("type", "name")]
  rng.shuffle(facts)
  for fact in facts:
    slot, value = fact
    key = (slot, None) if slot == "near" else fact
    ways = [
        (table[key], told)
        for table, told, room in (
            (ADJECTIVES, adjectives, 2),
            (AFTER_NOUN, places, 2),
            (VERBS, verbs, len(SLOTS)),
        )
        if key in table and len(told) < room
    ]
    phrases, told = rng.choice(ways)
    told.append(rng.choice(phrases).format(f"the {value}"))
  places.sort(key=lambda place: place.startswith("where"))
  words = " ".join(adjectives + [noun])
  article = "an" if words[0] in "aeiou" else "a"
  opening = rng.choice(OPENINGS).format(
      name=said["name"],
      noun=f"{article} {words}",
      place="".join(f" {place}" for place in places),
  )
  sentences = [opening[0].upper() + opening[1:]]
  while verbs:
    taken, verbs = verbs[:2], verbs[2:]
    link = rng.choice((" and ", " and ", " but "))
    sentences.append(f"{rng.choice(SUBJECTS)} {link.join(taken)}.")
  return " ".join(sentences)
