//! What one request brings to an HSTU model, checked, and the words that its context is addressed by.
//!
//! Place in the flow: the service fills in a [`Request`] with row numbers of the model's tables.
//! [`Hstu::prepare`](super::Hstu::prepare) checks all of it before any work is done and returns a
//! [`Prepared`] one. The rows of the layers are made from that.
//!
//! Rows of the context by variant:
//!
//! ```text
//! research   one row per event; where it decodes semantic IDs, one per level of the event's item, all
//!            with its action and time
//! dlrm       contextual slots, a fixed number | one row per event, its action summed in
//! nvidia     contextual values, as many as there are | item, action, item, action ..
//! ```
//!
//! Invariants of a prepared request: every id is a row of its table; times do not run backwards among
//! events. The words of a position hold everything that its keys and values depend on, beside the words
//! before it. Where row `i` is biased by the time of event `i + 1`, that time is in its words: a later
//! event that changes it must not hit.

use std::ops::Range;

use super::config::{
    DlrmInput, HstuConfig, NvidiaInput, ResearchHead, ResearchInput, ResearchOutput, SemanticIdLevel,
    TableConfig, UnknownIds, VariantConfig,
};
use crate::step::ContextShape;

/// Times must lie within this of zero, so that differences cannot overflow.
const TIME_LIMIT: i64 = 1 << 61;

/// The events of a user, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Rows of the item table. For a model that decodes tokens: the tokens, one event each.
    pub items: Vec<u32>,
    /// Ids of the additional features, `[feature][event]`.
    pub additional: Vec<Vec<u32>>,
    /// Action of each event: a row of the action table, or for `dlrm` the bits of all actions. A model
    /// without an input for actions ignores it, and it may then be empty.
    pub actions: Vec<u32>,
    /// Time of each event, in the unit of training (seconds in all published models). May be empty where
    /// the model has no input for times.
    pub times: Vec<i64>,
}

/// Items to be ranked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidates {
    /// Rows of the item table.
    pub items: Vec<u32>,
    /// Ids of the additional features, `[feature][candidate]`.
    pub additional: Vec<Vec<u32>>,
}

/// What one request brings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// History of the user.
    pub events: Events,
    /// Values of each contextual feature, in the order of the configuration. A feature may have fewer
    /// values than slots.
    pub contextual: Vec<Vec<u32>>,
    /// Time of the query: an input of the model where it knows times.
    pub query_time: i64,
    /// Items to be ranked; all of them, also when they are scored a few at a time.
    pub candidates: Candidates,
}

/// Why a request cannot be computed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InputError {
    /// There is no row to compute.
    #[error("the history is empty")]
    NoEvents,
    /// The history is too long; what to leave out is not for the model to decide.
    #[error("a history of {events} events, the model takes {most}")]
    TooManyEvents {
        /// How many there are.
        events: usize,
        /// How many may be.
        most: usize,
    },
    /// Too many candidates.
    #[error("{candidates} candidates, the model takes {most}")]
    TooManyCandidates {
        /// How many there are.
        candidates: usize,
        /// How many may be.
        most: usize,
    },
    /// The model ranks nothing.
    #[error("candidates for a model that does not rank")]
    NoRanking,
    /// Lists that belong together differ in length.
    #[error("{what}: {got} given, expected {expected}")]
    Count {
        /// Name of the list.
        what: String,
        /// Length of the list.
        got: usize,
        /// The length it should have.
        expected: usize,
    },
    /// An id is no row of its table.
    #[error("{what} {index}: id {id} of a table of {rows} rows")]
    UnknownId {
        /// Name of the feature.
        what: String,
        /// Which of the list.
        index: usize,
        /// Id that was given.
        id: u32,
        /// Rows of the table.
        rows: usize,
    },
    /// An event is older than the one before it.
    #[error("event {index} at time {time} follows one at {previous}: times run backwards")]
    TimesRunBackwards {
        /// Index of the event.
        index: usize,
        /// Time of the event.
        time: i64,
        /// Time of the one before.
        previous: i64,
    },
    /// A time is out of any range.
    #[error("time {0} is out of range")]
    TimeOutOfRange(i64),
    /// A generated row lies beyond the model's positions.
    #[error("position {position} of a model of {most} positions")]
    TooDeep {
        /// Position of the row.
        position: usize,
        /// How many there are.
        most: usize,
    },
    /// A context of this model is computed at once or not at all.
    #[error("contextual rows see the whole context: it cannot be computed in parts")]
    NeedsWholeContext,
}

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    pub(crate) request: Request,
    context_len: usize,
    /// Contextual values of `nvidia`, `(feature, id)`, in front of the history.
    pub(super) contextual_rows: Vec<(u32, u32)>,
    /// Contextual slots of `dlrm`: the id, or none.
    pub(super) slots: Vec<Option<u32>>,
    times: Vec<i64>,
    ids: Vec<u32>,
    words: Vec<u32>,
}

impl Prepared {
    /// Rows of the context.
    pub fn context_len(&self) -> usize {
        self.context_len
    }

    /// Number of candidates.
    pub fn candidates(&self) -> usize {
        self.request.candidates.items.len()
    }

    /// Words of all positions, [`HstuConfig::words_per_position`] each: what cached pages are addressed by.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Times of all positions and of the query; empty where the layers have no relative bias.
    pub(crate) fn times(&self) -> &[i64] {
        &self.times
    }

    /// An id for each row, for people to look at.
    pub(crate) fn ids(&self, positions: Range<usize>) -> &[u32] {
        &self.ids[positions]
    }
}

/// A 64-bit time as two words.
fn time_words(time: i64) -> [u32; 2] {
    [time as u32, (time >> 32) as u32]
}

fn count(what: &str, got: usize, expected: usize) -> Result<(), InputError> {
    if got == expected { Ok(()) } else { Err(InputError::Count { what: what.to_owned(), got, expected }) }
}

/// Checks ids against a table, and clamps them where the table says so.
fn rows_of(what: &str, ids: &mut [u32], table: &TableConfig) -> Result<(), InputError> {
    for (index, id) in ids.iter_mut().enumerate().filter(|(_, id)| **id as usize >= table.rows) {
        match table.unknown_ids {
            UnknownIds::Clamp => *id = (table.rows - 1) as u32,
            UnknownIds::Refuse => {
                return Err(InputError::UnknownId {
                    what: what.to_owned(),
                    index,
                    id: *id,
                    rows: table.rows,
                });
            }
        }
    }
    Ok(())
}

pub(super) fn table<'a>(tables: &'a [TableConfig], name: &str) -> &'a TableConfig {
    match tables.iter().find(|table| table.name == name) {
        Some(table) => table,
        None => unreachable!("the configuration was checked: there is a table {name:?}"),
    }
}

impl Events {
    fn check_times(&self) -> Result<(), InputError> {
        count("times", self.times.len(), self.items.len())?;
        if let Some(&time) = self.times.iter().find(|time| !(-TIME_LIMIT..TIME_LIMIT).contains(*time)) {
            return Err(InputError::TimeOutOfRange(time));
        }
        match self.times.windows(2).position(|pair| pair[1] < pair[0]) {
            None => Ok(()),
            Some(before) => Err(InputError::TimesRunBackwards {
                index: before + 1,
                time: self.times[before + 1],
                previous: self.times[before],
            }),
        }
    }
}

impl HstuConfig {
    /// Words that address one position of a context.
    pub fn words_per_position(&self) -> usize {
        match &self.variant {
            VariantConfig::Research(input, _) => {
                1 + usize::from(input.actions.is_some())
                    + if self.stack.relative_bias.is_some() { 4 } else { 0 }
            }
            VariantConfig::Nvidia(..) => 2,
            VariantConfig::Dlrm(input, _) => 7 + input.features.len(),
        }
    }

    /// Rows that an event of the history takes in [`Request::events`]: one for each level of a semantic ID.
    pub fn rows_per_event(&self) -> usize {
        self.semantic_id_levels().map_or(1, <[_]>::len)
    }

    /// What the levels of a semantic ID are written as, in a model that decodes them.
    pub fn semantic_id_levels(&self) -> Option<&[SemanticIdLevel]> {
        match &self.variant {
            VariantConfig::Research(
                _,
                ResearchOutput { head: ResearchHead::Tokens { semantic_id_levels, .. }, .. },
            ) => Some(semantic_id_levels),
            _ => None,
        }
    }

    /// Most entries of [`Request::events`].
    pub fn max_events(&self) -> usize {
        match &self.variant {
            VariantConfig::Research(input, _) => input.max_sequence_length,
            VariantConfig::Nvidia(input, _) => input.max_history,
            VariantConfig::Dlrm(input, _) => input.max_history,
        }
    }

    /// Most candidates of a request.
    pub fn max_candidates(&self) -> usize {
        match &self.variant {
            VariantConfig::Research(..) => 0,
            VariantConfig::Nvidia(input, _) => input.max_candidates,
            VariantConfig::Dlrm(input, _) => input.max_candidates,
        }
    }

    /// Most rows of a context.
    pub fn max_context(&self) -> usize {
        match &self.variant {
            VariantConfig::Research(input, _) => input.max_sequence_length,
            VariantConfig::Dlrm(input, _) => input.slots() + input.max_history,
            VariantConfig::Nvidia(input, _) => {
                let contextual: usize = input.contextual.iter().map(|feature| feature.slots).sum();
                contextual + input.max_history * if input.action_table.is_some() { 2 } else { 1 }
            }
        }
    }

    /// Positions that context and generated rows may take; unlimited where positions end in a shared one.
    fn positions(&self) -> usize {
        match &self.variant {
            VariantConfig::Research(input, _) => {
                self.stack.relative_bias.map_or(usize::MAX, |bias| bias.positions).min(input.position.rows)
            }
            VariantConfig::Dlrm(..) | VariantConfig::Nvidia(..) => usize::MAX,
        }
    }

    /// Whether these positions of a context can be computed without the others.
    ///
    /// # Errors
    ///
    /// When the mask shows rows what is not computed yet.
    pub(crate) fn check_chunk(&self, request: &Prepared, positions: &Range<usize>) -> Result<(), InputError> {
        match self.context_shape() {
            ContextShape::Whole if *positions != (0..request.context_len()) => {
                Err(InputError::NeedsWholeContext)
            }
            ContextShape::Whole | ContextShape::Causal => Ok(()),
        }
    }

    /// Position of a token that has this number of ancestors, itself included.
    ///
    /// # Errors
    ///
    /// When it lies beyond the model's positions.
    pub(crate) fn generated_position(
        &self,
        request: &Prepared,
        ancestors: usize,
    ) -> Result<usize, InputError> {
        let (position, most) = (request.context_len() + ancestors - 1, self.positions());
        if position >= most { Err(InputError::TooDeep { position, most }) } else { Ok(position) }
    }

    /// Checks a request.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn prepare(&self, request: Request) -> Result<Prepared, InputError> {
        let (events, most) = (request.events.items.len(), self.max_events());
        if events > most {
            return Err(InputError::TooManyEvents { events, most });
        }
        let (candidates, most) = (request.candidates.items.len(), self.max_candidates());
        if candidates > 0 && most == 0 {
            return Err(InputError::NoRanking);
        }
        if candidates > most {
            return Err(InputError::TooManyCandidates { candidates, most });
        }
        if !(-TIME_LIMIT..TIME_LIMIT).contains(&request.query_time) {
            return Err(InputError::TimeOutOfRange(request.query_time));
        }
        let prepared = match &self.variant {
            VariantConfig::Research(input, output) => {
                self.prepare_research(input, matches!(&output.head, ResearchHead::Tokens { .. }), request)
            }
            VariantConfig::Dlrm(input, _) => prepare_dlrm(input, request),
            VariantConfig::Nvidia(input, _) => prepare_nvidia(input, request),
        }?;
        debug_assert_eq!(prepared.words.len(), prepared.context_len * self.words_per_position());
        if prepared.context_len == 0 { Err(InputError::NoEvents) } else { Ok(prepared) }
    }

    fn prepare_research(
        &self,
        input: &ResearchInput,
        tokens: bool,
        mut request: Request,
    ) -> Result<Prepared, InputError> {
        let what = if tokens { "token" } else { "item" };
        let rows =
            TableConfig { name: what.to_owned(), rows: input.num_items + 1, unknown_ids: UnknownIds::Refuse };
        let events = &mut request.events;
        let len = events.items.len();
        rows_of(what, &mut events.items, &rows)?;
        if let Some(actions) = input.actions {
            count("actions", events.actions.len(), len)?;
            let rows = TableConfig { rows: actions.count, ..rows };
            rows_of("action", &mut events.actions, &rows)?;
        }
        let mut times = Vec::new();
        if self.stack.relative_bias.is_some() {
            events.check_times()?;
            times.extend_from_slice(&events.times);
            times.push(request.query_time);
        }
        let mut words = Vec::with_capacity(len * self.words_per_position());
        for position in 0..len {
            words.push(events.items[position]);
            if input.actions.is_some() {
                words.push(events.actions[position]);
            }
            if let Some([time, next]) = times.get(position..position + 2) {
                words.extend(time_words(*time));
                words.extend(time_words(*next));
            }
        }
        Ok(Prepared {
            context_len: len,
            contextual_rows: Vec::new(),
            slots: Vec::new(),
            times,
            ids: events.items.clone(),
            words,
            request,
        })
    }
}

fn prepare_dlrm(input: &DlrmInput, mut request: Request) -> Result<Prepared, InputError> {
    let (events, candidates) = (&mut request.events, &mut request.candidates);
    let len = events.items.len();
    count("actions", events.actions.len(), len)?;
    events.check_times()?;
    let additional = input.features.len() - 1;
    count("additional features of events", events.additional.len(), additional)?;
    if !candidates.items.is_empty() {
        count("additional features of candidates", candidates.additional.len(), additional)?;
    }
    let [item, others @ ..] = &input.features[..] else {
        unreachable!("the configuration was checked: the first feature is the item")
    };
    let of = |name: &str| table(&input.tables, name);
    rows_of(&item.name, &mut events.items, of(&item.table))?;
    rows_of(&format!("candidate {}", item.name), &mut candidates.items, of(&item.table))?;
    for (feature, ids) in others.iter().zip(&mut events.additional) {
        count(&feature.name, ids.len(), len)?;
        rows_of(&feature.name, ids, of(&feature.table))?;
    }
    for (feature, ids) in others.iter().zip(&mut candidates.additional) {
        count(&format!("candidate {}", feature.name), ids.len(), candidates.items.len())?;
        rows_of(&format!("candidate {}", feature.name), ids, of(&feature.table))?;
    }
    count("contextual features", request.contextual.len(), input.contextual.len())?;
    let mut slots = Vec::with_capacity(input.slots());
    for (feature, ids) in input.contextual.iter().zip(&mut request.contextual) {
        if ids.len() > feature.slots {
            return Err(InputError::Count {
                what: feature.name.clone(),
                got: ids.len(),
                expected: feature.slots,
            });
        }
        rows_of(&feature.name, ids, of(&feature.table))?;
        // The reference compares the events together with the candidates.
        let there = len + candidates.items.len() >= feature.min_tokens;
        slots.extend((0..feature.slots).map(|slot| ids.get(slot).copied().filter(|_| there)));
    }
    let context_len = slots.len() + len;
    let whole: Vec<u32> = [context_len as u32].into_iter().chain(time_words(request.query_time)).collect();
    let (mut words, mut ids) = (Vec::new(), Vec::new());
    for (slot, id) in slots.iter().enumerate() {
        words.extend_from_slice(&whole);
        words.extend([slot as u32 + 1, u32::from(id.is_some()), id.unwrap_or_default()]);
        words.extend(std::iter::repeat_n(0, additional + 2));
        ids.push(id.unwrap_or_default());
    }
    for event in 0..len {
        words.extend_from_slice(&whole);
        words.extend([0, events.actions[event], events.items[event]]);
        words.extend(events.additional.iter().map(|ids| ids[event]));
        words.extend(time_words(events.times[event]));
        ids.push(events.items[event]);
    }
    Ok(Prepared { context_len, contextual_rows: Vec::new(), slots, times: Vec::new(), ids, words, request })
}

fn prepare_nvidia(input: &NvidiaInput, mut request: Request) -> Result<Prepared, InputError> {
    let (events, candidates) = (&mut request.events, &mut request.candidates);
    let len = events.items.len();
    let of = |name: &str| table(&input.tables, name);
    rows_of("item", &mut events.items, of(&input.item_table))?;
    rows_of("candidate item", &mut candidates.items, of(&input.item_table))?;
    if let Some(actions) = &input.action_table {
        count("actions", events.actions.len(), len)?;
        rows_of("action", &mut events.actions, of(actions))?;
    }
    count("contextual features", request.contextual.len(), input.contextual.len())?;
    let mut contextual_rows = Vec::new();
    for (index, (feature, ids)) in input.contextual.iter().zip(&mut request.contextual).enumerate() {
        if ids.len() > feature.slots {
            return Err(InputError::Count {
                what: feature.name.clone(),
                got: ids.len(),
                expected: feature.slots,
            });
        }
        rows_of(&feature.name, ids, of(&feature.table))?;
        contextual_rows.extend(ids.iter().map(|&id| (index as u32, id)));
    }
    let (mut words, mut ids) = (Vec::new(), Vec::new());
    let mut row = |kind: u32, id: u32| {
        words.extend([kind, id]);
        ids.push(id);
    };
    for &(feature, id) in &contextual_rows {
        row(2 + feature, id);
    }
    for event in 0..len {
        row(0, events.items[event]);
        if input.action_table.is_some() {
            row(1, events.actions[event]);
        }
    }
    let context_len = ids.len();
    Ok(Prepared { context_len, contextual_rows, slots: Vec::new(), times: Vec::new(), ids, words, request })
}
