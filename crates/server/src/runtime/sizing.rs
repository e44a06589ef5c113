//! How large everything is made: the context, the prompt, the pages, the scheduler.
//!
//! Invariant: the largest request that the limits allow fits into the KV memory, or nothing starts.

use beamline_catalog::{Catalog, Leaf};
use beamline_kv_cache::CacheConfig;
use beamline_model::convention::Convention;
use beamline_model::error::ModelError;
use beamline_model::loaded::PAGE_SIZE;
use beamline_scheduler::{Micros, SchedulerConfig};

use super::{LoadError, LoadPlan, Scale};
use crate::service::PromptLayout;
use crate::settings::{ByteSize, Settings};

/// Fewest positions that a row may attend to in the time that the rest of the row takes. Rows of small
/// layers take longer than their multiplications say, so attention is a smaller part.
const LEAST_PAIRS_PER_ROW: u64 = 512;

/// KV memory when none is named.
const DEFAULT_KV_MEMORY: usize = 512 << 20;

/// Bytes that a step moves to and from host memory while requests that do not need them wait for it: about a
/// millisecond.
const STEP_TRANSFER_BYTES: usize = 8 << 20;

/// The most that one request can need.
#[derive(Clone, Copy, Debug)]
pub(super) struct LargestRequest {
    pub(super) context: usize,
    pub(super) beams: usize,
    pub(super) steps: usize,
}

impl LargestRequest {
    /// Pages that it holds.
    pub(super) fn pages(self) -> usize {
        let branch_rows = self.beams.saturating_mul(self.steps.saturating_sub(1));
        self.context.div_ceil(PAGE_SIZE).saturating_add(branch_rows.div_ceil(PAGE_SIZE))
    }
}

pub(super) fn context_limit(positions: usize, steps: usize, most: usize) -> Result<usize, LoadError> {
    match positions.saturating_sub(steps).min(most) {
        0 => Err(LoadError::Limits(format!(
            "{positions} positions leave no context before {steps} generated tokens"
        ))),
        limit => Ok(limit),
    }
}

/// Learns from prompts of one and two items how long prompts are.
pub(super) fn layout(
    convention: &Convention,
    catalog: &Catalog,
    limit: usize,
) -> Result<Result<PromptLayout, LoadError>, ModelError> {
    let mut path = Vec::new();
    catalog.trie().path(Leaf(0), &mut path);
    let length = |items: usize| -> Result<usize, ModelError> {
        Ok(convention.prompt(std::iter::repeat_n(path.as_slice(), items))?.len())
    };
    let (first_item, two) = (length(1)?, length(2)?);
    let layout = PromptLayout {
        first_item,
        per_item: two.saturating_sub(first_item).max(1),
        trained_on: convention.format().max_history_items,
    };
    if layout.max_items(limit) == 0 {
        let message =
            format!("a history of one item takes {first_item} tokens, the context limit is {limit}");
        return Ok(Err(LoadError::Limits(message)));
    }
    Ok(Ok(layout))
}

/// How many pages the KV memory holds; at least enough for the largest request.
pub(super) fn pages(
    memory: Option<ByteSize>,
    page_bytes: usize,
    largest: LargestRequest,
    scale: Scale,
) -> Result<u32, LoadError> {
    let needed = largest.pages();
    let default = match scale {
        Scale::Server => (DEFAULT_KV_MEMORY / page_bytes.max(1)).max(needed),
        Scale::OneRequest => needed,
    };
    let pages = memory.map_or(default, |memory| memory.0 / page_bytes.max(1));
    if pages < needed {
        return Err(LoadError::Limits(format!(
            "kv-memory of {} holds {pages} pages of {}, but one largest request ({} context tokens, {} beams of {} steps) \
             needs {needed} pages, {}; give more memory, or lower --max-context or --max-beam-width",
            memory.unwrap_or(ByteSize(0)),
            ByteSize(page_bytes),
            largest.context,
            largest.beams,
            largest.steps,
            ByteSize(needed.saturating_mul(page_bytes)),
        )));
    }
    u32::try_from(pages)
        .map_err(|_| LoadError::Limits(format!("{pages} pages are more than can be numbered")))
}

pub(super) fn scheduler_config(settings: &Settings, plan: &LoadPlan) -> SchedulerConfig {
    let &LoadPlan { largest, generated_steps, page_bytes, pairs_per_row, .. } = plan;
    let default = SchedulerConfig::default();
    let cost = largest.context.saturating_add(largest.beams.saturating_mul(generated_steps)) as u64;
    SchedulerConfig {
        max_queued: settings.engine.max_queued,
        max_running: settings.engine.max_running,
        max_context: largest.context,
        max_beam_width: largest.beams,
        max_generated_steps: generated_steps,
        max_running_cost: default.max_running_cost.max(cost),
        max_step_tokens: settings.engine.max_step_tokens,
        pairs_per_row: pairs_per_row.max(LEAST_PAIRS_PER_ROW),
        max_branch_rows: default.max_branch_rows.max(largest.beams),
        objective: Micros(0).after(settings.engine.objective),
        max_step_transfers: (STEP_TRANSFER_BYTES / page_bytes.max(1)).max(1),
        ..default
    }
}

pub(super) fn cache_config(
    settings: &Settings,
    pages: u32,
    words_per_position: usize,
    secret: Option<[u8; 32]>,
) -> Result<CacheConfig, LoadError> {
    // A key that no client can know, so that nobody can look for collisions. Pages that outlive the
    // process are filed under a key that does, too.
    let mut hash_key = secret.unwrap_or_default();
    if secret.is_none() {
        getrandom::fill(&mut hash_key)
            .map_err(|error| LoadError::Limits(format!("the system gives no random numbers: {error}")))?;
    }
    Ok(CacheConfig {
        pages,
        page_size: PAGE_SIZE as u32,
        words_per_position: words_per_position as u32,
        sessions: settings.engine.sessions,
        hash_key,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGEST: LargestRequest = LargestRequest { context: 100, beams: 64, steps: 3 };

    #[test]
    fn the_memory_holds_a_largest_request_or_is_refused() {
        // 4 pages of context and 4 of 128 branch rows.
        assert_eq!(LARGEST.pages(), 8);
        let pages = |memory, scale| pages(memory, 1 << 20, LARGEST, scale);
        assert_eq!(pages(Some(ByteSize(8 << 20)), Scale::Server).unwrap(), 8);
        assert_eq!(pages(None, Scale::Server).unwrap(), 512);
        assert_eq!(pages(None, Scale::OneRequest).unwrap(), 8);
        let error = pages(Some(ByteSize(7 << 20)), Scale::Server).unwrap_err().to_string();
        assert!(error.contains("needs 8 pages"), "{error}");
    }

    #[test]
    fn the_context_leaves_room_to_generate() {
        assert_eq!(context_limit(1024, 4, 16_384).unwrap(), 1020);
        assert_eq!(context_limit(1024, 4, 512).unwrap(), 512);
        assert!(context_limit(3, 4, 512).is_err());
    }
}
