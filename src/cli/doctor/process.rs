//! The process: readiness, memory and open files of a running broker, or whether a broker started from this shell could lock
//! its memory and open enough files.

use crate::base::diagnosis::Diagnosis;
use crate::cli::health::{ask, from_here};
use crate::config::Config;
use crate::ops::health::RELOAD_FAILED;
use crate::process::Hardened;
use crate::server::descriptors::Shortage;

/// Checks a running broker's readiness, memory and open files; without one, whether a broker started from this shell could lock
/// its memory and open enough files.
pub(super) fn lines(config: &Config, is_running: bool, hardened: &Hardened) -> Vec<Diagnosis> {
    let fix_lock =
        "set LimitMEMLOCK=infinity (systemd) or --ulimit memlock=-1 (containers), or disable swap";
    if !is_running {
        let memory = if hardened.is_locked {
            Diagnosis::ok(
                "memory",
                "a broker started from this shell can lock its memory (keys never reach swap)",
            )
        } else {
            let detail = "a broker started from this shell cannot lock its memory, and keys could be swapped to disk; a \
                          service may have other limits";
            Diagnosis::warning("memory", detail, fix_lock)
        };
        let who = "a broker started from this shell";
        let descriptors = descriptors(config, hardened.descriptors, who);
        return [memory].into_iter().chain(descriptors).collect();
    }
    let address = from_here(config.ops);
    if address.port() == 0 {
        let detail = "a broker is running, but cannot be checked: listen.ops has port 0";
        let fix = "set a fixed port in listen.ops";
        return vec![Diagnosis::warning("broker", detail, fix)];
    }
    let address = address.to_string();
    let unreachable = |error: String| {
        let detail = format!(
            "a broker is running, but a request to listen.ops (http://{address}) failed: {error}"
        );
        let fix = "check that it was started with this configuration; its log line \"listening\" has the address";
        Diagnosis::failed("broker", detail, fix)
    };
    let metrics = match ask(&address, "/metrics") {
        Ok((200, metrics)) => metrics,
        Ok((status, _)) => return vec![unreachable(format!("HTTP status {status}"))],
        Err(error) => return vec![unreachable(error.to_string())],
    };
    let mut lines = vec![match ask(&address, "/readyz") {
        Ok((200, _)) => Diagnosis::ok("broker", "running and ready"),
        Ok((_, reasons)) => {
            let reasons: Vec<_> = reasons.lines().skip(1).collect();
            let detail = format!("running, but not ready: {}", reasons.join("; "));
            let fix = "fix the problems in the other lines, then run `credbroker health --ready` to check";
            Diagnosis::failed("broker", detail, fix)
        }
        Err(error) => unreachable(error.to_string()),
    }];
    lines.extend(rejected_files(&address));
    let gauge = |name: &str| {
        let mut lines = metrics.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
    };
    let is_one = |name| gauge(name) == Some("1");
    let descriptors = gauge("process_max_fds")
        .and_then(|number| number.parse().ok())
        .and_then(|number| descriptors(config, number, "the running broker"));
    let state = (
        is_one("credbroker_undumpable"),
        is_one("credbroker_memory_locked"),
    );
    lines.push(match state {
        (true, true) => Diagnosis::ok(
            "memory",
            "the running broker's memory is locked (keys never reach swap)",
        ),
        (true, false) => {
            let detail =
                "the running broker's memory is not locked, and keys could be swapped to disk";
            Diagnosis::warning("memory", detail, fix_lock)
        }
        (false, _) => {
            let detail =
                "the running broker's memory is not protected: it could not disable core dumps";
            let fix = "see \"cannot disable core dumps\" in its log for the error";
            Diagnosis::failed("memory", detail, fix)
        }
    });
    lines.extend(descriptors);
    lines
}

/// A warning if a process that may have `number` files open cannot have as many connections as the configuration allows.
fn descriptors(config: &Config, number: u64, who: &str) -> Option<Diagnosis> {
    let shortage = Shortage::find(&config.admission_limits, number)?;
    let detail = format!("{who} {}", shortage.cause());
    Some(Diagnosis::warning("descriptors", detail, shortage.fix()))
}

/// Changed files that the running broker has rejected. It stays ready with their previous content, and doctor's other lines
/// are about the files as they are now.
fn rejected_files(address: &str) -> Vec<Diagnosis> {
    // A broker that cannot be reached has a line already.
    let Ok((_, text)) = ask(address, "/readyz?verbose") else {
        return Vec::new();
    };
    let fix = "correct the file; the broker then loads it within a few seconds, without a restart";
    let rejected = text.lines().filter(|line| line.contains(RELOAD_FAILED));
    rejected
        .map(|line| Diagnosis::warning("broker", format!("running, but {line}"), fix))
        .collect()
}
