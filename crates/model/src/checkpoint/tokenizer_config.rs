//! tokenizer_config.json: read only to tell where it says another thing than tokenizer.json.
//!
//! transformers reads both, and lets this file add tokens and switch begin tokens on. Here
//! tokenizer.json alone counts, so differences are reported.

use std::path::Path;

use serde_json::Value;

use super::note::Note;
use super::{file, json};

const NAME: &str = "tokenizer_config.json";
const MAX_BYTES: u64 = 64 << 20;
/// Tokens that a note names.
const NAMED: usize = 3;

/// What the file says differently. What cannot be read says nothing, and transformers would fail over it.
pub(super) fn differences(directory: &Path, tokenizer: &str) -> Vec<Note> {
    let text = file::read_text(&directory.join(NAME), MAX_BYTES).ok();
    let Some(config) = text.and_then(|text| json::parse(&text).ok()) else { return Vec::new() };
    let Ok(tokenizer) = json::parse(tokenizer) else { return Vec::new() };
    [other_tokens(&config, &tokenizer), begin_token(&config, &tokenizer)].into_iter().flatten().collect()
}

fn other_tokens(config: &Value, tokenizer: &Value) -> Option<Note> {
    let added = tokenizer["added_tokens"].as_array()?;
    let listed = config["added_tokens_decoder"].as_object()?;
    let known: std::collections::HashSet<(u64, &str)> =
        added.iter().filter_map(|token| Some((token["id"].as_u64()?, token["content"].as_str()?))).collect();
    let mut other = listed.iter().filter_map(|(id, token)| {
        let content = token["content"].as_str()?;
        let same = id.parse().is_ok_and(|id| known.contains(&(id, content)));
        (!same).then(|| format!("{content:?} as {id}"))
    });
    let named: Vec<String> = other.by_ref().take(NAMED).collect();
    let more = if other.next().is_some() { " and others" } else { "" };
    (!named.is_empty()).then(|| {
        note("added_tokens_decoder", format!(
            "it lists {}{more}, which tokenizer.json has not; transformers adds them and this server does not, so save the \
             tokenizer again",
            named.join(", ")
        ))
    })
}

fn begin_token(config: &Value, tokenizer: &Value) -> Option<Note> {
    let asked =
        ["add_bos_token", "add_eos_token"].into_iter().find(|name| config[*name] == Value::Bool(true))?;
    tokenizer["post_processor"].is_null().then(|| {
        note(asked, "it is true, but tokenizer.json adds no token to a text, and counts here; save the tokenizer again".into())
    })
}

fn note(field: &str, what: String) -> Note {
    Note::Field { file: NAME, field: field.to_owned(), what }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(config: &str, tokenizer: &str) -> String {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(NAME), config).unwrap();
        differences(directory.path(), tokenizer)
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("\n")
    }

    #[test]
    fn what_the_two_files_say_differently_is_told() {
        let tokenizer = r#"{"added_tokens": [{"id": 3, "content": "<a_0>"}], "post_processor": null}"#;
        let same = r#"{"added_tokens_decoder": {"3": {"content": "<a_0>"}}, "add_bos_token": false}"#;
        assert_eq!(told(same, tokenizer), "");
        assert_eq!(told("{", tokenizer), "");
        let other = r#"{"added_tokens_decoder": {"4": {"content": "<a_0>"}}, "add_bos_token": true}"#;
        let told = told(other, tokenizer);
        assert!(told.contains("\"<a_0>\" as 4") && told.contains("add_bos_token: it is true"), "{told}");
    }
}
