//! The process: a running broker by what it tells, and what one started from here could have.

use crate::base::diagnosis::Diagnosis;
use crate::cli::health::{ask, from_here};
use crate::config::Config;
use crate::process::Hardened;

/// Whether the broker that runs is ready, and whether its memory, or that of one started like this, is locked.
pub(super) fn lines(config: &Config, is_running: bool, hardened: &Hardened) -> Vec<Diagnosis> {
    let lock = "set LimitMEMLOCK=infinity (systemd) or --ulimit memlock=-1 (containers), or run without swap";
    if !is_running {
        return vec![if hardened.is_locked {
            Diagnosis::ok(
                "memory",
                "a broker started like this locks its memory, out of swap",
            )
        } else {
            let detail = "a broker started like this cannot lock its memory: keys could be swapped out. A service may \
                          have other limits than this shell";
            Diagnosis::warning("memory", detail, lock)
        }];
    }
    let address = from_here(config.ops);
    if address.port() == 0 {
        let detail = "a broker runs, and listen.ops names no port, so it cannot be asked";
        let fix = "write a port into listen.ops";
        return vec![Diagnosis::warning("broker", detail, fix)];
    }
    let address = address.to_string();
    let unasked = |error: String| {
        let detail =
            format!("a broker runs, and cannot be asked at listen.ops, http://{address}: {error}");
        let fix = "has it been started with this configuration? Its log line \"listening\" names the address";
        Diagnosis::failed("broker", detail, fix)
    };
    let metrics = match ask(&address, "/metrics") {
        Ok((200, metrics)) => metrics,
        Ok((status, _)) => return vec![unasked(format!("it answered {status}"))],
        Err(error) => return vec![unasked(error.to_string())],
    };
    let mut lines = vec![match ask(&address, "/readyz") {
        Ok((200, _)) => Diagnosis::ok("broker", "runs, and is ready"),
        Ok((_, reasons)) => {
            let reasons: Vec<_> = reasons.lines().skip(1).collect();
            let detail = format!("runs, and is not ready: {}", reasons.join("; "));
            let fix = "`credbroker health --ready` tells when it is; what is wrong stands in the other lines";
            Diagnosis::failed("broker", detail, fix)
        }
        Err(error) => unasked(error.to_string()),
    }];
    let gauge = |name: &str| {
        let mut lines = metrics.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
    };
    let is_one = |name| gauge(name) == Some("1");
    let state = (
        is_one("credbroker_undumpable"),
        is_one("credbroker_memory_locked"),
    );
    lines.push(match state {
        (true, true) => Diagnosis::ok("memory", "the running broker's is locked, out of swap"),
        (true, false) => {
            let detail = "the running broker's is not locked: keys could be swapped out";
            Diagnosis::warning("memory", detail, lock)
        }
        (false, _) => {
            let detail = "the running broker's can be read: the system refuses to switch dumps off";
            Diagnosis::failed("memory", detail, "its log says what the system refuses")
        }
    });
    lines
}
