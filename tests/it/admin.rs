//! The door for admins: who gets in, what the others see of it, and what the commands say that cannot get through.

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

use crate::certificates::gets_in;
use crate::harness::{Lab, Patient, accounts, admin_over, patient, set_mode, until};

/// An admin's connection with this certificate.
async fn connection(lab: &Lab, identity: &Identity) -> Option<Patient> {
    let roots = [lab.ca.certificate_pem().to_owned()];
    patient(lab.admin, &roots, identity).await.ok()
}

/// What becomes of a call with this certificate at the admins' door.
async fn listed(lab: &Lab, identity: &Identity) -> Result<Vec<KeyState>, Option<Status>> {
    let connection = connection(lab, identity).await.ok_or(None)?;
    list(&mut admin_over(connection)).await.map_err(Some)
}

async fn list(admin: &mut AdminClient<Patient>) -> Result<Vec<KeyState>, Status> {
    Ok(admin.list_keys(ListKeysRequest {}).await?.into_inner().keys)
}

/// A call whose message comes as the body says.
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
async fn each_role_gets_in_at_its_own_listener_and_at_no_other() {
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    let dns = SanType::DnsName("admin.demo.test".try_into().unwrap());
    let named = lab.ca.issue("anna", &[dns], Usage::Client);
    let stranger = Ca::new("somebody else's CA").unwrap();
    let uri = SanType::URI("spiffe://demo.test/admin/anna".try_into().unwrap());
    let served = lab.ca.issue("anna", &[uri], Usage::Server).unwrap();
    let dns = SanType::DnsName("spiffe://demo.test/admin/anna".try_into().unwrap());
    let disguised = lab.ca.issue("anna", &[dns], Usage::Client).unwrap();
    let admin = lab.ca.admin("anna").unwrap();
    listed(&lab, &admin).await.unwrap();
    let unfit = lab
        .ca
        .intermediate("issuing CA", CaKind::NotForSigning)
        .unwrap();
    let mut below_unfit = unfit.admin("anna").unwrap();
    below_unfit.certificate_pem += unfit.certificate_pem();
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
        (stranger.admin("anna").unwrap(), "UnknownIssuer".to_owned()),
        (served, "invalid peer certificate".to_owned()),
        (below_unfit, "whose keyUsage lacks keyCertSign".to_owned()),
    ] {
        let refusals = |lab: &Lab| {
            let log = lab.process.as_ref().unwrap().log();
            let lines = log
                .lines()
                .filter(|line| line.contains("client certificate refused"));
            lines.map(ToOwned::to_owned).collect::<Vec<_>>()
        };
        let before = refusals(&lab).len();
        // In the handshake: what the client gets is no answer of gRPC's.
        let failure = listed(&lab, &identity).await.unwrap_err();
        assert!(
            failure.is_none_or(|status| status.details().is_empty()),
            "{reason}"
        );
        until("the refusal is logged", async || {
            refusals(&lab).len() > before
        })
        .await;
        let line = refusals(&lab).pop().unwrap();
        assert!(line.contains(&reason), "{reason} is not in {line}");
    }
    assert!(!gets_in(&lab, &admin).await, "an admin is no bot");
    assert!(gets_in(&lab, &lab.ca.bot("maker").unwrap()).await);

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
    question: MessageRequest,
) -> Result<ServerReflectionResponse, Status> {
    let origin = "https://localhost".parse().unwrap();
    let mut client = ServerReflectionClient::with_origin(connection, origin);
    let asked = tokio_stream::iter([ServerReflectionRequest {
        host: String::new(),
        message_request: Some(question),
    }]);
    let mut answers = client.server_reflection_info(asked).await?.into_inner();
    Ok(answers.message().await?.unwrap())
}

#[tokio::test]
async fn neither_door_shows_or_serves_the_other_ones_calls() {
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
    for question in [
        MessageRequest::FileByFilename("credbroker/v1/admin.proto".to_owned()),
        MessageRequest::FileContainingSymbol("credbroker.v1.Admin".to_owned()),
        MessageRequest::FileContainingSymbol("credbroker.v1.Candidate".to_owned()),
    ] {
        let answer = reflect(bot.clone(), question.clone()).await;
        let found = answer.is_ok_and(|answer| {
            !matches!(
                answer.message_response,
                Some(MessageResponse::ErrorResponse(_))
            )
        });
        assert!(!found, "{question:?}");
    }
    // What it does show, found the same way.
    let broker = MessageRequest::FileByFilename("credbroker/v1/broker.proto".to_owned());
    let answer = reflect(bot.clone(), broker).await.unwrap().message_response;
    assert!(
        matches!(answer, Some(MessageResponse::FileDescriptorResponse(_))),
        "{answer:?}"
    );
    let ended = list_keys_over(bot).await.unwrap_err();
    assert_eq!(ended.code(), Code::Unimplemented);

    let admin = connection(&lab, &lab.ca.admin("anna").unwrap())
        .await
        .unwrap();
    let ended = reflect(admin.clone(), services).await.unwrap_err();
    assert_eq!(ended.code(), Code::Unimplemented);
    let mut bots_call = BrokerClient::with_origin(admin, "https://localhost".parse().unwrap());
    let ended = bots_call.sign_and_send(accounts()).await.unwrap_err();
    assert_eq!(ended.code(), Code::Unimplemented);
    lab.stop().await;
}

async fn list_keys_over(connection: Patient) -> Result<Vec<KeyState>, Status> {
    list(&mut admin_over(connection)).await
}

#[tokio::test]
async fn a_page_of_another_site_cannot_call() {
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
    // The same message as a call.
    let answer = call("POST", "application/grpc+proto").await;
    assert_eq!(answer.status(), 200);
    until("it is done", async || {
        lab.acts().iter().any(|act| act["action"] == "halt")
    })
    .await;
    lab.stop().await;
}

#[tokio::test]
async fn metadata_of_an_admin_call_have_a_limit_too() {
    let mut lab = Lab::start().await;
    let mut admin = lab.admin_client("anna").await;
    let mut request = tonic::Request::new(ListKeysRequest {});
    let long = "x".repeat(17_000).parse().unwrap();
    request.metadata_mut().insert("x-token", long);
    let status = admin.list_keys(request).await.unwrap_err();
    assert!(status.message().contains("metadata: has 17"), "{status:?}");
    assert_eq!(
        refusal::<()>(Err(status)),
        (Code::InvalidArgument, "REQUEST_MALFORMED".to_owned())
    );
    list(&mut admin).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn refused_calls_of_an_admin_are_counted_and_audited() {
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
        .filter(|line| line["event"] == "denied" && line["who"] == who)
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
async fn without_an_address_there_is_no_door() {
    let mut lab = Lab::with(Settings {
        edit: Box::new(|config| config.replace("admin = \"127.0.0.1:0\"\n", "")),
        ..Settings::default()
    })
    .await;
    assert_eq!(lab.server.as_ref().unwrap().admin, None);
    lab.stop().await;
}

#[tokio::test]
async fn keys_are_listed_as_they_are() {
    let mut lab = Lab::with(Settings {
        keys: vec![("main", "main", credbroker_sim::installation::MAIN_UID)],
        wait_ready: false,
        ..Settings::default()
    })
    .await;
    let mut admin = lab.admin_client("anna").await;
    let listed = async || list(&mut admin.clone()).await.unwrap();
    until(
        "Vault has said what it has, and the exchange how it is",
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
    until("the broken version is told", async || {
        let keys = listed().await;
        keys[0].version == 1
            && keys[0]
                .reasons
                .iter()
                .any(|reason| reason.contains("passphrase"))
    })
    .await;
    lab.vault.seal();
    until("the outage is told", async || {
        let reasons = listed().await[0].reasons.join("; ");
        reasons.contains("Vault last confirmed it")
    })
    .await;
    list(&mut admin).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn what_a_call_names_is_checked() {
    let mut lab = Lab::start().await;
    let mut admin = lab.admin_client("anna").await;
    let by_name = |account: &str| HaltRequest {
        account: account.to_owned(),
        ..HaltRequest::default()
    };
    let malformed = (Code::InvalidArgument, "REQUEST_MALFORMED".to_owned());
    let ended = admin.halt(by_name("No Such")).await.unwrap_err();
    let fields = ended.get_details_bad_request().unwrap().field_violations;
    assert_eq!(fields[0].field, "account");
    assert!(
        ended
            .message()
            .starts_with("malformed call: account: expected a name"),
        "{ended:?}"
    );
    assert_eq!(refusal(Err::<(), _>(ended)), malformed);
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
async fn calls_are_small_and_arrive_in_time() {
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
    // A field that says it is longer than the message.
    assert_eq!(
        refusal(call(&[0, 0, 0, 0, 2, 0x0a, 0x7f], true).await),
        malformed
    );
    list(&mut admin).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn an_admin_who_hangs_up_tears_nothing() {
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
    until("the test is under way", async || {
        let record = std::fs::read_to_string(lab.path("state/audit.jsonl")).unwrap();
        record.contains("spiffe://demo.test/admin/anna")
    })
    .await;
    let is_on_record = || {
        let acts = lab.acts().into_iter();
        acts.filter(|act| act["action"] == "test")
            .any(|act| act["outcome"] == "done")
    };
    assert!(!is_on_record());
    call.abort();
    until("the test is on record", async || is_on_record()).await;
    lab.stop().await;
}

#[tokio::test]
async fn admins_get_in_whoever_else_holds_connections() {
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
        // It must not be closed by this end.
        assert!(one.is_open());
        std::future::poll_fn(|context| one.poll_ready(context))
            .await
            .unwrap();
        many.push(one);
    }
    until("the oldest of bob's have ended", async || {
        many.iter().filter(|one| one.is_open()).count() == 15
    })
    .await;
    assert!(many[25..].iter().all(Patient::is_open));
    list(&mut anna).await.unwrap();
    list(&mut admin_over(many.pop().unwrap())).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn a_removed_ca_ends_admin_access_at_once() {
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
    // Each CA is for its own door.
    listed(&lab, &lab.ca.admin("anna").unwrap())
        .await
        .unwrap_err();
    assert!(!gets_in(&lab, &own.bot("maker").unwrap()).await);
    let mut bot = lab.patient_bot("maker").await;
    bot.send(accounts()).await.unwrap();

    let unusable = lab.changes().len();
    std::fs::write(lab.path("admins-ca.pem"), "no certificate").unwrap();
    until("the unusable file is told", async || {
        lab.changes().len() > unusable
    })
    .await;
    let change = lab.changes().pop().unwrap();
    assert_eq!(
        (&change["what"], &change["outcome"]),
        (&"tls".into(), &"refused".into())
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
    let half_way = slow.call(posted("ListKeys", UnsyncBoxBody::new(body)));
    let half_way = tokio::spawn(half_way);
    let piece = |bytes| Ok::<_, Status>(Frame::data(Bytes::from_static(bytes)));
    pieces.send(piece(&[0, 0])).await.unwrap();
    // The broker has seen what was sent before this.
    list(&mut anna).await.unwrap();
    std::fs::write(lab.path("admins-ca.pem"), next.certificate_pem()).unwrap();
    until("the next CA is in force", async || {
        lab.changes().len() > known
    })
    .await;
    pieces.send(piece(&[0, 0, 0])).await.unwrap();
    drop(pieces);
    let ended = half_way.await.unwrap().unwrap();
    let ended = Status::from_header_map(ended.headers()).unwrap();
    let untrusted = (Code::Unauthenticated, "CALLER_UNKNOWN".to_owned());
    assert_eq!(refusal(Err::<(), _>(ended)), untrusted);
    // The call comes before or after the connection has ended.
    let ended = list(&mut anna).await.unwrap_err();
    assert!(ended.details().is_empty() || refusal(Err::<(), _>(ended)).1 == "CALLER_UNKNOWN");
    until("the connection has ended", async || !connected.is_open()).await;
    listed(&lab, &old).await.unwrap_err();
    listed(&lab, &next.admin("anna").unwrap()).await.unwrap();
    bot.send(accounts()).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn no_call_is_taken_on_a_certificate_that_has_ended() {
    let mut lab = Lab::start().await;
    let now_s = || u64::try_from(Clock::system().wall_ms() / 1000).unwrap();
    let end = now_s() + 3;
    let identity = lab.ca.admin_within("anna", end - 60..end).unwrap();
    let connected = connection(&lab, &identity).await.unwrap();
    let mut anna = admin_over(connected.clone());
    let mut served = 0;
    let ended = loop {
        match list(&mut anna).await {
            Ok(_) => served += 1,
            Err(status) => break status,
        }
        assert!(now_s() <= end + 1, "it is served past its end");
    };
    assert!(served > 0 && now_s() >= end);
    assert_eq!(
        refusal(Err::<(), _>(ended)),
        (Code::Unauthenticated, "CALLER_UNKNOWN".to_owned())
    );
    until("the connection has ended", async || !connected.is_open()).await;
    lab.stop().await;
}

#[tokio::test]
async fn the_command_lists_keys() {
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
        "main/main   at-risk  1        serves futures, spot-margin, unified",
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
        lines.contains(&"other/main  at-risk  1        serves spot-margin"),
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
async fn keys_list_names_the_whole_command_once_per_key_after_a_halt_of_all() {
    let mut lab = Lab::start().await;
    let halted = lab.admin_cli("anna", &["halt", "--all"]).await;
    assert_eq!(halted.code, Some(0), "{halted:?}");
    let list = async |lab: &Lab| lab.admin_cli("anna", &["keys", "list"]).await.stdout;
    let shown = list(&lab).await;
    let about = |shown: &str, word: &str| shown.matches(word).count();
    let halted = "  halted: `credbroker resume --all` lifts it\n";
    assert_eq!(about(&shown, halted), 2, "{shown}");
    let once = "frozen: risk-increasing requests are rejected; cancels and reads still work.\n";
    assert!(shown.ends_with(once), "{shown}");
    assert_eq!(about(&shown, "rejected"), 1, "{shown}");

    lab.admin_cli("anna", &["halt", "main"]).await;
    let shown = crate::harness::in_one_line(&list(&lab).await);
    let by_name = "halted: `credbroker resume main` lifts it";
    assert_eq!(about(&shown, by_name), 1, "{shown}");
    lab.stop().await;
}

/// The silent exchange was asked something that changes nothing: there is nothing to look up before it is asked again.
#[tokio::test]
async fn a_key_test_without_an_answer_says_to_check_the_connection_and_not_to_look_anything_up() {
    use credbroker_sim::kucoin::{Fault, FaultAction, When};
    let mut lab = Lab::start().await;
    for action in [
        FaultAction::Stall {
            when: When::BeforeTaken,
        },
        FaultAction::Close {
            when: When::AfterTaken,
        },
    ] {
        lab.kucoin.fault(Fault {
            times: None,
            ..Fault::once("/api/v1/user/api-key", action)
        });
        let tested = lab.admin_cli("anna", &["keys", "test", "main"]).await;
        assert_eq!(tested.code, Some(1), "{tested:?}");
        let said = crate::harness::in_one_line(&format!("{}{}", tested.stdout, tested.stderr));
        assert!(
            !said.contains("look it up") && !said.contains("may have reached"),
            "{said}"
        );
        assert!(
            said.contains("GET /api/v1/user/api-key (spot-margin): no complete answer came"),
            "{said}"
        );
        let fix = "fix: check the connection to KuCoin with `credbroker doctor`, then re-run the command; a test changes nothing";
        assert!(said.contains(fix), "{said}");
        lab.kucoin.clear_faults();
    }
    lab.stop().await;
}

#[tokio::test]
async fn a_command_that_cannot_get_through_says_why_and_what_to_do() {
    let mut lab = Lab::start().await;
    let admin = lab.ca.admin("anna").unwrap();
    lab.write_admin_files(&admin);
    let toml = std::fs::read_to_string(lab.path("admin.toml")).unwrap();
    let now_s = u64::try_from(Clock::system().wall_ms() / 1000).unwrap();
    let stranger = Ca::new("somebody else's CA").unwrap();
    let ended = lab.ca.admin_within("anna", now_s - 60..now_s - 30).unwrap();
    let stranger_pem = stranger.certificate_pem().to_owned();
    let ca = lab.ca.certificate_pem().to_owned();
    let at = |address| toml.replace(&lab.admin.to_string(), &format!("{address}"));
    let cases = [
        (
            &admin,
            &stranger_pem,
            toml.clone(),
            1,
            "does not come from a CA in",
            "fix: `ca` in admin.toml must hold the CA of the broker's tls.certificate",
        ),
        (
            &admin,
            &ca,
            format!("server_name = \"other.test\"\n{toml}"),
            1,
            "does not name other.test",
            "fix: set server_name in admin.toml",
        ),
        (
            &stranger.admin("anna").unwrap(),
            &ca,
            toml.clone(),
            1,
            "does not trust the CA of",
            "tls.admin_ca",
        ),
        (
            &ended,
            &ca,
            toml.clone(),
            1,
            "it has expired, or is not valid yet",
            "fix: renew it",
        ),
        (
            &lab.ca.bot("maker").unwrap(),
            &ca,
            toml.clone(),
            2,
            "admin.pem is no admin's certificate: certificate identity is not valid for this listener: URI SAN: expected spiffe://<trust domain>/admin/<name>, got",
            "fix: ",
        ),
        (
            &admin,
            &ca,
            at(lab.grpc),
            1,
            "is not an admin listener",
            "fix: `broker` in admin.toml must be the broker's listen.admin",
        ),
        (
            &admin,
            &ca,
            at(lab.ops),
            1,
            "does not speak TLS",
            "and not listen.ops",
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
    for (identity, ca, toml, code, what, fix) in cases {
        lab.write_admin_files(identity);
        std::fs::write(lab.path("admin-broker-ca.pem"), ca).unwrap();
        std::fs::write(lab.path("admin.toml"), toml).unwrap();
        let said = lab.cli(&["keys", "list"], "").await;
        assert_eq!(
            (said.code, said.stdout.as_str()),
            (Some(code), ""),
            "{said:?}"
        );
        let words = said.said();
        assert!(words.contains(what), "{what} is not in {words}");
        assert!(words.contains(fix.trim_end()), "{fix} is not in {words}");
    }
    std::fs::remove_file(lab.path("admin.toml")).unwrap();
    let said = lab.cli(&["keys", "list"], "").await;
    assert_eq!(said.code, Some(2));
    assert!(
        said.stderr.contains("name another with --admin"),
        "{}",
        said.stderr
    );

    lab.stop().await;
    let said = lab.admin_cli("anna", &["keys", "list"]).await;
    assert_eq!((said.code, said.stdout.as_str()), (Some(1), ""));
    let expected = format!("the broker cannot be reached at {}: ", lab.admin);
    assert!(said.stderr.starts_with(&expected), "{}", said.stderr);
    let fix =
        "\nfix: start the broker; it runs without keys, too. If it runs, set [listen] admin\n";
    assert!(said.stderr.contains(fix), "{}", said.stderr);
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
        let said = lab.cli(words, "").await;
        assert_eq!((said.code, said.stdout.as_str()), (Some(2), ""), "{said:?}");
        let path = lab.path(file);
        let path = path.display();
        let expected = format!(
            "admin.toml: {setting}: {path} can be read by other users (mode 0644); chmod o-rwx {path}"
        );
        assert!(said.stderr.contains(&expected), "{said:?}");
        set_mode(&lab.path(file), 0o640);
        let said = lab.cli(words, "").await;
        assert!(!said.stderr.contains("chmod"), "{said:?}");
    }
    for (file, setting) in [
        ("admin.toml", "admin"),
        ("admin-broker-ca.pem", "ca"),
        ("admin.pem", "certificate"),
    ] {
        set_mode(&lab.path(file), 0o666);
        let said = lab.cli(&["keys", "list"], "").await;
        assert_eq!((said.code, said.stdout.as_str()), (Some(2), ""), "{said:?}");
        let path = lab.path(file);
        let path = path.display();
        let expected = format!(
            "admin.toml: {setting}: {path} can be changed by other users (mode 0666); chmod o-w {path}"
        );
        assert!(said.stderr.contains(&expected), "{said:?}");
        set_mode(&lab.path(file), 0o644);
        let said = lab.cli(&["keys", "list"], "").await;
        assert!(!said.stderr.contains("chmod"), "{said:?}");
    }
    let text = std::fs::read_to_string(lab.path("admin.toml")).unwrap();
    let text = text.replace("[vault]\n", "[vault]\nroots = \"vault-ca.pem\"\n");
    lab.write("admin.toml", &text).unwrap();
    lab.write("vault-ca.pem", lab.ca.certificate_pem()).unwrap();
    set_mode(&lab.path("vault-ca.pem"), 0o666);
    let words = &["keys", "register", "main", "--key", "new"];
    let said = lab.cli(words, "").await;
    assert_eq!((said.code, said.stdout.as_str()), (Some(2), ""), "{said:?}");
    let path = lab.path("vault-ca.pem");
    let path = path.display();
    let expected = format!(
        "admin.toml: vault.roots: {path} can be changed by other users (mode 0666); chmod o-w {path}"
    );
    assert!(said.stderr.contains(&expected), "{said:?}");
    set_mode(&lab.path("vault-ca.pem"), 0o644);
    let said = lab.cli(words, "").await;
    assert!(!said.stderr.contains("chmod"), "{said:?}");
    lab.stop().await;
}

#[test]
fn what_admins_are_told_has_no_field_for_a_secret() {
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
    let of_calls = lines().filter_map(|line| line.split("returns (").nth(1)?.split(')').next());
    let mut told: Vec<_> = of_calls.collect();
    assert!(told.len() >= 9, "{told:?}");
    let mut seen = BTreeSet::new();
    while let Some(name) = told.pop() {
        for (kind, field) in messages.get(name).into_iter().flatten() {
            let is_text = matches!(*kind, "string" | "bytes");
            let is_secret = ["secret", "passphrase", "api_key", "partner_key"]
                .iter()
                .any(|word| field.contains(word));
            assert!(!(is_text && is_secret), "{name}.{field}");
            told.push(kind);
        }
        seen.insert(name);
    }
    assert!(
        seen.contains("KeyState") && !seen.contains("Candidate"),
        "{seen:?}"
    );
    // The search finds them where they are.
    assert!(messages["Candidate"].contains(&("string", "api_secret")));
}
