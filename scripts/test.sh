#!/usr/bin/env bash
# Runs the tests that are named. Without any it checks style and types and runs all tests, in parts, several at once
# where the host can: one on the host itself, the others in namespaces of their own. `test.sh --parts` lists the parts.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly PYTEST=(.venv/bin/python -m pytest)
# Each line is a part: one run of pytest. The long ones come first, so that all end at about the same time.
# Images, faults, attacks and fuzzing only run in namespaces of their own.
readonly APART=(
    "tests/faults"
    "tests/security"
    "tests/integration/images tests/fuzz"
)
# These run on the host itself, and the last ones in namespaces when nothing else is left.
readonly HERE=(
    "tests/integration/agent/test_[a-d]*.py"
    "tests/integration/agent/test_[e-g]*.py"
    "tests/integration/agent/test_[h-o]*.py"
    "tests/integration/agent/test_[p-r]*.py tests/integration/agent/test_[s-z]*.py"
    "tests/unit"
    "tests/integration/c* tests/integration/metrics"
    "tests/integration/n* tests/integration/prometheus tests/integration/replay tests/integration/s*"
)
readonly AT_ONCE=$(($(nproc) < 3 ? $(nproc) + 1 : 4))

if [[ ${1:-} == --parts ]]; then
    printf '%s\n' "${APART[@]}" "${HERE[@]}"
    exit
fi
(($# == 0)) || exec "${PYTEST[@]}" "$@"
if ! scripts/own_namespaces.sh --check; then
    scripts/lint.sh
    exec "${PYTEST[@]}"
fi

# Runs what is named $1 by the command that follows, and shows its output when it has ended.
run() {
    local name=$1 output status=0 started=$SECONDS child
    shift
    output=$(mktemp "$folder/XXXXXX")
    "$@" >"$output" 2>&1 &
    child=$!
    trap 'kill "$child"; exit 143' TERM
    wait "$child" || status=$?
    trap - TERM
    ((status == 0)) || echo "$name: status $status" >>"$folder/failed"
    {
        flock 9
        cat "$output"
        echo "test: $name ended with status $status after $((SECONDS - started)) s"
    } 9>"$folder/lock"
}

# Runs each of the parts that follow which no other worker has taken, by the command named $1.
work() {
    local runner=$1 part
    shift
    for part in "$@"; do
        mkdir "$folder/taken ${part//\//.}" 2>/dev/null || continue
        # shellcheck disable=SC2086  # a part is several patterns
        if [[ $runner == here ]]; then
            run "$part" "${PYTEST[@]}" $part
        else
            run "$part" scripts/own_namespaces.sh "${PYTEST[@]}" $part
        fi
    done
}

# Parts have to share the processors.
export PODKEEL_TEST_PATIENCE=${PODKEEL_TEST_PATIENCE:-$AT_ONCE}
folder=$(mktemp -d)
workers=()
trap 'kill "${workers[@]}" 2>/dev/null || true; rm -rf "$folder"' EXIT
run "style and types" scripts/lint.sh &
workers+=($!)
last_first=()
for part in "${HERE[@]}"; do
    last_first=("$part" "${last_first[@]}")
done
for ((number = 1; number < AT_ONCE; number++)); do
    work apart "${APART[@]}" "${last_first[@]}" &
    workers+=($!)
done
echo "test: style, types and $AT_ONCE parts of the tests at once; the output of each comes when it has ended"
work here "${HERE[@]}"
wait "${workers[@]}"
workers=()
[[ ! -e $folder/failed ]] || { printf 'test: failed: %s\n' "$(<"$folder/failed")" && false; }
