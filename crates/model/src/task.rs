//! What a request wants of a model, and what it gets: the same words for every family.
//!
//! Place in the flow: the service makes a [`Job`] of a request, the scheduler carries it unread, an
//! executor does it.
//!
//! ```text
//! warm       the context, and nothing more
//! search     semantic IDs, by a constrained beam search     -> Answer::Found
//! retrieve   items of a table, by inner product             -> Answer::Items
//! score      the candidates that the request brings         -> Answer::Predictions
//! ```
//!
//! A model has one [`Head`], which decides the tasks it can do. A task that it cannot do fails only its
//! own request.

use std::sync::Arc;

use beamline_catalog::{Catalog, Filter};

use crate::decode::{Hypothesis, SearchRequest};
use crate::families::hstu::inputs::Prepared;
use crate::families::hstu::retrieval::Scored;

/// A request as an executor sees it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Job {
    /// What the model reads.
    pub context: Context,
    /// What it is to do with that.
    pub task: Task,
}

impl Job {
    /// Tokens, and the search that follows them; without one the request warms the cache.
    pub fn tokens(tokens: Arc<[u32]>, search: Option<SearchRequest>) -> Self {
        let task = search.map_or(Task::Warm, |search| Task::Search(Arc::new(search)));
        Self { context: Context::Tokens(tokens), task }
    }

    /// The search that it asks for.
    pub fn search(&self) -> Option<&SearchRequest> {
        match &self.task {
            Task::Search(search) => Some(search),
            Task::Warm | Task::Retrieve(_) | Task::Score => None,
        }
    }

    /// Events, and a task.
    pub fn events(events: Arc<Prepared>, task: Task) -> Self {
        Self { context: Context::Events(events), task }
    }
}

/// What a model reads: computed once, kept in pages, shared by all that follows it.
#[derive(Clone, Debug)]
pub enum Context {
    /// Tokens, a forced SID prefix included.
    Tokens(Arc<[u32]>),
    /// Events, and the candidates to be scored.
    Events(Arc<Prepared>),
}

impl Context {
    /// Number of positions.
    pub fn len(&self) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Events(events) => events.context_len(),
        }
    }

    /// Whether there is no position.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Candidates to be scored.
    pub fn candidates(&self) -> usize {
        match self {
            Self::Tokens(_) => 0,
            Self::Events(events) => events.candidates(),
        }
    }

    /// The tokens.
    ///
    /// # Errors
    ///
    /// When it holds events.
    pub fn as_tokens(&self) -> Result<&Arc<[u32]>, String> {
        match self {
            Self::Tokens(tokens) => Ok(tokens),
            Self::Events(_) => Err("this model reads tokens, not events".into()),
        }
    }

    /// The events.
    ///
    /// # Errors
    ///
    /// When it holds tokens.
    pub fn as_events(&self) -> Result<&Arc<Prepared>, String> {
        match self {
            Self::Events(events) => Ok(events),
            Self::Tokens(_) => Err("this model reads events, not tokens".into()),
        }
    }
}

/// What a request asks for.
#[derive(Clone, Debug)]
pub enum Task {
    /// Its context computed, and nothing more.
    Warm,
    /// The best semantic IDs under a beam search.
    Search(Arc<SearchRequest>),
    /// The best items. One step, one beam.
    Retrieve(Arc<Retrieve>),
    /// Predictions for its candidates, as many at a time as it has beams.
    Score,
}

/// What makes answers of final states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Logits of the next token.
    Tokens,
    /// Inner products with the rows of an item table.
    Items,
    /// Predictions for a candidate.
    Predictions,
}

impl Head {
    /// Whether a model with this head does a task.
    ///
    /// # Errors
    ///
    /// What it cannot do.
    pub fn check(self, task: &Task) -> Result<(), String> {
        match (self, task) {
            (_, Task::Warm)
            | (Self::Tokens, Task::Search(_))
            | (Self::Items, Task::Retrieve(_))
            | (Self::Predictions, Task::Score) => Ok(()),
            (_, Task::Search(_)) => Err("the model decodes no tokens".into()),
            (_, Task::Retrieve(_)) => Err("the model retrieves no items".into()),
            (_, Task::Score) => Err("the model scores no candidates".into()),
        }
    }
}

/// Which items are wanted.
#[derive(Clone, Debug)]
pub struct Retrieve {
    /// Number of items to return.
    pub count: usize,
    /// The items: semantic IDs of one level, whose symbol is a row of the item table.
    pub catalog: Arc<Catalog>,
    /// Which of them may be found.
    pub filter: Filter,
}

impl Retrieve {
    /// Whether a row of the item table may be found.
    pub fn allows(&self, row: u32) -> bool {
        let trie = self.catalog.trie();
        trie.walk(&[row]).is_some_and(|node| self.filter.allows_any(trie.leaves(node)))
    }
}

/// What a finished request yields.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Semantic IDs that were found.
    Found(Found),
    /// The best items, best first.
    Items(Vec<Scored>),
    /// `[candidates, names]`, names as [`Ranking::names`](crate::families::hstu::ranking::Ranking::names).
    Predictions(Vec<f32>),
}

impl Answer {
    /// The same, borrowed.
    pub fn as_found(&self) -> Option<&Found> {
        match self {
            Self::Found(found) => Some(found),
            Self::Items(_) | Self::Predictions(_) => None,
        }
    }

    /// What a search found, if this is the answer to one.
    pub fn into_found(self) -> Option<Found> {
        match self {
            Self::Found(found) => Some(found),
            Self::Items(_) | Self::Predictions(_) => None,
        }
    }
}

/// What a search found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Finished paths, best first; fewer than the beam is wide when there are no more.
    pub hypotheses: Vec<Hypothesis>,
    /// Steps of the search.
    pub steps: usize,
}
