//! Reads the values of a key, from a terminal without echo or from stdin, and collects remarks about unusual values.
//!
//! Never from arguments or the environment, which other processes can see. No error and no remark contains a value.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::thread;

use rustix::io::Errno;
use rustix::termios::{
    LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr,
};
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use tokio::sync::oneshot;
use zeroize::Zeroizing;

use super::say;
use super::text::counted;
use crate::base::encoding::is_utf16;
use crate::base::secret::{ApiSecret, KeyValues, PartnerKey, Passphrase};
use crate::base::text::is_deceptive;
use crate::process::Signals;

/// Limit for piped input: far more than a key needs.
const MAX_BYTES: usize = 64 * 1024;

/// The longest line that a terminal delivers.
const MAX_LINE_BYTES: usize = 4096;

/// The values, in the order of input; the last one only for an account with a partner.
const NAMES: [&str; 4] = ["api_key", "api_secret", "passphrase", "partner_key"];

const TRADING_PASSWORD: &str = "six digits look like the trading password; the API passphrase is the one that was \
                                chosen when the key was created";

/// A key as an admin entered it.
#[derive(Debug)]
pub(super) struct KeyInput {
    pub(super) values: KeyValues,
    /// What was removed from the values, and what is unusual about them.
    pub(super) remarks: Vec<String>,
}

/// Why no key could be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum InputError {
    /// By a signal (Ctrl-C).
    #[error("interrupted")]
    Interrupted,
    /// Cannot be read.
    #[error("cannot read the input: {0}")]
    Io(#[from] io::Error),
    /// In another encoding.
    #[error("expected text in UTF-8, got UTF-16, which PowerShell's `>` writes")]
    Utf16,
    /// Not a key.
    #[error("{0}")]
    Refused(String),
}

/// Reads a key: with prompts if stdin is a terminal, otherwise from stdin as lines or as a JSON object.
///
/// When this returns, echo is on again, and anything else that was pasted is discarded, so that a shell does not run it.
pub(super) async fn read(has_partner: bool) -> Result<KeyInput, InputError> {
    let names = if has_partner { &NAMES[..] } else { &NAMES[..3] };
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return key_input(parse(&read_all(stdin)?, names)?);
    }
    let mut signals = Signals::of_a_command()?;
    let _echo_off = EchoOff::new(io::stdin())?;
    let (sender, values) = oneshot::channel();
    // In its own thread, which a signal leaves behind: a read from a terminal cannot be cancelled.
    thread::spawn(move || sender.send(prompt_for(io::stdin(), io::stderr(), names)));
    tokio::select! {
        values = values => return key_input(values.map_err(|_| InputError::Interrupted)??),
        _ = signals.next() => {}
    }
    // Ends the line of the prompt.
    say("");
    Err(InputError::Interrupted)
}

/// Switches off the echo of a terminal until it is dropped.
struct EchoOff<T: AsFd> {
    terminal: T,
    before: Termios,
}

impl<T: AsFd> EchoOff<T> {
    fn new(terminal: T) -> io::Result<Self> {
        let before = tcgetattr(&terminal)?;
        let mut without_echo = before.clone();
        without_echo
            .local_modes
            .remove(LocalModes::ECHO | LocalModes::ECHONL);
        without_echo.local_modes.insert(LocalModes::ICANON);
        // Suspending or quitting here would leave echo off. Ctrl-C stays enabled: its signal is handled.
        for key in [SpecialCodeIndex::VSUSP, SpecialCodeIndex::VQUIT] {
            without_echo.special_codes[key] = 0;
        }
        tcsetattr(&terminal, OptionalActions::Flush, &without_echo)?;
        Ok(Self { terminal, before })
    }
}

impl<T: AsFd> Drop for EchoOff<T> {
    fn drop(&mut self) {
        if tcsetattr(&self.terminal, OptionalActions::Flush, &self.before).is_err() {
            say("the terminal may not show what you type; run `stty echo` to fix it");
        }
    }
}

/// Prompts for one value after the other.
fn prompt_for(
    terminal: impl AsFd,
    mut prompt: impl Write,
    names: &[&'static str],
) -> Result<Vec<Value>, InputError> {
    let mut values = Vec::new();
    for &name in names {
        write!(prompt, "{name} (not shown): ")?;
        prompt.flush()?;
        let mut line = Zeroizing::new([0; MAX_LINE_BYTES]);
        let length = read_some(&terminal, &mut line[..])?;
        // Printed here and not echoed: for three lines pasted at once, the terminal would echo every Enter before the second
        // prompt.
        writeln!(prompt)?;
        if length == 0 {
            return Err(refused(format!("{name}: unexpected end of input")));
        }
        let text = as_text(line.get(..length).unwrap_or_default())?;
        // Enter is not part of the value.
        values.push(Value::new(name, text.strip_suffix('\n').unwrap_or(text)));
    }
    Ok(values)
}

/// One value as entered.
struct Value {
    name: &'static str,
    text: Zeroizing<String>,
}

impl Value {
    fn new(name: &'static str, text: &str) -> Self {
        let text = Zeroizing::new(text.to_owned());
        Self { name, text }
    }
}

fn refused(problem: String) -> InputError {
    InputError::Refused(problem)
}

/// Reads all piped input.
fn read_all(input: impl AsFd) -> Result<Zeroizing<String>, InputError> {
    // Allocated at full size, because growing it would leave copies in memory.
    let mut bytes = Zeroizing::new(vec![0; MAX_BYTES]);
    let mut length = 0;
    loop {
        let free = bytes.get_mut(length..).unwrap_or_default();
        if free.is_empty() {
            let limit = MAX_BYTES / 1024;
            return Err(refused(format!("expected a key, got {limit} KiB or more")));
        }
        match read_some(&input, free)? {
            0 => break,
            more => length += more,
        }
    }
    let text = as_text(bytes.get(..length).unwrap_or_default())?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// Reads without the buffer of the standard library, which is not wiped.
fn read_some(input: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::io::read(&input, &mut *buffer) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

fn as_text(bytes: &[u8]) -> Result<&str, InputError> {
    if is_utf16(bytes) {
        return Err(InputError::Utf16);
    }
    str::from_utf8(bytes).map_err(|_| refused("expected text in UTF-8".to_owned()))
}

/// Splits piped input: a JSON object, or one value per line.
fn parse(text: &str, names: &[&'static str]) -> Result<Vec<Value>, InputError> {
    let json = text.trim_matches(is_invisible);
    if json.starts_with('{') {
        return parse_json(json, names);
    }
    let is_blank = |line: &&str| line.chars().all(is_invisible);
    let lines: Vec<_> = text.lines().filter(|line| !is_blank(line)).collect();
    if lines.len() != names.len() {
        return Err(refused(format!(
            "expected {} lines ({}) or a JSON object with these fields, got {}",
            names.len(),
            names.join(", "),
            counted(lines.len(), "line")
        )));
    }
    let values = names.iter().zip(lines);
    Ok(values.map(|(name, line)| Value::new(name, line)).collect())
}

fn parse_json(json: &str, names: &[&'static str]) -> Result<Vec<Value>, InputError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Fields {
        #[serde(deserialize_with = "wiped")]
        api_key: Zeroizing<String>,
        #[serde(deserialize_with = "wiped")]
        api_secret: Zeroizing<String>,
        #[serde(deserialize_with = "wiped")]
        passphrase: Zeroizing<String>,
        #[serde(default, deserialize_with = "wiped")]
        partner_key: Zeroizing<String>,
        /// Accepted, since JSON written to Vault by hand has it, but ignored: a test determines the version.
        #[serde(default, rename = "key_version")]
        _key_version: IgnoredAny,
    }
    fn wiped<'de, D: Deserializer<'de>>(input: D) -> Result<Zeroizing<String>, D::Error> {
        String::deserialize(input).map(Zeroizing::new)
    }
    let fields: Fields = serde_json::from_str(json).map_err(|error| {
        // The error's own message could contain a value.
        refused(format!(
            "expected a JSON object with the string fields {}; found something else at line {}, column {}",
            names.join(", "),
            error.line(),
            error.column()
        ))
    })?;
    let has_partner = names.contains(&"partner_key");
    if !has_partner && !fields.partner_key.is_empty() {
        return Err(refused(
            "partner_key: the account has no partner in the rules; remove this field".to_owned(),
        ));
    }
    let texts = [
        fields.api_key,
        fields.api_secret,
        fields.passphrase,
        fields.partner_key,
    ];
    let values = names.iter().zip(texts);
    Ok(values.map(|(name, text)| Value { name, text }).collect())
}

/// Builds a key from the values, in the order of [`NAMES`].
fn key_input(values: Vec<Value>) -> Result<KeyInput, InputError> {
    let mut remarks = Vec::new();
    let mut texts = Vec::new();
    for value in values {
        let text = value.text.trim_matches(is_invisible);
        if *text != **value.text {
            let remark = "removed leading or trailing spaces, line breaks or invisible characters";
            remarks.push(format!("{}: {remark}", value.name));
        }
        check(value.name, text)?;
        if let Some(remark) = suspicious(value.name, text) {
            remarks.push(format!("{}: {remark}", value.name));
        }
        texts.push(Zeroizing::new(text.to_owned()));
    }
    let mut texts = texts.into_iter();
    let mut next = || {
        let missing = || refused("a value is missing".to_owned());
        texts.next().ok_or_else(missing)
    };
    let (api_key, api_secret, passphrase) = (next()?, next()?, next()?);
    let values = KeyValues {
        api_key,
        api_secret: ApiSecret::new(api_secret),
        passphrase: Passphrase::new(passphrase),
        partner_key: texts.next().map(PartnerKey::new),
    };
    Ok(KeyInput { values, remarks })
}

/// Whether a character is invisible.
fn is_invisible(c: char) -> bool {
    c.is_whitespace() || is_deceptive(c)
}

/// Refuses what cannot be a value of a key.
fn check(name: &str, text: &str) -> Result<(), InputError> {
    if text.is_empty() {
        return Err(refused(format!("{name} is empty")));
    }
    for (position, c) in (1..).zip(text.chars()) {
        // Only a passphrase may contain spaces: a person chose it.
        let is_passphrase = name == "passphrase";
        let kind = if is_invisible(c) && !(is_passphrase && c == ' ') {
            "a space or an invisible character"
        } else if name == "api_key" && !c.is_ascii() {
            "not ASCII"
        } else {
            continue;
        };
        return Err(refused(format!(
            "{name}: character {position} is {kind} (U+{:04X}); copy the value again",
            u32::from(c),
        )));
    }
    Ok(())
}

/// How a value differs from KuCoin's usual format. Only a remark: KuCoin documents no format of keys and secrets.
fn suspicious(name: &str, text: &str) -> Option<String> {
    let is_usual_passphrase =
        (7..=32).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    let usual = match name {
        "api_key" if !is_hex(text, 24) => "24 hexadecimal digits",
        "api_secret" if !is_uuid(text) => {
            "a UUID: 36 characters, 5 groups of hexadecimal digits separated by '-'"
        }
        "passphrase" if text.len() == 6 && text.bytes().all(|b| b.is_ascii_digit()) => {
            return Some(TRADING_PASSWORD.to_owned());
        }
        "passphrase" if !is_usual_passphrase => "7 to 32 ASCII characters and no spaces",
        _ => return None,
    };
    Some(format!("unusual for KuCoin; expected {usual}"))
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether `text` has the format of KuCoin's secrets.
fn is_uuid(text: &str) -> bool {
    let groups: Vec<_> = text.split('-').collect();
    groups.len() == 5
        && groups
            .iter()
            .zip([8, 4, 4, 4, 12])
            .all(|(group, length)| is_hex(group, length))
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::Read as _;
    use std::os::unix::fs::OpenOptionsExt as _;

    use proptest::prelude::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

    use super::*;

    const ID: &str = "0123456789abcdef01234567";
    const SECRET: &str = "01234567-89ab-cdef-0123-456789abcdef";

    fn from(text: &str) -> Result<KeyInput, String> {
        let given = parse(text, &NAMES[..3]).and_then(key_input);
        given.map_err(|error| error.to_string())
    }

    fn remarks(text: &str) -> Vec<String> {
        from(text).unwrap().remarks
    }

    fn holds(values: &KeyValues, id: &str, secret: &str, passphrase: &str) -> bool {
        *values.api_key == id
            && values.api_secret.expose() == secret.as_bytes()
            && values.passphrase.expose() == passphrase.as_bytes()
    }

    #[test]
    fn key_is_read_from_lines_and_from_json() {
        let json = format!(
            r#"{{ "passphrase": "fake \"pass", "api_secret": "{SECRET}", "key_version": 3, "api_key": "{ID}" }}"#
        );
        for text in [
            format!("{ID}\n{SECRET}\nfake \"pass"),
            format!("\u{feff}\r\n{ID}\r\n\r\n{SECRET}\r\nfake \"pass\r\n"),
            format!("\u{feff} {json}\n"),
        ] {
            let given = from(&text).unwrap();
            assert!(holds(&given.values, ID, SECRET, "fake \"pass"), "{text}");
        }
        let four = format!("{ID}\n{SECRET}\nfake-pass\nfake-partner");
        let given = key_input(parse(&four, &NAMES).unwrap()).unwrap();
        assert_eq!(given.values.partner_key.unwrap().expose(), b"fake-partner");
    }

    #[test]
    fn surrounding_characters_are_removed_with_a_remark() {
        assert_eq!(remarks(&format!("{ID}\n{SECRET}\nfake-pass\n")), [""; 0]);
        let text =
            format!("\u{feff}{ID}\u{a0}\n\t {SECRET} \n \u{200b}\"fake-pass\" \u{200b}  \r\n");
        // Quotes stay: they may be part of the passphrase.
        assert!(holds(
            &from(&text).unwrap().values,
            ID,
            SECRET,
            "\"fake-pass\""
        ));
        assert_eq!(
            remarks(&text),
            NAMES[..3]
                .iter()
                .map(|name| format!(
                    "{name}: removed leading or trailing spaces, line breaks or invisible characters"
                ))
                .collect::<Vec<_>>()
        );
    }

    #[test]
    fn input_that_is_not_a_key_is_refused_without_showing_values() {
        let lines = |id: &str, secret: &str, pass: &str| format!("{id}\n{secret}\n{pass}\n");
        let json = |id: &str| {
            format!(r#"{{"api_key":{id},"api_secret":"{SECRET}","passphrase":"fake-pass"}}"#)
        };
        let expected = "expected 3 lines (api_key, api_secret, passphrase) or a JSON object with these fields, got ";
        let object = "expected a JSON object with the string fields api_key, api_secret, passphrase; found something else at line 1, column ";
        for (text, problem) in [
            (String::new(), format!("{expected}0 lines")),
            (lines(ID, " \t", "fake-pass"), format!("{expected}2 lines")),
            (
                format!("{}more", lines(ID, SECRET, "fake-pass")),
                format!("{expected}4 lines"),
            ),
            (json("\"\""), "api_key is empty".to_owned()),
            (json("7"), format!("{object}12")),
            (
                "{\"api_key\":\"fake\"}".to_owned(),
                format!("{object}18"),
            ),
            (
                "{\"fake\":\"fake\"}".to_owned(),
                format!("{object}7"),
            ),
            (
                lines("0123\u{200b}4567", SECRET, "fake-pass"),
                "api_key: character 5 is a space or an invisible character (U+200B); copy the value again".to_owned(),
            ),
            (
                lines(ID, "01 23", "fake-pass"),
                "api_secret: character 3 is a space or an invisible character (U+0020); copy the value again".to_owned(),
            ),
            (
                lines(ID, SECRET, "fake\u{a0}pass"),
                "passphrase: character 5 is a space or an invisible character (U+00A0); copy the value again".to_owned(),
            ),
            (
                lines("fak\u{435}", SECRET, "fake-pass"),
                "api_key: character 4 is not ASCII (U+0435); copy the value again"
                    .to_owned(),
            ),
        ] {
            assert_eq!(from(&text).unwrap_err(), problem, "{text:?}");
        }
        let partner = format!(
            r#"{{"partner_key":"fake","api_key":"{ID}","api_secret":"{SECRET}","passphrase":"fake-pass"}}"#
        );
        assert_eq!(
            from(&partner).unwrap_err(),
            "partner_key: the account has no partner in the rules; remove this field"
        );
    }

    #[test]
    fn value_in_an_unusual_format_gets_a_remark() {
        for (id, secret, pass, remark) in [
            (
                "fake",
                SECRET,
                "fake-pass",
                "api_key: unusual for KuCoin; expected 24 hexadecimal digits",
            ),
            (
                ID,
                "fake",
                "fake-pass",
                "api_secret: unusual for KuCoin; expected a UUID: 36 characters, 5 groups of hexadecimal digits \
                 separated by '-'",
            ),
            (
                ID,
                SECRET,
                "123456",
                "passphrase: six digits look like the trading password; the API passphrase is the one that was \
                 chosen when the key was created",
            ),
            (
                ID,
                SECRET,
                "fake pass",
                "passphrase: unusual for KuCoin; expected 7 to 32 ASCII characters and no spaces",
            ),
            (
                ID,
                SECRET,
                "12345",
                "passphrase: unusual for KuCoin; expected 7 to 32 ASCII characters and no spaces",
            ),
            (
                ID,
                SECRET,
                "fake-p\u{e4}ss",
                "passphrase: unusual for KuCoin; expected 7 to 32 ASCII characters and no spaces",
            ),
        ] {
            let text = format!("{id}\n{secret}\n{pass}\n");
            assert_eq!(remarks(&text).first().map(String::as_str), Some(remark));
        }
    }

    proptest! {
        #[test]
        fn trimming_removes_surrounding_characters_and_nothing_of_the_value(
            value in "[!-~]{1,40}",
            start in "[ \t\r\u{a0}\u{200b}\u{feff}\u{202e}]{0,5}",
            end in "[ \t\r\u{a0}\u{200b}\u{feff}\u{202e}]{0,5}",
        ) {
            let text = format!("{start}{value}{end}");
            prop_assert_eq!(text.trim_matches(is_invisible), &value);
        }

        #[test]
        fn no_error_or_remark_contains_a_value(
            before in "\\PC{0,8}",
            after in "[ -~\u{80}-\u{ff}\u{2000}-\u{2100}]{0,8}",
            json in any::<bool>(),
        ) {
            let value = |name: &str| format!("{before}canary-{name}{after}");
            let [id, secret, pass] = ["id", "secret", "pass"].map(value);
            let text = if json {
                serde_json::json!({ "api_key": id, "api_secret": secret, "passphrase": pass }).to_string()
            } else {
                format!("{id}\n{secret}\n{pass}\n")
            };
            let output = match from(&text) {
                Ok(KeyInput { remarks, .. }) => remarks.join("\n"),
                Err(problem) => problem,
            };
            prop_assert!(!output.contains("canary"), "{}", output);
        }
    }

    /// A pseudoterminal: the terminal, and the side of the person who types.
    fn terminal() -> (File, File) {
        let no_control = OpenptFlags::NOCTTY;
        let person = openpt(OpenptFlags::RDWR | no_control).unwrap();
        grantpt(&person).unwrap();
        unlockpt(&person).unwrap();
        let name = ptsname(&person, Vec::new()).unwrap();
        let terminal = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(no_control.bits().cast_signed())
            .open(name.to_str().unwrap())
            .unwrap();
        (terminal, File::from(person))
    }

    #[test]
    fn terminal_echo_is_off_while_a_key_is_typed_and_on_again_afterwards() {
        let (terminal, mut person) = terminal();
        let another = || terminal.try_clone().unwrap();
        let before = tcgetattr(&terminal).unwrap();
        // Echo is still on here, which proves that this test would notice an echo.
        person.write_all(b"typed too early\n").unwrap();
        let mut echo = [0; "typed too early\r\n".len()];
        person.read_exact(&mut echo).unwrap();
        assert_eq!(&echo, b"typed too early\r\n");
        let echo_off = EchoOff::new(another()).unwrap();
        let prompted = another();
        let prompting = thread::spawn(move || {
            let mut prompts = Vec::new();
            let values = prompt_for(prompted, &mut prompts, &NAMES[..3]);
            (values, String::from_utf8(prompts).unwrap())
        });
        // With a typing error that is deleted, and with more text than the prompts need.
        person
            .write_all(b"fake-idd\x7f\nfake-secret\nfake-")
            .unwrap();
        person.write_all(b"pass\nrm -rf fake\n").unwrap();
        let (values, prompts) = prompting.join().unwrap();
        let left_over = || rustix::io::ioctl_fionread(&terminal).unwrap();
        while left_over() == 0 {
            thread::yield_now();
        }
        drop(echo_off);
        let given = key_input(values.unwrap()).unwrap();
        assert!(holds(&given.values, "fake-id", "fake-secret", "fake-pass"));
        assert_eq!(
            prompts,
            "api_key (not shown): \napi_secret (not shown): \npassphrase (not shown): \n"
        );
        let after = tcgetattr(&terminal).unwrap();
        assert_eq!(after.local_modes, before.local_modes);
        assert!(after.local_modes.contains(LocalModes::ECHO));
        let suspend = SpecialCodeIndex::VSUSP;
        assert_eq!(after.special_codes[suspend], before.special_codes[suspend]);
        assert_eq!(left_over(), 0);

        drop(terminal);
        let mut shown = Vec::new();
        // Reading the end of a closed pseudoterminal returns an error.
        let _ = person.read_to_end(&mut shown);
        let shown = String::from_utf8(shown).unwrap();
        assert_eq!(shown, "");
    }

    #[test]
    fn unexpected_end_of_input_names_the_missing_value() {
        let (terminal, mut person) = terminal();
        person.write_all(b"fake-id\n\x04").unwrap();
        let error = prompt_for(&terminal, io::sink(), &NAMES[..3])
            .err()
            .unwrap();
        assert_eq!(error.to_string(), "api_secret: unexpected end of input");
    }
}
