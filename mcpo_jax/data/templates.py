"""Chat templates are programs of strangers: they run in a process apart.

The sandbox that transformers renders in stops a template from reaching for
what is not its own, but not from using up the machine. So a process of its own
(`template_child`) renders, in that sandbox, with little time, memory and
output for each text, and may write no file.
"""

import json
import pathlib
import subprocess
import sys
import threading
from typing import Any

from mcpo_jax import errors

SECONDS = 5.0  # of processor time for one text
MEMORY = 400 * 2**20  # bytes
OUTPUT = 2**20  # characters beyond those that came in

_CHILD = pathlib.Path(__file__).with_name("template_child.py")
_lock = threading.Lock()
_children: list[subprocess.Popen] = []  # none, or one


class TemplateError(Exception):
  """What a template has raised: the name of its kind, and what it says."""

  def __init__(self, kind: str, text: str):
    self.kind = kind
    super().__init__(f"{kind}: {text}")


def render(template: str, messages: list[dict[str, Any]],
           **variables: Any) -> str:
  """The text of messages.

  Args:
    template: a Jinja template.
    messages: dicts of JSON values; those that are None are left out, as
      transformers does.
    **variables: further JSON values that the template sees.

  Raises:
    TemplateError: the template failed, or refuses the messages.
    ModelDirError: hf.template, it uses too much.
  """
  asked = {"messages": [{k: v for k, v in m.items() if v is not None}
                        for m in messages], "chat_template": template}
  answer = _ask(json.dumps(asked | variables, default=str).encode() + b"\n")
  if "error" in answer:
    raise TemplateError(answer["error"], answer["text"])
  if "limit" in answer:
    raise errors.ModelDirError(
        "hf.template", f"the chat template uses too much {answer['limit']}",
        want=f"{SECONDS:g} s, {MEMORY} bytes of memory and {OUTPUT} characters "
        "of output", hint="set tokenizer.chat_template")
  return answer["text"]


def _ask(line: bytes) -> dict[str, str]:
  """The child's answer; a child is started where there is none."""
  with _lock:
    if not _children:
      _children.append(subprocess.Popen(
          [sys.executable, "-P", str(_CHILD),
           json.dumps([SECONDS, MEMORY, OUTPUT])],
          stdin=subprocess.PIPE, stdout=subprocess.PIPE,
          stderr=subprocess.DEVNULL,
          start_new_session=True))  # Ctrl-C is for us
    child = _children[0]
    try:
      child.stdin.write(line)
      child.stdin.flush()
      if answer := child.stdout.readline():
        return json.loads(answer)
    except BrokenPipeError:
      pass
    stop()
    return {"limit": "time"}


def stop() -> None:
  """Ends the child; the next text starts another."""
  while _children:
    child = _children.pop()
    child.kill()
    child.communicate()
