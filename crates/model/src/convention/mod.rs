//! Conventions: from items to tokens and back.
//!
//! Place in the flow: the server turns a history into a prompt here, and the catalog resolves SIDs to tokens here. A
//! [`Convention`] is a [`Format`] bound to the tokenizer of a checkpoint: every token it needs was looked up, none is
//! ever computed from a formula.
//!
//! Invariant: the ids of a prompt are the tokenisation of the one rendered string. Where the tokenizer treats items as
//! separate tokens, as added tokens are, prompts are put together from parts tokenised at load; that this gives the same
//! ids is checked at load on prompts of zero to three items, otherwise the whole string is tokenised every time.

pub mod format;
pub mod presets;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use beamline_catalog::{SidPart, SymbolTable};
use tokenizers::Tokenizer;

use crate::checkpoint::note::Note;
use crate::checkpoint::read_json;
use crate::decode::Step;
use crate::error::ModelError;
use format::{CodesWithTokens, Format, Marker};

/// A convention bound to a tokenizer.
#[derive(Debug)]
pub struct Convention {
    format: Format,
    tokenizer: Tokenizer,
    levels: Vec<Level>,
    begin: Option<u32>,
    end: Option<u32>,
    steps: Arc<[Step]>,
    parts: Option<Parts>,
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

/// Tokens of the text around and between items.
#[derive(Debug, PartialEq, Eq)]
struct Parts {
    empty: Vec<u32>,
    before: Vec<u32>,
    between: Vec<u32>,
    after: Vec<u32>,
}

impl Convention {
    /// Binds a format to the tokenizer.json of a checkpoint directory.
    ///
    /// # Errors
    ///
    /// When the tokenizer is damaged, lacks a token the format needs, or gives one an id the format contradicts.
    pub fn bind(format: Format, checkpoint: &Path, vocab_size: usize) -> Result<Self, ModelError> {
        let json = read_json(&checkpoint.join("tokenizer.json"))?;
        let mut tokenizer = parse_tokenizer(&json)?;
        let bad = |e| ModelError::Tokenizer(format!("{e}"));
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(bad)?;
        let error = |reason: String| ModelError::Convention(reason);
        if format.vocab_size.is_some_and(|size| size != vocab_size) {
            return Err(error(format!(
                "vocab_size is {:?}, config.json says {vocab_size}",
                format.vocab_size
            )));
        }
        let size = tokenizer.get_vocab_size(true);
        if format.tokenizer_size.is_some_and(|expected| expected != size) {
            return Err(error(format!(
                "tokenizer_size is {:?}, the tokenizer has {size}",
                format.tokenizer_size
            )));
        }
        let resolve = |marker: &Marker| marker_token(&tokenizer, marker, vocab_size);
        let begin = format.item_begin_token.as_ref().map(resolve).transpose()?;
        let end = format.item_end_token.as_ref().map(resolve).transpose()?;
        format.generation_begin.as_ref().map(resolve).transpose()?;
        let mut steps = Vec::with_capacity(format.steps());
        for marker in &format.lead_tokens {
            steps.push(Step::Fixed(resolve(marker)?));
        }
        steps.extend(std::iter::repeat_n(Step::Level, format.levels));
        for marker in &format.tail_tokens {
            steps.push(Step::Fixed(resolve(marker)?));
        }
        let levels = (0..format.levels).map(|level| bind_level(&format, &tokenizer, level, vocab_size));
        let levels = levels.collect::<Result<Vec<_>, _>>()?;
        let mut convention = Self {
            format,
            tokenizer,
            levels,
            begin,
            end,
            steps: steps.into(),
            parts: None,
            notes: Vec::new(),
        };
        convention.parts = convention.find_parts()?;
        Ok(convention)
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

    /// Whether prompts are put together from parts instead of being tokenised whole.
    pub fn composes(&self) -> bool {
        self.parts.is_some()
    }

    /// Tokens an item takes in a history, the separator included.
    pub fn tokens_per_item(&self) -> usize {
        let separator = match &self.parts {
            Some(parts) => parts.between.len(),
            None => self.format.item_separator.len(),
        };
        self.levels.len() + usize::from(self.begin.is_some()) + usize::from(self.end.is_some()) + separator
    }

    /// The prompt of a history, oldest item first, each item given by the tokens of its SID (its symbols in the
    /// catalog).
    ///
    /// # Errors
    ///
    /// When the tokenizer fails, which it does not for text.
    pub fn prompt<'a>(&self, items: impl Iterator<Item = &'a [u32]> + Clone) -> Result<Vec<u32>, ModelError> {
        match &self.parts {
            Some(parts) => Ok(self.compose(parts, items)),
            None => self.tokenize(&self.render(items)),
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
            for (level, token) in self.levels.iter().zip(tokens) {
                if let Some(code) = level.codes.get(token) {
                    text.push_str(&format!("{}{code}{}", level.prefix, level.suffix));
                }
            }
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

    fn compose<'a>(&self, parts: &Parts, items: impl Iterator<Item = &'a [u32]> + Clone) -> Vec<u32> {
        if items.clone().next().is_none() {
            return parts.empty.clone();
        }
        let mut ids = parts.before.clone();
        for (index, tokens) in items.enumerate() {
            if index > 0 {
                ids.extend_from_slice(&parts.between);
            }
            ids.extend(self.begin);
            ids.extend_from_slice(tokens);
            ids.extend(self.end);
        }
        ids.extend_from_slice(&parts.after);
        ids
    }

    /// Tokenises prompts of no, one and two items, takes them apart at the items, and keeps the parts if they explain
    /// further prompts too.
    fn find_parts(&self) -> Result<Option<Parts>, ModelError> {
        let pick = |last: bool| -> Vec<u32> {
            let tokens = |level: &Level| {
                let mut with_token = level.tokens.iter().flatten();
                if last { with_token.next_back().copied() } else { with_token.next().copied() }
            };
            self.levels.iter().filter_map(tokens).collect()
        };
        let (a, b) = (pick(false), pick(true));
        let prompt =
            |items: &[&Vec<u32>]| self.tokenize(&self.render(items.iter().map(|item| item.as_slice())));
        let item = |tokens: &[u32]| -> Vec<u32> {
            self.begin.into_iter().chain(tokens.iter().copied()).chain(self.end).collect()
        };
        let find = |ids: &[u32], item: &[u32]| ids.windows(item.len()).position(|window| window == item);
        let (item_a, item_b) = (item(&a), item(&b));
        let one = prompt(&[&a])?;
        let two = prompt(&[&a, &b])?;
        let Some(start) = find(&one, &item_a) else { return Ok(None) };
        let (before, after) = (one[..start].to_vec(), one[start + item_a.len()..].to_vec());
        let Some(second) = two.get(start + item_a.len()..).and_then(|rest| find(rest, &item_b)) else {
            return Ok(None);
        };
        let between = two[start + item_a.len()..][..second].to_vec();
        let parts = Parts { empty: prompt(&[])?, before, between, after };
        for items in [vec![], vec![&a], vec![&b], vec![&a, &b], vec![&b, &a, &a], vec![&a, &b, &b]] {
            if self.compose(&parts, items.iter().map(|item| item.as_slice())) != prompt(&items)? {
                return Ok(None);
            }
        }
        Ok(Some(parts))
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
}

/// Parses tokenizer.json. The library panics on some damage instead of returning an error.
fn parse_tokenizer(json: &str) -> Result<Tokenizer, ModelError> {
    let parsed = std::panic::catch_unwind(|| json.parse::<Tokenizer>());
    let parsed = parsed
        .map_err(|_| ModelError::Tokenizer("is damaged in a way its parser does not survive".into()))?;
    parsed.map_err(|error| ModelError::Tokenizer(error.to_string()))
}

/// The id of a single token.
fn marker_token(tokenizer: &Tokenizer, marker: &Marker, vocab_size: usize) -> Result<u32, ModelError> {
    let text = marker.text();
    // A newline is stored under another name by byte-level tokenizers, so look at what it is tokenised to. What the
    // tokenizer does not know becomes its unknown token, which does not read as the text.
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
                codes.insert(id, code);
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
