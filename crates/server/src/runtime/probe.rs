//! The probe: requests that a model must answer before anybody else may ask it.
//!
//! They go the way of every other request, so what cannot work is found before clients do, and memory is warm. An answer
//! passes when it has items, all of them in the catalog under the semantic ID that it gives, none twice, with finite
//! scores from best to worst.

use std::collections::HashSet;
use std::time::Instant;

use beamline_catalog::{Catalog, ItemIndex};
use tracing::info;

use super::{LoadError, ms};
use crate::api::{HistoryAction, Item, RecommendRequest};
use crate::error::Error;
use crate::service::Service;

/// Items of the longest history that is tried, spread over the catalog.
const HISTORY: usize = 8;
/// Items wanted.
const ITEMS: u64 = 10;

/// Asks for items as clients would.
///
/// # Errors
///
/// When there is no answer, or a wrong one.
pub async fn probe(service: &Service) -> Result<(), LoadError> {
    let start = Instant::now();
    let service = service.clone().patient();
    let catalog = &service.served().catalog;
    let most = (catalog.num_items() as u64).min(ITEMS);
    for history in histories(catalog) {
        let request = RecommendRequest {
            history: Some(history),
            num_items: Some(service.most_items().min(most)),
            // Pages of a tenant of its own, which no client can hit.
            tenant: Some("beamline probe".into()),
            ..RecommendRequest::default()
        };
        let answer = match service.recommend(request, "probe".into()).await {
            // Some models have no prompt around a history.
            Err(Error::EmptyContext) => continue,
            answer => answer.map_err(LoadError::Probe)?,
        };
        check(catalog, &answer.items).map_err(LoadError::WrongAnswer)?;
    }
    info!(ms = ms(start), "answered the probe");
    Ok(())
}

/// Nobody, somebody with one action, somebody with several.
fn histories(catalog: &Catalog) -> [Vec<HistoryAction>; 3] {
    let take = |most: usize| {
        let step = (catalog.num_items() / most.max(1)).max(1);
        let spread = catalog.items().step_by(step).take(most);
        spread.map(|item| action(catalog, item)).collect()
    };
    [take(0), take(1), take(HISTORY)]
}

fn action(catalog: &Catalog, item: ItemIndex) -> HistoryAction {
    HistoryAction { item_id: catalog.item_id(item).to_owned(), action: None, timestamp: None }
}

fn check(catalog: &Catalog, items: &[Item]) -> Result<(), String> {
    if items.is_empty() {
        return Err("no items".into());
    }
    let mut seen = HashSet::new();
    let mut last = f64::INFINITY;
    for Item { item_id, sid, score, .. } in items {
        let known = catalog.item(item_id).map(|item| catalog.sid_parts(catalog.leaf_of(item)));
        if known.as_ref() != Some(sid) {
            return Err(format!("item {item_id:?} with a semantic ID that it does not have"));
        }
        if !score.is_finite() {
            return Err(format!("item {item_id:?} with the score {score}"));
        }
        if *score > last || !seen.insert(item_id) {
            return Err(format!("item {item_id:?} in the wrong place"));
        }
        last = *score;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use beamline_catalog::{CatalogLimits, ItemRecord, SidPart, WrittenSymbols};

    #[test]
    fn wrong_answers_are_told() {
        let record = |id: &str, code: u32| ItemRecord {
            item_id: id.into(),
            sid: vec![SidPart::Code(code)],
            tags: Vec::new(),
            title: None,
        };
        let records = [record("a", 1), record("b", 2)];
        let catalog =
            Catalog::from_records(records, &WrittenSymbols::codes(), &CatalogLimits::default()).unwrap();
        let item = |id: &str, code: u32, score: f64| Item {
            item_id: id.into(),
            sid: vec![SidPart::Code(code)],
            score,
            rank: 1,
            title: None,
        };
        assert_eq!(check(&catalog, &[item("b", 2, -1.0), item("a", 1, -2.0)]), Ok(()));
        for wrong in [
            vec![],
            vec![item("c", 1, -1.0)],
            vec![item("a", 2, -1.0)],
            vec![item("a", 1, f64::NAN)],
            vec![item("a", 1, -2.0), item("b", 2, -1.0)],
            vec![item("a", 1, -1.0), item("a", 1, -1.0)],
        ] {
            assert!(check(&catalog, &wrong).is_err(), "{wrong:?}");
        }
    }
}
