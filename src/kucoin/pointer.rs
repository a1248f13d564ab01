//! Locations in a JSON document, once or in each element of a list; read without building the document.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// A JSON pointer (RFC 6901, without escapes) that may go through every element of one list.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Pointer(Vec<Step>);

/// One step of a pointer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Step {
    /// Into each element of a list.
    Each,
    /// Into the value with this name.
    Name(String),
}

/// A reader's position on a pointer: the remaining steps; `None` if the reader is elsewhere.
pub(crate) type At<'p> = Option<&'p [Step]>;

impl Pointer {
    /// `leaf` in the document, or in each element of the list at `items`; if `items` is empty, the document is the list.
    pub(crate) fn new(items: Option<&str>, leaf: &str) -> Self {
        let names = |pointer: &str| -> Vec<Step> {
            let names = pointer.split('/').skip(1);
            names.map(|name| Step::Name(name.to_owned())).collect()
        };
        let mut steps = Vec::new();
        if let Some(items) = items {
            steps = names(items);
            steps.push(Step::Each);
        }
        steps.extend(names(leaf));
        Self(steps)
    }

    /// All steps: the position at the start of the document.
    pub(crate) fn start(&self) -> &[Step] {
        &self.0
    }

    /// The last name; `None` if it points to an element of a list.
    pub(crate) fn leaf(&self) -> Option<&str> {
        match self.0.last()? {
            Step::Name(name) => Some(name),
            Step::Each => None,
        }
    }

    /// The strings that it points to; empty if `json` is not valid JSON.
    pub(crate) fn strings(&self, json: &[u8]) -> Vec<String> {
        let mut strings = Vec::new();
        let mut reader = serde_json::Deserializer::from_slice(json);
        let collect = Collect {
            at: &self.0,
            strings: &mut strings,
        };
        match collect.deserialize(&mut reader).and_then(|()| reader.end()) {
            Ok(()) => strings,
            Err(_) => Vec::new(),
        }
    }

    /// How many values it can point to in `json`: one for each element of its list, or one without a list.
    pub(crate) fn count(&self, json: &[u8]) -> usize {
        let document: Value = serde_json::from_slice(json).unwrap_or_default();
        let mut value = Some(&document);
        for step in &self.0 {
            match step {
                Step::Name(name) => value = value.and_then(|value| value.get(name)),
                Step::Each => return value.and_then(Value::as_array).map_or(0, Vec::len),
            }
        }
        1
    }

    /// The pointer in RFC 6901 form, for the element at `index`.
    pub(crate) fn of_item(&self, index: Option<usize>) -> String {
        let steps = self.0.iter().map(|step| match (step, index) {
            (Step::Name(name), _) => format!("/{name}"),
            (Step::Each, Some(index)) => format!("/{index}"),
            (Step::Each, None) => "/*".to_owned(),
        });
        steps.collect()
    }
}

/// The position after going from `at` into the value with `name`.
pub(crate) fn under<'p>(at: At<'p>, name: &str) -> At<'p> {
    match at?.split_first()? {
        (Step::Name(expected), rest) if expected == name => Some(rest),
        _ => None,
    }
}

/// The position after going from `at` into the elements of a list.
pub(crate) fn each(at: At<'_>) -> At<'_> {
    match at?.split_first()? {
        (Step::Each, rest) => Some(rest),
        _ => None,
    }
}

/// Collects the strings at the end of a pointer and skips everything else.
struct Collect<'p, 's> {
    at: &'p [Step],
    strings: &'s mut Vec<String>,
}

impl<'de> DeserializeSeed<'de> for Collect<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Collect<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            match under(Some(self.at), &name) {
                Some(at) => map.next_value_seed(Collect {
                    at,
                    strings: self.strings,
                })?,
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let Some(at) = each(Some(self.at)) else {
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(());
        };
        while seq
            .next_element_seed(Collect {
                at,
                strings: self.strings,
            })?
            .is_some()
        {}
        Ok(())
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        if self.at.is_empty() {
            self.strings.push(text.to_owned());
        }
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_read_only_at_the_pointer() {
        let read = |items, leaf, json: &str| Pointer::new(items, leaf).strings(json.as_bytes());
        let nested = r#"{"clientOid":"a","data":{"clientOid":"b","x":{"clientOid":"c"}}}"#;
        assert_eq!(read(None, "/clientOid", nested), ["a"]);
        assert_eq!(read(None, "/data/clientOid", nested), ["b"]);
        let list =
            r#"{"data":[{"clientOid":"a"},{"clientOid":null},{"clientOid":7},{"clientOid":"b"}]}"#;
        assert_eq!(read(Some("/data"), "/clientOid", list), ["a", "b"]);
        assert_eq!(
            read(Some(""), "/clientOid", r#"[{"clientOid":"a"},1]"#),
            ["a"]
        );
        assert!(read(None, "/clientOid", r#"[{"clientOid":"a"}]"#).is_empty());
        assert!(read(None, "/clientOid", r#"{"clientOid":["a"]}"#).is_empty());
        assert!(read(None, "/clientOid", r#"{"clientOid":"a""#).is_empty());
    }

    #[test]
    fn elements_of_the_list_are_counted_with_and_without_the_value() {
        let count = |items, json: &str| Pointer::new(items, "/clientOid").count(json.as_bytes());
        assert_eq!(count(None, r#"{"clientOid":"a"}"#), 1);
        assert_eq!(count(Some(""), r#"[{"clientOid":"a"},{},7]"#), 3);
        assert_eq!(count(Some("/orderList"), r#"{"orderList":[{},{}]}"#), 2);
        assert_eq!(count(Some("/orderList"), r#"{"orders":[{},{}]}"#), 0);
    }

    #[test]
    fn pointer_is_written_with_the_index_of_the_item() {
        let pointer = Pointer::new(Some("/orderList"), "/clientOid");
        assert_eq!(pointer.of_item(Some(3)), "/orderList/3/clientOid");
        assert_eq!(Pointer::new(None, "/clientOid").of_item(None), "/clientOid");
        assert_eq!(
            Pointer::new(Some(""), "/clientOid").of_item(Some(0)),
            "/0/clientOid"
        );
    }
}
