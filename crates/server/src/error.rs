//! All errors of a single request: the message for the client and, in one table, its stable type
//! and HTTP status.
//!
//! Invariant: no message holds a path, an address or an internal message. Details for the operator
//! are logged where the error occurs.

use std::borrow::Cow;
use std::fmt;

use beamline_model::convention::text::PromptError;
use beamline_scheduler::{Refusal, Unserved};

/// Most offending ids that a message names.
const NAMED: usize = 100;

/// Longest time that a client is asked to wait, in seconds: the load will have changed by then.
const LONGEST_RETRY: u32 = 60;

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// The body is not JSON at all.
    #[error("the body is not valid JSON: {0}")]
    InvalidJson(String),
    /// The body is JSON of the wrong shape.
    #[error("{message}")]
    InvalidRequest {
        /// What is wrong with the body.
        message: String,
        /// The field that is wrong, if it is one.
        param: Option<String>,
    },
    /// A field has the right type, and a value that is not valid.
    #[error("`{param}` {message}")]
    InvalidValue {
        /// Name of the field.
        param: &'static str,
        /// What is wrong, in words that read on from the name of the field.
        message: Cow<'static, str>,
    },
    /// A field exceeds its limit.
    #[error("`{param}`: {value} {unit}, the limit is {limit}")]
    LimitExceeded {
        /// Name of the field.
        param: &'static str,
        /// The value in the request.
        value: u64,
        /// Unit of value and limit.
        unit: &'static str,
        /// The largest allowed value.
        limit: u64,
    },
    /// No item of the history is in the catalog.
    #[error("no item of `history` is in the catalog: {0}")]
    NoKnownItems(UnknownNames),
    /// `strict_history` was set, and some items are not in the catalog.
    #[error("`history` has items that are not in the catalog: {0}")]
    UnknownItems(UnknownNames),
    /// `strict_filters` was set, and no item has some of the tags.
    #[error("`filters` has tags that no item of the catalog has: {0}")]
    UnknownTags(UnknownNames),
    /// `strict_filters` was set, and some items are not in the catalog.
    #[error("`filters` has items that are not in the catalog: {0}")]
    UnknownFilterItems(UnknownNames),
    /// A token id that the model does not have.
    #[error("`{param}` holds token {token} at position {index}, the vocabulary ends at {last}")]
    TokenOutOfRange {
        /// Name of the field.
        param: &'static str,
        /// Position of the token.
        index: usize,
        /// The token id.
        token: u32,
        /// The largest token id of the model.
        last: usize,
    },
    /// The context has more tokens than the model can take.
    #[error("the context has {len} tokens, the limit is {limit}")]
    ContextTooLong {
        /// Number of tokens of the context.
        len: usize,
        /// Most tokens of a context.
        limit: usize,
    },
    /// A context that cannot be cut has more rows than a step takes.
    #[error(
        "this model computes a context in one step: it has {len} rows, and a step takes at most {limit}. Send a shorter \
         history, or start the server with a higher --max-step-tokens"
    )]
    NeverInOneStep {
        /// Number of rows of the context.
        len: usize,
        /// Most rows of a step.
        limit: usize,
    },
    /// The prompt cannot be turned into a context for the model.
    #[error("`prompt` {0}")]
    Prompt(PromptError),
    /// The request has nothing to compute from.
    #[error("`{param}` gives no token to compute from: send at least one")]
    EmptyContext {
        /// Name of the field.
        param: &'static str,
    },
    /// The history is empty, and the model has no prompt around it.
    #[error(
        "`history` is empty, and this model cannot start cold: its convention puts nothing around a history (no \
         `prompt_prefix`, `prompt_suffix` or `generation_begin`, and no begin token by `add_special_tokens`). Send at least \
         one item, or `prompt` or `token_ids`"
    )]
    NoColdStart,
    /// The history is empty, and the model needs events.
    #[error(
        "`history` is empty, and this model cannot start cold: it reads events and has no other rows to compute from. Send \
         at least one event"
    )]
    EmptyHistory,
    /// None of the candidates is in the catalog.
    #[error("no item of `candidates` is in the catalog: {0}")]
    NoKnownCandidates(UnknownNames),
    /// The model does not perform this task. Holds the tasks that it performs.
    #[error("this model does not answer that: it answers {}", tasks(.0))]
    TaskNotSupported(&'static [&'static str]),
    /// No item has this SID prefix.
    #[error("no item of the catalog has the SID prefix given in `sid_prefix`")]
    UnknownSidPrefix,
    /// No model of this name is served.
    #[error("model {0:?} is not served here; GET /v1/models lists those that are")]
    ModelNotFound(String),
    /// The model is served, and has no label or version as given after the `@`.
    #[error("model {model:?} has no version or label {at:?}: it has {known}")]
    LabelUnknown {
        /// Name of the model.
        model: String,
        /// The label or version that was asked for.
        at: String,
        /// The versions and labels of the model.
        known: String,
    },
    /// No model is loaded.
    #[error("no model is loaded")]
    NoModel,
    /// The model is loaded, but this version is not.
    #[error("the model has no version {given:?} loaded: it has {known}{}", because(*.label))]
    VersionNotFound {
        /// The version that was asked for.
        given: String,
        /// The versions and labels of the model.
        known: String,
        /// Whether the given text is a label of the model.
        label: bool,
    },
    /// The model has no such label.
    #[error("the model has no label {given:?}: it has {known}")]
    LabelNotFound {
        /// The label that was asked for.
        given: String,
        /// The versions and labels of the model.
        known: String,
    },
    /// No such catalog is kept.
    #[error("the version has no such catalog; GET its catalog to see those that are kept")]
    CatalogNotFound,
    /// The state has the version, but it could not be restored.
    #[error(
        "version {version} of model {model:?} could not be brought back at the start: {reason}. Mend that and restart the \
         server, point the label at another version, or unload this one"
    )]
    VersionMissing {
        /// Name of the model.
        model: String,
        /// The version that is missing.
        version: String,
        /// Why it could not be restored.
        reason: String,
    },
    /// A change could not be written to the state, so it was not made.
    #[error(
        "the change could not be written to the state directory, so nothing was changed; the server's log says why"
    )]
    NotKept,
    /// Labels still point at the version that should be unloaded.
    #[error("the labels {} point at this version: move or delete them first", name(.0))]
    VersionLabelled(Vec<String>),
    /// The checkpoint is already loaded under this name.
    #[error("this checkpoint is loaded as version {0}; move a label, change its catalog, or unload it first")]
    AlreadyLoaded(String),
    /// Another load is in progress.
    #[error("another model is being loaded; try again when it is done")]
    LoadInProgress,
    /// The server has no directory to load from.
    #[error("this server loads no models over HTTP: it was started without --model-root")]
    NoModelRoot,
    /// The text is not a valid name; it might be a path.
    #[error(
        "`{param}` is not a valid name: use letters, digits, `_`, `.` and `-`, start with a letter or a digit, use at \
         most 64 characters, and no `..`"
    )]
    InvalidName {
        /// Name of the field.
        param: &'static str,
    },
    /// The root has no checkpoint of this name.
    #[error("there is no such checkpoint under the model root")]
    CheckpointNotFound,
    /// A link leads out of the root.
    #[error("the checkpoint, or a file of it, is a link that leads out of the model root")]
    OutsideRoot,
    /// A checkpoint cannot be served.
    #[error("{message}")]
    Refused {
        /// The reason, as a class.
        why: Refused,
        /// The reason, in full.
        message: String,
    },
    /// Admin routes are closed: the server has no key and does not listen on a loopback address.
    #[error(
        "models and catalogs are changed only over loopback or with an admin key: listen on 127.0.0.1, or start the server \
         with --admin-key-file"
    )]
    AdminDisabled,
    /// The server has no key, and the request came through a proxy.
    #[error(
        "this request came through a proxy (it has `{0}`), so anybody may have sent it: start the server with \
         --admin-key-file and send the key"
    )]
    AdminProxied(String),
    /// The admin key is missing or wrong.
    #[error("send the admin key as `authorization: Bearer KEY`")]
    Unauthorized,
    /// The path does not exist.
    #[error("no such path; GET /openapi.json describes all of them")]
    NotFound,
    /// The path exists, but does not take this method.
    #[error("this path does not take {method}: use {allowed}")]
    MethodNotAllowed {
        /// The method of the request.
        method: String,
        /// The methods that the path takes.
        allowed: String,
    },
    /// The body did not arrive in time.
    #[error("the body did not arrive in time")]
    RequestTimeout,
    /// The body exceeds the limit.
    #[error("the body is larger than {limit} bytes")]
    BodyTooLarge {
        /// Most bytes of a body.
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
    /// Other catalogs are being received or built.
    #[error("other catalogs are being sent and built; try again when they are done")]
    UploadsBusy,
    /// All connections of the server are in use.
    #[error("too many connections are open; try again shortly, and keep connections open between requests")]
    TooManyConnections,
    /// Too many requests are waiting.
    #[error("too many requests are waiting; try again shortly")]
    Overloaded,
    /// By the measured pace, the answer would come after the deadline.
    #[error(
        "too much is waiting: the answer would come after the deadline. Try again in {retry_after} s, or allow more time with \
         `timeout_ms`"
    )]
    Backlog {
        /// Seconds after which there should be room.
        retry_after: u32,
    },
    /// The deadline passed before the answer was ready.
    #[error("the deadline passed before the answer was ready")]
    DeadlineExceeded,
    /// The model is still being loaded.
    #[error("the model is being loaded; try again shortly")]
    Loading,
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Draining,
    /// The engine gives no sign of life.
    #[error("the engine does not respond")]
    Unhealthy,
    /// The model could not compute this request.
    #[error("the model could not compute this request")]
    ComputationFailed,
    /// An internal error, which is a bug.
    #[error("internal error; the server's log has more under this request id")]
    Internal,
}

/// Names that a catalog does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownNames {
    /// The unknown names, each once.
    pub names: Vec<String>,
    /// A suggestion for the first of them, as the end of a message; empty if no name is close.
    pub hint: String,
}

impl fmt::Display for UnknownNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", name(&self.names), self.hint)
    }
}

/// The class of reasons why a checkpoint cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// A file is missing or cannot be read.
    Unreadable,
    /// A weight file is truncated or contradictory.
    Damaged,
    /// config.json asks for something that this build cannot do.
    Unsupported,
    /// Names or shapes of the tensors differ from config.json.
    Mismatch,
    /// Weights are NaN or infinite.
    NotFinite,
    /// The tokenizer lacks the tokens of semantic IDs, or the convention is not known.
    Convention,
    /// The catalog is missing, or has bad records.
    Catalog,
    /// The largest allowed request would not fit into the limits.
    Limits,
    /// There is too little free memory.
    Memory,
    /// The checkpoint loads, but does not answer the probe as it must.
    Probe,
}

/// The type and status of an error, by which clients decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// Stable name of the error type.
    pub kind: &'static str,
    /// HTTP status of the answer.
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

    /// The field that caused the error, if there is one.
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

    /// Seconds after which a retry makes sense, if it does.
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

    /// A model that is not served. Quotes the beginning of the client's text.
    pub fn model_not_found(reference: &str) -> Self {
        Self::ModelNotFound(reference.chars().take(64).collect())
    }

    /// A bug or a failure of the machine. The cause is logged in full, and the client gets no
    /// details.
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
            // Requests that pass the server's own checks fit the limits by construction, see
            // start-up.
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

/// An explanation where a label was given instead of a version.
fn because(label: bool) -> &'static str {
    if label { ". A label is no version here: name the version that it points at" } else { "" }
}

/// The routes of tasks, as text.
fn tasks(tasks: &[&str]) -> String {
    match tasks {
        [] => "nothing over HTTP yet".into(),
        tasks => tasks.iter().map(|task| format!("POST /v1/{task}")).collect::<Vec<_>>().join(" and "),
    }
}

/// The first ids, and the number of the others.
fn name(ids: &[String]) -> String {
    let mut text = ids.iter().take(NAMED).map(|id| format!("{id:?}")).collect::<Vec<_>>().join(", ");
    if ids.len() > NAMED {
        text.push_str(&format!(" and {} more", ids.len() - NAMED));
    }
    text
}
