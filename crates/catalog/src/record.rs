//! One item as it comes from outside: a line of a file, a row of a table, an element of a request.

use serde::{Deserialize, Serialize};

use crate::SidPart;

/// An item before it is checked and added to a catalog.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ItemRecord {
    /// The client's own id; unique within a catalog.
    pub item_id: String,
    /// The semantic ID, one part per level.
    pub sid: Vec<SidPart>,
    /// Labels that requests can require or forbid. Order and repetition do not matter.
    #[serde(default)]
    pub tags: Vec<String>,
    /// A name for people. An empty title counts as none.
    #[serde(default)]
    pub title: Option<String>,
}
