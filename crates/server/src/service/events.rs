//! Turns the fields of a request into the input of an HSTU model: item rows, actions, times,
//! features.
//!
//! The rules are those of a decoder's history. Unknown items are skipped and named, or are an error
//! if the request asks for that. A history that is too long is cut at the old end in coarse steps.
//! Fields that the model reads must be given: a missing time or action is an error, never a guess.

use std::collections::{BTreeMap, HashSet};

use beamline_catalog::ItemIndex;
use beamline_model::families::hstu::inputs::{Candidates, Events, InputError, Prepared, Request};

use super::family::HstuFamily;
use super::{Served, clip, history, nearest};
use crate::api::{HistoryAction, RecommendRequest};
use crate::error::Error;
use crate::settings::HistoryCut;

/// The fields of a request that an HSTU model reads.
pub(super) struct Given<'a> {
    pub(super) history: &'a [HistoryAction],
    pub(super) strict: bool,
    pub(super) query_time: Option<i64>,
    /// Features of the user, by name.
    pub(super) features: &'a BTreeMap<String, Vec<u32>>,
    /// Tokens that follow the history, at the time of the query: the first codes of a semantic ID.
    pub(super) prefix: &'a [u32],
}

impl<'a> Given<'a> {
    /// The fields of a request for items.
    pub(super) fn of(
        request: &'a RecommendRequest,
        none: &'a BTreeMap<String, Vec<u32>>,
        prefix: &'a [u32],
    ) -> Result<Self, Error> {
        let Some(history) = &request.history else {
            let message = "this model reads events: give `history`".into();
            return Err(Error::InvalidRequest { message, param: Some("history".into()) });
        };
        Ok(Self {
            history,
            strict: request.strict_history.unwrap_or(false),
            query_time: request.query_time,
            features: request.features.as_ref().unwrap_or(none),
            prefix,
        })
    }
}

/// The input of a model, and the items that were left out.
pub(super) struct Input {
    pub(super) request: Request,
    /// Known items of the whole history, including those that were cut off.
    pub(super) seen: Vec<ItemIndex>,
    /// Unknown items of the history, each once.
    pub(super) unknown: Vec<String>,
    /// Number of known items that were cut off.
    pub(super) dropped: usize,
}

fn invalid(param: &'static str, message: String) -> Error {
    Error::InvalidValue { param, message: message.into() }
}

/// The row of an item in the model's table, which is its semantic ID.
pub(super) fn row(served: &Served, item: ItemIndex) -> u32 {
    let mut path = Vec::new();
    served.catalog.trie().path(served.catalog.leaf_of(item), &mut path);
    path.first().copied().unwrap_or_default()
}

/// The values of each feature, in the order of the model.
pub(super) fn features(
    param: &'static str,
    names: &[&str],
    given: Option<&BTreeMap<String, u32>>,
    whose: &dyn Fn() -> String,
) -> Result<Vec<u32>, Error> {
    if let Some(unknown) = given.and_then(|given| given.keys().find(|name| !names.contains(&name.as_str()))) {
        return Err(invalid(param, format!("has {:?}, which this model does not read", clip(unknown))));
    }
    let value = |name: &&str| {
        given
            .and_then(|given| given.get(*name))
            .copied()
            .ok_or_else(|| invalid(param, format!("lacks {name:?} for {}: this model reads it", whose())))
    };
    names.iter().map(value).collect()
}

/// Reads the history and the fields that go with it.
pub(super) fn input(
    served: &Served,
    family: &HstuFamily,
    given: &Given<'_>,
    cut: HistoryCut,
) -> Result<Input, Error> {
    let (mut known, mut unknown, mut named) = (Vec::new(), Vec::new(), HashSet::new());
    for (index, action) in given.history.iter().enumerate() {
        match served.catalog.item(&action.item_id) {
            Some(item) => known.push((index, item, action)),
            None if named.insert(action.item_id.as_str()) => unknown.push(action.item_id.clone()),
            None => {}
        }
    }
    if given.strict && !unknown.is_empty() {
        return Err(Error::UnknownItems(nearest::items(&served.catalog, unknown)));
    }
    if known.is_empty() && !given.history.is_empty() {
        return Err(Error::NoKnownItems(nearest::items(&served.catalog, unknown)));
    }
    let seen = known.iter().map(|(_, item, _)| *item).collect();
    let dropped = history::dropped(known.len(), family.max_items(given.prefix.len()), cut).min(known.len());
    let (reads_times, reads_actions) = (family.config.reads_times(), family.config.reads_actions());
    let query_time = match given.query_time {
        Some(time) => time,
        None if reads_times => {
            let message = "is missing: this model reads times, and an answer depends on when it is asked for";
            return Err(invalid("query_time", message.into()));
        }
        None => 0,
    };
    let names = family.config.item_features();
    let mut events = Events { additional: vec![Vec::new(); names.len()], ..Events::default() };
    let mut path = Vec::new();
    for (index, item, action) in &known[dropped..] {
        // Each event takes a row of the item table, or the tokens of a semantic ID: one context row
        // each.
        served.catalog.trie().path(served.catalog.leaf_of(*item), &mut path);
        events.items.extend_from_slice(&path);
        if reads_times {
            let missing = || format!("is missing for event {index}: this model reads times");
            let time = action.timestamp.ok_or_else(|| invalid("history.timestamp", missing()))?;
            events.times.extend(path.iter().map(|_| time));
        }
        if reads_actions {
            let number = action_number(*index, action.action.as_deref())?;
            events.actions.extend(path.iter().map(|_| number));
        }
        let whose = || format!("event {index}");
        for (ids, id) in events.additional.iter_mut().zip(features(
            "history.features",
            &names,
            action.features.as_ref(),
            &whose,
        )?) {
            ids.push(id);
        }
    }
    events.items.extend_from_slice(given.prefix);
    if reads_times {
        events.times.extend(given.prefix.iter().map(|_| query_time));
    }
    if let Some(action) = family.config.generated_action() {
        events.actions.extend(given.prefix.iter().map(|_| action));
    }
    let contextual = user_features(family, given)?;
    let request = Request { events, contextual, query_time, candidates: Candidates::default() };
    Ok(Input { request, seen, unknown, dropped })
}

/// Values of the features of a user, in the order of the model's names.
fn user_features(family: &HstuFamily, given: &Given<'_>) -> Result<Vec<Vec<u32>>, Error> {
    let names = family.config.user_features();
    if let Some(name) = given.features.keys().find(|name| !names.contains(&name.as_str())) {
        return Err(invalid("features", format!("has {:?}, which this model does not read", clip(name))));
    }
    Ok(names.iter().map(|name| given.features.get(*name).cloned().unwrap_or_default()).collect())
}

/// Parses an action, which must be a number that the model knows.
fn action_number(index: usize, action: Option<&str>) -> Result<u32, Error> {
    let Some(text) = action else {
        return Err(invalid(
            "history.action",
            format!("is missing for event {index}: this model reads actions"),
        ));
    };
    text.parse().map_err(|_| {
        let message =
            format!("is {:?} for event {index}: this model takes the numbers of actions", clip(text));
        invalid("history.action", message)
    })
}

/// Checks an input against the model.
pub(super) fn prepare(family: &HstuFamily, request: Request) -> Result<Prepared, Error> {
    family.config.prepare(request).map_err(|error| {
        let message = error.to_string();
        match error {
            InputError::NoEvents => Error::EmptyHistory,
            InputError::TooManyEvents { events, most } => Error::LimitExceeded {
                param: "history",
                value: events as u64,
                unit: "events",
                limit: most as u64,
            },
            InputError::TooManyCandidates { candidates, most } => Error::LimitExceeded {
                param: "candidates",
                value: candidates as u64,
                unit: "candidates",
                limit: most as u64,
            },
            InputError::TimesRunBackwards { .. } => {
                Error::InvalidValue { param: "history.timestamp", message: format!(": {message}").into() }
            }
            InputError::TimeOutOfRange(_) => Error::InvalidValue {
                param: "query_time",
                message: format!("or a timestamp: {message}").into(),
            },
            InputError::Count { .. } | InputError::UnknownId { .. } => {
                Error::InvalidRequest { message, param: None }
            }
            InputError::NoRanking | InputError::TooDeep { .. } | InputError::NeedsWholeContext => {
                Error::internal(message)
            }
        }
    })
}
