#!/bin/sh
# Creates the virtual environment .venv in the repository root, for the tests with third-party clients.
# Can be run again: it installs only packages that are missing or have another version.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
venv=$(cd "$here/../.." && pwd)/.venv

if ! command -v python3 >/dev/null 2>&1; then
    echo "setup: python3 not found, nothing installed; tests with Python clients will print \"not run\""
    exit 0
fi

if [ -x "$venv/bin/python" ]; then
    echo "setup: $venv exists"
else
    python3 -m venv "$venv"
    echo "setup: created $venv"
fi

"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$here/requirements.txt"
echo "setup: installed $(grep -v '^#' "$here/requirements.txt" | tr '\n' ' ')"
