//! The faults.

use serde_json::json;

use super::faults::{
    clock_jump, dns, hang_up, held_up, hit, killed, known_while_audit_disk_hangs,
    known_while_audit_disk_is_full, known_while_clock_is_wrong, known_while_draining,
    known_while_egress_is_wrong, known_while_halted, lookup_lag, lookups_fail, older_order,
    refused, stopped, terminated, tls_expired, vault_fault, vault_gone, vault_sealed,
};
use super::{Group, Row, Setup};

const ROW: Row = Row {
    name: "",
    how: "",
    unknown: "",
    late: 0,
    mounts: false,
    run: |_, _| Box::pin(std::future::ready(0)),
};

pub(crate) static GROUPS: &[Group] = &[
    Group {
        setup: Setup::Plain,
        rows: &[
            Row {
                name: "reset-before",
                how: "the exchange closes the connection before it processes the order",
                run: |site, scale| {
                    hit(site, scale, json!({"close": {"when": "before_processing"}}))
                },
                ..ROW
            },
            Row {
                name: "reset-after",
                how: "the exchange processes the order and closes the connection",
                run: |site, scale| hit(site, scale, json!({"close": {"when": "after_processing"}})),
                ..ROW
            },
            Row {
                name: "mid-body",
                how: "the exchange closes the connection in the body of its answer",
                run: |site, scale| hit(site, scale, json!({"cut_short": {"bytes": 10}})),
                ..ROW
            },
            Row {
                name: "stall-before",
                how: "the exchange never answers, and does not process the order",
                run: |site, scale| {
                    hit(site, scale, json!({"stall": {"when": "before_processing"}}))
                },
                ..ROW
            },
            Row {
                name: "stall-after",
                how: "the exchange processes the order and never answers",
                run: |site, scale| hit(site, scale, json!({"stall": {"when": "after_processing"}})),
                ..ROW
            },
            Row {
                name: "http-502",
                how: "HTML with status 502, after the order was processed",
                run: |site, scale| {
                    hit(
                        site,
                        scale,
                        json!({"html": {"status": 502, "when": "after_processing"}}),
                    )
                },
                ..ROW
            },
            Row {
                name: "http-503",
                how: "JSON with status 503, before the order was processed",
                run: |site, scale| {
                    let body = json!({"code": "500000", "msg": "Internal Server Error"});
                    hit(
                        site,
                        scale,
                        json!({"answer": {"status": 503, "body": body, "when": "before_processing"}}),
                    )
                },
                ..ROW
            },
        ],
    },
    Group {
        setup: Setup::Plain,
        rows: &[Row {
            name: "429-json",
            how: "JSON with status 429",
            run: |site, scale| hit(site, scale, json!({"rate_limited": {"reset_ms": 200}})),
            ..ROW
        }],
    },
    // On its own, since the broker sends less for an hour afterwards.
    Group {
        setup: Setup::Plain,
        rows: &[Row {
            name: "429-html",
            how: "HTML with status 429, before the order was processed; the broker then sends nothing for a second",
            run: |site, scale| hit(site, scale, json!({"edge_block": {"retry_after_s": 1}})),
            ..ROW
        }],
    },
    Group {
        setup: Setup::Plain,
        rows: &[
            Row {
                name: "other-order",
                how: "the answer has the ids of another order",
                run: |site, scale| hit(site, scale, json!({"other_order": {}})),
                ..ROW
            },
            Row {
                name: "lookup-lag",
                how: "lookups do not find an order until it is 3 s old; its answer was lost",
                run: |site, scale| Box::pin(lookup_lag(site, scale, 3000)),
                ..ROW
            },
            Row {
                name: "lookup-lag-8s",
                how: "the same until it is 7.8 s old: shortly before it would count as absent",
                run: |site, scale| Box::pin(lookup_lag(site, scale, 7800)),
                ..ROW
            },
            Row {
                name: "older-order",
                how: "an older order has the clientOid; every second order is lost before it was processed",
                unknown: "the exchange has another order with the clientOid",
                run: |site, scale| Box::pin(older_order(site, scale)),
                ..ROW
            },
            Row {
                name: "lookups-fail",
                how: "lookups get HTML with status 502; the answer to the order was lost",
                unknown: "lookups fail",
                run: |site, scale| Box::pin(lookups_fail(site, scale)),
                ..ROW
            },
            Row {
                name: "clock-jump",
                how: "the exchange's clock jumps by 20 s",
                run: |site, scale| Box::pin(clock_jump(site, scale)),
                ..ROW
            },
        ],
    },
    Group {
        setup: Setup::Tls,
        rows: &[
            Row {
                name: "refused",
                how: "the exchange's address refuses connections for 1 s",
                run: |site, scale| Box::pin(refused(site, scale)),
                ..ROW
            },
            Row {
                name: "dns",
                how: "the exchange's name has no address, and the last one refuses connections; then it has another one",
                mounts: true,
                run: |site, scale| Box::pin(dns(site, scale)),
                ..ROW
            },
            Row {
                name: "tls-expired",
                how: "the exchange's certificate has expired, and its connections are cut",
                run: |site, scale| Box::pin(tls_expired(site, scale)),
                ..ROW
            },
            Row {
                name: "held-up",
                how: "bytes between bots and broker are held up for 2 s; orders with 300 ms",
                run: |site, scale| Box::pin(held_up(site, scale)),
                ..ROW
            },
            Row {
                name: "hang-up",
                how: "bots cancel every second order after 0 to 5 ms, and connections are cut",
                run: |site, scale| Box::pin(hang_up(site, scale)),
                ..ROW
            },
            Row {
                name: "stopped",
                how: "SIGSTOP of the broker for 2 s; orders with 300 ms",
                late: 2,
                run: |site, scale| Box::pin(stopped(site, scale)),
                ..ROW
            },
        ],
    },
    Group {
        setup: Setup::Plain,
        rows: &[
            Row {
                name: "vault-sealed",
                how: "Vault is sealed",
                run: |site, scale| Box::pin(vault_sealed(site, scale)),
                ..ROW
            },
            Row {
                name: "vault-slow",
                how: "Vault answers after 3 s; the time limit is 1 s",
                run: |site, scale| {
                    Box::pin(vault_fault(
                        site,
                        scale,
                        json!({"kind": "delay", "ms": 3000}),
                    ))
                },
                ..ROW
            },
            Row {
                name: "vault-403",
                how: "Vault answers 403",
                run: |site, scale| {
                    Box::pin(vault_fault(
                        site,
                        scale,
                        json!({"kind": "status", "code": 403}),
                    ))
                },
                ..ROW
            },
            Row {
                name: "vault-gone",
                how: "the process of Vault is killed, and started later",
                run: |site, scale| Box::pin(vault_gone(site, scale)),
                ..ROW
            },
            Row {
                name: "known-halt",
                how: "known clientOids are sent again while the account is halted",
                run: |site, scale| Box::pin(known_while_halted(site, scale)),
                ..ROW
            },
            Row {
                name: "known-egress",
                how: "known clientOids are sent again while the egress address is wrong",
                run: |site, scale| Box::pin(known_while_egress_is_wrong(site, scale)),
                ..ROW
            },
            Row {
                name: "known-clock",
                how: "known clientOids are sent again while the exchange's clock differs by 2 days",
                run: |site, scale| Box::pin(known_while_clock_is_wrong(site, scale)),
                ..ROW
            },
            Row {
                name: "known-audit-full",
                how: "known clientOids are sent again while the audit disk is full",
                run: |site, scale| Box::pin(known_while_audit_disk_is_full(site, scale)),
                ..ROW
            },
            Row {
                name: "known-drain",
                how: "known clientOids are sent again while the broker stops",
                run: |site, scale| Box::pin(known_while_draining(site, scale)),
                ..ROW
            },
        ],
    },
    Group {
        setup: Setup::HangingDisk,
        rows: &[Row {
            name: "known-audit-hangs",
            how: "known clientOids are sent again while the audit disk hangs (FUSE)",
            mounts: true,
            run: |site, scale| Box::pin(known_while_audit_disk_hangs(site, scale)),
            ..ROW
        }],
    },
    Group {
        setup: Setup::Plain,
        rows: &[Row {
            name: "sigterm",
            how: "SIGTERM under load, and a restart",
            run: |site, scale| Box::pin(terminated(site, scale)),
            ..ROW
        }],
    },
    Group {
        setup: Setup::Plain,
        rows: &[Row {
            name: "kill",
            how: "kill -9 under load, and a restart",
            run: |site, scale| Box::pin(killed(site, scale)),
            ..ROW
        }],
    },
];
