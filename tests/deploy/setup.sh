#!/bin/sh
# Installs what the tests of deploy/ need (as root, on Debian), and makes the Debian in target/debian that they boot.
# Can be run again. Where something is missing, the tests print "not run".
set -eu

here=$(cd "$(dirname "$0")" && pwd)
target=$(cd "$here/../.." && pwd)/target
root=$target/debian

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "setup: not root on Debian, nothing installed"
    exit 1
fi
missing=
for pair in nft:nftables ip:iproute2 curl:curl mmdebstrap:mmdebstrap systemd-nspawn:systemd-container systemd-analyze:systemd; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair##*:}"
done
if [ -n "$missing" ] || [ ! -x "$target/promtool" ]; then
    apt-get update -qq
fi
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086 # a list
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
    echo "setup: installed$missing"
fi
if [ -x "$target/promtool" ]; then
    echo "setup: target/promtool exists"
else
    # The program alone: the package would start a server.
    mkdir -p "$target"
    packages=$(mktemp -d)
    chmod 755 "$packages"
    (cd "$packages" && apt-get download -qq prometheus 2>/dev/null && dpkg-deb --extract prometheus_*.deb .)
    mv "$packages/usr/bin/promtool" "$target/promtool"
    rm -rf "$packages"
    echo "setup: got target/promtool"
fi
if ! command -v go >/dev/null 2>&1; then
    echo "setup: go not found; the test with the Go client prints \"not run\""
else
    (cd "$here/../go" && go build -o "$target/waiting-bot" .)
    echo "setup: built target/waiting-bot"
fi
if [ -d "$root" ]; then
    echo "setup: $root exists"
else
    mkdir -p "$target"
    packages=systemd,systemd-sysv,dbus,nftables,iproute2,procps,curl,logrotate
    mmdebstrap --quiet --variant=minbase --include="$packages" bookworm "$root.new" http://deb.debian.org/debian
    : >"$root.new/etc/machine-id"
    mv "$root.new" "$root"
    echo "setup: made $root"
fi
# Not every container may start another one.
if ! SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn --register=no --keep-unit --quiet --private-network --console=pipe --directory "$root" true </dev/null 2>/dev/null; then
    echo "setup: systemd-nspawn does not work on this machine"
    exit 1
fi
