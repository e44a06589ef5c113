//! Conventions: from items to tokens and back.
//!
//! Place in the flow: the server turns a history into a prompt here, and the catalog resolves SIDs to
//! tokens here. A [`Convention`] is a [`Format`] bound to the tokenizer of a checkpoint. Every token it
//! needs was looked up in that tokenizer; none is ever computed from a formula.
//!
//! Invariant: the ids of a prompt are the tokenisation of the one rendered string, and every id is a row
//! of the embedding.
//!
//! ```text
//! format     convention.json as written
//! bind       every token looked up, and prompts tried
//! presets    conventions of published families
//! tokenizer  tokenizer.json, parsed and looked through
//! parts      prompts put together from parts, where that gives the same ids
//! text       prompts that a request gives as text
//! ```

mod bind;
pub mod format;
mod parts;
pub mod presets;
pub mod text;
mod tokenizer;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use beamline_catalog::{SidPart, SymbolTable};
use tokenizers::Tokenizer;

use crate::checkpoint::file;
use crate::checkpoint::note::Note;
use crate::decode::Step;
use crate::error::ModelError;
use crate::loaded::TokenFacts;
use format::{Format, Marker};
use parts::Parts;

/// A convention bound to a tokenizer.
#[derive(Debug)]
pub struct Convention {
    format: Format,
    tokenizer: Tokenizer,
    levels: Vec<Level>,
    begin: Option<u32>,
    end: Option<u32>,
    /// What the decoder of an encoder-decoder starts from.
    start: Option<u32>,
    steps: Arc<[Step]>,
    parts: Option<Parts>,
    /// Rows of the embedding.
    vocab_size: usize,
    /// What a word becomes that the tokenizer does not know.
    unknown: Option<u32>,
    /// Bytes of the longest token.
    longest: usize,
    tokens_per_item: usize,
    notes: Vec<Note>,
}

#[derive(Debug)]
struct Level {
    /// Token of each code, where it has one.
    tokens: Vec<Option<u32>>,
    /// Code of each token.
    codes: HashMap<u32, u32>,
    prefix: String,
    suffix: String,
}

impl Level {
    /// The text of a code.
    fn text(&self, code: u32) -> String {
        format!("{}{code}{}", self.prefix, self.suffix)
    }

    /// The number in a text that has the form of a code.
    fn digits<'a>(&self, text: &'a str) -> Option<&'a str> {
        let digits = text.strip_prefix(self.prefix.as_str())?.strip_suffix(self.suffix.as_str())?;
        (!digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())).then_some(digits)
    }

    /// Whether a token holds the text that codes of this level begin with. Where codes begin with a
    /// number, it is the text that they end with.
    fn is_within(&self, token: &str) -> bool {
        let mark = if self.prefix.is_empty() { &self.suffix } else { &self.prefix };
        token.contains(mark.as_str())
    }
}

impl Convention {
    /// Binds a format to the tokenizer.json of a checkpoint directory.
    ///
    /// # Errors
    ///
    /// When the tokenizer is damaged, lacks a token of the format, or gives one an id that the format
    /// contradicts.
    pub fn bind(format: Format, checkpoint: &Path, vocab_size: usize) -> Result<Self, ModelError> {
        let json = file::read_text(&checkpoint.join("tokenizer.json"), file::MAX_TOKENIZER_BYTES)?;
        Self::bind_to(format, &json, vocab_size)
    }

    /// The format it was bound from.
    pub fn format(&self) -> &Format {
        &self.format
    }

    /// What its author should know.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// What is generated for one item.
    pub fn steps(&self) -> &Arc<[Step]> {
        &self.steps
    }

    /// What the decoder starts from, if the model is an encoder-decoder; `None` for a decoder.
    ///
    /// # Errors
    ///
    /// When the convention is of the other kind of model, config.json names another token, or neither
    /// names one.
    pub fn start_token(&self, model: &TokenFacts) -> Result<Option<u32>, ModelError> {
        let (kind, name) = (&self.format.model, &model.architecture);
        let Some(decoder) = model.decoder else {
            return match self.format.is_encoder_decoder() {
                false => Ok(None),
                true => Err(ModelError::Convention(format!("it is of an {kind}, and {name} is a decoder"))),
            };
        };
        if !self.format.is_encoder_decoder() {
            let message = format!("\"model\" is {kind:?}, and {name} is an encoder-decoder: set it to that");
            return Err(ModelError::Convention(message));
        }
        match (self.start, decoder.start_token) {
            (Some(named), Some(other)) if named != other => Err(ModelError::Convention(format!(
                "decoder_start_token has id {named}, decoder_start_token_id in config.json is {other}; make them equal"
            ))),
            (None, None) => Err(ModelError::Convention(
                "decoder_start_token is missing, and config.json has no decoder_start_token_id".into(),
            )),
            (Some(token), _) | (None, Some(token)) => Ok(Some(token)),
        }
    }

    /// Whether prompts are put together from parts instead of being tokenised whole.
    pub fn composes(&self) -> bool {
        self.parts.is_some()
    }

    /// Tokens an item takes in a history, the separator included.
    pub fn tokens_per_item(&self) -> usize {
        self.tokens_per_item
    }

    /// The prompt of a history, oldest item first. Each item is given by the tokens of its SID, which
    /// are its symbols in the catalog.
    ///
    /// # Errors
    ///
    /// When the tokenizer fails, or makes a token of the text that the model does not have.
    pub fn prompt<'a>(&self, items: impl Iterator<Item = &'a [u32]> + Clone) -> Result<Vec<u32>, ModelError> {
        match &self.parts {
            Some(parts) => Ok(parts.compose(self, items)),
            None => {
                let tokens = self.tokenize(&self.render(items))?;
                match self.beyond_vocabulary(&tokens) {
                    Some(error) => Err(ModelError::Convention(format!("a prompt {error}"))),
                    None => Ok(tokens),
                }
            }
        }
    }

    /// The text of a prompt.
    pub fn render<'a>(&self, items: impl Iterator<Item = &'a [u32]>) -> String {
        let format = &self.format;
        let marker = |marker: &Option<Marker>| marker.as_ref().map_or("", Marker::text).to_owned();
        let (begin, end) = (marker(&format.item_begin_token), marker(&format.item_end_token));
        let mut text = format.prompt_prefix.clone();
        for (index, tokens) in items.enumerate() {
            if index > 0 {
                text.push_str(&format.item_separator);
            }
            text.push_str(&begin);
            text.push_str(&self.text_of(tokens));
            text.push_str(&end);
        }
        text + &format.prompt_suffix + &marker(&format.generation_begin)
    }

    /// Tokens of a text, with the post-processor if the convention says so.
    ///
    /// # Errors
    ///
    /// When the tokenizer fails, which it does not for text.
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let encoding = self.tokenizer.encode_fast(text, self.format.add_special_tokens);
        Ok(encoding.map_err(|e| ModelError::Tokenizer(e.to_string()))?.get_ids().to_vec())
    }

    /// The codes of an item as text.
    fn text_of(&self, tokens: &[u32]) -> String {
        let codes = self.levels.iter().zip(tokens);
        codes.filter_map(|(level, token)| Some(level.text(*level.codes.get(token)?))).collect()
    }
}

impl SymbolTable for Convention {
    fn depth(&self) -> Option<usize> {
        Some(self.levels.len())
    }

    fn symbol(&self, level: usize, part: &SidPart) -> Option<u32> {
        let level = self.levels.get(level)?;
        let code = match part {
            SidPart::Code(code) => *code,
            SidPart::Token(text) => {
                let digits = text.strip_prefix(level.prefix.as_str())?.strip_suffix(level.suffix.as_str())?;
                let code: u32 = digits.parse().ok()?;
                // "007" and "+7" would parse too, but are not the token's text.
                (code.to_string() == digits).then_some(code)?
            }
        };
        *level.tokens.get(code as usize)?
    }

    fn advice(&self, level: usize, part: &SidPart) -> Option<String> {
        let Level { tokens, prefix, suffix, .. } = self.levels.get(level)?;
        let code = match part {
            SidPart::Code(code) => *code,
            SidPart::Token(text) => match text.parse() {
                Ok(code) => code,
                Err(_) => return Some(format!("the tokens of this level are written {prefix}0{suffix}")),
            },
        };
        match (part, tokens.get(code as usize)) {
            (SidPart::Token(_), Some(Some(_))) => Some(format!("write {code} or \"{prefix}{code}{suffix}\"")),
            (_, Some(None)) => Some(format!("the tokenizer has no token {prefix}{code}{suffix}")),
            _ => Some(format!("this level has the codes 0 to {}", tokens.len().saturating_sub(1))),
        }
    }
}
