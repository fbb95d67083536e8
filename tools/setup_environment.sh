#!/usr/bin/env bash
# Makes .venv with the pinned packages of requirements.lock and this checkout. Usage: tools/setup_environment.sh [CHECKOUT]
# Uses the first Python >= 3.12 of: $PYTHON, PATH, pyenv's versions, uv's own.
set -euo pipefail
cd "${1:-$(dirname "$0")/..}"
stamp=.venv/.installed
key=$(cat requirements.lock pyproject.toml | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then exit 0; fi

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }
python=
for candidate in "${PYTHON:-}" python3.12 python3.13 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
  if [ -n "$candidate" ] && is_new_enough "$candidate"; then
    python=$(command -v "$candidate")
    break
  fi
done

if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then
  uv=(uv)
elif [ -n "$python" ]; then
  # uv installs the CUDA build of torch in seconds where pip takes minutes: fetch it into an environment of its own.
  [ -x .venv/uv/bin/uv ] || { "$python" -m venv .venv/uv && .venv/uv/bin/pip install -q uv; }
  uv=(.venv/uv/bin/uv)
else
  echo "megapref needs Python 3.12 or newer, or uv (which brings one). Install either, or set PYTHON=/path/to/python3.12." >&2
  exit 1
fi

echo "Setting up .venv with ${python:-"a Python of uv's"} ..."
[ -x .venv/bin/python ] || "${uv[@]}" venv -q --allow-existing --python "${python:-3.12}" .venv
"${uv[@]}" pip install -q --python .venv/bin/python -r requirements.lock
"${uv[@]}" pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
# Where bytecode is not kept, as in many containers, every process would compile what it imports anew: 20 seconds at each start instead of 6.
PYTHONDONTWRITEBYTECODE='' .venv/bin/python -c 'import megapref.train, matplotlib.pyplot, torch.distributed.run, torch.utils.tensorboard'
echo "$key" >"$stamp"
