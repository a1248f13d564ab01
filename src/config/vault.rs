//! `[vault]`: Vault's address and how the broker logs in.

use std::path::{Path, PathBuf};
use std::time::Duration;

use url::Url;

use super::{is_loopback, path, required_path};
use crate::base::toml_file::Section;
use crate::vault::{Auth, VaultSettings};

/// Where Kubernetes mounts the token of a pod's service account.
pub(super) const JWT_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// Reads `[vault]`, except the keys that [`Config`](super::Config) holds itself.
pub(crate) fn read(section: &mut Section, folder: &Path) -> Option<VaultSettings> {
    let address = section.required("address", "\"https://vault.example.org:8200\"");
    let address = address.and_then(|text: String| vault_address(section, "address", &text));
    let redirects: Vec<String> = section.optional("redirects").unwrap_or_default();
    let redirects = redirects
        .iter()
        .filter_map(|text| vault_address(section, "redirects", text))
        .collect();
    let namespace: Option<String> = section.optional("namespace");
    if namespace
        .as_ref()
        .is_some_and(|name| name.is_empty() || !name.bytes().all(|b| b.is_ascii_graphic()))
    {
        section.problem("namespace", "expected printable ASCII without spaces");
    }
    let mount = kv_path(section, "mount", "kv");
    // API paths and policies have `data` or `metadata` between the mount and the path of the key.
    if let Some((bare, "data" | "metadata")) = mount.rsplit_once('/') {
        let problem = format!("expected the mount {bare:?}, got the API path {mount:?}");
        section.problem("mount", problem);
    }
    let prefix = kv_path(section, "prefix", "kucoin/prod");
    // Time limit of a complete request. Only background tasks wait for it, never a bot.
    let timeout = Duration::from_millis(section.number("timeout_ms", 3000, 100..=60_000));
    let auth = auth(&mut section.section("auth"), folder);
    if let (Some(address), Some(Auth::Cert { .. })) = (&address, &auth)
        && Url::scheme(address) != "https"
    {
        section.problem(
            "address",
            "expected https, because vault.auth.method = \"cert\" sends a client certificate",
        );
    }
    Some(VaultSettings {
        address: address?,
        redirects,
        namespace,
        mount,
        prefix,
        auth: auth?,
        timeout,
    })
}

fn vault_address(section: &Section, key: &str, text: &str) -> Option<Url> {
    let problem = match Url::parse(text) {
        Ok(url)
            if url.path() != "/"
                || url.query().is_some()
                || !url.username().is_empty()
                || url.password().is_some() =>
        {
            "expected only scheme, host and port; path, query and user are not supported".to_owned()
        }
        Ok(url) if url.scheme() == "https" || (url.scheme() == "http" && is_loopback(&url)) => {
            return Some(url);
        }
        Ok(url) => format!("expected https, or http on loopback, got {}", url.scheme()),
        Err(error) => format!("expected a URL such as \"https://vault.example.org:8200\": {error}"),
    };
    section.problem(key, problem);
    None
}

fn kv_path(section: &mut Section, key: &'static str, default: &str) -> String {
    let text: String = section.optional(key).unwrap_or_else(|| default.to_owned());
    let segment = |s: &str| {
        !matches!(s, "" | "." | "..")
            && s.bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    if !text.split('/').all(segment) {
        section.problem(
            key,
            format_args!(
                "expected names separated by single '/', such as {default:?}, got {text:?}"
            ),
        );
    }
    text
}

fn auth(section: &mut Section, folder: &Path) -> Option<Auth> {
    match section
        .required::<String>("method", "\"token_file\"")?
        .as_str()
    {
        "approle" => approle(section, folder),
        "cert" => {
            let mount = kv_path(section, "mount", "cert");
            let role = section.optional("role");
            let example = "/etc/credbroker/vault/client.pem";
            let certificate = required_path(section, "certificate", example, folder);
            let key = required_path(section, "key", "/etc/credbroker/vault/client.key", folder);
            Some(Auth::Cert {
                mount,
                role,
                certificate: certificate?,
                key: key?,
            })
        }
        "kubernetes" => {
            let mount = kv_path(section, "mount", "kubernetes");
            let role = section.required("role", "\"credbroker\"");
            let jwt_file = path(section, "jwt_file", JWT_FILE, folder);
            Some(Auth::Kubernetes {
                mount,
                role: role?,
                jwt_file: jwt_file.unwrap_or_else(|| JWT_FILE.into()),
            })
        }
        "token_file" => {
            let file = required_path(section, "file", "/run/vault-agent/token", folder)?;
            Some(Auth::TokenFile(file))
        }
        other => {
            section.problem(
                "method",
                format_args!(
                    "expected \"token_file\", \"approle\", \"kubernetes\" or \"cert\", got {other:?}"
                ),
            );
            section.ignore_rest();
            None
        }
    }
}

fn approle(section: &mut Section, folder: &Path) -> Option<Auth> {
    let mount = kv_path(section, "mount", "approle");
    let role_id = section.required("role_id", "\"00000000-0000-0000-0000-000000000000\"");
    let wrapped = section.optional("wrapped").unwrap_or(false);
    let role: Option<String> = section.optional("role");
    match (&role, wrapped) {
        (None, true) => section.problem(
            "role",
            "is missing; with wrapped = true, add the role that the wrapping token is issued for, for \
             example: role = \"credbroker\"",
        ),
        (Some(_), false) => {
            section.problem("role", "is used only with wrapped = true; remove it or set wrapped = true");
        }
        _ => {}
    }
    let has_file = section.has("secret_id_file");
    let example = "/etc/credbroker/vault/secret-id";
    let file = path(section, "secret_id_file", example, folder);
    let credential: Option<String> = section.optional("secret_id_credential");
    let secret_id_file = match (file, credential) {
        (Some(file), None) => Some(file),
        // `path` has reported the problem.
        (None, None) if has_file => None,
        (None, Some(_)) if wrapped => {
            section.problem(
                "secret_id_credential",
                "does not work with wrapped = true, because a systemd credential cannot be deleted after use; use \
                 secret_id_file",
            );
            None
        }
        (None, Some(name)) => {
            let folder = std::env::var_os("CREDENTIALS_DIRECTORY");
            match credential_file(folder.map(PathBuf::from), &name) {
                Ok(file) => Some(file),
                Err(problem) => {
                    section.problem("secret_id_credential", problem);
                    None
                }
            }
        }
        (Some(_), Some(_)) => {
            section.problem(
                "secret_id_credential",
                "is set together with secret_id_file; keep only one of them",
            );
            None
        }
        (None, None) => {
            section.problem(
                "secret_id_file",
                "is missing; add it, for example: secret_id_file = \"/etc/credbroker/vault/secret-id\", \
                 or secret_id_credential = \"secret-id\"",
            );
            None
        }
    };
    Some(Auth::AppRole {
        mount,
        role_id: role_id?,
        secret_id_file: secret_id_file?,
        wrapped_for: role.filter(|_| wrapped),
    })
}

/// The file of a systemd credential; `folder` is `$CREDENTIALS_DIRECTORY`, which only the service has. Commands run by hand
/// use the folder of `credbroker.service`.
fn credential_file(folder: Option<PathBuf>, name: &str) -> Result<PathBuf, &'static str> {
    if name.is_empty() || matches!(name, "." | "..") || name.contains('/') {
        return Err("expected the name of a systemd credential, as in LoadCredential=NAME:PATH");
    }
    let folder = folder.unwrap_or_else(|| PathBuf::from("/run/credentials/credbroker.service"));
    Ok(folder.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::toml_file::Problems;

    fn parsed(text: &str) -> Result<Auth, String> {
        let problems = Problems::default();
        let mut section = Section::parse(text, "config", &problems).unwrap();
        let auth = auth(&mut section, Path::new("/etc/credbroker"));
        drop(section);
        match problems.into_result() {
            Ok(()) => Ok(auth.expect("without problems there is a result")),
            Err(problems) => {
                let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
                Err(problems.join("\n"))
            }
        }
    }

    #[test]
    fn auth_methods_have_default_mounts_and_resolve_relative_paths() {
        let described = |text: &str| format!("{:?}", parsed(text).unwrap());
        assert_eq!(
            described("method = \"kubernetes\"\nrole = \"r\""),
            "Kubernetes { mount: \"kubernetes\", role: \"r\", \
             jwt_file: \"/var/run/secrets/kubernetes.io/serviceaccount/token\" }"
        );
        assert_eq!(
            described("method = \"cert\"\ncertificate = \"c\"\nkey = \"k\""),
            "Cert { mount: \"cert\", role: None, certificate: \"/etc/credbroker/c\", key: \"/etc/credbroker/k\" }"
        );
        assert_eq!(
            described(
                "method = \"approle\"\nrole_id = \"i\"\nsecret_id_file = \"s\"\nwrapped = true\nrole = \"r\""
            ),
            "AppRole { mount: \"approle\", role_id: \"i\", secret_id_file: \"/etc/credbroker/s\", \
             wrapped_for: Some(\"r\") }"
        );
    }

    #[test]
    fn auth_methods_report_missing_and_unknown_keys() {
        for (text, expected) in [
            (
                "method = \"cert\"\nrole_id = \"i\"",
                &[
                    "certificate: is missing",
                    "key: is missing",
                    "role_id: is not a key of this section; its keys are: method, mount, role, certificate, key",
                ][..],
            ),
            (
                "method = \"kubernetes\"\nmount = \"a//b\"\nfile = \"f\"",
                &[
                    "role: is missing",
                    "mount: expected names separated by single '/'",
                    "file: is not a key of this section; its keys are: method, mount, role, jwt_file",
                ],
            ),
            (
                "method = \"approle\"",
                &["role_id: is missing", "secret_id_file: is missing"],
            ),
            (
                "method = \"approle\"\nrole_id = \"i\"\nsecret_id_file = \"s\"\nsecret_id_credential = \"s\"",
                &[
                    "secret_id_credential: is set together with secret_id_file; keep only one of them",
                ],
            ),
            (
                "method = \"approle\"\nrole_id = \"i\"\nsecret_id_credential = \"s\"\nwrapped = true",
                &[
                    "role: is missing",
                    "secret_id_credential: does not work with wrapped = true",
                ],
            ),
            (
                "method = \"approle\"\nrole_id = \"i\"\nsecret_id_file = \"s\"\nrole = \"r\"",
                &["role: is used only with wrapped = true"],
            ),
            (
                "method = \"token\"",
                &[
                    "method: expected \"token_file\", \"approle\", \"kubernetes\" or \"cert\", got \"token\"",
                ],
            ),
        ] {
            let problems = parsed(text).unwrap_err();
            for part in expected {
                assert!(problems.contains(part), "{part} is not in\n{problems}");
            }
            assert_eq!(problems.lines().count(), expected.len(), "{problems}");
        }
    }

    #[test]
    fn credential_is_a_file_in_the_credentials_directory() {
        let folder = || Some(PathBuf::from("/run/credentials/other.service"));
        assert_eq!(
            credential_file(folder(), "secret-id"),
            Ok("/run/credentials/other.service/secret-id".into())
        );
        assert_eq!(
            credential_file(None, "secret-id"),
            Ok("/run/credentials/credbroker.service/secret-id".into())
        );
        for bad in ["", ".", "..", "../x", "/etc/x"] {
            assert!(credential_file(folder(), bad).is_err(), "{bad:?}");
        }
    }
}
