//! Names of models, labels and files, and how a request writes which version it wants.
//!
//! ```text
//! shop                  the version that the label `stable` of the model `shop` points at
//! shop@canary           the version that a label points at
//! shop@0123456789ab     a version: the first 12 digits of the checkpoint's sha256, or more of them
//! ```
//!
//! Invariant: a name is always a single component of a path that leads down, and a label never
//! looks like a version. So a reference has one meaning.

use std::fmt;

use crate::error::Error;

/// The label that is used by requests without a label or version.
pub const STABLE: &str = "stable";
/// Number of digits of a version.
const VERSION_DIGITS: usize = 12;
/// Longest name, in bytes.
const MAX_BYTES: usize = 64;

/// The model and version that a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reference<'a> {
    /// Name of the model.
    pub name: &'a str,
    /// The part after the `@`: a label or a version.
    pub at: Option<&'a str>,
}

impl<'a> Reference<'a> {
    /// Splits a reference. A part that is not a valid name will not be found.
    pub fn parse(text: &'a str) -> Self {
        match text.split_once('@') {
            Some((name, at)) => Self { name, at: Some(at) },
            None => Self { name: text, at: None },
        }
    }
}

impl fmt::Display for Reference<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.at {
            Some(at) => write!(f, "{}@{at}", self.name),
            None => f.write_str(self.name),
        }
    }
}

/// Whether a text is a name: `^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$`, without `..`.
pub fn is_name(text: &str) -> bool {
    let rest = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    text.len() <= MAX_BYTES
        && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && text.bytes().all(rest)
        && !text.contains("..")
}

/// Whether a text could be a version: enough digits of a sha256.
pub fn is_version(text: &str) -> bool {
    (VERSION_DIGITS..=64).contains(&text.len())
        && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Checks a name from a client.
///
/// # Errors
///
/// [`Error::InvalidName`] when it is not a valid name.
pub fn check(param: &'static str, text: &str) -> Result<(), Error> {
    if is_name(text) { Ok(()) } else { Err(Error::InvalidName { param }) }
}

/// Checks a label from a client.
///
/// # Errors
///
/// [`Error::InvalidName`] when it is not a valid name, [`Error::InvalidValue`] when it could be
/// taken for a version.
pub fn check_label(param: &'static str, text: &str) -> Result<(), Error> {
    check(param, text)?;
    if is_version(text) {
        let message = "looks like a version; a label needs another letter than a to f, or fewer digits";
        return Err(Error::InvalidValue { param, message: message.into() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_within_a_directory() {
        for name in ["a", "A-1", "v1.2_x", "0123456789ab", &"x".repeat(64)] {
            assert!(is_name(name), "{name}");
        }
        let long = "x".repeat(65);
        for text in [
            "", ".", "..", "a..b", ".hidden", "-x", "_x", "a/b", "a\\b", "a b", "ä", "a\0", "a@b", "a%",
            &long,
        ] {
            assert!(!is_name(text), "{text:?}");
        }
    }

    #[test]
    fn labels_are_not_versions() {
        assert!(check_label("label", "stable").is_ok() && check_label("label", "cafe").is_ok());
        assert!(check_label("label", "0123456789ab").is_err());
        assert!(check_label("label", "a/b").is_err());
        assert!(!is_version("0123456789a") && !is_version("0123456789AB") && is_version(&"a".repeat(64)));
    }

    #[test]
    fn references_are_taken_apart() {
        assert_eq!(Reference::parse("shop"), Reference { name: "shop", at: None });
        assert_eq!(Reference::parse("shop@canary"), Reference { name: "shop", at: Some("canary") });
        assert_eq!(Reference::parse("@"), Reference { name: "", at: Some("") });
    }
}
