//! Rules and certificates change many times under load without affecting any call.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use credbroker_sim::installation::MAIN_UID;
use credbroker_sim::pki::{Ca, Identity};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::drive::{
    AS_TEST, Call, CallResult, Kind, READER, SECOND_UID, Site, TRADER, identities, within,
};
use crate::harness::{Bot, accounts, patient, print_always};

const RULES_CHANGES: usize = 200;
const CERTIFICATE_CHANGES: usize = 50;

/// Calls of both bots between two changes of the rules.
const CALLS_BETWEEN: usize = 4;

/// How a file is replaced.
#[derive(Clone, Copy)]
enum Way {
    /// Another file is renamed over it.
    Rename,
    /// Its folder is a symlink, which is replaced, as Kubernetes does.
    Swap,
    /// It is overwritten in place.
    Write,
}

impl Way {
    fn of(number: usize) -> Self {
        [Self::Rename, Self::Swap, Self::Write][number % 3]
    }
}

/// Files in a folder behind a symlink.
struct Group<'a> {
    folder: &'a Path,
    name: &'static str,
    files: Vec<(&'static str, String)>,
    generation: usize,
}

impl<'a> Group<'a> {
    /// Moves existing files behind the symlink without changing their contents.
    fn of(folder: &'a Path, name: &'static str, files: &[&'static str]) -> Self {
        let read = |file: &&'static str| {
            let text = std::fs::read_to_string(folder.join(file)).unwrap();
            (*file, text)
        };
        let mut group = Self {
            folder,
            name,
            files: files.iter().map(read).collect(),
            generation: 0,
        };
        group.swap();
        for file in files {
            let link = folder.join("link.new");
            std::os::unix::fs::symlink(format!("{name}/{file}"), &link).unwrap();
            std::fs::rename(link, folder.join(file)).unwrap();
        }
        group
    }

    /// Changes the contents of files, in the given order.
    fn change(&mut self, way: Way, texts: &[(&'static str, &str)]) {
        for (file, text) in texts {
            let (_, current) = self
                .files
                .iter_mut()
                .find(|(name, _)| name == file)
                .unwrap();
            (*text).clone_into(current);
            let path = self.folder.join(self.name).join(file);
            match way {
                Way::Rename => {
                    let new = path.with_extension("new");
                    std::fs::write(&new, text).unwrap();
                    std::fs::rename(new, path).unwrap();
                }
                Way::Swap => {}
                Way::Write => {
                    let mut file = File::options().write(true).open(path).unwrap();
                    file.write_all(text.as_bytes()).unwrap();
                    file.set_len(text.len() as u64).unwrap();
                }
            }
        }
        if matches!(way, Way::Swap) {
            self.swap();
        }
    }

    fn swap(&mut self) {
        self.generation += 1;
        let name = format!("{}.{}", self.name, self.generation);
        let folder = self.folder.join(&name);
        std::fs::create_dir(&folder).unwrap();
        for (file, text) in &self.files {
            std::fs::write(folder.join(file), text).unwrap();
        }
        let link = self.folder.join("link.new");
        std::os::unix::fs::symlink(&name, &link).unwrap();
        std::fs::rename(link, self.folder.join(self.name)).unwrap();
        let before = format!("{}.{}", self.name, self.generation - 1);
        if self.generation > 1 {
            std::fs::remove_dir_all(self.folder.join(before)).unwrap();
        }
    }
}

/// The rules at one moment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Rules {
    /// Whether they grant the reader its reads.
    reads: bool,
    /// The KuCoin account whose key the trader's account uses.
    uid: u64,
}

impl Rules {
    /// In turn: the reader is removed, the key changes, the reader is added, the key changes back.
    fn nth(number: usize) -> Self {
        let [reads, is_main] =
            [[true, true], [false, true], [false, false], [true, false]][number % 4];
        Self {
            reads,
            uid: if is_main { MAIN_UID } else { SECOND_UID },
        }
    }

    /// Always of the same length, so that overwriting it in place is a single write.
    fn text(self) -> String {
        let key = if self.uid == MAIN_UID {
            "main"
        } else {
            "second"
        };
        let keys = format!("\"{key}\", futures = \"{key}\"");
        let trader = TRADER.replace("\"main\", futures = \"main\"", &keys);
        assert!(trader.contains(&keys));
        let text = format!("{trader}{}", if self.reads { READER } else { "" });
        format!("{text:#<1000}\n")
    }
}

/// Rules with the time from which they may be in effect (before their file changes) and the time by which they certainly are (audited).
struct Period {
    rules: Rules,
    earliest: Instant,
    confirmed: Instant,
}

/// The rules that may have applied to a call: those of every period that it overlaps.
fn rules_of<'a>(periods: &'a [Period], call: &Call) -> Vec<&'a Rules> {
    let ends = periods.iter().skip(1).map(|next| next.confirmed);
    let ends = ends.map(Some).chain([None]);
    let overlapping = periods.iter().zip(ends).filter(|(period, end)| {
        period.earliest <= call.ended && end.is_none_or(|end| end >= call.started)
    });
    overlapping.map(|(period, _)| &period.rules).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_rules_and_fifty_certificate_changes_under_load_fail_no_call() {
    let first = Rules::nth(0);
    let mut site = Site::start(AS_TEST, first.text(), |config| {
        let interval = "every_ms = 50";
        assert!(config.contains(interval));
        config.replace(interval, "every_ms = 20")
    })
    .await;
    let folder = site.lab.folder.path().to_owned();
    let mut rules_files = Group::of(&folder, "rules", &["rules.toml"]);
    let mut tls_files = Group::of(&folder, "tls", &["server.key", "server.pem", "ca.pem"]);
    let start = Instant::now();
    let mut periods = vec![Period {
        rules: first,
        earliest: start,
        confirmed: start,
    }];
    let mut old: Vec<Identity> = vec![site.lab.ca.bot("trader").unwrap()];
    let mut ca_pem = site.lab.ca.certificate_pem().to_owned();
    for number in 1..=RULES_CHANGES {
        let rules = Rules::nth(number);
        assert_ne!(rules, Rules::nth(number - 1));
        let earliest = Instant::now();
        rules_files.change(Way::of(number), &[("rules.toml", &rules.text())]);
        site.until_applied("rules").await;
        periods.push(Period {
            rules,
            earliest,
            confirmed: Instant::now(),
        });
        site.driver.more_calls(CALLS_BETWEEN).await;
        if number.is_multiple_of(RULES_CHANGES / CERTIFICATE_CHANGES) {
            ca_pem = rotate(&mut site, &mut tls_files, number, &ca_pem, &mut old).await;
        }
    }
    site.driver.more_calls(100).await;
    let end = Instant::now();

    // Check each call.
    let calls = site.driver.calls_since(start);
    let orders = [
        orders_of(&site, MAIN_UID).await,
        orders_of(&site, SECOND_UID).await,
    ];
    let (mut failed, mut passed, mut ambiguous) = (Vec::new(), Vec::new(), 0);
    let (mut by_reader, mut by_uid) = ([0, 0], [0, 0]);
    for call in calls.iter().filter(|call| call.ended <= end) {
        let rules = rules_of(&periods, call);
        let is_accepted = call.result.is_accepted();
        let may_pass = |rules: &Rules| call.bot == "trader" || rules.reads;
        if rules.len() > 1 {
            ambiguous += 1;
        }
        // The order belongs to the other key's account: the broker sent the cancel, and the exchange rejected it.
        let is_other_account =
            call.kind == Kind::Cancel && matches!(call.result, CallResult::Answered { .. });
        if !is_accepted && !is_other_account && rules.iter().all(|rules| may_pass(rules)) {
            failed.push(call);
        }
        if is_accepted && !rules.iter().any(|rules| may_pass(rules)) {
            passed.push(call);
        }
        if call.kind == Kind::Order && is_accepted {
            let placed = [MAIN_UID, SECOND_UID]
                .into_iter()
                .zip(&orders)
                .find(|(_, orders)| orders.contains(&call.id));
            let (uid, _) = placed.unwrap_or_else(|| panic!("no account has {call:?}"));
            assert!(
                rules.iter().any(|rules| rules.uid == uid),
                "{uid} has {call:?}"
            );
            by_uid[usize::from(uid == SECOND_UID)] += 1;
        }
        if call.bot == "reader" && rules.len() == 1 {
            by_reader[usize::from(is_accepted)] += 1;
        }
    }
    assert!(failed.is_empty(), "should have passed: {failed:?}");
    assert!(passed.is_empty(), "should have failed: {passed:?}");
    print_always(&format!(
        "{RULES_CHANGES} changes of rules and {CERTIFICATE_CHANGES} of certificates and CAs during {} calls in {} s: 0 failed that should \
         have passed, 0 passed that should have failed ({ambiguous} overlapped a change; reads of the reader: {} accepted, \
         {} denied; {} orders with one key, {} with the other)",
        calls.len(),
        start.elapsed().as_secs(),
        by_reader[1],
        by_reader[0],
        by_uid[0],
        by_uid[1],
    ));
    // The load must have covered both sides of each change, or the test proves nothing.
    assert!(by_reader.iter().chain(&by_uid).all(|count| *count > 100));

    assert_eq!(old.len(), CERTIFICATE_CHANGES);
    let mut roots = Vec::new();
    site.driver.redial(|dial| roots.clone_from(&dial.roots));
    for (number, identity) in old.iter().enumerate() {
        assert!(
            !is_call_accepted(&site, &roots, identity).await,
            "certificate {number} of {}",
            old.len()
        );
    }
    site.compare_with_audit_log(&[]).await;
}

/// Adds a new CA, issues certificates of it to broker and bots, removes the old CA. Returns the new CA's certificate.
async fn rotate(
    site: &mut Site,
    files: &mut Group<'_>,
    number: usize,
    old_pem: &str,
    old: &mut Vec<Identity>,
) -> String {
    let ca = Ca::new("one of many throw-away CAs").unwrap();
    let way = Way::of(number / 4);
    let both = format!("{old_pem}{}", ca.certificate_pem());
    files.change(way, &[("ca.pem", &both)]);
    site.until_applied("tls").await;

    site.driver
        .redial(|dial| dial.roots.push(ca.certificate_pem().to_owned()));
    let server = ca.server().unwrap();
    files.change(
        way,
        &[
            ("server.key", &server.key_pem),
            ("server.pem", &server.certificate_pem),
        ],
    );
    site.until_applied("tls").await;
    let renewed = identities(&ca);
    let trader = renewed["trader"].clone();
    site.driver.redial(|dial| {
        dial.identities = renewed;
        dial.roots = vec![ca.certificate_pem().to_owned()];
    });
    // Both bots have reconnected by then.
    site.driver.more_calls(CALLS_BETWEEN).await;
    site.driver.settled().await;

    files.change(way, &[("ca.pem", ca.certificate_pem())]);
    site.until_applied("tls").await;
    let roots = [ca.certificate_pem().to_owned()];
    let last = old.last().unwrap();
    assert!(
        !is_call_accepted(site, &roots, last).await,
        "certificate of the CA removed by change {number}"
    );
    if old.len() < CERTIFICATE_CHANGES {
        old.push(trader);
    }
    ca.certificate_pem().to_owned()
}

/// Whether a call on a new connection with this certificate is accepted.
async fn is_call_accepted(site: &Site, roots: &[String], identity: &Identity) -> bool {
    let call = async {
        let connection = patient(site.lab.grpc, roots, identity).await.ok()?;
        Bot::over(connection).send(accounts()).await.ok()
    };
    within("the end of the call", call).await.is_some()
}

/// The `clientOid`s of all orders of an account.
async fn orders_of(site: &Site, uid: u64) -> BTreeSet<String> {
    let orders = format!("orders?uid={uid}");
    let orders = site.kucoin.control("GET", &orders, json!({})).await;
    let id = |order: &Value| order["client_oid"].as_str().unwrap().to_owned();
    orders.as_array().unwrap().iter().map(id).collect()
}
