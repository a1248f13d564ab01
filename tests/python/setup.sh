#!/bin/sh
# Makes the virtual environment .venv in the repository root for the tests that run clients written by others.
# Safe to run again: it only installs what is missing or has another version.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
venv=$(cd "$here/../.." && pwd)/.venv

if ! command -v python3 >/dev/null 2>&1; then
    echo "setup: no python3 here, nothing done; tests with exchange clients will say that they did not run"
    exit 0
fi

if [ -x "$venv/bin/python" ]; then
    echo "setup: $venv is there already"
else
    python3 -m venv "$venv"
    echo "setup: made $venv"
fi

"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$here/requirements.txt"
echo "setup: installed $(grep -v '^#' "$here/requirements.txt" | tr '\n' ' ')"
