#!/usr/bin/env bash
# Sets up, then runs all tests; arguments go to pytest (for example: launch/test.sh tests/algorithms).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/setup.sh "${RLHF_RAY_KIND:-cpu}"
# Without stored bytecode every actor takes twice as long to start.
unset PYTHONDONTWRITEBYTECODE
exec .venv/bin/python -m pytest "$@"
