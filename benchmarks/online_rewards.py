"""OnMC-PO driven by an exact match and by a reward model: two real runs.

Arithmetic: a policy learns sums from sentences of which a quarter is wrong, and
is then aligned on its own samples by whether their last number is the answer.
Harmlessness: a reward model is trained on pairs of people's choices, a policy
on the chosen replies, and the policy is aligned on its own samples by the
reward model. Every step is a command line of the project; this file writes the
arithmetic data, runs the lines, and makes the table of what they left behind.

  python benchmarks/online_rewards.py --workdir=runs/online_rewards \
      --out=benchmarks/online_rewards.md
"""

import argparse
import json
import pathlib
import random
import resource
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
UPDATES = 60
ONLINE = ["--config.online.enabled=True", "--config.num_epochs=None",
          f"--config.num_steps={UPDATES}", "--config.log.every_steps=1",
          "--config.evaluation.every_steps=30",
          "--config.stages=sft,preference,evaluate"]


def write_sums(folder: pathlib.Path) -> None:
  """All sums of two numbers below 30, asked in words; K-wise and to imitate."""
  rng = random.Random(0)
  kwise, sft = [], []
  for a in range(30):
    for b in range(30):
      prompt, right = f"What is {a} plus {b}?", a + b
      say = f"{a} plus {b} is {{}}".format
      near = [right + d for d in (-10, -2, -1, 1, 2, 10) if right + d >= 0]
      name = f"{a}+{b}"
      kwise.append({
          "prompt_id": name, "prompt": prompt, "answer": str(right),
          "completions": [say(right), *map(say, rng.sample(near, 3))],
          "scores": [1.0, 0.0, 0.0, 0.0]})
      for _ in range(4):
        told = right if rng.random() < 0.75 else rng.choice(near)
        sft.append({"prompt_id": name, "prompt": prompt,
                    "completion": say(told)})
  folder.mkdir(parents=True, exist_ok=True)
  for name, rows in (("kwise", kwise), ("sft", sft)):
    (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows))


def train(config: str, workdir: pathlib.Path, *flags: str) -> dict:
  """Runs the verb train; what it left in summary.json."""
  line = [sys.executable, "-m", "mcpo_jax", "train", f"--config={config}",
          f"--workdir={workdir}", *flags]
  print("+", *line[1:], flush=True)
  subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
  return json.loads((workdir / "summary.json").read_text())


def arithmetic(workdir: pathlib.Path) -> dict:
  """The exact-match run."""
  write_sums(workdir / "sums")
  return train(
      "configs/quickstart.py", workdir / "arithmetic", *ONLINE,
      f"--config.data.path={workdir / 'sums' / 'kwise.jsonl'}",
      "--config.data.eval_path=None", "--config.data.eval_fraction=0.15",
      f"--config.sft.data_path={workdir / 'sums' / 'sft.jsonl'}",
      "--config.tokenizer.vocab_size=300",
      "--config.reward.name=exact_match", "--config.reward.patterns_path=None")


def harmless(workdir: pathlib.Path) -> tuple[dict, dict]:
  """The reward model, and the run that it drives."""
  config = "configs/reward_model_hh.py"
  model = train(config, workdir / "reward_model")
  return model, train(
      config, workdir / "harmless", *ONLINE,
      "--config.data.path=../shared/data/kwise/"
      "hh_harmless_pairs.train.jsonl.gz",
      "--config.reward.name=reward_model",
      f"--config.reward.path={workdir / 'reward_model/reward_model/model'}")


def row(name: str, workdir: pathlib.Path, summary: dict) -> str:
  """One line of the table."""
  lines = [json.loads(x) for x in (
      workdir / "metrics.jsonl").read_text().splitlines()]
  rounds = [x for x in lines if "candidates/score" in x]
  updates = [x for x in lines if x["stage"] == "preference" and "loss" in x]
  share = lambda key: sum(x[key] for x in rounds) / len(rounds)
  number = lambda key: f"{summary[key]:.3f}"
  cells = [
      name, str(len(updates)), f"{share('candidates/tied_share'):.3f}",
      f"{rounds[0]['candidates/score']:.3f}",
      f"{rounds[-1]['candidates/score']:.3f}",
      number("score/sft"), number("score/aligned"),
      f"{summary['score/difference']:+.3f} "
      f"[{summary['score/difference_ci95_low']:+.3f}, "
      f"{summary['score/difference_ci95_high']:+.3f}]",
      number("greedy/score/sft"), number("greedy/score/aligned"),
      number("objective/kl"), number("mean_length/sft"),
      number("mean_length/aligned"), number("distinct_2/sft"),
      number("distinct_2/aligned"), number("ref_perplexity/aligned")]
  return "| " + " | ".join(cells) + " |"


def main() -> None:
  """Runs everything and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  options = parser.parse_args()
  workdir = options.workdir.resolve()
  sums = arithmetic(workdir)
  model, policy = harmless(workdir)
  minutes = resource.getrusage(resource.RUSAGE_CHILDREN)
  head = ("reward", "updates", "tied sets", "round 1", "last round",
          "held out: start", "aligned", "difference", "greedy: start",
          "aligned", "KL", "tokens: start", "aligned", "distinct-2: start",
          "aligned", "perplexity under the start")
  commit = subprocess.run(
      ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
      capture_output=True).stdout.strip()
  options.out.write_text("\n".join([
      "# Rewards that drive OnMC-PO", "",
      "Command: `python benchmarks/online_rewards.py "
      "--workdir=runs/online_rewards --out=benchmarks/online_rewards.md`",
      "",
      f"Commit {commit}; {(minutes.ru_utime + minutes.ru_stime) / 60:.1f} CPU "
      "minutes in all. A reward model trained on pairs: held-out accuracy "
      f"{model['reward_model/accuracy']:.3f} "
      f"[{model['reward_model/accuracy_ci95_low']:.3f}, "
      f"{model['reward_model/accuracy_ci95_high']:.3f}] on "
      f"{model['reward_model/num_pairs']:.0f} pairs of prompts not trained on. "
      "In brackets 95 % intervals, over prompts.", "",
      "| " + " | ".join(head) + " |", "| --- " * len(head) + "|",
      row("exact match, sums below 60", workdir / "arithmetic", sums),
      row("reward model, harmlessness", workdir / "harmless", policy), ""]))
  print(options.out.read_text())


if __name__ == "__main__":
  main()
