//! Fields of a JSON object, each read with its exact type and range.
//!
//! A field that is present and wrong never takes its default. All problems are collected, so that an
//! author sees all of them at once.

use serde_json::{Map, Value};

/// Longest value that a message shows.
const SHOWN: usize = 60;

/// The fields of an object, and what is wrong with those that were read.
pub(crate) struct Fields<'a> {
    /// Where the object is, in front of every name: empty, or with a full stop at its end.
    path: &'static str,
    object: &'a Map<String, Value>,
    problems: Vec<String>,
}

/// Numbers that a field may be: more than `above`, at most `most`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) above: f64,
    pub(crate) most: f64,
}

impl<'a> Fields<'a> {
    pub(crate) fn of(path: &'static str, object: &'a Map<String, Value>) -> Self {
        Self { path, object, problems: Vec::new() }
    }

    /// All that is wrong so far.
    pub(crate) fn problems(self) -> Vec<String> {
        self.problems
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.object.keys().map(String::as_str)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.object.contains_key(name)
    }

    /// Notes a problem; `text` goes on after the path of the object.
    pub(crate) fn problem(&mut self, text: impl AsRef<str>) {
        self.problems.push(format!("{}{}", self.path, text.as_ref()));
    }

    fn wrong(&mut self, name: &str, value: &Value, expected: &str) {
        self.problem(format!("{name} is {}, expected {expected}", shown(value)));
    }

    /// A whole number from 1 to `most`, where the field is there.
    pub(crate) fn size(&mut self, name: &str, most: usize) -> Option<usize> {
        let value = self.get(name)?;
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        let size = size.filter(|size| (1..=most).contains(size));
        if size.is_none() {
            self.wrong(name, value, &format!("a whole number from 1 to {most}"));
        }
        size
    }

    /// The same for a field that has no default. A missing field is a problem and reads as 1, which
    /// nothing uses.
    pub(crate) fn required_size(&mut self, name: &str, most: usize) -> usize {
        if !self.has(name) {
            self.problem(format!("{name} is missing"));
        }
        self.size(name, most).unwrap_or(1)
    }

    /// The same of a field for which null says what absence says.
    pub(crate) fn nullable_size(&mut self, name: &str, most: usize) -> Option<usize> {
        if self.get(name).is_some_and(Value::is_null) { None } else { self.size(name, most) }
    }

    /// A whole number, 0 or more, where the field is there and not null.
    pub(crate) fn count(&mut self, name: &str) -> Option<usize> {
        let value = self.get(name).filter(|value| !value.is_null())?;
        let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
        if count.is_none() {
            self.wrong(name, value, "a whole number, 0 or more");
        }
        count
    }

    /// A number within bounds, where the field is there.
    pub(crate) fn number(&mut self, name: &str, bounds: Bounds) -> Option<f64> {
        let value = self.get(name)?;
        let number = value.as_f64().filter(|&number| number > bounds.above && number <= bounds.most);
        if number.is_none() {
            let Bounds { above, most } = bounds;
            self.wrong(name, value, &format!("a number, more than {above} and at most {most}"));
        }
        number
    }

    /// The same of a field for which null says what absence says.
    pub(crate) fn nullable_number(&mut self, name: &str, bounds: Bounds) -> Option<f64> {
        if self.get(name).is_some_and(Value::is_null) { None } else { self.number(name, bounds) }
    }

    /// True or false; false where the field is absent.
    pub(crate) fn flag(&mut self, name: &str) -> bool {
        self.flag_or(name, false)
    }

    pub(crate) fn flag_or(&mut self, name: &str, default: bool) -> bool {
        let Some(value) = self.get(name) else { return default };
        if !value.is_boolean() {
            self.wrong(name, value, "true or false");
        }
        value.as_bool().unwrap_or(default)
    }

    /// A text, where the field is there.
    pub(crate) fn text(&mut self, name: &str) -> Option<&'a str> {
        let value = self.get(name)?;
        if !value.is_string() {
            self.wrong(name, value, "a text in quotes");
        }
        value.as_str()
    }

    /// A list of texts, where the field is there and not null.
    pub(crate) fn texts(&mut self, name: &str) -> Option<Vec<&'a str>> {
        let value = self.get(name).filter(|value| !value.is_null())?;
        let list = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        if list.is_none() {
            self.wrong(name, value, "a list of texts");
        }
        list
    }
}

/// A value as a message shows it.
pub(crate) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
