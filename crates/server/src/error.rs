//! Everything that can go wrong for one request: the message for the client, and in one table its stable type and
//! HTTP status.
//!
//! Invariant: no message holds a path, an address or an internal message. What is only for the operator is logged
//! where the error is made.

use std::borrow::Cow;

use beamline_scheduler::{Refusal, Unserved};

use crate::api::{ErrorBody, ErrorDetail};

/// How many offending ids a message names.
const NAMED: usize = 100;

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// The body is not JSON at all.
    #[error("the body is not valid JSON: {0}")]
    InvalidJson(String),
    /// The body is JSON of the wrong shape.
    #[error("{message}")]
    InvalidRequest {
        /// What is wrong.
        message: String,
        /// The field.
        param: Option<String>,
    },
    /// A field has the right type and a value that means nothing.
    #[error("`{param}` {message}")]
    InvalidValue {
        /// The field.
        param: &'static str,
        /// What is wrong, to be read after the name of the field.
        message: Cow<'static, str>,
    },
    /// A field is over its limit.
    #[error("`{param}`: {value} {unit}, the limit is {limit}")]
    LimitExceeded {
        /// The field.
        param: &'static str,
        /// What was asked.
        value: u64,
        /// Of what.
        unit: &'static str,
        /// The limit.
        limit: u64,
    },
    /// No item of the history is in the catalog.
    #[error("no item of `history` is in the catalog ({})", name(.0))]
    NoKnownItems(Vec<String>),
    /// `strict_history` was asked, and some items are not in the catalog.
    #[error("`history` has items that are not in the catalog: {}", name(.0))]
    UnknownItems(Vec<String>),
    /// A token id that the model does not have.
    #[error("`token_ids` holds {token} at position {index}, the vocabulary ends at {last}")]
    TokenOutOfRange {
        /// Its position.
        index: usize,
        /// The id.
        token: u32,
        /// The largest id.
        last: usize,
    },
    /// More tokens than the model can take.
    #[error("the context has {len} tokens, the limit is {limit}")]
    ContextTooLong {
        /// Tokens asked for.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// Nothing to compute from.
    #[error("the context is empty: this model has no prompt around a history, so send at least one token")]
    EmptyContext,
    /// No item has this prefix.
    #[error("no item of the catalog has the SID prefix given in `sid_prefix`")]
    UnknownSidPrefix,
    /// Another model than those served.
    #[error("model {0:?} is not served here; GET /v1/models lists those that are")]
    ModelNotFound(String),
    /// No such path.
    #[error("no such path; GET /openapi.json describes all of them")]
    NotFound,
    /// The path exists, the method does not.
    #[error("the path does not take this method")]
    MethodNotAllowed,
    /// The body came too slowly.
    #[error("the body did not arrive in time")]
    RequestTimeout,
    /// The body is too large.
    #[error("the body is larger than {limit} bytes")]
    BodyTooLarge {
        /// The limit.
        limit: usize,
    },
    /// The body is not declared to be JSON.
    #[error("send the body with `content-type: application/json`")]
    UnsupportedMediaType,
    /// Too much to do.
    #[error("too many requests are waiting; try again shortly")]
    Overloaded,
    /// The deadline came first.
    #[error("the deadline passed before the answer was ready")]
    DeadlineExceeded,
    /// The model is still being loaded.
    #[error("the model is being loaded; try again shortly")]
    Loading,
    /// The server is going down.
    #[error("the server is shutting down")]
    Draining,
    /// The engine does not answer.
    #[error("the engine does not respond")]
    Unhealthy,
    /// The model could not compute this request.
    #[error("the model could not compute this request")]
    ComputationFailed,
    /// A bug.
    #[error("internal error; the server's log has more under this request id")]
    Internal,
}

/// What the outside goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// Stable name.
    pub kind: &'static str,
    /// HTTP status.
    pub status: u16,
}

impl Error {
    /// The table of types and statuses.
    pub fn class(&self) -> Class {
        let (kind, status) = match self {
            Self::InvalidJson(_) => ("invalid_json", 400),
            Self::InvalidRequest { .. } => ("invalid_request", 400),
            Self::NotFound => ("not_found", 404),
            Self::ModelNotFound(_) => ("model_not_found", 404),
            Self::MethodNotAllowed => ("method_not_allowed", 405),
            Self::RequestTimeout => ("request_timeout", 408),
            Self::BodyTooLarge { .. } => ("body_too_large", 413),
            Self::UnsupportedMediaType => ("unsupported_media_type", 415),
            Self::InvalidValue { .. } => ("invalid_value", 422),
            Self::LimitExceeded { .. } => ("limit_exceeded", 422),
            Self::NoKnownItems(_) => ("no_known_items", 422),
            Self::UnknownItems(_) => ("unknown_items", 422),
            Self::TokenOutOfRange { .. } => ("token_out_of_range", 422),
            Self::ContextTooLong { .. } => ("context_too_long", 422),
            Self::EmptyContext => ("empty_context", 422),
            Self::UnknownSidPrefix => ("unknown_sid_prefix", 422),
            Self::Overloaded => ("overloaded", 429),
            Self::ComputationFailed => ("computation_failed", 500),
            Self::Internal => ("internal", 500),
            Self::Loading => ("loading", 503),
            Self::Draining => ("draining", 503),
            Self::Unhealthy => ("unhealthy", 503),
            Self::DeadlineExceeded => ("deadline_exceeded", 504),
        };
        Class { kind, status }
    }

    /// The field that is to blame.
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::InvalidRequest { param, .. } => param.as_deref(),
            Self::InvalidValue { param, .. } | Self::LimitExceeded { param, .. } => Some(param),
            Self::NoKnownItems(_) | Self::UnknownItems(_) => Some("history"),
            Self::TokenOutOfRange { .. } => Some("token_ids"),
            Self::UnknownSidPrefix => Some("sid_prefix"),
            Self::ModelNotFound(_) => Some("model"),
            _ => None,
        }
    }

    /// Seconds after which trying again makes sense.
    pub fn retry_after(&self) -> Option<u32> {
        match self {
            Self::Overloaded => Some(1),
            Self::Loading | Self::Draining | Self::Unhealthy => Some(2),
            _ => None,
        }
    }

    /// The JSON that clients see.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorDetail {
                kind: self.class().kind.to_owned(),
                message: self.to_string(),
                param: self.param().map(str::to_owned),
            },
        }
    }

    /// A bug or a failure of the machine: logged in full, told without detail.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!(%cause, "internal error");
        Self::Internal
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::QueueFull { .. } => Self::Overloaded,
            Refusal::ShuttingDown => Self::Draining,
            Refusal::DeadlinePassed => Self::DeadlineExceeded,
            Refusal::EmptyContext => Self::EmptyContext,
            Refusal::ContextTooLong { len, limit } => Self::ContextTooLong { len, limit },
            Refusal::BeamTooWide { width, limit } => Self::LimitExceeded {
                param: "beam_width",
                value: width as u64,
                unit: "beams",
                limit: limit as u64,
            },
            // What the server lets through is made to fit at start-up.
            other => Self::internal(other),
        }
    }
}

impl From<Unserved> for Error {
    fn from(unserved: Unserved) -> Self {
        match unserved {
            Unserved::Refused(refusal) => refusal.into(),
            Unserved::Failed(failure) => {
                tracing::error!(%failure, "the engine failed a request");
                Self::ComputationFailed
            }
            Unserved::Expired(_) => Self::DeadlineExceeded,
            Unserved::Drained => Self::Draining,
            Unserved::Stopped => Self::Unhealthy,
        }
    }
}

/// The first ids, and how many more there are.
fn name(ids: &[String]) -> String {
    let mut text = ids.iter().take(NAMED).map(|id| format!("{id:?}")).collect::<Vec<_>>().join(", ");
    if ids.len() > NAMED {
        text.push_str(&format!(" and {} more", ids.len() - NAMED));
    }
    text
}
