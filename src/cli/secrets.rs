//! Reads the values of a key, from a terminal that does not show them or from stdin, and notes what is unusual about them.
//!
//! Never from arguments or the environment, which other processes can see. No error and no remark holds a value.

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
use crate::base::encoding::is_utf16;
use crate::base::secret::{ApiSecret, KeyValues, PartnerKey, Passphrase};
use crate::base::text::is_deceptive;
use crate::process::Signals;

/// Much more than three values need.
const MAX_BYTES: usize = 64 * 1024;

/// The longest line that a terminal hands over.
const MAX_LINE_BYTES: usize = 4096;

/// What is asked for, in this order; the last one only for an account with a partner.
const NAMES: [&str; 4] = ["api_key", "api_secret", "passphrase", "partner_key"];

const TRADING_PASSWORD: &str = "six digits look like the trading password; KuCoin's API passphrase is the one that was \
                                chosen when the key was made";

/// A key as an admin entered it.
#[derive(Debug)]
pub(super) struct KeyInput {
    pub(super) values: KeyValues,
    /// What was removed, and what does not look as it should; each is a sentence for the admin.
    pub(super) remarks: Vec<String>,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub(super) enum InputError {
    /// A signal came (Ctrl-C).
    #[error("interrupted")]
    Interrupted,
    /// Not readable.
    #[error("the input cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Saved in another encoding.
    #[error("expected text in UTF-8, got UTF-16, as PowerShell's `>` writes it")]
    Utf16,
    /// What was given cannot be a key.
    #[error("{0}")]
    Refused(String),
}

/// Reads a key: by prompts where stdin is a terminal, else from stdin as lines or as a JSON object.
///
/// The terminal shows again what is typed when this returns, for whatever reason. What else was pasted is thrown away
/// then, so that no shell takes it for a command.
pub(super) async fn read(has_partner: bool) -> Result<KeyInput, InputError> {
    let names = if has_partner { &NAMES[..] } else { &NAMES[..3] };
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return key_input(parse(&read_all(stdin)?, names)?);
    }
    let mut signals = Signals::of_a_command()?;
    let _silent = Silent::new(io::stdin())?;
    let (sender, answer) = oneshot::channel();
    // In a thread of its own, which nobody waits for when a signal comes.
    thread::spawn(move || sender.send(ask(io::stdin(), io::stderr(), names)));
    tokio::select! {
        answer = answer => return key_input(answer.map_err(|_| InputError::Interrupted)??),
        _ = signals.next() => {}
    }
    // The cursor stands behind a prompt.
    say("");
    Err(InputError::Interrupted)
}

/// A terminal that does not show what is typed, for as long as this lives.
struct Silent<T: AsFd> {
    terminal: T,
    before: Termios,
}

impl<T: AsFd> Silent<T> {
    fn new(terminal: T) -> io::Result<Self> {
        let before = tcgetattr(&terminal)?;
        let mut silent = before.clone();
        silent
            .local_modes
            .remove(LocalModes::ECHO | LocalModes::ECHONL);
        silent.local_modes.insert(LocalModes::ICANON);
        // Stopped or killed like this it would leave the terminal silent. Ctrl-C stays: that is a signal we wait for.
        for key in [SpecialCodeIndex::VSUSP, SpecialCodeIndex::VQUIT] {
            silent.special_codes[key] = 0;
        }
        tcsetattr(&terminal, OptionalActions::Flush, &silent)?;
        Ok(Self { terminal, before })
    }
}

impl<T: AsFd> Drop for Silent<T> {
    fn drop(&mut self) {
        if tcsetattr(&self.terminal, OptionalActions::Flush, &self.before).is_err() {
            say("the terminal may not show what you type; `stty echo` repairs that");
        }
    }
}

/// Asks for one value after the other.
fn ask(
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
        // The terminal does not show Enter either: of three lines that are pasted at once it would show all three before the
        // second prompt.
        writeln!(prompt)?;
        if length == 0 {
            return Err(refused(format!("{name}: the input has ended")));
        }
        let text = as_text(line.get(..length).unwrap_or_default())?;
        // The Enter that ends it was not pasted.
        values.push(Value::new(name, text.strip_suffix('\n').unwrap_or(text)));
    }
    Ok(values)
}

/// One value as it was given.
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

/// All that is piped in.
fn read_all(input: impl AsFd) -> Result<Zeroizing<String>, InputError> {
    // Its full size from the start, so that it never moves and leaves a copy behind.
    let mut bytes = Zeroizing::new(vec![0; MAX_BYTES]);
    let mut length = 0;
    loop {
        let room = bytes.get_mut(length..).unwrap_or_default();
        if room.is_empty() {
            let limit = MAX_BYTES / 1024;
            return Err(refused(format!("expected a key, got {limit} KiB or more")));
        }
        match read_some(&input, room)? {
            0 => break,
            more => length += more,
        }
    }
    let text = as_text(bytes.get(..length).unwrap_or_default())?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// Past the buffer of the standard library, which nobody wipes.
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

/// Takes a text apart: a JSON object, or one value in each line.
fn parse(text: &str, names: &[&'static str]) -> Result<Vec<Value>, InputError> {
    let json = text.trim_matches(is_unseen);
    if json.starts_with('{') {
        return parse_json(json, names);
    }
    let is_blank = |line: &&str| line.chars().all(is_unseen);
    let lines: Vec<_> = text.lines().filter(|line| !is_blank(line)).collect();
    if lines.len() != names.len() {
        return Err(refused(format!(
            "expected {} lines ({}), or a JSON object with these names; got {}",
            names.len(),
            names.join(", "),
            lines.len()
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
        /// As in what was written to Vault by hand. It is found out, whatever it says.
        #[serde(default, rename = "key_version")]
        _key_version: IgnoredAny,
    }
    fn wiped<'de, D: Deserializer<'de>>(input: D) -> Result<Zeroizing<String>, D::Error> {
        String::deserialize(input).map(Zeroizing::new)
    }
    let fields: Fields = serde_json::from_str(json).map_err(|error| {
        // Its own words may hold what was given.
        refused(format!(
            "expected a JSON object with the texts {}; line {}, column {} is something else",
            names.join(", "),
            error.line(),
            error.column()
        ))
    })?;
    let is_asked = names.contains(&"partner_key");
    if !is_asked && !fields.partner_key.is_empty() {
        return Err(refused(
            "partner_key: the account has no partner in the rules; leave it out".to_owned(),
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

/// Makes a key of the values, in the order of [`NAMES`].
fn key_input(values: Vec<Value>) -> Result<KeyInput, InputError> {
    let mut remarks = Vec::new();
    let mut texts = Vec::new();
    for value in values {
        let text = value.text.trim_matches(is_unseen);
        if *text != **value.text {
            let what = "removed spaces, line ends or invisible characters around it";
            remarks.push(format!("{}: {what}", value.name));
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

/// Whether nobody sees a character.
fn is_unseen(c: char) -> bool {
    c.is_whitespace() || is_deceptive(c)
}

/// Refuses what can be no value of a key.
fn check(name: &str, text: &str) -> Result<(), InputError> {
    if text.is_empty() {
        return Err(refused(format!("{name} is empty")));
    }
    for (place, c) in (1..).zip(text.chars()) {
        // Only a passphrase was chosen by a person.
        let is_passphrase = name == "passphrase";
        let kind = if is_unseen(c) && !(is_passphrase && c == ' ') {
            "a space or an invisible character"
        } else if name == "api_key" && !c.is_ascii() {
            "a character outside ASCII"
        } else {
            continue;
        };
        return Err(refused(format!(
            "{name}: character {place} is {kind} (U+{:04X}); copy it again",
            u32::from(c),
        )));
    }
    Ok(())
}

/// What KuCoin's values do not look like. It documents no form of a key or a secret, so that this is no reason to refuse.
fn suspicious(name: &str, text: &str) -> Option<String> {
    let is_usual_passphrase =
        (7..=32).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    let usual = match name {
        "api_key" if !is_hex(text, 24) => "24 hexadecimal digits",
        "api_secret" if !is_uuid(text) => {
            "36 characters: 5 groups of hexadecimal digits with '-' between"
        }
        "passphrase" if text.len() == 6 && text.bytes().all(|b| b.is_ascii_digit()) => {
            return Some(TRADING_PASSWORD.to_owned());
        }
        "passphrase" if !is_usual_passphrase => "7 to 32 ASCII characters and no spaces",
        _ => return None,
    };
    Some(format!("does not look like KuCoin's: those have {usual}"))
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// In the form in which KuCoin shows secrets.
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
    fn lines_and_json_are_both_understood() {
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
    fn what_pasting_brought_along_is_removed_and_told() {
        assert_eq!(remarks(&format!("{ID}\n{SECRET}\nfake-pass\n")), [""; 0]);
        let text =
            format!("\u{feff}{ID}\u{a0}\n\t {SECRET} \n \u{200b}\"fake-pass\" \u{200b}  \r\n");
        // Quotes may belong to it.
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
                    "{name}: removed spaces, line ends or invisible characters around it"
                ))
                .collect::<Vec<_>>()
        );
    }

    #[test]
    fn what_cannot_be_a_key_is_refused_without_its_values() {
        let lines = |id: &str, secret: &str, pass: &str| format!("{id}\n{secret}\n{pass}\n");
        let json = |id: &str| {
            format!(r#"{{"api_key":{id},"api_secret":"{SECRET}","passphrase":"fake-pass"}}"#)
        };
        let expected = "expected 3 lines (api_key, api_secret, passphrase), or a JSON object with these names; got ";
        let object = "expected a JSON object with the texts api_key, api_secret, passphrase; line 1, column ";
        for (text, problem) in [
            (String::new(), format!("{expected}0")),
            (lines(ID, " \t", "fake-pass"), format!("{expected}2")),
            (
                format!("{}more", lines(ID, SECRET, "fake-pass")),
                format!("{expected}4"),
            ),
            (json("\"\""), "api_key is empty".to_owned()),
            (json("7"), format!("{object}12 is something else")),
            (
                "{\"api_key\":\"fake\"}".to_owned(),
                format!("{object}18 is something else"),
            ),
            (
                "{\"fake\":\"fake\"}".to_owned(),
                format!("{object}7 is something else"),
            ),
            (
                lines("0123\u{200b}4567", SECRET, "fake-pass"),
                "api_key: character 5 is a space or an invisible character (U+200B); copy it again".to_owned(),
            ),
            (
                lines(ID, "01 23", "fake-pass"),
                "api_secret: character 3 is a space or an invisible character (U+0020); copy it again".to_owned(),
            ),
            (
                lines(ID, SECRET, "fake\u{a0}pass"),
                "passphrase: character 5 is a space or an invisible character (U+00A0); copy it again".to_owned(),
            ),
            (
                lines("fak\u{435}", SECRET, "fake-pass"),
                "api_key: character 4 is a character outside ASCII (U+0435); copy it again"
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
            "partner_key: the account has no partner in the rules; leave it out"
        );
    }

    #[test]
    fn unusual_shape_of_a_value_is_noted() {
        for (id, secret, pass, remark) in [
            (
                "fake",
                SECRET,
                "fake-pass",
                "api_key: does not look like KuCoin's: those have 24 hexadecimal digits",
            ),
            (
                ID,
                "fake",
                "fake-pass",
                "api_secret: does not look like KuCoin's: those have 36 characters: 5 groups of hexadecimal digits \
                 with '-' between",
            ),
            (
                ID,
                SECRET,
                "123456",
                "passphrase: six digits look like the trading password; KuCoin's API passphrase is the one that was \
                 chosen when the key was made",
            ),
            (
                ID,
                SECRET,
                "fake pass",
                "passphrase: does not look like KuCoin's: those have 7 to 32 ASCII characters and no spaces",
            ),
            (
                ID,
                SECRET,
                "12345",
                "passphrase: does not look like KuCoin's: those have 7 to 32 ASCII characters and no spaces",
            ),
            (
                ID,
                SECRET,
                "fake-p\u{e4}ss",
                "passphrase: does not look like KuCoin's: those have 7 to 32 ASCII characters and no spaces",
            ),
        ] {
            let text = format!("{id}\n{secret}\n{pass}\n");
            assert_eq!(remarks(&text).first().map(String::as_str), Some(remark));
        }
    }

    proptest! {
        #[test]
        fn whatever_surrounds_a_value_is_removed_and_nothing_of_it(
            value in "[!-~]{1,40}",
            start in "[ \t\r\u{a0}\u{200b}\u{feff}\u{202e}]{0,5}",
            end in "[ \t\r\u{a0}\u{200b}\u{feff}\u{202e}]{0,5}",
        ) {
            let text = format!("{start}{value}{end}");
            prop_assert_eq!(text.trim_matches(is_unseen), &value);
        }

        #[test]
        fn no_error_and_no_remark_holds_a_value(
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
            let told = match from(&text) {
                Ok(KeyInput { remarks, .. }) => remarks.join("\n"),
                Err(problem) => problem,
            };
            prop_assert!(!told.contains("canary"), "{}", told);
        }
    }

    /// A terminal and whoever sits at it.
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
    fn a_terminal_shows_nothing_of_what_is_typed_and_all_again_afterwards() {
        let (terminal, mut person) = terminal();
        let another = || terminal.try_clone().unwrap();
        let before = tcgetattr(&terminal).unwrap();
        // Still shown: so that it is known that what is shown is found.
        person.write_all(b"typed too early\n").unwrap();
        let mut echo = [0; "typed too early\r\n".len()];
        person.read_exact(&mut echo).unwrap();
        assert_eq!(&echo, b"typed too early\r\n");
        let silent = Silent::new(another()).unwrap();
        let asked = another();
        let asking = thread::spawn(move || {
            let mut prompts = Vec::new();
            let values = ask(asked, &mut prompts, &NAMES[..3]);
            (values, String::from_utf8(prompts).unwrap())
        });
        // With a slip of the finger, which the terminal corrects, and more than was asked for.
        person
            .write_all(b"fake-idd\x7f\nfake-secret\nfake-")
            .unwrap();
        person.write_all(b"pass\nrm -rf fake\n").unwrap();
        let (values, prompts) = asking.join().unwrap();
        let left_over = || rustix::io::ioctl_fionread(&terminal).unwrap();
        while left_over() == 0 {
            thread::yield_now();
        }
        drop(silent);
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
        // The end of a terminal that nobody has open is an error.
        let _ = person.read_to_end(&mut shown);
        let shown = String::from_utf8(shown).unwrap();
        assert_eq!(shown, "");
    }

    #[test]
    fn an_input_that_ends_says_before_what() {
        let (terminal, mut person) = terminal();
        person.write_all(b"fake-id\n\x04").unwrap();
        let asked = ask(&terminal, io::sink(), &NAMES[..3]).err().unwrap();
        assert_eq!(asked.to_string(), "api_secret: the input has ended");
    }
}
