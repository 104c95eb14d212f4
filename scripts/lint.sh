#!/usr/bin/env bash
# Checks style and types of everything.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly PYTHON=.venv/bin/python
readonly SOURCES=(proto host metrics network images runtime cri cli tests scripts manifests hatch_build.py)

"$PYTHON" -m ruff check "${SOURCES[@]}"
"$PYTHON" -m ruff format --check "${SOURCES[@]}"
"$PYTHON" -m mypy
"$PYTHON" -m mypy scripts/*.py scripts/deb/*.py manifests/nri/*.py
