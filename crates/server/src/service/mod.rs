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
mod history;
mod served;
mod slate;

use std::sync::Arc;
use std::time::{Duration, Instant};

use beamline_catalog::{Filter, FilterSpec};
use beamline_kv_cache::{ReuseClass, SessionKey};
use beamline_model::decode::{self, SearchRequest};
use beamline_model::executor::{Found, Job};
use beamline_scheduler::{Completed, Micros, Request, RequestId, Unserved};

use crate::api::{self, Normalization, RecommendRequest, RecommendResponse, WarmRequest, WarmResponse};
use crate::error::Error;
use crate::settings::{HistoryCut, RequestLimits};
use checks::Asked;
use context::Context;

pub use history::{PromptLayout, coarse_step, dropped_by};
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
        let prepare = || self.prepare(served, &request);
        let Prepared { context, search, leaves } =
            if is_long(served, &request) { tokio::task::block_in_place(prepare)? } else { prepare()? };

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
            normalization: request.normalization.unwrap_or_default(),
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
            let found = done.answer.as_ref().ok_or_else(|| Error::internal("a search without an answer"))?;
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
        let prepare = || context::build(served, &request, self.history_cut);
        let context =
            if is_long(served, &request) { tokio::task::block_in_place(prepare)? } else { prepare()? };
        let engine_request = engine_request(served, &request, &context.tokens, None, deadline);
        let done = self.run(engine_request, deadline).await?;
        let mut timings = timings(&done.timings);
        timings.total = ms(started.elapsed());
        Ok(WarmResponse {
            request_id,
            model: served.model_name(),
            unknown_items: context.unknown,
            dropped_history: context.dropped as u64,
            usage: usage(&done.usage),
            timings_ms: timings,
        })
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

    fn prepare(&self, served: &Served, request: &RecommendRequest) -> Result<Prepared, Error> {
        let context = context::build(served, request, self.history_cut)?;
        let filter = filter(served, request, &context);
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
    async fn run(&self, request: Request<Job>, deadline: Option<Micros>) -> Result<Completed<Found>, Error> {
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
) -> Request<Job> {
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
        generated_steps,
        deadline,
        payload: Job { tokens: Arc::clone(tokens), search: beam.map(|(search, ..)| search) },
    }
}

fn filter(served: &Served, request: &RecommendRequest, context: &Context) -> Filter {
    let Some(filters) = &request.filters else { return served.catalog.filter(&FilterSpec::default()) };
    served.catalog.filter(&FilterSpec {
        exclude_items: &filters.exclude_items,
        exclude_seen: if filters.exclude_seen { &context.seen } else { &[] },
        require_tags: &filters.require_tags,
        forbid_tags: &filters.forbid_tags,
        allow_items: filters.allow_items.as_deref(),
    })
}

/// Whether preparing a request takes so long that it should not hold up a thread that serves others.
fn is_long(served: &Served, request: &RecommendRequest) -> bool {
    let tags =
        request.filters.as_ref().is_some_and(|f| !f.require_tags.is_empty() || !f.forbid_tags.is_empty());
    let items = request.history.as_ref().map_or(0, Vec::len);
    request.prompt.as_ref().is_some_and(|prompt| prompt.len() > LONG_PROMPT_BYTES)
        || (tags && served.catalog.num_items() > MANY_ITEMS)
        || (!served.convention.composes() && items > 64)
}

/// A warm request is a request for items without the items.
fn widen(request: WarmRequest) -> RecommendRequest {
    let WarmRequest { user_id, history, token_ids, prompt, model, timeout_ms, strict_history, tenant } =
        request;
    RecommendRequest {
        user_id,
        history,
        token_ids,
        prompt,
        model,
        timeout_ms,
        strict_history,
        tenant,
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
