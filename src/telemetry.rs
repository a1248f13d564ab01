//! Log subscriber and metric names.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tracing::Metadata;
use tracing_subscriber::filter::{EnvFilter, FilterExt, LevelFilter, ParseError, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::kucoin::Scope;
use crate::outcome::{Outcome, Reason};

/// The most that these crates may say, whatever the configuration asks for: they log tokens, bodies, or every failure
/// twice.
const SILENCED: [(&str, LevelFilter); 6] = [
    ("h2", LevelFilter::WARN),
    ("hyper", LevelFilter::WARN),
    ("hyper_util", LevelFilter::WARN),
    ("reqwest", LevelFilter::OFF),
    ("rustify", LevelFilter::OFF),
    ("vaultrs", LevelFilter::OFF),
];

/// Seconds: from a signature to an exchange that is slow.
const BUCKETS: [f64; 14] = [
    1e-6, 1e-5, 1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0,
];

/// How logs are written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// For people.
    Text,
}

/// Sends logs to stderr, and panics to the logs.
///
/// # Errors
/// When `filter` is not a filter such as `info,credbroker=debug`.
pub fn init_logs(filter: &str, format: LogFormat) -> Result<(), ParseError> {
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        // Its complaint about a stderr that cannot be written goes to stderr: that would panic, and end the process.
        .log_internal_errors(false);
    let layer = match format {
        LogFormat::Json => layer
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .boxed(),
        LogFormat::Text => layer.with_ansi(false).boxed(),
    };
    let filter = log_filter(filter)?.and(filter_fn(may_speak));
    // A second subscriber in one process (tests) is refused; the first one stays.
    let _ = tracing_subscriber::registry()
        .with(layer.with_filter(filter))
        .try_init();
    std::panic::set_hook(Box::new(|panic| {
        // The message could hold anything; the place is enough to find it.
        let place = panic
            .location()
            .map(ToString::to_string)
            .unwrap_or_default();
        tracing::error!(place, "panic");
    }));
    Ok(())
}

/// Reads a filter such as `info,credbroker=debug`.
pub fn log_filter(filter: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::builder().parse(filter)
}

/// Whether a line or span may be written at all.
pub fn may_speak(metadata: &Metadata<'_>) -> bool {
    let speaker = metadata.target().split("::").next().unwrap_or_default();
    let limit = SILENCED.iter().find(|(silenced, _)| *silenced == speaker);
    limit.is_none_or(|(_, most)| metadata.level() <= most)
}

/// An error and its causes in one line, outermost first.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}

/// All metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    stages: Family<StageLabels, Histogram, fn() -> Histogram>,
    certificates_refused: Counter,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct RequestLabels {
    scope: Word,
    outcome: Word,
    reason: Word,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct StageLabels {
    stage: Word,
}

/// A label value from a closed set.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Word(&'static str);

impl EncodeLabelValue for Word {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        EncodeLabelValue::encode(&self.0, encoder)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("credbroker");
        let requests = Family::default();
        let stages =
            Family::new_with_constructor((|| Histogram::new(BUCKETS)) as fn() -> Histogram);
        let certificates_refused = Counter::default();
        registry.register(
            "requests",
            "Calls of bots by how they ended",
            requests.clone(),
        );
        registry.register(
            "stage_duration_seconds",
            "Where the time of answered calls went",
            stages.clone(),
        );
        registry.register(
            "certificates_refused",
            "Client certificates refused in the TLS handshake",
            certificates_refused.clone(),
        );
        Self {
            registry,
            requests,
            stages,
            certificates_refused,
        }
    }
}

impl Metrics {
    /// Counts a call that ended.
    pub fn request(&self, scope: Option<Scope>, outcome: Outcome, reason: Option<Reason>) {
        let labels = RequestLabels {
            scope: Word(scope.map_or("", Scope::as_str)),
            outcome: Word(outcome.as_str()),
            reason: Word(reason.map_or("", Reason::as_str)),
        };
        self.requests.get_or_create(&labels).inc();
    }

    /// Observes how long a stage of an answered call took.
    pub fn stage(&self, stage: &'static str, took: Duration) {
        let labels = StageLabels { stage: Word(stage) };
        self.stages
            .get_or_create(&labels)
            .observe(took.as_secs_f64());
    }

    /// Counts a refused client certificate.
    pub fn certificate_refused(&self) {
        self.certificates_refused.inc();
    }

    /// Text for Prometheus.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
