#!/usr/bin/env bash
# Sets up, then trains a small language model from nothing to PPO on this machine; arguments go to `rlhf-ray demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/setup.sh "${RLHF_RAY_KIND:-cpu}"
unset PYTHONDONTWRITEBYTECODE
exec .venv/bin/rlhf-ray demo "$@"
