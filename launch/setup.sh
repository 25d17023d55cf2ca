#!/usr/bin/env bash
# Makes .venv in the checkout and installs the requirements there, once.
# Called by the other scripts. About 1 GB and a minute or two the first time.
#
# Usage: bash launch/setup.sh [extras of pyproject.toml, such as cuda,wandb]
# Environment: PYTHON, the interpreter (3.11 or newer); MCPO_VENV, the folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
venv="${MCPO_VENV:-.venv}"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null; then
      python="$candidate"
      break
    fi
  done
fi
if [[ -z "$python" ]]; then
  echo "setup: no Python 3.11 or newer found; set PYTHON to one" >&2
  exit 1
fi

# Installs once: a copy of the list that was installed stays in the environment.
install() {
  local list="$1" copy="$venv/$2"
  shift 2
  if ! cmp -s "$list" "$copy"; then
    echo "setup: installing into $venv: $*" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    cp "$list" "$copy"
  fi
}

if [[ ! -x "$venv/bin/python" ]]; then
  "$python" -m venv "$venv"
fi
install requirements.txt installed.txt -r requirements.txt
if [[ -n "$extra" ]]; then
  install pyproject.toml "installed-$extra.toml" --editable ".[$extra]"
fi
