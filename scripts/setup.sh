#!/usr/bin/env bash
# Installs what a fresh machine lacks: distribution packages (with root or sudo), a virtual environment, torch, PyPI packages.
# Environment: PYTHON (interpreter), TORCH (version when the interpreter has none), VENV (folder).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} TORCH=${TORCH:-2.13.0} VENV=${VENV:-$PWD/.venv}

"$PYTHON" - <<'PY' || { echo "mcore-bridge needs Python >= 3.10; set PYTHON=/path/to/python3" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 10))
PY

need=()
command -v g++ > /dev/null || need+=(g++)
[ -f /usr/include/nlohmann/json.hpp ] || need+=(nlohmann-json3-dev)
[ -f /usr/include/gtest/gtest.h ] || need+=(libgtest-dev)
command -v ld.lld > /dev/null || need+=(lld)
[ "${1:-}" != clang ] || compgen -c clang++ > /dev/null || need+=(clang)
if [ ${#need[@]} -gt 0 ]; then
  sudo=""
  [ "$(id -u)" = 0 ] || sudo=sudo
  if command -v apt-get > /dev/null && { [ -z "$sudo" ] || command -v sudo > /dev/null; }; then
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq "${need[@]}" > /dev/null
  else
    echo "please install with your package manager: ${need[*]} (C++ compiler, nlohmann_json, GoogleTest, lld)" >&2
    exit 1
  fi
fi

# A torch that is already there (often a CUDA build) is used as it is: the new environment also looks where it lies. (A venv made
# from another one with --system-site-packages would look past it.)
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
if there=$("$PYTHON" - 2> /dev/null <<'PY'
import pathlib
import torch

assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
print(pathlib.Path(torch.__file__).parents[1])
PY
); then
  echo "$there" > "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/torch_of_the_active_environment.pth"
fi
pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
"$VENV/bin/python" -c 'import torch' 2> /dev/null || "${pip[@]}" "torch==$TORCH"
"${pip[@]}" -r requirements.txt
