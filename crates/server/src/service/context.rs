//! From what a request gives to the tokens of its context, and to where the search begins.

use std::collections::HashSet;
use std::sync::Arc;

use beamline_catalog::{ItemIndex, Node, SymbolTable};
use beamline_model::decode::{self, Step};

use super::family::Decoder;
use super::{Served, history};
use crate::api::{HistoryAction, RecommendRequest};
use crate::error::Error;
use crate::settings::HistoryCut;

/// The context of a request.
pub(super) struct Context {
    /// Its tokens, the forced prefix included.
    pub(super) tokens: Arc<[u32]>,
    /// Where the search begins.
    pub(super) start: Node,
    /// What is generated from there.
    pub(super) steps: Arc<[Step]>,
    /// Known items of the whole history.
    pub(super) seen: Vec<ItemIndex>,
    /// Unknown items of the history, each once.
    pub(super) unknown: Vec<String>,
    /// Known items that were cut off.
    pub(super) dropped: usize,
}

/// A forced SID prefix.
struct Forced {
    node: Node,
    tokens: Vec<u32>,
    steps: Arc<[Step]>,
}

/// Builds the context of a request whose own limits were checked.
pub(super) fn build(
    served: &Served,
    decoder: &Decoder,
    request: &RecommendRequest,
    cut: HistoryCut,
) -> Result<Context, Error> {
    let forced = forced(served, decoder, request)?;
    let limit = served.context_limit;
    let room = limit.saturating_sub(forced.tokens.len());
    let mut context = Context {
        tokens: Arc::default(),
        start: forced.node,
        steps: forced.steps,
        seen: Vec::new(),
        unknown: Vec::new(),
        dropped: 0,
    };
    let mut tokens = if let Some(actions) = &request.history {
        resolve(served, actions, request.strict_history.unwrap_or(false), &mut context)?;
        prompt(served, decoder, room, cut, &mut context)?
    } else if let Some(text) = &request.prompt {
        decoder.convention.tokenize(text).map_err(Error::internal)?
    } else {
        given(served, decoder, request.token_ids.as_deref().unwrap_or_default())?
    };
    tokens.extend(forced.tokens);
    if tokens.is_empty() {
        return Err(Error::EmptyContext);
    }
    if tokens.len() > limit {
        return Err(Error::ContextTooLong { len: tokens.len(), limit });
    }
    context.tokens = tokens.into();
    Ok(context)
}

/// Looks the items of a history up.
fn resolve(
    served: &Served,
    actions: &[HistoryAction],
    strict: bool,
    context: &mut Context,
) -> Result<(), Error> {
    let mut named = HashSet::new();
    for HistoryAction { item_id, .. } in actions {
        match served.catalog.item(item_id) {
            Some(item) => context.seen.push(item),
            None if named.insert(item_id.as_str()) => context.unknown.push(item_id.clone()),
            None => {}
        }
    }
    if strict && !context.unknown.is_empty() {
        return Err(Error::UnknownItems(std::mem::take(&mut context.unknown)));
    }
    if context.seen.is_empty() && !actions.is_empty() {
        return Err(Error::NoKnownItems(std::mem::take(&mut context.unknown)));
    }
    Ok(())
}

/// The prompt of the newest items that fit into `room` tokens.
fn prompt(
    served: &Served,
    decoder: &Decoder,
    room: usize,
    cut: HistoryCut,
    context: &mut Context,
) -> Result<Vec<u32>, Error> {
    let trie = served.catalog.trie();
    let fit = decoder.layout.max_items(room);
    let mut dropped = history::dropped(context.seen.len(), fit, cut);
    loop {
        let kept = &context.seen[dropped.min(context.seen.len())..];
        let paths: Vec<Vec<u32>> = kept
            .iter()
            .map(|&item| {
                let mut path = Vec::new();
                trie.path(served.catalog.leaf_of(item), &mut path);
                path
            })
            .collect();
        let tokens = decoder.convention.prompt(paths.iter().map(Vec::as_slice)).map_err(Error::internal)?;
        // Where items are tokenised as text, their lengths vary and the estimate may be too good.
        if tokens.len() > room && !kept.is_empty() {
            dropped += history::step(fit, cut).max(kept.len() / 16);
            continue;
        }
        context.dropped = dropped.min(context.seen.len());
        return Ok(tokens);
    }
}

/// Token ids that the client gave.
fn given(served: &Served, decoder: &Decoder, tokens: &[u32]) -> Result<Vec<u32>, Error> {
    let vocab = decoder.config.vocab_size;
    // The length first: it is cheaper, and a client that is wrong in both ways learns the more useful.
    if tokens.len() > served.context_limit {
        return Err(Error::ContextTooLong { len: tokens.len(), limit: served.context_limit });
    }
    match tokens.iter().enumerate().find(|(_, token)| **token as usize >= vocab) {
        Some((index, &token)) => Err(Error::TokenOutOfRange { index, token, last: vocab - 1 }),
        None => Ok(tokens.to_vec()),
    }
}

/// The node of the forced prefix, and the tokens that lead there.
fn forced(served: &Served, decoder: &Decoder, request: &RecommendRequest) -> Result<Forced, Error> {
    let (trie, steps) = (served.catalog.trie(), decoder.convention.steps());
    let parts = request.sid_prefix.as_deref().unwrap_or_default();
    if parts.is_empty() {
        return Ok(Forced { node: trie.root(), tokens: Vec::new(), steps: Arc::clone(steps) });
    }
    let depth = served.catalog.depth();
    if parts.len() >= depth {
        return Err(Error::InvalidValue {
            param: "sid_prefix",
            message: format!("must leave a level to generate: at most {} codes", depth - 1).into(),
        });
    }
    let symbols: Option<Vec<u32>> =
        parts.iter().enumerate().map(|(level, part)| decoder.convention.symbol(level, part)).collect();
    let symbols = symbols.ok_or(Error::UnknownSidPrefix)?;
    let node = trie.walk(&symbols).ok_or(Error::UnknownSidPrefix)?;
    let rest = decode::steps_from(steps, parts.len()).ok_or(Error::UnknownSidPrefix)?;
    let mut levels = symbols.iter();
    let tokens = steps[..rest.start].iter().filter_map(|step| match step {
        Step::Level => levels.next().copied(),
        Step::Fixed(token) => Some(*token),
    });
    Ok(Forced { node, tokens: tokens.collect(), steps: steps[rest].into() })
}
