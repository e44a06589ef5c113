//! The JSON of the API: requests ([`request`], and [`admin`] for models and catalogs) and answers
//! ([`response`]).
//!
//! Place in the flow: between the outside (HTTP bodies, lines of a batch file) and
//! [`crate::service`]. The comments of the fields are the documentation in `/openapi.json`, so they
//! are written for clients.
//!
//! What this must not know: HTTP, the engine.

pub mod admin;
pub mod request;
pub mod response;
pub mod timestamp;
pub mod written;

pub use admin::{CatalogPatch, CatalogVersionRequest, LoadRequest, NewItem, Retag, VersionRequest};
pub use request::{
    Candidate, Filters, HistoryAction, Normalization, Priority, RankRequest, RecommendRequest, WarmRequest,
    parse, parse_value,
};
pub use response::{
    CatalogInfo, CatalogList, Degraded, DegradedReason, ErrorBody, ErrorDetail, Health, Item, LabelDeleted,
    LoadProgress, LoadStage, MemoryBudget, MemoryInfo, MissingVersion, ModelInfo, ModelList, ModelName,
    ModelState, RankResponse, RankedCandidate, Reason, RecommendResponse, Timings, Usage, WarmResponse,
};

use utoipa::ToSchema;

/// One code of a semantic ID: the integer, or the text of its token.
#[derive(ToSchema)]
#[serde(untagged)]
#[schema(as = SidPart)]
pub enum SidPartSchema {
    /// The code as an integer.
    Code(u32),
    /// The text of the token.
    Token(String),
}
