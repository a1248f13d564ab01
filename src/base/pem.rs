//! PEM files: certificates and private keys.
//!
//! A file is read in full or refused with the line of the problem: a CA that is skipped would lock out its bots without an
//! error. Text between sections is allowed, because openssl writes it. Errors never show a section's content or a damaged
//! line: both can hold the key itself.

use rustls::pki_types::pem::{PemObject, SectionKind};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::Zeroizing;

/// A problem of a PEM file, without secret content of the file. Lines count from 1.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum PemProblem {
    /// A line that looks like a BEGIN or END line and is not valid.
    #[error(
        "line {0} is damaged: expected only a marker such as -----BEGIN CERTIFICATE-----, with five dashes on each side"
    )]
    Boundary(usize),
    /// A line of a section that is not base64.
    #[error("line {0} is not base64")]
    Content(usize),
    /// A binary format, and the command that converts it.
    #[error("the file is {0}, expected PEM; convert it: {1}")]
    Binary(&'static str, &'static str),
    /// A private key with a passphrase.
    #[error(
        "the private key on line {0} is encrypted, expected one without a passphrase; decrypt it: openssl pkey -in OLD -out NEW"
    )]
    Encrypted(usize),
    /// Text in another encoding.
    #[error("the file is {0}, expected UTF-8; convert it: iconv -f {0} -t UTF-8 OLD > NEW")]
    Encoding(&'static str),
    /// A section that does not belong in this file.
    #[error("unexpected section {label:?} on line {line}, expected {expected}; {fix}")]
    Label {
        /// Line of its BEGIN.
        line: usize,
        /// Its label.
        label: String,
        /// The expected label.
        expected: &'static str,
        /// What to do about it.
        fix: &'static str,
    },
    /// No section with the expected label.
    #[error("no {0} section found")]
    NoneFound(&'static str),
    /// NUL bytes after the beginning of a file, for example because a UTF-16 file was appended.
    #[error("line {0} contains NUL bytes, expected UTF-8; check whether UTF-16 text was appended")]
    ZeroBytes(usize),
    /// More than one private key.
    #[error(
        "line {0} begins a second private key, expected only one; keep the key that matches the certificate, and remove the other"
    )]
    SecondKey(usize),
    /// Base64 outside a section.
    #[error("line {0} is base64 outside a section; add or correct the BEGIN line above it")]
    OutsideSection(usize),
    /// A section whose lines are base64, but which cannot be decoded.
    #[error("the section that begins on line {0} is not valid base64; check that it is complete")]
    Incomplete(usize),
    /// An END line without a section.
    #[error("line {0} is an END line without a BEGIN line; add or correct the BEGIN line above it")]
    MissingBegin(usize),
    /// A section without its END line.
    #[error(
        "the section that begins on line {0} has no matching END line; check that the file is complete and has line breaks"
    )]
    MissingEnd(usize),
}

/// All certificates of a chain, at least one. The file may also hold the private key, which is ignored here.
///
/// # Errors
/// If there is no certificate, or the file cannot be read in full.
pub(crate) fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemProblem> {
    let found = read(text, Kind::Chain)?.into_iter();
    let found = found.map(|(_, _, der)| CertificateDer::from(der)).collect();
    non_empty(found, Kind::Chain)
}

/// All certificates of a file of CAs, at least one, each with its first line. The file may also hold public keys and
/// parameters.
///
/// # Errors
/// If there is no certificate, or the file cannot be read in full.
pub(crate) fn ca_certificates(
    text: &[u8],
) -> Result<Vec<(usize, CertificateDer<'static>)>, PemProblem> {
    let found = read(text, Kind::Cas)?.into_iter();
    let found = found.map(|(line, _, der)| (line, CertificateDer::from(der)));
    non_empty(found.collect(), Kind::Cas)
}

/// The private key in a file. The file may also hold certificates, which are ignored here.
///
/// # Errors
/// If there is not exactly one key, or the file cannot be read in full.
pub(crate) fn private_key(text: &[u8]) -> Result<PrivateKeyDer<'static>, PemProblem> {
    let mut found = read(text, Kind::Key)?.into_iter();
    let (line, kind, der) = found
        .next()
        .ok_or(PemProblem::NoneFound(Kind::Key.expected()))?;
    if let Some((line, ..)) = found.next() {
        return Err(PemProblem::SecondKey(line));
    }
    PrivateKeyDer::from_pem(kind, der).ok_or(PemProblem::Incomplete(line))
}

fn non_empty<T>(found: Vec<T>, kind: Kind) -> Result<Vec<T>, PemProblem> {
    if found.is_empty() {
        Err(PemProblem::NoneFound(kind.expected()))
    } else {
        Ok(found)
    }
}

/// What to read from a file.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Kind {
    /// Certificates of CAs; the file must not hold a private key, request or revocation list.
    Cas,
    /// The certificate chain of a server or client.
    Chain,
    /// A private key.
    Key,
}

impl Kind {
    /// Whether to read sections with this label.
    fn reads(self, label: &str) -> bool {
        match self {
            Self::Cas | Self::Chain => label == "CERTIFICATE",
            Self::Key => matches!(label, "PRIVATE KEY" | "RSA PRIVATE KEY" | "EC PRIVATE KEY"),
        }
    }

    /// Whether to ignore sections with this label, which tools write into the same file.
    fn ignores(self, label: &str) -> bool {
        let is_helper =
            label.ends_with(" PARAMETERS") || matches!(label, "CERTIFICATE REQUEST" | "PUBLIC KEY");
        match self {
            // A request may be there by mistake in place of its CA certificate, and a private key does not belong into a
            // file of CAs.
            Self::Cas => is_helper && label != "CERTIFICATE REQUEST",
            Self::Chain => is_helper || label.ends_with("PRIVATE KEY"),
            Self::Key => is_helper || label == "CERTIFICATE",
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Cas | Self::Chain => "CERTIFICATE",
            Self::Key => "PRIVATE KEY, EC PRIVATE KEY or RSA PRIVATE KEY",
        }
    }

    /// The command that converts DER to PEM.
    fn der_command(self) -> &'static str {
        match self {
            Self::Cas | Self::Chain => "openssl x509 -inform DER -in OLD -out NEW",
            Self::Key => "openssl pkey -inform DER -in OLD -out NEW",
        }
    }

    /// The command that extracts PEM from PKCS #12.
    fn pkcs12_command(self) -> &'static str {
        match self {
            Self::Cas | Self::Chain => "openssl pkcs12 -in OLD -nokeys -out NEW",
            Self::Key => "openssl pkcs12 -in OLD -nocerts -nodes -out NEW",
        }
    }
}

/// What to do about a section that does not belong in the file.
fn fix(label: &str) -> &'static str {
    match label {
        "TRUSTED CERTIFICATE" | "X509 CERTIFICATE" => {
            "convert this certificate: openssl x509 -in OLD -out NEW"
        }
        "PKCS7" => "extract the certificates: openssl pkcs7 -print_certs -in OLD -out NEW",
        "X509 CRL" => {
            "remove it, revocation lists are not supported; to block a bot, run `credbroker bots block`"
        }
        "DSA PRIVATE KEY" | "OPENSSH PRIVATE KEY" => {
            "generate a TLS key, for example: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out NEW"
        }
        _ => "remove this section",
    }
}

/// A section of the file, not yet decoded.
struct Section<'t> {
    /// Its first line.
    line: usize,
    label: &'t str,
    /// From its BEGIN to its END line, both included.
    text: &'t [u8],
    is_encrypted: bool,
    /// The first line in it that is not base64.
    not_base64: Option<usize>,
}

/// A decoded section: its first line, kind and content.
type Found = (usize, SectionKind, Vec<u8>);

/// Decodes the sections that `kind` reads. Other sections must be ones that it ignores.
fn read(text: &[u8], kind: Kind) -> Result<Vec<Found>, PemProblem> {
    check_encoding(text, kind)?;
    let mut found = Vec::new();
    for section in sections(text)? {
        let Section { line, label, .. } = section;
        if kind == Kind::Key && (label == "ENCRYPTED PRIVATE KEY" || section.is_encrypted) {
            return Err(PemProblem::Encrypted(line));
        }
        if kind.reads(label) {
            if let Some(line) = section.not_base64 {
                return Err(PemProblem::Content(line));
            }
            // The library does not accept a BEGIN or END line that is followed by a tab.
            let text = section.text.iter().map(|byte| match byte {
                b'\t' => b' ',
                byte => *byte,
            });
            let text = Zeroizing::new(text.collect::<Vec<_>>());
            // The library's errors show content of the file.
            let (kind, der) = PemObject::from_pem_slice(&text)
                .map_err(|_: rustls::pki_types::pem::Error| PemProblem::Incomplete(line))?;
            found.push((line, kind, der));
        } else if !kind.ignores(label) {
            return Err(PemProblem::Label {
                line,
                label: label.to_owned(),
                expected: kind.expected(),
                fix: fix(label),
            });
        }
    }
    Ok(found)
}

/// Refuses UTF-16 and binary files.
fn check_encoding(text: &[u8], kind: Kind) -> Result<(), PemProblem> {
    match text {
        [0xff, 0xfe, ..] | [1..=255, 0, ..] => return Err(PemProblem::Encoding("UTF-16LE")),
        [0xfe, 0xff, ..] | [0, 1..=255, ..] => return Err(PemProblem::Encoding("UTF-16BE")),
        // An ASN.1 sequence. In the short form, the length must be that of the rest of the file.
        [0x30, length @ 0x81..=0x84, rest @ ..] => {
            let content = rest.get(usize::from(length - 0x80)..);
            return Err(binary(content.unwrap_or_default(), kind));
        }
        [0x30, length, rest @ ..] if usize::from(*length) == rest.len() => {
            return Err(binary(rest, kind));
        }
        _ => {}
    }
    match text.iter().position(|byte| *byte == 0) {
        Some(at) => {
            let before = text.iter().take(at).filter(|byte| **byte == b'\n').count();
            Err(PemProblem::ZeroBytes(before + 1))
        }
        None => Ok(()),
    }
}

/// The error for a DER file; `content` is that of its outermost sequence.
fn binary(content: &[u8], kind: Kind) -> PemProblem {
    // PKCS #12 begins with version 3; keys and certificates begin differently.
    if content.starts_with(&[0x02, 0x01, 0x03]) {
        PemProblem::Binary("PKCS #12", kind.pkcs12_command())
    } else {
        PemProblem::Binary("DER", kind.der_command())
    }
}

/// All sections, in file order. A line that looks like part of a section, but is not, is a problem.
fn sections(text: &[u8]) -> Result<Vec<Section<'_>>, PemProblem> {
    let mut sections = Vec::new();
    let mut open: Option<(Section<'_>, usize)> = None;
    // Classic Mac OS ends lines with CR only.
    let end = if text.contains(&b'\n') { b'\n' } else { b'\r' };
    let mut at = 0;
    for (index, raw) in text.split(|byte| *byte == end).enumerate() {
        let (line, start) = (index + 1, at);
        at += raw.len() + 1;
        // Windows editors write byte order marks. In concatenated files, one can also come later.
        let content = raw.strip_prefix("\u{feff}".as_bytes()).unwrap_or(raw);
        let start = start + (raw.len() - content.len());
        let content = content.strip_suffix(b"\r").unwrap_or(content);
        match (boundary(content), &mut open) {
            (Boundary::Damaged, _) => return Err(PemProblem::Boundary(line)),
            (Boundary::Begin(_), Some((section, _))) => {
                return Err(PemProblem::MissingEnd(section.line));
            }
            (Boundary::Begin(label), None) => {
                let section = Section {
                    line,
                    label,
                    text: &[],
                    is_encrypted: false,
                    not_base64: None,
                };
                open = Some((section, start));
            }
            (Boundary::End(_), None) => return Err(PemProblem::MissingBegin(line)),
            (Boundary::End(label), Some((section, _))) if label != section.label => {
                return Err(PemProblem::MissingEnd(section.line));
            }
            (Boundary::End(_), Some(_)) => {
                if let Some((section, begin)) = open.take() {
                    let text = text.get(begin..start + content.len()).unwrap_or_default();
                    sections.push(Section { text, ..section });
                }
            }
            (Boundary::None, Some((section, _))) => {
                section.is_encrypted |=
                    content.starts_with(b"Proc-Type:") && content.ends_with(b"ENCRYPTED");
                if section.not_base64.is_none() && !content.iter().copied().all(is_base64_or_space)
                {
                    section.not_base64 = Some(line);
                }
            }
            (Boundary::None, None) if is_stray_base64(content) => {
                return Err(PemProblem::OutsideSection(line));
            }
            (Boundary::None, None) => {}
        }
    }
    match open {
        Some((section, _)) => Err(PemProblem::MissingEnd(section.line)),
        None => Ok(sections),
    }
}

/// Whether a line begins or ends a section.
enum Boundary<'t> {
    Begin(&'t str),
    /// Looks like a BEGIN or END line, but is not valid.
    Damaged,
    End(&'t str),
    None,
}

fn boundary(line: &[u8]) -> Boundary<'_> {
    let Ok(text) = str::from_utf8(line) else {
        // Text between sections can have any encoding.
        return if is_damaged(&String::from_utf8_lossy(line)) {
            Boundary::Damaged
        } else {
            Boundary::None
        };
    };
    let label = |begin| {
        let label = text.trim_end_matches([' ', '\t']).strip_prefix(begin)?;
        label.strip_suffix("-----").filter(|label| is_label(label))
    };
    if let Some(label) = label("-----BEGIN ") {
        Boundary::Begin(label)
    } else if let Some(label) = label("-----END ") {
        Boundary::End(label)
    } else if is_damaged(text) {
        Boundary::Damaged
    } else {
        Boundary::None
    }
}

/// Labels are capitals, digits and single spaces. Anything else may be a key without line breaks.
fn is_label(text: &str) -> bool {
    let is_word = |word: &str| {
        !word.is_empty()
            && word
                .bytes()
                .all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
    };
    text.len() <= 40 && text.split(' ').all(is_word)
}

/// Whether a line looks like a damaged BEGIN or END line: it has one of these words, and two dashes in a row or a long
/// dash, as word processors write it.
fn is_damaged(text: &str) -> bool {
    let has_word = |word: &str| {
        text.match_indices(word).any(|(at, _)| {
            let before = text.get(..at).and_then(|before| before.chars().last());
            before.is_none_or(|c| !c.is_alphanumeric())
        })
    };
    let has_dashes = text.contains("--") || text.contains(['\u{2013}', '\u{2014}', '\u{2212}']);
    has_dashes && (has_word("BEGIN") || has_word("END"))
}

/// Whether a line between sections is base64 as in a section: at least 60 characters, and not a fingerprint in hex.
fn is_stray_base64(line: &[u8]) -> bool {
    const LEAST: usize = 60;
    let line = line.trim_ascii();
    line.len() >= LEAST
        && line.iter().copied().all(is_base64)
        && line.iter().any(u8::is_ascii_uppercase)
        && line.iter().any(u8::is_ascii_lowercase)
        && line.iter().any(u8::is_ascii_digit)
}

fn is_base64(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=')
}

fn is_base64_or_space(byte: u8) -> bool {
    is_base64(byte) || byte.is_ascii_whitespace()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Not a real certificate, because this module does not parse DER: 96 bytes, two lines of base64 (made with `base64 -w 64`).
    const BODY: &str = "MIIBAQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyAhIiMkJSYnKCkqKywt\nLi8wMTIzNDU2Nzg5Ojs8PT4/QEFCQ0RFRkdISUpLTE1OT1BRUlNUVVZXWFlaW1xd\n";

    fn section(label: &str) -> String {
        format!("-----BEGIN {label}-----\n{BODY}-----END {label}-----\n")
    }

    fn certificate() -> String {
        section("CERTIFICATE")
    }

    #[test]
    fn errors_never_show_the_private_key() {
        let one_line =
            r"-----BEGIN PRIVATE KEY-----\nMC4CFakeFakeFake\n-----END PRIVATE KEY-----\n";
        let spaces = "-----BEGIN PRIVATE KEY----- MC4CFakeFakeFake -----END PRIVATE KEY-----";
        let cases = [
            (one_line, PemProblem::Boundary(1)),
            (spaces, PemProblem::Boundary(1)),
            (
                "-----BEGIN PRIVATE KEY-----MC4CFake\n",
                PemProblem::Boundary(1),
            ),
            (
                "-----BEGIN PRIVATE KEY-----\nMC4CFake\n",
                PemProblem::MissingEnd(1),
            ),
            (
                "-----BEGIN PRIVATE KEY-----\nMC4C*Fake\n-----END PRIVATE KEY-----\n",
                PemProblem::Content(2),
            ),
            (
                "-----BEGIN PRIVATE KEY-----\nMC4CFake=Fake\n-----END PRIVATE KEY-----\n",
                PemProblem::Incomplete(1),
            ),
            (
                "MC4CFakeFakeFake",
                PemProblem::NoneFound(Kind::Key.expected()),
            ),
        ];
        for (text, expected) in cases {
            let problem = private_key(text.as_bytes()).unwrap_err();
            let shown = problem.to_string();
            assert!(
                !shown.contains("Fake") && !shown.contains("70, 97"),
                "{shown}"
            );
            assert_eq!(problem, expected, "{text}");
            assert!(certificates(text.as_bytes()).is_err());
        }
    }

    #[test]
    fn each_damaged_line_is_named_and_nothing_is_skipped() {
        let (one, two) = (certificate(), certificate());
        let damaged = |from: &str, to: &str| one.replacen(from, to, 1) + &two;
        let begin = "-----BEGIN CERTIFICATE-----";
        let end = "-----END CERTIFICATE-----";
        let cases = [
            (damaged("-----BEGIN", "----BEGIN"), PemProblem::Boundary(1)),
            (
                damaged("-----BEGIN", "------BEGIN"),
                PemProblem::Boundary(1),
            ),
            (
                damaged("E-----\nMII", "E----\nMII"),
                PemProblem::Boundary(1),
            ),
            (
                damaged("-----BEGIN ", "-----BEGIN"),
                PemProblem::Boundary(1),
            ),
            (
                damaged(begin, " -----BEGIN CERTIFICATE-----"),
                PemProblem::Boundary(1),
            ),
            (
                damaged(begin, "\t-----BEGIN CERTIFICATE-----"),
                PemProblem::Boundary(1),
            ),
            (
                damaged(begin, "# -----BEGIN CERTIFICATE-----"),
                PemProblem::Boundary(1),
            ),
            (
                damaged(begin, "\u{2014}BEGIN CERTIFICATE\u{2014}"),
                PemProblem::Boundary(1),
            ),
            (
                damaged(begin, "-----BEGIN Certificate-----"),
                PemProblem::Boundary(1),
            ),
            // Without a recognisable BEGIN line, the base64 below it is reported.
            (
                damaged(begin, "-----begin certificate-----"),
                PemProblem::OutsideSection(2),
            ),
            (damaged(begin, "CERTIFICATE"), PemProblem::OutsideSection(2)),
            (
                damaged("-----BEGIN CERTIFICATE-----\n", ""),
                PemProblem::OutsideSection(1),
            ),
            (
                damaged(end, "----END CERTIFICATE-----"),
                PemProblem::Boundary(4),
            ),
            (damaged(end, ""), PemProblem::MissingEnd(1)),
            (
                damaged(end, "-----END PRIVATE KEY-----"),
                PemProblem::MissingEnd(1),
            ),
            // `cat` of two files that do not end with a line break.
            (one.trim_end().to_owned() + &two, PemProblem::Boundary(4)),
            (one.clone() + begin, PemProblem::MissingEnd(5)),
            (
                one.clone() + &two.replace("MII", "M*I"),
                PemProblem::Content(6),
            ),
            (
                two.replace("-----BEGIN CERTIFICATE-----\n", "")
                    .replace(BODY, "MIIB\n"),
                PemProblem::MissingBegin(2),
            ),
            (one.replace('\n', " "), PemProblem::Boundary(1)),
        ];
        for (text, expected) in cases {
            for found in [
                certificates(text.as_bytes()).map(drop),
                ca_certificates(text.as_bytes()).map(drop),
            ] {
                assert_eq!(found, Err(expected.clone()), "{text}");
            }
        }
        let indented = format!(" {}", one.trim_end().replace('\n', "\n ")) + "\n";
        assert_eq!(
            certificates((indented + &two).as_bytes()),
            Err(PemProblem::Boundary(1))
        );
    }

    #[test]
    fn unexpected_sections_are_refused_with_a_fix() {
        let refused = |found: Result<(), PemProblem>, at: usize, fix: &str| match found {
            Err(problem @ PemProblem::Label { line, .. }) => {
                assert_eq!(line, at, "{problem}");
                assert!(problem.to_string().contains(fix), "{problem}");
            }
            other => panic!("{other:?}"),
        };
        let with = |label: &str| certificate() + &section(label);
        let cas = |label: &str| ca_certificates(with(label).as_bytes()).map(drop);
        let chain = |label: &str| certificates(with(label).as_bytes()).map(drop);
        for label in ["TRUSTED CERTIFICATE", "X509 CERTIFICATE"] {
            refused(cas(label), 5, "openssl x509 -in OLD -out NEW");
            refused(chain(label), 5, "openssl x509 -in OLD -out NEW");
        }
        refused(cas("X509 CRL"), 5, "revocation lists are not supported");
        refused(cas("PRIVATE KEY"), 5, "remove this section");
        refused(cas("PKCS7"), 5, "openssl pkcs7 -print_certs");
        refused(cas("CERTIFICATE REQUEST"), 5, "remove this section");
        for extra in ["PRIVATE KEY", "EC PARAMETERS", "DH PARAMETERS"] {
            assert_eq!(chain(extra), Ok(()), "{extra}");
        }
        for extra in ["PUBLIC KEY", "EC PARAMETERS", "DH PARAMETERS"] {
            assert_eq!(cas(extra), Ok(()), "{extra}");
        }
        let key = |label: &str| private_key(section(label).as_bytes()).map(drop);
        assert_eq!(
            private_key(
                (section("EC PARAMETERS") + &section("EC PRIVATE KEY") + &certificate()).as_bytes()
            )
            .map(drop),
            Ok(())
        );
        refused(key("OPENSSH PRIVATE KEY"), 1, "openssl genpkey");
        assert_eq!(key("ENCRYPTED PRIVATE KEY"), Err(PemProblem::Encrypted(1)));
        let header =
            "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\n";
        let encrypted =
            section("EC PRIVATE KEY").replace("-----BEGIN EC PRIVATE KEY-----\n", header);
        assert_eq!(
            private_key(encrypted.as_bytes()).map(drop),
            Err(PemProblem::Encrypted(1))
        );
        let two = section("PRIVATE KEY") + &section("PRIVATE KEY");
        assert_eq!(
            private_key(two.as_bytes()).map(drop),
            Err(PemProblem::SecondKey(5))
        );
    }

    #[test]
    fn text_between_sections_is_ignored_and_any_line_ending_is_accepted() {
        let dump = "# CA of the bots -- until 2030\nBag Attributes\n    localKeyID: 01 00\nsubject=CN = BACKEND -- CA\n\
                    Certificate:\n    Data:\n        Signature Value:\n            30:45:02:21\n\
                    e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n\
                    ----------------------------------------------------------------\n\
                    ================================================================\n";
        let text = format!("{dump}{}\n{dump}{}", certificate(), certificate());
        let bom = |text: &str| format!("\u{feff}{text}");
        for text in [
            text.clone(),
            text.replace('\n', "\r\n"),
            text.replace('\n', "\r"),
            text.trim_end().to_owned(),
            text.replace("E-----\n", "E----- \n"),
            text.replace("E-----\n", "E-----\t \r\n"),
            bom(&text),
            bom(&certificate()) + &bom(&certificate()),
        ] {
            assert_eq!(certificates(text.as_bytes()).unwrap().len(), 2, "{text}");
        }
        let lines: Vec<_> = ca_certificates(text.as_bytes())
            .unwrap()
            .into_iter()
            .map(|(line, _)| line)
            .collect();
        assert_eq!(lines, [12, 28]);
    }

    #[test]
    fn other_encodings_are_reported_with_a_conversion_command() {
        let little =
            |text: &str| -> Vec<u8> { text.encode_utf16().flat_map(u16::to_le_bytes).collect() };
        let big =
            |text: &str| -> Vec<u8> { text.encode_utf16().flat_map(u16::to_be_bytes).collect() };
        let text = certificate();
        let bom = format!("\u{feff}{text}");
        for (bytes, name) in [
            (little(&text), "UTF-16LE"),
            (little(&bom), "UTF-16LE"),
            (big(&text), "UTF-16BE"),
            (big(&bom), "UTF-16BE"),
        ] {
            assert_eq!(certificates(&bytes), Err(PemProblem::Encoding(name)));
        }
        let appended = [text.as_bytes(), &little(&bom)].concat();
        assert_eq!(certificates(&appended), Err(PemProblem::ZeroBytes(5)));
        let mut der = vec![0x30, 0x82, 0x01, 0x00, 0x02, 0x01, 0x00];
        der.resize(260, 0x0a);
        let message = private_key(&der).unwrap_err().to_string();
        assert!(
            message.contains("the file is DER") && message.contains("openssl pkey -inform DER"),
            "{message}"
        );
        let message = ca_certificates(&der).unwrap_err().to_string();
        assert!(message.contains("openssl x509 -inform DER"), "{message}");
        // The length of an Ed25519 key.
        let mut short = vec![0x30, 0x2e, 0x02, 0x01, 0x00];
        short.resize(48, 0x0a);
        assert!(matches!(
            private_key(&short),
            Err(PemProblem::Binary("DER", _))
        ));
        let mut pkcs12 = vec![0x30, 0x82, 0x01, 0x00, 0x02, 0x01, 0x03];
        pkcs12.resize(260, 0x0a);
        let message = certificates(&pkcs12).unwrap_err().to_string();
        assert!(
            message.contains("the file is PKCS #12") && message.contains("openssl pkcs12"),
            "{message}"
        );
    }
}
