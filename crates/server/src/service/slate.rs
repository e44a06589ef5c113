//! From the leaves that a search found to the items of an answer.
//!
//! The policy for collisions: leaves in the order of the beam; the items of a leaf in the order of the catalog, without
//! those that the filter forbids; all with the leaf's score. An item has one leaf, so none comes twice. The list is cut
//! at the number of items asked for, within a leaf if need be.

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
