//! Rewrites the messages of parsers in plain words.
//!
//! serde names Rust's types ("expected u64") and lists known fields without saying which one was
//! meant. Its texts are rewritten here, for requests, config files, config.json and conventions
//! alike.

use crate::suggest::suggest;

/// What serde expects, and a plain name for it. A longer name stands before one that is its
/// beginning.
const EXPECTED: [(&str, &str); 23] = [
    ("u128", "a whole number, 0 or more"),
    ("usize", "a whole number, 0 or more"),
    ("u64", "a whole number, 0 or more"),
    ("u32", "a whole number, 0 or more"),
    ("u16", "a whole number, 0 or more"),
    ("u8", "a whole number, 0 or more"),
    ("a nonzero u64", "a whole number, 1 or more"),
    ("a nonzero u32", "a whole number, 1 or more"),
    ("a nonzero usize", "a whole number, 1 or more"),
    ("isize", "a whole number"),
    ("i128", "a whole number"),
    ("i64", "a whole number"),
    ("i32", "a whole number"),
    ("i16", "a whole number"),
    ("i8", "a whole number"),
    ("f64", "a number"),
    ("f32", "a number"),
    ("a boolean", "true or false"),
    ("a borrowed string", "a string"),
    ("a path string", "a path in quotes"),
    ("a sequence", "a list"),
    ("a map", "an object"),
    ("unit", "null"),
];

/// A message of serde or toml without the names of Rust types, with a suggestion for an unknown
/// name.
pub fn plain(message: &str) -> String {
    suggest_name(&plain_types(message))
}

fn plain_types(message: &str) -> String {
    const MARK: &str = "expected ";
    let mut text = String::with_capacity(message.len());
    let mut rest = message;
    while let Some(at) = rest.find(MARK) {
        let (before, after) = rest.split_at(at + MARK.len());
        text.push_str(before);
        rest = match EXPECTED.iter().find(|(name, _)| starts_with_word(after, name)) {
            Some((name, words)) => {
                text.push_str(words);
                &after[name.len()..]
            }
            None => match after.strip_prefix("struct ") {
                Some(name) => {
                    text.push_str("an object");
                    name.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_')
                }
                None => after,
            },
        };
    }
    text + rest
}

fn starts_with_word(text: &str, word: &str) -> bool {
    text.strip_prefix(word).is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
}

/// "unknown field `histroy`, expected ..." becomes "unknown field `histroy` (did you mean
/// `history`?), expected ...".
fn suggest_name(message: &str) -> String {
    for mark in ["unknown field `", "unknown variant `"] {
        let Some(start) = message.find(mark).map(|at| at + mark.len()) else { continue };
        let Some((name, known)) = message[start..].split_once("`, expected ") else { continue };
        // Names stand between backticks, words between them do not.
        let names = known.split('`').skip(1).step_by(2);
        if let Some(meant) = suggest(name, names) {
            let end = start + name.len() + 1;
            return format!("{} (did you mean `{meant}`?){}", &message[..end], &message[end..]);
        }
    }
    message.to_owned()
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn types_have_plain_names() {
        for (said, better) in [
            (
                "invalid type: string \"5\", expected u64",
                "invalid type: string \"5\", expected a whole number, 0 or more",
            ),
            (
                "invalid value: integer `-1`, expected usize at line 1 column 4",
                "invalid value: integer `-1`, expected a whole number, 0 or more at line 1 column 4",
            ),
            (
                "invalid type: string \"now\", expected i64",
                "invalid type: string \"now\", expected a whole number",
            ),
            ("invalid type: map, expected f32", "invalid type: map, expected a number"),
            (
                "invalid type: integer `1`, expected a boolean",
                "invalid type: integer `1`, expected true or false",
            ),
            (
                "invalid type: string \"a\", expected struct HistoryAction",
                "invalid type: string \"a\", expected an object",
            ),
            ("expected u64x and u640", "expected u64x and u640"),
            ("expected", "expected"),
            ("", ""),
        ] {
            assert_eq!(plain(said), better);
        }
    }

    #[test]
    fn an_unknown_name_comes_with_the_one_that_was_meant() {
        let said =
            "unknown field `histroy`, expected one of `user_id`, `history`, `num_items` at line 1 column 9";
        let better = "unknown field `histroy` (did you mean `history`?), expected one of `user_id`, `history`, `num_items` \
                      at line 1 column 9";
        assert_eq!(plain(said), better);
        assert_eq!(
            plain("unknown variant `jsno`, expected `text` or `json`"),
            "unknown variant `jsno` (did you mean `json`?), expected `text` or `json`"
        );
        for unchanged in [
            "unknown field `temperature`, expected one of `history`, `num_items`",
            "unknown field `x`, there are no fields",
            "unknown field `é",
        ] {
            assert_eq!(plain(unchanged), unchanged);
        }
    }
}
