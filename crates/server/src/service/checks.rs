//! Limits of a request that its JSON alone can break: checked before anything is looked up or computed.

use std::borrow::Cow;
use std::time::Duration;

use super::clip;
use crate::api::{Filters, HistoryAction, RecommendRequest, timestamp};
use crate::error::Error;
use crate::settings::RequestLimits;

/// What is asked, with defaults applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) num_items: usize,
    pub(super) beam_width: usize,
    pub(super) timeout: Option<Duration>,
    pub(super) allow_degraded: bool,
}

impl Asked {
    /// So many beams, and as many items.
    pub(super) fn of_width(width: usize) -> Self {
        Self { num_items: width, beam_width: width, timeout: None, allow_degraded: false }
    }
}

/// Items when the request does not say.
const DEFAULT_ITEMS: u64 = 10;

/// Checks a request for items.
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
    let beam_width = request.beam_width.unwrap_or(num_items.max(limits.default_beam_width as u64));
    if beam_width == 0 {
        return Err(invalid("beam_width", "must be at least 1"));
    }
    at_most("beam_width", beam_width, "beams", limits.max_beam_width)?;
    if beam_width < num_items {
        return Err(invalid(
            "beam_width",
            format!("is {beam_width}, but {num_items} items are asked for: it must be at least as many"),
        ));
    }
    Ok(Asked {
        num_items: num_items as usize,
        beam_width: beam_width as usize,
        timeout,
        allow_degraded: request.allow_degraded.unwrap_or(false),
    })
}

/// Checks what every request has, and returns its timeout.
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
