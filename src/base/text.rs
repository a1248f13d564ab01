//! Cleans text from outside (the exchange, Vault, bots, certificates, files) for logs, the audit log, `/readyz`, gRPC
//! messages and terminals.
//!
//! Each output cleans its text, so that a new source of text is safe by default: see `telemetry.rs`, `audit.rs`, `api/` and
//! `cli/text.rs`. The exchange's `code`, `msg` and body are returned to the bot unchanged.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Maximum length, in characters, of one text from outside in an output. An error of Vault has about 200.
pub(crate) const MAX_CHARS: usize = 1000;

/// Marks where a text was cut.
const CUT: char = '…';

/// `text` on one line, cut after `max` characters. Line breaks and tabs become spaces. Other control characters, invisible
/// characters and those that change the text direction become escapes such as `\u{202e}`.
pub(crate) fn clean(text: &str, max: usize) -> Cow<'_, str> {
    if text.len() <= max && all_bytes(text, is_plain) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len().min(max));
    let mut chars = text.chars();
    for c in chars.by_ref().take(max) {
        push(&mut shown, c, "\\");
    }
    if chars.next().is_some() {
        shown.push(CUT);
    }
    Cow::Owned(shown)
}

/// The same for one line of JSON, without a length limit: its strings are clean before and after they are decoded.
pub(crate) fn clean_json(line: &str) -> Cow<'_, str> {
    if all_bytes(line, |byte| is_plain(byte) && byte != b'\\') {
        return Cow::Borrowed(line);
    }
    let mut shown = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            push(&mut shown, c, "\\\\");
            continue;
        }
        // Escapes of RFC 8259, section 7.
        let decoded = match chars.next() {
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n' | 'r' | 't') => ' ',
            Some('u') => {
                let digits: String = chars.by_ref().take(4).collect();
                let number = u32::from_str_radix(&digits, 16).ok();
                let Some(decoded) = number.and_then(char::from_u32) else {
                    // Half of a surrogate pair; the other half follows.
                    let _ = write!(shown, "\\u{digits}");
                    continue;
                };
                decoded
            }
            Some(other) => {
                shown.push('\\');
                shown.push(other);
                continue;
            }
            None => break,
        };
        match decoded {
            '"' | '\\' => {
                shown.push('\\');
                shown.push(decoded);
            }
            _ => push(&mut shown, decoded, "\\\\"),
        }
    }
    Cow::Owned(shown)
}

/// Appends one character; `backslash` is a backslash in the output's syntax.
fn push(shown: &mut String, c: char, backslash: &str) {
    match c {
        '\n' | '\r' | '\t' | '\u{85}' | '\u{2028}' | '\u{2029}' => shown.push(' '),
        _ if is_deceptive(c) => {
            // Writing to a String does not fail.
            let _ = write!(shown, "{backslash}u{{{:x}}}", u32::from(c));
        }
        _ => shown.push(c),
    }
}

/// Whether `is_ok` is true for every byte. Works on parts without an early exit within a part, so that the compiler can
/// vectorize it: every log and audit line is checked here.
fn all_bytes(text: &str, is_ok: impl Fn(u8) -> bool) -> bool {
    let mut parts = text.as_bytes().chunks(64);
    parts.all(|part| part.iter().fold(true, |all, &byte| all & is_ok(byte)))
}

/// Whether a byte is printable ASCII. Most texts are only that, and are returned unchanged.
fn is_plain(byte: u8) -> bool {
    matches!(byte, b' '..=b'~')
}

/// Whether a character is a control character or invisible in a terminal. Source: Unicode 16, general category Cc, and the property
/// `Default_Ignorable_Code_Point` with the interlinear annotations (UAX #44); bidirectional controls are among them.
pub(crate) fn is_deceptive(c: char) -> bool {
    matches!(
        c,
        '\0'..='\u{1f}'
            | '\u{7f}'..='\u{9f}'
            | '\u{ad}'
            | '\u{34f}'
            | '\u{61c}'
            | '\u{115f}'..='\u{1160}'
            | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}'
            | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}'
            | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}'
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn control_characters_are_escaped_and_text_stays_on_one_line() {
        for (text, shown) in [
            ("plain text, 200000", "plain text, 200000"),
            ("Zürich 東京", "Zürich 東京"),
            ("a\nb\r\tc\u{2028}d", "a b  c d"),
            ("\u{1b}[2Jcleared", "\\u{1b}[2Jcleared"),
            ("\u{202e}txet", "\\u{202e}txet"),
            ("\u{2066}isolated\u{2069}", "\\u{2066}isolated\\u{2069}"),
            ("zero\u{200b}width\u{feff}", "zero\\u{200b}width\\u{feff}"),
            ("\0\u{7f}\u{9b}", "\\u{0}\\u{7f}\\u{9b}"),
        ] {
            assert_eq!(clean(text, 100), shown);
        }
    }

    #[test]
    fn long_text_is_cut_and_marked() {
        assert_eq!(clean("abc", 3), "abc");
        assert_eq!(clean("abcd", 3), "abc…");
        assert_eq!(clean("äöü", 3), "äöü");
        assert_eq!(clean("äöüß", 3), "äöü…");
    }

    #[test]
    fn json_is_clean_before_and_after_it_is_decoded() {
        let text = "a\"b\\c\nd\u{1b}[31m\u{8}\u{c}\u{202e}\u{85}é😀";
        let line = serde_json::to_string(&serde_json::json!({ "text": text })).unwrap();
        let decoded: serde_json::Value = serde_json::from_str(&clean_json(&line)).unwrap();
        let expected = "a\"b\\c d\\u{1b}[31m\\u{8}\\u{c}\\u{202e} é😀";
        assert_eq!(decoded["text"], expected);
        // Escapes as other programs write them.
        let escaped = r#"{"text":"\u202e\u0022\u005c\ud83d\ude00\u00e9\/"}"#;
        let decoded: serde_json::Value = serde_json::from_str(&clean_json(escaped)).unwrap();
        assert_eq!(decoded["text"], "\\u{202e}\"\\😀é/");
    }

    proptest! {
        #[test]
        fn any_text_is_safe_in_text_and_in_json(text in "\\PC*|[\\x00-\\u{ffff}]*") {
            let is_safe = |text: &str| !text.chars().any(|c| c.is_control() || is_deceptive(c));
            prop_assert!(is_safe(&clean(&text, 1000)));
            let line = serde_json::to_string(&[&text]).unwrap();
            let [decoded]: [String; 1] = serde_json::from_str(&clean_json(&line)).unwrap();
            prop_assert!(is_safe(&decoded));
            prop_assert_eq!(decoded, clean(&text, usize::MAX));
        }
    }
}
