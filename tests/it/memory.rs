//! Keys that are no longer used are erased from the memory of the real program.
//!
//! As root, the tests read `/proc/PID/mem` of a broker whose Vault and exchange run in another process, and search it for
//! the values of keys made for the test and for everything that can sign like them.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use credbroker::proto::{Candidate, TestKeyRequest};
use credbroker_sim::installation::{MAIN_UID, ROOT_TOKEN, Settings, kv_path};
use credbroker_sim::kucoin::{KucoinSettings, Limits, Partner, SimKey};
use credbroker_sim::pki::Ca;
use credbroker_sim::vault::VaultSim;
use rustix::process::geteuid;
use sha2::block_api::compress256;
use uuid::Uuid;

use crate::delivery::tls_of;
use crate::harness::{Bot, Lab, Patient, accounts, not_run, spot_order, until};

/// The minimum length of a searched part: random text of this length does not occur by chance.
const PART: usize = 16;

/// State of SHA-256 before the first block. Source: FIPS 180-4, 5.3.3.
const SHA256_START: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// A byte sequence to search for.
struct Needle {
    name: &'static str,
    bytes: Vec<u8>,
}

/// An occurrence of one.
struct Hit {
    name: &'static str,
    address: u64,
    region: String,
    /// The memory around it, as text.
    around: String,
}

impl fmt::Debug for Hit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            address,
            region,
            around,
        } = self;
        write!(f, "\n{name} at {address:#x} in {region}: {around}")
    }
}

/// A made-up key with random values.
fn random_key() -> SimKey {
    let random = || Uuid::new_v4();
    SimKey {
        api_key: random().simple().to_string()[..24].to_owned(),
        // As long as KuCoin's own.
        api_secret: random().to_string(),
        passphrase: random().simple().to_string(),
        partners: vec![Partner {
            id: "fake-partner".to_owned(),
            key: random().to_string(),
        }],
        ..SimKey::fake(MAIN_UID)
    }
}

/// Adds the start and the end of a value: freeing memory often overwrites only the start.
fn add_start_and_end(needles: &mut Vec<Needle>, name: &'static str, value: &[u8]) {
    assert!(value.len() >= PART, "{name}");
    for part in [&value[..PART], &value[value.len() - PART..]] {
        let bytes = part.to_vec();
        needles.push(Needle { name, bytes });
    }
}

/// An HMAC key, padded to a block and combined with `pad`.
fn block(key: &[u8], pad: u8) -> [u8; 64] {
    let mut block = [pad; 64];
    for (byte, key) in block.iter_mut().zip(key) {
        *byte ^= key;
    }
    block
}

/// Adds everything that can sign like this HMAC key.
fn add_hmac_needles(
    needles: &mut Vec<Needle>,
    [text, block_text, midstate]: [&'static str; 3],
    key: &[u8],
) {
    add_start_and_end(needles, text, key);
    let mut states = Vec::new();
    for pad in [0x36, 0x5c] {
        let block = block(key, pad);
        // As the words that SHA-256 reads from it.
        let swapped: Vec<u8> = block
            .chunks(4)
            .flat_map(|word| word.iter().rev().copied().collect::<Vec<_>>())
            .collect();
        for bytes in [&block[..32], &swapped[..32]] {
            add_start_and_end(needles, block_text, bytes);
        }
        let mut state = SHA256_START;
        compress256(&mut state, &[block]);
        // In the order of the standard, and in the order of the processor's SHA instructions.
        for order in [[0, 1, 2, 3], [4, 5, 6, 7], [5, 4, 1, 0], [7, 6, 3, 2]] {
            let words = order.map(|word: usize| state[word]);
            let little: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let big: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            add_start_and_end(needles, midstate, &little);
            add_start_and_end(needles, midstate, &big);
        }
        states.push(state);
    }
    // The states are right if they produce the same signature as another library.
    let finish = |mut state: [u32; 8], message: &[u8]| {
        let mut last = [0; 64];
        last[..message.len()].copy_from_slice(message);
        last[message.len()] = 0x80;
        let bits = u64::try_from((64 + message.len()) * 8).unwrap();
        last[56..].copy_from_slice(&bits.to_be_bytes());
        compress256(&mut state, &[last]);
        state.map(u32::to_be_bytes).concat()
    };
    let ours = finish(states[1], &finish(states[0], b"message"));
    let theirs = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), b"message");
    assert_eq!(ours, theirs.as_ref());
}

/// Everything of a key that must be erased.
fn needles(key: &SimKey) -> Vec<Needle> {
    let mut all = Vec::new();
    let names = [
        "secret",
        "secret as an HMAC block",
        "HMAC state of the secret",
    ];
    add_hmac_needles(&mut all, names, key.api_secret.as_bytes());
    let names = [
        "partner key",
        "partner key as an HMAC block",
        "HMAC state of the partner key",
    ];
    add_hmac_needles(&mut all, names, key.partners[0].key.as_bytes());
    add_start_and_end(&mut all, "passphrase", key.passphrase.as_bytes());
    let secret = hmac::Key::new(hmac::HMAC_SHA256, key.api_secret.as_bytes());
    let signed = hmac::sign(&secret, key.passphrase.as_bytes());
    add_start_and_end(&mut all, "signed passphrase, raw", signed.as_ref());
    let signed = BASE64.encode(signed.as_ref());
    add_start_and_end(&mut all, "signed passphrase", signed.as_bytes());
    all
}

/// Searches all writable memory of a process: heap, anonymous maps, the stacks of all threads, and the data of loaded
/// files.
fn search(id: u32, needles: &[Needle]) -> Vec<Hit> {
    let maps = std::fs::read_to_string(format!("/proc/{id}/maps")).unwrap();
    let memory = File::open(format!("/proc/{id}/mem")).unwrap();
    // Indexed by their first two bytes, so that most positions are skipped at once.
    let mut starts = vec![Vec::new(); 1 << 16];
    for needle in needles {
        let start = u16::from_le_bytes([needle.bytes[0], needle.bytes[1]]);
        starts[usize::from(start)].push(needle);
    }
    let mut hits = Vec::new();
    for line in maps.lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        if !rest.starts_with("rw") {
            continue;
        }
        let (from, to) = range.split_once('-').unwrap();
        let [from, to] = [from, to].map(|text| u64::from_str_radix(text, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(to - from).unwrap()];
        // A map can disappear during the search.
        if memory.read_exact_at(&mut bytes, from).is_err() {
            continue;
        }
        for at in 0..bytes.len().saturating_sub(PART) {
            let start = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            if start == 0 {
                continue;
            }
            for needle in &starts[usize::from(start)] {
                if bytes[at..].starts_with(&needle.bytes) {
                    let around = &bytes[at.saturating_sub(96)..bytes.len().min(at + 96)];
                    hits.push(Hit {
                        name: needle.name,
                        address: from + at as u64,
                        region: line
                            .split_whitespace()
                            .nth(5)
                            .unwrap_or("anonymous")
                            .to_owned(),
                        around: around.escape_ascii().to_string(),
                    });
                }
            }
        }
    }
    hits
}

/// Whether the test can run here; otherwise reports that it did not.
fn is_root(test: &str) -> bool {
    let is_root = geteuid().is_root();
    if !is_root {
        not_run(test, "root", "only root can read another process's memory");
    }
    is_root
}

/// Starts a broker as a separate process, with TLS to Vault and the exchange, as in production.
async fn start(key: &SimKey) -> (Lab, Bot<Patient>) {
    let ca = Ca::new("CA of simulated servers").unwrap();
    let server = ca.server().unwrap();
    let vault = VaultSim::start_dev_tls(ROOT_TOKEN, &server).await.unwrap();
    let settings = Settings {
        simulated_vault: Some(vault),
        vault: "poll_s = 1\ntimeout_ms = 1000\nroots = \"servers-ca.pem\"".to_owned(),
        kucoin: KucoinSettings {
            tls: Some(tls_of(&ca)),
            limits: Limits::none(),
            ..KucoinSettings::default()
        },
        files: vec![("servers-ca.pem", ca.certificate_pem().to_owned())],
        egress: "roots = \"servers-ca.pem\"".to_owned(),
        rules: RULES.to_owned(),
        keys: Vec::new(),
        process: true,
        wait_ready: false,
        ..Settings::default()
    };
    let mut lab = Lab::install(settings).await;
    lab.add_key("main", "main", key);
    lab.spawn_broker().await;
    lab.until_ready().await;
    let mut bot = lab.patient_bot("maker").await;
    trade(&mut bot).await;
    (lab, bot)
}

const RULES: &str = r#"
[account.main]
key = { spot-margin = "main" }
partner.spot-margin = { id = "fake-partner" }

[[grant]]
bot = "spiffe://demo.test/bot/maker"
account = "main"
scope = "spot-margin"
allow = ["read", "trade"]
"#;

/// Sends calls in parallel, so that every thread signs, over several connections.
async fn trade(bot: &mut Bot<Patient>) {
    let run = fastrand::u32(..);
    for round in 0..5 {
        let calls = (0..20).map(|number| {
            let mut bot = bot.clone();
            async move {
                let order = spot_order(&format!("order-{run}-{round}-{number}"));
                bot.send(order).await.unwrap();
                bot.send(accounts()).await.unwrap();
            }
        });
        futures_util::future::join_all(calls).await;
    }
}

/// Asserts that memory has exactly what signing with the key needs: its HMAC states and its signed passphrase.
fn assert_found(lab: &mut Lab, needles: &[Needle]) {
    let hits = search(lab.process().id(), needles);
    for name in [
        "HMAC state of the secret",
        "HMAC state of the partner key",
        "signed passphrase",
    ] {
        assert!(
            hits.iter().any(|hit| hit.name == name),
            "no {name} in memory"
        );
    }
    let unneeded = hits
        .iter()
        .filter(|hit| !hit.name.starts_with("HMAC state") && hit.name != "signed passphrase");
    let unneeded: Vec<_> = unneeded.collect();
    assert!(unneeded.is_empty(), "not needed to sign: {unneeded:?}");
}

/// Asserts that the key is erased.
async fn assert_erased(lab: &mut Lab, needles: &[Needle]) {
    let id = lab.process().id();
    let hits = std::cell::RefCell::new(Vec::new());
    let erased = until("the key is erased from memory", async || {
        *hits.borrow_mut() = search(id, needles);
        hits.borrow().is_empty()
    });
    let erased = std::panic::AssertUnwindSafe(erased);
    let is_erased = futures_util::FutureExt::catch_unwind(erased).await.is_ok();
    assert!(is_erased, "{:?}", hits.borrow());
}

#[tokio::test]
async fn memory_search_finds_secrets_in_another_process() {
    if !is_root("search of memory") {
        return;
    }
    let key = random_key();
    let needles = needles(&key);
    let mut other = Command::new("sleep")
        .arg("60")
        .env("PLANTED", format!("{}{}", key.api_secret, key.passphrase))
        .spawn()
        .unwrap();
    until("both values are found", async || {
        let hits = search(other.id(), &needles);
        ["secret", "passphrase"]
            .iter()
            .all(|name| hits.iter().any(|hit| hit.name == *name))
    })
    .await;
    other.kill().unwrap();
    other.wait().unwrap();
}

#[tokio::test]
async fn revoked_key_is_erased_from_memory() {
    if !is_root("memory after a revocation") {
        return;
    }
    let key = random_key();
    let needles = needles(&key);
    let (mut lab, _bot) = start(&key).await;
    assert_found(&mut lab, &needles);
    let revoked = lab
        .admin_cli("anna", &["keys", "revoke", "main", "--key", "main"])
        .await;
    assert_eq!(revoked.code, Some(0), "{revoked:?}");
    assert_erased(&mut lab, &needles).await;
}

#[tokio::test]
async fn replaced_key_is_erased_from_memory() {
    if !is_root("memory after a rotation") {
        return;
    }
    let (first, second) = (random_key(), random_key());
    let (old, new) = (needles(&first), needles(&second));
    let (mut lab, mut bot) = start(&first).await;
    assert_found(&mut lab, &old);
    lab.add_key("main", "main", &second);
    until_reported(&lab, "key main/main: version 2 loaded").await;
    trade(&mut bot).await;
    assert_erased(&mut lab, &old).await;
    assert_found(&mut lab, &new);
}

#[tokio::test]
async fn key_deleted_in_vault_is_erased_from_memory() {
    if !is_root("memory after a deletion") {
        return;
    }
    let key = random_key();
    let needles = needles(&key);
    let (mut lab, _bot) = start(&key).await;
    assert_found(&mut lab, &needles);
    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    until_reported(&lab, "key main/main: not available").await;
    assert_erased(&mut lab, &needles).await;
}

#[tokio::test]
async fn new_version_rejected_by_the_exchange_is_erased_from_memory() {
    if !is_root("memory after a rejected version") {
        return;
    }
    let (good, unknown) = (random_key(), random_key());
    let needles = needles(&unknown);
    let (mut lab, _bot) = start(&good).await;
    lab.put_key("main", "main", &unknown);
    until_reported(&lab, "version 2 was rejected").await;
    assert_erased(&mut lab, &needles).await;
}

#[tokio::test]
async fn key_tested_by_an_admin_is_erased_from_memory() {
    if !is_root("memory after the test of a key") {
        return;
    }
    let (good, other) = (random_key(), random_key());
    let needles = needles(&other);
    let (mut lab, _bot) = start(&good).await;
    lab.kucoin.add_key(other.clone());
    let mut admin = lab.admin_client("anna").await;
    let request = TestKeyRequest {
        account: "main".to_owned(),
        key: "main".to_owned(),
        candidate: Some(Candidate {
            api_key: other.api_key.clone(),
            api_secret: other.api_secret.clone(),
            passphrase: other.passphrase.clone(),
            partner_key: other.partners[0].key.clone(),
            key_version: 3,
        }),
        try_order: true,
    };
    let tested = admin.test_key(request).await.unwrap().into_inner();
    assert!(!tested.is_inconclusive, "{tested:?}");
    // Two libraries keep received data until the admin's connection closes.
    let hits = search(lab.process().id(), &needles);
    let secrets = hits.iter().filter(|hit| hit.name == "secret").count();
    assert!(
        secrets <= 2 * 2,
        "more copies than SECURITY.md documents: {hits:?}"
    );
    drop(admin);
    assert_erased(&mut lab, &needles).await;
}

async fn until_reported(lab: &Lab, part: &str) {
    let is_reported = async || lab.get("/readyz?verbose").await.1.contains(part);
    until(&format!("/readyz reports {part:?}"), is_reported).await;
}
