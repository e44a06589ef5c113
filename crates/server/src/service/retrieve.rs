//! Recommending by inner product: the best items of all for an HSTU model that retrieves.

use std::collections::BTreeMap;
use std::sync::Arc;

use beamline_catalog::Catalog;
use beamline_model::decode::Hypothesis;
use beamline_model::families::hstu::retrieval::Scored;
use beamline_model::task::{Answer, Retrieve, Task};
use beamline_scheduler::Micros;

use super::checks::{self, Asked};
use super::events::{self, Given};
use super::family::HstuFamily;
use super::search::filter;
use super::served::Whose;
use super::{Served, Service, preparing, slate, timings, usage};
use crate::api::{self, RecommendRequest, RecommendResponse};
use crate::error::Error;

impl Service {
    /// The best items by inner product.
    pub(super) async fn retrieve(
        &self,
        served: &Served,
        family: &HstuFamily,
        request: &RecommendRequest,
        request_id: String,
        asked: &Asked,
        deadline: Option<Micros>,
    ) -> Result<RecommendResponse, Error> {
        if request.sid_prefix.is_some() {
            let message = "has no meaning for a model that retrieves".into();
            return Err(Error::InvalidValue { param: "sid_prefix", message });
        }
        checks::widths_of_levels(asked, 0)?;
        let none = BTreeMap::new();
        let given = Given::of(request, &none, &[])?;
        let build = || {
            let input = events::input(served, family, &given, self.history_cut)?;
            let filter = filter(served, request, &input.seen)?;
            Ok((input, filter))
        };
        let (input, filter) = self.prepare(preparing::work(served, request), deadline, build).await?;
        let catalog = &served.catalog;
        let mut answer = RecommendResponse {
            request_id,
            model: served.model_name(),
            catalog_version: catalog.version().to_owned(),
            items: Vec::new(),
            items_requested: asked.num_items as u64,
            items_returned: 0,
            unknown_items: input.unknown,
            unknown_tags: filter.unknown_tags().to_vec(),
            unknown_filter_items: filter.unknown_items().to_vec(),
            dropped_history: input.dropped as u64,
            degraded: None,
            reason: None,
            normalization: None,
            usage: api::Usage::default(),
            timings_ms: api::Timings::default(),
        };
        let prepared = Arc::new(events::prepare(family, input.request)?);
        answer.usage.context_tokens = prepared.context_len() as u64;
        if filter.count(catalog.trie().leaves(catalog.trie().root())) == 0 {
            answer.reason = Some(api::Reason::FiltersLeaveNothing);
            return Ok(answer);
        }
        let wanted =
            Retrieve { count: asked.num_items, catalog: Arc::clone(catalog), filter: filter.clone() };
        let task = Task::Retrieve(Arc::new(wanted));
        let whose = Whose {
            user: request.user_id.as_deref(),
            tenant: request.tenant.as_deref(),
            priority: request.priority,
        };
        let done =
            self.run(served.hstu_request(family, prepared, task, whose, (1, 1), deadline), deadline).await?;
        let Some(Answer::Items(items)) = &done.answer else {
            return Err(Error::internal("a retrieval without items"));
        };
        answer.items = slate::items(catalog, &filter, &leaves_of(catalog, items), asked.num_items);
        answer.items_returned = answer.items.len() as u64;
        if answer.items.len() < asked.num_items {
            answer.reason = Some(api::Reason::FewerItemsThanRequested);
        }
        answer.usage = usage(&done.usage);
        answer.timings_ms = timings(&done.timings);
        Ok(answer)
    }
}

/// Rows of the item table as leaves of the catalog.
fn leaves_of(catalog: &Catalog, items: &[Scored]) -> Vec<Hypothesis> {
    let trie = catalog.trie();
    let hypothesis = |found: &Scored| {
        let leaf = trie.leaf(trie.walk(&[found.item])?)?;
        Some(Hypothesis { leaf, score: f64::from(found.score) })
    };
    items.iter().filter_map(hypothesis).collect()
}
