//! Recommending by beam search over semantic IDs: the same for decoders and for HSTU models with a token
//! head.

use std::sync::Arc;

use beamline_catalog::{Filter, FilterSpec, ItemIndex};
use beamline_kv_cache::SessionKey;
use beamline_model::decode::{self, SearchRequest, Step};
use beamline_model::task::{Answer, Job};
use beamline_scheduler::{Micros, Request, RequestId};

use super::checks::{self, Asked};
use super::context::{self, Context, Input};
use super::{Served, Service, degraded, nearest, preparing, slate, timings, usage};
use crate::api::{self, Normalization, RecommendRequest, RecommendResponse};
use crate::error::Error;
use crate::settings::DeviceChoice;

/// A context and a filter, ready for the engine.
struct Prepared {
    context: Context,
    search: SearchRequest,
    /// Leaves that the filter leaves.
    leaves: usize,
}

impl Service {
    /// The items that the best semantic IDs name.
    pub(super) async fn search(
        &self,
        served: &Served,
        request: &RecommendRequest,
        request_id: String,
        asked: &Asked,
        deadline: Option<Micros>,
    ) -> Result<RecommendResponse, Error> {
        if !served.family.tasks().contains(&"recommend") {
            return Err(Error::TaskNotSupported(served.family.tasks()));
        }
        let prefix = request.sid_prefix.as_ref().map_or(0, Vec::len);
        let levels = served.family.steps().iter().filter(|step| **step == Step::Level).count();
        checks::widths_of_levels(asked, levels.saturating_sub(prefix))?;
        if asked.differing_widths().is_some() && served.device != DeviceChoice::Cpu {
            let message = "has a width for each level, which only the CPU has: give beam_width".into();
            return Err(Error::InvalidValue { param: "beam_widths", message });
        }
        let build = || self.build(served, request);
        let Prepared { context, search, leaves } =
            self.prepare(preparing::work(served, request), deadline, build).await?;

        let mut answer = RecommendResponse {
            request_id,
            model: served.model_name(),
            catalog_version: served.catalog.version().to_owned(),
            items: Vec::new(),
            items_requested: asked.num_items as u64,
            items_returned: 0,
            unknown_items: Vec::new(),
            unknown_tags: search.filter.unknown_tags().to_vec(),
            unknown_filter_items: search.filter.unknown_items().to_vec(),
            dropped_history: context.dropped as u64,
            degraded: None,
            reason: None,
            normalization: Some(request.normalization.unwrap_or_default()),
            usage: api::Usage { context_tokens: context.input.len() as u64, ..api::Usage::default() },
            timings_ms: api::Timings::default(),
        };
        if leaves == 0 {
            answer.reason = Some(api::Reason::FiltersLeaveNothing);
        } else {
            let filter = search.filter.clone();
            let beam = Some((search, asked, leaves));
            let done =
                self.run(engine_request(served, request, &context.input, beam, deadline), deadline).await?;
            let Some(Answer::Found(found)) = &done.answer else {
                return Err(Error::internal("a search without an answer"));
            };
            answer.items = slate::items(&served.catalog, &filter, &found.hypotheses, asked.num_items);
            answer.usage = usage(&done.usage);
            answer.degraded = done.usage.degraded.map(degraded);
            answer.timings_ms = timings(&done.timings);
            if answer.items.len() < asked.num_items {
                answer.reason = Some(api::Reason::FewerItemsThanRequested);
            }
        }
        answer.items_returned = answer.items.len() as u64;
        answer.unknown_items = context.unknown;
        Ok(answer)
    }

    fn build(&self, served: &Served, request: &RecommendRequest) -> Result<Prepared, Error> {
        let context = context::build(served, request, self.history_cut)?;
        let filter = filter(served, request, &context.seen)?;
        let leaves = filter.count(served.catalog.trie().leaves(context.start));
        let search = search_of(served, &context, filter, request.normalization);
        Ok(Prepared { context, search, leaves })
    }
}

/// A search from the end of a context.
pub(super) fn search_of(
    served: &Served,
    context: &Context,
    filter: Filter,
    normalization: Option<Normalization>,
) -> SearchRequest {
    SearchRequest {
        catalog: Arc::clone(&served.catalog),
        filter,
        start: context.start,
        steps: Arc::clone(&context.steps),
        normalization: match normalization.unwrap_or_default() {
            Normalization::FullVocab => decode::Normalization::FullVocab,
            Normalization::AllowedSet => decode::Normalization::AllowedSet,
        },
        normalize_over: None,
        widths: None,
    }
}

/// What of a beam the engine needs to know: the search, what was asked, and how many leaves it may find.
type Beam<'a> = (SearchRequest, &'a Asked, usize);

/// A width for each step, out of one for each level; no beam is wider than there are leaves. A fixed
/// token continues each beam by one.
fn widths_of_steps(steps: &[Step], levels: &[usize], leaves: usize) -> Arc<[usize]> {
    let mut levels = levels.iter();
    let mut width = 1;
    let of_step = |step: &Step| {
        if *step == Step::Level {
            width = levels.next().map_or(width, |&level| level.min(leaves));
        }
        width
    };
    steps.iter().map(of_step).collect()
}

/// A request for the engine: a context, and a search from its end if there is one.
pub(super) fn engine_request(
    served: &Served,
    request: &RecommendRequest,
    input: &Input,
    mut beam: Option<Beam<'_>>,
    deadline: Option<Micros>,
) -> Request<Job> {
    if let Some((search, asked, leaves)) = &mut beam {
        let widths = asked.differing_widths();
        search.widths = widths.map(|levels| widths_of_steps(&search.steps, levels, *leaves));
    }
    let beam_widths = beam.as_ref().and_then(|(search, ..)| search.widths.clone());
    let namespace = served.namespace(request.tenant.as_deref().unwrap_or_default());
    // More beams than leaves would only reserve pages: nothing is pruned either way.
    let width = beam.as_ref().map_or(0, |(_, asked, leaves)| asked.beam_width.min(*leaves));
    let least = beam.as_ref().map_or(0, |(_, asked, _)| match asked.allow_degraded {
        true => asked.num_items.min(width),
        false => width,
    });
    let generated_steps = beam.as_ref().map_or(0, |(search, ..)| search.steps.len());
    Request {
        id: RequestId(0),
        namespace,
        session: request.user_id.as_deref().map(|user| SessionKey::new(&namespace, user)),
        words: input.words(),
        context_len: input.len(),
        reuse: input.reuse(),
        shape: input.shape(),
        beam_width: width,
        beam_widths,
        min_beam_width: least,
        priority: request.priority.unwrap_or_default().into(),
        keeps_branches: true,
        generated_steps,
        deadline,
        payload: Arc::new(input.job(beam.map(|(search, ..)| search))),
    }
}

/// What a request allows.
pub(super) fn filter(
    served: &Served,
    request: &RecommendRequest,
    seen: &[ItemIndex],
) -> Result<Filter, Error> {
    let catalog = &served.catalog;
    let Some(filters) = &request.filters else { return Ok(catalog.filter(&FilterSpec::default())) };
    let filter = catalog.filter(&FilterSpec {
        exclude_items: &filters.exclude_items,
        exclude_seen: if filters.exclude_seen { seen } else { &[] },
        require_tags: &filters.require_tags,
        forbid_tags: &filters.forbid_tags,
        allow_items: filters.allow_items.as_deref(),
    });
    if request.strict_filters.unwrap_or(false) {
        if !filter.unknown_tags().is_empty() {
            return Err(Error::UnknownTags(nearest::tags(catalog, filter.unknown_tags().to_vec())));
        }
        if !filter.unknown_items().is_empty() {
            return Err(Error::UnknownFilterItems(nearest::items(catalog, filter.unknown_items().to_vec())));
        }
    }
    Ok(filter)
}
