//! From a format and a tokenizer to a convention: every token is looked up, and prompts are tried.

use std::collections::HashMap;

use tokenizers::Tokenizer;

use super::format::{CodesWithTokens, Format, Marker};
use super::parts::Parts;
use super::tokenizer::Parsed;
use super::{Convention, Level};
use crate::checkpoint::note::Note;
use crate::decode::Step;
use crate::error::ModelError;

impl Convention {
    /// Binds a format to the text of a tokenizer.json.
    ///
    /// # Errors
    ///
    /// When the tokenizer is damaged, lacks a token of the format or gives one an id that the format
    /// contradicts. Also when it makes tokens of a prompt that the model does not have.
    pub fn bind_to(format: Format, tokenizer: &str, vocab_size: usize) -> Result<Self, ModelError> {
        let Parsed { tokenizer, added, unknown, longest } = Parsed::of(tokenizer)?;
        let size = tokenizer.get_vocab_size(true);
        let levels = (0..format.levels).map(|level| bind_level(&format, &tokenizer, level, vocab_size));
        let levels = levels.collect::<Result<Vec<_>, _>>()?;
        check_sizes(&format, vocab_size, size)?;
        let resolve = |marker: &Marker| marker_token(&tokenizer, marker, vocab_size);
        let begin = format.item_begin_token.as_ref().map(resolve).transpose()?;
        let end = format.item_end_token.as_ref().map(resolve).transpose()?;
        let start = format.decoder_start_token.as_ref().map(resolve).transpose()?;
        format.generation_begin.as_ref().map(resolve).transpose()?;
        let fixed = |markers: &[Marker]| -> Result<Vec<Step>, ModelError> {
            markers.iter().map(|marker| resolve(marker).map(Step::Fixed)).collect()
        };
        let (lead, tail) = (fixed(&format.lead_tokens)?, fixed(&format.tail_tokens)?);
        let levels_of_item = std::iter::repeat_n(Step::Level, format.levels);
        let steps = lead.into_iter().chain(levels_of_item).chain(tail).collect();
        let (tokens_per_item, notes) = (0, Vec::new());
        let mut convention = Self {
            format,
            tokenizer,
            levels,
            begin,
            end,
            start,
            steps,
            parts: None,
            vocab_size,
            unknown,
            longest,
            tokens_per_item,
            notes,
        };
        convention.check_prompts(size)?;
        match Parts::find(&convention, &added)? {
            Ok(parts) => convention.parts = Some(parts),
            Err(reason) => convention.notes.push(Note::Prompt(format!(
                "every history is tokenised as a whole text, which takes longer: {reason}"
            ))),
        }
        Ok(convention)
    }

    /// Tokenises prompts without items, with one and with two, and looks at what comes out.
    fn check_prompts(&mut self, tokenizer_size: usize) -> Result<(), ModelError> {
        let first = |level: &Level| level.tokens.iter().flatten().next().copied();
        let item: Vec<u32> = self.levels.iter().filter_map(first).collect();
        let mut lengths = [0; 3];
        for (items, length) in lengths.iter_mut().enumerate() {
            let tokens = self.tokenize(&self.render(std::iter::repeat_n(item.as_slice(), items)))?;
            if let Some(error) = self.beyond_vocabulary(&tokens) {
                return Err(ModelError::Convention(format!(
                    "a prompt {error}; resize the embedding to the tokenizer before training, or take that text out of the prompt"
                )));
            }
            if items == 0 {
                self.note_unknown(&tokens);
            }
            *length = tokens.len();
        }
        self.tokens_per_item = lengths[2].saturating_sub(lengths[1]);
        if tokenizer_size > self.vocab_size {
            self.notes.push(Note::Prompt(format!(
                "the tokenizer has {tokenizer_size} tokens, the embedding {} rows: a prompt that holds one of the others is \
                 refused",
                self.vocab_size
            )));
        }
        Ok(())
    }

    fn note_unknown(&mut self, tokens: &[u32]) {
        let unknown = tokens.iter().filter(|token| Some(**token) == self.unknown).count();
        if unknown > 0 {
            self.notes.push(Note::Prompt(format!(
                "{unknown} of the {} tokens around a history are unknown to the tokenizer; prompt_prefix or prompt_suffix is \
                 another text than the model was trained with",
                tokens.len()
            )));
        }
    }
}

/// Compares the sizes that the format names with what is there.
fn check_sizes(format: &Format, rows: usize, tokens: usize) -> Result<(), ModelError> {
    let error = |reason| Err(ModelError::Convention(reason));
    match (format.vocab_size, format.tokenizer_size) {
        (Some(size), _) if size != rows => error(format!("vocab_size is {size}, config.json says {rows}")),
        (_, Some(size)) if size != tokens => {
            error(format!("tokenizer_size is {size}, the tokenizer has {tokens}"))
        }
        _ => Ok(()),
    }
}

/// The id of a single token.
fn marker_token(tokenizer: &Tokenizer, marker: &Marker, vocab_size: usize) -> Result<u32, ModelError> {
    let text = marker.text();
    // Byte-level tokenizers store a newline under another name, so compare what it is tokenised to.
    // Unknown text becomes the unknown token, which does not read as the text.
    let id = tokenizer.token_to_id(text).or_else(|| {
        let encoding = tokenizer.encode_fast(text, false).ok()?;
        match encoding.get_ids() {
            [id] if tokenizer.decode(&[*id], false).is_ok_and(|decoded| decoded == text) => Some(*id),
            _ => None,
        }
    });
    let id = id
        .ok_or_else(|| ModelError::Convention(format!("{text:?} is not a single token of tokenizer.json")))?;
    if let Marker::Checked { id: expected, .. } = marker
        && *expected != id
    {
        return Err(ModelError::Convention(format!(
            "{text:?} has id {id} in tokenizer.json, not {expected}"
        )));
    }
    if id as usize >= vocab_size {
        return Err(ModelError::Convention(format!(
            "{text:?} has id {id}, beyond the vocabulary of {vocab_size}"
        )));
    }
    Ok(id)
}

/// Looks up the token of every code of a level.
fn bind_level(
    format: &Format,
    tokenizer: &Tokenizer,
    level: usize,
    vocab_size: usize,
) -> Result<Level, ModelError> {
    let pattern = &format.level_token_patterns[level];
    let (prefix, suffix) = pattern.split_once("{}").unwrap_or((pattern, ""));
    let mut tokens = Vec::new();
    let mut codes = HashMap::new();
    let mut missing = Vec::new();
    for code in 0..format.level_code_counts[level] {
        let text = format!("{prefix}{code}{suffix}");
        let token = tokenizer.token_to_id(&text);
        match token {
            Some(id) if id as usize >= vocab_size => {
                return Err(ModelError::Convention(format!(
                    "{text} has id {id}, beyond the vocabulary of {vocab_size} rows"
                )));
            }
            Some(id) => {
                if let Some(other) = codes.insert(id, code) {
                    return Err(ModelError::Convention(format!(
                        "{prefix}{other}{suffix} and {text} are one token, {id}; give every code a token of its own"
                    )));
                }
            }
            None => missing.push(text),
        }
        tokens.push(token);
    }
    let required = format.codes_with_tokens == CodesWithTokens::All;
    if codes.is_empty() || (required && !missing.is_empty()) {
        return Err(ModelError::Convention(format!(
            "tokenizer.json lacks {} of the {} tokens {pattern} of level {level}, for example {}",
            missing.len(),
            format.level_code_counts[level],
            missing.first().map_or("", String::as_str)
        )));
    }
    Ok(Level { tokens, codes, prefix: prefix.to_owned(), suffix: suffix.to_owned() })
}
