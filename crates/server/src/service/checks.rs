//! Limits that a request's JSON alone can break. They are checked before any look-up or
//! computation.

use std::borrow::Cow;
use std::time::Duration;

use super::clip;
use crate::api::{Filters, HistoryAction, RecommendRequest, timestamp};
use crate::error::Error;
use crate::settings::RequestLimits;

/// The wishes of a request, with defaults applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) num_items: usize,
    /// The widest beam of all levels.
    pub(super) beam_width: usize,
    /// A width for each level, where the widths may differ.
    pub(super) beam_widths: Option<Vec<usize>>,
    pub(super) timeout: Option<Duration>,
    pub(super) allow_degraded: bool,
}

impl Asked {
    /// The widths of the levels, if they are not all the same.
    pub(super) fn differing_widths(&self) -> Option<&[usize]> {
        self.beam_widths.as_deref().filter(|widths| widths.windows(2).any(|pair| pair[0] != pair[1]))
    }

    /// Asks for `width` beams and as many items.
    pub(super) fn of_width(width: usize) -> Self {
        Self { num_items: width, beam_width: width, beam_widths: None, timeout: None, allow_degraded: false }
    }
}

/// Number of items when the request does not say.
const DEFAULT_ITEMS: u64 = 10;

/// Checks the limits of a request for items.
pub(super) fn recommend(request: &RecommendRequest, limits: &RequestLimits) -> Result<Asked, Error> {
    let timeout = common(request, limits)?;
    if let Some(filters) = &request.filters {
        check_filters(filters, limits)?;
    }
    if let Some(parts) = &request.sid_prefix {
        at_most("sid_prefix", parts.len() as u64, "codes", limits.max_list_items)?;
    }
    let most_items = limits.max_num_items as u64;
    let num_items = request.num_items.unwrap_or(DEFAULT_ITEMS.min(most_items));
    if num_items == 0 {
        return Err(invalid("num_items", "must be at least 1"));
    }
    at_most("num_items", num_items, "items", limits.max_num_items)?;
    let default = num_items.max(limits.default_beam_width as u64);
    let beam_widths = match (&request.beam_widths, request.beam_width) {
        (None, width) => {
            check_width("beam_width", width.unwrap_or(default), num_items, limits)?;
            None
        }
        (Some(_), Some(_)) => {
            let message = "give only one of beam_width and beam_widths".into();
            return Err(Error::InvalidRequest { message, param: Some("beam_widths".into()) });
        }
        (Some(widths), None) => {
            at_most("beam_widths", widths.len() as u64, "widths", limits.max_list_items)?;
            let Some((last, before)) = widths.split_last() else {
                return Err(invalid("beam_widths", "is empty: give a width for each level"));
            };
            before.iter().try_for_each(|&width| check_width("beam_widths", width, 1, limits))?;
            check_width("beam_widths", *last, num_items, limits)?;
            Some(widths.iter().map(|&width| width as usize).collect::<Vec<_>>())
        }
    };
    let widest = beam_widths.iter().flatten().max().copied();
    Ok(Asked {
        num_items: num_items as usize,
        beam_width: widest.unwrap_or(request.beam_width.unwrap_or(default) as usize),
        beam_widths,
        timeout,
        allow_degraded: request.allow_degraded.unwrap_or(false),
    })
}

/// Checks that a beam is neither too wide nor too narrow for `items` items.
fn check_width(param: &'static str, width: u64, items: u64, limits: &RequestLimits) -> Result<(), Error> {
    if width == 0 {
        return Err(invalid(param, "must be at least 1"));
    }
    at_most(param, width, "beams", limits.max_beam_width)?;
    if width < items {
        let what = if param == "beam_width" { "is" } else { "ends with" };
        let message = format!("{what} {width}, but {items} items are asked for: it must be at least as many");
        return Err(invalid(param, message));
    }
    Ok(())
}

/// Checks that there is a width for each generated level.
pub(super) fn widths_of_levels(asked: &Asked, levels: usize) -> Result<(), Error> {
    match asked.beam_widths.as_ref().map(Vec::len) {
        Some(_) if levels == 0 => {
            Err(invalid("beam_widths", "has no meaning here: no level of a semantic ID is generated"))
        }
        Some(given) if given != levels => Err(invalid(
            "beam_widths",
            format!("has {given} widths, but the levels generated are {levels}: give one for each"),
        )),
        _ => Ok(()),
    }
}

/// Checks the fields that every request has, and returns its timeout.
pub(super) fn common(request: &RecommendRequest, limits: &RequestLimits) -> Result<Option<Duration>, Error> {
    let given: Vec<&str> = [
        ("history", request.history.is_some()),
        ("token_ids", request.token_ids.is_some()),
        ("prompt", request.prompt.is_some()),
    ]
    .into_iter()
    .filter_map(|(name, given)| given.then_some(name))
    .collect();
    match given.as_slice() {
        [_] => {}
        [] => {
            let message =
                "give one of `history`, `token_ids` and `prompt` (an empty history asks for a cold start)";
            return Err(Error::InvalidRequest { message: message.into(), param: Some("history".into()) });
        }
        [.., last] => {
            let message = format!("give only one of {}", given.join(", "));
            return Err(Error::InvalidRequest { message, param: Some((*last).to_owned()) });
        }
    }
    for (param, text) in [("user_id", &request.user_id), ("model", &request.model)] {
        if let Some(text) = text {
            string(param, text, limits)?;
        }
    }
    if let Some(tenant) = &request.tenant {
        string("tenant", tenant, limits)?;
        if tenant.is_empty() || tenant.chars().any(char::is_control) {
            return Err(invalid(
                "tenant",
                format!("is {:?}: it must be printable and not empty", clip(tenant)),
            ));
        }
    }
    if let Some(actions) = &request.history {
        history(actions, limits)?;
    }
    if let Some(time) = request.query_time {
        timestamp::check(time).map_err(|message| invalid("query_time", message))?;
    }
    if let Some(prompt) = &request.prompt {
        at_most("prompt", prompt.len() as u64, "bytes", limits.max_prompt_bytes)?;
    }
    match request.timeout_ms {
        Some(0) => Err(invalid("timeout_ms", "must be at least 1")),
        Some(timeout) => {
            let most = usize::try_from(limits.max_timeout.as_millis()).unwrap_or(usize::MAX);
            at_most("timeout_ms", timeout, "ms", most)?;
            Ok(Some(Duration::from_millis(timeout)))
        }
        None => Ok(None),
    }
}

fn history(actions: &[HistoryAction], limits: &RequestLimits) -> Result<(), Error> {
    at_most("history", actions.len() as u64, "items", limits.max_history_items)?;
    let wrong = |message: String| invalid("history.timestamp", message);
    for (index, action) in actions.iter().enumerate() {
        string("history.item_id", &action.item_id, limits)?;
        if let Some(name) = &action.action {
            string("history.action", name, limits)?;
        }
        if let Some(time) = action.timestamp {
            timestamp::check(time).map_err(|message| wrong(format!("of event {index} {message}")))?;
        }
    }
    timestamp::check_order(actions.iter().map(|action| action.timestamp)).map_err(wrong)
}

fn check_filters(filters: &Filters, limits: &RequestLimits) -> Result<(), Error> {
    let empty = Vec::new();
    let lists = [
        ("filters.exclude_items", &filters.exclude_items),
        ("filters.require_tags", &filters.require_tags),
        ("filters.forbid_tags", &filters.forbid_tags),
        ("filters.allow_items", filters.allow_items.as_ref().unwrap_or(&empty)),
    ];
    for (param, list) in lists {
        at_most(param, list.len() as u64, "entries", limits.max_list_items)?;
        list.iter().try_for_each(|entry| string(param, entry, limits))?;
    }
    Ok(())
}

pub(super) fn string(param: &'static str, text: &str, limits: &RequestLimits) -> Result<(), Error> {
    at_most(param, text.len() as u64, "bytes", limits.max_string_bytes)
}

pub(super) fn at_most(
    param: &'static str,
    value: u64,
    unit: &'static str,
    limit: usize,
) -> Result<(), Error> {
    let limit = limit as u64;
    if value > limit { Err(Error::LimitExceeded { param, value, unit, limit }) } else { Ok(()) }
}

fn invalid(param: &'static str, message: impl Into<Cow<'static, str>>) -> Error {
    Error::InvalidValue { param, message: message.into() }
}
