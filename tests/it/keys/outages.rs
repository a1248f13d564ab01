//! No answer is no word about a key: cached keys stay in use, whatever Vault or a proxy before it does instead.

use bytes::Bytes;
use credbroker::proto::{Method, Outcome, Scope};
use credbroker_sim::http::{Reply, Server};
use credbroker_sim::installation::{ROOT_TOKEN, kv_path};
use credbroker_sim::vault::{
    Fault, FaultRule, InitialState, RoleSettings, Standby, VaultSettings, VaultSim,
};

use super::{NO_ANSWER, Setup, answered, key, put};
use crate::harness::{request, until};

/// Ways to give no answer: a name for the account that meets it, the fault, what the log says.
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
    let unknown = "Vault's answer is not what its API describes";
    let mut faults = vec![
        ("close".to_owned(), Fault::Close, "Vault cannot be reached"),
        ("half-body".to_owned(), Fault::HalfBody, unknown),
        ("hang".to_owned(), Fault::Hang, "Vault cannot be reached"),
        ("html".to_owned(), Fault::NotJson, unknown),
        ("wrong-json".to_owned(), Fault::WrongJson, unknown),
    ];
    for (code, reason) in [
        (400, "Vault answered 400"),
        (412, "Vault answered 412"),
        (429, "Vault answered 429"),
        (472, "Vault answered 472"),
        (500, "Vault answered 500"),
        (502, "Vault answered 502"),
        (503, "Vault is sealed or not initialised (503)"),
        (504, "Vault answered 504"),
    ] {
        let (name, fault) = status(code);
        faults.push((name, fault, reason));
    }
    faults
}

#[tokio::test]
async fn what_is_in_memory_using_whatever_vault_does_instead_of_answering() {
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
    until("every key has met its outage twice", async || {
        let mut met = true;
        for (account, _, reason) in faults() {
            let field = format!("account.id={account} ");
            met &= rig.logs.count(&[NO_ANSWER, &field, reason]) >= 2;
            assert_eq!(rig.signer(&account).await, Ok(key(&account, 1).api_key));
        }
        met
    })
    .await;
    assert_eq!(rig.logs.count(&["key unavailable"]), 0);
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
async fn an_outage_between_the_metadata_and_the_secret_leaves_the_old_version_in_use() {
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
    until("every key has met its outage", async || {
        let mut met = true;
        for (account, _, reason) in faults() {
            let field = format!("account.id={account} ");
            met &= rig.logs.count(&[NO_ANSWER, &field, reason]) >= 1;
            assert_eq!(rig.signer(&account).await, Ok(key(&account, 1).api_key));
        }
        met
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

/// A standby that does not forward names the active node instead.
#[tokio::test]
async fn after_a_failover_to_a_listed_node_the_next_login_follows_its_one_redirect() {
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
    let logins = [200, 307].map(|status| answered(&vault, "auth/approle/login", status));
    assert_eq!(logins, [2, 1], "at the start, and by way of the standby");
    rig.end().await;
}

/// A load balancer whose backend is gone, or a firewall that objects, must not cost a firm its keys.
#[tokio::test]
async fn a_404_or_403_that_vault_did_not_write_evicts_nothing() {
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
        // The simulated Vault writes every 403 and 404 as Vault does; so it sends the broker to where they come from.
        rig.vault()
            .fault(FaultRule::new("kv/", Fault::Redirect { to }));
        let reason =
            format!("Vault answered {status}, but not in its own words; is a proxy in between?");
        rig.serves_until(1, "two polls have met the proxy", async || {
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
async fn a_broker_that_starts_before_vault_is_up_says_what_it_waits_for_and_is_ready_once_it_is_there()
 {
    for (is_sealed, reason) in [
        (false, "Vault cannot be reached"),
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
        assert!(rig.lab.kucoin.received().is_empty());
        // What needs no key works.
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
