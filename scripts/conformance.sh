#!/usr/bin/env bash
# Runs the suites of docs/conformance.md on this node: conformance.sh [--critest FILE] [--e2e FILE --kubeconfig FILE]
# [--socket URL] [--focus REGEX] [--skip REGEX] [--output DIR]. It fetches nothing. Exits 1 if a spec failed, 2 if it
# cannot run.
set -euo pipefail

critest='' e2e='' kubeconfig=${KUBECONFIG:-} focus='' skip='' output=conformance-results
socket=unix:///run/podkeel/podkeel.sock

usage() { sed -n '2,4s/^# //p' "$0" >&2; }
say() { printf 'conformance: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 2
}

while (($#)); do
    case $1 in
        --help) usage; exit 0 ;;
        --critest | --e2e | --kubeconfig | --socket | --focus | --skip | --output)
            (($# > 1)) || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift 2
            ;;
        *) usage; fail "$1 is no option of this script" ;;
    esac
done

# Numbers of a JUnit report: specs that ran and passed, failed, were skipped.
summary() {
    python3 - "$1" "$2" <<'PYTHON'
import sys
import xml.etree.ElementTree as ElementTree

name, report = sys.argv[1:]
try:
    cases = list(ElementTree.parse(report).iter("testcase"))
except (OSError, ElementTree.ParseError) as error:
    sys.exit(f"conformance: {name}: there is no report: {error}")
# Steps around the suite are in the report too, such as [SynchronizedBeforeSuite]: they count only if they fail.
failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
skipped = [case for case in cases if case.find("skipped") is not None]
specs = [case for case in cases if case.get("name", "").startswith("[It]")] or cases
passed = [case for case in specs if case not in failed and case not in skipped]
print(f"{name}: {len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped: {report}")
for case in failed:
    print(f"  failed: {case.get('name')}")
sys.exit(1 if failed or not passed else 0)
PYTHON
}

# run NAME COMMAND…: the suite's output goes to NAME.log, its report is NAME.xml.
status=0
run() {
    local name=$1
    shift
    rm -f "$output/$name.xml"
    say "$name: running; its output is in $output/$name.log"
    "$@" >"$output/$name.log" 2>&1 || true
    summary "$name" "$output/$name.xml" || status=1
}

e2e_suite() {
    local name=$1 wanted=$2
    run "$name" "$e2e" --kubeconfig="$kubeconfig" --provider=skeleton --num-nodes=1 \
        --ginkgo.junit-report="$output/$name.xml" --ginkgo.focus="${focus:-$wanted}" \
        --ginkgo.skip="${skip:-\[Serial\]|\[Disruptive\]|\[Slow\]|\[Flaky\]}"
}

[[ -n $critest || -n $e2e ]] || { usage; fail "name --critest, --e2e or both"; }
for program in "$critest" "$e2e"; do
    [[ -z $program || -x $program ]] || fail "$program is no program that can be run"
done
[[ -z $e2e || -r $kubeconfig ]] || fail "--e2e needs --kubeconfig FILE, the administrator of the cluster"
mkdir -p "$output"
output=$(cd "$output" && pwd)

if [[ -n $critest ]]; then
    [[ -S ${socket#unix://} ]] || fail "no agent listens on $socket: start it, or name another with --socket"
    options=(--runtime-endpoint="$socket" --image-endpoint="$socket" --ginkgo.junit-report="$output/critest.xml")
    [[ -z $focus ]] || options+=(--ginkgo.focus="$focus")
    [[ -z $skip ]] || options+=(--ginkgo.skip="$skip")
    run critest "$critest" "${options[@]}"
fi
if [[ -n $e2e ]]; then
    if [[ -n $focus ]]; then
        e2e_suite e2e "$focus"
    else
        e2e_suite e2e-node '\[sig-node\].*\[NodeConformance\]'
        e2e_suite e2e-storage '\[sig-storage\].*\[NodeConformance\]'
        e2e_suite e2e-apps '\[sig-apps\].*\[Conformance\]'
    fi
fi
exit "$status"
