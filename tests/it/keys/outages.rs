//! During a Vault outage cached keys stay in use, whatever Vault or a proxy in front of it returns.

use bytes::Bytes;
use credbroker::proto::{Method, Outcome, Scope};
use credbroker_sim::http::{Reply, Server};
use credbroker_sim::installation::{ROOT_TOKEN, kv_path};
use credbroker_sim::vault::{
    Fault, FaultRule, InitialState, RoleSettings, Standby, VaultSettings, VaultSim,
};

use super::{CACHED, NO_ANSWER, NOT_LOADED, Setup, count_responses, key, put};
use crate::harness::{request, until};

/// Kinds of outages: the account that is affected, the fault, the logged reason.
fn faults() -> Vec<(String, Fault, &'static str)> {
    let status = |code: u16| {
        (
            format!("status-{code}"),
            Fault::Status {
                code,
                retry_after_s: None,
            },
        )
    };
    let unknown = "response is not in Vault's format";
    let mut faults = vec![
        ("close".to_owned(), Fault::Close, "cannot reach Vault"),
        (
            "endless".to_owned(),
            Fault::Endless,
            "response has more than 1048576 bytes; check for a proxy in front of Vault",
        ),
        ("half-body".to_owned(), Fault::HalfBody, unknown),
        ("hang".to_owned(), Fault::Hang, "cannot reach Vault"),
        ("html".to_owned(), Fault::NotJson, unknown),
        ("wrong-json".to_owned(), Fault::WrongJson, unknown),
    ];
    for (code, reason) in [
        (400, "Vault returned 400"),
        (412, "Vault returned 412"),
        (429, "Vault returned 429"),
        (472, "Vault returned 472"),
        (500, "Vault returned 500"),
        (502, "Vault returned 502"),
        (503, "Vault is sealed or not initialised (503)"),
        (504, "Vault returned 504"),
    ] {
        let (name, fault) = status(code);
        faults.push((name, fault, reason));
    }
    faults
}

#[tokio::test]
async fn cached_keys_stay_in_use_through_every_kind_of_vault_outage() {
    let accounts = faults();
    let accounts: Vec<_> = accounts
        .iter()
        .map(|(account, ..)| account.as_str())
        .collect();
    let mut setup = Setup::new(&accounts).await;
    setup.timeout_ms = 1000;
    let rig = setup.ready().await;
    for (account, fault, _) in faults() {
        let path = format!("kv/metadata/{}", kv_path(&account, "main"));
        rig.vault().fault(FaultRule::new(&path, fault));
        put(rig.vault(), &account, 2);
    }
    until("every key has had its outage twice", async || {
        let mut is_done = true;
        for (account, _, reason) in faults() {
            let field = format!("account.id={account} ");
            is_done &= rig.logs.count(&[NO_ANSWER, &field, reason]) >= 2;
            assert_eq!(rig.signer(&account).await, Ok(key(&account, 1).api_key));
        }
        is_done
    })
    .await;
    assert_eq!(rig.logs.count(&["key unavailable"]), 0);
    assert_eq!(rig.logs.count(&[NOT_LOADED]), 0);
    let (status, _) = rig.lab.get("/readyz").await;
    assert_eq!(status, 200);

    rig.vault().clear_faults();
    for account in accounts {
        until(&format!("{account} has its new version"), async || {
            rig.signer(account).await.unwrap() == key(account, 2).api_key
        })
        .await;
    }
    rig.end().await;
}

#[tokio::test]
async fn outage_between_metadata_and_secret_reads_keeps_the_old_version_in_use() {
    let accounts = faults();
    let accounts: Vec<_> = accounts
        .iter()
        .map(|(account, ..)| account.as_str())
        .collect();
    let mut setup = Setup::new(&accounts).await;
    setup.timeout_ms = 1000;
    let rig = setup.ready().await;
    for (account, fault, _) in faults() {
        let path = format!("kv/data/{}", kv_path(&account, "main"));
        rig.vault().fault(FaultRule::new(&path, fault));
        put(rig.vault(), &account, 2);
    }
    until("every key has had its outage", async || {
        let mut is_done = true;
        for (account, _, reason) in faults() {
            let field = format!("account.id={account} ");
            is_done &= rig.logs.count(&[NO_ANSWER, &field, reason]) >= 1;
            assert_eq!(rig.signer(&account).await, Ok(key(&account, 1).api_key));
        }
        is_done
    })
    .await;
    assert_eq!(rig.logs.count(&["simulated-secret"]), 0);
    rig.vault().clear_faults();
    for account in accounts {
        until(&format!("{account} has its new version"), async || {
            rig.signer(account).await.unwrap() == key(account, 2).api_key
        })
        .await;
    }
    rig.end().await;
}

/// A Vault in memory that restarts, or one restored from a backup, numbers the versions from 1 again.
#[tokio::test]
async fn key_that_replaces_a_version_lost_during_an_outage_is_confirmed_at_once() {
    let mut setup = Setup::new(&["main"]).await;
    // The next poll after the outage is at least 24 s away, so it cannot confirm the key in this test.
    setup.poll_s = 30;
    let rig = setup.ready().await;
    rig.vault().fault(FaultRule::new("", Fault::Close));
    // The rejected key makes the broker poll Vault.
    rig.lab.kucoin.remove_key(&key("main", 1).api_key);
    let read = request(Scope::SpotMargin, Method::Get, "/api/v1/accounts", "");
    let answer = rig.bot.clone().send(read).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Rejected);
    until("a poll has failed", async || {
        rig.logs.count(&[NO_ANSWER, CACHED]) >= 1
    })
    .await;
    let path = kv_path("main", "main");
    rig.vault().delete_metadata("kv", &path);
    assert_eq!(put(rig.vault(), "main", 2), 1);
    rig.vault().clear_faults();
    until("the new key is loaded", async || {
        rig.logs.count(&["key loaded"]) == 2
    })
    .await;
    let (_, text) = rig.lab.get("/readyz?verbose").await;
    let confirmed = "key main/main: version 1 loaded, confirmed by Vault ";
    assert!(text.contains(confirmed), "{text}");
    assert!(!text.contains("cached"), "{text}");
    assert_eq!(rig.signer("main").await, Ok(key("main", 2).api_key));
    rig.end().await;
}

/// A standby that does not forward requests redirects to the active node.
#[tokio::test]
async fn login_after_a_failover_follows_one_redirect_to_a_listed_node() {
    let vault = VaultSim::start(VaultSettings {
        state: InitialState::Dev {
            root_token: ROOT_TOKEN.to_owned(),
        },
        standby: Standby::Redirects,
        ..VaultSettings::default()
    });
    let vault = vault.await.unwrap();
    let (role_id, secret_id) = vault.enable_approle("credbroker", RoleSettings::default());
    let mut setup = Setup::on(vault.clone(), &["main"]);
    setup.more = format!("redirects = [\"{}\"]", vault.standby_address().unwrap());
    setup.settings.auth =
        format!("method = \"approle\"\nrole_id = \"{role_id}\"\nsecret_id_file = \"secret-id\"");
    setup.settings.files = vec![("secret-id", secret_id)];
    let rig = setup.ready().await;
    vault.fail_over();
    for token in vault.tokens() {
        vault.revoke_token(&token);
    }
    put(&vault, "main", 2);
    rig.until_signed_with(2).await;
    let logins = [200, 307].map(|status| count_responses(&vault, "auth/approle/login", status));
    assert_eq!(
        logins,
        [2, 1],
        "logins at the start and after the redirect from the standby"
    );
    rig.end().await;
}

/// A load balancer without a backend or a firewall must not evict keys.
#[tokio::test]
async fn http_403_or_404_from_a_proxy_evicts_nothing() {
    for status in [403, 404] {
        let page = move |_| async move {
            let page = Bytes::from_static(b"<html><body>default backend</body></html>");
            Reply::Answer(http::Response::builder().status(status).body(page).unwrap())
        };
        let any = ([127, 0, 0, 1], 0).into();
        let proxy = Server::start(any, None, page).await.unwrap();
        let to = format!("http://{}", proxy.address());
        let mut setup = Setup::new(&["main"]).await;
        setup.more = format!("redirects = [\"{to}\"]");
        let rig = setup.ready().await;
        // The simulated Vault returns 403 and 404 in Vault's format, so it redirects to a server that returns HTML.
        rig.vault()
            .fault(FaultRule::new("kv/", Fault::Redirect { to }));
        let reason = format!(
            "HTTP {status} response is not in Vault's format; check for a proxy in front of Vault"
        );
        rig.signs_until(1, "two polls have reached the proxy", async || {
            rig.logs.count(&[NO_ANSWER, &reason]) >= 2
        })
        .await;
        rig.vault().clear_faults();
        put(rig.vault(), "main", 2);
        rig.until_signed_with(2).await;
        rig.end().await;
    }
}

#[tokio::test]
async fn broker_started_while_vault_is_down_reports_it_and_becomes_ready_later() {
    for (is_sealed, reason) in [
        (false, "cannot reach Vault"),
        (true, "Vault is sealed or not initialised (503)"),
    ] {
        let setup = Setup::new(&["main"]).await;
        if is_sealed {
            setup.vault.seal();
        } else {
            setup.vault.stop().await.unwrap();
        }
        let rig = setup.start().await;
        rig.until_not_ready(&format!("key main/main: waiting for Vault: {reason}\n"))
            .await;
        assert_eq!(rig.lab.get("/healthz").await, (200, "ok\n".to_owned()));
        rig.until_evicted(reason).await;
        assert!(rig.logs.count(&[NO_ANSWER, NOT_LOADED, reason]) >= 1);
        assert_eq!(rig.logs.count(&[CACHED]), 0, "{:?}", rig.logs);
        assert!(rig.lab.kucoin.received().is_empty());
        // Requests that need no key work.
        let public = request(Scope::SpotMargin, Method::Get, "/api/v1/timestamp", "");
        let answer = rig.bot.clone().send(public).await.unwrap();
        assert_eq!(answer.outcome(), Outcome::Accepted);
        if is_sealed {
            rig.vault().unseal();
        } else {
            rig.vault().restart().await.unwrap();
        }
        rig.lab.until_ready().await;
        assert_eq!(rig.signer("main").await, Ok(key("main", 1).api_key));
        rig.end().await;
    }
}
