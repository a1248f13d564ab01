//! Checks that other users cannot read secrets that the configuration names, or change its files.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::vault::JWT_FILE;
use super::{Config, Roots};
use crate::base::toml_file::Problem;
use crate::vault::Auth;

/// Read permission of users who neither own the file nor are in its group.
const READ: u32 = 0o004;

/// Their write permission.
const WRITE: u32 = 0o002;

/// A file that a setting names.
#[derive(Clone, Debug)]
pub(crate) struct NamedFile {
    key: &'static str,
    file: PathBuf,
    /// Whether other users must not read it.
    is_secret: bool,
}

/// A file with permissions that are too open.
#[derive(Debug)]
pub(crate) struct ExposedFile<'f> {
    named: &'f NamedFile,
    /// Permission bits, such as `0o644`.
    mode: u32,
}

impl NamedFile {
    /// A private key, token or other secret.
    pub(crate) fn secret(key: &'static str, file: &Path) -> Self {
        let is_secret = true;
        let file = file.to_owned();
        Self {
            key,
            file,
            is_secret,
        }
    }

    /// A file that other users may read.
    pub(crate) fn public(key: &'static str, file: &Path) -> Self {
        let is_secret = false;
        let file = file.to_owned();
        Self {
            key,
            file,
            is_secret,
        }
    }

    /// Checks its permissions, following links. `None` if they are correct, and if there is no such file: the code that
    /// reads it reports that.
    pub(crate) fn check(&self) -> Option<ExposedFile<'_>> {
        let metadata = self
            .file
            .metadata()
            .ok()
            .filter(std::fs::Metadata::is_file)?;
        let forbidden = if self.is_secret { READ | WRITE } else { WRITE };
        let mode = metadata.mode() & 0o7777;
        (mode & forbidden != 0).then_some(ExposedFile { named: self, mode })
    }
}

impl ExposedFile<'_> {
    /// The setting that names it.
    pub(crate) fn key(&self) -> &'static str {
        self.named.key
    }

    /// The command that corrects the permissions.
    pub(crate) fn fix(&self) -> String {
        let change = if self.named.is_secret { "o-rwx" } else { "o-w" };
        format!("chmod {change} {}", self.named.file.display())
    }
}

/// `/etc/credbroker/tls/server.key can be read by other users (mode 0644)`
impl fmt::Display for ExposedFile<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let can = match (
            self.named.is_secret && self.mode & READ != 0,
            self.mode & WRITE != 0,
        ) {
            (true, true) => "read and changed",
            (true, false) => "read",
            (false, _) => "changed",
        };
        let file = self.named.file.display();
        write!(
            f,
            "{file} can be {can} by other users (mode {:04o})",
            self.mode
        )
    }
}

/// The files of a broker that need safe permissions: secrets, configuration, rules, certificates, CAs and the audit log.
pub(crate) fn files(config: &Config) -> Vec<NamedFile> {
    let (tls, mut files) = (&config.tls, Vec::new());
    files.extend(
        config
            .file
            .iter()
            .map(|file| NamedFile::public("config", file)),
    );
    files.push(NamedFile::public("rules", &config.rules));
    files.push(NamedFile::public("tls.certificate", &tls.certificate));
    files.push(NamedFile::secret("tls.key", &tls.key));
    files.push(NamedFile::public("tls.client_ca", &tls.client_ca));
    files.extend(
        tls.admin_ca
            .iter()
            .map(|file| NamedFile::public("tls.admin_ca", file)),
    );
    for (key, roots) in [
        ("vault.roots", &config.vault_roots),
        ("egress.roots", &config.egress_roots),
    ] {
        if let Roots::File(file) = roots {
            files.push(NamedFile::public(key, file));
        }
    }
    files.extend(login_files(&config.vault.auth));
    files.push(NamedFile::public("audit.file", &config.audit_file));
    files
}

/// The files of a Vault login.
pub(crate) fn login_files(auth: &Auth) -> Vec<NamedFile> {
    let mut files = Vec::new();
    if let Auth::Cert { certificate, .. } = auth {
        files.push(NamedFile::public("vault.auth.certificate", certificate));
    }
    files.extend(secret_of(auth));
    files
}

/// The secret file of a Vault login. The token that Kubernetes mounts into each pod is not checked: Kubernetes sets its
/// mode.
fn secret_of(auth: &Auth) -> Option<NamedFile> {
    let (key, file) = match auth {
        Auth::AppRole { secret_id_file, .. } => ("vault.auth.secret_id_file", secret_id_file),
        Auth::Cert { key, .. } => ("vault.auth.key", key),
        Auth::Kubernetes { jwt_file, .. } if jwt_file == Path::new(JWT_FILE) => return None,
        Auth::Kubernetes { jwt_file, .. } => ("vault.auth.jwt_file", jwt_file),
        Auth::TokenFile(file) => ("vault.auth.file", file),
    };
    Some(NamedFile::secret(key, file))
}

/// Warnings about the permissions of these files, each with its key and the command that corrects it.
pub(crate) fn warnings(files: &[NamedFile]) -> Vec<Problem> {
    let open = files.iter().filter_map(NamedFile::check);
    open.map(|open| Problem::new(open.key(), format_args!("{open}; {}", open.fix())))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn exposed_files_of_a_vault_login_are_reported() {
        let folder = tempfile::tempdir().unwrap();
        let [certificate, key] = ["a.pem", "a.key"].map(|name| folder.path().join(name));
        for (file, mode) in [(&certificate, 0o666), (&key, 0o644)] {
            std::fs::write(file, "").unwrap();
            std::fs::set_permissions(file, Permissions::from_mode(mode)).unwrap();
        }
        let auth = Auth::Cert {
            mount: "cert".to_owned(),
            role: None,
            certificate,
            key,
        };
        let files = login_files(&auth);
        let keys: Vec<_> = files
            .iter()
            .filter_map(NamedFile::check)
            .map(|open| open.key())
            .collect();
        assert_eq!(keys, ["vault.auth.certificate", "vault.auth.key"]);
    }

    #[test]
    fn other_users_may_read_public_files_and_change_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x");
        std::fs::write(&file, "").unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let warning = |named: &NamedFile, mode| {
            std::fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
            named.check().map(|open| format!("{open}; {}", open.fix()))
        };
        let (public, secret) = (NamedFile::public("a", &file), NamedFile::secret("b", &link));
        for mode in [0o600, 0o640, 0o660, 0o644, 0o664, 0o755] {
            assert_eq!(warning(&public, mode), None, "{mode:o}");
        }
        for mode in [0o400, 0o600, 0o640, 0o660, 0o770] {
            assert_eq!(warning(&secret, mode), None, "{mode:o}");
        }
        let (file, link) = (file.display(), link.display());
        for (named, mode, expected) in [
            (
                &public,
                0o666,
                format!("{file} can be changed by other users (mode 0666); chmod o-w {file}"),
            ),
            (
                &secret,
                0o644,
                format!("{link} can be read by other users (mode 0644); chmod o-rwx {link}"),
            ),
            (
                &secret,
                0o666,
                format!(
                    "{link} can be read and changed by other users (mode 0666); chmod o-rwx {link}"
                ),
            ),
            (
                &secret,
                0o602,
                format!("{link} can be changed by other users (mode 0602); chmod o-rwx {link}"),
            ),
        ] {
            assert_eq!(warning(named, mode), Some(expected));
        }
        assert!(
            NamedFile::secret("c", Path::new("/dev/null"))
                .check()
                .is_none()
        );
        assert!(NamedFile::secret("c", folder.path()).check().is_none());
    }
}
