#!/usr/bin/env bash
# Lint, types and import contracts; seconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/setup.sh "${RLHF_RAY_KIND:-cpu}"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
