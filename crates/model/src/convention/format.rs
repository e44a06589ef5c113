//! convention.json: how a checkpoint writes SIDs and histories as text.
//!
//! ```text
//! prompt    = prompt_prefix + items joined by item_separator + prompt_suffix + generation_begin
//! item      = item_begin_token + one token per level + item_end_token
//! generated = lead_tokens + one token per level + tail_tokens
//! ```
//!
//! The prompt is tokenised as one string. Unknown fields are refused, so that a misspelt one is noticed.

use beamline_catalog::SidPart;
use beamline_wording::{did_you_mean, plain};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::presets;
use crate::checkpoint::json;
use crate::checkpoint::note::Note;
use crate::error::ModelError;

/// Most levels of a SID, lead and tail tokens included.
pub const MAX_STEPS: usize = 32;
/// The forms that a catalog writes SIDs in.
const CODES: &str = "codes";
const DECODER: &str = "decoder";
const ENCODER_DECODER: &str = "encoder-decoder";
const TOKENS: &str = "tokens";
/// Most codes of a level.
const MAX_CODES: u32 = 1 << 20;

/// The file as written.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Format {
    /// Version of the format; 1.
    #[serde(default = "one")]
    pub format: u32,
    /// `decoder` or `encoder-decoder`: what reads the prompt.
    #[serde(default = "decoder")]
    pub model: String,
    /// Levels of a SID.
    pub levels: usize,
    /// Text of a code, one pattern per level, with `{}` for the number.
    pub level_token_patterns: Vec<String>,
    /// Codes per level: numbers from 0 to one less.
    pub level_code_counts: Vec<u32>,
    /// Whether every code has a token, or only those that items use.
    #[serde(default)]
    pub codes_with_tokens: CodesWithTokens,
    /// Before the codes of an item of the history.
    #[serde(default)]
    pub item_begin_token: Option<Marker>,
    /// After the codes of an item of the history.
    #[serde(default)]
    pub item_end_token: Option<Marker>,
    /// Text between two items.
    #[serde(default)]
    pub item_separator: String,
    /// Before the first item.
    #[serde(default)]
    pub prompt_prefix: String,
    /// After the last item.
    #[serde(default)]
    pub prompt_suffix: String,
    /// The last token of the prompt; generation continues from there.
    #[serde(default)]
    pub generation_begin: Option<Marker>,
    /// Whether the tokenizer's post-processor runs on the prompt. For Llama, it adds a begin token.
    #[serde(default)]
    pub add_special_tokens: bool,
    /// Generated before the first level; their probability counts.
    #[serde(default)]
    pub lead_tokens: Vec<Marker>,
    /// Generated after the last level; their probability counts.
    #[serde(default)]
    pub tail_tokens: Vec<Marker>,
    /// Order of a history in the prompt; `oldest first`.
    #[serde(default = "oldest_first")]
    pub history_order: String,
    /// Most items of a history the model was trained on; longer ones are cut at the old end.
    #[serde(default)]
    pub max_history_items: Option<usize>,
    /// Checked against the number of lead tokens, levels and tail tokens.
    #[serde(default)]
    pub generated_steps: Option<usize>,
    /// Checked against config.json.
    #[serde(default)]
    pub vocab_size: Option<usize>,
    /// Checked against the tokenizer.
    #[serde(default)]
    pub tokenizer_size: Option<usize>,
    /// Of an encoder-decoder.
    #[serde(default)]
    pub decoder_start_token: Option<Marker>,
    /// How the catalog beside it writes SIDs: `codes` or `tokens`. The catalog itself decides; this is
    /// only compared with it.
    #[serde(default)]
    pub catalog_sid_form: Option<String>,
    /// A note for people.
    #[serde(default)]
    pub rendering: Option<String>,
}

/// Which codes have a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CodesWithTokens {
    /// All of them.
    #[default]
    All,
    /// Those that items use.
    Used,
}

/// A single token: its text, or text and id.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged, deny_unknown_fields, expecting = "expected the text of a token, or {\"text\", \"id\"}")]
pub enum Marker {
    /// The token's text alone.
    Text(String),
    /// The text, and the id that the tokenizer must give it.
    Checked {
        /// The token's text.
        text: String,
        /// The token's id.
        id: u32,
    },
}

impl Marker {
    /// The token's text.
    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Checked { text, .. } => text,
        }
    }
}

fn one() -> u32 {
    1
}

fn decoder() -> String {
    DECODER.into()
}

fn oldest_first() -> String {
    "oldest first".into()
}

impl Format {
    /// Parses convention.json. `{"preset": NAME, ...}` starts from a preset; the other fields override it.
    ///
    /// # Errors
    ///
    /// When the text is not JSON, names an unknown preset or field, or contradicts itself.
    pub fn parse(json: &str) -> Result<Self, ModelError> {
        let error = |reason: String| ModelError::Convention(reason);
        let mut value = json::parse(json).map_err(error)?;
        let given = value.as_object_mut().ok_or_else(|| error("is not a JSON object".into()))?;
        let value = match given.remove("preset") {
            None => value,
            Some(Value::String(name)) => {
                let mut base = presets::find(&name).ok_or_else(|| {
                    let names = presets::names();
                    let meant = did_you_mean(&name, names.iter().copied());
                    error(format!("unknown preset {name:?}; known are {}{meant}", names.join(", ")))
                })?;
                if let Some(base) = base.as_object_mut() {
                    base.append(given);
                }
                base
            }
            Some(_) => return Err(error("`preset` is not a string".into())),
        };
        let format: Self =
            serde_path_to_error::deserialize(value).map_err(|e| error(plain(&e.to_string())))?;
        format.check().map_err(error)?;
        Ok(format)
    }

    /// A preset by name.
    ///
    /// # Errors
    ///
    /// When there is no such preset.
    pub fn preset(name: &str) -> Result<Self, ModelError> {
        Self::parse(&serde_json::json!({ "preset": name }).to_string())
    }

    /// Tokens generated for one item.
    pub fn steps(&self) -> usize {
        self.lead_tokens.len() + self.levels + self.tail_tokens.len()
    }

    /// Compares `catalog_sid_form` with a SID of the catalog; a catalog is in one form as a whole. Both
    /// forms are served alike, so a difference is only worth a note: perhaps another catalog was meant.
    pub fn compare_catalog(&self, sid: &[SidPart]) -> Option<Note> {
        let declared = self.catalog_sid_form.as_deref()?;
        let found = match sid.first()? {
            SidPart::Code(_) => CODES,
            SidPart::Token(_) => TOKENS,
        };
        let what = format!(
            "it says {declared:?}, the catalog is written in {found}; the catalog counts, if it is the one that was meant"
        );
        (declared != found).then(|| Note::Field {
            file: "convention.json",
            field: "catalog_sid_form".into(),
            what,
        })
    }

    /// Whether an encoder reads the prompt, and a decoder generates from a start token.
    pub fn is_encoder_decoder(&self) -> bool {
        self.model == ENCODER_DECODER
    }

    fn check(&self) -> Result<(), String> {
        if self.format != 1 {
            return Err(format!("format {} is not known, only 1", self.format));
        }
        if ![DECODER, ENCODER_DECODER].contains(&self.model.as_str()) {
            return Err(format!(
                "model {:?} is not known, only {DECODER:?} and {ENCODER_DECODER:?}",
                self.model
            ));
        }
        if self.levels == 0 || self.steps() > MAX_STEPS {
            return Err(format!("{} generated tokens, expected 1 to {MAX_STEPS}", self.steps()));
        }
        if let Some(steps) = self.generated_steps.filter(|&steps| steps != self.steps()) {
            return Err(format!("generated_steps is {steps}, but the parts give {}", self.steps()));
        }
        if self.level_token_patterns.len() != self.levels || self.level_code_counts.len() != self.levels {
            return Err(format!(
                "{} levels, but {} token patterns and {} code counts",
                self.levels,
                self.level_token_patterns.len(),
                self.level_code_counts.len()
            ));
        }
        if let Some(pattern) =
            self.level_token_patterns.iter().find(|pattern| pattern.matches("{}").count() != 1)
        {
            return Err(format!("pattern {pattern:?} does not hold exactly one {{}}"));
        }
        if let Some(count) = self.level_code_counts.iter().find(|&&count| count == 0 || count > MAX_CODES) {
            return Err(format!("{count} codes in a level, expected 1 to {MAX_CODES}"));
        }
        if self.history_order != "oldest first" {
            return Err(format!(
                "history_order {:?} is not known, only \"oldest first\"",
                self.history_order
            ));
        }
        if let Some(form) = self.catalog_sid_form.as_deref().filter(|form| ![CODES, TOKENS].contains(form)) {
            return Err(format!("catalog_sid_form {form:?} is not known, only \"codes\" and \"tokens\""));
        }
        if self.decoder_start_token.is_some() && !self.is_encoder_decoder() {
            return Err(format!(
                "decoder_start_token is of encoder-decoder models: set it to null, or \"model\" to {ENCODER_DECODER:?}"
            ));
        }
        if self.max_history_items == Some(0) {
            return Err("max_history_items is 0".into());
        }
        Ok(())
    }
}
