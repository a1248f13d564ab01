//! How admin commands connect to a running broker: `admin.toml`, and calls to its admin listener.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use rustls::version::TLS13;
use rustls::{AlertDescription, CertificateError, ClientConfig};
use tokio::io::AsyncBufReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::Service;
use tonic::{Code, Request, Response, Status};
use tonic_types::StatusExt;

use super::text::paragraph;
use super::{FAILED, USAGE, printable, read_file, say, say_problems};
use crate::api::status::DOMAIN;
use crate::base::ids::AdminId;
use crate::base::pem;
use crate::base::toml_file::{Problem, Problems, Section};
use crate::base::trust::{Peers, presents_ca, with_roots};
use crate::config::load::{self, Source, pair, root_file};
use crate::config::permissions::{self, NamedFile};
use crate::config::{Roots, required_path, roots, vault};
use crate::proto::admin_client::AdminClient;
use crate::server::build::{client_tls, provider};
use crate::server::identity::caller_of;
use crate::vault::{Vault, VaultSettings};

/// Default path of the file.
pub(super) const ADMIN: &str = "/etc/credbroker/admin.toml";

/// Time limit for name lookup, connection and both handshakes.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Limit of a response: the report of a halt of hundreds of accounts exceeds tonic's default of 4 MiB.
const ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// `admin.toml`, parsed: how an admin connects to the broker and to Vault.
#[derive(Clone, Debug)]
pub struct AdminFile {
    /// Path of the file.
    pub(crate) file: PathBuf,
    /// Host and port of the broker's `listen.admin`.
    pub broker: String,
    /// The name that the broker's certificate must be valid for.
    pub(crate) server_name: ServerName<'static>,
    /// CA of the broker's certificate.
    pub(crate) ca: PathBuf,
    /// The admin's certificate chain.
    pub(crate) certificate: PathBuf,
    /// Its private key.
    pub(crate) key: PathBuf,
    /// The admin's own login to Vault; without it, commands that write to Vault fail.
    pub vault: Option<AdminVault>,
}

/// An admin's own login to Vault.
#[derive(Clone, Debug)]
pub struct AdminVault {
    /// Address of Vault, and how the admin logs in.
    pub settings: VaultSettings,
    /// CAs of Vault's certificate.
    pub(crate) roots: Roots,
}

impl AdminFile {
    /// Reads the text of the file; relative paths in it start at `folder`.
    ///
    /// # Errors
    /// With all problems, each under its key.
    pub fn parse(text: &str, folder: &Path) -> Result<Self, Vec<Problem>> {
        let problems = Problems::default();
        let file = Section::parse(text, "admin", &problems)
            .and_then(|mut section| read(&mut section, folder));
        problems.into_result()?;
        // A missing value is already reported as a problem.
        file.ok_or_else(Vec::new)
    }

    /// Reads `file`.
    pub(super) fn read(file: &Path) -> Result<Self, Failure> {
        let mut read = read_file(file, "--admin", Self::parse).map_err(Failure::Files)?;
        file.clone_into(&mut read.file);
        Ok(read)
    }

    /// The name in the admin's certificate.
    pub(super) fn name(&self) -> Result<AdminId, Failure> {
        let chain = std::fs::read(&self.certificate)
            .map_err(|error| error.to_string())
            .and_then(|pem| pem::certificates(&pem).map_err(|error| error.to_string()));
        let name = chain.and_then(|chain| {
            let first = chain.first().map(caller_of::<AdminId>);
            let name = first.ok_or_else(|| "the file contains no certificate".to_owned())?;
            name.map_err(|error| error.to_string())
        });
        name.map_err(|error| {
            let file = self.certificate.display();
            let problem = format!("{file} is not an admin certificate: {error}");
            self.files(vec![Problem::new("certificate", problem)])
        })
    }

    /// A client with the admin's own login to Vault; nothing is sent yet.
    pub(super) fn vault(&self) -> Result<Vault, Failure> {
        let Some(AdminVault { settings, roots }) = &self.vault else {
            let problem = "is missing: this command writes to Vault with your own login; see the example deploy/admin.toml";
            return Err(self.files(vec![Problem::new("vault", problem)]));
        };
        let problems = Problems::default();
        let named_roots = roots;
        let roots = load::roots("vault.roots", named_roots, &problems);
        let mut files = permissions::login_files(&settings.auth);
        if let Roots::File(file) = named_roots {
            files.push(NamedFile::public("vault.roots", file));
        }
        check_permissions(&files, &problems);
        problems
            .into_result()
            .map_err(|problems| self.files(problems))?;
        // A missing root is already reported as a problem.
        let roots = roots.ok_or_else(|| Failure::Files(Vec::new()))?;
        let unusable = |error: &dyn std::fmt::Display| {
            Failure::new(
                format!("cannot set up TLS to Vault: {error}"),
                "check [vault] in admin.toml",
            )
        };
        let tls = client_tls(roots, &provider()).map_err(|error| unusable(&error))?;
        Vault::new(settings.clone(), tls, Arc::default()).map_err(|error| unusable(&error))
    }

    fn files(&self, problems: Vec<Problem>) -> Failure {
        let in_file = |problem: Problem| problem.in_file(&self.file);
        Failure::Files(problems.into_iter().map(in_file).collect())
    }

    /// The TLS configuration; reads the files.
    fn tls(&self) -> Result<ClientConfig, Vec<Problem>> {
        let problems = Problems::default();
        let roots = root_file("ca", &Source::read(&self.ca), Peers::Servers, &problems);
        let files = [
            NamedFile::public("admin", &self.file),
            NamedFile::public("ca", &self.ca),
            NamedFile::public("certificate", &self.certificate),
            NamedFile::secret("key", &self.key),
        ];
        check_permissions(&files, &problems);
        let (certificate, key) = (Source::read(&self.certificate), Source::read(&self.key));
        let (chain, key) = pair(["certificate", "key"], &certificate, &key, &problems);
        // Reported here, because the broker could only refuse the handshake.
        if let Some(Err(error)) = chain.iter().flatten().next().map(caller_of::<AdminId>) {
            let file = self.certificate.display();
            problems.add(
                "certificate",
                format_args!("{file} is not an admin certificate: {error}"),
            );
        }
        problems.into_result()?;
        let config = || {
            let provider = provider();
            let builder = ClientConfig::builder_with_provider(Arc::clone(&provider));
            let builder = builder.with_protocol_versions(&[&TLS13]).ok()?;
            let builder = with_roots(builder, roots?, &provider);
            let mut config = builder.with_client_auth_cert(chain?, key?).ok()?;
            config.alpn_protocols = vec![b"h2".to_vec()];
            Some(config)
        };
        // A pair that does not match is already reported as a problem.
        config().ok_or_else(Vec::new)
    }
}

/// Refuses secrets that other users of this machine can read, since they could act as the admin, and files that they can
/// change, since these decide which broker and Vault get the admin's commands and secrets.
fn check_permissions(files: &[NamedFile], problems: &Problems) {
    for open in files.iter().filter_map(NamedFile::check) {
        problems.add(open.key(), format_args!("{open}; {}", open.fix()));
    }
}

fn read(file: &mut Section, folder: &Path) -> Option<AdminFile> {
    let broker: Option<String> = file.required("broker", "\"127.0.0.1:8444\"");
    let host = broker.as_deref().and_then(host);
    if broker.is_some() && host.is_none() {
        file.problem(
            "broker",
            "expected host and port of the broker's listen.admin, such as \"127.0.0.1:8444\"",
        );
    }
    let (key, name) = match file.optional::<String>("server_name") {
        Some(name) => ("server_name", Some(name)),
        None => ("broker", host.map(ToOwned::to_owned)),
    };
    let server_name = name.and_then(|name| {
        let problem = format!("expected a DNS name or an IP address, got {name:?}");
        let name = ServerName::try_from(name);
        name.map_err(|_| file.problem(key, problem)).ok()
    });
    let mut path = |key, example: &str| required_path(file, key, example, folder);
    let ca = path("ca", "/etc/credbroker/admin/broker-ca.pem");
    let certificate = path("certificate", "/etc/credbroker/admin/anna.pem");
    let key = path("key", "/etc/credbroker/admin/anna.key");
    let has_vault = file.has("vault");
    let mut section = file.section("vault");
    let vault = if has_vault {
        let roots = roots(&mut section, "roots", folder);
        let settings = vault::read(&mut section, folder)?;
        Some(AdminVault { settings, roots })
    } else {
        None
    };
    Some(AdminFile {
        file: PathBuf::new(),
        broker: broker?,
        server_name: server_name?,
        ca: ca?,
        certificate: certificate?,
        key: key?,
        vault,
    })
}

/// The host of `host:port`, an IPv6 address without its brackets.
fn host(address: &str) -> Option<&str> {
    let (host, port) = address.rsplit_once(':')?;
    port.parse::<u16>().ok().filter(|port| *port != 0)?;
    match host.strip_prefix('[') {
        Some(host) => host.strip_suffix(']'),
        None => Some(host).filter(|host| !host.is_empty() && !host.contains(':')),
    }
}

/// Why a command failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// Problems of `admin.toml`, or of files that it names.
    Files(Vec<Problem>),
    /// A request to the broker, Vault or the exchange failed.
    Failed {
        /// What failed, and the state now.
        cause: String,
        /// The next step.
        fix: String,
    },
}

impl Failure {
    /// A failure with its cause and the next step.
    pub(super) fn new(cause: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::Failed {
            cause: cause.into(),
            fix: fix.into(),
        }
    }

    /// Prints the failure; returns the exit code.
    pub(super) fn say(&self) -> u8 {
        match self {
            Self::Files(problems) => {
                say_problems(problems, "re-run the command");
                USAGE
            }
            Self::Failed { cause, fix } => {
                let text = paragraph("", &printable(cause)) + &paragraph("fix: ", &printable(fix));
                say(text.trim_end());
                FAILED
            }
        }
    }
}

/// Reads `file`, connects, and runs a command; returns its exit code.
pub(super) fn run(file: &Path, command: impl AsyncFnOnce(Admin) -> Result<u8, Failure>) -> u8 {
    block_on(async || command(Admin::connect(&AdminFile::read(file)?).await?).await)
}

/// Runs a command; returns its exit code.
pub(super) fn block_on(command: impl AsyncFnOnce() -> Result<u8, Failure>) -> u8 {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            say(&format!("cannot start the async runtime: {error}"));
            return FAILED;
        }
    };
    let code = runtime.block_on(command());
    // Does not wait for a pending name lookup.
    runtime.shutdown_background();
    code.unwrap_or_else(|failure| failure.say())
}

/// The calls of `admin.proto`.
pub(super) type Client = AdminClient<BrokerConnection>;

/// A connection to the broker's admin listener.
pub(super) struct Admin {
    client: Client,
    broker: String,
}

impl Admin {
    /// Connects with the settings of `admin`.
    pub(super) async fn connect(admin: &AdminFile) -> Result<Self, Failure> {
        let tls = admin.tls().map_err(|problems| admin.files(problems))?;
        let AdminFile { broker, .. } = admin;
        let connecting = async {
            let stream = TcpStream::connect(broker)
                .await
                .map_err(|error| unreached(admin, &error))?;
            let refused = |error: io::Error| refused(admin, &error);
            stream.set_nodelay(true).map_err(refused)?;
            let connector = TlsConnector::from(Arc::new(tls));
            let mut stream: TlsStream<TcpStream> = connector
                .connect(admin.server_name.clone(), stream)
                .await
                .map_err(refused)?;
            // With TLS 1.3 the broker checks our certificate after our handshake has ended, and then sends first.
            if stream.fill_buf().await.map_err(refused)?.is_empty() {
                return Err(refused(io::ErrorKind::UnexpectedEof.into()));
            }
            let connected = handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
            let (sender, connection) =
                connected.map_err(|error| refused(io::Error::other(error)))?;
            tokio::spawn(connection);
            Ok(sender)
        };
        let sender = timeout(CONNECT_WITHIN, connecting)
            .await
            .unwrap_or_else(|_| {
                let late = format!("no response within {} s", CONNECT_WITHIN.as_secs());
                Err(unreached(admin, &io::Error::other(late)))
            })?;
        let origin = http::Uri::from_static("https://credbroker");
        Ok(Self {
            client: AdminClient::with_origin(BrokerConnection(sender), origin)
                .max_decoding_message_size(ANSWER_BYTES),
            broker: admin.broker.clone(),
        })
    }

    /// Makes one call, with `within` as its time limit.
    pub(super) async fn ask<M, T>(
        &mut self,
        within: Duration,
        message: M,
        call: impl AsyncFnOnce(&mut Client, Request<M>) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        let mut request = Request::new(message);
        request.set_timeout(within);
        match timeout(within, call(&mut self.client, request)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(call_failure(&self.broker, &status)),
            Err(_) => Err(Failure::new(
                format!(
                    "the broker at {} did not respond within {} s; it may still complete the call",
                    self.broker,
                    within.as_secs()
                ),
                "check the result with `credbroker keys list`, and in the broker's log and audit log",
            )),
        }
    }
}

/// One HTTP/2 connection, without tonic's own transport, which nothing else in the broker needs.
pub(super) struct BrokerConnection(SendRequest<tonic::body::Body>);

impl Service<http::Request<tonic::body::Body>> for BrokerConnection {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// The failure where nothing can be reached at the address.
fn unreached(file: &AdminFile, error: &io::Error) -> Failure {
    let broker = &file.broker;
    Failure::new(
        format!("cannot connect to the broker at {broker}: {error}"),
        format!(
            "start the broker (it also runs without keys). If it is running, set [listen] admin = {broker:?} in its \
             configuration, or set `broker` in admin.toml to the address in its log line \"listening\""
        ),
    )
}

/// The failure of a handshake: one side refused the other's certificate, or the peer is not a broker.
fn refused(file: &AdminFile, error: &io::Error) -> Failure {
    let AdminFile { broker, .. } = file;
    let (ca, certificate) = (file.ca.display(), file.certificate.display());
    let tls = error
        .get_ref()
        .and_then(|error| error.downcast_ref::<rustls::Error>());
    let (cause, fix) = match tls {
        Some(rustls::Error::AlertReceived(alert)) => match alert {
            AlertDescription::AccessDenied | AlertDescription::CertificateUnknown => (
                format!("{broker} is not an admin listener"),
                "set `broker` in admin.toml to the broker's listen.admin, not to listen.grpc (for bots)".to_owned(),
            ),
            AlertDescription::CertificateExpired => (
                format!("the broker at {broker} refused {certificate}: it has expired, or is not valid yet"),
                "renew the certificate; if its dates are right, check the clock of the broker's host".to_owned(),
            ),
            AlertDescription::UnknownCA => (
                format!("the broker at {broker} does not trust the CA of {certificate}"),
                "use a certificate from a CA in the broker's tls.admin_ca (or tls.client_ca, if tls.admin_ca is not set), or \
                 add your certificate's CA to that file; the broker reloads it without a restart"
                    .to_owned(),
            ),
            other => (
                format!("the broker at {broker} refused the TLS handshake: {other:?}"),
                "see the broker's log, line \"client certificate refused\" or \"TLS handshake failed\"".to_owned(),
            ),
        },
        Some(rustls::Error::InvalidCertificate(problem)) => match problem {
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => (
                format!("the certificate of the broker at {broker} is not valid for {}", file.server_name.to_str()),
                "set server_name in admin.toml to a name in that certificate".to_owned(),
            ),
            CertificateError::UnknownIssuer => (
                format!("the certificate of the broker at {broker} was not issued by a CA in {ca}"),
                "set `ca` in admin.toml to the CA of the broker's tls.certificate; if it already is, another service is listening at \
                 this address"
                    .to_owned(),
            ),
            other => (
                format!("the certificate of the broker at {broker} is not trusted: {other}"),
                "renew the broker's tls.certificate; the broker reloads it without a restart".to_owned(),
            ),
        },
        Some(error) if presents_ca(error) => (
            format!("the broker at {broker} presents a CA certificate as its server certificate"),
            "set the broker's tls.certificate to a server certificate (CA:FALSE) issued by this CA".to_owned(),
        ),
        Some(rustls::Error::InvalidMessage(_)) => (
            format!("{broker} does not speak TLS"),
            "set `broker` in admin.toml to the broker's listen.admin, not to listen.ops".to_owned(),
        ),
        _ => (
            format!("the broker at {broker} closed the connection: {error}"),
            "see the broker's log for the cause, then re-run the command".to_owned(),
        ),
    };
    Failure::new(cause, fix)
}

/// The failure that the status of a call describes.
fn call_failure(broker: &str, status: &Status) -> Failure {
    let info = status.get_details_error_info();
    let Some(info) = info.filter(|info| info.domain == DOMAIN) else {
        return if status.code() == Code::Unimplemented {
            Failure::new(
                format!("the broker at {broker} does not support this call"),
                "the broker is older than this command: use a `credbroker` binary of the same version as the broker, or upgrade the broker",
            )
        } else {
            Failure::new(
                format!(
                    "lost the connection to the broker at {broker}: {}",
                    status.message()
                ),
                "the call may have taken effect: run `credbroker keys list` to check, then re-run the command",
            )
        };
    };
    let fix = match status.code() {
        Code::InvalidArgument | Code::NotFound => "correct the command",
        Code::Unauthenticated => "get a certificate from a CA that the broker trusts",
        // The message names the file.
        Code::Unavailable if info.reason == "STATE_UNWRITABLE" => {
            "check the permissions of that file's folder, and the free disk space there"
        }
        Code::FailedPrecondition if info.reason == "CLOCK_UNCERTAIN" => {
            "check the connection to KuCoin with `credbroker doctor`, then re-run the command"
        }
        Code::FailedPrecondition => "run `credbroker keys list` to check the key",
        _ => "see the broker's log",
    };
    Failure::new(
        format!("failed: {}: {}", info.reason, status.message()),
        fix,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "broker = \"[::1]:8444\"\nca = \"ca.pem\"\ncertificate = \"/a/anna.pem\"\nkey = \"anna.key\"\n";

    fn problems(text: &str) -> Vec<String> {
        let problems = AdminFile::parse(text, Path::new("/etc/credbroker")).unwrap_err();
        problems.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn relative_paths_start_at_the_folder_and_server_name_defaults_to_the_address() {
        let folder = Path::new("/etc/credbroker");
        let file = AdminFile::parse(TEXT, folder).unwrap();
        assert_eq!(file.server_name, ServerName::try_from("::1").unwrap());
        assert_eq!(file.ca, Path::new("/etc/credbroker/ca.pem"));
        assert_eq!(file.certificate, Path::new("/a/anna.pem"));
        assert!(file.vault.is_none());
        let named = format!("{TEXT}server_name = \"broker.example.org\"");
        let named = AdminFile::parse(&named, folder).unwrap();
        assert_eq!(
            named.server_name,
            ServerName::try_from("broker.example.org").unwrap()
        );
    }

    #[test]
    fn paths_that_a_shell_would_expand_are_problems() {
        let all = problems(
            "broker = \"127.0.0.1:8444\"\nca = \"~/ca.pem\"\ncertificate = \"$HOME/anna.pem\"\nkey = \"~/anna.key\"\n\
             [vault]\naddress = \"http://127.0.0.1:8200\"\nroots = \"~/vault.pem\"\n[vault.auth]\nmethod = \"token_file\"\n\
             file = \"~/.vault-token\"",
        );
        for part in [
            "line 2: ca: expected a path without ~ or variables, which are not expanded, got \"~/ca.pem\"; write the full path",
            "line 3: certificate: expected a path without ~",
            "line 4: key: expected a path without ~",
            "line 7: vault.roots: expected a path without ~",
            "line 10: vault.auth.file: expected a path without ~",
        ] {
            assert!(
                all.iter().any(|problem| problem.starts_with(part)),
                "{part} is not in {all:?}"
            );
        }
        assert_eq!(all.len(), 5, "{all:?}");
    }

    #[test]
    fn every_problem_is_reported_with_its_line() {
        let all = problems(
            "broker = \"localhost\"\nserver_name = \"a b\"\nport = 1\n[vault]\naddress = \"http://vault:8200\"",
        );
        for part in [
            "line 1: broker: expected host and port",
            "line 2: server_name: expected a DNS name or an IP address",
            "line 3: port: is not a key of this section",
            "ca: is missing",
            "certificate: is missing",
            "key: is missing",
            "line 5: vault.address: expected https",
            "line 4: vault.auth.method: is missing",
        ] {
            assert!(
                all.iter().any(|problem| problem.starts_with(part)),
                "{part} is not in {all:?}"
            );
        }
        assert_eq!(all.len(), 8, "{all:?}");
    }

    #[test]
    fn an_address_has_a_host_and_a_port() {
        assert_eq!(host("broker.example.org:8444"), Some("broker.example.org"));
        assert_eq!(host("[::1]:8444"), Some("::1"));
        for bad in [
            "",
            "127.0.0.1",
            ":8444",
            "a:0",
            "a:65536",
            "::1:8444",
            "[::1:8444",
            "a:x",
        ] {
            assert_eq!(host(bad), None, "{bad}");
        }
    }
}
