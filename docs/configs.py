"""Writes configs.md: every setting with its default, from configs/default.py.

    python docs/configs.py          writes docs/configs.md
"""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = ROOT / "configs" / "default.py"
TARGET = ROOT / "docs" / "configs.md"
HEAD = """# Every setting

Written by `python docs/configs.py` from `configs/default.py`. On the command
line `--config.group.field=value` sets one; `None` means "off" or "decided by
something else", and the text says which. A setting that has no effect in a run
is an error, so that nothing is set in vain.
"""


def _comment(lines: list[str], end: int) -> tuple[str, str]:
  """The heading and the text of the comment above line `end` (from 0)."""
  start = end
  while lines[start - 1].strip().startswith("#"):
    start -= 1
  words = [line.strip().removeprefix("#").strip() for line in lines[start:end]]
  heading = ""
  if words and words[0].startswith("---"):
    heading = words.pop(0).strip("- ")
  return heading, " ".join(words).replace("|", r"\|")


def _default(node: ast.expr) -> str:
  if isinstance(node, ast.Call):  # a placeholder of a type
    return f"None ({node.args[0].id})"
  return ast.unparse(node)


def _sections(body: list[ast.stmt], lines: list[str]) -> list[list[str]]:
  """Of the assignments of one function: [heading, text, *table rows] each."""
  sections = [["The run", ""]]
  for statement in body:
    if not isinstance(statement, ast.Assign):
      continue
    name = ast.unparse(statement.targets[-1]).removeprefix("config.")
    heading, text = _comment(lines, statement.lineno - 1)
    if heading:
      sections.append([heading, text])
    value = ast.unparse(statement.value)
    if "_optimizer()" in value:
      text = text or "Its own optimizer."
      sections[-1].append(
          f"| `{name}.…` | | {text} See [an optimizer](#an-optimizer). |")
    elif "ConfigDict()" not in value:
      sections[-1].append(
          f"| `{name}` | `{_default(statement.value)}` | {text} |")
  return sections


def render(source: str) -> str:
  """The page, of the text of configs/default.py."""
  lines = source.split("\n")
  functions = {f.name: f for f in ast.parse(source).body
               if isinstance(f, ast.FunctionDef)}
  sections = _sections(functions["get_config"].body, lines)
  optimizer = _sections(functions["_optimizer"].body, lines)[0]
  sections.append(["An optimizer", "", *optimizer[2:]])
  page = [HEAD]
  for heading, text, *rows in sections:
    page.append("\n".join([
        f"## {heading}", "", *([text, ""] if text else []),
        "| key | default | meaning |", "|---|---|---|", *rows, ""]))
  return "\n".join(page)


if __name__ == "__main__":
  TARGET.write_text(render(SOURCE.read_text()))
  print(f"wrote {TARGET}", file=sys.stderr)
