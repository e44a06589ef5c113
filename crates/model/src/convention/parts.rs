//! Prompts put together from parts that were tokenised once.
//!
//! The ids of a prompt are the tokenisation of its one text. Often every code is one token in every
//! surrounding. Then the ids are also the tokens of the text around items and those of the items, one
//! after the other, which costs nothing. This is checked for the whole table, because tokens that were
//! added at different times can be found in different ways. Where it does not hold, every prompt is
//! tokenised as a whole.
//!
//! The check, with all codes of all levels:
//!
//! 1. All codes and markers are added tokens: they are found before a text is split into words.
//! 2. No other added token holds the beginning of a code or a marker, so none can reach into one.
//! 3. Prompts that hold every code give the tokens that the parts give.
//! 4. So do prompts in which codes that are found in different ways stand side by side, in all pairs.

use std::collections::HashMap;

use super::tokenizer::{AddedTokens, Matching};
use super::{Convention, Level};
use crate::error::ModelError;

/// Items of a prompt of the third check.
const ITEMS: usize = 256;

/// Tokens of the text around and between items.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parts {
    empty: Vec<u32>,
    before: Vec<u32>,
    pub(super) between: Vec<u32>,
    after: Vec<u32>,
}

/// A code of every level, by its token.
type Item = Vec<u32>;

impl Parts {
    /// The parts of a convention's prompts, or why there are none.
    pub(super) fn find(
        convention: &Convention,
        added: &AddedTokens,
    ) -> Result<Result<Self, String>, ModelError> {
        if let Some(reason) = no_single_tokens(convention, added) {
            return Ok(Err(reason));
        }
        let Some(parts) = Self::take_apart(convention)? else {
            return Ok(Err("an item is not its tokens one after the other".into()));
        };
        for items in histories(convention, added) {
            let slices = items.iter().map(Vec::as_slice);
            let text = convention.render(slices.clone());
            if parts.compose(convention, slices) != convention.tokenize(&text)? {
                let item = items.first().map_or_else(String::new, |item| convention.text_of(item));
                return Ok(Err(format!(
                    "a prompt with {item} in it is not the tokens of its parts; were some codes added to the tokenizer in another \
                     way than others?"
                )));
            }
        }
        Ok(Ok(parts))
    }

    /// Tokenises prompts of no, one and two items, and takes them apart at the items.
    fn take_apart(convention: &Convention) -> Result<Option<Self>, ModelError> {
        let pick = |last: bool| -> Item {
            let token = |level: &Level| {
                let mut tokens = level.tokens.iter().flatten().copied();
                if last { tokens.next_back() } else { tokens.next() }
            };
            convention.levels.iter().filter_map(token).collect()
        };
        let (a, b) = (pick(false), pick(true));
        let prompt = |items: &[&Item]| {
            convention.tokenize(&convention.render(items.iter().map(|item| item.as_slice())))
        };
        let item = |tokens: &[u32]| -> Vec<u32> {
            convention.begin.into_iter().chain(tokens.iter().copied()).chain(convention.end).collect()
        };
        let find = |ids: &[u32], item: &[u32]| ids.windows(item.len()).position(|window| window == item);
        let (item_a, item_b) = (item(&a), item(&b));
        let (one, two) = (prompt(&[&a])?, prompt(&[&a, &b])?);
        let Some(start) = find(&one, &item_a) else { return Ok(None) };
        let end = start + item_a.len();
        let Some(second) = two.get(end..).and_then(|rest| find(rest, &item_b)) else { return Ok(None) };
        let (before, between, after) =
            (one[..start].to_vec(), two[end..][..second].to_vec(), one[end..].to_vec());
        Ok(Some(Self { empty: prompt(&[])?, before, between, after }))
    }

    /// The prompt of a history.
    pub(super) fn compose<'a>(
        &self,
        convention: &Convention,
        items: impl Iterator<Item = &'a [u32]> + Clone,
    ) -> Vec<u32> {
        if items.clone().next().is_none() {
            return self.empty.clone();
        }
        let mut ids = self.before.clone();
        for (index, tokens) in items.enumerate() {
            if index > 0 {
                ids.extend_from_slice(&self.between);
            }
            ids.extend(convention.begin);
            ids.extend_from_slice(tokens);
            ids.extend(convention.end);
        }
        ids.extend_from_slice(&self.after);
        ids
    }
}

/// Why codes are not single tokens wherever they stand, as far as the list of added tokens tells.
fn no_single_tokens(convention: &Convention, added: &AddedTokens) -> Option<String> {
    let format = &convention.format;
    let markers: Vec<&str> = [&format.item_begin_token, &format.item_end_token]
        .into_iter()
        .flatten()
        .map(|marker| marker.text())
        .collect();
    if let Some(text) = markers.iter().find(|text| !added.contains_key(**text)) {
        return Some(format!("{text:?} is no added token of tokenizer.json"));
    }
    for level in &convention.levels {
        let used = level.tokens.iter().zip(0..).filter(|(token, _)| token.is_some());
        let mut codes = used.map(|(_, code)| level.text(code));
        if let Some(text) = codes.find(|text| !added.contains_key(text)) {
            return Some(format!("{text} is no added token of tokenizer.json"));
        }
    }
    let reaches = |token: &&String| {
        let token = token.as_str();
        let marker = markers.iter().any(|marker| token != *marker && token.contains(marker));
        marker || convention.levels.iter().any(|level| level.is_within(token) && !is_code(convention, token))
    };
    added.keys().filter(reaches).min().map(|token| format!("the token {token:?} may reach into a code"))
}

/// Whether a token has the form of a code of any level, in use or not.
fn is_code(convention: &Convention, token: &str) -> bool {
    convention.levels.iter().any(|level| level.digits(token).is_some())
}

/// Histories whose prompts the parts must explain.
fn histories(convention: &Convention, added: &AddedTokens) -> Vec<Vec<Item>> {
    let tokens: Vec<Vec<u32>> =
        convention.levels.iter().map(|level| level.tokens.iter().flatten().copied().collect()).collect();
    let most = tokens.iter().map(Vec::len).max().unwrap_or(0);
    let item = |index: usize| -> Item { tokens.iter().map(|level| level[index % level.len()]).collect() };
    let all: Vec<Item> = (0..most).map(item).collect();
    let mut histories: Vec<Vec<Item>> = all.chunks(ITEMS).map(<[Item]>::to_vec).collect();
    let (first, last) = (item(0), item(most.saturating_sub(1)));
    histories.extend([
        vec![],
        vec![first.clone()],
        vec![last.clone()],
        vec![first.clone(), last.clone()],
        vec![last.clone(), first.clone(), first.clone()],
    ]);
    let ways: Vec<Vec<u32>> = convention.levels.iter().map(|level| ways(level, added)).collect();
    for (level, tokens) in ways.iter().enumerate() {
        for &token in tokens {
            let mut one = first.clone();
            one[level] = token;
            // The next level, or the first level of the next item.
            for &next in &ways[(level + 1) % ways.len()] {
                match level + 1 < ways.len() {
                    true => {
                        let mut pair = one.clone();
                        pair[level + 1] = next;
                        histories.extend([vec![pair.clone()], vec![pair.clone(), pair]]);
                    }
                    false => {
                        let mut second = first.clone();
                        second[0] = next;
                        histories.push(vec![one.clone(), second]);
                    }
                }
            }
            histories.push(vec![one]);
        }
    }
    histories
}

/// A code for each way in which codes of a level are found, by its token.
fn ways(level: &Level, added: &AddedTokens) -> Vec<u32> {
    let mut ways: HashMap<Option<Matching>, u32> = HashMap::new();
    for (code, token) in level.tokens.iter().enumerate() {
        if let Some(token) = token {
            ways.entry(added.get(&level.text(code as u32)).copied()).or_insert(*token);
        }
    }
    let mut tokens: Vec<u32> = ways.into_values().collect();
    // Every run tries the same prompts in the same order.
    tokens.sort_unstable();
    tokens
}
