#!/usr/bin/env bash
# Prepares a Debian machine for Podkeel: packages, .venv, generated stubs. `setup.sh run` installs what it takes to run
# Podkeel, `setup.sh` also what building, testing and measuring it takes.
# Does nothing, quickly, when all of it is there; says what is missing when it cannot go on.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

readonly PURPOSE=${1:-test}
readonly VENV=.venv
readonly STAMPS=$VENV/stamps
PACKAGES=(
    python3-venv     # .venv
    crun runc        # OCI runtimes: each is a runtime handler
    conmon           # stays beside each container
    catatonit        # init of pods that share their PID namespace
    nftables         # packet rules of the built-in network
    iproute2         # people look at links by it
    busybox-static   # the image of the sample pod and of tests
    ca-certificates  # registries over https
)
if [[ $PURPOSE == test ]]; then
    PACKAGES+=(
        docker-registry  # tests pull from it; no service of it is needed
        prometheus       # tests have it check the rules and scrape an agent; no service of it is needed
        containernetworking-plugins iptables  # tests connect pods by them
        iperf3           # tests measure limited pods with it
        skopeo umoci containerd  # tests hold images against what these make of them; containerd's service is not needed
        buildah netavark # tests take in what it builds; on Debian 13 it does not begin without netavark
        kmod             # tests load modules where the kernel has them apart
        e2fsprogs        # tests set attributes of files, and make file systems with project quotas
    )
    # Tests have kubectl use the streams; another one than Debian's is as good, and in its way.
    command -v kubectl >/dev/null || PACKAGES+=(kubernetes-client)
fi

say() { printf 'setup: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 1
}

missing_packages() {
    local package
    for package in "${PACKAGES[@]}"; do
        [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
            printf '%s\n' "$package"
    done
}

install_packages() {
    if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
        fail "this is not Debian: install what stands for these packages yourself: ${PACKAGES[*]}"
    fi
    local missing
    mapfile -t missing < <(missing_packages)
    ((${#missing[@]})) || return 0
    ((EUID == 0)) || fail "needs root to install: ${missing[*]}"
    say "installing ${missing[*]}"
    apt-get update -qq || fail "Debian's package servers cannot be reached, and these are missing: ${missing[*]}"
    without_services env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
        fail "apt-get could not install ${missing[*]}; the lines above say why"
}

# Runs a command while no package may start its service: docker-registry would take port 5000.
without_services() {
    local policy=/usr/sbin/policy-rc.d status=0
    if [[ -e $policy ]]; then
        "$@"
        return
    fi
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    "$@" || status=$?
    rm -f "$policy"
    return "$status"
}

is_usable_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        if is_usable_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with the venv module was found; name one with PYTHON=/path/to/python3"
}

make_environment() {
    if [[ ! -x $VENV/bin/python ]] || ! is_usable_python "$VENV/bin/python"; then
        local python
        python=$(find_python)
        [[ ! -e $VENV || -O $VENV ]] || fail "$VENV belongs to $(stat -c %U "$VENV"), whose Python cannot be used by $(id -un): run make as they do"
        say "making $VENV with $("$python" --version) ($python)"
        rm -rf "$VENV"
        "$python" -m venv "$VENV"
    fi
    mkdir -p "$STAMPS"
    local wanted stamp
    wanted=$({ cat pyproject.toml hatch_build.py; pwd; } | sha256sum)
    for stamp in installed $([[ $PURPOSE == test ]] || echo installed-to-run); do
        [[ $(cat "$STAMPS/$stamp" 2>/dev/null) != "$wanted" ]] || return 0
    done
    if [[ $PURPOSE == test ]]; then
        install_podkeel '.[dev]'
    else
        install_podkeel .
    fi
    printf '%s\n' "$wanted" >"$STAMPS/$stamp"
    rm -f "$STAMPS/stubs"
}

# Generates the stubs as well: pyproject.toml has a build hook for it.
install_podkeel() {
    say "installing Podkeel and what it needs into $VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$1" ||
        fail "pip could not install; is the Python package index reachable?"
}

make_stubs() {
    local sources=() source wanted complete=yes
    mapfile -t sources < <(find proto -name '*.proto' | sort)
    wanted=$(cat "${sources[@]}" | sha256sum)
    for source in "${sources[@]}"; do
        [[ -e ${source%.proto}_pb2.py && -e ${source%.proto}_pb2.pyi ]] || complete=no
    done
    [[ $complete == no || $(cat "$STAMPS/stubs" 2>/dev/null) != "$wanted" ]] || return 0
    if ! "$VENV/bin/python" -c 'import grpc_tools' 2>/dev/null; then
        install_podkeel .
    else
        say "generating stubs from ${sources[*]}"
        "$VENV/bin/python" -m grpc_tools.protoc -I. --python_out=. --pyi_out=. "${sources[@]}"
        # An enum of NRI has a value None, which no Python file can declare.
        sed -i '/^ *None: /d' proto/nri/v1alpha1/nri_pb2.pyi
    fi
    printf '%s\n' "$wanted" >"$STAMPS/stubs"
}

# Python writes bytecode itself, unless PYTHONDONTWRITEBYTECODE is set, as it is in many images of build services, or the
# user may not write here. Each start of the agent would compile all of its modules then, which takes twice as long.
compile_modules() {
    "$VENV/bin/python" -m compileall -q host metrics network images runtime cri cli proto >/dev/null || true
}

# crun refuses a host whose containers are on cgroup v1 while the cgroup2 mount still holds a controller. Where that
# is only hugetlb, which nothing uses through cgroup2 on such a host, it can be mounted as v1 like the others.
free_unified_cgroup() {
    local unified
    unified=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
    [[ -n $unified && $unified != /sys/fs/cgroup && -d /sys/fs/cgroup/memory ]] || return 0
    [[ $(<"$unified/cgroup.controllers") == hugetlb ]] || return 0
    ((EUID == 0)) || return 0
    local target=/sys/fs/cgroup/hugetlb
    if mkdir -p "$target" && mount -t cgroup -o hugetlb hugetlb "$target" 2>/dev/null; then
        say "mounted the hugetlb controller at $target (cgroup v1): crun needs the cgroup2 mount to hold none"
    else
        say "could not mount the hugetlb controller at $target: crun will not run here, runc will"
    fi
}

install_packages
make_environment
make_stubs
compile_modules
free_unified_cgroup
