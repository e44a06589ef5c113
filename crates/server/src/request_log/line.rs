//! A line of the request log.

use beamline_compute::cpu::linear::WeightFormat;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::api::{Degraded, RecommendRequest};

/// What was asked, and what was answered. Fields that a newer server adds are passed over when it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoggedAnswer {
    /// The request's id, as in the server's log.
    pub request_id: String,
    /// When it had arrived, in milliseconds since 1970.
    pub received_at: u64,
    /// The request as it was understood.
    pub request: RecommendRequest,
    /// The model that answered.
    pub model: LoggedModel,
    /// The catalog that was searched.
    pub catalog_version: String,
    /// The slate, best first.
    pub items: Vec<LoggedItem>,
    /// Set when the beam was narrowed to make the deadline.
    #[serde(default)]
    pub degraded: Option<Degraded>,
    /// Context tokens that were cached.
    #[serde(default)]
    pub cached_tokens: u64,
}

/// The model of a logged answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedModel {
    /// Digest of the checkpoint.
    pub sha256: String,
    /// How its weights were kept.
    #[serde(default = "single_precision")]
    pub weight_format: String,
    /// How its keys and values were kept.
    #[serde(default = "single_precision")]
    pub kv_format: String,
}

/// What lines without a format were written with.
fn single_precision() -> String {
    WeightFormat::F32.name().to_owned()
}

/// An item of a logged answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoggedItem {
    /// The client's id.
    pub item_id: String,
    /// Its score. Text and back keep every bit.
    pub score: f64,
}

/// Equal means: the same item with the same bits of the score.
impl PartialEq for LoggedItem {
    fn eq(&self, other: &Self) -> bool {
        self.item_id == other.item_id && self.score.to_bits() == other.score.to_bits()
    }
}

/// Names a user by a digest: the same user has the same name in every log. It hides ids from readers, not from somebody
/// who can guess them.
pub fn hash_user(user: &str) -> String {
    let digest = Sha256::digest(user.as_bytes());
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}
