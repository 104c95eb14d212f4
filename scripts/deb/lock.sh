#!/usr/bin/env bash
# Writes the lock files of the Debian package: all dependencies with exact versions and the hashes of their files.
# `lock.sh --upgrade` takes the newest versions; without it, versions that are locked stay where they can.
set -euo pipefail
cd "$(dirname "$0")/../.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools"
"$tools/bin/pip" install --quiet uv
compile=("$tools/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate)

# What the package carries: Podkeel's dependencies, with traces.
"${compile[@]}" pyproject.toml --extra otel "$@" --output-file scripts/deb/requirements.txt
# What builds it: the build backend of pyproject.toml, and what makes environments and completions.
"${compile[@]}" scripts/deb/build-requirements.in "$@" --output-file scripts/deb/build-requirements.txt
