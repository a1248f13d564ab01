//! How long a cached key stays in use during a Vault outage, what bots and operators see, and what removes it sooner.

use std::collections::BTreeMap;
use std::time::Duration;

use credbroker::proto::{Outcome, SignAndSendRequest};
use credbroker_sim::installation::{RULES, Settings, kv_path};
use credbroker_sim::kucoin::{Fault, FaultAction};
use credbroker_sim::vault::{Fault as VaultFault, FaultRule};
use tokio::time::timeout;
use tonic::Code;

use super::requests_for;
use super::succession::{INFO, key};
use crate::harness::{Bot, Lab, Time, accounts, failure, spot_cancel_all, spot_order, until};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// Longer than the broker ever waits between two requests to an unavailable Vault.
const NEXT_RETRY: Duration = Duration::from_secs(31);

/// Start of the message of `KEY_UNAVAILABLE`.
const REFUSED: &str = "the key of account main for this scope is not available: ";

/// Bot `maker` trades on both accounts; `main` and `other` are further settings of these accounts.
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

/// Sends a request that must be accepted; returns `stale_seconds` of the answer.
async fn stale(bot: &mut Bot, request: SignAndSendRequest) -> u64 {
    let answer = bot.send(request).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
    answer.stale_seconds
}

/// Sends a request that must be rejected with `KEY_UNAVAILABLE`; returns the message.
async fn unavailable(bot: &mut Bot, request: SignAndSendRequest) -> String {
    let status = bot
        .send(request)
        .await
        .expect_err("expected KEY_UNAVAILABLE");
    let (code, reason, outcome, _) = failure(&status);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (Code::FailedPrecondition, "KEY_UNAVAILABLE", "not_sent"),
        "{status:?}"
    );
    status.message().to_owned()
}

/// The age in seconds in a `KEY_UNAVAILABLE` message.
fn age_in(message: &str, allowed_s: u64) -> u64 {
    let (before, expected) = if message.contains("wiped from memory") {
        (
            "wiped from memory: last confirmed by Vault ",
            format!("s ago, max_stale_cancel_s is {allowed_s} s"),
        )
    } else {
        (
            "Vault last confirmed the key ",
            format!("s ago (limit for this request: {allowed_s} s); since then: "),
        )
    };
    let after = message.split_once(before).map(|(_, rest)| rest);
    let (age, rest) = after.and_then(|rest| rest.split_once(' ')).unwrap();
    assert!(rest.starts_with(&expected), "{message}");
    age.parse().unwrap()
}

async fn metric(lab: &Lab, name: &str, account: &str) -> Option<f64> {
    let labels = format!("{{account=\"{account}\",key=\"main\"}}");
    lab.metric(&format!("{name}{labels}")).await
}

/// Waits until the broker has noticed the outage for every key.
async fn until_noticed(lab: &Lab, time: &Time) {
    time.pass(lab, Duration::from_secs(2)).await;
    until("the outage has been noticed", async || {
        let (_, text) = lab.get("/readyz").await;
        ["main", "other"].iter().all(|account| {
            let line = format!("key {account}/main: cached; Vault last confirmed the key ");
            text.contains(&line)
        })
    })
    .await;
}

/// Advances the time by one retry interval after the other until `condition` holds. A request is aborted if the time jumps past its
/// limit, so several rounds may be needed.
async fn pass_time_until<F: Future<Output = bool>>(
    label: &str,
    lab: &Lab,
    time: &Time,
    condition: impl Fn() -> F,
) {
    for _ in 0..20 {
        time.pass(lab, NEXT_RETRY).await;
        // Time for the response before the next jump aborts the request.
        if timeout(Duration::from_secs(2), until(label, &condition))
            .await
            .is_ok()
        {
            return;
        }
    }
    panic!("timed out: {label}");
}

/// Waits until Vault has confirmed all keys again.
async fn until_confirmed(lab: &Lab, time: &Time) {
    let start = time.passed();
    pass_time_until("the keys are confirmed again", lab, time, async || {
        for account in ["main", "other"] {
            let age = metric(lab, "key_age_seconds", account).await;
            let elapsed = time.passed().saturating_sub(start).as_secs_f64();
            if age.is_none_or(|age| age >= elapsed) {
                return false;
            }
        }
        lab.get("/readyz").await == (200, "ready\n".to_owned())
    })
    .await;
}

#[tokio::test]
async fn hour_without_vault_rejects_orders_after_max_stale_but_no_cancels_or_reads() {
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

        // Up to max_stale_s, orders are accepted, and stale_seconds grows.
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
            text.contains("key main/main: cached; Vault last confirmed the key 8"),
            "{text}"
        );
        assert_eq!(metric(&lab, "key_available", "main").await, Some(1.0));

        // Past max_stale_s, for the rest of the hour.
        for minutes in [2, 44] {
            time.pass(&lab, MINUTE * minutes).await;
            let mut bot = lab.bot("maker").await;
            let before = lab.kucoin.received().len();
            let message = unavailable(&mut bot, spot_order("past")).await;
            assert!(message.starts_with(REFUSED), "{message}");
            let age = age_in(&message, 900);
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
                    "key main/main: too old for risk-increasing requests; Vault last confirmed the key "
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
async fn max_stale_is_set_per_account_and_one_usable_key_keeps_the_broker_ready() {
    let (mut lab, time) = ready(
        "max_stale_s = 60\nmax_stale_cancel_s = 300",
        "max_stale_s = 600",
    )
    .await;
    let mut bot = lab.bot("maker").await;
    lab.vault.stop().await.unwrap();
    until_noticed(&lab, &time).await;
    time.pass(&lab, MINUTE * 2).await;
    let message = unavailable(&mut bot, spot_order("main")).await;
    assert!((120..300).contains(&age_in(&message, 60)), "{message}");
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

    // Past max_stale_cancel_s of main, within max_stale_s of other.
    time.sleep(&lab, MINUTE * 4);
    let message = unavailable(&mut bot, spot_cancel_all()).await;
    assert!((360..600).contains(&age_in(&message, 300)), "{message}");
    assert!(stale(&mut bot, of_other(spot_order("other-still"))).await >= 360);

    // New limits in the rules apply to the next call.
    let looser = rules("max_stale_s = 3600", "max_stale_s = 60");
    std::fs::write(lab.path("rules.new"), looser).unwrap();
    std::fs::rename(lab.path("rules.new"), lab.path("rules.toml")).unwrap();
    until("the new limits of other are in effect", async || {
        metric(&lab, "key_available", "other").await == Some(0.0)
    })
    .await;
    let message = unavailable(&mut bot, of_other(spot_order("other-too-old"))).await;
    assert!(age_in(&message, 60) >= 360, "{message}");
    lab.stop().await;
}

#[tokio::test]
async fn key_older_than_max_stale_cancel_is_wiped_and_reloaded_once_vault_is_back() {
    let (mut lab, time) = ready("", "max_stale_cancel_s = 604800").await;
    lab.vault.stop().await.unwrap();
    until_noticed(&lab, &time).await;
    time.pass(&lab, HOUR * 23).await;
    let mut bot = lab.bot("maker").await;
    assert!(stale(&mut bot, spot_cancel_all()).await >= 23 * 3600);
    assert!(stale(&mut bot, accounts()).await >= 23 * 3600);

    // It signs nothing any more, whether or not it is wiped yet.
    time.sleep(&lab, HOUR * 2);
    for request in [spot_cancel_all(), accounts()] {
        let message = unavailable(&mut bot, request).await;
        assert!(age_in(&message, 86400) >= 25 * 3600, "{message}");
    }
    pass_time_until("the key is wiped", &lab, &time, async || {
        let (status, text) = lab.get("/readyz?verbose").await;
        status == 503
            && text.contains(
                "key main/main: waiting for Vault: wiped from memory: last confirmed by Vault 9",
            )
            && text.contains("s ago, max_stale_cancel_s is 86400 s")
    })
    .await;
    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(!text.contains("key main/main: version 1 loaded"), "{text}");
    assert!(text.contains("key other/main: version 1 loaded"), "{text}");
    assert_eq!(metric(&lab, "key_age_seconds", "main").await, None);
    assert_eq!(metric(&lab, "key_version", "main").await, None);
    // Once the exchange's time is known again, orders are rejected because of the key.
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
        let requests = requests_for(&lab.vault, account);
        requests
            .iter()
            .filter(|(request, _)| request == "GET data?version=1")
            .count()
    };
    assert_eq!((read("main"), read("other")), (1, 1));
    lab.vault.restart().await.unwrap();
    // Each rejected call triggers a read. The time must not jump until the key is loaded: that would abort the read.
    until("the wiped key is read again", async || {
        bot.clone().send(accounts()).await.is_ok()
    })
    .await;
    until_confirmed(&lab, &time).await;
    assert_eq!(stale(&mut bot, spot_order("back")).await, 0);
    assert_eq!((read("main"), read("other")), (2, 1));
    lab.stop().await;
}

#[tokio::test]
async fn first_rejection_after_a_long_suspend_refreshes_the_key_at_once() {
    let (mut lab, time) = installed(rules("", "")).await;
    // No poll takes place during this test.
    lab.reconfigure("poll_s = 1", "poll_s = 3600");
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    let mut bot = lab.bot("maker").await;
    time.sleep(&lab, MINUTE * 14);
    assert_eq!(
        stale(&mut bot, spot_order("short")).await,
        0,
        "no outage was noticed"
    );
    for index in 0..2 {
        assert_eq!(requests_for(&lab.vault, "main").len(), 2 + index);
        time.sleep(&lab, MINUTE * 16);
        let (status, text) = lab.get("/readyz").await;
        assert_eq!(status, 503);
        assert!(
            text.contains(
                "key main/main: too old for risk-increasing requests; Vault last confirmed the key "
            ),
            "{text}"
        );
        let message = unavailable(&mut bot, spot_order("long")).await;
        assert!(age_in(&message, 900) >= 960, "{message}");
        assert!(
            message.ends_with("; since then: the broker has not polled Vault"),
            "{message}"
        );
        until("Vault has confirmed the key", async || {
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
async fn key_older_than_max_stale_cancel_is_wiped_without_waiting_for_a_poll() {
    let (mut lab, time) = installed(rules("", "max_stale_cancel_s = 604800")).await;
    // No poll takes place during this test.
    lab.reconfigure("poll_s = 1", "poll_s = 3600");
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    lab.vault.stop().await.unwrap();
    time.sleep(&lab, HOUR * 25);
    // It is wiped and requested from Vault; the reason shows both.
    let begin = "key main/main: waiting for Vault: wiped from memory: last confirmed by Vault 90";
    let part = "s ago, max_stale_cancel_s is 86400 s; ";
    let is_wiped = |line: &str| line.starts_with(begin) && line.contains(part);
    until("readyz shows the key as wiped", async || {
        let (status, text) = lab.get("/readyz?verbose").await;
        status == 503
            && text.lines().any(is_wiped)
            && text.contains("key other/main: version 1 loaded")
    })
    .await;
    let mut bot = lab.bot("maker").await;
    let message = unavailable(&mut bot, spot_cancel_all()).await;
    assert!(
        message.contains("wiped from memory: ") && message.contains(part),
        "{message}"
    );
    assert_eq!(metric(&lab, "key_version", "main").await, None);

    lab.vault.restart().await.unwrap();
    until_confirmed(&lab, &time).await;
    assert_eq!(stale(&mut bot, spot_cancel_all()).await, 0);
    lab.stop().await;
}

#[tokio::test]
async fn wiping_a_key_aborts_its_vault_request_and_drops_the_version_under_test() {
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
        text.contains("version 2 could not be tested yet")
    })
    .await;
    let path = format!("kv/metadata/{}", kv_path("main", "main"));
    lab.vault.fault(FaultRule::new(&path, VaultFault::Hang));
    until("a request to Vault hangs", async || {
        let requests = requests_for(&lab.vault, "main");
        requests.last().is_some_and(|(_, status)| status.is_none())
    })
    .await;
    time.sleep(&lab, HOUR * 25);
    let is_aborted = |line: &str| {
        line.starts_with(
            "key main/main: waiting for Vault: wiped from memory: last confirmed by Vault 90",
        ) && line.contains(" s; ")
            && line.ends_with("key wiped before Vault responded")
    };
    until("the request is aborted", async || {
        lab.get("/readyz?verbose").await.1.lines().any(is_aborted)
    })
    .await;
    lab.stop().await;
}

#[tokio::test]
async fn key_wiped_after_a_suspend_is_reloaded_without_a_call() {
    let (mut lab, time) = installed(rules("", "")).await;
    lab.reconfigure("poll_s = 1", "poll_s = 3600");
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    time.sleep(&lab, HOUR * 25);
    until("the key has been read again", async || {
        let requests = requests_for(&lab.vault, "main");
        let reads = requests
            .iter()
            .filter(|(request, _)| request == "GET data?version=1");
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

/// A change in Vault that evicts the key.
type Change<'a> = &'a dyn Fn(&Lab);

#[tokio::test]
async fn eviction_takes_effect_right_after_an_outage_and_survives_the_next_one() {
    let path = kv_path("main", "main");
    let disabled = BTreeMap::from([("state".to_owned(), "disabled".to_owned())]);
    let disable: Change = &|lab| lab.vault.set_custom_metadata("kv", &path, disabled.clone());
    let delete: Change = &|lab| lab.vault.delete_metadata("kv", &path);
    let deny: Change = &|lab| lab.vault.deny(None, None, &format!("kv/metadata/{path}"));
    for (change, reason) in [
        (
            disable,
            "disabled in Vault (state=disabled in its custom metadata)",
        ),
        (delete, "Vault has no such key (404)"),
        (
            deny,
            "Vault denied the broker access (403); check the broker's Vault policy",
        ),
    ] {
        let (mut lab, time) = ready("", "").await;
        let mut bot = lab.bot("maker").await;
        let start_outage = || {
            let fault = VaultFault::Status {
                code: 503,
                retry_after_s: None,
            };
            lab.vault.fault(FaultRule::new("", fault));
        };
        start_outage();
        until_noticed(&lab, &time).await;
        time.pass(&lab, MINUTE * 5).await;
        assert!(stale(&mut bot, spot_order("stale")).await >= 300);
        // The change is made during the outage.
        change(&lab);
        time.pass(&lab, NEXT_RETRY).await;
        assert!(stale(&mut bot, spot_cancel_all()).await >= 331);
        lab.vault.clear_faults();
        pass_time_until(reason, &lab, &time, async || {
            let (_, text) = lab.get("/readyz").await;
            text.contains(&format!("key main/main: not available: {reason}"))
                && !text.contains("key other/main")
        })
        .await;
        let assert_evicted = async |bot: &mut Bot| {
            for request in [spot_order("evicted"), spot_cancel_all(), accounts()] {
                let message = unavailable(bot, request).await;
                assert_eq!(message, format!("{REFUSED}{reason}"));
            }
        };
        assert_evicted(&mut bot).await;
        assert_eq!(metric(&lab, "key_age_seconds", "main").await, None);
        assert_eq!(stale(&mut bot, of_other(spot_order("other"))).await, 0);

        start_outage();
        pass_time_until(
            "the next outage has been noticed",
            &lab,
            &time,
            async || {
                let (_, text) = lab.get("/readyz").await;
                text.contains("key other/main: cached; ")
            },
        )
        .await;
        assert_evicted(&mut bot).await;
        lab.stop().await;
    }
}

/// Reads of the secret fail while reads of the metadata work.
#[tokio::test]
async fn key_disabled_while_its_secret_cannot_be_read_is_evicted() {
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
    pass_time_until("the key is evicted", &lab, &time, async || {
        let (_, text) = lab.get("/readyz").await;
        text.contains("key main/main: not available: disabled in Vault (state=disabled in its custom metadata)")
    })
    .await;
    unavailable(&mut bot, spot_cancel_all()).await;
    lab.stop().await;
}
