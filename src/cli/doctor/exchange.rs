//! The network path to the exchange: DNS, connections, time, egress address. None of these checks needs a key.

use std::collections::BTreeSet;
use std::error::Error;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::timeout;

use super::{ADDRESS_WITHIN, ASK_WITHIN};
use crate::base::diagnosis::Diagnosis;
use crate::base::trust::presents_ca;
use crate::broker::probes::{QueryError, ask};
use crate::clock::{self, Clock, HostId, MAX_UNCERTAINTY, Sample};
use crate::config::Config;
use crate::egress::proof::ProofMode;
use crate::egress::{ConnectError, Egress, NoAddress};
use crate::kucoin::Host;
use crate::kucoin::broker_query::BrokerQuery;
use crate::policy::Policy;
use crate::server::StartError;
use crate::telemetry::chain;

/// Larger errors of the system clock, which audit lines, logs and certificate checks use, cause a warning.
const SYSTEM_CLOCK_MS: i64 = 1000;

/// The hosts that the rules need; without rules, the host that reports the egress address.
pub(super) fn host_ids(policy: Option<&Policy>) -> BTreeSet<HostId> {
    let host_ids = policy.map(Policy::hosts).unwrap_or_default();
    if host_ids.is_empty() {
        return BTreeSet::from([(crate::kucoin::Site::default(), Host::Spot)]);
    }
    host_ids
}

/// The client for the exchange cannot be set up.
pub(super) fn setup_failed(error: &StartError) -> Diagnosis {
    let fix = "correct `[exchange]` and egress.roots, then run `credbroker check-config` to check";
    Diagnosis::failed("host", chain(error), fix)
}

/// Checks the time on every host, and the egress address on one of them.
pub(super) async fn check(
    config: &Config,
    egress: &Egress,
    clock: &Clock,
    host_ids: &BTreeSet<HostId>,
) -> Vec<Diagnosis> {
    let hosts = host_ids.iter().map(|host_id| async move {
        let checked = timeout(ASK_WITHIN, host(config, egress, clock, *host_id)).await;
        checked.unwrap_or_else(|_| vec![timed_out(&name(*host_id), ASK_WITHIN)])
    });
    let hosts = futures_util::future::join_all(hosts);
    let address = async {
        // Every site sees the same address.
        let site = host_ids.first().map(|(site, _)| *site).unwrap_or_default();
        let host_id = (site, Host::Spot);
        let query = async {
            if !host_ids.contains(&host_id) {
                // If this fails, so does the query below, which reports it.
                let _ = egress.resolve(host_id).await;
            }
            my_ip(egress, clock, host_id).await
        };
        let late = |_| Err(no_response(ADDRESS_WITHIN));
        let answer = timeout(ADDRESS_WITHIN, query).await.unwrap_or_else(late);
        of_address(config, answer)
    };
    // The address check needs the resolved names.
    let mut lines = hosts.await.concat();
    lines.push(address.await);
    lines
}

fn name((site, host): HostId) -> String {
    format!("{site}/{}", host.as_str())
}

fn no_response(limit: Duration) -> String {
    format!("no response within {} s", limit.as_secs())
}

fn timed_out(about: &str, limit: Duration) -> Diagnosis {
    let fix = "check this machine's route to the exchange and its firewall";
    Diagnosis::failed("host", no_response(limit), fix).about(about)
}

/// Checks name, connection and time of one host.
async fn host(config: &Config, egress: &Egress, clock: &Clock, host_id: HostId) -> Vec<Diagnosis> {
    let about = name(host_id);
    let host = match egress.resolve(host_id).await {
        Err(ConnectError::NoAddress(missing @ NoAddress::OtherKind { .. })) => {
            let detail = missing.to_string();
            let family = if config.egress.address.is_ipv4() {
                "IPv6"
            } else {
                "IPv4"
            };
            let fix = format!(
                "set egress.address to an {family} address of this machine: the exchange's host has only {family} addresses"
            );
            return vec![Diagnosis::failed("host", detail, fix).about(&about)];
        }
        Ok(host) => host,
        Err(error) => {
            let host = config
                .origins
                .get(&host_id)
                .map_or("the host", |origin| &origin.name);
            let detail = format!("cannot resolve {host}: {}", cause(&error));
            let fix =
                format!("run `getent hosts {host}`, and check /etc/resolv.conf and the firewall");
            return vec![Diagnosis::failed("host", detail, fix).about(&about)];
        }
    };
    let measured = ask(egress, clock, host_id, BrokerQuery::Time).await;
    let (server_ms, asked, answered) = match measured {
        Ok(answer) => answer,
        Err(QueryError::Connect(error)) => {
            return vec![connect_failed(config, &about, &host, &error)];
        }
        Err(error) => {
            let reached = Diagnosis::ok("host", format!("{host} is reachable")).about(&about);
            let detail = format!("cannot get the exchange's time: {}", cause(&error));
            let fix =
                "check that `[exchange]` names KuCoin's hosts and that no proxy is in between";
            return vec![
                reached,
                Diagnosis::failed("clock", detail, fix).about(&about),
            ];
        }
    };
    let sample = Sample {
        asked,
        answered,
        server_ms,
    };
    clock.apply_sample(host_id, sample, false);
    let tls = match config.origins.get(&host_id) {
        Some(origin) if origin.tls => " over TLS",
        _ => "",
    };
    let took_ms = answered.saturating_sub(asked).as_millis();
    let reached = format!("{host} responded{tls} in {took_ms} ms");
    vec![
        Diagnosis::ok("host", reached).about(&about),
        time(clock, host_id),
    ]
}

/// The connection failed.
fn connect_failed(config: &Config, about: &str, host: &str, error: &ConnectError) -> Diagnosis {
    let source = config.egress.address;
    let error_of_system = error
        .source()
        .and_then(<dyn Error>::downcast_ref::<io::Error>);
    let tls = error_of_system
        .and_then(io::Error::get_ref)
        .and_then(|error| error.downcast_ref());
    let fix = match error_of_system.map(io::Error::kind) {
        _ if tls.is_some_and(presents_ca) => {
            "on the host that [exchange] names, install a server certificate (CA:FALSE) issued by this CA; egress.roots need not change".to_owned()
        }
        Some(io::ErrorKind::AddrNotAvailable) => format!(
            "egress.address {source} is not an address of this machine (see `ip address`): correct it, or assign the address to this machine"
        ),
        Some(io::ErrorKind::InvalidData) => {
            "check for a TLS-intercepting proxy, a wrong system clock, or a missing CA in egress.roots"
                .to_owned()
        }
        _ => format!(
            "check the route and the firewall: `curl --interface {source} -v https://{host}/`"
        ),
    };
    Diagnosis::failed(
        "host",
        format!("cannot reach {host}: {}", cause(error)),
        fix,
    )
    .about(about)
}

/// The innermost error; the outer messages are written for bots.
fn cause(error: &(dyn Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// Compares the host's time with the system clock.
fn time(clock: &Clock, host_id: HostId) -> Diagnosis {
    let about = name(host_id);
    let exchange_time = clock.exchange(host_id);
    let offset_ms = exchange_time.ms - clock.wall_ms();
    let Some(uncertainty) = exchange_time.uncertainty else {
        let detail = "the host returned an invalid time";
        return Diagnosis::failed(
            "clock",
            detail,
            "check that `[exchange]` names KuCoin's hosts, and compare the system clock with another clock",
        )
        .about(&about);
    };
    let off = match offset_ms {
        0 => "agrees with".to_owned(),
        1.. => format!("is {offset_ms} ms behind"),
        _ => format!("is {} ms ahead of", offset_ms.abs()),
    };
    let within_ms = uncertainty.as_millis();
    if let Some(difference_ms) = clock.refused_difference(host_id) {
        let detail = format!(
            "the exchange's clock is {}",
            clock::difference(difference_ms)
        );
        let fix = format!(
            "compare both with a third clock. If the system clock is wrong, set it; if it is right, run `credbroker clock \
             accept {about}` to accept the difference. Until then, risk-increasing requests are refused (CLOCK_UNCERTAIN)"
        );
        return Diagnosis::failed("clock", detail, fix).about(&about);
    }
    let detail = format!("the system clock {off} the exchange's clock (±{within_ms} ms)");
    if uncertainty > MAX_UNCERTAINTY {
        let detail = format!(
            "{detail}; the response was too slow for a precise time, and risk-increasing requests are refused"
        );
        let fix = "check the latency of the route to the exchange";
        Diagnosis::failed("clock", detail, fix).about(&about)
    } else if offset_ms.abs() > SYSTEM_CLOCK_MS {
        let fix = "synchronize the system clock (NTP): signatures use the exchange's time, but audit lines, logs and \
                   certificate checks use the system clock";
        Diagnosis::warning("clock", detail, fix).about(&about)
    } else {
        Diagnosis::ok("clock", detail).about(&about)
    }
}

/// The egress address that the exchange reports, or why it is not known.
async fn my_ip(egress: &Egress, clock: &Clock, host_id: HostId) -> Result<IpAddr, String> {
    let answer = ask(egress, clock, host_id, BrokerQuery::MyIp).await;
    let (address, ..): (IpAddr, _, _) = answer.map_err(|error| cause(&error))?;
    Ok(address.to_canonical())
}

fn of_address(config: &Config, answer: Result<IpAddr, String>) -> Diagnosis {
    let (check, expected) = ("egress", config.expected_ip.to_canonical());
    match answer {
        Ok(seen) if seen == expected => {
            let detail = format!("requests leave from {seen} (egress.expected_ip)");
            Diagnosis::ok(check, detail)
        }
        Ok(seen) => {
            let detail =
                format!("requests leave from {seen} instead of egress.expected_ip {expected}");
            let fix = format!(
                "fix the routing so that requests leave from {expected}; or, if {seen} is right, set egress.expected_ip = \
                 \"{seen}\" and enter {seen} under API Management > Edit > IP restriction for each key"
            );
            if config.proof == ProofMode::Lenient {
                Diagnosis::warning(check, detail, fix)
            } else {
                Diagnosis::failed(
                    check,
                    format!("{detail}; risk-increasing requests are refused"),
                    fix,
                )
            }
        }
        Err(reason) => {
            let detail = format!("cannot get the egress address from the exchange: {reason}");
            let fix = "see the `host` lines above; a broker that starts now refuses risk-increasing requests until this \
                       check succeeds, unless egress.proof is \"lenient\"";
            Diagnosis::failed(check, detail, fix)
        }
    }
}
