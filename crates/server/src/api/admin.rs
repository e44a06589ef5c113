//! What is asked to change models.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Asks for a checkpoint to be loaded. All of it is optional.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadRequest {
    /// The directory of the checkpoint, within the model's directory under the model root. Default: that directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// A label to point at the version once it takes requests. Default: `stable` if the model has no version with that
    /// label yet, else none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The catalog, a file of the checkpoint. Default: catalog.jsonl or catalog.parquet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub catalog: Option<String>,
    /// The convention: a file of the checkpoint, or a preset. Default: convention.json.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub convention: Option<String>,
}

/// Names a version.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VersionRequest {
    /// The version: the first 12 digits of the checkpoint's sha256, or more of them.
    pub version: String,
}
