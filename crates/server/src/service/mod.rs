//! The service: one request from its JSON to its slate, the same for HTTP, batch files and the command line.
//!
//! ```text
//! checks   limits of the request alone: before any work
//! context  history -> known items -> cut -> prompt; or token ids, or text; then the forced SID prefix
//! filter   what may be returned; when nothing may, the answer is empty and the engine is not asked
//! engine   submit, wait; dropping the future drops the request
//! slate    leaves -> items, in the order of the beam
//! ```
//!
//! Invariant: the slate is a function of checkpoint, catalog and request alone. Caching shows in `usage` and
//! `timings_ms` only.
//!
//! What this must not know: HTTP.

mod checks;
mod context;
mod events;
mod family;
mod history;
mod rank;
mod served;
mod slate;

use std::sync::Arc;
use std::time::{Duration, Instant};

use beamline_catalog::{Filter, FilterSpec, ItemIndex};
use beamline_kv_cache::{ReuseClass, SessionKey};
use beamline_model::decode::{self, Hypothesis, SearchRequest};
use beamline_model::executor::Job;
use beamline_model::executor::any::{Answer, AnyJob};
use beamline_model::executor::hstu::{HstuAnswer, HstuJob, Retrieve, Work};
use beamline_model::families::hstu::Task;
use beamline_scheduler::{Completed, Micros, Request, RequestId, Unserved};

use crate::api::{self, Normalization, RecommendRequest, RecommendResponse, WarmRequest, WarmResponse};
use crate::error::Error;
use crate::settings::{HistoryCut, RequestLimits};
use checks::Asked;
use context::Context;
use events::Given;

pub use family::{Decoder, Family, HstuFamily, ItemRows};
pub use history::{PromptLayout, coarse_step, dropped_by};
pub use rank::{MAX_CANDIDATES, MICRO_BATCH};
pub use served::{Lease, Memory, Served};

/// Work of preparing a request beyond which other requests should not wait for it on this thread.
const LONG_PROMPT_BYTES: usize = 16 << 10;
/// As [`LONG_PROMPT_BYTES`], for a filter by tags, which may look at every item.
const MANY_ITEMS: usize = 200_000;

/// Answers requests.
#[derive(Clone, Debug)]
pub struct Service {
    served: Arc<Served>,
    limits: RequestLimits,
    history_cut: HistoryCut,
    default_timeout: Option<Duration>,
}

/// A context and a filter, ready for the engine.
struct Prepared {
    context: Context,
    search: SearchRequest,
    /// Leaves that the filter leaves.
    leaves: usize,
}

impl Service {
    /// A service over one model.
    pub fn new(served: Arc<Served>, limits: RequestLimits, history_cut: HistoryCut) -> Self {
        Self { served, limits, history_cut, default_timeout: Some(limits.default_timeout) }
    }

    /// Without a deadline for requests that name none: offline, late is better than never.
    #[must_use]
    pub fn patient(self) -> Self {
        Self { default_timeout: None, ..self }
    }

    /// The model.
    pub fn served(&self) -> &Arc<Served> {
        &self.served
    }

    /// The same limits over another model, or the same model with another catalog.
    #[must_use]
    pub fn over(&self, served: Arc<Served>) -> Self {
        Self { served, ..self.clone() }
    }

    /// Most items of an answer.
    pub fn most_items(&self) -> u64 {
        self.limits.max_num_items as u64
    }

    /// Recommends items.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub async fn recommend(
        &self,
        request: RecommendRequest,
        request_id: String,
    ) -> Result<RecommendResponse, Error> {
        let started = Instant::now();
        let received = self.served.engine.now();
        let served = self.find(request.model.as_deref())?;
        let asked = checks::recommend(&request, &self.limits)?;
        let deadline = self.deadline(received, asked.timeout);
        let decoder = match &served.family {
            Family::Decoder(decoder) => decoder,
            Family::Hstu(family) => {
                let mut answer =
                    self.retrieve(served, family, &request, request_id, &asked, deadline).await?;
                answer.timings_ms.total = ms(started.elapsed());
                return Ok(answer);
            }
        };
        let prepare = || self.prepare(served, decoder, &request);
        let Prepared { context, search, leaves } = if is_long(served, decoder, &request) {
            tokio::task::block_in_place(prepare)?
        } else {
            prepare()?
        };

        let mut answer = RecommendResponse {
            request_id,
            model: served.model_name(),
            catalog_version: served.catalog.version().to_owned(),
            items: Vec::new(),
            items_requested: asked.num_items as u64,
            items_returned: 0,
            unknown_items: Vec::new(),
            dropped_history: context.dropped as u64,
            degraded: None,
            reason: None,
            normalization: Some(request.normalization.unwrap_or_default()),
            usage: api::Usage { context_tokens: context.tokens.len() as u64, ..api::Usage::default() },
            timings_ms: api::Timings::default(),
        };
        if leaves == 0 {
            answer.reason = Some(api::Reason::FiltersLeaveNothing);
        } else {
            let filter = search.filter.clone();
            let engine_request =
                engine_request(served, &request, &context.tokens, Some((search, &asked, leaves)), deadline);
            let done = self.run(engine_request, deadline).await?;
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
        answer.timings_ms.total = ms(started.elapsed());
        Ok(answer)
    }

    /// Computes a context and keeps it.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub async fn warm(&self, request: WarmRequest, request_id: String) -> Result<WarmResponse, Error> {
        let started = Instant::now();
        let received = self.served.engine.now();
        let served = self.find(request.model.as_deref())?;
        let request = widen(request);
        let timeout = checks::common(&request, &self.limits)?;
        let deadline = self.deadline(received, timeout);
        let (engine_request, unknown, dropped) = match &served.family {
            Family::Decoder(decoder) => {
                let prepare = || context::build(served, decoder, &request, self.history_cut);
                let context = match is_long(served, decoder, &request) {
                    true => tokio::task::block_in_place(prepare)?,
                    false => prepare()?,
                };
                let engine_request = engine_request(served, &request, &context.tokens, None, deadline);
                (engine_request, context.unknown, context.dropped)
            }
            Family::Hstu(family) => {
                let input = self.events(served, family, &request)?;
                let prepared = Arc::new(events::prepare(family, input.request)?);
                let job = HstuJob { request: prepared, work: Work::Warm };
                let (user, tenant) = (request.user_id.as_deref(), request.tenant.as_deref());
                let engine_request = served.hstu_request(family, job, user, tenant, 0, 0, deadline);
                (engine_request, input.unknown, input.dropped)
            }
        };
        let done = self.run(engine_request, deadline).await?;
        let mut timings = timings(&done.timings);
        timings.total = ms(started.elapsed());
        Ok(WarmResponse {
            request_id,
            model: served.model_name(),
            unknown_items: unknown,
            dropped_history: dropped as u64,
            usage: usage(&done.usage),
            timings_ms: timings,
        })
    }

    /// The best items by inner product.
    async fn retrieve(
        &self,
        served: &Served,
        family: &HstuFamily,
        request: &RecommendRequest,
        request_id: String,
        asked: &Asked,
        deadline: Option<Micros>,
    ) -> Result<RecommendResponse, Error> {
        if !matches!(family.model.task(), Task::Retrieval(_)) {
            return Err(Error::TaskNotSupported(served.family.tasks()));
        }
        if request.sid_prefix.is_some() {
            let message = "has no meaning for a model that retrieves".into();
            return Err(Error::InvalidValue { param: "sid_prefix", message });
        }
        let input = self.events(served, family, request)?;
        let filter = filter(served, request, &input.seen);
        let catalog = &served.catalog;
        let mut answer = RecommendResponse {
            request_id,
            model: served.model_name(),
            catalog_version: catalog.version().to_owned(),
            items: Vec::new(),
            items_requested: asked.num_items as u64,
            items_returned: 0,
            unknown_items: input.unknown,
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
        let allowed = {
            let (catalog, filter) = (Arc::clone(catalog), filter.clone());
            move |row: u32| {
                let trie = catalog.trie();
                trie.walk(&[row]).is_some_and(|node| filter.allows_any(trie.leaves(node)))
            }
        };
        let wanted = Retrieve { count: asked.num_items, allowed: Arc::new(allowed) };
        let job = HstuJob { request: prepared, work: Work::Retrieve(wanted) };
        let (user, tenant) = (request.user_id.as_deref(), request.tenant.as_deref());
        let done = self.run(served.hstu_request(family, job, user, tenant, 1, 1, deadline), deadline).await?;
        let Some(Answer::Hstu(HstuAnswer::Items(items))) = &done.answer else {
            return Err(Error::internal("a retrieval without items"));
        };
        let trie = catalog.trie();
        let hypothesis = |found: &beamline_model::families::hstu::retrieval::Scored| {
            let leaf = trie.leaf(trie.walk(&[found.item])?)?;
            Some(Hypothesis { leaf, score: f64::from(found.score) })
        };
        let found: Vec<Hypothesis> = items.iter().filter_map(hypothesis).collect();
        answer.items = slate::items(catalog, &filter, &found, asked.num_items);
        answer.items_returned = answer.items.len() as u64;
        if answer.items.len() < asked.num_items {
            answer.reason = Some(api::Reason::FewerItemsThanRequested);
        }
        answer.usage = usage(&done.usage);
        answer.timings_ms = timings(&done.timings);
        Ok(answer)
    }

    /// The history of a request, for a model that reads events.
    fn events(
        &self,
        served: &Served,
        family: &HstuFamily,
        request: &RecommendRequest,
    ) -> Result<events::Input, Error> {
        let Some(history) = &request.history else {
            let message = "this model reads events: give `history`".into();
            return Err(Error::InvalidRequest { message, param: Some("history".into()) });
        };
        let none = std::collections::BTreeMap::new();
        let given = Given {
            history,
            strict: request.strict_history.unwrap_or(false),
            query_time: request.query_time,
            features: request.features.as_ref().unwrap_or(&none),
        };
        events::input(served, family, &given, self.history_cut)
    }

    fn find(&self, name: Option<&str>) -> Result<&Served, Error> {
        match name {
            Some(name) if name != self.served.name => Err(Error::model_not_found(name)),
            _ => Ok(&self.served),
        }
    }

    fn deadline(&self, received: Micros, timeout: Option<Duration>) -> Option<Micros> {
        timeout.or(self.default_timeout).map(|timeout| received.after(timeout))
    }

    fn prepare(
        &self,
        served: &Served,
        decoder: &Decoder,
        request: &RecommendRequest,
    ) -> Result<Prepared, Error> {
        let context = context::build(served, decoder, request, self.history_cut)?;
        let filter = filter(served, request, &context.seen);
        let leaves = filter.count(served.catalog.trie().leaves(context.start));
        let search = SearchRequest {
            catalog: Arc::clone(&served.catalog),
            filter,
            start: context.start,
            steps: Arc::clone(&context.steps),
            normalization: match request.normalization.unwrap_or_default() {
                Normalization::FullVocab => decode::Normalization::FullVocab,
                Normalization::AllowedSet => decode::Normalization::AllowedSet,
            },
        };
        Ok(Prepared { context, search, leaves })
    }

    /// Hands a request to the engine and waits, not longer than its deadline.
    async fn run(
        &self,
        request: Request<AnyJob>,
        deadline: Option<Micros>,
    ) -> Result<Completed<Answer>, Error> {
        let engine = &self.served.engine;
        let ticket = engine.submit(request).map_err(|refusal| self.explain(refusal.into()))?;
        let Some(deadline) = deadline else { return ticket.await.map_err(|e| self.explain(e)) };
        // The engine ends what is late between two steps; the client should not wait for the end of a step.
        let left = Duration::from_micros(deadline.since(engine.now()).0);
        match tokio::time::timeout(left, ticket).await {
            Ok(answer) => answer.map_err(|e| self.explain(e)),
            Err(_) => Err(Error::DeadlineExceeded),
        }
    }

    /// Tells an engine that is going from one that is gone.
    fn explain(&self, unserved: Unserved) -> Error {
        match Error::from(unserved) {
            Error::Draining if !self.served.is_draining() => Error::Unhealthy,
            error => error,
        }
    }
}

/// What of a beam the engine needs to know: the search, what was asked, and how many leaves it may find.
type Beam<'a> = (SearchRequest, &'a Asked, usize);

fn engine_request(
    served: &Served,
    request: &RecommendRequest,
    tokens: &Arc<[u32]>,
    beam: Option<Beam<'_>>,
    deadline: Option<Micros>,
) -> Request<AnyJob> {
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
        words: Arc::clone(tokens),
        context_len: tokens.len(),
        reuse: ReuseClass::CrossRequest,
        beam_width: width,
        min_beam_width: least,
        keeps_branches: true,
        generated_steps,
        deadline,
        payload: AnyJob::Decoder(Job { tokens: Arc::clone(tokens), search: beam.map(|(search, ..)| search) }),
    }
}

fn filter(served: &Served, request: &RecommendRequest, seen: &[ItemIndex]) -> Filter {
    let Some(filters) = &request.filters else { return served.catalog.filter(&FilterSpec::default()) };
    served.catalog.filter(&FilterSpec {
        exclude_items: &filters.exclude_items,
        exclude_seen: if filters.exclude_seen { seen } else { &[] },
        require_tags: &filters.require_tags,
        forbid_tags: &filters.forbid_tags,
        allow_items: filters.allow_items.as_deref(),
    })
}

/// Whether preparing a request takes so long that it should not hold up a thread that serves others.
fn is_long(served: &Served, decoder: &Decoder, request: &RecommendRequest) -> bool {
    let tags =
        request.filters.as_ref().is_some_and(|f| !f.require_tags.is_empty() || !f.forbid_tags.is_empty());
    let items = request.history.as_ref().map_or(0, Vec::len);
    request.prompt.as_ref().is_some_and(|prompt| prompt.len() > LONG_PROMPT_BYTES)
        || (tags && served.catalog.num_items() > MANY_ITEMS)
        || (!decoder.convention.composes() && items > 64)
}

/// A warm request is a request for items without the items.
fn widen(request: WarmRequest) -> RecommendRequest {
    let WarmRequest {
        user_id,
        history,
        token_ids,
        prompt,
        model,
        timeout_ms,
        strict_history,
        tenant,
        query_time,
        features,
    } = request;
    RecommendRequest {
        user_id,
        history,
        token_ids,
        prompt,
        model,
        timeout_ms,
        strict_history,
        tenant,
        query_time,
        features,
        ..RecommendRequest::default()
    }
}

fn usage(usage: &beamline_scheduler::Usage) -> api::Usage {
    api::Usage {
        context_tokens: usage.context_tokens as u64,
        cached_tokens: usage.cached_tokens as u64,
        beam_width: usage.beam_width as u64,
        steps: usage.steps as u64,
    }
}

fn degraded(degraded: beamline_scheduler::Degraded) -> api::Degraded {
    let beamline_scheduler::Degraded::Deadline { asked, needed, left } = degraded;
    api::Degraded {
        reason: api::DegradedReason::Deadline,
        beam_width_asked: asked as u64,
        needed_ms: micros(needed),
        left_ms: micros(left),
    }
}

fn timings(timings: &beamline_scheduler::Timings) -> api::Timings {
    let admitted = timings.admitted_at.unwrap_or(timings.finished_at);
    let prefilled = timings.prefilled_at.unwrap_or(timings.finished_at);
    api::Timings {
        queue: micros(admitted.since(timings.queued_at)),
        prefill: micros(prefilled.since(admitted)),
        decode: micros(timings.finished_at.since(prefilled)),
        total: 0.0,
    }
}

fn micros(micros: Micros) -> f64 {
    micros.0 as f64 / 1e3
}

fn ms(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

/// The beginning of a text that a client sent, to be quoted back.
fn clip(text: &str) -> String {
    text.chars().take(64).collect()
}
