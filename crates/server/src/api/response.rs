//! What is answered.

use std::collections::BTreeMap;

use beamline_catalog::{Catalog, SidPart};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Normalization, SidPartSchema};

/// A slate and how it came about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RecommendResponse {
    /// The request's id, also in the header `x-request-id` and in the server's log.
    pub request_id: String,
    /// The model that answered.
    pub model: ModelName,
    /// Content version of the catalog that was searched.
    pub catalog_version: String,
    /// The slate, best first.
    pub items: Vec<Item>,
    /// `num_items` of the request.
    pub items_requested: u64,
    /// Length of `items`.
    pub items_returned: u64,
    /// History items that the catalog does not have, in order of first mention. They were skipped.
    pub unknown_items: Vec<String>,
    /// Tags of `filters` that no item of the catalog has, in order of first mention.
    pub unknown_tags: Vec<String>,
    /// Items of `filters` that the catalog does not have, in order of first mention.
    pub unknown_filter_items: Vec<String>,
    /// Oldest known history items that were cut off because the model's context is limited.
    pub dropped_history: u64,
    /// Set when the beam was narrowed to make the deadline.
    pub degraded: Option<Degraded>,
    /// Set when there are fewer items than requested.
    pub reason: Option<Reason>,
    /// What the scores are relative to; null where they are inner products.
    pub normalization: Option<Normalization>,
    /// What the request used.
    pub usage: Usage,
    /// Where the time went.
    pub timings_ms: Timings,
}

/// Predictions for candidates.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct RankResponse {
    /// The request's id.
    pub request_id: String,
    /// The model.
    pub model: ModelName,
    /// Content version of the catalog in which the items were looked up.
    pub catalog_version: String,
    /// The candidates: best first if they have scores, else as they were given.
    pub candidates: Vec<RankedCandidate>,
    /// Candidates that the catalog does not have: nothing is predicted for them.
    pub unknown_candidates: Vec<String>,
    /// History items that the catalog does not have. They were skipped.
    pub unknown_items: Vec<String>,
    /// Oldest known history items that were cut off.
    pub dropped_history: u64,
    /// What the request used. `beam_width` is how many candidates were computed at a time.
    pub usage: Usage,
    /// Where the time went.
    pub timings_ms: Timings,
}

/// A candidate with its predictions.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct RankedCandidate {
    /// The item.
    pub item_id: String,
    /// Place by score, from 1; null without scores.
    pub rank: Option<u64>,
    /// Sum of the predictions, weighted by `task_weights`; the only prediction of a model of one task; else null.
    pub score: Option<f64>,
    /// By task. A model of semantic IDs predicts `log_probability`: that of all tokens of the item, exactly.
    pub predictions: BTreeMap<String, f64>,
}

/// The answer to a warm request.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct WarmResponse {
    /// The request's id.
    pub request_id: String,
    /// The model.
    pub model: ModelName,
    /// History items that the catalog does not have. They were skipped.
    pub unknown_items: Vec<String>,
    /// Oldest known history items that were cut off.
    pub dropped_history: u64,
    /// What the request used.
    pub usage: Usage,
    /// Where the time went.
    pub timings_ms: Timings,
}

/// Which checkpoint answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelName {
    /// Name by which it is asked for.
    pub name: String,
    /// The beginning of `sha256`.
    pub version: String,
    /// Digest of the checkpoint's files.
    pub sha256: String,
    /// How the weights are kept, which the scores depend on: `f32`, `bf16` or `q8_0`.
    pub weight_format: String,
    /// How keys and values of contexts are kept, which the scores depend on: `f32` or `bf16`.
    pub kv_format: String,
}

/// A recommended item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Item {
    /// The client's id.
    pub item_id: String,
    /// Its semantic ID as the catalog writes it.
    #[schema(value_type = Vec<SidPartSchema>)]
    pub sid: Vec<SidPart>,
    /// Sum of the log-probabilities of its generated tokens; of a model that retrieves, the inner product of user and item. Items
    /// that share a semantic ID share the score.
    pub score: f64,
    /// Place in the slate, from 1.
    pub rank: u64,
    /// Its title, if the catalog has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
}

/// Why there are fewer items than requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// No item passes the filters and the SID prefix.
    FiltersLeaveNothing,
    /// All items that pass are in the answer, and there are no more.
    FewerItemsThanRequested,
}

/// Why and how an answer is less than what was asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Degraded {
    /// Why.
    pub reason: DegradedReason,
    /// Beams asked for; of `beam_widths` the widest.
    pub beam_width_asked: u64,
    /// Milliseconds that they were estimated to take.
    pub needed_ms: f64,
    /// Milliseconds that were left.
    pub left_ms: f64,
}

/// Why a beam was narrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DegradedReason {
    /// The whole beam was estimated to miss the deadline.
    Deadline,
}

/// What a request used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// Tokens of the context.
    pub context_tokens: u64,
    /// Those of them that were cached.
    pub cached_tokens: u64,
    /// Beams, of `beam_widths` the widest; never more than there are allowed semantic IDs.
    pub beam_width: u64,
    /// Passes through the model.
    pub steps: u64,
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Timings {
    /// Waiting for admission.
    pub queue: f64,
    /// Computing the context.
    pub prefill: f64,
    /// Generating.
    pub decode: f64,
    /// All of it, from the body read to the answer ready.
    pub total: f64,
}

/// The models that are served.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ModelList {
    /// One entry per loaded version, by name and version.
    pub models: Vec<ModelInfo>,
    /// The name that answers requests that name no model.
    pub default: String,
    /// The name of the model that is being loaded, if one is.
    pub loading: Option<String>,
    /// How far that load is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_progress: Option<LoadProgress>,
    /// Memory of all versions, those that finish their last requests included.
    pub memory: MemoryBudget,
    /// Versions of the state that could not be brought back at the start.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<MissingVersion>,
}

/// How far a load is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct LoadProgress {
    /// What is being done.
    pub stage: LoadStage,
    /// The number of that stage, from 1.
    pub step: u32,
    /// How many stages there are.
    pub steps: u32,
    /// Seconds since the load began.
    pub seconds: u64,
}

/// What a load does, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoadStage {
    /// Every byte of the checkpoint is read and checked, and its sha256 computed.
    Reading,
    /// Weights, catalog and KV pages are put into memory, and the engine is started.
    Building,
    /// The model is asked for items, as clients would.
    Probing,
}

impl LoadStage {
    /// How many there are.
    pub const STEPS: u32 = Self::Probing.step();

    /// Its place, from 1.
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
    /// Bytes of weights, KV pages, host memory and catalogs, those included that are kept to roll back to or held by
    /// requests.
    pub used_bytes: u64,
    /// Most of them, if there is a limit.
    pub limit_bytes: Option<u64>,
}

/// Memory of a version, its catalog aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct MemoryInfo {
    /// Weights, at most.
    pub weights_bytes: u64,
    /// KV pages.
    pub kv_bytes: u64,
    /// Host memory for KV pages that were evicted, at most.
    pub kv_host_bytes: u64,
    /// Tables and buffers of the KV pages on disk, at most.
    pub kv_disk_bytes: u64,
}

/// A version of a model that is served.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ModelInfo {
    /// Name by which it is asked for.
    pub name: String,
    /// The beginning of `sha256`.
    pub version: String,
    /// Digest of the checkpoint's files.
    pub sha256: String,
    /// How the weights are kept, which the scores depend on: `f32`, `bf16` or `q8_0`.
    pub weight_format: String,
    /// How keys and values of contexts are kept, which the scores depend on: `f32` or `bf16`.
    pub kv_format: String,
    /// Model family.
    pub family: String,
    /// Architecture that config.json names.
    pub architecture: String,
    /// Values in the checkpoint.
    pub parameters: u64,
    /// Most tokens of a context.
    pub context_limit: u64,
    /// Most history items that a context holds; longer histories are cut at the old end.
    pub max_history_items: u64,
    /// Levels of a semantic ID.
    pub levels: u64,
    /// Tokens generated per item; 0 for a model that generates none.
    pub generated_steps: u64,
    /// What it answers: `recommend`, `rank`.
    pub tasks: Vec<String>,
    /// Its catalog.
    pub catalog: CatalogInfo,
    /// What it takes.
    pub memory: MemoryInfo,
    /// Labels that point at it.
    pub labels: Vec<String>,
    /// Whether the version, its labels and its catalog survive a restart: the server keeps them under `--state`.
    pub durable: bool,
    /// Whether requests are taken.
    pub state: ModelState,
}

/// Whether a model takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelState {
    /// It does.
    Ready,
    /// The server is shutting down.
    Draining,
    /// It was taken out of service, and its memory is free.
    Unloaded,
}

/// A catalog snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct CatalogInfo {
    /// Content version.
    pub version: String,
    /// Items.
    pub items: u64,
    /// Distinct semantic IDs.
    pub leaves: u64,
    /// Memory of items, names and trie.
    pub memory_bytes: u64,
}

impl CatalogInfo {
    /// Of a catalog, and the memory that was counted for it.
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
    /// The version.
    pub model: ModelName,
    /// The catalog that new requests get.
    pub current: String,
    /// All that are kept, in the order in which they came.
    pub versions: Vec<CatalogInfo>,
    /// Whether they survive a restart: the server keeps them under `--state`.
    pub durable: bool,
}

/// A version that the state names and that could not be brought back at the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct MissingVersion {
    /// Name of its model.
    pub name: String,
    /// The version.
    pub version: String,
    /// Labels that point at it: requests for them are refused.
    pub labels: Vec<String>,
    /// Why it could not be brought back.
    pub reason: String,
}

/// A label was deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct LabelDeleted {
    /// Name of its model.
    pub name: String,
    /// The label.
    pub label: String,
    /// Whether the change survives a restart: the server keeps it under `--state`.
    pub durable: bool,
}

/// The answer of a health check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Health {
    /// `ok`; or `degraded` while versions of the state are missing.
    pub status: String,
    /// Versions of the state that could not be brought back.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<MissingVersion>,
}

impl Health {
    /// Well, but for what is missing.
    pub fn but_for(missing: Vec<MissingVersion>) -> Self {
        Self { status: if missing.is_empty() { "ok" } else { "degraded" }.into(), missing }
    }
}

/// Every error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// Stable name of the error, to decide by.
    #[serde(rename = "type")]
    pub kind: String,
    /// For people.
    pub message: String,
    /// The field that is to blame.
    pub param: Option<String>,
}
