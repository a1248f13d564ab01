//! The files of this machine: rules, certificates, audit log, state folder.

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

/// Time enough to get a certificate without haste.
const WARN_DAYS: i64 = 30;

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// Less causes a warning; the audit log grows by about 1 kB a call.
const WARN_FREE: u64 = 1 << 30;

/// Less is a failure: minutes of trading.
const LEAST_FREE: u64 = 64 << 20;

/// What is wrong with the rules, and what is hardly meant; and the rules, where they can be used.
pub(super) fn rules(file: &Path) -> (Vec<Diagnosis>, Option<Policy>) {
    let name = file.display();
    let again = format!("`credbroker policy check {name}` looks again");
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
                let fix = format!("correct it, or leave it if it is meant; {again}");
                Diagnosis::warning("rules", warning, fix)
            }));
            (lines, Some(policy))
        }
        Err(problems) => {
            let failed = |problem: &Problem| {
                Diagnosis::failed("rules", problem.to_string(), format!("correct it; {again}"))
            };
            (problems.iter().map(failed).collect(), None)
        }
    }
}

/// What to do about a CA that ends.
const FIX_CA: &str =
    "put the next CA into the file beside this one, and issue new certificates from it";

/// What to do about a certificate of the broker that ends.
const FIX_OWN: &str =
    "put a new certificate and its key in place; a running broker takes them up without a restart";

/// What the listeners show, whom they trust, and what Vault is shown.
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
        files.push((names, "for Vault", FIX_OWN, certificate));
    }
    let warnings = problems.take_warnings();
    let problems = problems.into_result().err().unwrap_or_default();
    let lines = files.into_iter().flat_map(|(keys, about, fix, file)| {
        let of_file = |problem: &&Problem| keys.contains(&problem.key.as_str());
        let mut failed: Vec<_> = problems
            .iter()
            .filter(of_file)
            .map(|problem| {
                let fix = "put the right files in place; a running broker takes them up without a restart";
                Diagnosis::failed("certificate", problem.to_string(), fix).about(about)
            })
            .collect();
        if failed.is_empty() {
            failed.push(expiry(about, fix, ends_ms(file), now_ms));
        }
        let of_file = |warning: &&Problem| keys.contains(&warning.key.as_str());
        failed.extend(warnings.iter().filter(of_file).map(ca_warning));
        failed
    });
    lines.collect()
}

/// A CA whose name constraints make the TLS library refuse what it issues, or a certificate that was left out as no CA.
fn ca_warning(warning: &Problem) -> Diagnosis {
    let fix = "do as this line says, and check the file again";
    Diagnosis::warning("certificate", warning.to_string(), fix)
}

/// Which files others can read or change, and must not.
pub(super) fn permissions(config: &Config) -> Vec<Diagnosis> {
    let (check, files) = ("permissions", permissions::files(config));
    let open = files.iter().filter_map(NamedFile::check);
    let mut lines: Vec<_> = open
        .map(|open| Diagnosis::failed(check, open.to_string(), open.fix()).about(open.key()))
        .collect();
    if lines.is_empty() {
        lines.push(Diagnosis::ok(check, "file permissions are correct"));
    }
    lines
}

/// When the first certificate of a file ends: Unix time in milliseconds.
fn ends_ms(file: &Path) -> Option<i64> {
    let certificates = pem::certificates(&std::fs::read(file).ok()?).ok()?;
    certificates.iter().filter_map(not_after_ms).min()
}

/// Whether a certificate ends soon.
pub(super) fn expiry(about: &str, fix: &str, ends_ms: Option<i64>, now_ms: i64) -> Diagnosis {
    let check = "certificate";
    let Some(ends_ms) = ends_ms else {
        return Diagnosis::failed(check, "is not an X.509 certificate", fix).about(about);
    };
    let (day, days) = (date(ends_ms), (ends_ms - now_ms) / DAY_MS);
    if ends_ms <= now_ms {
        Diagnosis::failed(check, format!("ended on {day}"), fix).about(about)
    } else if days < WARN_DAYS {
        let in_days = usize::try_from(days).unwrap_or_default();
        let detail = format!("ends on {day}, in {}", counted(in_days, "day"));
        Diagnosis::warning(check, detail, fix).about(about)
    } else {
        Diagnosis::ok(check, format!("good until {day}, for {days} days")).about(about)
    }
}

/// Year, month and day.
fn date(ms: i64) -> String {
    match ASN1Time::from_timestamp(ms / 1000) {
        Ok(time) => time.to_datetime().date().to_string(),
        Err(_) => "a day that no calendar has".to_owned(),
    }
}

/// CAs; none where they cannot be read, which the line says.
pub(super) fn roots(key: &str, roots: &Roots) -> (RootCertStore, Vec<Diagnosis>) {
    let problems = Problems::default();
    if let Some(roots) = load::roots(key, roots, &problems) {
        let warnings = problems.take_warnings();
        return (roots, warnings.iter().map(ca_warning).collect());
    }
    let problems = problems.into_result().err().unwrap_or_default();
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    let fix = format!("put the CA's certificate there, or correct {key}");
    let line = Diagnosis::failed("certificate", problems.join("; "), fix);
    // Nobody is trusted then.
    (RootCertStore::empty(), vec![line])
}

/// The record: whether it can be written, and how much room is left. Returns why nothing can be recorded from here, if so.
pub(super) fn audit(config: &Config) -> (Vec<Diagnosis>, Result<(), String>) {
    let (file, check) = (&config.audit_file, "audit");
    let name = file.display();
    let folder = file.parent().unwrap_or(Path::new("/"));
    let fix = "make it writable for the broker's user, or correct audit.file";
    let (there, recordable) = match OpenOptions::new().read(true).append(true).open(file) {
        Ok(_) => (format!("{name} can be written"), Ok(())),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !folder.exists() => {
            let reason = format!("the folder of {name} is not there yet");
            let fix =
                "start the broker, which makes state_dir, or make the folder for its user alone";
            let line = Diagnosis::warning(check, &reason, fix);
            return (vec![line], Err(reason));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // Made by somebody else it would keep the broker from its own record.
            let recordable = match (
                access(folder, Access::WRITE_OK | Access::EXEC_OK),
                is_ours(folder),
            ) {
                (Err(error), _) => Err(format!(
                    "the folder of {name} cannot be written: {}",
                    io::Error::from(error)
                )),
                (Ok(()), false) => Err(format!(
                    "{name} is not there yet, and this is not the broker's user, who will make it"
                )),
                (Ok(()), true) => Ok(()),
            };
            (
                format!("{name} is not there yet, and can be made"),
                recordable,
            )
        }
        Err(error) => {
            let reason = format!("{name} cannot be written: {error}");
            return (vec![Diagnosis::failed(check, &reason, fix)], Err(reason));
        }
    };
    if let Err(reason) = recordable {
        return (vec![Diagnosis::failed(check, &reason, fix)], Err(reason));
    }
    let free = "free the disk, or move the file (audit.file)";
    let line = match statvfs(folder) {
        Ok(disk) if disk.f_blocks > 0 => {
            let room = disk.f_bavail.saturating_mul(disk.f_frsize);
            let full = 100 - disk.f_bavail.saturating_mul(100) / disk.f_blocks;
            let detail = format!("{there}; the disk is {full} % full, {} free", bytes(room));
            if room < LEAST_FREE {
                Diagnosis::failed(check, detail, free)
            } else if room < WARN_FREE {
                Diagnosis::warning(check, detail, free)
            } else {
                Diagnosis::ok(check, detail)
            }
        }
        Ok(_) => Diagnosis::ok(check, there),
        Err(error) => {
            let error = io::Error::from(error);
            let detail = format!("{there}; how full the disk is cannot be told: {error}");
            Diagnosis::warning(check, detail, "look with `df`")
        }
    };
    (vec![line], Ok(()))
}

fn bytes(number: u64) -> String {
    match number >> 20 {
        mib @ 0..2048 => format!("{mib} MiB"),
        mib => format!("{} GiB", mib >> 10),
    }
}

/// Whether a folder belongs to whoever runs this.
fn is_ours(folder: &Path) -> bool {
    folder
        .metadata()
        .is_ok_and(|there| there.uid() == rustix::process::geteuid().as_raw())
}

/// The state folder: whether it can be used, what is forbidden, and whether a broker runs on it.
pub(super) fn state(config: &Config) -> (Vec<Diagnosis>, bool) {
    let (folder, check) = (&config.state_dir, "state");
    let name = folder.display();
    let usable =
        "make it a folder that the broker's user alone can read and write, or correct state_dir";
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
            let detail = format!("{name} is not there; the broker makes it at its start");
            let fix = "start the broker; if it has run before, correct state_dir: what was forbidden is there";
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
            "{name} belongs to user {owner}, and this runs as user {me}: what it can read and write tells little of the broker"
        );
        let fix = format!("run it as the broker does: sudo -u '#{owner}' credbroker doctor");
        lines.push(Diagnosis::warning(check, detail, fix));
    }
    if metadata.mode() & 0o022 != 0 {
        let detail = format!("{name} can be written by others, who could lift what is forbidden");
        lines.push(Diagnosis::failed(
            check,
            detail,
            format!("chmod 700 {name}"),
        ));
    }
    if let Err(error) = access(folder, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK) {
        let detail = format!("{name} cannot be used: {}", io::Error::from(error));
        lines.push(Diagnosis::failed(check, detail, usable));
    }
    let is_running = match is_locked(folder) {
        Ok(is_running) => is_running,
        Err(error) => {
            let detail = format!("whether a broker runs on {name} cannot be told: {error}");
            let fix = "run it as the broker's user";
            lines.push(Diagnosis::warning(check, detail, fix));
            false
        }
    };
    let runs = if is_running {
        "a broker runs on it"
    } else {
        "no broker runs on it"
    };
    lines.push(match Restrictions::open(folder) {
        Ok(restrictions) if !restrictions.was_found() => {
            let detail = format!("{name}: {runs}; it holds no restrictions.json");
            let fix = "start the broker, which creates it. If a broker has run here before, first check that state_dir is correct and its \
                       disk mounted: all blocks, halts and revocations were in that file";
            Diagnosis::warning(check, detail, fix)
        }
        Ok(restrictions) => forbidden(&format!("{name}: {runs}"), restrictions.counts()),
        Err(RestrictionsError::Unreadable { file, problem }) => {
            let detail = format!("{file} cannot be read, and no broker starts: {problem}");
            let fix = "restore it; remove it only if no bot is blocked, no account halted and no key revoked";
            Diagnosis::failed(check, detail, fix)
        }
        Err(error) => Diagnosis::failed(check, error.to_string(), usable),
    });
    (lines, is_running)
}

/// What admins have forbidden; what they have stopped is worth a warning, since bots will say so too.
fn forbidden(place: &str, counts: Counts) -> Diagnosis {
    let Counts {
        blocked_bots,
        halted_accounts,
        is_all_halted,
        revoked_keys,
    } = counts;
    if counts == Counts::default() {
        return Diagnosis::ok("state", format!("{place}; nothing is forbidden"));
    }
    let mut told = Vec::new();
    if is_all_halted {
        told.push("all accounts halted".to_owned());
    }
    for (number, thing, how) in [
        (halted_accounts, "account", "halted by name"),
        (blocked_bots, "bot", "blocked"),
        (revoked_keys, "key", "revoked"),
    ] {
        if number > 0 {
            told.push(format!("{} {how}", counted(number, thing)));
        }
    }
    let detail = format!("{place}; {}", told.join(", "));
    if is_all_halted || halted_accounts > 0 {
        let fix = "if that is over: `credbroker resume --all` or `credbroker resume ACCOUNT`; `credbroker keys list` shows which";
        Diagnosis::warning("state", detail, fix)
    } else {
        Diagnosis::ok("state", detail)
    }
}
