//! tokenizer.json: parsed, and looked through for what its parser does not mind.

use std::collections::HashMap;

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::checkpoint::json;
use crate::error::ModelError;

/// How many times longer normalizers may make a text. Those of published models stay below a tenth of it.
const MAX_GROWTH: f64 = 100.0;
/// How many times longer the compatibility forms of Unicode can make a text.
const UNICODE_GROWTH: f64 = 18.0;

/// How an added token is found in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Matching {
    normalized: bool,
    special: bool,
    single_word: bool,
    strips: [bool; 2],
}

/// Tokens that are found before a text is split into words, each with how it is found.
pub(super) type AddedTokens = HashMap<String, Matching>;

/// A tokenizer, and what its file says of it.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) tokenizer: Tokenizer,
    pub(super) added: AddedTokens,
    /// What a word becomes that is not known.
    pub(super) unknown: Option<u32>,
    /// Bytes of the longest token.
    pub(super) longest: usize,
}

impl Parsed {
    /// Parses the file's text. Cutting and padding are switched off: a prompt is what its text says.
    pub(super) fn of(text: &str) -> Result<Self, ModelError> {
        let bad = |reason: String| ModelError::Tokenizer(reason);
        let value = json::parse(text).map_err(bad)?;
        check_growth(&value["normalizer"]).map_err(bad)?;
        // The library panics on some damage instead of returning an error.
        let parsed = std::panic::catch_unwind(|| text.trim_start_matches('\u{feff}').parse::<Tokenizer>());
        let parsed = parsed.map_err(|_| bad("is damaged in a way its parser does not survive".into()))?;
        let mut tokenizer = parsed.map_err(|error| bad(error.to_string()))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| bad(error.to_string()))?;
        let vocabulary = tokenizer.get_vocab(true);
        let longest = vocabulary.keys().map(String::len).max().unwrap_or(0);
        let model = &value["model"];
        let unknown = match (model["unk_token"].as_str(), model["unk_id"].as_u64()) {
            (Some(token), _) => tokenizer.token_to_id(token),
            (None, id) => id.and_then(|id| u32::try_from(id).ok()),
        };
        let added = value["added_tokens"].as_array().into_iter().flatten().filter_map(matching).collect();
        Ok(Self { tokenizer, added, unknown, longest })
    }
}

fn matching(token: &Value) -> Option<(String, Matching)> {
    let flag = |name: &str| token[name].as_bool().unwrap_or(false);
    let matching = Matching {
        normalized: flag("normalized"),
        special: flag("special"),
        single_word: flag("single_word"),
        strips: [flag("lstrip"), flag("rstrip")],
    };
    Some((token["content"].as_str()?.to_owned(), matching))
}

/// Normalizers run one after the other, so their growth multiplies: a few of them can turn a short
/// prompt into more than the machine's memory.
fn check_growth(normalizer: &Value) -> Result<(), String> {
    let growth = growth(normalizer);
    match growth > MAX_GROWTH {
        true => Err(format!(
            "its normalizers make a text up to {growth:.0} times longer, more than {MAX_GROWTH} times; remove those that \
             insert text"
        )),
        false => Ok(()),
    }
}

/// At most how many times longer a text gets, the shortest texts left aside.
fn growth(normalizer: &Value) -> f64 {
    let content = |name: &str| normalizer[name].as_str().map_or(0, str::len) as f64;
    match normalizer["type"].as_str().unwrap_or_default() {
        "Sequence" => normalizer["normalizers"].as_array().into_iter().flatten().map(growth).product(),
        "Replace" => match normalizer["pattern"]["String"].as_str().map(str::len) {
            Some(length) if length > 0 => (content("content") / length as f64).max(1.0),
            // An empty pattern, or an expression that may match nothing, is found in front of every
            // character.
            _ => 1.0 + content("content"),
        },
        // In front of the text once; a text of one character is the worst of them.
        "Prepend" => 1.0 + content("prepend") / MAX_GROWTH,
        "NFKD" | "NFKC" | "Precompiled" | "Nmt" => UNICODE_GROWTH,
        "NFD" | "NFC" | "Lowercase" | "BertNormalizer" => 4.0,
        "ByteLevel" => 2.0,
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn normalizers_that_multiply_text_are_refused() {
        let insert = json!({"type": "Replace", "pattern": {"String": ""}, "content": "x".repeat(1000)});
        for bad in [
            insert.clone(),
            json!({"type": "Sequence", "normalizers": [insert.clone(), insert]}),
            json!({"type": "Replace", "pattern": {"Regex": "a*"}, "content": "x".repeat(200)}),
            json!({"type": "Sequence", "normalizers": vec![
                json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}); 4
            ]}),
            json!({"type": "Prepend", "prepend": "x".repeat(100_000)}),
        ] {
            assert!(check_growth(&bad).unwrap_err().contains("times longer"), "{bad}");
        }
    }

    #[test]
    fn normalizers_of_published_models_pass() {
        for good in [
            json!(null),
            json!({"type": "NFC"}),
            // Llama 2.
            json!({"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "\u{2581}"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
            ]}),
            // T5.
            json!({"type": "Sequence", "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
                {"type": "Strip", "strip_left": false, "strip_right": true},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u{2581}"},
            ]}),
        ] {
            assert_eq!(check_growth(&good), Ok(()), "{good}");
        }
    }
}
