#!/usr/bin/env bash
# Runs the given tests. Without arguments it checks style and types and runs all tests in parts, several at the same time
# if the host allows: one on the host itself, the others in separate namespaces. `test.sh --parts` lists the parts.
# `test.sh --unit-and-integration` does so without the checks, and only with tests/unit and tests/integration.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly PYTEST=(.venv/bin/python -m pytest)
# Each line is a part: one run of pytest. Long parts come first, so that all end at about the same time.
# Images, faults, attacks and fuzzing only run in separate namespaces.
readonly IMAGES=tests/integration/images
if [[ ${1:-} == --unit-and-integration ]]; then
    readonly CHECKS=() ALL=(tests/unit tests/integration) APART=("$IMAGES")
    shift
else
    readonly CHECKS=(scripts/lint.sh) ALL=() APART=(
        "tests/faults"
        "tests/security"
        "$IMAGES tests/fuzz"
    )
fi
# These run on the host itself. When no other part is left, the last ones also run in namespaces.
readonly HERE=(
    "tests/integration/agent/test_[a-d]*.py"
    "tests/integration/agent/test_[e-g]*.py"
    "tests/integration/agent/test_[h-o]*.py"
    "tests/integration/agent/test_[p-r]*.py tests/integration/agent/test_[s-z]*.py"
    "tests/unit"
    "tests/integration/c* tests/integration/metrics tests/integration/packages"
    "tests/integration/n* tests/integration/prometheus tests/integration/replay tests/integration/s*"
)
readonly AT_ONCE=$(($(nproc) < 3 ? $(nproc) + 1 : 4))

if [[ ${1:-} == --parts ]]; then
    printf '%s\n' "${APART[@]}" "${HERE[@]}"
    exit
fi
(($# == 0)) || exec "${PYTEST[@]}" "$@"
if ! scripts/own_namespaces.sh --check; then
    for check in "${CHECKS[@]}"; do "$check"; done
    exec "${PYTEST[@]}" "${ALL[@]}"
fi

# Runs the command in $2… and prints its output when it has ended. $1 is its name in messages.
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

# Runs each part in $2… that no other worker has taken. $1 says where: here or apart.
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

# Parts run at the same time and share the processors.
export PODKEEL_TEST_PATIENCE=${PODKEEL_TEST_PATIENCE:-$AT_ONCE}
folder=$(mktemp -d)
workers=()
trap 'kill "${workers[@]}" 2>/dev/null || true; rm -rf "$folder"' EXIT
for check in "${CHECKS[@]}"; do
    run "style and types" "$check" &
    workers+=($!)
done
last_first=()
for part in "${HERE[@]}"; do
    last_first=("$part" "${last_first[@]}")
done
for ((number = 1; number < AT_ONCE; number++)); do
    work apart "${APART[@]}" "${last_first[@]}" &
    workers+=($!)
done
echo "test: ${CHECKS[*]:+style, types and }$AT_ONCE parts of the tests at once; each prints its output when it has ended"
work here "${HERE[@]}"
wait "${workers[@]}"
workers=()
[[ ! -e $folder/failed ]] || { printf 'test: failed: %s\n' "$(<"$folder/failed")" && false; }
