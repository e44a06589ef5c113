//! From what a request gives to its context, of tokens or of events, and to where the search begins.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use beamline_catalog::{ItemIndex, Node};
use beamline_kv_cache::ReuseClass;
use beamline_model::decode::{self, SearchRequest, Step};
use beamline_model::families::hstu::inputs::Prepared;
use beamline_model::loaded::TokenFacts;
use beamline_model::step::ContextShape;
use beamline_model::task::{self, Job, Task};

use super::events::{self, Given};
use super::family::{Family, TokenModel};
use super::{Served, history, nearest};
use crate::api::{HistoryAction, RecommendRequest};
use crate::error::Error;
use crate::settings::HistoryCut;

/// The context of a request.
pub(super) struct Context {
    /// What is computed, the forced prefix included.
    pub(super) input: Input,
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

/// What is computed of a context, by family. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) enum Input {
    /// Tokens, which of their rows another request may reuse, and whether they may be cut.
    Tokens(Arc<[u32]>, ReuseClass, ContextShape),
    /// Events of an HSTU model, which of their rows another request may reuse, and whether they may be cut.
    Events(Arc<Prepared>, ReuseClass, ContextShape),
}

impl Input {
    /// Number of context rows.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Tokens(tokens, ..) => tokens.len(),
            Self::Events(events, ..) => events.context_len(),
        }
    }

    /// What its pages are found by.
    pub(super) fn words(&self) -> Arc<[u32]> {
        match self {
            Self::Tokens(tokens, ..) => Arc::clone(tokens),
            Self::Events(events, ..) => events.words().into(),
        }
    }

    /// The part that another request may reuse.
    pub(super) fn reuse(&self) -> ReuseClass {
        match self {
            Self::Tokens(_, reuse, _) | Self::Events(_, reuse, _) => *reuse,
        }
    }

    /// Whether it may be computed in parts.
    pub(super) fn shape(&self) -> ContextShape {
        match self {
            Self::Tokens(.., shape) | Self::Events(.., shape) => *shape,
        }
    }

    /// The work of computing it, and of searching from there if that is asked for.
    pub(super) fn job(&self, search: Option<SearchRequest>) -> Job {
        let task = search.map_or(Task::Warm, |search| Task::Search(Arc::new(search)));
        let context = match self {
            Self::Tokens(tokens, ..) => task::Context::Tokens(Arc::clone(tokens)),
            Self::Events(events, ..) => task::Context::Events(Arc::clone(events)),
        };
        Job { context, task }
    }
}

/// A forced SID prefix.
struct Forced {
    node: Node,
    tokens: Vec<u32>,
    steps: Arc<[Step]>,
}

impl Forced {
    /// What is generated where the prefix is not a part of the context: the prefix, too, at no cost.
    fn steps_from_the_start(&self) -> Arc<[Step]> {
        self.tokens.iter().map(|&token| Step::Given(token)).chain(self.steps.iter().copied()).collect()
    }
}

/// Builds the context of a request whose own limits were checked, for a model that searches.
pub(super) fn build(served: &Served, request: &RecommendRequest, cut: HistoryCut) -> Result<Context, Error> {
    let forced = forced(served, request)?;
    match &served.family {
        Family::Tokens(model) => of_tokens(served, model, request, cut, forced),
        Family::Hstu(family) => {
            let none = BTreeMap::new();
            let given = Given::of(request, &none, &forced.tokens)?;
            let events::Input { request, seen, unknown, dropped } =
                events::input(served, family, &given, cut)?;
            let prepared = events::prepare(family, request)?;
            let input =
                Input::Events(Arc::new(prepared), family.config.reuse(), family.config.context_shape());
            Ok(Context { input, start: forced.node, steps: forced.steps, seen, unknown, dropped })
        }
    }
}

fn of_tokens(
    served: &Served,
    model: &TokenModel,
    request: &RecommendRequest,
    cut: HistoryCut,
    forced: Forced,
) -> Result<Context, Error> {
    let limit = served.context_limit;
    // What follows the history: the start token of a decoder of its own, or the forced prefix.
    let (behind, steps) = match model.start_token {
        Some(start) => (vec![start], forced.steps_from_the_start()),
        None => (forced.tokens, forced.steps),
    };
    let room = limit.saturating_sub(behind.len());
    let TokenFacts { reuse, shape, vocab_size, .. } = model.facts;
    let mut context = Context {
        input: Input::Tokens(Arc::default(), reuse, shape),
        start: forced.node,
        steps,
        seen: Vec::new(),
        unknown: Vec::new(),
        dropped: 0,
    };
    let (param, mut tokens) = if let Some(actions) = &request.history {
        resolve(served, actions, request.strict_history.unwrap_or(false), &mut context)?;
        ("history", prompt(served, model, room, cut, &mut context)?)
    } else if let Some(text) = &request.prompt {
        ("prompt", model.convention.tokens_of(text, limit)?)
    } else {
        ("token_ids", given(served, request.token_ids.as_deref().unwrap_or_default())?)
    };
    // An encoder needs something to read, whatever follows.
    let read = if model.start_token.is_some() { tokens.len() } else { tokens.len() + behind.len() };
    if read == 0 {
        let cold = request.history.is_some();
        return Err(if cold { Error::NoColdStart } else { Error::EmptyContext { param } });
    }
    tokens.extend(behind);
    if tokens.len() > limit {
        return Err(Error::ContextTooLong { len: tokens.len(), limit });
    }
    in_vocabulary(param, &tokens, vocab_size)?;
    context.input = Input::Tokens(tokens.into(), reuse, shape);
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
        let unknown = std::mem::take(&mut context.unknown);
        return Err(Error::UnknownItems(nearest::items(&served.catalog, unknown)));
    }
    if context.seen.is_empty() && !actions.is_empty() {
        let unknown = std::mem::take(&mut context.unknown);
        return Err(Error::NoKnownItems(nearest::items(&served.catalog, unknown)));
    }
    Ok(())
}

/// The prompt of the newest items that fit into `room` tokens.
fn prompt(
    served: &Served,
    model: &TokenModel,
    room: usize,
    cut: HistoryCut,
    context: &mut Context,
) -> Result<Vec<u32>, Error> {
    let trie = served.catalog.trie();
    let fit = model.layout.max_items(room);
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
        let tokens = model.convention.prompt(paths.iter().map(Vec::as_slice)).map_err(Error::internal)?;
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
fn given(served: &Served, tokens: &[u32]) -> Result<Vec<u32>, Error> {
    // Length is checked before the tokens: it is cheaper, and a client that is wrong in both ways learns
    // the more useful.
    if tokens.len() > served.context_limit {
        return Err(Error::ContextTooLong { len: tokens.len(), limit: served.context_limit });
    }
    Ok(tokens.to_vec())
}

/// Checks tokens wherever they come from: a tokenizer may know more than the model.
fn in_vocabulary(param: &'static str, tokens: &[u32], vocab: usize) -> Result<(), Error> {
    match tokens.iter().enumerate().find(|(_, token)| **token as usize >= vocab) {
        Some((index, &token)) => {
            Err(Error::TokenOutOfRange { param, index, token, last: vocab.saturating_sub(1) })
        }
        None => Ok(()),
    }
}

/// The node of the forced prefix, and the tokens that lead there.
fn forced(served: &Served, request: &RecommendRequest) -> Result<Forced, Error> {
    let (trie, steps, symbols) = (served.catalog.trie(), served.family.steps(), served.family.symbols());
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
        parts.iter().enumerate().map(|(level, part)| symbols.symbol(level, part)).collect();
    let symbols = symbols.ok_or(Error::UnknownSidPrefix)?;
    let node = trie.walk(&symbols).ok_or(Error::UnknownSidPrefix)?;
    let rest = decode::steps_from(steps, parts.len()).ok_or(Error::UnknownSidPrefix)?;
    let mut levels = symbols.iter();
    let tokens = steps[..rest.start].iter().filter_map(|step| match step {
        Step::Level => levels.next().copied(),
        Step::Fixed(token) | Step::Given(token) => Some(*token),
    });
    Ok(Forced { node, tokens: tokens.collect(), steps: steps[rest].into() })
}
