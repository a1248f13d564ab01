//! The admin listener: who can connect, what it offers, and what commands print when they cannot connect.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use credbroker::clock::Clock;
use credbroker::proto::admin_client::AdminClient;
use credbroker::proto::broker_client::BrokerClient;
use credbroker::proto::{
    HaltRequest, KeyState, ListKeysRequest, RefreshKeyRequest, Scope, TestKeyRequest,
};
use credbroker_sim::installation::{Settings, kv_path, secret};
use credbroker_sim::kucoin::{Fault, FaultAction};
use credbroker_sim::pki::{Ca, CaKind, Identity, SanType, Usage};
use http_body::Frame;
use http_body_util::StreamBody;
use http_body_util::combinators::UnsyncBoxBody;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::Service;
use tonic::{Code, Status};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};
use tonic_types::StatusExt;

use crate::certificates::is_call_accepted;
use crate::harness::{Lab, Patient, accounts, admin_over, patient, set_mode, until};

/// An admin's connection with this certificate.
async fn connection(lab: &Lab, identity: &Identity) -> Option<Patient> {
    let roots = [lab.ca.certificate_pem().to_owned()];
    patient(lab.admin, &roots, identity).await.ok()
}

/// Lists keys with this certificate; the error is `None` if the connection is rejected.
async fn listed(lab: &Lab, identity: &Identity) -> Result<Vec<KeyState>, Option<Status>> {
    let connection = connection(lab, identity).await.ok_or(None)?;
    list(&mut admin_over(connection)).await.map_err(Some)
}

async fn list(admin: &mut AdminClient<Patient>) -> Result<Vec<KeyState>, Status> {
    Ok(admin.list_keys(ListKeysRequest {}).await?.into_inner().keys)
}

/// A call with this body.
fn posted(method: &str, body: UnsyncBoxBody<Bytes, Status>) -> http::Request<tonic::body::Body> {
    http::Request::post(format!("https://localhost/credbroker.v1.Admin/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(tonic::body::Body::new(body))
        .unwrap()
}

/// Code and reason of a call that must fail.
fn refusal<T: std::fmt::Debug>(result: Result<T, Status>) -> (Code, String) {
    let status = result.expect_err("this call must fail");
    let info = status.get_details_error_info();
    let info = info.unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, "credbroker");
    (status.code(), info.reason)
}

#[tokio::test]
async fn certificates_are_accepted_only_at_the_listener_of_their_role() {
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    let dns = SanType::DnsName("admin.demo.test".try_into().unwrap());
    let named = lab.ca.issue("anna", &[dns], Usage::Client);
    let other_ca = Ca::new("another CA").unwrap();
    let uri = SanType::URI("spiffe://demo.test/admin/anna".try_into().unwrap());
    let served = lab.ca.issue("anna", &[uri], Usage::Server).unwrap();
    let dns = SanType::DnsName("spiffe://demo.test/admin/anna".try_into().unwrap());
    let disguised = lab.ca.issue("anna", &[dns], Usage::Client).unwrap();
    let admin = lab.ca.admin("anna").unwrap();
    listed(&lab, &admin).await.unwrap();
    let non_signing_ca = lab
        .ca
        .intermediate("issuing CA", CaKind::NotForSigning)
        .unwrap();
    let mut from_non_signing_ca = non_signing_ca.admin("anna").unwrap();
    from_non_signing_ca.certificate_pem += non_signing_ca.certificate_pem();
    let expected = "spiffe://<trust domain>/admin/<name>, got ";
    for (identity, reason) in [
        (
            lab.ca.bot("maker").unwrap(),
            format!("URI SAN: expected {expected}\\\"spiffe://demo.test/bot/maker"),
        ),
        (
            named.unwrap(),
            format!("DNS SAN: expected a URI SAN {expected}\\\"admin.demo.test"),
        ),
        (
            disguised,
            format!("DNS SAN: expected a URI SAN {expected}\\\"spiffe://demo.test/admin/anna"),
        ),
        (other_ca.admin("anna").unwrap(), "UnknownIssuer".to_owned()),
        (served, "invalid peer certificate".to_owned()),
        (
            from_non_signing_ca,
            "whose keyUsage lacks keyCertSign".to_owned(),
        ),
    ] {
        let refusals = |lab: &Lab| {
            let log = lab.process.as_ref().unwrap().log();
            let lines = log
                .lines()
                .filter(|line| line.contains("client certificate refused"));
            lines.map(ToOwned::to_owned).collect::<Vec<_>>()
        };
        let before = refusals(&lab).len();
        // Rejected in the handshake: the client gets no gRPC error details.
        let failure = listed(&lab, &identity).await.unwrap_err();
        assert!(
            failure.is_none_or(|status| status.details().is_empty()),
            "{reason}"
        );
        until("the rejection is logged", async || {
            refusals(&lab).len() > before
        })
        .await;
        let line = refusals(&lab).pop().unwrap();
        assert!(line.contains(&reason), "{reason} is not in {line}");
    }
    assert!(
        !is_call_accepted(&lab, &admin).await,
        "the bots' listener accepted an admin"
    );
    assert!(is_call_accepted(&lab, &lab.ca.bot("maker").unwrap()).await);

    let tls = tonic::transport::ClientTlsConfig::new()
        .ca_certificate(tonic::transport::Certificate::from_pem(
            lab.ca.certificate_pem(),
        ))
        .domain_name("localhost");
    let endpoint = |scheme: &str| {
        tonic::transport::Endpoint::from_shared(format!("{scheme}://{}", lab.admin)).unwrap()
    };
    for endpoint in [endpoint("https").tls_config(tls).unwrap(), endpoint("http")] {
        if let Ok(channel) = endpoint.connect().await {
            let mut anonymous = AdminClient::new(channel);
            anonymous.list_keys(ListKeysRequest {}).await.unwrap_err();
        }
    }
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
}

async fn reflect(
    connection: Patient,
    request: MessageRequest,
) -> Result<ServerReflectionResponse, Status> {
    let origin = "https://localhost".parse().unwrap();
    let mut client = ServerReflectionClient::with_origin(connection, origin);
    let requests = tokio_stream::iter([ServerReflectionRequest {
        host: String::new(),
        message_request: Some(request),
    }]);
    let mut answers = client.server_reflection_info(requests).await?.into_inner();
    Ok(answers.message().await?.unwrap())
}

#[tokio::test]
async fn each_listener_offers_only_its_own_services() {
    let mut lab = Lab::start().await;
    let bot = lab.patient(&lab.ca.bot("maker").unwrap()).await;
    let services = MessageRequest::ListServices(String::new());
    let answer = reflect(bot.clone(), services.clone()).await.unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("no list")
    };
    let names: Vec<_> = list
        .service
        .into_iter()
        .map(|service| service.name)
        .collect();
    assert!(
        names.iter().any(|name| name == "credbroker.v1.Broker"),
        "{names:?}"
    );
    assert!(
        !names.iter().any(|name| name.contains("Admin")),
        "{names:?}"
    );
    for request in [
        MessageRequest::FileByFilename("credbroker/v1/admin.proto".to_owned()),
        MessageRequest::FileContainingSymbol("credbroker.v1.Admin".to_owned()),
        MessageRequest::FileContainingSymbol("credbroker.v1.Candidate".to_owned()),
    ] {
        let answer = reflect(bot.clone(), request.clone()).await;
        let found = answer.is_ok_and(|answer| {
            !matches!(
                answer.message_response,
                Some(MessageResponse::ErrorResponse(_))
            )
        });
        assert!(!found, "{request:?}");
    }
    // The same kind of request finds the bots' API.
    let broker = MessageRequest::FileByFilename("credbroker/v1/broker.proto".to_owned());
    let answer = reflect(bot.clone(), broker).await.unwrap().message_response;
    assert!(
        matches!(answer, Some(MessageResponse::FileDescriptorResponse(_))),
        "{answer:?}"
    );
    let error = list_keys_over(bot).await.unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented);

    let admin = connection(&lab, &lab.ca.admin("anna").unwrap())
        .await
        .unwrap();
    let error = reflect(admin.clone(), services).await.unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented);
    let mut bots_call = BrokerClient::with_origin(admin, "https://localhost".parse().unwrap());
    let error = bots_call.sign_and_send(accounts()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented);
    lab.stop().await;
}

async fn list_keys_over(connection: Patient) -> Result<Vec<KeyState>, Status> {
    list(&mut admin_over(connection)).await
}

#[tokio::test]
async fn admin_listener_refuses_requests_that_a_web_page_can_send() {
    let mut lab = Lab::start().await;
    let identity = lab.ca.admin("anna").unwrap();
    let mut connection = connection(&lab, &identity).await.unwrap();
    // HaltRequest with account "main", as gRPC frames it.
    let message = Bytes::from_static(b"\0\0\0\0\x06\x0a\x04main");
    let mut call = async |method: &str, kind: &str| {
        let body = http_body_util::Full::new(message.clone());
        let request = http::Request::builder()
            .method(method)
            .uri("https://localhost/credbroker.v1.Admin/Halt")
            .header("content-type", kind)
            .header("origin", "https://example.org")
            .body(tonic::body::Body::new(body));
        connection.call(request.unwrap()).await.unwrap()
    };
    for (method, kind) in [
        ("POST", "text/plain"),
        ("POST", "application/x-www-form-urlencoded"),
        ("POST", "multipart/form-data; boundary=x"),
        ("GET", "application/grpc"),
        ("OPTIONS", "application/grpc"),
    ] {
        let answer = call(method, kind).await;
        assert_eq!(answer.status(), 415, "{method} {kind}");
        assert!(!answer.headers().contains_key("access-control-allow-origin"));
    }
    assert!(lab.acts().iter().all(|act| act["action"] != "halt"));
    // The same message as a gRPC call.
    let answer = call("POST", "application/grpc+proto").await;
    assert_eq!(answer.status(), 200);
    until("the halt is audited", async || {
        lab.acts().iter().any(|act| act["action"] == "halt")
    })
    .await;
    lab.stop().await;
}

#[tokio::test]
async fn metadata_of_admin_calls_is_limited() {
    let mut lab = Lab::start().await;
    let mut admin = lab.admin_client("anna").await;
    let mut request = tonic::Request::new(ListKeysRequest {});
    let long = "x".repeat(17_000).parse().unwrap();
    request.metadata_mut().insert("x-token", long);
    let status = admin.list_keys(request).await.unwrap_err();
    assert!(
        status
            .message()
            .contains("metadata: expected at most 16384 bytes, got 17"),
        "{status:?}"
    );
    assert_eq!(
        refusal::<()>(Err(status)),
        (Code::InvalidArgument, "REQUEST_MALFORMED".to_owned())
    );
    list(&mut admin).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn rejected_admin_calls_are_counted_and_audited() {
    let mut lab = Lab::start().await;
    let identity = lab.ca.admin("anna").unwrap();
    let mut connection = connection(&lab, &identity).await.unwrap();
    let mut call = async |path: &str, kind: &str, encoding: &str| {
        let request = http::Request::post(format!("https://localhost/credbroker.v1.Admin/{path}"))
            .header("content-type", kind)
            .header("te", "trailers")
            .header("grpc-encoding", encoding)
            .body(tonic::body::Body::empty());
        connection.call(request.unwrap()).await.unwrap()
    };
    let answer = call("Withdraw", "application/grpc", "identity").await;
    let status = Status::from_header_map(answer.headers()).unwrap();
    assert!(status.message().contains("Admin/Withdraw"), "{status:?}");
    assert_eq!(
        refusal::<()>(Err(status)),
        (Code::Unimplemented, "METHOD_UNKNOWN".to_owned())
    );
    assert_eq!(
        call("ListKeys", "text/plain", "identity").await.status(),
        415
    );
    let answer = call("ListKeys", "application/grpc", "gzip").await;
    let status = Status::from_header_map(answer.headers()).unwrap();
    assert_eq!(
        refusal::<()>(Err(status)),
        (Code::InvalidArgument, "REQUEST_MALFORMED".to_owned())
    );
    let who = "spiffe://demo.test/admin/anna";
    let lines = lab.audit_file();
    let denied: Vec<_> = lines
        .iter()
        .filter(|line| line["event"] == "denied" && line["principal"] == who)
        .map(|line| line["reason"].as_str().unwrap())
        .collect();
    assert_eq!(
        denied,
        ["METHOD_UNKNOWN", "REQUEST_MALFORMED", "REQUEST_MALFORMED"],
        "{lines:?}"
    );
    for (reason, count) in [("METHOD_UNKNOWN", 1.0), ("REQUEST_MALFORMED", 2.0)] {
        let name = format!("credbroker_admin_calls_refused_total{{reason=\"{reason}\"}}");
        assert_eq!(lab.metric(&name).await, Some(count), "{reason}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn admin_listener_is_off_unless_its_address_is_configured() {
    let mut lab = Lab::with(Settings {
        edit: Box::new(|config| config.replace("admin = \"127.0.0.1:0\"\n", "")),
        ..Settings::default()
    })
    .await;
    assert_eq!(lab.server.as_ref().unwrap().admin, None);
    lab.stop().await;
}

#[tokio::test]
async fn key_list_shows_status_problems_and_a_vault_outage() {
    let mut lab = Lab::with(Settings {
        keys: vec![("main", "main", credbroker_sim::installation::MAIN_UID)],
        wait_ready: false,
        ..Settings::default()
    })
    .await;
    let mut admin = lab.admin_client("anna").await;
    let listed = async || list(&mut admin.clone()).await.unwrap();
    until(
        "Vault has returned both keys, and the first one is tested",
        async || {
            let keys = listed().await;
            let is_waiting = |reason: &String| reason.contains("waiting");
            keys[0].tested_at_ms != 0 && !keys[1].reasons.iter().any(is_waiting)
        },
    )
    .await;
    let keys = listed().await;
    let [main, other] = keys.as_slice() else {
        panic!("{keys:?}")
    };
    let named = |key: &KeyState| {
        format!(
            "{}/{} {} {}",
            key.account,
            key.key,
            key.status().word(),
            key.version
        )
    };
    assert_eq!(named(main), "main/main at-risk 1");
    let scopes: Vec<_> = main.scopes().collect();
    assert_eq!(scopes, [Scope::Futures, Scope::SpotMargin, Scope::Unified]);
    assert!(
        main.reasons[0].starts_with("The key has no IP restriction"),
        "{main:?}"
    );
    assert!(
        main.permissions
            .iter()
            .any(|permission| permission == "Futures"),
        "{main:?}"
    );
    assert_eq!((main.reasons.len(), main.is_whitelisted), (1, None));
    assert_eq!(named(other), "other/main unavailable 0");
    assert_eq!(other.reasons.len(), 1, "{other:?}");

    let key = credbroker_sim::kucoin::SimKey::fake(credbroker_sim::installation::MAIN_UID);
    let mut broken = secret(&key);
    broken["passphrase"] = Value::Null;
    lab.vault.put_secret("kv", &kv_path("main", "main"), broken);
    until("the broken version is reported", async || {
        let keys = listed().await;
        keys[0].version == 1
            && keys[0]
                .reasons
                .iter()
                .any(|reason| reason.contains("passphrase"))
    })
    .await;
    lab.vault.seal();
    until("the outage is reported", async || {
        let reasons = listed().await[0].reasons.join("; ");
        reasons.contains("Vault last confirmed the key")
    })
    .await;
    list(&mut admin).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn admin_calls_with_unknown_or_invalid_names_are_rejected() {
    let mut lab = Lab::start().await;
    let mut admin = lab.admin_client("anna").await;
    let by_name = |account: &str| HaltRequest {
        account: account.to_owned(),
        ..HaltRequest::default()
    };
    let malformed = (Code::InvalidArgument, "REQUEST_MALFORMED".to_owned());
    let error = admin.halt(by_name("No Such")).await.unwrap_err();
    let fields = error.get_details_bad_request().unwrap().field_violations;
    assert_eq!(fields[0].field, "account");
    assert!(
        error
            .message()
            .starts_with("malformed request: account: expected 1 to 32 characters of a-z"),
        "{error:?}"
    );
    assert_eq!(refusal(Err::<(), _>(error)), malformed);
    let unknown = refusal(admin.halt(by_name("nobody")).await);
    assert_eq!(unknown, (Code::NotFound, "ACCOUNT_UNKNOWN".to_owned()));
    let refresh = |key: &str| RefreshKeyRequest {
        account: "main".to_owned(),
        key: key.to_owned(),
    };
    let unknown = refusal(admin.refresh_key(refresh("second")).await);
    assert_eq!(unknown, (Code::NotFound, "KEY_UNKNOWN".to_owned()));
    for (account, all) in [("", false), ("main", true)] {
        let halt = HaltRequest {
            account: account.to_owned(),
            all,
            cancel_all: false,
        };
        assert_eq!(
            refusal(admin.halt(halt).await),
            malformed,
            "{account:?} {all}"
        );
    }
    lab.stop().await;
}

#[tokio::test]
async fn oversized_slow_or_malformed_admin_calls_are_rejected() {
    let mut lab = Lab::with(Settings {
        config: "[limits]\nrequest_timeout_ms = 300".to_owned(),
        ..Settings::default()
    })
    .await;
    let mut admin = lab.admin_client("anna").await;
    let large = HaltRequest {
        account: "x".repeat(64 * 1024),
        ..HaltRequest::default()
    };
    let malformed = (Code::InvalidArgument, "REQUEST_MALFORMED".to_owned());
    assert_eq!(refusal(admin.halt(large).await), malformed);

    let mut raw = connection(&lab, &lab.ca.admin("anna").unwrap())
        .await
        .unwrap();
    let mut call = async |first: &'static [u8], ends: bool| {
        let pieces = [Ok::<_, Status>(Frame::data(Bytes::from_static(first)))];
        let pieces = tokio_stream::iter(pieces);
        let body = if ends {
            UnsyncBoxBody::new(StreamBody::new(pieces))
        } else {
            UnsyncBoxBody::new(StreamBody::new(pieces.chain(tokio_stream::pending())))
        };
        let request = posted("Halt", body);
        let response = raw.call(request).await.unwrap();
        Err::<(), _>(Status::from_header_map(response.headers()).unwrap())
    };
    let slow = (Code::DeadlineExceeded, "DEADLINE_EXCEEDED".to_owned());
    assert_eq!(refusal(call(&[0, 0], false).await), slow);
    // A field whose length exceeds the message.
    assert_eq!(
        refusal(call(&[0, 0, 0, 0, 2, 0x0a, 0x7f], true).await),
        malformed
    );
    list(&mut admin).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn admin_call_completes_after_the_admin_disconnects() {
    let mut lab = Lab::start().await;
    let mut admin = lab.admin_client("anna").await;
    until("the key is tested", async || {
        let keys = list(&mut admin.clone()).await.unwrap();
        keys.iter().all(|key| key.tested_at_ms != 0)
    })
    .await;
    for path in ["/api/v1/user/api-key", "/api/ua/v2/user/api-key"] {
        let slow = FaultAction::Delay { ms: 500 };
        lab.kucoin.fault(Fault::once(path, slow));
    }
    let test = TestKeyRequest {
        account: "main".to_owned(),
        ..TestKeyRequest::default()
    };
    let call = tokio::spawn(async move { admin.test_key(test).await });
    until("the test has started", async || {
        let audit_log = std::fs::read_to_string(lab.path("state/audit.jsonl")).unwrap();
        audit_log.contains("spiffe://demo.test/admin/anna")
    })
    .await;
    let is_audited = || {
        let acts = lab.acts().into_iter();
        acts.filter(|act| act["action"] == "test")
            .any(|act| act["outcome"] == "done")
    };
    assert!(!is_audited());
    call.abort();
    until("the test is audited", async || is_audited()).await;
    lab.stop().await;
}

#[tokio::test]
async fn admins_can_connect_while_other_clients_hold_connections() {
    let mut lab = Lab::start().await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(lab.admin).await.unwrap());
    }
    let mut anna = lab.admin_client("anna").await;
    list(&mut anna).await.unwrap();
    let (bob, mut many) = (lab.ca.admin("bob").unwrap(), Vec::new());
    for _ in 0..40 {
        let mut one = connection(&lab, &bob).await.unwrap();
        list(&mut admin_over(one.clone())).await.unwrap();
        // The client itself has not closed it.
        assert!(one.is_open());
        std::future::poll_fn(|context| one.poll_ready(context))
            .await
            .unwrap();
        many.push(one);
    }
    until("bob's oldest connections are closed", async || {
        many.iter().filter(|one| one.is_open()).count() == 15
    })
    .await;
    assert!(many[25..].iter().all(Patient::is_open));
    list(&mut anna).await.unwrap();
    list(&mut admin_over(many.pop().unwrap())).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn removing_a_ca_ends_admin_access_at_once() {
    let (own, next) = (
        Ca::new("CA of admins").unwrap(),
        Ca::new("next CA of admins").unwrap(),
    );
    let mut lab = Lab::with(Settings {
        files: vec![("admins-ca.pem", own.certificate_pem().to_owned())],
        edit: Box::new(|config| config.replace("[tls]\n", "[tls]\nadmin_ca = \"admins-ca.pem\"\n")),
        ..Settings::default()
    })
    .await;
    let old = own.admin("anna").unwrap();
    let connected = connection(&lab, &old).await.unwrap();
    let mut anna = admin_over(connected.clone());
    list(&mut anna).await.unwrap();
    // Each CA is trusted at its own listener only.
    listed(&lab, &lab.ca.admin("anna").unwrap())
        .await
        .unwrap_err();
    assert!(!is_call_accepted(&lab, &own.bot("maker").unwrap()).await);
    let mut bot = lab.patient_bot("maker").await;
    bot.send(accounts()).await.unwrap();

    let unusable = lab.changes().len();
    std::fs::write(lab.path("admins-ca.pem"), "no certificate").unwrap();
    until("the rejected file is audited", async || {
        lab.changes().len() > unusable
    })
    .await;
    let change = lab.changes().pop().unwrap();
    assert_eq!(
        (&change["file"], &change["outcome"]),
        (&"tls".into(), &"rejected".into())
    );
    assert!(
        change["detail"]
            .as_str()
            .unwrap()
            .starts_with("tls.admin_ca: "),
        "{change}"
    );
    list(&mut anna).await.unwrap();

    let known = lab.changes().len();
    let (pieces, body) = mpsc::channel(1);
    let body = StreamBody::new(ReceiverStream::new(body));
    let mut slow = connected.clone();
    let pending_call = slow.call(posted("ListKeys", UnsyncBoxBody::new(body)));
    let pending_call = tokio::spawn(pending_call);
    let piece = |bytes| Ok::<_, Status>(Frame::data(Bytes::from_static(bytes)));
    pieces.send(piece(&[0, 0])).await.unwrap();
    // By the time of this answer the broker has received the first piece.
    list(&mut anna).await.unwrap();
    std::fs::write(lab.path("admins-ca.pem"), next.certificate_pem()).unwrap();
    until("the next CA is loaded", async || {
        lab.changes().len() > known
    })
    .await;
    pieces.send(piece(&[0, 0, 0])).await.unwrap();
    drop(pieces);
    let error = pending_call.await.unwrap().unwrap();
    let error = Status::from_header_map(error.headers()).unwrap();
    let untrusted = (Code::Unauthenticated, "CALLER_UNKNOWN".to_owned());
    assert_eq!(refusal(Err::<(), _>(error)), untrusted);
    // The call arrives before or after the connection is closed.
    let error = list(&mut anna).await.unwrap_err();
    assert!(error.details().is_empty() || refusal(Err::<(), _>(error)).1 == "CALLER_UNKNOWN");
    until("the connection is closed", async || !connected.is_open()).await;
    listed(&lab, &old).await.unwrap_err();
    listed(&lab, &next.admin("anna").unwrap()).await.unwrap();
    bot.send(accounts()).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn admin_calls_are_rejected_once_the_certificate_has_expired() {
    let mut lab = Lab::start().await;
    let now_s = || u64::try_from(Clock::system().wall_ms() / 1000).unwrap();
    let end = now_s() + 3;
    let identity = lab.ca.admin_within("anna", end - 60..end).unwrap();
    let connected = connection(&lab, &identity).await.unwrap();
    let mut anna = admin_over(connected.clone());
    let mut served = 0;
    let error = loop {
        match list(&mut anna).await {
            Ok(_) => served += 1,
            Err(status) => break status,
        }
        assert!(now_s() <= end + 1, "accepted after it has expired");
    };
    assert!(served > 0 && now_s() >= end);
    assert_eq!(
        refusal(Err::<(), _>(error)),
        (Code::Unauthenticated, "CALLER_UNKNOWN".to_owned())
    );
    until("the connection is closed", async || !connected.is_open()).await;
    lab.stop().await;
}

#[tokio::test]
async fn keys_list_prints_each_key_as_text_or_json() {
    let mut lab = Lab::start().await;
    let admin = lab.admin_client("anna").await;
    until("every key is tested", async || {
        let keys = list(&mut admin.clone()).await.unwrap();
        keys.iter().all(|key| key.tested_at_ms != 0)
    })
    .await;
    let shown = lab.admin_cli("anna", &["keys", "list"]).await;
    assert_eq!((shown.code, shown.stderr.as_str()), (Some(0), ""));
    let lines: Vec<_> = shown.stdout.lines().collect();
    assert!(
        lines.iter().all(|line| line.chars().count() <= 80),
        "{lines:#?}"
    );
    let expected = [
        "KEY         STATUS   VERSION",
        "main/main   at-risk  1        used for futures, spot-margin, unified",
        "                              permissions General, Spot, Margin, Futures,",
        "                              Unified",
    ];
    assert_eq!(lines[..4], expected);
    assert!(
        lines[4].trim_start().starts_with("tested ") && lines[4].ends_with(" s ago"),
        "{lines:#?}"
    );
    assert!(
        lines[5]
            .trim_start()
            .starts_with("The key has no IP restriction"),
        "{lines:#?}"
    );
    assert!(
        lines.contains(&"other/main  at-risk  1        used for spot-margin"),
        "{lines:#?}"
    );
    let shown = lab.admin_cli("anna", &["keys", "list", "--json"]).await;
    let lines: Vec<Value> = shown
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["account"], "main");
    assert_eq!(lines[0]["status"], "at-risk");
    assert_eq!(lines[0]["version"], 1);
    assert!(lines[0]["tested_at_ms"].as_i64().unwrap() > 1_700_000_000_000);
    assert_eq!(lines[0]["used_at_ms"], Value::Null);
    lab.stop().await;
}

#[tokio::test]
async fn keys_list_shows_the_full_resume_command_once_per_halted_key() {
    let mut lab = Lab::start().await;
    let halted = lab.admin_cli("anna", &["halt", "--all"]).await;
    assert_eq!(halted.code, Some(0), "{halted:?}");
    let list = async |lab: &Lab| lab.admin_cli("anna", &["keys", "list"]).await.stdout;
    let shown = list(&lab).await;
    let about = |shown: &str, word: &str| shown.matches(word).count();
    let halted = "  halted; to resume, run `credbroker resume --all`\n";
    assert_eq!(about(&shown, halted), 2, "{shown}");
    let once = "frozen: risk-increasing requests are refused; cancels and reads still work.\n";
    assert!(shown.ends_with(once), "{shown}");
    assert_eq!(about(&shown, "refused"), 1, "{shown}");

    lab.admin_cli("anna", &["halt", "main"]).await;
    let shown = crate::harness::in_one_line(&list(&lab).await);
    let by_name = "halted; to resume, run `credbroker resume main`";
    assert_eq!(about(&shown, by_name), 1, "{shown}");
    lab.stop().await;
}

/// A key test changes nothing, so nothing needs to be looked up before it is repeated.
#[tokio::test]
async fn key_test_without_an_answer_advises_to_check_the_connection() {
    use credbroker_sim::kucoin::{Fault, FaultAction, When};
    let mut lab = Lab::start().await;
    for action in [
        FaultAction::Stall {
            when: When::BeforeProcessing,
        },
        FaultAction::Close {
            when: When::AfterProcessing,
        },
    ] {
        lab.kucoin.fault(Fault {
            times: None,
            ..Fault::once("/api/v1/user/api-key", action)
        });
        let tested = lab.admin_cli("anna", &["keys", "test", "main"]).await;
        assert_eq!(tested.code, Some(1), "{tested:?}");
        let output = crate::harness::in_one_line(&format!("{}{}", tested.stdout, tested.stderr));
        assert!(
            !output.contains("look it up") && !output.contains("may have reached"),
            "{output}"
        );
        assert!(
            output.contains("GET /api/v1/user/api-key (spot-margin): no complete answer came"),
            "{output}"
        );
        let fix = "fix: check the connection to KuCoin with `credbroker doctor`, then re-run the command; a test changes nothing";
        assert!(output.contains(fix), "{output}");
        lab.kucoin.clear_faults();
    }
    lab.stop().await;
}

#[tokio::test]
async fn admin_command_that_cannot_connect_reports_the_cause_and_the_fix() {
    let mut lab = Lab::start().await;
    let admin = lab.ca.admin("anna").unwrap();
    lab.write_admin_files(&admin);
    let toml = std::fs::read_to_string(lab.path("admin.toml")).unwrap();
    let now_s = u64::try_from(Clock::system().wall_ms() / 1000).unwrap();
    let other_ca = Ca::new("another CA").unwrap();
    let expired = lab.ca.admin_within("anna", now_s - 60..now_s - 30).unwrap();
    let other_pem = other_ca.certificate_pem().to_owned();
    let ca = lab.ca.certificate_pem().to_owned();
    let at = |address| toml.replace(&lab.admin.to_string(), &format!("{address}"));
    let cases = [
        (
            &admin,
            &other_pem,
            toml.clone(),
            1,
            "was not issued by a CA in",
            "fix: set `ca` in admin.toml to the CA of the broker's tls.certificate",
        ),
        (
            &admin,
            &ca,
            format!("server_name = \"other.test\"\n{toml}"),
            1,
            "is not valid for other.test",
            "fix: set server_name in admin.toml",
        ),
        (
            &other_ca.admin("anna").unwrap(),
            &ca,
            toml.clone(),
            1,
            "does not trust the CA of",
            "tls.admin_ca",
        ),
        (
            &expired,
            &ca,
            toml.clone(),
            1,
            "it has expired, or is not valid yet",
            "fix: renew the certificate",
        ),
        (
            &lab.ca.bot("maker").unwrap(),
            &ca,
            toml.clone(),
            2,
            "admin.pem is not an admin certificate: certificate identity is not valid for this listener: URI SAN: expected spiffe://<trust domain>/admin/<name>, got",
            "fix: ",
        ),
        (
            &admin,
            &ca,
            at(lab.grpc),
            1,
            "is not an admin listener",
            "fix: set `broker` in admin.toml to the broker's listen.admin",
        ),
        (
            &admin,
            &ca,
            at(lab.ops),
            1,
            "does not speak TLS",
            "not to listen.ops",
        ),
        (
            &admin,
            &ca,
            "broker = 1".to_owned(),
            2,
            "admin.toml:1: broker: ",
            "fix: ",
        ),
    ];
    for (identity, ca, toml, code, problem, fix) in cases {
        lab.write_admin_files(identity);
        std::fs::write(lab.path("admin-broker-ca.pem"), ca).unwrap();
        std::fs::write(lab.path("admin.toml"), toml).unwrap();
        let output = lab.cli(&["keys", "list"], "").await;
        assert_eq!(
            (output.code, output.stdout.as_str()),
            (Some(code), ""),
            "{output:?}"
        );
        let stderr = output.stderr_line();
        assert!(stderr.contains(problem), "{problem} is not in {stderr}");
        assert!(stderr.contains(fix.trim_end()), "{fix} is not in {stderr}");
    }
    std::fs::remove_file(lab.path("admin.toml")).unwrap();
    let output = lab.cli(&["keys", "list"], "").await;
    assert_eq!(output.code, Some(2));
    assert!(
        output.stderr.contains("set the path with --admin"),
        "{}",
        output.stderr
    );

    lab.stop().await;
    let output = lab.admin_cli("anna", &["keys", "list"]).await;
    assert_eq!((output.code, output.stdout.as_str()), (Some(1), ""));
    let expected = format!("cannot connect to the broker at {}: ", lab.admin);
    assert!(output.stderr.starts_with(&expected), "{}", output.stderr);
    let fix = "\nfix: start the broker (it also runs without keys). If it is running, set\n";
    assert!(output.stderr.contains(fix), "{}", output.stderr);
}

#[tokio::test]
async fn commands_refuse_files_that_other_users_can_read_or_change() {
    let mut lab = Lab::start().await;
    lab.write_admin_files(&lab.ca.admin("anna").unwrap());
    for (file, setting, words) in [
        ("admin.key", "key", &["keys", "list"][..]),
        (
            "token",
            "vault.auth.file",
            &["keys", "register", "main", "--key", "new"],
        ),
    ] {
        set_mode(&lab.path(file), 0o644);
        let output = lab.cli(words, "").await;
        assert_eq!(
            (output.code, output.stdout.as_str()),
            (Some(2), ""),
            "{output:?}"
        );
        let path = lab.path(file);
        let path = path.display();
        let expected = format!(
            "admin.toml: {setting}: {path} can be read by other users (mode 0644); chmod o-rwx {path}"
        );
        assert!(output.stderr.contains(&expected), "{output:?}");
        set_mode(&lab.path(file), 0o640);
        let output = lab.cli(words, "").await;
        assert!(!output.stderr.contains("chmod"), "{output:?}");
    }
    for (file, setting) in [
        ("admin.toml", "admin"),
        ("admin-broker-ca.pem", "ca"),
        ("admin.pem", "certificate"),
    ] {
        set_mode(&lab.path(file), 0o666);
        let output = lab.cli(&["keys", "list"], "").await;
        assert_eq!(
            (output.code, output.stdout.as_str()),
            (Some(2), ""),
            "{output:?}"
        );
        let path = lab.path(file);
        let path = path.display();
        let expected = format!(
            "admin.toml: {setting}: {path} can be changed by other users (mode 0666); chmod o-w {path}"
        );
        assert!(output.stderr.contains(&expected), "{output:?}");
        set_mode(&lab.path(file), 0o644);
        let output = lab.cli(&["keys", "list"], "").await;
        assert!(!output.stderr.contains("chmod"), "{output:?}");
    }
    let text = std::fs::read_to_string(lab.path("admin.toml")).unwrap();
    let text = text.replace("[vault]\n", "[vault]\nroots = \"vault-ca.pem\"\n");
    lab.write("admin.toml", &text).unwrap();
    lab.write("vault-ca.pem", lab.ca.certificate_pem()).unwrap();
    set_mode(&lab.path("vault-ca.pem"), 0o666);
    let words = &["keys", "register", "main", "--key", "new"];
    let output = lab.cli(words, "").await;
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (Some(2), ""),
        "{output:?}"
    );
    let path = lab.path("vault-ca.pem");
    let path = path.display();
    let expected = format!(
        "admin.toml: vault.roots: {path} can be changed by other users (mode 0666); chmod o-w {path}"
    );
    assert!(output.stderr.contains(&expected), "{output:?}");
    set_mode(&lab.path("vault-ca.pem"), 0o644);
    let output = lab.cli(words, "").await;
    assert!(!output.stderr.contains("chmod"), "{output:?}");
    lab.stop().await;
}

#[test]
fn no_admin_response_has_a_field_for_a_secret() {
    let proto = include_str!("../../proto/credbroker/v1/admin.proto");
    let lines = || {
        proto
            .lines()
            .map(|line| line.split("//").next().unwrap().trim())
    };
    let mut messages: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
    let mut message = "";
    for line in lines() {
        if let Some(name) = line.strip_prefix("message ") {
            message = name.split(' ').next().unwrap();
            messages.insert(message, Vec::new());
        } else if line.starts_with("enum ") {
            message = "";
        } else if let Some((field, _)) = line.split_once(" = ").filter(|_| !message.is_empty()) {
            let mut words = field.rsplit(' ');
            let (name, kind) = (words.next().unwrap(), words.next().unwrap());
            messages.get_mut(message).unwrap().push((kind, name));
        }
    }
    let responses = lines().filter_map(|line| line.split("returns (").nth(1)?.split(')').next());
    let mut pending: Vec<_> = responses.collect();
    assert!(pending.len() >= 9, "{pending:?}");
    let mut seen = BTreeSet::new();
    while let Some(name) = pending.pop() {
        for (kind, field) in messages.get(name).into_iter().flatten() {
            let is_text = matches!(*kind, "string" | "bytes");
            let is_secret = ["secret", "passphrase", "api_key", "partner_key"]
                .iter()
                .any(|word| field.contains(word));
            assert!(!(is_text && is_secret), "{name}.{field}");
            pending.push(kind);
        }
        seen.insert(name);
    }
    assert!(
        seen.contains("KeyState") && !seen.contains("Candidate"),
        "{seen:?}"
    );
    // `Candidate` is only sent by admins; the check would find its secret in a response.
    assert!(messages["Candidate"].contains(&("string", "api_secret")));
}
