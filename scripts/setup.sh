#!/usr/bin/env bash
# Prepares a Debian machine for Podkeel: packages, .venv, generated stubs. `setup.sh run` installs what is needed to run
# Podkeel, `setup.sh` also what is needed to build, test and measure it.
# It is fast if everything exists already. If it cannot continue, it prints what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

readonly PURPOSE=${1:-test}
readonly VENV=.venv
readonly STAMPS=$VENV/stamps
PACKAGES=(
    python3-venv     # .venv
    crun runc        # OCI runtimes: each is a runtime handler
    conmon           # monitors each container
    catatonit        # init of pods that share their PID namespace
    nftables         # packet rules of the built-in network
    iproute2         # for people who inspect links
    busybox-static   # for the image of the sample pod and of tests
    ca-certificates  # registries over https
)
if [[ $PURPOSE == test ]]; then
    PACKAGES+=(
        docker-registry  # tests pull from it; its service is not needed
        prometheus       # tests check the rules and scrape an agent with it; its service is not needed
        containernetworking-plugins iptables  # tests connect pods with CNI plugins
        iperf3           # tests measure pods with bandwidth limits
        skopeo umoci containerd  # tests compare images with theirs; containerd's service is not needed
        buildah netavark # tests import images that it builds; on Debian 13 it needs netavark
        gnupg gpgv       # tests sign images with gpg; the agent checks such signatures with gpgv
        kmod             # tests load modules that the kernel was built with
        e2fsprogs        # tests set file attributes, and make file systems with project quotas
    )
    # Tests use kubectl for streams. If another kubectl is installed, Debian's package is not needed and would conflict.
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
        fail "this is not Debian: install the equivalents of these packages yourself: ${PACKAGES[*]}"
    fi
    local missing
    mapfile -t missing < <(missing_packages)
    ((${#missing[@]})) || return 0
    ((EUID == 0)) || fail "needs root to install: ${missing[*]}"
    say "installing ${missing[*]}"
    apt-get update -qq || fail "Debian's package servers cannot be reached; missing packages: ${missing[*]}"
    without_services env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
        fail "apt-get could not install ${missing[*]}: see the lines above"
}

# Runs a command while packages may not start their services: docker-registry would use port 5000.
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
    fail "no Python 3.11 or newer with the venv module was found: set PYTHON=/path/to/python3"
}

make_environment() {
    if [[ ! -x $VENV/bin/python ]] || ! is_usable_python "$VENV/bin/python"; then
        local python
        python=$(find_python)
        [[ ! -e $VENV || -O $VENV ]] || fail "$VENV belongs to $(stat -c %U "$VENV"), and $(id -un) cannot use its Python: run make as that user"
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

# Also generates the stubs, by a build hook in pyproject.toml.
install_podkeel() {
    say "installing Podkeel and its dependencies into $VENV"
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

# Python does not write bytecode if PYTHONDONTWRITEBYTECODE is set, as in many images of build services, or if the user
# may not write here. Then each start of the agent would compile all its modules, which doubles its time.
compile_modules() {
    "$VENV/bin/python" -m compileall -q host metrics network images runtime cri cli proto >/dev/null || true
}

# If containers are on cgroup v1, crun refuses a host whose cgroup2 mount still has a controller. If that is only
# hugetlb, which nothing uses through cgroup2 on such a host, this mounts it as v1 like the others.
free_unified_cgroup() {
    local unified
    unified=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
    [[ -n $unified && $unified != /sys/fs/cgroup && -d /sys/fs/cgroup/memory ]] || return 0
    [[ $(<"$unified/cgroup.controllers") == hugetlb ]] || return 0
    ((EUID == 0)) || return 0
    local target=/sys/fs/cgroup/hugetlb
    if mkdir -p "$target" && mount -t cgroup -o hugetlb hugetlb "$target" 2>/dev/null; then
        say "mounted the hugetlb controller at $target (cgroup v1): crun needs a cgroup2 mount without controllers"
    else
        say "could not mount the hugetlb controller at $target: crun cannot run here, runc can"
    fi
}

install_packages
make_environment
make_stubs
compile_modules
free_unified_cgroup
