#!/usr/bin/env bash
# Runs tests/unit and tests/integration, or the given tests, in Debian 13 on this machine's kernel. mmdebstrap
# makes a root file system, which pivot_root enters in a new mount namespace. It is kept in ~/.cache.
# `test_debian13.sh --prepare` only makes the root file system with the project in it, and prints the project's path.
# With --prepare, --committed takes the project as its last commit is.
set -euo pipefail

readonly SUITE=trixie
readonly CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/podkeel-debian13
readonly ROOT=$CACHE/root
readonly PROJECT=/podkeel

say() { printf 'test-debian13: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 2
}

make_root() {
    [[ ! -e $ROOT/etc/debian_version ]] || return 0
    if ! command -v mmdebstrap >/dev/null; then
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mmdebstrap >/dev/null ||
            fail "Debian's package mmdebstrap is missing and could not be installed"
    fi
    say "making a Debian $SUITE root file system in $ROOT"
    rm -rf --one-file-system "$ROOT.new"
    mkdir -p "$CACHE"
    mmdebstrap --quiet --variant=minbase --include=make,git,python3,procps,ca-certificates,criu,libcriu2 "$SUITE" "$ROOT.new" ||
        fail "mmdebstrap could not make the root file system: see the lines above"
    mv "$ROOT.new" "$ROOT"
}

# A root file system of an older version of this script has no CRIU.
add_criu() {
    [[ ! -x $ROOT/usr/sbin/criu || ! -e $ROOT/usr/share/doc/libcriu2 ]] || return 0
    cp --dereference /etc/resolv.conf /etc/hosts "$ROOT/etc/"
    say "installing CRIU in $ROOT"
    chroot "$ROOT" sh -c 'apt-get update -qq && apt-get -o Dpkg::Use-Pty=0 install -y -qq --no-install-recommends criu libcriu2' >/dev/null ||
        fail "Debian's packages criu and libcriu2 could not be installed: see the lines above"
}

# Copies the project's files as they are on disk. Debian 13's own .venv stays.
copy_project() {
    mkdir -p "$ROOT$PROJECT"
    find "$ROOT$PROJECT" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
    if [[ ${1:-} == --committed ]]; then
        git archive HEAD
    else
        git ls-files -z --cached --others --exclude-standard |
            tar --create --null --files-from=- --ignore-failed-read --file=-
    fi | tar --extract --directory="$ROOT$PROJECT" --file=-
    # Copy this machine's names and certificates, because it may need a proxy for Debian and the package index.
    cp --dereference /etc/resolv.conf /etc/hosts "$ROOT/etc/"
    cp /etc/ssl/certs/ca-certificates.crt "$ROOT/etc/ssl/certs/"
}

enter_root() {
    mount --bind "$ROOT" "$ROOT"
    mount --rbind /dev "$ROOT/dev"
    mount --rbind /proc "$ROOT/proc"
    mount --rbind /sys "$ROOT/sys"
    mount -t tmpfs -o mode=755 tmpfs "$ROOT/run"
    rm -rf "$ROOT"/tmp/*
    mkdir -p "$ROOT/old"
    cd "$ROOT"
    pivot_root . old
    umount --lazy /old
}

((EUID == 0)) || fail "needs root"
if [[ ${1:-} == --inside ]]; then
    shift
    enter_root
    cd "$PROJECT"
    export HOME=/root
    make --no-print-directory setup >&2
    case ${1:-} in
        --prepare) exec .venv/bin/python -m compileall -q -x '/\.venv/' . ;;
        '') exec scripts/test.sh --unit-and-integration ;;
        *) exec .venv/bin/python -m pytest "$@" ;;
    esac
fi
cd "$(dirname "$0")/.."
mkdir -p "$CACHE"
exec 8>"$CACHE/lock"
if ! flock --nonblock 8; then
    say "waiting for another run in $ROOT to end"
    flock 8
fi
make_root
add_criu
if [[ ${1:-} == --prepare ]]; then
    copy_project "${2:-}"
    unshare --mount --propagation private "$0" --inside --prepare >&2
    echo "$ROOT$PROJECT"
else
    copy_project
    exec unshare --mount --propagation private "$0" --inside "$@"
fi
