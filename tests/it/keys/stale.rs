//! How long a cached key stays in use without a word from Vault, what the bots and the operators are told, and what ends it sooner.

use std::collections::BTreeMap;
use std::time::Duration;

use credbroker::proto::{Outcome, SignAndSendRequest};
use credbroker_sim::installation::{RULES, Settings, kv_path};
use credbroker_sim::kucoin::{Fault, FaultAction};
use credbroker_sim::vault::{Fault as VaultFault, FaultRule};
use tokio::time::timeout;
use tonic::Code;

use super::asked;
use super::succession::{INFO, key};
use crate::harness::{Bot, Lab, Time, accounts, failure, spot_cancel_all, spot_order, until};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// Longer than the broker waits between two looks at a Vault that is silent.
const NEXT_LOOK: Duration = Duration::from_secs(31);

/// What the refusal of a key begins with.
const REFUSED: &str = "the key of account main for this scope is not available: ";

/// Bot `maker` trades on both accounts; `main` and `other` have these further keys.
fn rules(main: &str, other: &str) -> String {
    let grant = "[[grant]]\nbot = \"spiffe://demo.test/bot/maker\"\naccount = \"other\"\n\
                 scope = \"spot-margin\"\nallow = [\"read\", \"trade\"]\n";
    RULES
        .replace("[account.main]", &format!("[account.main]\n{main}"))
        .replace("[account.other]", &format!("[account.other]\n{other}"))
        + grant
}

async fn installed(rules: String) -> (Lab, Time) {
    let settings = Settings {
        rules,
        ..Settings::default()
    };
    (Lab::install(settings).await, Time::new(0))
}

async fn ready(main: &str, other: &str) -> (Lab, Time) {
    let (mut lab, time) = installed(rules(main, other)).await;
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    (lab, time)
}

fn of_other(mut request: SignAndSendRequest) -> SignAndSendRequest {
    "other".clone_into(&mut request.account);
    request
}

/// Sends what must be accepted; returns how stale the key that signed it was, in seconds.
async fn stale(bot: &mut Bot, request: SignAndSendRequest) -> u64 {
    let answer = bot.send(request).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
    answer.stale_seconds
}

/// Sends what must be refused for its key; returns what the bot is told.
async fn unavailable(bot: &mut Bot, request: SignAndSendRequest) -> String {
    let status = bot.send(request).await.expect_err("this must be refused");
    let (code, reason, outcome, _) = failure(&status);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (Code::FailedPrecondition, "KEY_UNAVAILABLE", "not_sent"),
        "{status:?}"
    );
    status.message().to_owned()
}

/// The age that a refusal names, in seconds.
fn age_in(told: &str, allowed_s: u64) -> u64 {
    let (before, expected) = if told.contains("wiped from memory") {
        (
            "wiped: last confirmed by Vault ",
            format!("s ago, max_stale_cancel_s is {allowed_s} s"),
        )
    } else {
        (
            "Vault last confirmed it ",
            format!("s ago, and {allowed_s} s are allowed for this request: "),
        )
    };
    let named = told.split_once(before).map(|(_, rest)| rest);
    let (age, rest) = named.and_then(|rest| rest.split_once(' ')).unwrap();
    assert!(rest.starts_with(&expected), "{told}");
    age.parse().unwrap()
}

async fn metric(lab: &Lab, name: &str, account: &str) -> Option<f64> {
    let labels = format!("{{account=\"{account}\",key=\"main\"}}");
    lab.metric(&format!("{name}{labels}")).await
}

/// The broker has met an outage with every key.
async fn until_noticed(lab: &Lab, time: &Time) {
    time.pass(lab, Duration::from_secs(2)).await;
    until("the outage has been noticed", async || {
        let (_, text) = lab.get("/readyz").await;
        ["main", "other"].iter().all(|account| {
            let line = format!("key {account}/main: cached; Vault last confirmed it ");
            text.contains(&line)
        })
    })
    .await;
}

/// The broker looks again until this shows; a look that time leaps over while it waits for its answer finds nothing.
async fn until_seen<F: Future<Output = bool>>(
    what: &str,
    lab: &Lab,
    time: &Time,
    condition: impl Fn() -> F,
) {
    for _ in 0..20 {
        time.pass(lab, NEXT_LOOK).await;
        // Time to answer before the next leap cuts it off.
        if timeout(Duration::from_secs(2), until(what, &condition))
            .await
            .is_ok()
        {
            return;
        }
    }
    panic!("it did not happen: {what}");
}

/// Until Vault has said that all is as before.
async fn until_confirmed(lab: &Lab, time: &Time) {
    let begun = time.passed();
    until_seen("the keys are confirmed again", lab, time, async || {
        for account in ["main", "other"] {
            let age = metric(lab, "key_age_seconds", account).await;
            let since_then = time.passed().saturating_sub(begun).as_secs_f64();
            if age.is_none_or(|age| age >= since_then) {
                return false;
            }
        }
        lab.get("/readyz").await == (200, "ready\n".to_owned())
    })
    .await;
}

#[tokio::test]
async fn an_hour_without_vault_costs_no_cancel_and_no_read_and_orders_only_past_their_bound() {
    for is_sealed in [false, true] {
        let (mut lab, time) = ready("", "").await;
        let mut bot = lab.bot("maker").await;
        assert_eq!(stale(&mut bot, spot_order("before")).await, 0);
        assert_eq!(metric(&lab, "key_available", "main").await, Some(1.0));
        if is_sealed {
            lab.vault.seal();
        } else {
            lab.vault.stop().await.unwrap();
        }
        until_noticed(&lab, &time).await;

        // Within the bound, it only shows.
        let mut last = 0;
        for index in 0..2 {
            time.pass(&lab, MINUTE * 7).await;
            let age = stale(&mut bot, spot_order(&format!("within-{index}"))).await;
            assert!((last + 420..900).contains(&age), "{age} after {last}");
            assert!(stale(&mut bot, accounts()).await >= age);
            last = age;
        }
        let (status, text) = lab.get("/readyz").await;
        assert_eq!(status, 200, "{text}");
        assert!(
            text.contains("key main/main: cached; Vault last confirmed it 8"),
            "{text}"
        );
        assert_eq!(metric(&lab, "key_available", "main").await, Some(1.0));

        // Past it, for the rest of the hour.
        for minutes in [2, 44] {
            time.pass(&lab, MINUTE * minutes).await;
            let mut bot = lab.bot("maker").await;
            let before = lab.kucoin.received().len();
            let told = unavailable(&mut bot, spot_order("past")).await;
            assert!(told.starts_with(REFUSED), "{told}");
            let age = age_in(&told, 900);
            assert!((last + 60..4000).contains(&age), "{age} after {last}");
            assert!(stale(&mut bot, spot_cancel_all()).await >= age);
            assert!(stale(&mut bot, accounts()).await >= age);
            assert_eq!(lab.kucoin.received().len(), before + 2);
            #[expect(clippy::cast_precision_loss, reason = "an hour in seconds is exact")]
            let age_f = age as f64;
            assert!(metric(&lab, "key_age_seconds", "main").await.unwrap() >= age_f);
            assert_eq!(metric(&lab, "key_available", "main").await, Some(0.0));
            let (status, text) = lab.get("/readyz").await;
            assert_eq!(status, 503);
            assert!(
                text.contains(
                    "key main/main: too old for risk-increasing requests; Vault last confirmed it "
                ),
                "{text}"
            );
            last = age;
        }
        assert!(last >= 3600 - 120, "{last}");

        if is_sealed {
            lab.vault.unseal();
        } else {
            lab.vault.restart().await.unwrap();
        }
        until_confirmed(&lab, &time).await;
        let mut bot = lab.bot("maker").await;
        assert_eq!(stale(&mut bot, spot_order("after")).await, 0);
        assert_eq!(stale(&mut bot, spot_cancel_all()).await, 0);
        assert_eq!(metric(&lab, "key_available", "main").await, Some(1.0));
        lab.stop().await;
    }
}

#[tokio::test]
async fn each_account_has_bounds_of_its_own_and_one_that_serves_keeps_the_broker_ready() {
    let (mut lab, time) = ready(
        "max_stale_s = 60\nmax_stale_cancel_s = 300",
        "max_stale_s = 600",
    )
    .await;
    let mut bot = lab.bot("maker").await;
    lab.vault.stop().await.unwrap();
    until_noticed(&lab, &time).await;
    time.pass(&lab, MINUTE * 2).await;
    let told = unavailable(&mut bot, spot_order("main")).await;
    assert!((120..300).contains(&age_in(&told, 60)), "{told}");
    assert!(stale(&mut bot, spot_cancel_all()).await >= 120);
    assert!(stale(&mut bot, of_other(spot_order("other"))).await >= 120);
    assert_eq!(metric(&lab, "key_available", "main").await, Some(0.0));
    assert_eq!(metric(&lab, "key_available", "other").await, Some(1.0));
    let (status, text) = lab.get("/readyz").await;
    assert_eq!(status, 200, "{text}");
    assert!(
        text.contains("key main/main: too old for risk-increasing requests; "),
        "{text}"
    );
    assert!(text.contains("key other/main: cached; "), "{text}");

    // Past the second bound of the one, within the first of the other.
    time.sleep(&lab, MINUTE * 4);
    let told = unavailable(&mut bot, spot_cancel_all()).await;
    assert!((360..600).contains(&age_in(&told, 300)), "{told}");
    assert!(stale(&mut bot, of_other(spot_order("other-still"))).await >= 360);

    // Other bounds in the rules count from the next call on.
    let looser = rules("max_stale_s = 3600", "max_stale_s = 60");
    std::fs::write(lab.path("rules.new"), looser).unwrap();
    std::fs::rename(lab.path("rules.new"), lab.path("rules.toml")).unwrap();
    until("the bounds of other are in force", async || {
        metric(&lab, "key_available", "other").await == Some(0.0)
    })
    .await;
    let told = unavailable(&mut bot, of_other(spot_order("other-too-old"))).await;
    assert!(age_in(&told, 60) >= 360, "{told}");
    lab.stop().await;
}

#[tokio::test]
async fn past_the_last_bound_nothing_is_signed_the_key_is_wiped_and_vault_brings_it_back() {
    let (mut lab, time) = ready("", "max_stale_cancel_s = 604800").await;
    lab.vault.stop().await.unwrap();
    until_noticed(&lab, &time).await;
    time.pass(&lab, HOUR * 23).await;
    let mut bot = lab.bot("maker").await;
    assert!(stale(&mut bot, spot_cancel_all()).await >= 23 * 3600);
    assert!(stale(&mut bot, accounts()).await >= 23 * 3600);

    // Whether it is wiped by now or in a moment: it signs nothing.
    time.sleep(&lab, HOUR * 2);
    for request in [spot_cancel_all(), accounts()] {
        let told = unavailable(&mut bot, request).await;
        assert!(age_in(&told, 86400) >= 25 * 3600, "{told}");
    }
    until_seen("the key is wiped", &lab, &time, async || {
        let (status, text) = lab.get("/readyz?verbose").await;
        status == 503
            && text.contains("key main/main: waiting for Vault: wiped: last confirmed by Vault 9")
            && text.contains("s ago, max_stale_cancel_s is 86400 s")
    })
    .await;
    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(!text.contains("key main/main: version 1 loaded"), "{text}");
    assert!(text.contains("key other/main: version 1 loaded"), "{text}");
    assert_eq!(metric(&lab, "key_age_seconds", "main").await, None);
    assert_eq!(metric(&lab, "key_version", "main").await, None);
    // With the time known again it is the key that orders are refused for.
    until("the time is measured", async || {
        !lab.get("/readyz").await.1.contains("clock ")
    })
    .await;
    let before = lab.kucoin.received().len();
    for request in [spot_cancel_all(), accounts(), spot_order("wiped")] {
        assert!(unavailable(&mut bot, request).await.starts_with(REFUSED));
    }
    assert_eq!(lab.kucoin.received().len(), before);
    assert!(stale(&mut bot, of_other(accounts())).await >= 25 * 3600);

    let read = |account: &str| {
        let asked = asked(&lab.vault, account);
        asked
            .iter()
            .filter(|(what, _)| what == "GET data?version=1")
            .count()
    };
    assert_eq!((read("main"), read("other")), (1, 1));
    lab.vault.restart().await.unwrap();
    // Each refusal has Vault asked. No time is skipped until the key is back: it would cut off the read.
    until("what was wiped is read again", async || {
        bot.clone().send(accounts()).await.is_ok()
    })
    .await;
    until_confirmed(&lab, &time).await;
    assert_eq!(stale(&mut bot, spot_order("back")).await, 0);
    assert_eq!((read("main"), read("other")), (2, 1));
    lab.stop().await;
}

#[tokio::test]
async fn after_a_sleep_past_the_bound_the_first_refusal_has_vault_asked_at_once() {
    let (mut lab, time) = installed(rules("", "")).await;
    // No poll comes while this test runs.
    lab.reconfigure("poll_s = 1", "poll_s = 3600");
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    let mut bot = lab.bot("maker").await;
    time.sleep(&lab, MINUTE * 14);
    assert_eq!(
        stale(&mut bot, spot_order("short")).await,
        0,
        "no outage that anybody knows of"
    );
    for index in 0..2 {
        assert_eq!(asked(&lab.vault, "main").len(), 2 + index);
        time.sleep(&lab, MINUTE * 16);
        let (status, text) = lab.get("/readyz").await;
        assert_eq!(status, 503);
        assert!(
            text.contains(
                "key main/main: too old for risk-increasing requests; Vault last confirmed it "
            ),
            "{text}"
        );
        let told = unavailable(&mut bot, spot_order("long")).await;
        assert!(age_in(&told, 900) >= 960, "{told}");
        assert!(told.ends_with("not read yet"), "{told}");
        until("Vault has been asked", async || {
            metric(&lab, "key_available", "main").await == Some(1.0)
        })
        .await;
        lab.until_ready().await;
        assert_eq!(
            stale(&mut bot, spot_order(&format!("awake-{index}"))).await,
            0
        );
    }
    lab.stop().await;
}

#[tokio::test]
async fn a_key_past_its_last_bound_is_wiped_at_once_and_not_at_the_next_poll() {
    let (mut lab, time) = installed(rules("", "max_stale_cancel_s = 604800")).await;
    // No poll comes while this test runs.
    lab.reconfigure("poll_s = 1", "poll_s = 3600");
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    lab.vault.stop().await.unwrap();
    time.sleep(&lab, HOUR * 25);
    // It is wiped, Vault is asked, and what that came to shows beside it.
    let begin = "key main/main: waiting for Vault: wiped: last confirmed by Vault 90";
    let part = "s ago, max_stale_cancel_s is 86400 s; ";
    let is_it = |line: &str| line.starts_with(begin) && line.contains(part);
    until("the key is wiped, and readyz says so", async || {
        let (status, text) = lab.get("/readyz?verbose").await;
        status == 503
            && text.lines().any(is_it)
            && text.contains("key other/main: version 1 loaded")
    })
    .await;
    let mut bot = lab.bot("maker").await;
    let told = unavailable(&mut bot, spot_cancel_all()).await;
    assert!(told.contains("wiped: ") && told.contains(part), "{told}");
    assert_eq!(metric(&lab, "key_version", "main").await, None);

    lab.vault.restart().await.unwrap();
    until_confirmed(&lab, &time).await;
    assert_eq!(stale(&mut bot, spot_cancel_all()).await, 0);
    lab.stop().await;
}

#[tokio::test]
async fn wiped_key_ends_a_request_to_vault_that_hangs_and_drops_the_version_under_test() {
    let (mut lab, time) = installed(rules("", "max_stale_cancel_s = 604800")).await;
    lab.reconfigure("timeout_ms = 1000", "timeout_ms = 60000");
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    let busy = FaultAction::RateLimited {
        reset_ms: Some(100),
    };
    lab.kucoin.fault(Fault {
        times: None,
        ..Fault::once(INFO, busy)
    });
    lab.kucoin.add_key(key(2));
    lab.put_key("main", "main", &key(2));
    until("the version waits for its test", async || {
        let text = lab.get("/readyz?verbose").await.1;
        text.contains("version 2 is waiting for its test")
    })
    .await;
    let path = format!("kv/metadata/{}", kv_path("main", "main"));
    lab.vault.fault(FaultRule::new(&path, VaultFault::Hang));
    until("a request to Vault hangs", async || {
        let asked = asked(&lab.vault, "main");
        asked.last().is_some_and(|(_, status)| status.is_none())
    })
    .await;
    time.sleep(&lab, HOUR * 25);
    let is_it = |line: &str| {
        line.starts_with("key main/main: waiting for Vault: wiped: last confirmed by Vault 90")
            && line.contains(" s; ")
            && line.ends_with("key wiped before the test was answered")
    };
    until("the request has ended", async || {
        lab.get("/readyz?verbose").await.1.lines().any(is_it)
    })
    .await;
    lab.stop().await;
}

#[tokio::test]
async fn wiped_key_is_reloaded_after_a_suspend_without_a_call() {
    let (mut lab, time) = installed(rules("", "")).await;
    lab.reconfigure("poll_s = 1", "poll_s = 3600");
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    time.sleep(&lab, HOUR * 25);
    until("the key has been read again", async || {
        let asked = asked(&lab.vault, "main");
        let reads = asked
            .iter()
            .filter(|(what, _)| what == "GET data?version=1");
        reads.count() == 2
    })
    .await;
    until("the key is loaded", async || {
        metric(&lab, "key_available", "main").await == Some(1.0)
    })
    .await;
    let mut bot = lab.bot("maker").await;
    assert_eq!(stale(&mut bot, spot_cancel_all()).await, 0);
    lab.stop().await;
}

/// What Vault is told to say.
type Say<'a> = &'a dyn Fn(&Lab);

#[tokio::test]
async fn vaults_word_evicts_at_once_after_an_outage_and_a_new_outage_does_not_undo_it() {
    let path = kv_path("main", "main");
    let disabled = BTreeMap::from([("state".to_owned(), "disabled".to_owned())]);
    let disable: Say = &|lab| lab.vault.set_custom_metadata("kv", &path, disabled.clone());
    let delete: Say = &|lab| lab.vault.delete_metadata("kv", &path);
    let deny: Say = &|lab| lab.vault.deny(None, None, &format!("kv/metadata/{path}"));
    for (say, reason) in [
        (disable, "its metadata in Vault says state=disabled"),
        (delete, "Vault has no such key (404)"),
        (
            deny,
            "Vault refuses it to the broker (403); check the broker's policy",
        ),
    ] {
        let (mut lab, time) = ready("", "").await;
        let mut bot = lab.bot("maker").await;
        let silent = || {
            let fault = VaultFault::Status {
                code: 503,
                retry_after_s: None,
            };
            lab.vault.fault(FaultRule::new("", fault));
        };
        silent();
        until_noticed(&lab, &time).await;
        time.pass(&lab, MINUTE * 5).await;
        assert!(stale(&mut bot, spot_order("stale")).await >= 300);
        // The word is spoken while nobody can hear it.
        say(&lab);
        time.pass(&lab, NEXT_LOOK).await;
        assert!(stale(&mut bot, spot_cancel_all()).await >= 331);
        lab.vault.clear_faults();
        until_seen(reason, &lab, &time, async || {
            let (_, text) = lab.get("/readyz").await;
            text.contains(&format!("key main/main: not available: {reason}"))
                && !text.contains("key other/main")
        })
        .await;
        let refused = async |bot: &mut Bot| {
            for request in [spot_order("evicted"), spot_cancel_all(), accounts()] {
                let told = unavailable(bot, request).await;
                assert_eq!(told, format!("{REFUSED}{reason}"));
            }
        };
        refused(&mut bot).await;
        assert_eq!(metric(&lab, "key_age_seconds", "main").await, None);
        assert_eq!(stale(&mut bot, of_other(spot_order("other"))).await, 0);

        silent();
        until_seen(
            "the next outage has been noticed",
            &lab,
            &time,
            async || {
                let (_, text) = lab.get("/readyz").await;
                text.contains("key other/main: cached; ")
            },
        )
        .await;
        refused(&mut bot).await;
        lab.stop().await;
    }
}

/// One path of Vault is silent, another one speaks.
#[tokio::test]
async fn a_key_that_is_disabled_while_its_secret_cannot_be_read_is_evicted() {
    let (mut lab, time) = ready("", "").await;
    let mut bot = lab.bot("maker").await;
    lab.vault
        .fault(FaultRule::new("kv/data/", VaultFault::Close));
    super::put(&lab.vault, "main", 2);
    time.pass(&lab, Duration::from_secs(2)).await;
    until("the outage has been noticed", async || {
        let (_, text) = lab.get("/readyz").await;
        text.contains("key main/main: cached; ")
    })
    .await;
    stale(&mut bot, spot_order("first")).await;
    let disabled = BTreeMap::from([("state".to_owned(), "disabled".to_owned())]);
    let path = kv_path("main", "main");
    lab.vault.set_custom_metadata("kv", &path, disabled);
    until_seen("the key is evicted", &lab, &time, async || {
        let (_, text) = lab.get("/readyz").await;
        text.contains("key main/main: not available: its metadata in Vault says state=disabled")
    })
    .await;
    unavailable(&mut bot, spot_cancel_all()).await;
    lab.stop().await;
}
