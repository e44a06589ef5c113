//! Turns the leaves that a search found into the items of an answer.
//!
//! The policy for collisions: leaves come in the order of the beam, the items of a leaf in the
//! order of the catalog. Items that the filter forbids are left out. All items of a leaf have its
//! score. An item has one leaf, so no item comes twice. The list is cut at the number of items
//! asked for, within a leaf if need be.

use beamline_catalog::{Catalog, Filter};
use beamline_model::decode::Hypothesis;

use crate::api::Item;

/// The items of some hypotheses, best first.
pub(super) fn items(catalog: &Catalog, filter: &Filter, found: &[Hypothesis], most: usize) -> Vec<Item> {
    let items = found.iter().flat_map(|hypothesis| {
        let allowed = catalog.items_of(hypothesis.leaf).iter().filter(|item| filter.allows_item(**item));
        allowed.map(move |&item| (item, hypothesis))
    });
    let slate = items.take(most).zip(1..).map(|((item, hypothesis), rank)| Item {
        item_id: catalog.item_id(item).to_owned(),
        sid: catalog.sid_parts(hypothesis.leaf),
        score: hypothesis.score,
        rank,
        title: catalog.title(item).map(str::to_owned),
    });
    slate.collect()
}
