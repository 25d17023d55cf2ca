#!/usr/bin/env bash
# Sets everything up and runs the tests.
#
# Usage: bash launch/test.sh [pytest arguments]
# Environment: MCPO_REQUIRE=torch,shared turns the skips of tests that need
# torch or the shared data folder into failures.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh test
exec "${MCPO_VENV:-.venv}/bin/python" -m pytest -n auto "$@"
