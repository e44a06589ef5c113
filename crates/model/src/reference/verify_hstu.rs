//! HSTU in the engine beside its reference: the same random requests through both.
//!
//! Every request has all that the configuration names: events with their features, actions and
//! times, contextual features, candidates. As for prompts, the engine computes in single precision,
//! the reference in double.

use super::HstuReference;
use super::verify::{Dice, Verified};
use crate::error::ModelError;
use crate::families::hstu::config::{
    ContextualConfig, DlrmInput, HstuConfig, NvidiaInput, ResearchInput, TableConfig, VariantConfig,
};
use crate::families::hstu::inputs::{Candidates, Events, Prepared, Request};

/// Requests that are compared.
const REQUESTS: usize = 6;
/// Most events and candidates of a request: the events take more than a page.
const LONGEST: usize = 48;
/// Differences up to this part of the largest output are rounding. Less than for prompts: most
/// outputs are products of unit vectors or probabilities, which a wrong constant moves little.
const TOLERANCE: f64 = 1e-4;
/// Time of the first event, seconds.
const FIRST_TIME: i64 = 1_700_000_000;
/// The longest time between two events is two to the power of this, seconds: a good year.
const LONGEST_GAP: usize = 25;

/// The engine's outputs for a request, as those of [`HstuReference::outputs`].
pub type EngineOutputs<'a> = dyn FnMut(&Prepared) -> Result<Vec<f32>, ModelError> + 'a;

/// Compares the two on random requests that are valid for a configuration.
///
/// # Errors
///
/// When either fails.
pub fn verify_hstu(
    engine: &mut EngineOutputs<'_>,
    reference: &HstuReference,
    config: &HstuConfig,
) -> Result<Verified, ModelError> {
    let (mut verified, mut dice) = (Verified::new(TOLERANCE), Dice::new());
    for number in 0..REQUESTS {
        let most = 1 + number * (LONGEST - 1) / (REQUESTS - 1);
        let request = Random { config, dice: &mut dice }.request(most);
        let request = config.prepare(request).map_err(|error| ModelError::Internal(error.to_string()))?;
        verified.add(&engine(&request)?, &reference.outputs(&request)?)?;
    }
    Ok(verified)
}

/// What makes up requests.
struct Random<'a> {
    config: &'a HstuConfig,
    dice: &'a mut Dice,
}

impl Random<'_> {
    /// A request of at most `most` events, and as many candidates.
    fn request(&mut self, most: usize) -> Request {
        let events = most.min(self.config.max_events());
        // The longest history meets fewer candidates than the shortest: lengths should not go
        // together.
        let candidates = (LONGEST + 1 - most).min(self.config.max_candidates());
        let mut request = match &self.config.variant {
            VariantConfig::Research(input, _) => self.research(input, events),
            VariantConfig::Dlrm(input, _) => self.dlrm(input, events, candidates),
            VariantConfig::Nvidia(input, _) => self.nvidia(input, events, candidates),
        };
        request.events.times = self.times(events);
        request.query_time = request.events.times.last().copied().unwrap_or(FIRST_TIME) + self.gap();
        request
    }

    fn research(&mut self, input: &ResearchInput, events: usize) -> Request {
        let items = self.ids(events, input.num_items + 1);
        let actions = input.actions.map_or_else(Vec::new, |actions| self.ids(events, actions.count));
        Request { events: Events { items, actions, ..Events::default() }, ..Request::default() }
    }

    fn dlrm(&mut self, input: &DlrmInput, events: usize, candidates: usize) -> Request {
        let mut features = |count: usize| -> Vec<Vec<u32>> {
            let features = input.features.iter();
            features.map(|feature| self.ids(count, rows(&input.tables, &feature.table))).collect()
        };
        let (mut additional, mut of_candidates) = (features(events), features(candidates));
        let (items, candidate_items) = (additional.remove(0), of_candidates.remove(0));
        let all = input.action_weights.iter().fold(0, |all, bit| all | bit);
        let actions = (0..events).map(|_| self.dice.below(usize::MAX) as u32 & all).collect();
        Request {
            events: Events { items, additional, actions, ..Events::default() },
            contextual: self.contextual(&input.contextual, &input.tables),
            candidates: Candidates { items: candidate_items, additional: of_candidates },
            ..Request::default()
        }
    }

    fn nvidia(&mut self, input: &NvidiaInput, events: usize, candidates: usize) -> Request {
        let items = rows(&input.tables, &input.item_table);
        let actions = input.action_table.as_ref().map(|table| rows(&input.tables, table));
        Request {
            events: Events {
                items: self.ids(events, items),
                actions: actions.map_or_else(Vec::new, |rows| self.ids(events, rows)),
                ..Events::default()
            },
            contextual: self.contextual(&input.contextual, &input.tables),
            candidates: Candidates { items: self.ids(candidates, items), additional: Vec::new() },
            ..Request::default()
        }
    }

    /// Values of contextual features, at most as many as there are slots.
    fn contextual(&mut self, features: &[ContextualConfig], tables: &[TableConfig]) -> Vec<Vec<u32>> {
        let of = |feature: &ContextualConfig| {
            let count = self.dice.below(feature.slots.min(LONGEST) + 1);
            self.ids(count, rows(tables, &feature.table))
        };
        features.iter().map(of).collect()
    }

    fn ids(&mut self, count: usize, rows: usize) -> Vec<u32> {
        (0..count).map(|_| self.dice.below(rows) as u32).collect()
    }

    /// Times of events, ascending.
    fn times(&mut self, events: usize) -> Vec<i64> {
        let mut time = FIRST_TIME;
        let next = |_| {
            time += self.gap();
            time
        };
        (0..events).map(next).collect()
    }

    /// Time between two events, as often of a second as of a month.
    fn gap(&mut self) -> i64 {
        let most = 1 << self.dice.below(LONGEST_GAP + 1);
        self.dice.below(most) as i64
    }
}

/// Rows of a table.
fn rows(tables: &[TableConfig], name: &str) -> usize {
    tables.iter().find(|table| table.name == name).map_or(0, |table| table.rows)
}
