//! What bots see when something goes wrong, as a table: each row is driven under 100 requests a second, and asserted.
//!
//! `CREDBROKER_WRITE_SITUATIONS=1` writes the table to `docs/situations.md`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use credbroker::proto::{
    BlockBotRequest, HaltRequest, ResumeRequest, RevokeKeyRequest, UnblockBotRequest,
};
use credbroker::vault::BACKOFF;
use credbroker_sim::installation::{MAIN_UID, ROOT_TOKEN, kv_path, secret};
use credbroker_sim::kucoin::SimKey;
use credbroker_sim::pki::Ca;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::drive::{
    AS_TEST, Call, Kind, READER, SECOND_UID, Site, TRADER, Told, identities, within, written,
};
use crate::harness::{Bot, accounts, patient, say, until};

/// Set to have the table written to its file.
const WRITE: &str = "CREDBROKER_WRITE_SITUATIONS";

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/situations.md");

/// How long a situation lasts, in calls of the bots: two seconds' worth.
const A_WHILE: usize = 200;

/// No situation takes bots longer to get over, once its cause is gone; waits between tries grow to this order.
const RECOVERY: Duration = Duration::from_secs(20);

const ALL: [Kind; 3] = [Kind::Order, Kind::Cancel, Kind::Read];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_table_of_situations() {
    // Two installations at once: most of the time goes into waiting.
    let (vault, other) = tokio::join!(vault_and_keys(), everything_else());
    let calls = vault.1 + other.1;
    let mut text = String::from(
        "| Situation | What was done | What bots saw | How long | What was recorded |\n|---|---|---|---|---|\n",
    );
    for row in vault.0.iter().chain(&other.0) {
        text += &row.to_string();
    }
    say(&format!(
        "{text}\n{calls} calls, each on record as its bot was told"
    ));
    if std::env::var_os(WRITE).is_some() {
        std::fs::create_dir_all(Path::new(FILE).parent().unwrap()).unwrap();
        std::fs::write(FILE, format!("{}{text}", head())).unwrap();
    }
}

fn head() -> String {
    let longest_s = BACKOFF.longest().as_secs();
    format!(
        "# What bots see when something goes wrong

Written by `CREDBROKER_WRITE_SITUATIONS=1 cargo test --test it -- situations`; every cell is asserted or measured there.
The broker, the simulated Vault and the simulated KuCoin are processes of their own. A bot that trades (orders, cancels,
reads) and one that only reads send 100 requests a second together; both connect again when their connection ends, and
send again over the new one what never left. Vault is polled every second with a time limit of 1 s, the egress address
is asked for every second, files are looked at every 50 ms; in production these are 30 s, 3 s, 5 min and 1 s, and times
grow with them. Times are rounded. *Nothing* means that every call of both bots was answered by the exchange and
accepted. In every row each call that a bot was told about stands in the audit file with exactly the outcome and the
reason that the bot was told.

After a failure the broker asks Vault again within a second, then within twice as long each time, up to {longest_s} s. The longer
an outage has lasted, the later its end is noticed: those of this table last some seconds; with a production server 0.5
to 27 s were measured.

There is one account with one key here. While its key is unavailable, `/readyz` says *not ready*; a broker that has
another usable key is ready, and names the key that is missing.

"
    )
}

/// A line of the table.
struct Row {
    situation: &'static str,
    done: &'static str,
    bots: String,
    how_long: String,
    recorded: &'static str,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            situation,
            done,
            bots,
            how_long,
            recorded,
        } = self;
        writeln!(
            f,
            "| {situation} | {done} | {bots} | {how_long} | {recorded} |"
        )
    }
}

/// What bots saw that was not well: who met it, on which kinds of calls.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Seen(BTreeMap<String, BTreeMap<&'static str, Vec<Kind>>>);

impl Seen {
    fn of<'a>(calls: impl IntoIterator<Item = &'a Call>) -> Self {
        let mut seen = Self::default();
        for call in calls.into_iter().filter(|call| !call.told.is_well()) {
            let bots = seen.0.entry(call.told.to_string()).or_default();
            let kinds = bots.entry(call.bot).or_default();
            if !kinds.contains(&call.kind) {
                kinds.push(call.kind);
                kinds.sort();
            }
        }
        seen
    }

    /// Whether it is this and nothing else: what was said, and on which kinds of the trader's calls (and the reader's).
    fn is_only(&self, told: &str, kinds: &[Kind]) -> bool {
        let Some(bots) = self.0.get(told).filter(|_| self.0.len() == 1) else {
            return false;
        };
        let mut kinds = kinds.to_vec();
        kinds.sort();
        let of_reader = kinds.contains(&Kind::Read).then(|| vec![Kind::Read]);
        bots.get("trader") == Some(&kinds) && bots.get("reader") == of_reader.as_ref()
    }

    fn is_nothing(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_nothing() {
            return f.write_str("nothing");
        }
        let cells = self.0.iter().map(|(told, bots)| {
            let kinds = ALL.map(|kind| (kind, bots.values().flatten().any(|of| *of == kind)));
            let kinds: Vec<_> = kinds
                .iter()
                .filter(|(_, is_hit)| *is_hit)
                .map(|(kind, _)| match kind {
                    Kind::Cancel => "cancels",
                    Kind::Order => "orders",
                    Kind::Read => "reads",
                })
                .collect();
            let who = match bots.keys().copied().collect::<Vec<_>>()[..] {
                ["reader"] => " of that bot",
                _ => "",
            };
            format!("{}{who}: {told}", kinds.join(", "))
        });
        let spared: Vec<_> = ALL
            .into_iter()
            .filter(|kind| {
                !self
                    .0
                    .values()
                    .flat_map(BTreeMap::values)
                    .flatten()
                    .any(|k| k == kind)
            })
            .map(|kind| match kind {
                Kind::Cancel => "cancels",
                Kind::Order => "orders",
                Kind::Read => "reads",
            })
            .collect();
        f.write_str(&cells.collect::<Vec<_>>().join("; "))?;
        if !spared.is_empty() {
            write!(f, "; {} go on", spared.join(" and "))?;
        }
        Ok(())
    }
}

/// Never exact: what is asserted is the bound.
fn rough(time: Duration) -> String {
    match time.as_millis() {
        0..1000 => "< 1 s".to_owned(),
        ms => format!("about {} s", (ms + 500) / 1000),
    }
}

/// Looks at what bots were told of the calls they began from a moment on.
struct Look {
    from: Instant,
}

impl Look {
    fn now() -> Self {
        Self {
            from: Instant::now(),
        }
    }

    /// What they saw by now.
    async fn seen(&self, site: &Site) -> Seen {
        site.driver.settled().await;
        Seen::of(&site.driver.calls_since(self.from))
    }

    /// Until they all were told well again for a second: how long the last call that was not came after the moment.
    async fn until_well(&self, site: &Site) -> Duration {
        let is_well = async || {
            let now = Instant::now();
            site.driver.more_calls(100).await;
            let calls = site.driver.calls_since(now);
            calls.iter().all(|call| call.told.is_well())
        };
        until("bots are well again", is_well).await;
        let calls = site.driver.calls_since(self.from);
        let last = calls
            .iter()
            .filter(|call| !call.told.is_well())
            .map(|call| call.started);
        let took = last.max().map_or(Duration::ZERO, |last| last - self.from);
        assert!(took < RECOVERY, "{took:?}");
        took
    }

    /// How long after the moment the first call was that was not well.
    fn first_bad(&self, site: &Site) -> Duration {
        let calls = site.driver.calls_since(self.from);
        let first = calls.iter().find(|call| !call.told.is_well()).unwrap();
        first.started - self.from
    }
}

/// How long a situation that bots do not notice stays in `/readyz` once its cause is gone.
async fn all_is_well_within(site: &Site, mended: Instant) -> String {
    site.until_all_is_well().await;
    let took = mended.elapsed();
    assert!(took < RECOVERY, "{took:?}");
    format!("over {} after", rough(took))
}

/// Waits until bots are told that the key is old: Vault has not answered for so long.
async fn until_stale(site: &Site, from: Instant, seconds: u64) {
    until("answers say that the key is stale", async || {
        let calls = site.driver.calls_since(from);
        calls.iter().any(|call| call.stale_s >= seconds)
    })
    .await;
}

const OUTAGES: &str = "vault_failures_total{reason=\"outage\"}";
const OUTAGE_RECORD: &str = "`/readyz`: ready, key *cached* with the reason; `vault_failures_total{reason=\"outage\"}`; `stale_seconds` in answers";

type Rows = (Vec<Row>, usize);

async fn vault_and_keys() -> Rows {
    let mut site = Site::start(AS_TEST, format!("{TRADER}{READER}"), |config| config).await;
    let rows = vec![
        vault_sealed(&mut site).await,
        vault_restarted(&mut site).await,
        vault_token_lost(&mut site).await,
        vault_fails_over(&mut site).await,
        vault_slow(&mut site).await,
        token_revoked(&mut site).await,
        policy_removed(&mut site).await,
        key_soft_deleted(&mut site).await,
        key_deleted(&mut site).await,
        mount_gone(&mut site).await,
        key_deleted_at_exchange(&mut site).await,
        key_version_refused(&mut site).await,
        key_rotated(&mut site).await,
        cold_start(&mut site).await,
        // The last: the key never serves again.
        key_revoked(&mut site).await,
    ];
    (rows, site.compare_record(&[]).await)
}

/// An outage that begins with `begin` and ends with `end`: bots see nothing of it.
async fn outage(
    site: &mut Site,
    begin: impl AsyncFnOnce(&mut Site),
    end: impl AsyncFnOnce(&mut Site),
) -> (String, String) {
    let (look, before) = (Look::now(), site.metric(OUTAGES).await);
    begin(site).await;
    site.until_readyz_says("cached").await;
    until_stale(site, look.from, 2).await;
    assert!(site.readyz().await.starts_with("ready\n"));
    let mended = Instant::now();
    end(site).await;
    let over = all_is_well_within(site, mended).await;
    let longest_s = BACKOFF.longest().as_secs();
    let over = format!("{over}; after a longer outage up to {longest_s} s");
    let seen = look.seen(site).await;
    assert!(seen.is_nothing(), "{seen}");
    assert!(site.metric(OUTAGES).await > before);
    (seen.to_string(), over)
}

async fn vault_sealed(site: &mut Site) -> Row {
    let (bots, how_long) = outage(
        site,
        async |site| _ = site.vault.control("POST", "seal", json!({})).await,
        async |site| _ = site.vault.control("POST", "unseal", json!({})).await,
    )
    .await;
    Row {
        situation: "Vault sealed",
        done: "sealed for some seconds, unsealed",
        bots,
        how_long,
        recorded: OUTAGE_RECORD,
    }
}

async fn vault_restarted(site: &mut Site) -> Row {
    let (bots, how_long) = outage(
        site,
        async |site| site.vault.kill(),
        async |site| site.vault.start(ROOT_TOKEN).await,
    )
    .await;
    Row {
        situation: "Vault restarted, the token is kept",
        done: "process killed, started some seconds later",
        bots,
        how_long,
        recorded: OUTAGE_RECORD,
    }
}

async fn vault_token_lost(site: &mut Site) -> Row {
    const TOKEN: &str = "fake-token-of-another-vault";
    let (bots, how_long) = outage(
        site,
        async |site| {
            site.vault.kill();
            site.vault.start(TOKEN).await;
            site.until_readyz_says("does not accept our token").await;
        },
        async |site| site.lab.replace("token", TOKEN).unwrap(),
    )
    .await;
    Row {
        situation: "Vault restarted, the token is lost",
        done: "started without the token; the agent writes a new one to the token file",
        bots,
        how_long,
        recorded: OUTAGE_RECORD,
    }
}

async fn vault_fails_over(site: &mut Site) -> Row {
    let (bots, how_long) = outage(
        site,
        async |site| {
            let electing = json!({"kind": "status", "code": 500});
            site.vault.control("POST", "fault", electing).await;
        },
        async |site| {
            site.vault.control("POST", "fail-over", json!({})).await;
            site.vault.control("DELETE", "fault", json!({})).await;
        },
    )
    .await;
    // The node that is asked is a standby now: a new version must still arrive.
    let version = site.metric(VERSION).await;
    let secret = written("main", &SimKey::fake(MAIN_UID));
    site.vault.control("POST", "secret", secret).await;
    site.until_metric(VERSION, |now| now > version).await;
    Row {
        situation: "Vault fails over",
        done: "no active node for some seconds, then the other of two; a new key version written there",
        bots,
        how_long,
        recorded: OUTAGE_RECORD,
    }
}

async fn vault_slow(site: &mut Site) -> Row {
    let (bots, how_long) = outage(
        site,
        async |site| {
            let slow = json!({"kind": "delay", "ms": 3000});
            site.vault.control("POST", "fault", slow).await;
        },
        async |site| _ = site.vault.control("DELETE", "fault", json!({})).await,
    )
    .await;
    Row {
        situation: "Vault slow",
        done: "3 s for each answer, with a time limit of 1 s",
        bots,
        how_long,
        recorded: OUTAGE_RECORD,
    }
}

async fn token_revoked(site: &mut Site) -> Row {
    let (bots, how_long) = outage(
        site,
        async |site| {
            let token = std::fs::read_to_string(site.lab.path("token")).unwrap();
            let token = json!({"token": token.trim()});
            site.vault.control("DELETE", "token", token).await;
        },
        async |site| {
            let hour = json!({"seconds": 3600});
            let made = site.vault.control("POST", "token", hour).await;
            site.lab
                .replace("token", made["token"].as_str().unwrap())
                .unwrap();
        },
    )
    .await;
    Row {
        situation: "The broker's token revoked",
        done: "revoked; some seconds later a new one in the token file",
        bots,
        how_long,
        recorded: OUTAGE_RECORD,
    }
}

const EVICTIONS: &str = "vault_failures_total{reason=\"evicted\"}";
const EVICTION_RECORD: &str = "`/readyz`: key *not available* with Vault's reason; not ready, unless another key is usable; `vault_failures_total{reason=\"evicted\"}`; `key_available` 0";
const EVICTION_OF_ALL_RECORD: &str = "`/readyz`: not ready, every key *not available* with Vault's reason; `vault_failures_total{reason=\"evicted\"}`; `key_available` 0";
const AVAILABLE: &str = "key_available{account=\"main\",key=\"main\"}";
const VERSION: &str = "key_version{account=\"main\",key=\"main\"}";
const NO_KEY: &str = "`KEY_UNAVAILABLE` (not_sent)";

/// How many keys Vault takes away.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Evicted {
    Every,
    One,
}

/// With a second account whose key is there the broker is ready, and `/readyz` says what is wrong with the first one's.
async fn is_ready_with_a_second_key(site: &mut Site, problem: &str) {
    assert!(site.readyz().await.starts_with("not ready\n"));
    let data = secret(&SimKey::fake(SECOND_UID));
    let key = json!({"mount": "kv", "path": kv_path("spare", "main"), "data": data});
    site.vault.control("POST", "secret", key).await;
    let spare = "[account.spare]\nkey = { spot-margin = \"main\" }\n";
    site.lab
        .replace("rules.toml", &format!("{TRADER}{READER}{spare}"))
        .unwrap();
    site.taken("rules").await;
    until("the broker is ready with its second key", async || {
        let text = site.readyz().await;
        text.starts_with("ready\n") && text.contains(problem)
    })
    .await;
    site.lab
        .replace("rules.toml", &format!("{TRADER}{READER}"))
        .unwrap();
    site.taken("rules").await;
}

/// Vault takes the key away with `take` and gives it back with `give`: nothing is signed in between.
async fn eviction(
    site: &mut Site,
    evicted: Evicted,
    take: impl AsyncFnOnce(&mut Site),
    give: impl AsyncFnOnce(&mut Site),
) -> (String, String) {
    let (look, before) = (Look::now(), site.metric(EVICTIONS).await);
    take(site).await;
    site.until_metric(AVAILABLE, |available| available < 0.5)
        .await;
    let gone = Look::now();
    site.driver.more_calls(A_WHILE).await;
    assert!(site.readyz().await.contains("not available"));
    let passed = site.driver.calls_since(gone.from);
    assert!(
        passed.iter().all(|call| !call.told.is_well()),
        "signed all the same"
    );
    match evicted {
        Evicted::Every => assert!(site.readyz().await.starts_with("not ready\n")),
        Evicted::One => is_ready_with_a_second_key(site, "key main/main: not available: ").await,
    }
    let mended = Look::now();
    give(site).await;
    let took = mended.until_well(site).await;
    let seen = look.seen(site).await;
    assert!(seen.is_only(NO_KEY, &ALL), "{seen}");
    assert!(site.metric(EVICTIONS).await > before);
    site.until_all_is_well().await;
    let began = rough(look.first_bad(site));
    (
        seen.to_string(),
        format!("from {began} after until {} after it is back", rough(took)),
    )
}

async fn policy_removed(site: &mut Site) -> Row {
    let (bots, how_long) = eviction(
        site,
        Evicted::Every,
        async |site| {
            _ = site
                .vault
                .control("POST", "denial", json!({"path": "kv/*"}))
                .await;
        },
        async |site| {
            _ = site
                .vault
                .control("DELETE", "denial", json!({"path": "kv/*"}))
                .await;
        },
    )
    .await;
    Row {
        situation: "The broker's Vault policy removed",
        done: "403 to a valid token, twice; some seconds later restored",
        bots,
        how_long,
        recorded: EVICTION_OF_ALL_RECORD,
    }
}

async fn write_again(site: &mut Site) {
    let secret = written("main", &SimKey::fake(MAIN_UID));
    site.vault.control("POST", "secret", secret).await;
}

async fn key_soft_deleted(site: &mut Site) -> Row {
    let place = json!({"mount": "kv", "path": kv_path("main", "main")});
    let (bots, how_long) = eviction(
        site,
        Evicted::One,
        async |site| _ = site.vault.control("DELETE", "secret", place).await,
        write_again,
    )
    .await;
    Row {
        situation: "Key soft-deleted in Vault",
        done: "newest version deleted; some seconds later a new one written",
        bots,
        how_long,
        recorded: EVICTION_RECORD,
    }
}

async fn key_deleted(site: &mut Site) -> Row {
    let place = json!({"mount": "kv", "path": kv_path("main", "main")});
    let (bots, how_long) = eviction(
        site,
        Evicted::One,
        async |site| _ = site.vault.control("DELETE", "metadata", place).await,
        write_again,
    )
    .await;
    Row {
        situation: "Key deleted in Vault",
        done: "all versions and metadata deleted; some seconds later written again",
        bots,
        how_long,
        recorded: EVICTION_RECORD,
    }
}

async fn mount_gone(site: &mut Site) -> Row {
    let (bots, how_long) = eviction(
        site,
        Evicted::Every,
        async |site| {
            _ = site
                .vault
                .control("DELETE", "mount", json!({"mount": "kv"}))
                .await;
        },
        write_again,
    )
    .await;
    Row {
        situation: "Vault mount gone",
        done: "KV engine unmounted; some seconds later mounted, key written",
        bots,
        how_long,
        recorded: EVICTION_OF_ALL_RECORD,
    }
}

async fn key_deleted_at_exchange(site: &mut Site) -> Row {
    const REFUSED: &str = "key_status{account=\"main\",key=\"main\",status=\"refused\"}";
    let (look, before) = (Look::now(), site.metric("credentials_refused_total").await);
    let key = SimKey::fake(MAIN_UID);
    let gone = format!("keys?api_key={}", key.api_key);
    site.kucoin.control("DELETE", &gone, json!({})).await;
    site.until_metric(REFUSED, |refused| refused > 0.5).await;
    site.until_readyz_says("KuCoin does not know this API key.")
        .await;
    site.driver.more_calls(A_WHILE).await;
    let mended = Look::now();
    site.kucoin.control("POST", "keys", json!(key)).await;
    let took = mended.until_well(site).await;
    let seen = look.seen(site).await;
    assert!(seen.is_only("rejected (400003)", &ALL), "{seen}");
    assert!(site.metric("credentials_refused_total").await > before);
    site.until_metric(REFUSED, |refused| refused < 0.5).await;
    let began = rough(look.first_bad(site));
    Row {
        situation: "Key deleted at KuCoin",
        done: "the key in use; some seconds later there again",
        bots: seen.to_string(),
        how_long: format!("from {began} after until {} after it is back", rough(took)),
        recorded: "each call's outcome; `key_status{status=\"refused\"}` 1; `credentials_refused_total`; `/readyz?verbose` and `keys list` with cause and fix",
    }
}

async fn key_version_refused(site: &mut Site) -> Row {
    const UNUSABLE: &str = "vault_failures_total{reason=\"unusable\"}";
    let (look, before) = (Look::now(), site.metric(UNUSABLE).await);
    let version = site.metric(VERSION).await;
    let unknown = SimKey {
        api_key: "simulated-key-that-is-not-there".to_owned(),
        ..SimKey::fake(MAIN_UID)
    };
    let changed = Instant::now();
    let secret = written("main", &unknown);
    site.vault.control("POST", "secret", secret).await;
    site.until_readyz_says(&format!("using version {version}: "))
        .await;
    let told = changed.elapsed();
    site.driver.more_calls(A_WHILE).await;
    assert!(site.metric(UNUSABLE).await > before);
    let is_same = (site.metric(VERSION).await - version).abs() < 0.5;
    assert!(is_same, "the refused version is in use");
    let mended = Instant::now();
    write_again(site).await;
    site.until_metric(VERSION, |now| now > version).await;
    let took = mended.elapsed();
    let seen = look.seen(site).await;
    assert!(seen.is_nothing(), "{seen}");
    site.until_all_is_well().await;
    Row {
        situation: "New key version that KuCoin refuses",
        done: "a key that KuCoin does not know in Vault; some seconds later a good one",
        bots: seen.to_string(),
        how_long: format!(
            "told {} after; the good one in force {} after",
            rough(told),
            rough(took)
        ),
        recorded: "`act` line *refused* with the reason; `/readyz`: ready, *using version* with the reason; `vault_failures_total{reason=\"unusable\"}`",
    }
}

async fn key_revoked(site: &mut Site) -> Row {
    const REVOKED: &str = "key_status{account=\"main\",key=\"main\",status=\"revoked\"}";
    let mut admin = site.lab.admin_client("anna").await;
    let changed = Instant::now();
    let revoke = RevokeKeyRequest {
        account: "main".to_owned(),
        key: "main".to_owned(),
    };
    admin.revoke_key(revoke).await.unwrap();
    let took = changed.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    let look = Look::now();
    site.driver.more_calls(A_WHILE).await;
    let calls = site.driver.calls_since(look.from);
    assert!(
        calls.iter().all(|call| !call.told.is_well()),
        "signed with a revoked key"
    );
    assert!(site.metric(REVOKED).await > 0.5);
    is_ready_with_a_second_key(site, "has revoked it").await;
    let next = SimKey {
        api_key: "simulated-key-after-revocation".to_owned(),
        ..SimKey::fake(MAIN_UID)
    };
    site.kucoin.control("POST", "keys", json!(next)).await;
    let mended = Look::now();
    let secret = written("main", &next);
    site.vault.control("POST", "secret", secret).await;
    let back = mended.until_well(site).await;
    let seen = look.seen(site).await;
    assert!(seen.is_only(NO_KEY, &ALL), "{seen}");
    site.until_all_is_well().await;
    Row {
        situation: "Key revoked",
        done: "by an admin; some seconds later another key in Vault",
        bots: seen.to_string(),
        how_long: format!(
            "in force {} after, before the admin is told; until {} after another key is there",
            rough(took),
            rough(back)
        ),
        recorded: "`act` line with the admin; `/readyz`: who revoked it; not ready, unless another key is usable; `key_status{status=\"revoked\"}` 1; `restrictions.json`",
    }
}

async fn key_rotated(site: &mut Site) -> Row {
    let (look, version) = (Look::now(), site.metric(VERSION).await);
    let (old, new) = (SimKey::fake(MAIN_UID), SimKey::fake(SECOND_UID));
    let new = SimKey {
        api_key: "simulated-second-key".to_owned(),
        uid: MAIN_UID,
        ..new
    };
    site.kucoin.control("POST", "keys", json!(new)).await;
    let changed = Instant::now();
    let secret = written("main", &new);
    site.vault.control("POST", "secret", secret).await;
    site.until_metric(VERSION, |now| now > version).await;
    let took = changed.elapsed();
    site.driver.settled().await;
    // The old one is good for nothing any more: from now on only the new one signs.
    let gone = format!("keys?api_key={}", old.api_key);
    site.kucoin.control("DELETE", &gone, json!({})).await;
    site.driver.more_calls(A_WHILE).await;
    let seen = look.seen(site).await;
    assert!(seen.is_nothing(), "{seen}");
    site.kucoin.control("POST", "keys", json!(old)).await;
    Row {
        situation: "Key rotated",
        done: "new version in Vault; once it is in force the old key is deleted at KuCoin",
        bots: seen.to_string(),
        how_long: format!("in force {} after", rough(took)),
        recorded: "`key_version`",
    }
}

async fn cold_start(site: &mut Site) -> Row {
    site.vault.kill();
    restart(site).await;
    // What the broker learns from the exchange at its start comes first, and is no part of this.
    until("only Vault is missing", async || {
        let text = site.readyz().await;
        text.contains("waiting for Vault") && !text.contains("egress") && !text.contains("clock")
    })
    .await;
    let look = Look::now();
    site.driver.more_calls(A_WHILE).await;
    assert!(site.readyz().await.starts_with("not ready\n"));
    let mended = Look::now();
    site.vault.start("fake-token-after-cold-start").await;
    site.lab
        .replace("token", "fake-token-after-cold-start")
        .unwrap();
    let took = mended.until_well(site).await;
    let seen = look.seen(site).await;
    assert!(seen.is_only(NO_KEY, &ALL), "{seen}");
    Row {
        situation: "Broker started while Vault is down",
        done: "both stopped, broker started; Vault some seconds later",
        bots: seen.to_string(),
        how_long: format!(
            "until {} after Vault is back; after a longer outage up to {} s",
            rough(took),
            BACKOFF.longest().as_secs()
        ),
        recorded: "`/readyz`: not ready, *waiting for Vault*",
    }
}

/// SIGTERM, and another start at the same address.
async fn restart(site: &mut Site) {
    site.lab.process().terminate();
    assert_eq!(site.lab.process().exit_code().await, Some(0));
    site.lab.spawn_broker().await;
}

async fn everything_else() -> Rows {
    let mut site = Site::start(AS_TEST, format!("{TRADER}{READER}"), |config| config).await;
    let mut rows = vec![
        clock_steps(&mut site).await,
        address_not_told(&mut site).await,
        exchange_unreachable(&mut site).await,
        bot_removed(&mut site).await,
        bot_blocked(&mut site).await,
        account_halted(&mut site).await,
        rules_broken(&mut site).await,
        server_certificate_replaced(&mut site).await,
        client_ca_replaced(&mut site).await,
        certificates_broken(&mut site).await,
        broker_paused(&mut site).await,
        broker_restarted(&mut site).await,
        address_wrong(&mut site).await,
        address_never_told(&mut site).await,
    ];
    let from = Instant::now();
    rows.push(disk_full(&mut site).await);
    let to = Instant::now();
    rows.push(log_gone(&mut site).await);
    (rows, site.compare_record(&[(from, to)]).await)
}

async fn clock_steps(site: &mut Site) -> Row {
    const REFUSED: &str = "timestamps_refused_total";
    let (look, before) = (Look::now(), site.metric(REFUSED).await);
    let mut slowest = Duration::ZERO;
    for offset_ms in [30_000, 0] {
        let stepped = Instant::now();
        let clock = json!({"offset_ms": offset_ms});
        site.kucoin.control("POST", "clock", clock).await;
        site.driver.more_calls(A_WHILE).await;
        let log = site.lab.process().log();
        assert!(log.contains("exchange clock stepped"), "{log}");
        let calls = site.driver.calls_since(stepped);
        let took = calls.iter().map(|call| call.ended - call.started).max();
        slowest = slowest.max(took.unwrap());
    }
    let seen = look.seen(site).await;
    assert!(seen.is_nothing(), "{seen}");
    assert!(site.metric(REFUSED).await > before);
    Row {
        situation: "The exchange's clock steps by 30 s",
        done: "forwards, and back",
        bots: seen.to_string(),
        how_long: format!(
            "slowest call {}: refused with 400002, signed anew and sent again",
            rough(slowest)
        ),
        recorded: "log line *exchange clock stepped*; `timestamps_refused_total`",
    }
}

fn my_ip_fails() -> serde_json::Value {
    json!({"path": "/api/v1/my-ip", "action": {"html": {"status": 502, "when": "before_taken"}}})
}

async fn address_not_told(site: &mut Site) -> Row {
    const FAILED: &str = "egress_check_failed";
    let look = Look::now();
    site.kucoin.control("POST", "fault", my_ip_fails()).await;
    site.until_metric(FAILED, |failed| failed > 0.5).await;
    site.until_readyz_says("egress: the last question got no answer")
        .await;
    site.driver.more_calls(A_WHILE).await;
    assert_eq!(site.readyz().await, "ready\n");
    assert!(site.metric("egress_proof_age_seconds").await > 0.0);
    let mended = Instant::now();
    site.kucoin.control("DELETE", "fault", json!({})).await;
    site.until_metric(FAILED, |failed| failed < 0.5).await;
    let took = mended.elapsed();
    let seen = look.seen(site).await;
    assert!(seen.is_nothing(), "{seen}");
    Row {
        situation: "The exchange does not tell our address",
        done: "`my-ip` answers 502 for some seconds, after a proof",
        bots: seen.to_string(),
        how_long: format!("asked again with success {} after", rough(took)),
        recorded: "`egress_check_failed`, `egress_proof_age_seconds`; `/readyz?verbose`",
    }
}

async fn exchange_unreachable(site: &mut Site) -> Row {
    let look = Look::now();
    site.kucoin.kill();
    site.driver.settled().await;
    let down = Look::now();
    site.driver.more_calls(A_WHILE).await;
    let seen = down.seen(site).await;
    let unreachable = "`EXCHANGE_UNREACHABLE` (not_sent)";
    assert!(seen.is_only(unreachable, &ALL), "{seen}");
    let mended = Look::now();
    site.driver.forget_orders();
    site.kucoin.start("").await;
    let took = mended.until_well(site).await;
    // Of what was under way at that moment nobody knows; an order must not be called not_sent then.
    let calls = site.driver.calls_since(look.from);
    for call in calls.iter().filter(|call| !call.told.is_well()) {
        let told = call.told.to_string();
        let may_be_lost = told == "`ANSWER_LOST` (maybe_sent)" && call.started < down.from;
        // Cancels of orders that the exchange has forgotten.
        let is_forgotten = call.kind == Kind::Cancel && told.starts_with("rejected");
        assert!(
            told == unreachable || may_be_lost || is_forgotten,
            "{call:?}"
        );
    }
    let unreachable = "requests_total{scope=\"spot-margin\",outcome=\"not_sent\",reason=\"EXCHANGE_UNREACHABLE\"}";
    assert!(site.metric(unreachable).await > 0.0);
    Row {
        situation: "The exchange unreachable",
        done: "process killed, connections refused for some seconds, started again",
        bots: format!(
            "{seen}; what was under way at that moment may be `ANSWER_LOST` (maybe_sent)"
        ),
        how_long: format!("until {} after it is back", rough(took)),
        recorded: "each call's outcome; `requests_total{reason=\"EXCHANGE_UNREACHABLE\"}`",
    }
}

async fn bot_removed(site: &mut Site) -> Row {
    let look = Look::now();
    site.lab.replace("rules.toml", TRADER).unwrap();
    site.taken("rules").await;
    let took = look.from.elapsed();
    let removed = Look::now();
    site.driver.more_calls(A_WHILE).await;
    let calls = site.driver.calls_since(removed.from);
    for call in &calls {
        assert_eq!(call.told.is_well(), call.bot == "trader", "{call:?}");
    }
    site.lab
        .replace("rules.toml", &format!("{TRADER}{READER}"))
        .unwrap();
    site.taken("rules").await;
    let mended = Look::now();
    site.driver.more_calls(A_WHILE).await;
    let after = mended.seen(site).await;
    assert!(after.is_nothing(), "{after}");
    let seen = Seen::of(&calls);
    let unknown = seen.0.get("`CALLER_UNKNOWN` (not_sent)");
    assert!(unknown.is_some_and(|bots| bots.len() == 1), "{seen}");
    assert_eq!(seen.0.len(), 1, "{seen}");
    let taken = "reloads_total{file=\"rules\",outcome=\"taken\"}";
    assert!(site.metric(taken).await > 1.5);
    Row {
        situation: "A bot removed from the rules, and added again",
        done: "rules file replaced, twice",
        bots: "reads of that bot: `CALLER_UNKNOWN` (not_sent); the other: nothing".to_owned(),
        how_long: format!("in force {} after, with the next call", rough(took)),
        recorded: "`change` lines with both digests; `reloads_total{file=\"rules\",outcome=\"taken\"}`",
    }
}

async fn bot_blocked(site: &mut Site) -> Row {
    let mut admin = site.lab.admin_client("anna").await;
    let bot = "spiffe://demo.test/bot/reader";
    let changed = Instant::now();
    let block = BlockBotRequest {
        bot: bot.to_owned(),
    };
    admin.block_bot(block).await.unwrap();
    let took = changed.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    let look = Look::now();
    site.until_readyz_says(&format!("bot {bot}: blocked by "))
        .await;
    site.driver.more_calls(A_WHILE).await;
    let calls = site.driver.calls_since(look.from);
    assert!(
        calls
            .iter()
            .all(|call| (call.bot == "reader") != call.told.is_well())
    );
    let mended = Look::now();
    let unblock = UnblockBotRequest {
        bot: bot.to_owned(),
    };
    admin.unblock_bot(unblock).await.unwrap();
    let over = mended.until_well(site).await;
    let seen = look.seen(site).await;
    assert!(seen.0.contains_key("`CALLER_BLOCKED` (not_sent)"), "{seen}");
    assert_eq!(seen.0.len(), 1, "{seen}");
    Row {
        situation: "A bot blocked, and unblocked",
        done: "by an admin, some seconds apart",
        bots: "reads of that bot: `CALLER_BLOCKED` (not_sent); the other: nothing".to_owned(),
        how_long: format!(
            "in force {} after, before the admin is told; until {} after",
            rough(took),
            rough(over)
        ),
        recorded: "`act` lines with the admin; `/readyz?verbose`; `restrictions.json`",
    }
}

async fn account_halted(site: &mut Site) -> Row {
    const RESTRICTED: &str = "key_status{account=\"main\",key=\"main\",status=\"frozen\"}";
    until_orders_stand(site).await;
    let mut admin = site.lab.admin_client("anna").await;
    let account = "main".to_owned();
    let changed = Instant::now();
    let halt = HaltRequest {
        account: account.clone(),
        ..HaltRequest::default()
    };
    admin.halt(halt).await.unwrap();
    let took = changed.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    let look = Look::now();
    site.driver.more_calls(A_WHILE).await;
    let calls = site.driver.calls_since(look.from);
    assert!(
        calls
            .iter()
            .all(|call| (call.kind == Kind::Order) != call.told.is_well())
    );
    assert!(site.metric(RESTRICTED).await > 0.5);
    let mended = Look::now();
    let resume = ResumeRequest {
        account,
        ..ResumeRequest::default()
    };
    admin.resume(resume).await.unwrap();
    let over = mended.until_well(site).await;
    let seen = look.seen(site).await;
    let halted = "`ACCOUNT_FROZEN` (not_sent)";
    assert!(seen.is_only(halted, &[Kind::Order]), "{seen}");
    Row {
        situation: "Account halted, and resumed",
        done: "by an admin, some seconds apart",
        bots: seen.to_string(),
        how_long: format!(
            "in force {} after, before the admin is told; until {} after",
            rough(took),
            rough(over)
        ),
        recorded: "`act` lines with the admin; `key_status{status=\"frozen\"}` 1; `restrictions.json`",
    }
}

const UNUSABLE: &str =
    "`change` line *refused* with the reason; `file_unusable` 1; `/readyz?verbose` with the place";

async fn rules_broken(site: &mut Site) -> Row {
    const STATE: &str = "file_unusable{file=\"rules\"}";
    let look = Look::now();
    site.lab
        .replace("rules.toml", "[account.main]\nkey = { spot-margin = \n")
        .unwrap();
    let (outcome, detail) = site.change("rules").await;
    assert_eq!(outcome, "refused");
    assert!(!detail.is_empty());
    assert!(site.metric(STATE).await > 0.5);
    site.until_readyz_says("rules: a changed file is not in force")
        .await;
    site.driver.more_calls(A_WHILE).await;
    let mended = Instant::now();
    // Other rules than before, so that there is something to take.
    site.lab
        .replace("rules.toml", &format!("# mended\n{TRADER}{READER}"))
        .unwrap();
    site.taken("rules").await;
    let took = mended.elapsed();
    assert!(site.metric(STATE).await < 0.5);
    let seen = look.seen(site).await;
    assert!(seen.is_nothing(), "{seen}");
    Row {
        situation: "Rules file broken, and mended",
        done: "half a file for some seconds, then whole rules",
        bots: seen.to_string(),
        how_long: format!("mended rules in force {} after", rough(took)),
        recorded: UNUSABLE,
    }
}

async fn server_certificate_replaced(site: &mut Site) -> Row {
    let look = Look::now();
    let ca = Ca::new("another throw-away CA of servers").unwrap();
    site.driver
        .redial(|dial| dial.roots.push(ca.certificate_pem().to_owned()));
    let server = ca.server().unwrap();
    let changed = Instant::now();
    site.lab.replace("server.key", &server.key_pem).unwrap();
    site.lab
        .replace("server.pem", &server.certificate_pem)
        .unwrap();
    site.taken("tls").await;
    let took = changed.elapsed();
    // Who trusts only the new CA gets in; the bots' connections stay as they are, and new ones are made, too.
    let roots = [ca.certificate_pem().to_owned()];
    let bot = site.lab.ca.bot("trader").unwrap();
    let connected = within("a new connection", patient(site.lab.grpc, &roots, &bot)).await;
    Bot::over(connected.unwrap())
        .send(accounts())
        .await
        .unwrap();
    site.driver.more_calls(A_WHILE).await;
    site.driver.redial(|_| {});
    site.driver.more_calls(A_WHILE).await;
    let seen = look.seen(site).await;
    assert!(seen.is_nothing(), "{seen}");
    assert!(site.metric("certificate_not_after_timestamp_seconds").await > 0.0);
    Row {
        situation: "Server certificate replaced",
        done: "key and certificate of another CA, which bots trust beforehand",
        bots: seen.to_string(),
        how_long: format!("shown to new connections {} after", rough(took)),
        recorded: "`change` line; `certificate_not_after_timestamp_seconds`",
    }
}

async fn client_ca_replaced(site: &mut Site) -> Row {
    let look = Look::now();
    let (address, roots) = (site.lab.grpc, server_roots(site));
    let old = site.lab.ca.bot("trader").unwrap();
    let kept = within("a connection", patient(address, &roots, &old))
        .await
        .unwrap();
    let mut kept = Bot::over(kept);
    kept.send(accounts()).await.unwrap();

    let ca = Ca::new("another throw-away CA of bots").unwrap();
    let both = format!("{}{}", site.lab.ca.certificate_pem(), ca.certificate_pem());
    site.lab.replace("ca.pem", &both).unwrap();
    site.taken("tls").await;
    let renewed = identities(&ca);
    site.driver.redial(|dial| dial.identities = renewed);
    site.driver.more_calls(A_WHILE).await;
    let changed = Instant::now();
    site.lab.replace("ca.pem", ca.certificate_pem()).unwrap();
    site.taken("tls").await;
    let took = changed.elapsed();
    // The connection of the removed CA is as good as gone, and no other is made.
    let told = kept.send(accounts()).await;
    assert!(told.is_err(), "a certificate of a removed CA still works");
    let refused = async {
        match patient(address, &roots, &old).await {
            Err(_) => true,
            Ok(connection) => Bot::over(connection).send(accounts()).await.is_err(),
        }
    };
    assert!(within("a refusal", refused).await);
    site.driver.more_calls(A_WHILE).await;
    let seen = look.seen(site).await;
    assert!(seen.is_nothing(), "{seen}");
    assert!(site.metric("certificates_refused_total").await > 0.0);
    Row {
        situation: "Client CA replaced",
        done: "new CA added, bots given its certificates, old CA removed",
        bots: format!(
            "{seen}; a bot that kept its old certificate: `CALLER_UNKNOWN` or no connection"
        ),
        how_long: format!("old certificates refused {} after", rough(took)),
        recorded: "`change` lines; `certificates_refused_total`",
    }
}

/// The CAs of servers that bots trust by now.
fn server_roots(site: &Site) -> Vec<String> {
    let mut roots = Vec::new();
    site.driver.redial(|dial| roots.clone_from(&dial.roots));
    roots
}

async fn certificates_broken(site: &mut Site) -> Row {
    const STATE: &str = "file_unusable{file=\"tls\"}";
    let look = Look::now();
    let whole = std::fs::read_to_string(site.lab.path("server.pem")).unwrap();
    let half = &whole[..whole.len() / 2];
    site.lab.replace("server.pem", half).unwrap();
    let (outcome, detail) = site.change("tls").await;
    assert_eq!(outcome, "refused");
    assert!(detail.contains("tls.certificate"), "{detail}");
    assert!(site.metric(STATE).await > 0.5);
    site.until_readyz_says("tls: a changed file is not in force")
        .await;
    site.driver.redial(|_| {});
    site.driver.more_calls(A_WHILE).await;
    let mended = Instant::now();
    site.lab.replace("server.pem", &whole).unwrap();
    site.until_metric(STATE, |unusable| unusable < 0.5).await;
    let took = mended.elapsed();
    let seen = look.seen(site).await;
    assert!(seen.is_nothing(), "{seen}");
    Row {
        situation: "Certificate file broken, and mended",
        done: "half a certificate for some seconds, then the whole one",
        bots: seen.to_string(),
        how_long: format!("over {} after", rough(took)),
        recorded: UNUSABLE,
    }
}

async fn broker_paused(site: &mut Site) -> Row {
    let look = Look::now();
    site.lab.process().signal("STOP");
    // This is what is done, not a wait for anything.
    sleep(Duration::from_secs(3)).await;
    site.lab.process().signal("CONT");
    let mended = Look::now();
    site.driver.more_calls(A_WHILE).await;
    let seen = look.seen(site).await;
    assert!(seen.is_nothing(), "{seen}");
    let calls = site.driver.calls_since(look.from);
    let slowest = calls
        .iter()
        .map(|call| call.ended - call.started)
        .max()
        .unwrap();
    assert!(
        slowest >= Duration::from_secs(2),
        "nothing was paused: {slowest:?}"
    );
    site.until_all_is_well().await;
    let took = mended.from.elapsed();
    assert!(took < RECOVERY, "{took:?}");
    Row {
        situation: "Broker paused for 3 s",
        done: "SIGSTOP, SIGCONT",
        bots: format!("{seen}, only late"),
        how_long: format!("slowest call {}", rough(slowest)),
        recorded: "nothing unusual",
    }
}

async fn broker_restarted(site: &mut Site) -> Row {
    let look = Look::now();
    site.lab.process().terminate();
    assert_eq!(site.lab.process().exit_code().await, Some(0));
    let log = site.lab.process().log();
    assert!(!log.contains("may have been sent"), "{log}");
    site.driver.settled().await;
    let stopped = Look::now();
    site.driver.more_calls(50).await;
    site.lab.spawn_broker().await;
    let started = Look::now();
    let took = started.until_well(site).await;
    let record = std::fs::read_to_string(site.lab.path("state/audit.jsonl")).unwrap();
    let starts = record
        .lines()
        .filter(|line| line.contains("\"outcome\":\"in_force\""));
    // Two starts, with rules and certificates each; the first one found no `restrictions.json` besides.
    assert_eq!(starts.count(), 5);
    let calls = site.driver.calls_since(look.from);
    for call in calls.iter().filter(|call| !call.told.is_well()) {
        let fits = match &call.told {
            Told::Unconnected => true,
            // Before the first answers of the exchange.
            Told::Failed { outcome, reason } => {
                let is_stopping = reason == "SHUTTING_DOWN" && call.started < stopped.from;
                let is_starting = ["KEY_UNAVAILABLE", "EGRESS_MISMATCH", "CLOCK_UNCERTAIN"]
                    .contains(&reason.as_str())
                    && call.ended > started.from;
                outcome == "not_sent" && (is_stopping || is_starting)
            }
            Told::Answered { .. } | Told::Unheard(_) => false,
        };
        assert!(fits, "{call:?}");
    }
    Row {
        situation: "Broker stopped and started under load",
        done: "SIGTERM; exit code 0, no request unresolved; started again",
        bots: "every call under way was answered; then no connection (nothing sent)".to_owned(),
        how_long: format!("until {} after the start", rough(took)),
        recorded: "each call's outcome; `change` lines *in_force*",
    }
}

/// Restarts the broker with one line more or other in its configuration; returns the configuration that was.
async fn restart_with(site: &mut Site, edit: impl FnOnce(&str) -> String) -> String {
    let before = std::fs::read_to_string(site.lab.path("config.toml")).unwrap();
    let after = edit(&before);
    assert_ne!(before, after);
    std::fs::write(site.lab.path("config.toml"), after).unwrap();
    restart(site).await;
    before
}

/// So that there is something to cancel while no order gets through.
async fn until_orders_stand(site: &Site) {
    until("orders stand on the books", async || {
        site.driver.standing_orders() > 100
    })
    .await;
}

const NOT_PROVEN: &str = "`EGRESS_MISMATCH` (not_sent)";

async fn address_wrong(site: &mut Site) -> Row {
    until_orders_stand(site).await;
    let with_other =
        |config: &str| config.replace("[egress]\n", "[egress]\nexpected_ip = \"127.0.0.9\"\n");
    let right = restart_with(site, with_other).await;
    site.until_readyz_says("instead of egress.expected_ip 127.0.0.9")
        .await;
    site.lab.until_keys().await;
    let look = Look::now();
    site.driver.more_calls(A_WHILE).await;
    assert!(site.readyz().await.starts_with("not ready\n"));
    assert!(site.metric("egress_mismatch").await > 0.5);
    let log = site.lab.process().log();
    assert!(log.contains("instead of egress.expected_ip"), "{log}");
    let seen = look.seen(site).await;
    assert!(seen.is_only(NOT_PROVEN, &[Kind::Order]), "{seen}");
    restart_with(site, |_| right).await;
    let mended = Look::now();
    let took = mended.until_well(site).await;
    Row {
        situation: "Egress address is not the expected one",
        done: "started with another `egress.expected_ip`; corrected, which needs a restart",
        bots: seen.to_string(),
        how_long: format!("until {} after the restart", rough(took)),
        recorded: "`/readyz`: not ready, both addresses; `egress_mismatch` 1; log line",
    }
}

async fn address_never_told(site: &mut Site) -> Row {
    until_orders_stand(site).await;
    site.kucoin.control("POST", "fault", my_ip_fails()).await;
    restart(site).await;
    site.until_readyz_says("has not confirmed yet").await;
    site.lab.until_keys().await;
    until("the clock is known", async || {
        !site.readyz().await.contains("clock")
    })
    .await;
    let look = Look::now();
    site.driver.more_calls(A_WHILE).await;
    let seen = look.seen(site).await;
    assert!(seen.is_only(NOT_PROVEN, &[Kind::Order]), "{seen}");
    for gauge in ["egress_mismatch", "egress_check_failed"] {
        assert!(site.metric(gauge).await > 0.5, "{gauge}");
    }
    let mended = Look::now();
    site.kucoin.control("DELETE", "fault", json!({})).await;
    let took = mended.until_well(site).await;
    Row {
        situation: "Egress address not proven yet",
        done: "started while `my-ip` answers 502; some seconds later it answers",
        bots: seen.to_string(),
        how_long: format!("until {} after", rough(took)),
        recorded: "`/readyz`: not ready, *has not confirmed yet*; `egress_mismatch` and `egress_check_failed` 1",
    }
}

async fn disk_full(site: &mut Site) -> Row {
    until_orders_stand(site).await;
    let full = |config: &str| format!("{config}\n[audit]\nfile = \"/dev/full\"\n");
    let usual = restart_with(site, full).await;
    site.lab.until_only_the_record_fails().await;
    let look = Look::now();
    site.driver.more_calls(A_WHILE).await;
    let seen = look.seen(site).await;
    let unwritable = "`AUDIT_UNAVAILABLE` (not_sent)";
    assert!(seen.is_only(unwritable, &[Kind::Order]), "{seen}");
    assert!(site.metric("audit_failures_total").await > 0.0);
    // The log has the lines that the file could not take.
    let calls = site.driver.calls_since(look.from);
    let log = site.lab.process().log();
    for call in &calls {
        assert!(log.contains(&format!("\\\"{}\\\"", call.id)), "{call:?}");
    }
    restart_with(site, |_| usual).await;
    let mended = Look::now();
    let took = mended.until_well(site).await;
    site.driver.settled().await;
    Row {
        situation: "Audit file on a full disk",
        done: "started with `/dev/full`; then with a file that can be written",
        bots: seen.to_string(),
        how_long: format!("until {} after the restart", rough(took)),
        recorded: "`/readyz`: not ready, with path and error; `audit_writable` 0; every line in the log instead; `audit_failures_total`",
    }
}

async fn log_gone(site: &mut Site) -> Row {
    let look = Look::now();
    site.lab.process().close_log();
    // Something to log, so that the reader reads its last line and goes.
    for text in ["# one\n", "# two\n", "# three\n"] {
        site.lab
            .replace("rules.toml", &format!("{text}{TRADER}{READER}"))
            .unwrap();
        site.taken("rules").await;
    }
    site.driver.more_calls(A_WHILE).await;
    let seen = look.seen(site).await;
    assert!(seen.is_nothing(), "{seen}");
    Row {
        situation: "Log reader gone",
        done: "the pipe on stderr closed; lines logged after that",
        bots: seen.to_string(),
        how_long: "for good".to_owned(),
        recorded: "the audit file goes on",
    }
}
