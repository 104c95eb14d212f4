#!/usr/bin/env bash
# Installs dist/podkeel_*_amd64.deb in a Debian 12 and a Debian 13 without network, runs a pod, upgrades, removes and
# purges it, first without systemd and then under it: test_deb.sh [bookworm|trixie]… Each root is made by mmdebstrap, kept in ~/.cache, and unpacked for each run.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/podkeel-deb
# What the package depends on, and what the tests use.
readonly PACKAGES=python3,crun,runc,conmon,catatonit,nftables,libseccomp2,libstdc++6,ca-certificates,kmod,iproute2,busybox-static,systemd,systemd-sysv,procps,init-system-helpers

say() { printf 'test-deb: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 2
}

make_root() {
    local suite=$1
    [[ ! -e $CACHE/$suite.tar ]] || return 0
    if ! command -v mmdebstrap >/dev/null; then
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mmdebstrap >/dev/null ||
            fail "Debian's package mmdebstrap is missing and could not be installed"
    fi
    say "making a root file system of Debian $suite in $CACHE"
    mkdir -p "$CACHE"
    mmdebstrap --quiet --format=tar --variant=minbase --include="$PACKAGES" "$suite" "$CACHE/$suite.tar.new" ||
        fail "mmdebstrap could not make it; the lines above say why"
    mv "$CACHE/$suite.tar.new" "$CACHE/$suite.tar"
}

# The same package as an earlier version: its number alone is lower, in what dpkg and what the agent says.
make_earlier() {
    local package=$1 target=$2 folder
    folder=$(mktemp -d)
    dpkg-deb --raw-extract "$package" "$folder"
    sed -i 's/^Version: .*/Version: 0.0.0~earlier/' "$folder/DEBIAN/control"
    sed -i 's/^Version: .*/Version: 0.0.0a1/' "$folder"/usr/lib/podkeel/*/podkeel-*.dist-info/METADATA
    (cd "$folder" && find usr -type f -exec md5sum {} +) >"$folder/DEBIAN/md5sums"
    dpkg-deb --root-owner-group -Zzstd -z1 --build "$folder" "$target" >/dev/null
    rm -rf "$folder"
}

((EUID == 0)) || fail "needs root"
suites=("$@")
((${#suites[@]})) || suites=(bookworm trixie)
mapfile -t packages < <(ls -t dist/podkeel_*_amd64.deb 2>/dev/null)
((${#packages[@]})) || fail "there is no dist/podkeel_*_amd64.deb: make deb"
work=$(mktemp -d -p /var/tmp test-deb-XXXXXX)
trap 'rm -rf --one-file-system "$work"' EXIT
cp "${packages[0]}" "$work/later.deb"
make_earlier "$work/later.deb" "$work/earlier.deb"
scripts/build_busybox_image.py "$work/busybox.tar" --reference localhost/busybox:latest 2>/dev/null ||
    .venv/bin/python scripts/build_busybox_image.py "$work/busybox.tar" --reference localhost/busybox:latest
for suite in "${suites[@]}"; do
    make_root "$suite"
    say "Debian $suite"
    mkdir "$work/$suite"
    tar -C "$work/$suite" --numeric-owner -xf "$CACHE/$suite.tar"
    echo force-unsafe-io >"$work/$suite/etc/dpkg/dpkg.cfg.d/test"  # without fsync of each file
    cp "$work"/*.deb "$work/busybox.tar" scripts/deb/*.sh scripts/deb/pod.yaml "$work/$suite/srv/"
    scripts/own_namespaces.sh scripts/deb/enter.sh "$work/$suite" /srv/test_inside.sh
    scripts/own_namespaces.sh scripts/deb/enter.sh "$work/$suite" /srv/boot_systemd.sh
    rm -rf --one-file-system "${work:?}/$suite"
done
say "all passed: ${suites[*]}"
