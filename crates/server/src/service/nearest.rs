//! What a misspelt item or tag may have meant.
//!
//! The first few thousand names of a catalog are looked at, for the first unknown name of a request only, and away from
//! the threads that serve others.

use beamline_catalog::Catalog;
use beamline_wording::did_you_mean;

use crate::error::UnknownNames;

/// Unknown items, and the known one that the first of them may stand for.
pub(super) fn items(catalog: &Catalog, names: Vec<String>) -> UnknownNames {
    let nearest = |name: &String| did_you_mean(name, catalog.items().map(|item| catalog.item_id(item)));
    unknown(names, nearest)
}

/// Unknown tags, and the known one that the first of them may stand for.
pub(super) fn tags(catalog: &Catalog, names: Vec<String>) -> UnknownNames {
    unknown(names, |name| did_you_mean(name, catalog.tag_names()))
}

fn unknown(names: Vec<String>, nearest: impl Fn(&String) -> String) -> UnknownNames {
    let hint = tokio::task::block_in_place(|| names.first().map(nearest)).unwrap_or_default();
    UnknownNames { names, hint }
}
