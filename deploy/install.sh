#!/bin/sh
# Installs the broker on a plain server with systemd: user, program, configuration, units, firewall, routing, log rotation. Can be run
# again, for an upgrade too: it changes what differs, and says what.
#
#   install.sh [--dry-run] [--answers FILE]   without FILE it asks
#   install.sh --uninstall [--dry-run]        keeps /etc/credbroker and the state in /var/lib/credbroker
#
# FILE has a line `name=value` for each of the questions below. Lines that start with # are comments.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
etc=/etc/credbroker
share=/usr/local/share/credbroker
units=/etc/systemd/system
own=/var/lib/credbroker-install
services="credbroker-firewall.service credbroker.socket credbroker-addresses.path credbroker-addresses.timer credbroker.service"

dry_run=
uninstall=
answers=
changed=
# Set while something is half done.
started=
work=$(mktemp -d)
trap 'rm -rf "$work"; [ -z "$started" ] || echo "install.sh: not finished; correct the problem and run it again, or run it with --uninstall" >&2' EXIT

say() { echo "$*"; }
fail() {
    echo "install.sh: $*" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case $1 in
    --dry-run) dry_run=yes ;;
    --uninstall) uninstall=yes ;;
    --answers)
        [ $# -gt 1 ] || fail "expected a file after --answers"
        answers=$2
        shift
        ;;
    *) fail "expected --dry-run, --answers FILE or --uninstall, got $1" ;;
    esac
    shift
done

# ask NAME DEFAULT QUESTION: sets $NAME to the answer.
ask() {
    if [ -n "$answers" ]; then
        value=$(sed -n "s/^$1=//p" "$answers" | tail -n 1)
    else
        printf '%s [%s] ' "$3" "$2"
        read -r value || fail "no answer; use --answers FILE"
    fi
    value=${value:-$2}
    case $value in *[!A-Za-z0-9._:/,@%+-]*) fail "$1: expected letters, digits and . _ : / , @ % + -, got $value" ;; esac
    eval "$1=\$value"
}

questions() {
    if [ -n "$answers" ]; then
        [ -r "$answers" ] || fail "cannot read $answers"
        known='binary|config|rules|tls|secret_id|listen|bots|egress_address|egress_gateway|egress_shared'
        unknown=$(grep -Ev "^(($known)=.*|#.*|[[:space:]]*)\$" "$answers" | head -n 1 || true)
        [ -z "$unknown" ] || fail "$answers: expected a line NAME=VALUE with one of $known, got: $unknown"
    fi
    ask binary "$here/../bin/credbroker" "The program credbroker?"
    ask config "$here/config.toml" "The configuration (used if $etc/config.toml does not exist)?"
    ask rules "$here/rules.toml" "The rules (used if $etc/rules.toml does not exist)?"
    ask tls "" "A folder whose files go to $etc/tls (empty: none)?"
    ask secret_id "" "A file with the AppRole's secret id (empty: another kind of login)?"
    ask listen "" "Address and port for bots, listen.grpc of the configuration?"
    ask bots "" "The networks of the bots, such as 10.20.0.0/24 (several: with commas)?"
    ask egress_address "" "The egress address of this host (with a gateway that translates: its address towards the gateway)?"
    ask egress_gateway "" "The router for the egress address, if it is not the default one?"
    ask egress_shared auto "Does the egress address carry other traffic of this host, too (yes, no, auto)?"
}

is_ipv4() { expr "$1" : '[0-9]\{1,3\}\.[0-9]\{1,3\}\.[0-9]\{1,3\}\.[0-9]\{1,3\}$' >/dev/null; }

# Everything that can be wrong is checked before anything is changed.
check_answers() {
    for file in "$binary" "$config" "$rules"; do [ -f "$file" ] || fail "there is no file $file"; done
    [ -z "$tls" ] || [ -d "$tls" ] || fail "tls: there is no folder $tls"
    [ -z "$secret_id" ] || [ -f "$secret_id" ] || fail "secret_id: there is no file $secret_id"
    "$binary" --version >/dev/null 2>&1 || fail "binary: $binary does not run on this machine"
    port=${listen##*:}
    is_ipv4 "${listen%:*}" && expr "$port" : '[0-9][0-9]*$' >/dev/null || fail "listen: expected an IPv4 address and a port, such as 10.20.0.1:8443, got ${listen:-nothing}"
    [ -n "$bots" ] || fail "bots: expected at least one network, such as 10.20.0.0/24"
    for network in $(echo "$bots" | tr , ' '); do is_ipv4 "${network%/*}" || fail "bots: expected IPv4 networks, got $network"; done
    is_ipv4 "$egress_address" || fail "egress_address: expected an IPv4 address, got ${egress_address:-nothing}"
    [ -z "$egress_gateway" ] || is_ipv4 "$egress_gateway" || fail "egress_gateway: expected an IPv4 address, got $egress_gateway"
    [ -n "$(ip -4 -o address show to "$egress_address")" ] || fail "egress_address: this host has no address $egress_address"
    case $egress_shared in
    yes | no) ;;
    auto)
        egress_shared=no
        # The address of packets that choose none. The destination is never contacted.
        if ip -4 route get 192.0.2.1 2>/dev/null | grep -q "src $egress_address "; then egress_shared=yes; fi
        ;;
    *) fail "egress_shared: expected yes, no or auto, got $egress_shared" ;;
    esac
}

check_host() {
    [ "$(id -u)" -eq 0 ] || fail "must run as root"
    for command in ip nft systemctl systemd-sysusers sha256sum; do
        command -v "$command" >/dev/null || fail "there is no command $command; install it first (Debian: iproute2, nftables, systemd, coreutils)"
    done
    [ -d /run/systemd/system ] || fail "systemd does not run this machine"
}

# check_target FILE: refuses to replace what is not ours, or was changed since.
check_target() {
    [ -e "$1" ] || return 0
    [ -f "$own/files" ] || fail "$1 exists, but $own/files does not: the broker was installed in another way, or only half; remove it first"
    if ! grep -q " $1\$" "$own/files"; then fail "$1 exists and is not from install.sh; move it away"; fi
    if ! grep " $1\$" "$own/files" | sha256sum --check --status && [ ! -f "$own/unfinished" ]; then
        fail "$1 was changed after it was installed; put changes of units into $units/NAME.d/, or move it away"
    fi
}

# put SOURCE FILE MODE: installs a file that belongs to the installation.
put() {
    if [ -f "$2" ] && cmp -s "$1" "$2"; then
        say "same     $2"
    else
        [ -e "$2" ] && word=change || word=create
        say "$word   $2"
        changed="$changed $2"
        [ -n "$dry_run" ] || install -D -m "$3" -o root -g root "$1" "$2"
    fi
    echo "$(sha256sum <"$1" | cut -d ' ' -f 1)  $2" >>"$work/files"
}

# keep SOURCE FILE MODE: installs a file that belongs to the admins; an existing one stays.
keep() {
    if [ -e "$2" ]; then
        if cmp -s "$1" "$2"; then say "same     $2"; else say "keep     $2 (differs from $1)"; fi
    else
        say "create   $2"
        changed="$changed $2"
        [ -n "$dry_run" ] || install -D -m "$3" -o root -g credbroker "$1" "$2"
    fi
}

run() {
    if [ -n "$dry_run" ]; then say "run      $*"; else "$@"; fi
}

generate() {
    printf '[Socket]\nListenStream=%s\n' "$listen" >"$work/listen.conf"
    printf '[Service]\n# Readable as /run/credentials/credbroker.service/secret-id by this service alone; read at each start.\nLoadCredential=secret-id:%s\n' "$etc/vault/secret-id" >"$work/secret-id.conf"
    {
        echo "egress_address=$egress_address"
        echo "egress_gateway=$egress_gateway"
        echo "egress_table=203"
    } >"$work/firewall.conf"
    {
        echo "#!/usr/sbin/nft -f"
        echo "define EGRESS = $egress_address"
        echo "define BROKER = $(id -u credbroker 2>/dev/null || echo 0)"
        echo "define GRPC = $port"
        echo "define BOTS = { $bots }"
        echo "include \"$share/credbroker.nft\""
        [ "$egress_shared" = yes ] || echo "include \"$share/dedicated.nft\""
    } >"$work/firewall.nft"
}

install_all() {
    questions
    check_answers
    [ -n "$dry_run" ] || check_host
    targets="/usr/local/bin/credbroker /usr/local/sbin/credbroker-firewall $share/credbroker.nft $share/dedicated.nft /etc/sysusers.d/credbroker.conf /etc/logrotate.d/credbroker $etc/firewall.conf $etc/firewall.nft $units/credbroker.socket.d/listen.conf $units/credbroker.service.d/secret-id.conf $units/credbroker-addresses.service $units/nftables.service.d/credbroker.conf"
    for service in $services; do targets="$targets $units/$service"; done
    for target in $targets; do check_target "$target"; done
    was_active=
    if [ -z "$dry_run" ]; then
        generate
        sed "s|$share|$here/nftables|" "$work/firewall.nft" | nft --check --file - || fail "the firewall's rules are not valid with these answers: see the lines above"
        if systemctl is-active --quiet credbroker.service; then was_active=yes; fi
        mkdir -p -m 700 "$own"
        touch "$own/unfinished"
        started=yes
    fi

    put "$here/systemd/credbroker.sysusers" /etc/sysusers.d/credbroker.conf 644
    run systemd-sysusers /etc/sysusers.d/credbroker.conf
    generate
    put "$binary" /usr/local/bin/credbroker 755
    put "$here/nftables/credbroker-firewall" /usr/local/sbin/credbroker-firewall 755
    for file in credbroker.nft dedicated.nft; do put "$here/nftables/$file" "$share/$file" 644; done
    for service in $services credbroker-addresses.service; do put "$here/systemd/$service" "$units/$service" 644; done
    put "$work/listen.conf" "$units/credbroker.socket.d/listen.conf" 644
    [ -z "$secret_id" ] || put "$work/secret-id.conf" "$units/credbroker.service.d/secret-id.conf" 644
    put "$here/systemd/nftables-credbroker.conf" "$units/nftables.service.d/credbroker.conf" 644
    put "$here/systemd/credbroker.logrotate" /etc/logrotate.d/credbroker 644
    run install -d -m 750 -o root -g credbroker "$etc"
    put "$work/firewall.conf" "$etc/firewall.conf" 644
    put "$work/firewall.nft" "$etc/firewall.nft" 644
    keep "$config" "$etc/config.toml" 640
    keep "$rules" "$etc/rules.toml" 640
    if [ -n "$tls" ]; then
        run install -d -m 750 -o root -g credbroker "$etc/tls"
        for file in "$tls"/*; do keep "$file" "$etc/tls/${file##*/}" 640; done
    fi
    if [ -n "$secret_id" ]; then
        run install -d -m 700 "$etc/vault"
        keep "$secret_id" "$etc/vault/secret-id" 600
    fi
    # What an earlier version or other answers have installed.
    [ ! -f "$own/files" ] || cut -d ' ' -f 3 "$own/files" | while read -r file; do
        grep -q " $file\$" "$work/files" || { say "remove   $file"; run rm -f "$file"; }
    done
    [ -n "$dry_run" ] || cp "$work/files" "$own/files"

    run systemctl daemon-reload
    run setpriv --reuid credbroker --regid credbroker --clear-groups /usr/local/bin/credbroker check-config --config "$etc/config.toml"
    case $changed in *credbroker.socket*) run systemctl stop credbroker.service credbroker.socket ;; esac
    case $changed in *nft* | *firewall*) run systemctl reload-or-restart credbroker-firewall.service ;; esac
    run systemctl enable --quiet --now $services
    case $was_active$changed in yes*/credbroker.service* | yes*/bin/credbroker*) run systemctl restart credbroker.service ;; esac
    [ -n "$dry_run" ] || rm -f "$own/unfinished"
    started=

    if [ "$egress_shared" = yes ]; then
        say "note     $egress_address is also the address of this host's other traffic, so only known addresses of the exchange are closed to others:"
        say "         a process of this host that knows another address of the exchange's CDN could reach it from $egress_address. With an address of"
        say "         its own for the broker (egress_address, egress_gateway), nothing else can send from it."
    fi
    if [ -z "$changed" ]; then say "done: nothing changed"; else say "done"; fi
}

uninstall_all() {
    [ -f "$own/files" ] || fail "there is no $own/files: nothing is installed"
    [ -n "$dry_run" ] || check_host
    run systemctl disable --quiet --now credbroker.socket credbroker-addresses.path credbroker-addresses.timer credbroker.service
    run systemctl disable --quiet --now credbroker-firewall.service
    cut -d ' ' -f 3 "$own/files" | while read -r file; do
        say "remove   $file"
        run rm -f "$file"
    done
    run rmdir --ignore-fail-on-non-empty "$share" "$units/credbroker.socket.d" "$units/credbroker.service.d" "$units/nftables.service.d" 2>/dev/null || true
    run rm -rf "$own" /var/lib/credbroker-firewall
    run systemctl daemon-reload
    say "done; left are the user credbroker, $etc, and /var/lib/credbroker with the audit log and restrictions.json"
}

if [ -n "$uninstall" ]; then uninstall_all; else install_all; fi
