//! The answers of the API.

use std::collections::BTreeMap;

use crate::error::Error;
use beamline_catalog::{Catalog, SidPart};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Normalization, SidPartSchema};

/// A list of recommended items, and how it was computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RecommendResponse {
    /// The request's id, also in the header `x-request-id` and in the server's log.
    pub request_id: String,
    /// The model that answered.
    pub model: ModelName,
    /// Content version of the catalog that was searched.
    pub catalog_version: String,
    /// The recommended items, best first.
    pub items: Vec<Item>,
    /// Value of `num_items` in the request.
    pub items_requested: u64,
    /// Number of items in `items`.
    pub items_returned: u64,
    /// History items that the catalog does not have, in order of first mention. They were skipped.
    pub unknown_items: Vec<String>,
    /// Tags of `filters` that no item of the catalog has, in order of first mention.
    pub unknown_tags: Vec<String>,
    /// Items of `filters` that the catalog does not have, in order of first mention.
    pub unknown_filter_items: Vec<String>,
    /// Number of the oldest known history items that were cut off because the model's context is
    /// limited.
    pub dropped_history: u64,
    /// Set when the beam was narrowed to make the deadline.
    pub degraded: Option<Degraded>,
    /// Set when there are fewer items than requested.
    pub reason: Option<Reason>,
    /// What the scores are relative to; null if they are inner products.
    pub normalization: Option<Normalization>,
    /// The work of the request.
    pub usage: Usage,
    /// The time of each stage.
    pub timings_ms: Timings,
}

/// Predictions for the candidates of a request.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct RankResponse {
    /// The request's id, also in the header `x-request-id`.
    pub request_id: String,
    /// The model that answered.
    pub model: ModelName,
    /// Content version of the catalog in which the items were looked up.
    pub catalog_version: String,
    /// The candidates: best first if they have scores, else in the given order.
    pub candidates: Vec<RankedCandidate>,
    /// Candidates that the catalog does not have. They have no predictions.
    pub unknown_candidates: Vec<String>,
    /// History items that the catalog does not have. They were skipped.
    pub unknown_items: Vec<String>,
    /// Number of the oldest known history items that were cut off.
    pub dropped_history: u64,
    /// The work of the request. `beam_width` is the number of candidates that were computed at a
    /// time.
    pub usage: Usage,
    /// The time of each stage.
    pub timings_ms: Timings,
}

/// A candidate with its predictions.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct RankedCandidate {
    /// Id of the item.
    pub item_id: String,
    /// Position by score, from 1; null without scores.
    pub rank: Option<u64>,
    /// Sum of the predictions, weighted by `task_weights`; the only prediction of a model of one
    /// task; else null.
    pub score: Option<f64>,
    /// Predictions by task. A model of semantic IDs predicts `log_probability`: the exact
    /// log-probability of all tokens of the item.
    pub predictions: BTreeMap<String, f64>,
}

/// The answer to a warm request.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct WarmResponse {
    /// The request's id, also in the header `x-request-id`.
    pub request_id: String,
    /// The model that computed the context.
    pub model: ModelName,
    /// History items that the catalog does not have. They were skipped.
    pub unknown_items: Vec<String>,
    /// Number of the oldest known history items that were cut off.
    pub dropped_history: u64,
    /// The work of the request.
    pub usage: Usage,
    /// The time of each stage.
    pub timings_ms: Timings,
}

/// The checkpoint that answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelName {
    /// Name of the model, as requests write it.
    pub name: String,
    /// The first digits of `sha256`.
    pub version: String,
    /// Digest of the checkpoint's files, in hexadecimal.
    pub sha256: String,
    /// Number format of the weights, on which the scores depend: `f32`, `bf16` or `q8_0`.
    pub weight_format: String,
    /// Number format of keys and values of contexts, on which the scores depend: `f32` or `bf16`.
    pub kv_format: String,
}

/// A recommended item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Item {
    /// The client's own id of the item.
    pub item_id: String,
    /// Semantic ID of the item, as the catalog writes it.
    #[schema(value_type = Vec<SidPartSchema>)]
    pub sid: Vec<SidPart>,
    /// Sum of the log-probabilities of the item's generated tokens; for a model that retrieves, the
    /// inner product of user and item. Items that share a semantic ID share the score.
    pub score: f64,
    /// Position in the list, from 1.
    pub rank: u64,
    /// Title of the item, if the catalog has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
}

/// Why there are fewer items than requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// No item passes the filters and the SID prefix.
    FiltersLeaveNothing,
    /// All items that pass are in the answer; there are no more.
    FewerItemsThanRequested,
}

/// Why and how an answer was computed with less than the request asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Degraded {
    /// Why the beam was narrowed.
    pub reason: DegradedReason,
    /// Number of beams requested; of `beam_widths`, the largest.
    pub beam_width_asked: u64,
    /// Estimated time for these beams, in milliseconds.
    pub needed_ms: f64,
    /// Time that was left until the deadline, in milliseconds.
    pub left_ms: f64,
}

/// Why a beam was narrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DegradedReason {
    /// The whole beam was estimated to miss the deadline.
    Deadline,
}

/// The work of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// Number of tokens of the context.
    pub context_tokens: u64,
    /// Number of context tokens that were cached.
    pub cached_tokens: u64,
    /// Number of beams, the largest of `beam_widths`; never more than there are allowed semantic
    /// IDs.
    pub beam_width: u64,
    /// Number of passes through the model.
    pub steps: u64,
}

/// The time of each stage, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Timings {
    /// Waiting for admission to the engine.
    pub queue: f64,
    /// Computing the context of the request.
    pub prefill: f64,
    /// Generating the items, after the context.
    pub decode: f64,
    /// The whole request, from the last byte of the body to the finished answer.
    pub total: f64,
}

/// The models that are served.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ModelList {
    /// One entry per loaded version, by name and version.
    pub models: Vec<ModelInfo>,
    /// Name of the model that answers requests without a model.
    pub default: String,
    /// Name of the model that is being loaded, if any.
    pub loading: Option<String>,
    /// Progress of that load.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_progress: Option<LoadProgress>,
    /// Memory of all versions, including those that finish their last requests.
    pub memory: MemoryBudget,
    /// Versions of the saved state that could not be restored at the start.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<MissingVersion>,
}

/// Progress of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct LoadProgress {
    /// The current stage.
    pub stage: LoadStage,
    /// Number of that stage, from 1.
    pub step: u32,
    /// Number of stages.
    pub steps: u32,
    /// Seconds since the load began.
    pub seconds: u64,
}

/// The stages of a load, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoadStage {
    /// Every byte of the checkpoint is read and checked, and its sha256 is computed.
    Reading,
    /// Weights, catalog and KV pages are put into memory, and the engine is started.
    Building,
    /// The model is asked for items, as clients would.
    Probing,
}

impl LoadStage {
    /// Number of stages.
    pub const STEPS: u32 = Self::Probing.step();

    /// Number of this stage, from 1.
    pub const fn step(self) -> u32 {
        match self {
            Self::Reading => 1,
            Self::Building => 2,
            Self::Probing => 3,
        }
    }
}

/// Memory of all versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct MemoryBudget {
    /// Bytes of weights, KV pages, host memory and catalogs, including those kept for a rollback or
    /// held by requests.
    pub used_bytes: u64,
    /// Most bytes that may be used, if there is a limit.
    pub limit_bytes: Option<u64>,
}

/// Memory of a version, without its catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct MemoryInfo {
    /// Bytes of the weights, at most.
    pub weights_bytes: u64,
    /// Bytes of the KV pages.
    pub kv_bytes: u64,
    /// Bytes of host memory for evicted KV pages, at most.
    pub kv_host_bytes: u64,
    /// Bytes of tables and buffers for the KV pages on disk, at most.
    pub kv_disk_bytes: u64,
}

/// A version of a model that is served.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ModelInfo {
    /// Name of the model, as requests write it.
    pub name: String,
    /// The first digits of `sha256`.
    pub version: String,
    /// Digest of the checkpoint's files, in hexadecimal.
    pub sha256: String,
    /// Number format of the weights, on which the scores depend: `f32`, `bf16` or `q8_0`.
    pub weight_format: String,
    /// Number format of keys and values of contexts, on which the scores depend: `f32` or `bf16`.
    pub kv_format: String,
    /// Family of the model.
    pub family: String,
    /// Architecture, as config.json names it.
    pub architecture: String,
    /// Number of values in the checkpoint.
    pub parameters: u64,
    /// Most tokens of a context.
    pub context_limit: u64,
    /// Most history items that a context holds; longer histories are cut at the old end.
    pub max_history_items: u64,
    /// Number of levels of a semantic ID.
    pub levels: u64,
    /// Number of tokens generated per item; 0 for a model that generates none.
    pub generated_steps: u64,
    /// Tasks that the model answers: `recommend`, `rank`.
    pub tasks: Vec<String>,
    /// The catalog that serves.
    pub catalog: CatalogInfo,
    /// Memory that the version takes.
    pub memory: MemoryInfo,
    /// Labels that point at the version.
    pub labels: Vec<String>,
    /// Whether the version, its labels and its catalog survive a restart: the server keeps them
    /// under `--state`.
    pub durable: bool,
    /// Whether the model takes requests.
    pub state: ModelState,
}

/// Whether a model takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelState {
    /// The model takes requests.
    Ready,
    /// The server is shutting down.
    Draining,
    /// The version was unloaded, and its memory is free.
    Unloaded,
}

/// A catalog snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct CatalogInfo {
    /// Content version of the catalog.
    pub version: String,
    /// Number of items.
    pub items: u64,
    /// Number of distinct semantic IDs.
    pub leaves: u64,
    /// Bytes of items, names and trie.
    pub memory_bytes: u64,
}

impl CatalogInfo {
    /// Describes a catalog, with the memory that was counted for it.
    pub fn of(catalog: &Catalog, memory_bytes: usize) -> Self {
        Self {
            version: catalog.version().to_owned(),
            items: catalog.num_items() as u64,
            leaves: catalog.num_leaves() as u64,
            memory_bytes: memory_bytes as u64,
        }
    }
}

/// The catalogs of a version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct CatalogList {
    /// The version that the catalogs belong to.
    pub model: ModelName,
    /// The catalog that new requests get.
    pub current: String,
    /// All catalogs that are kept, in the order of their arrival.
    pub versions: Vec<CatalogInfo>,
    /// Whether they survive a restart: the server keeps them under `--state`.
    pub durable: bool,
}

/// A version of the saved state that could not be restored at the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct MissingVersion {
    /// Name of its model.
    pub name: String,
    /// The version, by its digits.
    pub version: String,
    /// Labels that point at it. Requests for them are refused.
    pub labels: Vec<String>,
    /// Why it could not be restored.
    pub reason: String,
}

/// The answer when a label was deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct LabelDeleted {
    /// Name of its model.
    pub name: String,
    /// The deleted label.
    pub label: String,
    /// Whether the change survives a restart: the server keeps it under `--state`.
    pub durable: bool,
}

/// The answer of a health check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Health {
    /// `ok`; or `degraded` while versions of the state are missing.
    pub status: String,
    /// Versions of the saved state that could not be restored.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<MissingVersion>,
}

impl Health {
    /// The health of a server, depending on which versions are missing.
    pub fn but_for(missing: Vec<MissingVersion>) -> Self {
        Self { status: if missing.is_empty() { "ok" } else { "degraded" }.into(), missing }
    }
}

/// The body of every error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// Details of the error.
    pub error: ErrorDetail,
}

impl From<&Error> for ErrorBody {
    fn from(error: &Error) -> Self {
        Self {
            error: ErrorDetail {
                kind: error.class().kind.to_owned(),
                message: error.to_string(),
                param: error.param().map(str::to_owned),
            },
        }
    }
}

/// Details of an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// Stable type of the error, for use in code.
    #[serde(rename = "type")]
    pub kind: String,
    /// A message for people.
    pub message: String,
    /// The field that caused the error, if there is one.
    pub param: Option<String>,
}
