//! Local files: rules, certificates, audit log, state folder.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Access, access, statvfs};
use rustls::RootCertStore;
use x509_parser::time::ASN1Time;

use crate::base::diagnosis::Diagnosis;
use crate::base::pem;
use crate::base::toml_file::{Problem, Problems};
use crate::cli::text::counted;
use crate::config::load::{self, Source, TlsSources};
use crate::config::permissions::{self, NamedFile};
use crate::config::{Config, Roots};
use crate::policy::Policy;
use crate::restrictions::{Counts, Restrictions, RestrictionsError};
use crate::server::identity::not_after_ms;
use crate::server::{is_locked, missing_parent};
use crate::vault::Auth;

/// A certificate that expires within so many days causes a warning.
const WARN_DAYS: i64 = 30;

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// Less free space causes a warning; the audit log grows by about 1 kB per call.
const WARN_FREE: u64 = 1 << 30;

/// Less free space is a failure: it may last only for minutes of trading.
const LEAST_FREE: u64 = 64 << 20;

/// Problems and likely mistakes in the rules; and the rules, if they are valid.
pub(super) fn rules(file: &Path) -> (Vec<Diagnosis>, Option<Policy>) {
    let name = file.display();
    let check = format!("then run `credbroker policy check {name}` to check");
    match load::rules(&Source::read(file)) {
        Ok(policy) => {
            let (bots, grants) = policy.counts();
            let accounts = policy.accounts().count();
            let counts = format!(
                "{name}: {}, {}, {}",
                counted(accounts, "account"),
                counted(bots, "bot"),
                counted(grants, "grant")
            );
            let mut lines = vec![Diagnosis::ok("rules", counts)];
            lines.extend(policy.warnings().into_iter().map(|warning| {
                let warning = warning.in_file(file).to_string();
                let fix = format!("if it is not intended, correct it, {check}");
                Diagnosis::warning("rules", warning, fix)
            }));
            (lines, Some(policy))
        }
        Err(problems) => {
            let failed = |problem: &Problem| {
                Diagnosis::failed("rules", problem.to_string(), format!("correct it, {check}"))
            };
            (problems.iter().map(failed).collect(), None)
        }
    }
}

/// The fix for a CA that expires.
const FIX_CA: &str = "add a new CA to the same file, and issue new certificates from it";

/// The fix for a certificate of the broker that expires.
const FIX_OWN: &str =
    "install a new certificate and its key; a running broker loads them without a restart";

/// The server certificate, the CAs of bots and admins, and the client certificate for Vault.
pub(super) fn certificates(config: &Config, now_ms: i64) -> Vec<Diagnosis> {
    let problems = Problems::default();
    load::certificates(&TlsSources::read(&config.tls), now_ms, &problems);
    let mut files = vec![
        (
            ["tls.certificate", "tls.key"],
            "server",
            FIX_OWN,
            &config.tls.certificate,
        ),
        (
            ["tls.client_ca", ""],
            "bots' CA",
            FIX_CA,
            &config.tls.client_ca,
        ),
    ];
    if let Some(admin_ca) = &config.tls.admin_ca {
        files.push((["tls.admin_ca", ""], "admins' CA", FIX_CA, admin_ca));
    }
    if let Auth::Cert {
        certificate, key, ..
    } = &config.vault.auth
    {
        let names = ["vault.auth.certificate", "vault.auth.key"];
        load::pair(
            names,
            &Source::read(certificate),
            &Source::read(key),
            &problems,
        );
        files.push((names, "Vault client", FIX_OWN, certificate));
    }
    let warnings = problems.take_warnings();
    let problems = problems.into_result().err().unwrap_or_default();
    let lines = files.into_iter().flat_map(|(keys, about, fix, file)| {
        let of_file = |problem: &&Problem| keys.contains(&problem.key.as_str());
        let mut failed: Vec<_> = problems
            .iter()
            .filter(of_file)
            .map(|problem| {
                let fix = "install the right files; a running broker loads them without a restart";
                Diagnosis::failed("certificate", problem.to_string(), fix).about(about)
            })
            .collect();
        if failed.is_empty() {
            failed.push(expiry(about, fix, expires_ms(file), now_ms));
        }
        let of_file = |warning: &&Problem| keys.contains(&warning.key.as_str());
        failed.extend(warnings.iter().filter(of_file).map(ca_warning));
        failed
    });
    lines.collect()
}

/// A CA whose name constraints make the TLS library refuse its certificates, or a certificate that was ignored because it
/// is not a CA.
fn ca_warning(warning: &Problem) -> Diagnosis {
    let fix = "correct the file, then run `credbroker check-config` to check";
    Diagnosis::warning("certificate", warning.to_string(), fix)
}

/// Files that other users must not be able to read or change.
pub(super) fn permissions(config: &Config) -> Vec<Diagnosis> {
    let (check, files) = ("permissions", permissions::files(config));
    let exposed = files.iter().filter_map(NamedFile::check);
    let mut lines: Vec<_> = exposed
        .map(|file| Diagnosis::failed(check, file.to_string(), file.fix()).about(file.key()))
        .collect();
    if lines.is_empty() {
        lines.push(Diagnosis::ok(check, "file permissions are correct"));
    }
    lines
}

/// When the first certificate of a file expires: Unix time in milliseconds.
fn expires_ms(file: &Path) -> Option<i64> {
    let certificates = pem::certificates(&std::fs::read(file).ok()?).ok()?;
    certificates.iter().filter_map(not_after_ms).min()
}

/// Whether a certificate has expired or expires soon.
pub(super) fn expiry(about: &str, fix: &str, expires_ms: Option<i64>, now_ms: i64) -> Diagnosis {
    let check = "certificate";
    let Some(expires_ms) = expires_ms else {
        return Diagnosis::failed(check, "not an X.509 certificate", fix).about(about);
    };
    let (day, days) = (date(expires_ms), (expires_ms - now_ms) / DAY_MS);
    if expires_ms <= now_ms {
        Diagnosis::failed(check, format!("expired on {day}"), fix).about(about)
    } else if days < WARN_DAYS {
        let in_days = usize::try_from(days).unwrap_or_default();
        let detail = format!("expires on {day}, in {}", counted(in_days, "day"));
        Diagnosis::warning(check, detail, fix).about(about)
    } else {
        Diagnosis::ok(check, format!("valid until {day} ({days} days)")).about(about)
    }
}

/// Year, month and day.
fn date(ms: i64) -> String {
    match ASN1Time::from_timestamp(ms / 1000) {
        Ok(time) => time.to_datetime().date().to_string(),
        Err(_) => "a date out of range".to_owned(),
    }
}

/// Reads the CAs. Where they cannot be read, the store is empty and a line reports it.
pub(super) fn roots(key: &str, roots: &Roots) -> (RootCertStore, Vec<Diagnosis>) {
    let problems = Problems::default();
    if let Some(roots) = load::roots(key, roots, &problems) {
        let warnings = problems.take_warnings();
        return (roots, warnings.iter().map(ca_warning).collect());
    }
    let problems = problems.into_result().err().unwrap_or_default();
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    let fix = format!("put the CA's certificate into that file, or correct {key}");
    let line = Diagnosis::failed("certificate", problems.join("; "), fix);
    // An empty store trusts no server.
    (RootCertStore::empty(), vec![line])
}

/// The audit log: whether it can be written, and how much disk space is free. Returns an error if doctor cannot write it.
pub(super) fn audit(config: &Config) -> (Vec<Diagnosis>, Result<(), String>) {
    let (file, check) = (&config.audit_file, "audit");
    let name = file.display();
    let folder = file.parent().unwrap_or(Path::new("/"));
    let fix = "let the broker's user create and write the file, and run doctor as that user; or correct audit.file";
    let (state, writable) = match OpenOptions::new().read(true).append(true).open(file) {
        Ok(_) => (format!("{name} is writable"), Ok(())),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !folder.exists() => {
            let reason = format!("the folder of {name} does not exist yet");
            let fix = "if that folder is state_dir, start the broker, which creates it; otherwise create it, with access for \
                       the broker's user only";
            let line = Diagnosis::warning(check, &reason, fix);
            return (vec![line], Err(reason));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // Created by another user, the file would not be writable for the broker.
            let writable = match (
                access(folder, Access::WRITE_OK | Access::EXEC_OK),
                is_ours(folder),
            ) {
                (Err(error), _) => Err(format!(
                    "the folder of {name} cannot be written: {}",
                    io::Error::from(error)
                )),
                (Ok(()), false) => Err(format!(
                    "{name} does not exist yet and must be created by the broker's user; doctor runs as another user"
                )),
                (Ok(()), true) => Ok(()),
            };
            (
                format!("{name} does not exist yet and can be created"),
                writable,
            )
        }
        Err(error) => {
            let reason = format!("{name} cannot be written: {error}");
            return (vec![Diagnosis::failed(check, &reason, fix)], Err(reason));
        }
    };
    if let Err(reason) = writable {
        return (vec![Diagnosis::failed(check, &reason, fix)], Err(reason));
    }
    let line = match statvfs(folder) {
        Ok(disk) if disk.f_blocks > 0 => {
            let room = disk.f_bavail.saturating_mul(disk.f_frsize);
            let full = 100 - disk.f_bavail.saturating_mul(100) / disk.f_blocks;
            free_space(&name.to_string(), &state, room, full)
        }
        Ok(_) => Diagnosis::ok(check, state),
        Err(error) => {
            let error = io::Error::from(error);
            let detail = format!("{state}; cannot check the free disk space: {error}");
            Diagnosis::warning(check, detail, "check it with `df`")
        }
    };
    (vec![line], Ok(()))
}

/// The line about an audit log that can be written, on a disk that is `full` percent full and has `room` bytes free. Too
/// little space is the problem, so the line begins with it.
fn free_space(name: &str, state: &str, room: u64, full: u64) -> Diagnosis {
    let check = "audit";
    let disk = format!("the disk is {full} % full, {} free", bytes(room));
    let fix = "free disk space, or move the audit log (audit.file)";
    if room < LEAST_FREE {
        Diagnosis::failed(check, format!("{disk}: {name}"), fix)
    } else if room < WARN_FREE {
        Diagnosis::warning(check, format!("{disk}: {name}"), fix)
    } else {
        Diagnosis::ok(check, format!("{state}; {disk}"))
    }
}

fn bytes(number: u64) -> String {
    match number >> 20 {
        mib @ 0..2048 => format!("{mib} MiB"),
        mib => format!("{} GiB", mib >> 10),
    }
}

/// Whether a folder belongs to the current user.
fn is_ours(folder: &Path) -> bool {
    folder
        .metadata()
        .is_ok_and(|metadata| metadata.uid() == rustix::process::geteuid().as_raw())
}

/// Whether a broker is using the state folder; false if that cannot be checked.
pub(super) fn is_running(config: &Config) -> bool {
    is_locked(&config.state_dir).unwrap_or(false)
}

/// The fix where only the memory of the running broker has the restrictions. Lifting a block that does not exist changes
/// nothing, but writes the whole file.
const FIX_LOST: &str = "do not restart the broker. Run `credbroker bots unblock BOT` with the name of a bot that is not blocked: this \
                        changes no block and makes the broker write the whole file again. Then run `credbroker doctor` to check";

/// The state folder: whether it can be used, its restrictions, and whether a running broker is using it. `command`: how
/// doctor was called.
pub(super) fn state(config: &Config, command: &str) -> (Vec<Diagnosis>, bool) {
    let (folder, check) = (&config.state_dir, "state");
    let name = folder.display();
    let usable =
        "make it a folder that only the broker's user can read and write, or correct state_dir";
    let metadata = match folder.metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = missing_parent(folder) {
                let detail = format!(
                    "cannot create {name}: its parent {} does not exist",
                    parent.display()
                );
                let fix = "mount the disk, create the parent, or correct state_dir";
                return (vec![Diagnosis::failed(check, detail, fix)], false);
            }
            let detail = format!("{name} does not exist; the broker creates it when it starts");
            let fix = "start the broker. If it has run before, first check that state_dir is correct and its disk is mounted: \
                       otherwise it starts without the existing restrictions.json, and no block, halt or revocation applies";
            return (vec![Diagnosis::warning(check, detail, fix)], false);
        }
        Err(error) => {
            let detail = format!("{name} cannot be used: {error}");
            return (vec![Diagnosis::failed(check, detail, usable)], false);
        }
    };
    let mut lines = Vec::new();
    if !is_ours(folder) {
        let (owner, me) = (metadata.uid(), rustix::process::geteuid().as_raw());
        let detail = format!(
            "{name} belongs to user {owner}, but doctor runs as user {me}: its access checks may not apply to the broker"
        );
        let fix = format!("run doctor as the broker's user: `sudo -u '#{owner}' {command}`");
        lines.push(Diagnosis::warning(check, detail, fix));
    }
    if metadata.mode() & 0o022 != 0 {
        let detail = format!(
            "other users can write to {name} and could remove blocks, halts and revocations"
        );
        lines.push(Diagnosis::failed(
            check,
            detail,
            format!("run `chmod 700 {name}`"),
        ));
    }
    if let Err(error) = access(folder, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK) {
        let detail = format!("{name} cannot be used: {}", io::Error::from(error));
        lines.push(Diagnosis::failed(check, detail, usable));
    }
    let is_running = match is_locked(folder) {
        Ok(is_running) => is_running,
        Err(error) => {
            let detail = format!("cannot check whether a broker is using {name}: {error}");
            let fix = "run doctor as the broker's user";
            lines.push(Diagnosis::warning(check, detail, fix));
            false
        }
    };
    let user = if is_running {
        "a broker is using it"
    } else {
        "no broker is using it"
    };
    lines.push(match Restrictions::open(folder) {
        Ok(restrictions) if !restrictions.was_found() && is_running => {
            let detail = format!(
                "{name}: {user}; its restrictions.json is missing: the broker has the blocks, halts and revocations only in memory, and a \
                 restart would drop them"
            );
            Diagnosis::failed(check, detail, FIX_LOST)
        }
        Ok(restrictions) if !restrictions.was_found() => {
            let detail = format!("{name}: {user}; it holds no restrictions.json");
            let fix = "start the broker, which creates it. If a broker has run here before, first check that state_dir is correct and its \
                       disk is mounted: all blocks, halts and revocations were in that file";
            Diagnosis::warning(check, detail, fix)
        }
        Ok(restrictions) => restrictions_line(&format!("{name}: {user}"), restrictions.counts()),
        Err(RestrictionsError::Unreadable { file, problem }) => {
            let detail = format!("{file} cannot be read, and the broker will not start: {problem}");
            let fix = "restore it from a backup; delete it only if you know that no bot is blocked, no account is halted and no key is \
                       revoked: without the file, no block, halt or revocation applies";
            Diagnosis::failed(check, detail, fix)
        }
        Err(error) => Diagnosis::failed(check, error.to_string(), usable),
    });
    (lines, is_running)
}

/// The restrictions. A halt is a warning, because it stops trading.
fn restrictions_line(folder: &str, counts: Counts) -> Diagnosis {
    let Counts {
        blocked_bots,
        halted_accounts,
        is_all_halted,
        revoked_keys,
    } = counts;
    if counts == Counts::default() {
        return Diagnosis::ok("state", format!("{folder}; no restrictions"));
    }
    let mut parts = Vec::new();
    if is_all_halted {
        parts.push("all accounts halted".to_owned());
    }
    for (number, thing, state) in [
        (halted_accounts, "account", "halted individually"),
        (blocked_bots, "bot", "blocked"),
        (revoked_keys, "key", "revoked"),
    ] {
        if number > 0 {
            parts.push(format!("{} {state}", counted(number, thing)));
        }
    }
    let detail = format!("{folder}; {}", parts.join(", "));
    if is_all_halted || halted_accounts > 0 {
        let fix = "to end a halt, run `credbroker resume --all` or `credbroker resume ACCOUNT`; `credbroker keys list` shows \
                   halted accounts";
        Diagnosis::warning("state", detail, fix)
    } else {
        Diagnosis::ok("state", detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_about_a_full_disk_begins_with_the_disk() {
        let (name, state) = ("/state/audit.jsonl", "/state/audit.jsonl is writable");
        let line = |room, full| {
            let line = free_space(name, state, room, full);
            (line.severity.as_str(), line.cause)
        };
        let full = "the disk is 100 % full, 0 MiB free: /state/audit.jsonl";
        assert_eq!(line(0, 100), ("failed", full.to_owned()));
        let nearly = "the disk is 99 % full, 1023 MiB free: /state/audit.jsonl";
        assert_eq!(line(WARN_FREE - 1, 99), ("warning", nearly.to_owned()));
        let enough = "/state/audit.jsonl is writable; the disk is 50 % full, 2 GiB free";
        assert_eq!(line(2 * WARN_FREE, 50), ("ok", enough.to_owned()));
    }
}
