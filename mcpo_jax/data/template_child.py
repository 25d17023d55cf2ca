"""Renders chat templates in a process that may use little; `templates` asks.

A program of its own, which imports nothing of ours: one JSON object a line
comes in, one goes out. A template that takes too much time ends the process.
"""

import json
import resource
import signal
import sys

from transformers.utils import chat_template_utils


def _limit(memory: int) -> None:
  """No more than so much memory above what is used now, nothing on disk."""
  if sys.platform == "linux":  # macOS knows the limit and refuses to set it
    with open("/proc/self/statm") as file:
      memory += int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _answer(line: bytes, most: int) -> dict[str, str]:
  """The text of a request, or what went wrong."""
  try:
    asked = json.loads(line)
    texts, _ = chat_template_utils.render_jinja_template(
        [asked.pop("messages")], **asked)
    return {"limit": "output"} if len(texts[0]) > most + len(line) else {
        "text": texts[0]}
  except MemoryError:
    return {"limit": "memory"}
  except Exception as e:  # a template raises what it likes
    return {"error": type(e).__name__, "text": str(e)}


def main(seconds: float, memory: int, most: int) -> None:
  """Answers until nobody asks any more."""
  _limit(memory)
  while line := sys.stdin.buffer.readline():
    signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends us
    text = json.dumps(_answer(line, most))
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.buffer.write(text.encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
  main(*json.loads(sys.argv[1]))
