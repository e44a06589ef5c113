//! The service: one request from its JSON to its slate, the same for HTTP, batch files and the
//! command line.
//!
//! ```text
//! checks   limits of the request alone: before any work
//! context  history -> known items -> cut -> tokens or events; or token ids, or text; then the SID prefix
//! search   semantic IDs after a context; retrieve: the best items by inner product; rank: given candidates
//! filter   the items that may be returned; if there are none, the answer is empty without the engine
//! engine   submit, wait; dropping the future drops the request
//! slate    leaves -> items, in the order of the beam
//! ```
//!
//! Invariant: the slate is a function of checkpoint, catalog and request alone. Caching shows in
//! `usage` and `timings_ms` only.
//!
//! What this must not know: HTTP.

mod checks;
mod context;
mod events;
mod family;
mod history;
mod nearest;
mod preparing;
mod rank;
mod retrieve;
mod search;
mod served;
mod slate;

use std::sync::Arc;
use std::time::{Duration, Instant};

use beamline_model::task::{Answer, Job};
use beamline_scheduler::{Completed, Micros, Request, Unserved};

use crate::api::{self, RecommendRequest, RecommendResponse, WarmRequest, WarmResponse};
use crate::error::Error;
use crate::settings::{HistoryCut, RequestLimits};
use search::engine_request;

pub use family::{Family, HstuFamily, TokenModel};
pub use history::{PromptLayout, coarse_step, dropped_by};
pub use rank::{MAX_CANDIDATES, MICRO_BATCH};
pub use served::{Lease, Memory, Served, model_identity};

/// Answers the requests for one model.
#[derive(Clone, Debug)]
pub struct Service {
    served: Arc<Served>,
    limits: RequestLimits,
    history_cut: HistoryCut,
    default_timeout: Option<Duration>,
}

impl Service {
    /// A service over one loaded model.
    pub fn new(served: Arc<Served>, limits: RequestLimits, history_cut: HistoryCut) -> Self {
        Self { served, limits, history_cut, default_timeout: Some(limits.default_timeout) }
    }

    /// Removes the default deadline. Offline, a late answer is better than none.
    #[must_use]
    pub fn patient(self) -> Self {
        Self { default_timeout: None, ..self }
    }

    /// The model that this service uses.
    pub fn served(&self) -> &Arc<Served> {
        &self.served
    }

    /// A service with the same limits over another model, or over the same model with another
    /// catalog.
    #[must_use]
    pub fn over(&self, served: Arc<Served>) -> Self {
        Self { served, ..self.clone() }
    }

    /// Most items of one answer.
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
        let mut answer = match served.family.retrieves() {
            Some(family) => self.retrieve(served, family, &request, request_id, &asked, deadline).await?,
            None => self.search(served, &request, request_id, &asked, deadline).await?,
        };
        answer.timings_ms.total = ms(started.elapsed());
        Ok(answer)
    }

    /// Computes a context and keeps it in the cache.
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
        let build = || context::build(served, &request, self.history_cut);
        let context = self.prepare(preparing::work(served, &request), deadline, build).await?;
        let engine_request = engine_request(served, &request, &context.input, None, deadline);
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

    /// Submits a request to the engine and waits, at most until its deadline.
    async fn run(&self, request: Request<Job>, deadline: Option<Micros>) -> Result<Completed<Answer>, Error> {
        let engine = &self.served.engine;
        let ticket = engine.submit(request).map_err(|refusal| self.explain(refusal.into()))?;
        let Some(deadline) = deadline else { return ticket.await.map_err(|e| self.explain(e)) };
        // The engine drops late requests between two steps. The client should not wait for the end
        // of a step.
        let left = Duration::from_micros(deadline.since(engine.now()).0);
        match tokio::time::timeout(left, ticket).await {
            Ok(answer) => answer.map_err(|e| self.explain(e)),
            Err(_) => Err(Error::DeadlineExceeded),
        }
    }

    /// Distinguishes an engine that is shutting down from one that has ended.
    fn explain(&self, unserved: Unserved) -> Error {
        match Error::from(unserved) {
            Error::Draining if !self.served.is_draining() => Error::Unhealthy,
            error => error,
        }
    }
}

/// Turns a warm request into a request for items.
fn widen(request: WarmRequest) -> RecommendRequest {
    let WarmRequest {
        user_id,
        history,
        token_ids,
        prompt,
        model,
        timeout_ms,
        priority,
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
        priority,
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

/// The beginning of a text from a client, for use in a message.
fn clip(text: &str) -> String {
    text.chars().take(64).collect()
}

impl From<api::Priority> for beamline_scheduler::Priority {
    fn from(priority: api::Priority) -> Self {
        match priority {
            api::Priority::Interactive => Self::Interactive,
            api::Priority::Batch => Self::Batch,
            api::Priority::Shadow => Self::Shadow,
        }
    }
}
