//! Suggestions for misspelt items and tags.
//!
//! Only the first few thousand names of a catalog are compared, only for the first unknown name of
//! a request, and not on the threads that serve HTTP.

use beamline_catalog::Catalog;
use beamline_wording::did_you_mean;

use crate::error::UnknownNames;

/// The unknown items, with a suggestion for the first of them.
pub(super) fn items(catalog: &Catalog, names: Vec<String>) -> UnknownNames {
    let nearest = |name: &String| did_you_mean(name, catalog.items().map(|item| catalog.item_id(item)));
    unknown(names, nearest)
}

/// The unknown tags, with a suggestion for the first of them.
pub(super) fn tags(catalog: &Catalog, names: Vec<String>) -> UnknownNames {
    unknown(names, |name| did_you_mean(name, catalog.tag_names()))
}

fn unknown(names: Vec<String>, nearest: impl Fn(&String) -> String) -> UnknownNames {
    let hint = tokio::task::block_in_place(|| names.first().map(nearest)).unwrap_or_default();
    UnknownNames { names, hint }
}
