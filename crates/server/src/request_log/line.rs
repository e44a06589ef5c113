//! A line of the request log.

use beamline_model::loaded::WeightFormat;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::api::{Degraded, RecommendRequest};

/// A logged request and its answer. When a line is read, fields of newer servers are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoggedAnswer {
    /// The request's id, as in the server's log.
    pub request_id: String,
    /// Time at which the request had arrived, in milliseconds since 1970.
    pub received_at: u64,
    /// The request as the server parsed it.
    pub request: RecommendRequest,
    /// The model that answered.
    pub model: LoggedModel,
    /// Content version of the catalog that was searched.
    pub catalog_version: String,
    /// The recommended items, best first.
    pub items: Vec<LoggedItem>,
    /// Set when the beam was narrowed to make the deadline.
    #[serde(default)]
    pub degraded: Option<Degraded>,
    /// Number of context tokens that were cached.
    #[serde(default)]
    pub cached_tokens: u64,
}

/// The model of a logged answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedModel {
    /// Digest of the checkpoint, in hexadecimal.
    pub sha256: String,
    /// Number format of the weights.
    #[serde(default = "single_precision")]
    pub weight_format: String,
    /// Number format of keys and values.
    #[serde(default = "single_precision")]
    pub kv_format: String,
}

/// The format of lines without a format field.
fn single_precision() -> String {
    WeightFormat::F32.name().to_owned()
}

/// An item of a logged answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoggedItem {
    /// The client's id of the item.
    pub item_id: String,
    /// Score of the item. Writing it as text and reading it back keeps every bit.
    pub score: f64,
}

/// Two items are equal if they have the same id and the same bits of the score.
impl PartialEq for LoggedItem {
    fn eq(&self, other: &Self) -> bool {
        self.item_id == other.item_id && self.score.to_bits() == other.score.to_bits()
    }
}

/// Names a user by a digest: a user has the same name in every log. This hides ids from readers,
/// but not from those who can guess an id.
pub fn hash_user(user: &str) -> String {
    let digest = Sha256::digest(user.as_bytes());
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}
