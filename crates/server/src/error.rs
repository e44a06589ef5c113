//! Everything that can go wrong for one request: the message for the client, and in one table its stable type and
//! HTTP status.
//!
//! Invariant: no message holds a path, an address or an internal message. What is only for the operator is logged
//! where the error is made.

use std::borrow::Cow;
use std::fmt;

use beamline_model::convention::text::PromptError;
use beamline_model::error::ModelError;
use beamline_scheduler::{Refusal, Unserved};

use crate::api::{ErrorBody, ErrorDetail};
use crate::registry::state::StateError;
use crate::runtime::LoadError;

/// How many offending ids a message names.
const NAMED: usize = 100;

/// Longest time that a client is asked to wait, in seconds: the load will be another by then.
const LONGEST_RETRY: u32 = 60;

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
    #[error("no item of `history` is in the catalog: {0}")]
    NoKnownItems(UnknownNames),
    /// `strict_history` was asked, and some items are not in the catalog.
    #[error("`history` has items that are not in the catalog: {0}")]
    UnknownItems(UnknownNames),
    /// `strict_filters` was asked, and no item has some of the tags.
    #[error("`filters` has tags that no item of the catalog has: {0}")]
    UnknownTags(UnknownNames),
    /// `strict_filters` was asked, and some items are not in the catalog.
    #[error("`filters` has items that are not in the catalog: {0}")]
    UnknownFilterItems(UnknownNames),
    /// A token id that the model does not have.
    #[error("`{param}` holds token {token} at position {index}, the vocabulary ends at {last}")]
    TokenOutOfRange {
        /// The field.
        param: &'static str,
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
    /// More rows than a step takes, of a model that cannot cut a context.
    #[error(
        "this model computes a context in one step: it has {len} rows, and a step takes at most {limit}. Send a shorter \
         history, or start the server with a higher --max-step-tokens"
    )]
    NeverInOneStep {
        /// Rows asked for.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// A text that the model cannot be asked with.
    #[error("`prompt` {0}")]
    Prompt(PromptError),
    /// Nothing to compute from.
    #[error("`{param}` gives no token to compute from: send at least one")]
    EmptyContext {
        /// The field.
        param: &'static str,
    },
    /// No items, for a model without a prompt around them.
    #[error(
        "`history` is empty, and this model cannot start cold: its convention puts nothing around a history (no \
         `prompt_prefix`, `prompt_suffix` or `generation_begin`, and no begin token by `add_special_tokens`). Send at least \
         one item, or `prompt` or `token_ids`"
    )]
    NoColdStart,
    /// No events, for a model that needs some.
    #[error(
        "`history` is empty, and this model cannot start cold: it reads events and has no other rows to compute from. Send \
         at least one event"
    )]
    EmptyHistory,
    /// None of the candidates is in the catalog.
    #[error("no item of `candidates` is in the catalog: {0}")]
    NoKnownCandidates(UnknownNames),
    /// The model does something else.
    #[error("this model does not answer that: it answers {}", tasks(.0))]
    TaskNotSupported(&'static [&'static str]),
    /// No item has this prefix.
    #[error("no item of the catalog has the SID prefix given in `sid_prefix`")]
    UnknownSidPrefix,
    /// Another model than those served.
    #[error("model {0:?} is not served here; GET /v1/models lists those that are")]
    ModelNotFound(String),
    /// The model is served, and no label or version of it is what stands after the `@`.
    #[error("model {model:?} is served, but nothing of it is called {at:?}: it has {known}")]
    LabelUnknown {
        /// The model.
        model: String,
        /// What was asked for.
        at: String,
        /// Its versions and labels.
        known: String,
    },
    /// Nothing is loaded.
    #[error("no model is loaded")]
    NoModel,
    /// The model is loaded, this version of it is not.
    #[error("the model has no version {given:?} loaded: it has {known}{}", because(*.label))]
    VersionNotFound {
        /// What was asked for.
        given: String,
        /// Its versions and labels.
        known: String,
        /// Whether that is a label.
        label: bool,
    },
    /// The model has no such label.
    #[error("the model has no label {given:?}: it has {known}")]
    LabelNotFound {
        /// What was asked for.
        given: String,
        /// Its versions and labels.
        known: String,
    },
    /// No such snapshot is kept.
    #[error("the version has no such catalog; GET its catalog to see those that are kept")]
    CatalogNotFound,
    /// The state holds the version, and it could not be brought back.
    #[error(
        "version {version} of model {model:?} could not be brought back at the start: {reason}. Mend that and restart the \
         server, point the label at another version, or unload this one"
    )]
    VersionMissing {
        /// The model.
        model: String,
        /// The version.
        version: String,
        /// Why not.
        reason: String,
    },
    /// A change could not be written, so it was not made.
    #[error(
        "the change could not be written to the state directory, so nothing was changed; the server's log says why"
    )]
    NotKept,
    /// A label still points at what should be unloaded.
    #[error("the labels {} point at this version: move or delete them first", name(.0))]
    VersionLabelled(Vec<String>),
    /// The checkpoint is loaded under this name.
    #[error("this checkpoint is loaded as version {0}; move a label, change its catalog, or unload it first")]
    AlreadyLoaded(String),
    /// Another load is not over.
    #[error("another model is being loaded; try again when it is done")]
    LoadInProgress,
    /// There is no directory to load from.
    #[error("this server loads no models over HTTP: it was started without --model-root")]
    NoModelRoot,
    /// A name that could be a path, or anything else but a name.
    #[error(
        "`{param}` is no name: it must begin with a letter or a digit, go on with those, `_`, `.` and `-`, be at most 64 \
         characters long, and not hold `..`"
    )]
    InvalidName {
        /// The field.
        param: &'static str,
    },
    /// There is nothing under the root by this name.
    #[error("there is no such checkpoint under the model root")]
    CheckpointNotFound,
    /// What a name leads to lies elsewhere.
    #[error("the checkpoint, or a file of it, is a link that leads out of the model root")]
    OutsideRoot,
    /// A checkpoint cannot be served.
    #[error("{message}")]
    Refused {
        /// Why, in short.
        why: Refused,
        /// Why, in full.
        message: String,
    },
    /// The admin routes are not for everybody who can reach this server.
    #[error(
        "models and catalogs are changed only over loopback or with an admin key: listen on 127.0.0.1, or start the server \
         with --admin-key-file"
    )]
    AdminDisabled,
    /// There is no key, and the request came through a proxy.
    #[error(
        "this request came through a proxy (it has `{0}`), so anybody may have sent it: start the server with \
         --admin-key-file and send the key"
    )]
    AdminProxied(String),
    /// No key, or a wrong one.
    #[error("send the admin key as `authorization: Bearer KEY`")]
    Unauthorized,
    /// No such path.
    #[error("no such path; GET /openapi.json describes all of them")]
    NotFound,
    /// The path exists, the method does not.
    #[error("this path does not take {method}: use {allowed}")]
    MethodNotAllowed {
        /// The method that was used.
        method: String,
        /// Those that there are.
        allowed: String,
    },
    /// The body came too slowly.
    #[error("the body did not arrive in time")]
    RequestTimeout,
    /// The body is too large.
    #[error("the body is larger than {limit} bytes")]
    BodyTooLarge {
        /// The limit.
        limit: usize,
    },
    /// The body is not declared to be JSON lines.
    #[error("send the catalog as JSON lines with `content-type: application/x-ndjson`")]
    NotLines,
    /// The body is not declared to be JSON.
    #[error("send the body with `content-type: application/json`")]
    UnsupportedMediaType,
    /// The body is compressed.
    #[error("the body has `content-encoding: {0}`: send it uncompressed, without this header")]
    UnsupportedEncoding(String),
    /// Other catalogs are on their way.
    #[error("other catalogs are being sent and built; try again when they are done")]
    UploadsBusy,
    /// There are as many connections as the server takes.
    #[error("too many connections are open; try again shortly, and keep connections open between requests")]
    TooManyConnections,
    /// Too much to do.
    #[error("too many requests are waiting; try again shortly")]
    Overloaded,
    /// By what waits already, the answer would come too late.
    #[error(
        "too much is waiting: the answer would come after the deadline. Try again in {retry_after} s, or allow more time with \
         `timeout_ms`"
    )]
    Backlog {
        /// Seconds after which there should be room.
        retry_after: u32,
    },
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

/// Names that a catalog does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownNames {
    /// The names, each once.
    pub names: Vec<String>,
    /// The known name that the first of them may stand for, as the end of a message; empty if none is near.
    pub hint: String,
}

impl fmt::Display for UnknownNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", name(&self.names), self.hint)
    }
}

/// Why a checkpoint cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// A file is missing or cannot be read.
    Unreadable,
    /// A weight file is truncated, or contradicts itself.
    Damaged,
    /// config.json asks for what this build cannot do.
    Unsupported,
    /// The tensors have other names or shapes than config.json says.
    Mismatch,
    /// Weights are NaN or infinite.
    NotFinite,
    /// The tokenizer lacks the tokens of semantic IDs, or how they are written is not known.
    Convention,
    /// The catalog is missing, or has bad records.
    Catalog,
    /// A largest request would not fit into the limits.
    Limits,
    /// There is not so much memory free.
    Memory,
    /// It loads, and does not answer as it must.
    Probe,
}

/// What the outside goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// Stable name.
    pub kind: &'static str,
    /// HTTP status.
    pub status: u16,
}

impl From<PromptError> for Error {
    fn from(error: PromptError) -> Self {
        Self::Prompt(error)
    }
}

impl Error {
    /// The table of types and statuses.
    pub fn class(&self) -> Class {
        let (kind, status) = match self {
            Self::InvalidJson(_) => ("invalid_json", 400),
            Self::InvalidRequest { .. } => ("invalid_request", 400),
            Self::Unauthorized => ("unauthorized", 401),
            Self::AdminDisabled | Self::AdminProxied(_) => ("admin_disabled", 403),
            Self::NoModelRoot => ("no_model_root", 403),
            Self::OutsideRoot => ("outside_root", 403),
            Self::NotFound => ("not_found", 404),
            Self::CheckpointNotFound => ("checkpoint_not_found", 404),
            Self::CatalogNotFound => ("catalog_not_found", 404),
            Self::LabelNotFound { .. } => ("label_not_found", 404),
            Self::VersionNotFound { .. } => ("version_not_found", 404),
            Self::ModelNotFound(_) | Self::LabelUnknown { .. } => ("model_not_found", 404),
            Self::MethodNotAllowed { .. } => ("method_not_allowed", 405),
            Self::RequestTimeout => ("request_timeout", 408),
            Self::AlreadyLoaded(_) => ("already_loaded", 409),
            Self::LoadInProgress => ("load_in_progress", 409),
            Self::VersionLabelled(_) => ("version_labelled", 409),
            Self::Refused { why: Refused::Memory, .. } => ("over_memory_budget", 409),
            Self::BodyTooLarge { .. } => ("body_too_large", 413),
            Self::UnsupportedMediaType | Self::NotLines | Self::UnsupportedEncoding(_) => {
                ("unsupported_media_type", 415)
            }
            Self::InvalidName { .. } => ("invalid_name", 422),
            Self::InvalidValue { .. } => ("invalid_value", 422),
            Self::LimitExceeded { .. } => ("limit_exceeded", 422),
            Self::NoKnownItems(_) => ("no_known_items", 422),
            Self::UnknownItems(_) => ("unknown_items", 422),
            Self::UnknownTags(_) => ("unknown_tags", 422),
            Self::UnknownFilterItems(_) => ("unknown_filter_items", 422),
            Self::TokenOutOfRange { .. } => ("token_out_of_range", 422),
            Self::ContextTooLong { .. }
            | Self::NeverInOneStep { .. }
            | Self::Prompt(PromptError::TooLong { .. }) => ("context_too_long", 422),
            Self::Prompt(PromptError::BeyondVocabulary { .. }) => ("token_out_of_range", 422),
            Self::Prompt(PromptError::OnlyUnknown | PromptError::Failed) => ("invalid_value", 422),
            Self::EmptyContext { .. } | Self::NoColdStart => ("empty_context", 422),
            Self::EmptyHistory => ("empty_history", 422),
            Self::NoKnownCandidates(_) => ("no_known_candidates", 422),
            Self::TaskNotSupported(_) => ("task_not_supported", 422),
            Self::UnknownSidPrefix => ("unknown_sid_prefix", 422),
            Self::Refused { why: Refused::Unreadable, .. } => ("checkpoint_unreadable", 422),
            Self::Refused { why: Refused::Damaged, .. } => ("checkpoint_damaged", 422),
            Self::Refused { why: Refused::Unsupported, .. } => ("checkpoint_unsupported", 422),
            Self::Refused { why: Refused::Mismatch, .. } => ("tensors_mismatch", 422),
            Self::Refused { why: Refused::NotFinite, .. } => ("weights_not_finite", 422),
            Self::Refused { why: Refused::Convention, .. } => ("convention_mismatch", 422),
            Self::Refused { why: Refused::Catalog, .. } => ("catalog_refused", 422),
            Self::Refused { why: Refused::Limits, .. } => ("limits_exceeded", 422),
            Self::Refused { why: Refused::Probe, .. } => ("probe_failed", 422),
            Self::Overloaded | Self::Backlog { .. } => ("overloaded", 429),
            Self::UploadsBusy => ("uploads_busy", 429),
            Self::ComputationFailed => ("computation_failed", 500),
            Self::Internal => ("internal", 500),
            Self::Loading => ("loading", 503),
            Self::TooManyConnections => ("too_many_connections", 503),
            Self::NoModel => ("no_model", 503),
            Self::VersionMissing { .. } => ("version_missing", 503),
            Self::NotKept => ("not_kept", 503),
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
            Self::InvalidName { param }
            | Self::InvalidValue { param, .. }
            | Self::LimitExceeded { param, .. }
            | Self::TokenOutOfRange { param, .. }
            | Self::EmptyContext { param } => Some(param),
            Self::CatalogNotFound | Self::VersionNotFound { .. } | Self::VersionLabelled(_) => {
                Some("version")
            }
            Self::LabelNotFound { .. } => Some("label"),
            Self::NoKnownItems(_) | Self::UnknownItems(_) | Self::EmptyHistory | Self::NoColdStart => {
                Some("history")
            }
            Self::UnknownTags(_) | Self::UnknownFilterItems(_) => Some("filters"),
            Self::NoKnownCandidates(_) => Some("candidates"),
            Self::TaskNotSupported(_) => Some("model"),
            Self::Prompt(_) => Some("prompt"),
            Self::UnknownSidPrefix => Some("sid_prefix"),
            Self::ModelNotFound(_) | Self::LabelUnknown { .. } => Some("model"),
            _ => None,
        }
    }

    /// Seconds after which trying again makes sense.
    pub fn retry_after(&self) -> Option<u32> {
        match self {
            Self::Overloaded | Self::TooManyConnections => Some(1),
            Self::Backlog { retry_after } => Some(*retry_after),
            Self::UploadsBusy => Some(5),
            Self::Loading | Self::LoadInProgress | Self::NoModel | Self::Draining | Self::Unhealthy => {
                Some(2)
            }
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

    /// No such model; the beginning of what the client sent is quoted back.
    pub fn model_not_found(reference: &str) -> Self {
        Self::ModelNotFound(reference.chars().take(64).collect())
    }

    /// A checkpoint that was refused. `redact` takes the paths of this machine out of a text.
    pub fn refused(error: &LoadError, redact: impl Fn(&str) -> String) -> Self {
        let why = match error {
            LoadError::Model { source, .. } => match source {
                ModelError::Read { .. } => Refused::Unreadable,
                ModelError::Tensors { .. } | ModelError::Changed { .. } | ModelError::Zeros(_) => {
                    Refused::Damaged
                }
                ModelError::Config(_) | ModelError::Directory(_) => Refused::Unsupported,
                ModelError::Mismatch(_) => Refused::Mismatch,
                ModelError::NotFinite { .. } => Refused::NotFinite,
                ModelError::Tokenizer(_) | ModelError::Convention(_) => Refused::Convention,
                ModelError::Limit(_) => Refused::Limits,
                ModelError::Internal(_) => return Self::internal(error),
            },
            LoadError::Panicked => Refused::Damaged,
            LoadError::Layout { .. } => Refused::Unreadable,
            LoadError::NoConvention(_) => Refused::Convention,
            LoadError::Catalog { .. } | LoadError::NoCatalog { .. } | LoadError::Depth { .. } => {
                Refused::Catalog
            }
            // Of the moment, not of the model.
            LoadError::Probe(error @ (Self::Overloaded | Self::Backlog { .. } | Self::Draining)) => {
                return error.clone();
            }
            LoadError::Limits(_) => Refused::Limits,
            LoadError::Device { .. } => Refused::Unsupported,
            LoadError::Memory(_) => Refused::Memory,
            LoadError::Probe(_) | LoadError::WrongAnswer(_) => Refused::Probe,
            LoadError::NotThere(_) => Refused::Unreadable,
            LoadError::Changed { .. } => Refused::Mismatch,
            LoadError::Settings(_) | LoadError::Engine(_) | LoadError::State(_) | LoadError::Disk(_) => {
                return Self::internal(error);
            }
        };
        Self::Refused { why, message: redact(&error.to_string()) }
    }

    /// A change that could not be written: why is for the operator.
    pub fn not_kept(cause: StateError) -> Self {
        tracing::error!(%cause, "a change was refused: it could not be written to the state directory");
        Self::NotKept
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
            Refusal::Backlog { late } => {
                let seconds = u32::try_from(late.0.div_ceil(1_000_000)).unwrap_or(u32::MAX);
                Self::Backlog { retry_after: seconds.clamp(1, LONGEST_RETRY) }
            }
            Refusal::ShuttingDown => Self::Draining,
            Refusal::DeadlinePassed => Self::DeadlineExceeded,
            Refusal::EmptyContext => Self::EmptyContext { param: "history" },
            Refusal::ContextTooLong { len, limit } => Self::ContextTooLong { len, limit },
            Refusal::NeverInOneStep { len, limit } => Self::NeverInOneStep { len, limit },
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

/// What to do when a label stands where a version is wanted.
fn because(label: bool) -> &'static str {
    if label { ". A label is no version here: name the version that it points at" } else { "" }
}

/// The routes of tasks.
fn tasks(tasks: &[&str]) -> String {
    match tasks {
        [] => "nothing over HTTP yet".into(),
        tasks => tasks.iter().map(|task| format!("POST /v1/{task}")).collect::<Vec<_>>().join(" and "),
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
