#!/usr/bin/env bash
# Runs the tests that are named. Without any it runs all, in two halves of about the same time at once, where the host
# can: images, faults and attacks in namespaces of their own, everything else on the host itself.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly PYTEST=(.venv/bin/python -m pytest)
readonly APART=(tests/integration/images tests/faults tests/security tests/fuzz)
readonly HERE=(tests/unit tests/integration --ignore=tests/integration/images)

(($# == 0)) || exec "${PYTEST[@]}" "$@"
scripts/own_namespaces.sh --check || exec "${PYTEST[@]}"

# Each half has one of two processors at times when other things want it too.
export PODKEEL_TEST_PATIENCE=${PODKEEL_TEST_PATIENCE:-2}
output=$(mktemp)
apart=
trap 'rm -f "$output"; [[ -z $apart ]] || kill "$apart" 2>/dev/null || true' EXIT
echo "test: ${APART[*]} run beside the others in namespaces of their own; their output comes last"
scripts/own_namespaces.sh "${PYTEST[@]}" "${APART[@]}" >"$output" 2>&1 &
apart=$!
here_status=0 apart_status=0
"${PYTEST[@]}" "${HERE[@]}" || here_status=$?
wait "$apart" || apart_status=$?
apart=
cat "$output"
echo "test: ${HERE[*]} ended with status $here_status, ${APART[*]} with status $apart_status"
((here_status == 0 && apart_status == 0))
