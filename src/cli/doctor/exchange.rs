//! The way to the exchange: names, connections, time, address. Nothing of it needs a key.

use std::collections::BTreeSet;
use std::error::Error;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::timeout;

use super::{ADDRESS_WITHIN, ASK_WITHIN};
use crate::base::diagnosis::Diagnosis;
use crate::base::trust::shows_ca;
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

/// What the machine's own clock may be off: audit lines, logs and certificates go by it.
const SYSTEM_CLOCK_MS: i64 = 1000;

/// The hosts that the rules need; without rules the one that tells addresses.
pub(super) fn host_ids(policy: Option<&Policy>) -> BTreeSet<HostId> {
    let host_ids = policy.map(Policy::hosts).unwrap_or_default();
    if host_ids.is_empty() {
        return BTreeSet::from([(crate::kucoin::Site::default(), Host::Spot)]);
    }
    host_ids
}

/// The way cannot even be set up.
pub(super) fn unfit(error: &StartError) -> Diagnosis {
    let fix = "correct `[exchange]` and egress.roots; `credbroker check-config` looks again";
    Diagnosis::failed("host", chain(error), fix)
}

/// Asks every host for its time, and one of them for our address.
pub(super) async fn look(
    config: &Config,
    egress: &Egress,
    clock: &Clock,
    host_ids: &BTreeSet<HostId>,
) -> Vec<Diagnosis> {
    let hosts = host_ids.iter().map(|host_id| async move {
        let looked = timeout(ASK_WITHIN, host(config, egress, clock, *host_id)).await;
        looked.unwrap_or_else(|_| vec![late(&name(*host_id), ASK_WITHIN)])
    });
    let hosts = futures_util::future::join_all(hosts);
    let address = async {
        // All sites see the same address.
        let site = host_ids.first().map(|(site, _)| *site).unwrap_or_default();
        let host_id = (site, Host::Spot);
        let ask = async {
            if !host_ids.contains(&host_id) {
                // A name that is not known makes the question fail, and that is told.
                let _ = egress.resolve(host_id).await;
            }
            my_ip(egress, clock, host_id).await
        };
        let late = |_| Err(within(ADDRESS_WITHIN));
        let answer = timeout(ADDRESS_WITHIN, ask).await.unwrap_or_else(late);
        of_address(config, answer)
    };
    // After the names are resolved.
    let mut lines = hosts.await.concat();
    lines.push(address.await);
    lines
}

fn name((site, host): HostId) -> String {
    format!("{site}/{}", host.as_str())
}

fn within(limit: Duration) -> String {
    format!("no answer within {} s", limit.as_secs())
}

fn late(about: &str, limit: Duration) -> Diagnosis {
    let fix = "can this machine reach the exchange at all? Look at the route and the firewall";
    Diagnosis::failed("host", within(limit), fix).about(about)
}

/// The name, the connection and the time of one host.
async fn host(config: &Config, egress: &Egress, clock: &Clock, host_id: HostId) -> Vec<Diagnosis> {
    let about = name(host_id);
    let host = match egress.resolve(host_id).await {
        Err(ConnectError::NoAddress(missing @ NoAddress::OtherKind { .. })) => {
            let detail = missing.to_string();
            let fix = "egress.address is IPv4 or IPv6, and the host must have an address of that kind: correct egress.address";
            return vec![Diagnosis::failed("host", detail, fix).about(&about)];
        }
        Ok(host) => host,
        Err(error) => {
            let host = config
                .origins
                .get(&host_id)
                .map_or("the host", |origin| &origin.name);
            let detail = format!("the name {host} cannot be resolved: {}", cause(&error));
            let fix = format!(
                "ask the name server: `getent hosts {host}`; look at /etc/resolv.conf and the firewall"
            );
            return vec![Diagnosis::failed("host", detail, fix).about(&about)];
        }
    };
    let asked = ask(egress, clock, host_id, BrokerQuery::Time).await;
    let (server_ms, asked, answered) = match asked {
        Ok(answer) => answer,
        Err(QueryError::Connect(error)) => return vec![unreached(config, &about, &host, &error)],
        Err(error) => {
            let reached = Diagnosis::ok("host", format!("{host} is reached")).about(&about);
            let detail = format!("the time is not known: {}", cause(&error));
            let fix =
                "is it KuCoin that answers there? Look at `[exchange]` and at what stands between";
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
    clock.take_in(host_id, sample, false);
    let tls = match config.origins.get(&host_id) {
        Some(origin) if origin.tls => " over TLS",
        _ => "",
    };
    let took_ms = answered.saturating_sub(asked).as_millis();
    let reached = format!("{host} answers{tls} in {took_ms} ms");
    vec![
        Diagnosis::ok("host", reached).about(&about),
        time(clock, host_id),
    ]
}

/// No connection.
fn unreached(config: &Config, about: &str, host: &str, error: &ConnectError) -> Diagnosis {
    let source = config.egress.address;
    let error_of_system = error
        .source()
        .and_then(<dyn Error>::downcast_ref::<io::Error>);
    let tls = error_of_system
        .and_then(io::Error::get_ref)
        .and_then(|error| error.downcast_ref());
    let fix = match error_of_system.map(io::Error::kind) {
        _ if tls.is_some_and(shows_ca) => {
            "give the server a certificate that its CA has issued (CA:FALSE); egress.roots may stay as it is".to_owned()
        }
        Some(io::ErrorKind::AddrNotAvailable) => format!(
            "egress.address {source} is no address of this machine: correct it, or give the machine this address (`ip address`)"
        ),
        Some(io::ErrorKind::InvalidData) => {
            "the certificate is not one that egress.roots trust: something stands between, or the clock of this machine is wrong"
                .to_owned()
        }
        _ => format!("look at route and firewall: `curl --interface {source} -v https://{host}/`"),
    };
    Diagnosis::failed(
        "host",
        format!("{host} cannot be reached: {}", cause(error)),
        fix,
    )
    .about(about)
}

/// What lies at the bottom of an error: its sentences are for bots.
fn cause(error: &(dyn Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// How far the host's time is from the machine's.
fn time(clock: &Clock, host_id: HostId) -> Diagnosis {
    let about = name(host_id);
    let found = clock.exchange(host_id);
    let offset_ms = found.ms - clock.wall_ms();
    let Some(uncertainty) = found.uncertainty else {
        let detail = "the host told a time that cannot be right";
        return Diagnosis::failed(
            "clock",
            detail,
            "compare with a third clock; is it KuCoin that answers there?",
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
            "compare both with a third clock and set the one that is wrong; if the difference is to be accepted, run \
             `credbroker clock accept {about}`. Until then risk-increasing requests are refused (CLOCK_UNCERTAIN)"
        );
        return Diagnosis::failed("clock", detail, fix).about(&about);
    }
    let detail = format!("this machine's {off} the exchange's, to within {within_ms} ms");
    if uncertainty > MAX_UNCERTAINTY {
        let fix = "the answer takes too long: look at the route to the exchange; risk-increasing requests are refused";
        Diagnosis::failed("clock", detail, fix).about(&about)
    } else if offset_ms.abs() > SYSTEM_CLOCK_MS {
        let fix = "set the machine's clock (NTP): signatures follow the exchange, but audit lines, logs and certificates \
                   go by the machine";
        Diagnosis::warning("clock", detail, fix).about(&about)
    } else {
        Diagnosis::ok("clock", detail).about(&about)
    }
}

/// The address that the exchange sees, or why it did not tell.
async fn my_ip(egress: &Egress, clock: &Clock, host_id: HostId) -> Result<IpAddr, String> {
    let answer = ask(egress, clock, host_id, BrokerQuery::MyIp).await;
    let (address, ..): (IpAddr, _, _) = answer.map_err(|error| cause(&error))?;
    Ok(address.to_canonical())
}

fn of_address(config: &Config, answer: Result<IpAddr, String>) -> Diagnosis {
    let (check, expected) = ("egress", config.expected_ip.to_canonical());
    match answer {
        Ok(seen) if seen == expected => {
            let detail = format!("the exchange sees {seen}, as egress.expected_ip says");
            Diagnosis::ok(check, detail)
        }
        Ok(seen) => {
            let detail = format!("the exchange sees {seen}, and egress.expected_ip is {expected}");
            let fix = format!(
                "repair the route, so that requests leave from {expected}; or, if {seen} is right, write egress.expected_ip = \
                 \"{seen}\" and enter {seen} under API Management > Edit > IP restriction of each key"
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
            let detail = format!("the exchange did not say which address it sees: {reason}");
            let fix =
                "see the lines about hosts; risk-increasing requests are refused until it does";
            Diagnosis::failed(check, detail, fix)
        }
    }
}
