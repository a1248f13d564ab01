//! Log output and counters.

mod log_queue;

use std::borrow::Cow;
use std::error::Error;
use std::io;
use std::sync::LazyLock;
use std::time::Duration;

use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::time::Instant;
use tracing::Metadata;
use tracing_subscriber::filter::{EnvFilter, FilterExt, ParseError, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::base::lock::Mutex;
use crate::base::outcome::{Outcome, Reason};
use crate::base::text::{clean, clean_json};
use crate::kucoin::Scope;

use log_queue::LogQueue;

/// Crates whose logs are never written, whatever the configured filter: they log tokens, bodies, every failure twice, or
/// one line per frame that a peer sends.
const SILENCED: [&str; 6] = ["h2", "hyper", "hyper_util", "reqwest", "rustify", "vaultrs"];

/// Histogram buckets in seconds, from the time of a signature to that of a slow exchange.
const BUCKETS: [f64; 14] = [
    1e-6, 1e-5, 1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0,
];

/// How logs are written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// Plain text for people.
    Text,
}

/// Sends logs to stderr, and panics to the logs.
///
/// # Errors
/// When `filter` is not a filter such as `info,credbroker=debug`.
pub fn init_logs(filter: &str, format: LogFormat) -> Result<(), ParseError> {
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(LogWriter(format))
        // If stderr cannot be written, the subscriber would report that on stderr, panic and end the process.
        .log_internal_errors(false);
    let layer = match format {
        LogFormat::Json => layer
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .boxed(),
        LogFormat::Text => layer.with_ansi(false).boxed(),
    };
    let filter = log_filter(filter)?.and(filter_fn(is_not_silenced));
    // In tests, a second subscriber in one process is rejected; the first one stays.
    let _ = tracing_subscriber::registry()
        .with(layer.with_filter(filter))
        .try_init();
    std::panic::set_hook(Box::new(|panic| {
        // The message could contain secrets; the place is enough to find the cause.
        let (file, line) = panic.location().map(|at| (at.file(), at.line())).unzip();
        tracing::error!(code.file.path = file, code.line.number = line, "panic");
    }));
    Ok(())
}

/// The target of log lines with an audit line that could not be written: the only record of it.
const AUDIT: &str = "credbroker::audit";

/// How long to wait at the exit until the reader of stderr has taken all lines.
const FLUSH_WITHIN: Duration = Duration::from_secs(1);

/// The log lines of this process.
static LOG: LazyLock<LogQueue> = LazyLock::new(LogQueue::default);

/// Waits for the log when dropped, 1 s at most.
pub(crate) struct FlushLog;

impl Drop for FlushLog {
    fn drop(&mut self) {
        LOG.flush(FLUSH_WITHIN);
    }
}

/// Starts a thread that writes the log from now on: nothing else waits for the reader of stderr. A [`FlushLog`] must be
/// dropped before the process ends.
///
/// # Errors
/// When the system allows no more threads.
pub(crate) fn start_log_thread() -> io::Result<()> {
    LOG.start(|count| {
        tracing::warn!(
            count,
            "log lines dropped; the reader of stderr was too slow"
        );
    })
}

/// Writes a message to stderr in order with the log lines.
pub(crate) fn write_stderr(text: &str) {
    LOG.push(format!("{text}\n").as_bytes(), true);
}

/// Writes cleaned lines to stderr.
struct LogWriter(LogFormat);

impl MakeWriter<'_> for LogWriter {
    type Writer = CleanLines;

    fn make_writer(&self) -> CleanLines {
        CleanLines {
            format: self.0,
            is_audit: false,
        }
    }

    fn make_writer_for(&self, metadata: &Metadata<'_>) -> CleanLines {
        CleanLines {
            is_audit: metadata.target() == AUDIT,
            ..self.make_writer()
        }
    }
}

/// Writes one line.
struct CleanLines {
    format: LogFormat,
    is_audit: bool,
}

/// Characters of a log line in the text format.
const MAX_LINE_CHARS: usize = 16 * 1024;

impl io::Write for CleanLines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // The subscriber writes text, one complete line at a time.
        let text = match str::from_utf8(line) {
            Ok(text) => Cow::Borrowed(text),
            Err(_) => String::from_utf8_lossy(line),
        };
        let text = text.trim_end_matches('\n');
        let text = match self.format {
            LogFormat::Json => clean_json(text),
            LogFormat::Text => clean(text, MAX_LINE_CHARS),
        };
        LOG.push(format!("{text}\n").as_bytes(), self.is_audit);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Parses a filter such as `info,credbroker=debug`.
pub fn log_filter(filter: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::builder().parse(filter)
}

/// Whether the crate of a line or span is not silenced.
pub(crate) fn is_not_silenced(metadata: &Metadata<'_>) -> bool {
    let krate = metadata.target().split("::").next().unwrap_or_default();
    !SILENCED.contains(&krate)
}

/// An error and its causes in one line, outermost first.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}

/// Label names and values, all from closed sets.
pub(crate) type Labels<const N: usize> = [(&'static str, &'static str); N];

/// Counters of events. Gauges of the broker's state are computed at each scrape, see `ops/health.rs`.
#[derive(Debug, Default)]
pub struct Metrics {
    requests: Family<Labels<3>, Counter>,
    stages: Stages,
    pub(crate) certificates_refused: Counter,
    connections_refused: Family<Labels<1>, Counter>,
    pub(crate) connections_unused: Counter,
    pub(crate) admin_calls_refused: Family<Labels<1>, Counter>,
    vault_failures: Family<Labels<1>, Counter>,
    pub(crate) clock_failures: Counter,
    pub(crate) clock_jumps_refused: Counter,
    pub(crate) timestamps_refused: Counter,
    pub(crate) addresses_refused: Counter,
    pub(crate) credentials_refused: Counter,
    pub(crate) codes_unknown: Family<Labels<1>, Counter>,
    pub(crate) edge_blocks: Counter,
    pub(crate) rate_limited_by_exchange: Counter,
    pub(crate) weights_assumed: Counter,
    pub(crate) refusals_unrecorded: Counter,
    pub(crate) audit_failures: Counter,
    pub(crate) unresolved: Counter,
    orders_resolved: Family<Labels<1>, Counter>,
    pub(crate) reloads: Family<Labels<2>, Counter>,
    /// Unix time in seconds.
    pub(crate) certificate_not_after: Gauge,
    unauthenticated: Mutex<LogAllowance>,
}

/// How long each stage of an answered call took.
#[derive(Debug)]
struct Stages(Family<Labels<1>, Histogram, fn() -> Histogram>);

impl Default for Stages {
    fn default() -> Self {
        Self(Family::new_with_constructor(|| Histogram::new(BUCKETS)))
    }
}

/// Log lines about refused clients: a burst, then a number per second.
const UNAUTHENTICATED_LOGS: (f64, f64) = (200.0, 5.0);

/// How many lines may still be logged at the time `at`.
#[derive(Debug)]
struct LogAllowance {
    left: f64,
    at: Instant,
    suppressed: u64,
}

impl Default for LogAllowance {
    fn default() -> Self {
        let (left, at, suppressed) = (UNAUTHENTICATED_LOGS.0, Instant::now(), 0);
        Self {
            left,
            at,
            suppressed,
        }
    }
}

impl LogAllowance {
    /// If one more line may be written at `now`, returns how many were suppressed since the last one.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let (burst, per_second) = UNAUTHENTICATED_LOGS;
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * per_second).min(burst);
        self.at = now;
        if self.left < 1.0 {
            self.suppressed += 1;
            return None;
        }
        self.left -= 1.0;
        Some(std::mem::take(&mut self.suppressed))
    }
}

impl Metrics {
    /// Registers all counters. Each one exists from the start with 0: `increase()` would miss the first event of a new counter.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let help = "Bot calls that ended, by scope, outcome and reason";
        registry.register("requests", help, self.requests.clone());
        for scope in ["", "futures", "spot-margin", "unified"] {
            let answers = [Outcome::Accepted, Outcome::MaybeSent, Outcome::Rejected];
            let answers = answers.map(|outcome| (Some(outcome), ""));
            let failures = Reason::ALL.map(|reason| (reason.outcome(), reason.as_str()));
            // The answer to a read was dropped.
            let dropped = [(Some(Outcome::MaybeSent), Reason::Overloaded.as_str())];
            for (outcome, reason) in answers.into_iter().chain(failures).chain(dropped) {
                let outcome = ("outcome", outcome.map_or("", Outcome::as_str));
                let labels = [("scope", scope), outcome, ("reason", reason)];
                drop(self.requests.get_or_create(&labels));
            }
        }
        let help = "Duration of answered bot calls in seconds, by stage";
        registry.register("stage_duration_seconds", help, self.stages.0.clone());
        let help = "Refused connections of bots and admins, by reason";
        let family = self.connections_refused.clone();
        for reason in [
            "bot_limit",
            "certificate",
            "descriptors",
            "handshake",
            "limit",
        ] {
            drop(family.get_or_create(&[("reason", reason)]));
        }
        registry.register("connections_refused", help, family);
        let help = "Admin calls refused before they were executed, by reason";
        let family = self.admin_calls_refused.clone();
        for reason in [
            Reason::CallerUnknown,
            Reason::DeadlineExceeded,
            Reason::MethodUnknown,
            Reason::RequestMalformed,
        ] {
            drop(family.get_or_create(&[("reason", reason.as_str())]));
        }
        registry.register("admin_calls_refused", help, family);
        let help = "Failed Vault logins, failed key reads, unusable key versions in Vault, and evicted keys, by reason";
        let family = self.vault_failures.clone();
        for reason in ["evicted", "login", "outage", "unusable"] {
            drop(family.get_or_create(&[("reason", reason)]));
        }
        registry.register("vault_failures", help, family);
        let help = "State-changing requests that the exchange answered with an unknown code (outcome maybe_sent), by scope";
        let family = self.codes_unknown.clone();
        for scope in Scope::ALL {
            drop(family.get_or_create(&[("scope", scope.as_str())]));
        }
        registry.register("codes_unknown", help, family);
        let help = "Orders that may have been placed and were looked up, by what became of them";
        let family = self.orders_resolved.clone();
        for state in ["absent", "placed", "unknown"] {
            drop(family.get_or_create(&[("state", state)]));
        }
        registry.register("orders_resolved", help, family);
        let help = "Reloads of changed files, by file and outcome";
        let family = self.reloads.clone();
        for file in ["rules", "tls"] {
            for outcome in ["rejected", "reloaded"] {
                drop(family.get_or_create(&[("file", file), ("outcome", outcome)]));
            }
        }
        registry.register("reloads", help, family);
        let name = "certificate_not_after_timestamp_seconds";
        let help = "Unix time in seconds when the server certificate expires";
        registry.register(name, help, self.certificate_not_after.clone());

        let mut register = |name, help, counter: &Counter| {
            registry.register::<&str, &str>(name, help, counter.clone());
        };
        let help = "Client certificates refused in the TLS handshake or on an open connection";
        register("certificates_refused", help, &self.certificates_refused);
        let help =
            "Connections closed before their first byte, such as TCP checks of a load balancer";
        register("connections_unused", help, &self.connections_unused);
        let help = "Failed requests for the exchange time";
        register("clock_failures", help, &self.clock_failures);
        let help = "Measured exchange times that were ignored as implausible";
        register("clock_jumps_refused", help, &self.clock_jumps_refused);
        let help = "Answers of the exchange that reject a timestamp (code 400002)";
        register("timestamps_refused", help, &self.timestamps_refused);
        let help = "Answers of the exchange that reject the egress address (code 400006)";
        register("addresses_refused", help, &self.addresses_refused);
        let help = "Answers of the exchange that reject a key, passphrase or signature (codes 400003 to 400005)";
        register("credentials_refused", help, &self.credentials_refused);
        let help = "Refused calls that were counted but not audited, because the same bot or admin had too many refusals";
        register("refusals_unrecorded", help, &self.refusals_unrecorded);
        let help = "Log lines dropped because the reader of stderr was too slow";
        register("log_lines_dropped", help, &LOG.dropped);
        let help =
            "Failed writes, flushes and reopenings of the audit log, and failures of its reserve";
        register("audit_failures", help, &self.audit_failures);
        let help = "Requests whose results an earlier run did not have when it ended";
        register("requests_unresolved", help, &self.unresolved);
        self.register_limits(registry);
    }

    fn register_limits(&self, registry: &mut Registry) {
        let mut register = |name, help, counter: &Counter| {
            registry.register::<&str, &str>(name, help, counter.clone());
        };
        let help = "Times that the exchange has blocked the egress address for too many requests";
        register("edge_blocks", help, &self.edge_blocks);
        let help = "Answers of the exchange that reject a request for its rate limit (code 429000)";
        let rejected = &self.rate_limited_by_exchange;
        register("rate_limited_by_exchange", help, rejected);
        let help = "Requests whose weight KuCoin does not publish, so that it was assumed";
        register("weights_assumed", help, &self.weights_assumed);
    }

    /// Counts a call that has ended.
    pub(crate) fn request(
        &self,
        scope: Option<Scope>,
        outcome: Option<Outcome>,
        reason: Option<Reason>,
    ) {
        let labels = [
            ("scope", scope.map_or("", Scope::as_str)),
            ("outcome", outcome.map_or("", Outcome::as_str)),
            ("reason", reason.map_or("", Reason::as_str)),
        ];
        self.requests.get_or_create(&labels).inc();
    }

    /// Records how long a stage of an answered call took.
    pub(crate) fn stage(&self, stage: &'static str, took: Duration) {
        let stage = self.stages.0.get_or_create(&[("stage", stage)]);
        stage.observe(took.as_secs_f64());
    }

    /// Counts an order that was looked up: `absent`, `placed` or `unknown`.
    pub(crate) fn order_resolved(&self, state: &'static str) {
        let labels = [("state", state)];
        self.orders_resolved.get_or_create(&labels).inc();
    }

    /// If one more line about a refused client may be logged, returns how many were suppressed since the last one. Clients
    /// can cause such lines without limit, and the lines must not fill the disk, which every order needs.
    pub(crate) fn allow_log(&self) -> Option<u64> {
        let mut unauthenticated = self.unauthenticated.lock();
        unauthenticated.take(Instant::now())
    }

    /// Counts a refused connection: `handshake`, `certificate`, `descriptors`, `bot_limit` (the bot has too many) or `limit`
    /// (far too many, or all bots together have too many).
    pub(crate) fn connection_refused(&self, reason: &'static str) {
        let labels = [("reason", reason)];
        self.connections_refused.get_or_create(&labels).inc();
    }

    /// Counts a failure with Vault or a key in it: `outage`, `login`, `unusable` or `evicted`.
    pub(crate) fn vault_failure(&self, reason: &'static str) {
        let labels = [("reason", reason)];
        self.vault_failures.get_or_create(&labels).inc();
    }
}

/// The text format of metrics.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum MetricsFormat {
    /// OpenMetrics 1.0.0.
    OpenMetrics,
    /// The text format of Prometheus, 0.0.4.
    Text,
}

impl MetricsFormat {
    /// Its `Content-Type`.
    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// The current values of `registry`.
    pub(crate) fn text(self, registry: &Registry) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode_registry(&mut text, registry);
        match self {
            Self::OpenMetrics => text + "# EOF\n",
            Self::Text => as_text_format(text),
        }
    }

    /// The format that an `Accept` header requests: OpenMetrics if it is named and no other format is preferred.
    ///
    /// Source: RFC 9110, section 12.5.1; a range without `q` has weight 1.
    pub(crate) fn accepted(accept: &str) -> Self {
        let (mut open_metrics, mut text): (f32, f32) = (0.0, 0.0);
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
            let (mut weight, mut version) = (1.0, None);
            for (name, value) in parts.filter_map(|part| part.split_once('=')) {
                match name.to_ascii_lowercase().as_str() {
                    "q" => weight = value.parse().unwrap_or(0.0),
                    "version" => version = Some(value.trim_matches('"')),
                    _ => {}
                }
            }
            match (kind.as_str(), version) {
                ("application/openmetrics-text", None | Some("1.0.0")) => {
                    open_metrics = open_metrics.max(weight);
                }
                ("text/plain", None | Some("0.0.4")) | ("text/*" | "*/*", _) => {
                    text = text.max(weight);
                }
                _ => {}
            }
        }
        if open_metrics > 0.0 && open_metrics >= text {
            Self::OpenMetrics
        } else {
            Self::Text
        }
    }
}

/// Converts OpenMetrics to the text format, in which HELP and TYPE of a counter have the suffix `_total`.
///
/// Source: Prometheus documentation, "Exposition formats", and OpenMetrics 1.0.0, "Counter".
fn as_text_format(mut text: String) -> String {
    let counters: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .map(str::to_owned)
        .collect();
    for name in counters {
        for kind in ["# HELP", "# TYPE"] {
            text = text.replace(&format!("{kind} {name} "), &format!("{kind} {name}_total "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_text_unless_open_metrics_is_requested() {
        use MetricsFormat::{OpenMetrics, Text};
        for (accept, format) in [
            ("", Text),
            ("*/*", Text),
            ("text/plain", Text),
            ("text/plain;version=0.0.4", Text),
            ("text/html,application/xhtml+xml,*/*;q=0.8", Text),
            ("application/openmetrics-text", OpenMetrics),
            (
                "Application/OpenMetrics-Text; Version=\"1.0.0\"",
                OpenMetrics,
            ),
            ("application/openmetrics-text;version=0.0.1", Text),
            ("application/openmetrics-text;q=0", Text),
            ("application/openmetrics-text;q=0.2,text/plain;q=0.9", Text),
            // Prometheus 2.49 and 3.5.
            (
                "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                OpenMetrics,
            ),
            (
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
                OpenMetrics,
            ),
        ] {
            assert_eq!(MetricsFormat::accepted(accept), format, "{accept}");
        }
    }

    #[test]
    fn unauthenticated_peers_get_two_hundred_log_lines_and_then_five_per_second() {
        let mut unauthenticated = LogAllowance::default();
        let start = unauthenticated.at;
        let mut logged = |seconds| {
            let now = start + Duration::from_secs(seconds);
            let lines: Vec<_> = (0..1000)
                .filter_map(|_| unauthenticated.take(now))
                .collect();
            (lines.len(), lines.iter().sum::<u64>())
        };
        assert_eq!(logged(0), (200, 0));
        assert_eq!(logged(1), (5, 800), "with the suppressed lines");
        assert_eq!(logged(1), (0, 0));
        assert_eq!(logged(3600), (200, 1995));
    }
}
