//! The configuration file: parsed into [`Config`] in one step, or into a list of all its problems.
//!
//! One TOML file without secrets. Unknown keys are problems. [`load`] reads the files that it names.

pub mod load;
pub(crate) mod permissions;
pub(crate) mod vault;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use url::{Host as UrlHost, Url};

use crate::broker::admission::AdmissionLimits;
use crate::broker::answer_memory::RESERVED;
use crate::egress::proof::ProofMode;
use crate::egress::{EgressSettings, Origin};
use crate::kucoin::code::{RefusalCode, RefusalCodes};
use crate::kucoin::not_found::{NotFoundAnswer, NotFoundAnswers};
use crate::kucoin::{Host, RequestLimits, Site};
use crate::orders::OrderSettings;
use crate::telemetry::LogFormat;
use crate::vault::VaultSettings;

use crate::base::toml_file::{Problem, Problems, Section};

/// The complete configuration of the broker, parsed.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file it was read from; `None` if it was parsed from text.
    pub(crate) file: Option<PathBuf>,
    /// The rules file.
    pub(crate) rules: PathBuf,
    /// Folder for state that survives restarts; locked by one broker at a time.
    pub(crate) state_dir: PathBuf,
    /// The audit log.
    pub audit_file: PathBuf,
    /// The file for audit lines that cannot be written to `audit_file`.
    pub audit_reserve: PathBuf,
    /// Bytes of `audit_reserve`, and of the lines that wait in memory.
    pub(crate) audit_reserve_bytes: usize,
    /// How long and how many clientOids are kept.
    pub(crate) orders: OrderSettings,
    /// Listener for bots.
    pub(crate) grpc: SocketAddr,
    /// Listener for health and metrics.
    pub(crate) ops: SocketAddr,
    /// Listener for admins, if there is one.
    pub admin: Option<SocketAddr>,
    /// Certificates of the listeners for bots and admins.
    pub tls: TlsFiles,
    /// Vault.
    pub vault: VaultSettings,
    /// CA of Vault's certificate.
    pub(crate) vault_roots: Roots,
    /// How often the metadata of keys is polled.
    pub vault_poll: Duration,
    /// How to connect to the exchange.
    pub egress: EgressSettings,
    /// CAs of the exchange's certificates.
    pub(crate) egress_roots: Roots,
    /// Additional codes of the exchange that mean a rejection.
    pub(crate) refusal_codes: RefusalCodes,
    /// Additional answers to lookups that mean "no such order".
    pub(crate) not_found: NotFoundAnswers,
    /// Address of each host of each site.
    pub(crate) origins: HashMap<(Site, Host), Origin>,
    /// How often the egress address is checked with the exchange.
    pub(crate) proof_every: Duration,
    /// The egress address that the exchange must see.
    pub(crate) expected_ip: IpAddr,
    /// What to do if it sees another address.
    pub(crate) proof: ProofMode,
    /// Size limits of requests.
    pub request_limits: RequestLimits,
    /// Limits of each connection.
    pub(crate) connection_limits: ConnectionLimits,
    /// Limits of calls and connections, per bot and in total.
    pub(crate) admission_limits: AdmissionLimits,
    /// Requests to the exchange per 10 s over all accounts; `None`: no limit.
    pub(crate) edge_limit: Option<u64>,
    /// How often rules and certificates are checked for changes.
    pub(crate) reload_every: Duration,
    /// Time limit of calls without a deadline.
    pub default_deadline: Duration,
    /// How long calls in flight may still run after SIGTERM, at most.
    pub drain_timeout: Duration,
    /// Filter of log messages.
    pub(crate) log_filter: String,
    /// Format of log messages.
    pub(crate) log_format: LogFormat,
}

/// PEM files of the listeners for bots and admins.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Certificate chain.
    pub certificate: PathBuf,
    /// Private key.
    pub key: PathBuf,
    /// CAs of the bots' certificates.
    pub client_ca: PathBuf,
    /// CAs of the admins' certificates; `None`: the same as `client_ca`.
    pub(crate) admin_ca: Option<PathBuf>,
}

/// Problems with the files of a running broker.
#[derive(Clone, Debug, Default)]
pub(crate) struct FileProblems {
    /// Problems of changed files whose reload failed, by content (`rules`, `tls`).
    pub(crate) rejected: BTreeMap<&'static str, Vec<Problem>>,
    /// Problems of files that are in use: permissions, ignored certificates, and CAs with name constraints that cannot be
    /// checked.
    pub(crate) warnings: Vec<Problem>,
}

/// Which certificate authorities are trusted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Roots {
    /// Only the CAs in this PEM file.
    File(PathBuf),
    /// Mozilla's list, compiled in.
    Mozilla,
}

/// Limits of a connection: times, and the rate at which it is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionLimits {
    /// Bytes per second; see [`Paced`](crate::base::paced::Paced).
    pub(crate) read_rate: u32,
    /// TLS handshake.
    pub(crate) handshake: Duration,
    /// Receiving a complete request.
    pub(crate) request: Duration,
    /// Idle time without a call.
    pub(crate) idle: Duration,
    /// Age of the connection.
    pub(crate) age: Duration,
    /// Calls in flight, once the connection is closing.
    pub(crate) grace: Duration,
}

impl Config {
    /// Parses a configuration file; relative paths in it start at `folder`.
    ///
    /// # Errors
    /// All problems, each with its key.
    pub fn parse(text: &str, folder: &Path) -> Result<Self, Vec<Problem>> {
        let problems = Problems::default();
        let config =
            Section::parse(text, "config", &problems).and_then(|mut file| read(&mut file, folder));
        problems.into_result()?;
        // `None` implies a problem, which was returned above.
        config.ok_or_else(Vec::new)
    }
}

fn read(file: &mut Section, folder: &Path) -> Option<Config> {
    let rules = required_path(file, "rules", "/etc/credbroker/rules.toml", folder);
    let state_dir = required_path(file, "state_dir", "/var/lib/credbroker", folder);
    let mut audit = file.section("audit");
    let mut in_state_dir = |key, name| {
        let example = format!("/var/lib/credbroker/{name}");
        path(&mut audit, key, &example, folder)
    };
    let audit_file = in_state_dir("file", "audit.jsonl");
    let audit_reserve = in_state_dir("reserve", "audit.reserve");
    let audit_reserve_bytes = audit.number("reserve_bytes", 16 << 20, 1 << 20..=1 << 30);
    let audit_reserve_bytes = usize::try_from(audit_reserve_bytes).unwrap_or(usize::MAX);

    let orders = order_settings(&mut file.section("orders"));

    let mut listen = file.section("listen");
    let text = listen.required("grpc", "\"0.0.0.0:8443\"");
    let grpc = listener(&mut listen, "grpc", text);
    let text = listen.required("ops", "\"127.0.0.1:9464\"");
    let ops = listener(&mut listen, "ops", text);
    let text = listen.optional("admin");
    let admin = listener(&mut listen, "admin", text);
    for (key, address, (other, other_address)) in [
        ("ops", ops, ("grpc", grpc)),
        ("admin", admin, ("grpc", grpc)),
        ("admin", admin, ("ops", ops)),
    ] {
        if address.is_some_and(|address| address.port() != 0 && other_address == Some(address)) {
            let problem =
                format!("has the same address as listen.{other}; each listener needs its own");
            listen.problem(key, problem);
        }
    }

    let tls = tls_files(&mut file.section("tls"), folder);

    let mut section = file.section("vault");
    let vault_roots = roots(&mut section, "roots", folder);
    let vault_poll = Duration::from_secs(section.number("poll_s", 30, 1..=3600));
    let vault = vault::read(&mut section, folder);

    let mut section = file.section("egress");
    let egress_roots = roots(&mut section, "roots", folder);
    let mut egress = egress(&mut section);
    let expected_ip = expected_ip(&mut section, egress.as_ref().map(|egress| egress.address));
    let proof = section.optional("proof").unwrap_or_default();
    let proof_every = Duration::from_secs(section.number("proof_every_s", 300, 1..=3600));
    let (refusal_codes, not_found, origins) = exchange(&mut file.section("exchange"));

    let max_answer_bytes = egress.as_ref().map_or(1, |egress| egress.max_answer_bytes);
    let mut limits = limits(&mut file.section("limits"), max_answer_bytes);
    if let Some(egress) = &mut egress {
        egress.read_rate = limits.connection.read_rate;
        // A closing connection must not abort healthy calls: time for two attempts, and for returning the answer.
        let longest = 2 * (egress.longest_connect() + egress.answer_timeout);
        let grace = limits.drain_timeout.max(longest) + Duration::from_secs(5);
        limits.connection.grace = grace;
    }
    let reload_every =
        Duration::from_millis(file.section("reload").number("every_ms", 1000, 10..=60_000));

    let mut log = file.section("log");
    let log_filter = log.optional("filter").unwrap_or_else(|| "info".to_owned());
    if let Err(error) = crate::telemetry::log_filter(&log_filter) {
        log.problem(
            "filter",
            format_args!(
                "expected a filter such as \"info\" or \"info,credbroker=debug\": {error}"
            ),
        );
    }
    let log_format = log.optional("format").unwrap_or(LogFormat::Json);

    let state_dir: PathBuf = state_dir?;
    Some(Config {
        file: None,
        rules: rules?,
        audit_file: audit_file.unwrap_or_else(|| state_dir.join("audit.jsonl")),
        audit_reserve: audit_reserve.unwrap_or_else(|| state_dir.join("audit.reserve")),
        audit_reserve_bytes,
        orders,
        state_dir,
        grpc: grpc?,
        ops: ops?,
        admin,
        tls: tls?,
        vault: vault?,
        vault_roots,
        vault_poll,
        egress: egress?,
        egress_roots,
        refusal_codes,
        not_found,
        origins,
        proof_every,
        expected_ip: expected_ip?,
        proof,
        request_limits: limits.request,
        connection_limits: limits.connection,
        admission_limits: limits.admission,
        edge_limit: limits.edge,
        reload_every,
        default_deadline: limits.default_deadline,
        drain_timeout: limits.drain_timeout,
        log_filter,
        log_format,
    })
}

/// Reads the table `[tls]`.
fn tls_files(section: &mut Section, folder: &Path) -> Option<TlsFiles> {
    let mut required = |key, name: &str| {
        let example = format!("/etc/credbroker/tls/{name}");
        required_path(section, key, &example, folder)
    };
    let certificate = required("certificate", "server.pem");
    let key = required("key", "server.key");
    let client_ca = required("client_ca", "bots-ca.pem");
    let example = "/etc/credbroker/tls/admins-ca.pem";
    let admin_ca = path(section, "admin_ca", example, folder);
    Some(TlsFiles {
        certificate: certificate?,
        key: key?,
        // The same file as `client_ca` means the default.
        admin_ca: admin_ca.filter(|admin_ca| client_ca.as_ref() != Some(admin_ca)),
        client_ca: client_ca?,
    })
}

/// Reads the table `[orders]`.
fn order_settings(section: &mut Section) -> OrderSettings {
    let hours = section.number("window_hours", 24, 1..=240);
    let claims = section.number("claims", 1_000_000, 1000..=10_000_000);
    let per_bot = section.number("claims_per_bot", 0, 0..=10_000_000);
    let count = |number| usize::try_from(number).unwrap_or(usize::MAX);
    OrderSettings {
        window_s: u32::try_from(hours * 3600).unwrap_or(u32::MAX),
        claims: count(claims),
        claims_per_bot: (per_bot > 0).then(|| count(per_bot)),
    }
}

/// The table `[limits]`.
struct Limits {
    request: RequestLimits,
    connection: ConnectionLimits,
    admission: AdmissionLimits,
    edge: Option<u64>,
    default_deadline: Duration,
    drain_timeout: Duration,
}

/// Bytes of requests of one bot that may be received at the same time; more if the longest request needs it.
const MESSAGE_BYTES_PER_BOT: usize = 8 * 1024 * 1024;

/// Bytes of answers of all bots in memory; more if the calls in flight or the largest answer need it.
const ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// The same for one bot.
const ANSWER_BYTES_PER_BOT: usize = 16 * 1024 * 1024;

fn limits(section: &mut Section, max_answer_bytes: usize) -> Limits {
    let default = RequestLimits::default();
    let mut size = |key, default: usize, most| {
        usize::try_from(section.number(key, default as u64, 1..=most)).unwrap_or(default)
    };
    let request_limits = RequestLimits {
        path_bytes: size("path_bytes", default.path_bytes, 4096),
        // Percent-encoding can triple the length; the HTTP library accepts targets of up to 65,534 bytes.
        query_bytes: size("query_bytes", default.query_bytes, 16_384),
        query_parameters: size("query_parameters", default.query_parameters, 1000),
        body_bytes: size("body_bytes", default.body_bytes, 4 * 1024 * 1024),
    };
    let mut count = |key, default, most| {
        usize::try_from(section.number(key, default, 1..=most)).unwrap_or(usize::MAX)
    };
    let mut admission_limits = AdmissionLimits {
        calls: count("calls_in_flight", 1024, 100_000),
        calls_per_bot: count("calls_in_flight_per_bot", 256, 100_000),
        cancels: count("cancels_in_flight", 512, 100_000),
        cancels_per_bot: count("cancels_in_flight_per_bot", 64, 100_000),
        message_bytes_per_bot: MESSAGE_BYTES_PER_BOT.max(4 * request_limits.body_bytes),
        answer_bytes: ANSWER_BYTES,
        answer_bytes_per_bot: ANSWER_BYTES_PER_BOT,
        connections: count("connections", 8192, 1_000_000),
        connections_per_bot: count("connections_per_bot", 64, 100_000),
    };
    read_answer_bytes(section, &mut admission_limits, max_answer_bytes);
    let edge = section.number("edge_requests_per_10s", 0, 0..=1_000_000);
    // The largest request arrives well within the default `request_timeout_ms`, also at the lowest rate.
    let read_rate = section.number(
        "read_bytes_per_second",
        4_000_000,
        1_000_000..=1_000_000_000,
    );
    let mut millis =
        |key, default, most| Duration::from_millis(section.number(key, default, 1..=most));
    let handshake = millis("handshake_timeout_ms", 5000, 60_000);
    let request = millis("request_timeout_ms", 10_000, 60_000);
    let mut seconds = |key, default| Duration::from_secs(section.number(key, default, 1..=3600));
    // Shorter than the usual idle timeouts of firewalls and NATs.
    let idle = seconds("connection_idle_s", 900);
    let age = seconds("connection_age_s", 3600);
    let default_deadline =
        Duration::from_millis(section.number("default_deadline_ms", 10_000, 1..=600_000));
    // Shorter than `egress.answer_timeout_ms`: nobody is served an order meanwhile, and most late answers come sooner.
    let drain_timeout =
        Duration::from_millis(section.number("drain_timeout_ms", 10_000, 0..=600_000));
    Limits {
        request: request_limits,
        connection: ConnectionLimits {
            read_rate: u32::try_from(read_rate).unwrap_or(u32::MAX),
            handshake,
            request,
            idle,
            age,
            // `read` replaces it with a value from the timeouts of `[egress]`.
            grace: drain_timeout,
        },
        admission: admission_limits,
        edge: (edge > 0).then_some(edge),
        default_deadline,
        drain_timeout,
    }
}

/// Reads the limits of answers in memory. Less than `egress.max_answer_bytes` is a problem: no read could get the largest
/// answer.
fn read_answer_bytes(section: &mut Section, limits: &mut AdmissionLimits, max_answer_bytes: usize) {
    for (key, bytes, calls) in [
        ("answer_bytes", &mut limits.answer_bytes, limits.calls),
        (
            "answer_bytes_per_bot",
            &mut limits.answer_bytes_per_bot,
            limits.calls_per_bot,
        ),
    ] {
        let default = (*bytes).max(calls * RESERVED).max(max_answer_bytes) as u64;
        let found = section.number(key, default, RESERVED as u64..=1 << 33);
        *bytes = usize::try_from(found).unwrap_or(usize::MAX);
        if *bytes < max_answer_bytes {
            let problem = format!(
                "expected at least egress.max_answer_bytes ({max_answer_bytes}), got {found}"
            );
            section.problem(key, problem);
        }
    }
}

/// The address of a listener. Host names are refused, because a name can have several addresses.
fn listener(section: &mut Section, key: &str, text: Option<String>) -> Option<SocketAddr> {
    let text = text?;
    let address = text.parse().ok();
    if address.is_none() {
        let expected =
            "an IP address and a port (0 to 65535), such as \"0.0.0.0:8443\" or \"[::]:8443\"";
        section.problem(key, format_args!("expected {expected}, got {text:?}"));
    }
    address
}

/// An IP address without a port.
fn ip_address(section: &mut Section, key: &str, text: Option<String>) -> Option<IpAddr> {
    let text = text?;
    let address = text.parse().ok();
    if address.is_none() {
        let expected = "an IP address without a port, such as \"203.0.113.7\"";
        section.problem(key, format_args!("expected {expected}, got {text:?}"));
    }
    address
}

/// The CAs that `key` names; Mozilla's list if the key is missing.
pub(crate) fn roots(section: &mut Section, key: &'static str, folder: &Path) -> Roots {
    match path(section, key, "/etc/credbroker/ca.pem", Path::new("")) {
        Some(file) if file != Path::new("mozilla") => Roots::File(folder.join(file)),
        Some(_) | None => Roots::Mozilla,
    }
}

/// The path under `key`, if the key exists; a relative path starts at `folder`.
///
/// A path that starts with `~` or `$` is a problem: nothing is expanded, so it would name a folder literally called `~`.
pub(crate) fn path(
    section: &mut Section,
    key: &'static str,
    example: &str,
    folder: &Path,
) -> Option<PathBuf> {
    let text: String = section.optional(key)?;
    if text.starts_with(['~', '$']) {
        section.problem(
            key,
            format_args!(
                "expected a path without ~ or variables, which are not expanded, got {text:?}; write the full path, for \
                 example: {key} = {example:?}"
            ),
        );
        return None;
    }
    Some(folder.join(text))
}

/// Like [`path`], but a missing key is a problem.
pub(crate) fn required_path(
    section: &mut Section,
    key: &'static str,
    example: &str,
    folder: &Path,
) -> Option<PathBuf> {
    if !section.has(key) {
        // Reports that it is missing.
        return section.required(key, &format!("{example:?}"));
    }
    path(section, key, example, folder)
}

fn egress(section: &mut Section) -> Option<EgressSettings> {
    let text = section.required("address", "\"203.0.113.7\"");
    let address = ip_address(section, "address", text);
    let millis = |section: &mut Section, key, default| {
        Duration::from_millis(section.number(key, default, 1..=600_000))
    };
    let seconds = |section: &mut Section, key, default| {
        Duration::from_secs(section.number(key, default, 1..=3600))
    };
    Some(EgressSettings {
        connect_timeout: millis(section, "connect_timeout_ms", 3000),
        // Longer than the timeout of the exchange's gateway, so that its error answer is received.
        answer_timeout: millis(section, "answer_timeout_ms", 30_000),
        // The largest known answers (all symbols, all contracts) have 2 to 3 MB. gRPC clients accept responses of 4 MiB by
        // default; the other fields have less than 190 KB.
        max_answer_bytes: usize::try_from(section.number(
            "max_answer_bytes",
            4_000_000,
            1024..=256 << 20,
        ))
        .ok()?,
        max_idle: seconds(section, "max_idle_s", 60),
        // An order sent on a connection that the exchange has just closed ends as maybe_sent: use only recent connections.
        max_idle_for_writes: seconds(section, "max_idle_for_writes_s", 20),
        warm_connections: usize::try_from(section.number("warm_connections", 2, 0..=64)).ok()?,
        // `read` replaces it with the value from `[limits]`.
        read_rate: u32::MAX,
        address: address?,
    })
}

/// The egress address that the exchange must see: `egress.address`, unless a gateway translates it.
fn expected_ip(section: &mut Section, address: Option<IpAddr>) -> Option<IpAddr> {
    let text = section.optional("expected_ip");
    let expected = ip_address(section, "expected_ip", text);
    if expected.is_none() && address.is_some_and(|address| address.is_unspecified()) {
        section.problem(
            "expected_ip",
            "is missing: egress.address is a wildcard, so the broker does not know which address KuCoin must see; add it, \
             for example: expected_ip = \"203.0.113.7\"",
        );
    }
    expected.or(address)
}

fn exchange(
    section: &mut Section,
) -> (RefusalCodes, NotFoundAnswers, HashMap<(Site, Host), Origin>) {
    let not_found: Vec<NotFoundAnswer> = section.optional("not_found").unwrap_or_default();
    let not_found = not_found.into_iter().collect();
    (refusal_codes(section), not_found, origins(section))
}

/// Codes that mean a rejection, in addition to those of this release.
fn refusal_codes(section: &mut Section) -> RefusalCodes {
    let key = "refusal_codes";
    let codes: Vec<String> = section.optional(key).unwrap_or_default();
    let codes = codes.iter().enumerate().filter_map(|(index, code)| {
        code.parse::<RefusalCode>()
            .map_err(|problem| section.problem(&format!("{key}[{index}]"), problem))
            .ok()
    });
    codes.collect()
}

fn origins(section: &mut Section) -> HashMap<(Site, Host), Origin> {
    let setting = "send_signed_requests_to_hosts_other_than_kucoin";
    let allow_any_host: bool = section.optional(setting).unwrap_or_default();
    if section.has("spot") != section.has("futures") {
        let (present, missing) = if section.has("spot") {
            ("spot", "futures")
        } else {
            ("futures", "spot")
        };
        let problem = format!(
            "is missing: with only exchange.{present} set, {missing} requests would go to the real KuCoin; set both"
        );
        section.problem(missing, problem);
    }
    let mut origins = HashMap::new();
    for (key, host) in [("futures", Host::Futures), ("spot", Host::Spot)] {
        let other: Option<String> = section.optional(key);
        let other = other.and_then(|text| match simulator(&text, allow_any_host) {
            Ok(origin) => Some(origin),
            Err(problem) => {
                section.problem(key, problem);
                None
            }
        });
        for site in Site::ALL {
            let own = site.dns_name(host).map(|name| Origin {
                tls: true,
                name: name.to_owned(),
                port: 443,
            });
            if let Some(origin) = own.map(|own| other.clone().unwrap_or(own)) {
                origins.insert((site, host), origin);
            }
        }
    }
    origins
}

/// The address of a simulator: loopback, or any host if a setting explicitly allows signed requests to it.
fn simulator(text: &str, allow_any_host: bool) -> Result<Origin, String> {
    let url = Url::parse(text)
        .map_err(|error| format!("expected a URL such as \"http://127.0.0.1:8300\": {error}"))?;
    let origin = match (url.scheme(), url.host(), url.port_or_known_default()) {
        ("http" | "https", Some(host), Some(port))
            if url.path() == "/" && url.query().is_none() =>
        {
            Origin {
                tls: url.scheme() == "https",
                name: match host {
                    UrlHost::Ipv6(address) => address.to_string(),
                    host => host.to_string(),
                },
                port,
            }
        }
        _ => return Err("expected only scheme (http or https), host and port".to_owned()),
    };
    if allow_any_host || is_loopback(&url) {
        Ok(origin)
    } else {
        Err("signed requests would go to a host that is not KuCoin; use a loopback address, or set \
             exchange.send_signed_requests_to_hosts_other_than_kucoin = true to allow this host"
            .to_owned())
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(UrlHost::Domain(name)) => name == "localhost",
        Some(UrlHost::Ipv4(address)) => address.is_loopback(),
        Some(UrlHost::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        let problems = Config::parse(text, Path::new("/etc/credbroker"))
            .expect_err("this configuration is wrong");
        problems.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn empty_file_reports_every_required_key() {
        let problems = problems("");
        let keys: Vec<_> = problems
            .iter()
            .map(|p| p.split(": ").next().unwrap())
            .collect();
        let expected = [
            "rules",
            "state_dir",
            "listen.grpc",
            "listen.ops",
            "tls.certificate",
            "tls.key",
            "tls.client_ca",
            "vault.address",
            "vault.auth.method",
            "egress.address",
        ];
        assert_eq!(keys, expected);
        assert!(
            problems
                .iter()
                .all(|problem| problem.contains("is missing; add it, for example: "))
        );
    }

    #[test]
    fn listeners_with_the_same_address_are_refused() {
        let text = |addresses: &str| format!("[listen]\n{addresses}");
        let [a, b] = ["127.0.0.1:1", "127.0.0.1:2"];
        for (grpc, ops, admin, expected) in [
            (a, a, b, "listen.ops: has the same address as listen.grpc"),
            (a, b, a, "listen.admin: has the same address as listen.grpc"),
            (a, b, b, "listen.admin: has the same address as listen.ops"),
        ] {
            let problems = problems(&text(&format!(
                "grpc = \"{grpc}\"\nops = \"{ops}\"\nadmin = \"{admin}\""
            )));
            let shared: Vec<_> = problems.iter().filter(|p| p.contains("same")).collect();
            assert_eq!(shared.len(), 1, "{problems:?}");
            assert!(shared.iter().all(|p| p.contains(expected)), "{shared:?}");
        }
        let any = text("grpc = \"[::1]:0\"\nops = \"[::1]:0\"\nadmin = \"[::1]:0\"");
        assert!(!problems(&any).iter().any(|p| p.contains("same")));
    }

    #[test]
    fn wrong_values_and_unknown_keys_are_reported_together() {
        let text = "rulez = 1\n[egress]\naddress = \"here\"\nwarm_connections = 65\n[vault]\naddress = \"http://vault:8200\"\n\
                    [exchange]\nspot = \"https://evil.example\"\nfutures = \"127.0.0.1\"\n[log]\nfilter = \"a=b=c\"";
        let problems = problems(text).join("\n");
        for part in [
            "rulez: is not a key of this section; its keys are: rules,",
            "egress.address: expected an IP address without a port, such as \"203.0.113.7\", got \"here\"",
            "egress.warm_connections: expected 0 to 64, got 65",
            "vault.address: expected https, or http on loopback, got http",
            "exchange.spot: signed requests would go to a host that is not KuCoin",
            "exchange.futures: expected a URL",
            "log.filter: expected",
        ] {
            assert!(problems.contains(part), "{part} is not in\n{problems}");
        }
    }

    #[test]
    fn memory_for_answers_holds_the_largest_answer() {
        let found = problems(
            "[egress]\naddress = \"203.0.113.7\"\nmax_answer_bytes = 70000\n[limits]\nanswer_bytes = 65536",
        );
        let expected = "line 5: limits.answer_bytes: expected at least egress.max_answer_bytes (70000), got 65536";
        let found: Vec<_> = found
            .iter()
            .filter(|p| p.contains("answer_bytes"))
            .collect();
        assert_eq!(found, [expected]);
        // The defaults grow with it.
        let found = problems("[egress]\naddress = \"203.0.113.7\"\nmax_answer_bytes = 268435456");
        assert!(
            !found.iter().any(|p| p.contains("answer_bytes")),
            "{found:?}"
        );
    }

    #[test]
    fn refusal_codes_are_checked_one_by_one() {
        let text = "[exchange]\nrefusal_codes = [\n  \"spot/margin/126099\",\n  \"spot/futures/1\",\n  \"futures/*/500000\",\n  \"300099\",\n]";
        let problems: Vec<_> = problems(text)
            .into_iter()
            .filter(|problem| problem.contains("refusal_codes"))
            .collect();
        assert_eq!(problems.len(), 3, "{problems:?}");
        for (problem, part) in problems.iter().zip([
            "line 4: exchange.refusal_codes[1]: \"futures\" is not a product of the spot host: expected * or one of account, ",
            "line 5: exchange.refusal_codes[2]: code 500000 cannot be a refusal code",
            "line 6: exchange.refusal_codes[3]: \"300099\" is not of the form host/product/code",
        ]) {
            assert!(problem.starts_with(part), "{problem}");
        }
        let text = "[exchange]\nrefusal_codes = \"spot/margin/126099\"";
        assert!(
            super::tests::problems(text)
                .iter()
                .any(|p| p.contains("exchange.refusal_codes: invalid type"))
        );
    }

    #[test]
    fn invalid_listener_address_is_refused_with_the_expected_form() {
        let cases = include_str!("../tests/field-cases/files/listen-addresses.txt");
        let cases = cases
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty());
        let mut number = 0;
        for case in cases {
            for key in ["grpc", "ops", "admin"] {
                let expected = format!(
                    "line 2: listen.{key}: expected an IP address and a port (0 to 65535), such as \"0.0.0.0:8443\" or \"[::]:8443\", got \"{case}\""
                );
                let problems = problems(&format!("[listen]\n{key} = \"{case}\""));
                assert!(problems.contains(&expected), "{problems:?}");
            }
            number += 1;
        }
        assert_eq!(number, 6);
        let problems = problems("[egress]\naddress = \"203.0.113.7:443\"\nexpected_ip = \"nat\"");
        for part in [
            "line 2: egress.address: expected an IP address without a port",
            "line 3: egress.expected_ip: expected an IP address",
        ] {
            assert!(
                problems.iter().any(|problem| problem.starts_with(part)),
                "{problems:?}"
            );
        }
    }

    #[test]
    fn vault_mount_that_ends_with_data_or_metadata_is_refused() {
        for (mount, bare) in [("kv/data", "kv"), ("team/kv/metadata", "team/kv")] {
            let problems = problems(&format!("[vault]\nmount = \"{mount}\""));
            let expected = format!(
                "line 2: vault.mount: expected the mount \"{bare}\", got the API path \"{mount}\""
            );
            assert!(problems.contains(&expected), "{problems:?}");
        }
        for mount in ["kv", "data", "data/kv"] {
            let problems = problems(&format!("[vault]\nmount = \"{mount}\""));
            assert!(
                !problems
                    .iter()
                    .any(|problem| problem.contains("vault.mount")),
                "{problems:?}"
            );
        }
    }

    #[test]
    fn signed_requests_go_only_to_kucoin_or_loopback_by_default() {
        for url in [
            "http://127.0.0.1:1",
            "http://localhost:1",
            "https://[::1]:1",
        ] {
            assert!(simulator(url, false).is_ok(), "{url}");
        }
        for url in [
            "http://10.0.0.1:1",
            "https://localhost.evil.example",
            "https://127.0.0.1.evil.example",
            "http://127.0.0.1:1/x",
            "ftp://127.0.0.1",
        ] {
            assert!(simulator(url, false).is_err(), "{url}");
        }
        assert!(simulator("https://mirror.example:8443", true).is_ok());
    }

    #[test]
    fn every_site_has_its_own_hosts() {
        let mut section = Section::parse("", "config", &Problems::default()).unwrap();
        let origins = origins(&mut section);
        let name = |site, host| {
            origins
                .get(&(site, host))
                .map(|origin: &Origin| origin.name.as_str())
        };
        assert_eq!(name(Site::Global, Host::Spot), Some("api.kucoin.com"));
        assert_eq!(
            name(Site::Au, Host::Futures),
            Some("api-futures.kucoin.com")
        );
        assert_eq!(name(Site::Eu, Host::Spot), Some("api.kucoin.eu"));
        assert_eq!(name(Site::Eu, Host::Futures), None);
        assert_eq!(name(Site::Tr, Host::Spot), Some("api.kucoin.tr"));
    }
}
