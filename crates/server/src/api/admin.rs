//! The requests that change models and catalogs.

use beamline_catalog::{ItemId, ItemRecord, SidPart};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::SidPartSchema;
use super::written::{ItemIdSchema, read};

/// Asks for a checkpoint to be loaded. All fields are optional.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadRequest {
    /// The directory of the checkpoint, within the model's directory under the model root. Default:
    /// the model's directory itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// A label to point at the version once it serves requests. Default: `stable` if the model has
    /// no version with that label yet, else none.
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

/// Names an earlier catalog that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CatalogVersionRequest {
    /// The catalog's content version.
    pub version: String,
}

/// Changes to a catalog: items are removed, then retagged, then added. To replace an item, remove
/// and add it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CatalogPatch {
    /// Items to add. An id that is already in the catalog is an error, unless it is removed as
    /// well.
    #[serde(default)]
    pub add: Vec<NewItem>,
    /// Ids of items to remove. An id that is not in the catalog is an error.
    #[serde(default, deserialize_with = "read::<Vec<ItemId>, _>")]
    #[schema(value_type = Vec<ItemIdSchema>)]
    pub remove: Vec<String>,
    /// Items whose tags change.
    #[serde(default)]
    pub retag: Vec<Retag>,
}

/// An item of a catalog.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewItem {
    /// The client's own id; unique within a catalog.
    #[serde(deserialize_with = "read::<ItemId, _>")]
    #[schema(value_type = ItemIdSchema)]
    pub item_id: String,
    /// The semantic ID, one code per level.
    #[schema(value_type = Vec<SidPartSchema>)]
    pub sid: Vec<SidPart>,
    /// Labels that requests can require or forbid.
    #[serde(default)]
    pub tags: Vec<String>,
    /// A readable name.
    #[serde(default)]
    pub title: Option<String>,
}

/// New tags for an item.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Retag {
    /// Id of the item.
    #[serde(deserialize_with = "read::<ItemId, _>")]
    #[schema(value_type = ItemIdSchema)]
    pub item_id: String,
    /// All tags that the item has from now on.
    pub tags: Vec<String>,
}

impl From<NewItem> for ItemRecord {
    fn from(NewItem { item_id, sid, tags, title }: NewItem) -> Self {
        Self { item_id, sid, tags, title }
    }
}
