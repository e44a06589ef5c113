//! The probe: requests that a model must answer before anybody else may ask it.
//!
//! They go the way of every other request. So a model that cannot work is found before clients find it,
//! and memory is warm. An answer passes when it has items, all of them in the catalog under the semantic
//! ID that it gives, none twice, with finite scores from best to worst.

use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

use beamline_catalog::{Catalog, ItemIndex};
use tracing::info;

use super::{LoadError, ms};
use crate::api::{Candidate, HistoryAction, Item, RankRequest, RankedCandidate, RecommendRequest};
use crate::error::Error;
use crate::service::{Family, HstuFamily, Service};

/// Items of the longest history that is tried, spread over the catalog.
const HISTORY: usize = 8;
/// Items that the probe asks for.
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
    if let Family::Hstu(family) = &service.served().family {
        probe_hstu(&service, family).await?;
        info!(ms = ms(start), "answered the probe");
        return Ok(());
    }
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
            Err(Error::NoColdStart | Error::EmptyContext { .. }) => continue,
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
    HistoryAction { item_id: catalog.item_id(item).to_owned(), action: None, timestamp: None, features: None }
}

/// Asks an HSTU model as clients would, with the first row of every table.
async fn probe_hstu(service: &Service, family: &HstuFamily) -> Result<(), LoadError> {
    let catalog = &service.served().catalog;
    let features: BTreeMap<String, u32> =
        family.config.item_features().into_iter().map(|name| (name.to_owned(), 0)).collect();
    for mut history in histories(catalog).into_iter().filter(|history| !history.is_empty()) {
        for (time, event) in (1_700_000_000..).zip(&mut history) {
            (event.timestamp, event.action) = (Some(time), Some("0".into()));
            event.features = Some(features.clone());
        }
        let tenant = Some("beamline probe".into());
        if family.tasks_of().contains(&"rank") {
            let candidates = catalog.items().take(ITEMS as usize);
            let candidate = |item: ItemIndex| Candidate {
                item_id: catalog.item_id(item).to_owned(),
                features: Some(features.clone()),
            };
            let request = RankRequest {
                history,
                candidates: candidates.map(candidate).collect(),
                query_time: Some(1_700_000_100),
                tenant,
                ..RankRequest::default()
            };
            let expected = request.candidates.len();
            let answer = service.rank(request, "probe".into()).await.map_err(LoadError::Probe)?;
            let finite = |candidate: &RankedCandidate| candidate.predictions.values().all(|x| x.is_finite());
            if answer.candidates.len() != expected || !answer.candidates.iter().all(finite) {
                return Err(LoadError::WrongAnswer("not a finite prediction for each candidate".into()));
            }
        } else if family.tasks_of().contains(&"recommend") {
            let most = (catalog.num_items() as u64).min(ITEMS);
            let request = RecommendRequest {
                history: Some(history),
                num_items: Some(service.most_items().min(most)),
                query_time: Some(1_700_000_100),
                tenant,
                ..RecommendRequest::default()
            };
            let answer = service.recommend(request, "probe".into()).await.map_err(LoadError::Probe)?;
            check(catalog, &answer.items).map_err(LoadError::WrongAnswer)?;
        }
    }
    Ok(())
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
