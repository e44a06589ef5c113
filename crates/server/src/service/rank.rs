//! Predictions for given candidates.
//!
//! ```text
//! HSTU that ranks      the history once, the candidates beside it a few hundred at a time:
//!                      predictions by task
//! semantic IDs         a search that may find the candidates only, wide enough to lose none:
//!                      their exact log-probability
//! ```
//!
//! Invariant: a candidate's predictions depend neither on the other candidates, nor on how many are
//! computed at a time.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use beamline_catalog::{FilterSpec, ItemIndex, Leaf};
use beamline_model::decode::SearchRequest;
use beamline_model::families::hstu::inputs::Candidates;
use beamline_model::task::{Answer, Task};
use beamline_scheduler::{Micros, Usage};

use super::checks::Asked;
use super::events::{self, Given};
use super::family::HstuFamily;
use super::search::{engine_request, search_of};
use super::served::Whose;
use super::{Served, Service, checks, clip, context, ms, nearest, preparing, timings, usage};
use crate::api::{self, RankRequest, RankResponse, RankedCandidate, RecommendRequest};
use crate::error::Error;

/// Most candidates of a request.
pub const MAX_CANDIDATES: usize = 4096;
/// Candidates that are computed at a time: enough for the matrix products, few enough that others get
/// their turn.
pub const MICRO_BATCH: usize = 256;
/// Name of what a model of semantic IDs predicts.
const LOG_PROBABILITY: &str = "log_probability";

/// What was computed for the known candidates, in their order.
struct Ranked {
    /// Names of the predictions.
    names: Vec<String>,
    /// Predictions of the candidates, `[candidates][names]`.
    predictions: Vec<f64>,
    unknown_items: Vec<String>,
    dropped: usize,
    usage: Usage,
    timings: api::Timings,
}

impl Service {
    /// Predicts what a user would do with candidates.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub async fn rank(&self, request: RankRequest, request_id: String) -> Result<RankResponse, Error> {
        let started = Instant::now();
        let received = self.served.engine.now();
        let served = self.find(request.model.as_deref())?;
        let shared = shared(&request);
        let timeout = checks::common(&shared, &self.limits)?;
        let deadline = self.deadline(received, timeout);
        let (known, unknown) = candidates(served, &request, self)?;
        if !served.family.tasks().contains(&"rank") {
            return Err(Error::TaskNotSupported(served.family.tasks()));
        }
        let ranked = match served.family.predicts() {
            Some(family) => self.rank_by_task(served, family, &request, &known, deadline).await?,
            None => self.rank_by_search(served, &shared, &known, deadline).await?,
        };
        let mut timings_ms = ranked.timings;
        let candidates = in_order(&request, &known, &ranked)?;
        timings_ms.total = ms(started.elapsed());
        Ok(RankResponse {
            request_id,
            model: served.model_name(),
            catalog_version: served.catalog.version().to_owned(),
            candidates,
            unknown_candidates: unknown,
            unknown_items: ranked.unknown_items,
            dropped_history: ranked.dropped as u64,
            usage: usage(&ranked.usage),
            timings_ms,
        })
    }

    async fn rank_by_task(
        &self,
        served: &Served,
        family: &HstuFamily,
        request: &RankRequest,
        known: &[(usize, ItemIndex)],
        deadline: Option<Micros>,
    ) -> Result<Ranked, Error> {
        let none = BTreeMap::new();
        let given = Given {
            history: &request.history,
            strict: request.strict_history.unwrap_or(false),
            query_time: request.query_time,
            features: request.features.as_ref().unwrap_or(&none),
            prefix: &[],
        };
        let work = preparing::work_of_history(served, &request.history);
        let build = || events::input(served, family, &given, self.history_cut);
        let mut input = self.prepare(work, deadline, build).await?;
        let names = family.config.item_features();
        let mut candidates =
            Candidates { additional: vec![Vec::new(); names.len()], ..Candidates::default() };
        for &(index, item) in known {
            candidates.items.push(events::row(served, item));
            let whose = || format!("candidate {index}");
            let given = request.candidates[index].features.as_ref();
            let ids = events::features("candidates.features", &names, given, &whose)?;
            candidates.additional.iter_mut().zip(ids).for_each(|(all, id)| all.push(id));
        }
        input.request.candidates = candidates;
        let prepared = Arc::new(events::prepare(family, input.request)?);
        let width = known.len().min(MICRO_BATCH);
        let steps = 1 + known.len().div_ceil(width);
        let whose = Whose {
            user: request.user_id.as_deref(),
            tenant: request.tenant.as_deref(),
            priority: request.priority,
        };
        let engine = served.hstu_request(family, prepared, Task::Score, whose, (width, steps), deadline);
        let done = self.run(engine, deadline).await?;
        let Some(Answer::Predictions(predictions)) = &done.answer else {
            return Err(Error::internal("a ranking without predictions"));
        };
        Ok(Ranked {
            names: family.config.prediction_names(),
            predictions: predictions.iter().map(|&x| f64::from(x)).collect(),
            unknown_items: input.unknown,
            dropped: input.dropped,
            usage: done.usage.clone(),
            timings: timings(&done.timings),
        })
    }

    async fn rank_by_search(
        &self,
        served: &Served,
        request: &RecommendRequest,
        known: &[(usize, ItemIndex)],
        deadline: Option<Micros>,
    ) -> Result<Ranked, Error> {
        let build = || context::build(served, request, self.history_cut);
        let context = self.prepare(preparing::work(served, request), deadline, build).await?;
        let mut leaves: Vec<Leaf> = known.iter().map(|&(_, item)| served.catalog.leaf_of(item)).collect();
        leaves.sort_unstable();
        leaves.dedup();
        let mut scores: HashMap<Leaf, f64> = HashMap::with_capacity(leaves.len());
        let (mut used, mut took) = (Usage::default(), api::Timings::default());
        // As many at a time as a beam may be wide: the search then prunes nothing, and finds all of them.
        for (round, part) in leaves.chunks(self.limits.max_beam_width).enumerate() {
            let ids: Vec<String> = part
                .iter()
                .filter_map(|&leaf| served.catalog.items_of(leaf).first())
                .map(|&item| served.catalog.item_id(item).to_owned())
                .collect();
            let only = FilterSpec { allow_items: Some(&ids), ..FilterSpec::default() };
            let search = SearchRequest {
                // The whole catalog is allowed, not just this part of the candidates.
                normalize_over: Some(Box::new(served.catalog.filter(&FilterSpec::default()))),
                ..search_of(served, &context, served.catalog.filter(&only), request.normalization)
            };
            let asked = Asked::of_width(part.len());
            let beam = Some((search, &asked, part.len()));
            let done =
                self.run(engine_request(served, request, &context.input, beam, deadline), deadline).await?;
            let Some(Answer::Found(found)) = &done.answer else {
                return Err(Error::internal("a search without an answer"));
            };
            scores.extend(found.hypotheses.iter().map(|found| (found.leaf, found.score)));
            let each = timings(&done.timings);
            if round == 0 {
                (used, took) = (done.usage.clone(), each);
            } else {
                used.steps += done.usage.steps;
                took.decode += each.queue + each.prefill + each.decode;
            }
        }
        let score = |&(_, item): &(usize, ItemIndex)| {
            let score = scores.get(&served.catalog.leaf_of(item)).copied();
            score.ok_or_else(|| Error::internal("a candidate that the search did not find"))
        };
        Ok(Ranked {
            names: vec![LOG_PROBABILITY.to_owned()],
            predictions: known.iter().map(score).collect::<Result<_, _>>()?,
            unknown_items: context.unknown,
            dropped: context.dropped,
            usage: used,
            timings: took,
        })
    }
}

/// What a request to rank has in common with one for items.
fn shared(request: &RankRequest) -> RecommendRequest {
    RecommendRequest {
        user_id: request.user_id.clone(),
        history: Some(request.history.clone()),
        model: request.model.clone(),
        normalization: request.normalization,
        timeout_ms: request.timeout_ms,
        priority: request.priority,
        strict_history: request.strict_history,
        tenant: request.tenant.clone(),
        query_time: request.query_time,
        features: request.features.clone(),
        ..RecommendRequest::default()
    }
}

/// Known candidates, with their places in the request, and unknown ones.
type Looked = (Vec<(usize, ItemIndex)>, Vec<String>);

fn candidates(served: &Served, request: &RankRequest, service: &Service) -> Result<Looked, Error> {
    let invalid = |message: String| Error::InvalidValue { param: "candidates", message: message.into() };
    let count = request.candidates.len();
    if count == 0 {
        return Err(invalid("must hold at least one item".into()));
    }
    checks::at_most("candidates", count as u64, "candidates", MAX_CANDIDATES)?;
    let (mut known, mut unknown, mut named) = (Vec::new(), Vec::new(), HashSet::new());
    for (index, candidate) in request.candidates.iter().enumerate() {
        checks::string("candidates.item_id", &candidate.item_id, &service.limits)?;
        if !named.insert(candidate.item_id.as_str()) {
            return Err(invalid(format!("holds {:?} twice", clip(&candidate.item_id))));
        }
        match served.catalog.item(&candidate.item_id) {
            Some(item) => known.push((index, item)),
            None => unknown.push(candidate.item_id.clone()),
        }
    }
    if known.is_empty() {
        return Err(Error::NoKnownCandidates(nearest::items(&served.catalog, unknown)));
    }
    Ok((known, unknown))
}

/// The candidates with their predictions: best first where there is a score to order by, else in the
/// given order.
fn in_order(
    request: &RankRequest,
    known: &[(usize, ItemIndex)],
    ranked: &Ranked,
) -> Result<Vec<RankedCandidate>, Error> {
    let names = &ranked.names;
    let weights: Option<Vec<f64>> = match &request.task_weights {
        None => (names.len() == 1).then(|| vec![1.0]),
        Some(given) => {
            let unknown = given.keys().find(|name| !names.contains(name));
            if let Some(name) = unknown {
                let message = format!("has {:?}; this model predicts {}", clip(name), names.join(", "));
                return Err(Error::InvalidValue { param: "task_weights", message: message.into() });
            }
            if given.values().any(|weight| !weight.is_finite()) {
                let message = "must be finite numbers".into();
                return Err(Error::InvalidValue { param: "task_weights", message });
            }
            Some(names.iter().map(|name| given.get(name).copied().unwrap_or(0.0)).collect())
        }
    };
    let mut all: Vec<RankedCandidate> = known
        .iter()
        .zip(ranked.predictions.chunks_exact(names.len()))
        .map(|(&(index, _), values)| RankedCandidate {
            item_id: request.candidates[index].item_id.clone(),
            rank: None,
            score: weights.as_ref().map(|weights| weights.iter().zip(values).map(|(w, x)| w * x).sum()),
            predictions: names.iter().cloned().zip(values.iter().copied()).collect(),
        })
        .collect();
    if weights.is_some() {
        // Stable: of equal ones, the first given stays first.
        all.sort_by(|a, b| b.score.unwrap_or_default().total_cmp(&a.score.unwrap_or_default()));
        all.iter_mut().zip(1..).for_each(|(candidate, rank)| candidate.rank = Some(rank));
    }
    Ok(all)
}
