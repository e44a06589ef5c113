//! Error messages for people: each cause once, in plain words, and what to do next.
//!
//! Invariant: writing to a stderr that is closed or full never ends the process.

use std::fmt::Write as _;
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::logging;

/// Messages of the standard library about numbers, and their plain meaning.
const NUMBERS: [(&str, &str); 5] = [
    ("invalid digit found in string", "expected a whole number"),
    ("cannot parse integer from empty string", "expected a whole number"),
    ("number too large to fit in target type", "the number is too large"),
    ("number too small to fit in target type", "the number is too small"),
    ("invalid float literal", "expected a number"),
];

/// Flags of other servers, and the equivalent flags here.
const ELSEWHERE: [(&str, &str); 8] = [
    ("--port", "--listen 9000"),
    ("--host", "--listen 0.0.0.0:8080"),
    ("--model", "--checkpoint DIR"),
    ("--model-path", "--checkpoint DIR"),
    ("--dtype", "--weight-format bf16"),
    ("--gpu", "--device cuda"),
    ("--workers", "--threads 8"),
    ("--api-key", "--admin-key-file FILE"),
];

/// Writes a line to stderr. A closed stderr is not an error.
pub(super) fn line(text: &str) {
    logging::last_words(text);
}

/// An error with its causes. Many errors quote their cause, so a cause is not repeated.
pub(super) fn text(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(|cause| cause.to_string()) {
        if text.contains(cause.trim()) {
            continue;
        }
        let colon = if text.is_empty() { "" } else { ": " };
        // Writing to a String cannot fail.
        let _ = write!(text, "{colon}{}", cause.trim_end());
    }
    without_error_numbers(&text)
}

/// Removes " (os error 2)" and the like, which add nothing to the message.
fn without_error_numbers(text: &str) -> String {
    const MARK: &str = " (os error ";
    let mut rest = text;
    let mut plain = String::with_capacity(text.len());
    while let Some((before, after)) = rest.split_once(MARK) {
        plain.push_str(before);
        match after.split_once(')') {
            Some((number, end)) if number.bytes().all(|byte| byte.is_ascii_digit()) => rest = end,
            _ => {
                plain.push_str(MARK);
                rest = after;
            }
        }
    }
    plain + rest
}

/// A message about a wrong command line, in plain words, with a tip for a checkpoint that was given
/// without its flag.
pub(super) fn usage(error: &clap::Error) -> String {
    let mut text = error.render().to_string();
    if error.kind() == ErrorKind::ValueValidation {
        for (said, plain) in NUMBERS {
            text = text.replace(said, plain);
        }
    }
    if let Some((_, here)) = ELSEWHERE.iter().find(|(flag, _)| unknown(error) == Some(*flag)) {
        return format!("{}\n\nHere it is: {here}\n", text.trim_end());
    }
    match unknown(error).filter(|text| Path::new(text).is_dir()) {
        Some(directory) => format!(
            "{}\n\nTo serve a checkpoint: beamline serve --checkpoint {directory}\nTo look at one:        beamline inspect {directory}\n",
            text.trim_end()
        ),
        None => text,
    }
}

/// The argument that clap does not know, if that is the error.
fn unknown(error: &clap::Error) -> Option<&str> {
    let kind = match error.kind() {
        ErrorKind::UnknownArgument => ContextKind::InvalidArg,
        ErrorKind::InvalidSubcommand => ContextKind::InvalidSubcommand,
        _ => return None,
    };
    match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read {path}: {source}")]
    struct Read {
        path: &'static str,
        source: io::Error,
    }

    #[test]
    fn a_cause_is_said_once() {
        let missing = || Read { path: "x.json", source: io::Error::from_raw_os_error(2) };
        let quoted = anyhow::Error::new(missing());
        assert_eq!(text(&quoted), "cannot read x.json: No such file or directory");
        let wrapped = anyhow::Error::new(missing()).context("checkpoint x");
        assert_eq!(text(&wrapped), "checkpoint x: cannot read x.json: No such file or directory");
        let unquoted: anyhow::Error =
            Err::<(), _>(missing()).context("the catalog is unreadable").unwrap_err();
        assert!(text(&unquoted).starts_with("the catalog is unreadable: cannot read x.json"));
    }

    #[test]
    fn other_parentheses_stay() {
        for text in ["a (os error x) b", "a (os error 2", "(os errors)"] {
            assert_eq!(without_error_numbers(text), text);
        }
        assert_eq!(without_error_numbers("a (os error 2): b (os error 13)"), "a: b");
    }
}
