//! Reads single values of a JSON text without building the document. Numbers keep their exact text.
//!
//! An object that has a wanted name twice is not read at all, because two parsers may read two different values from it.

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// The values of `names` in the object `json`; `None` if it is not an object, or has one of the names twice.
pub(crate) fn members<'j>(json: &'j str, names: &[&str]) -> Option<Vec<Option<&'j str>>> {
    read(json, Members(names))
}

/// The elements of the list `json`; `None` if it is not a list or has more than `max` elements.
pub(crate) fn elements(json: &str, max: usize) -> Option<Vec<&str>> {
    read(json, Elements(max))
}

/// The value at `pointer` (RFC 6901, without escapes): names, and only the index 0 in a list. A list with more than one
/// element has no value there.
pub(crate) fn at<'j>(json: &'j str, pointer: &str) -> Option<&'j str> {
    let steps = pointer.split('/').skip(1);
    steps.into_iter().try_fold(json.trim(), |json, step| {
        if step == "0" && json.starts_with('[') {
            elements(json, 1)?.first().copied()
        } else {
            members(json, &[step])?.first().copied()?
        }
    })
}

/// A string without quotes and escapes, or a number or a boolean as it is written; `None` for null, lists and objects.
pub(crate) fn text(json: &str) -> Option<String> {
    match json.as_bytes().first()? {
        b'"' => serde_json::from_str(json).ok(),
        b'{' | b'[' | b'n' => None,
        _ => Some(json.to_owned()),
    }
}

/// Whether a value is null, or a list or an object without elements.
pub(crate) fn is_empty(json: &str) -> bool {
    let inside = |open, close| json.strip_prefix(open)?.strip_suffix(close);
    let inside = inside('{', '}').or_else(|| inside('[', ']'));
    json == "null" || inside.is_some_and(|inside| inside.trim().is_empty())
}

fn read<'j, S: DeserializeSeed<'j>>(json: &'j str, seed: S) -> Option<S::Value> {
    let mut reader = serde_json::Deserializer::from_str(json);
    let value = seed.deserialize(&mut reader).ok()?;
    reader.end().ok()?;
    Some(value)
}

struct Members<'n>(&'n [&'n str]);

impl<'de> DeserializeSeed<'de> for Members<'_> {
    type Value = Vec<Option<&'de str>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Members<'_> {
    type Value = Vec<Option<&'de str>>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut values = vec![None; self.0.len()];
        while let Some(name) = map.next_key::<String>()? {
            let index = self.0.iter().position(|wanted| **wanted == name);
            let Some(value) = index.and_then(|index| values.get_mut(index)) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let raw: &'de RawValue = map.next_value()?;
            if value.replace(raw.get()).is_some() {
                return Err(A::Error::custom("duplicate name in an object"));
            }
        }
        Ok(values)
    }
}

struct Elements(usize);

impl<'de> DeserializeSeed<'de> for Elements {
    type Value = Vec<&'de str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Elements {
    type Value = Vec<&'de str>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a list of at most {} elements", self.0)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = seq.next_element::<&'de RawValue>()? {
            if elements.len() == self.0 {
                return Err(A::Error::custom("too many elements"));
            }
            elements.push(element.get());
        }
        Ok(elements)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_their_exact_text_and_escapes_are_decoded() {
        let json =
            r#" {"size": 0.10000000000000000001, "cli\u0065ntOid":"\u0061", "x":{"size":2}} "#;
        let found = members(json, &["size", "clientOid", "price"]).unwrap();
        assert_eq!(
            found,
            [Some("0.10000000000000000001"), Some("\"\\u0061\""), None]
        );
        assert_eq!(found[1].and_then(text).as_deref(), Some("a"));
        for none in ["null", "[1]", "{}", "\"\\ud800\""] {
            assert_eq!(text(none), None, "{none}");
        }
        assert_eq!(text("1E-5").as_deref(), Some("1E-5"));
        assert_eq!(text("true").as_deref(), Some("true"));
    }

    #[test]
    fn object_with_a_wanted_name_twice_is_not_read() {
        assert_eq!(members(r#"{"a":1,"\u0061":2}"#, &["a"]), None);
        assert_eq!(
            members(r#"{"b":1,"b":2,"a":3}"#, &["a"]),
            Some(vec![Some("3")])
        );
        for bad in ["[1]", "1", "{", r#"{"a":1}{}"#, ""] {
            assert_eq!(members(bad, &["a"]), None, "{bad}");
        }
    }

    #[test]
    fn value_in_a_list_is_read_only_if_it_is_alone() {
        let id = |json: &str| at(json, "/data/0/id").map(str::to_owned);
        assert_eq!(id(r#"{"data":[{"id":"1"}]}"#).as_deref(), Some("\"1\""));
        assert_eq!(id(r#"{"data":[]}"#), None);
        assert_eq!(id(r#"{"data":[{"id":"1"},{"id":"2"}]}"#), None);
        assert_eq!(at(r#"{"data":{"id":7}}"#, "/data/id"), Some("7"));
        assert_eq!(elements("[1,[2,3]]", 2), Some(vec!["1", "[2,3]"]));
        assert_eq!(elements("[1,2,3]", 2), None);
    }

    #[test]
    fn null_and_lists_and_objects_without_elements_are_empty() {
        for (json, expected) in [
            ("null", true),
            ("{ }", true),
            ("[\n]", true),
            ("[null]", false),
            (r#"{"a":1}"#, false),
            ("\"\"", false),
            ("0", false),
        ] {
            assert_eq!(is_empty(json), expected, "{json}");
        }
    }
}
