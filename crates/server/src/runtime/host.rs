//! Where pages go that are evicted from the KV memory: host memory, a disk, both or nowhere.

use beamline_kv_cache::disk::{DiskTier, SlotLayout};
use beamline_kv_cache::{HostMemory, HostPage, HostTier, MokaTier};
use beamline_model::loaded::PAGE_SIZE;
use tracing::{info, warn};

use super::disk::{self, DiskError, Pool};
use super::sizing::LargestRequest;
use super::{LoadError, LoadPlan, Machine, Scale};
use crate::settings::{ByteSize, Settings};

/// Least memory for pages on their way to the disk, and the same again for those on their way from it.
/// It is more where a largest request evicts more at once.
const LEAST_BUFFER: usize = 16 << 20;
/// Most memory for each of the two.
const MOST_BUFFER: usize = 1 << 30;

/// Bytes of host memory for evicted pages; 0 for none. What cannot hold a single page is a mistake.
pub(super) fn bytes(
    settings: &Settings,
    page_bytes: usize,
    largest: LargestRequest,
    scale: Scale,
) -> Result<usize, LoadError> {
    let bytes = settings.engine.kv_host_memory.0;
    let one = HostPage::bytes_of(page_bytes, largest.context);
    match scale {
        Scale::OneRequest => Ok(0),
        Scale::Server if bytes > 0 && bytes < one => Err(LoadError::Limits(format!(
            "kv-host-memory of {} holds not even one page, which takes {}; give more, or 0 for none",
            ByteSize(bytes),
            ByteSize(one)
        ))),
        Scale::Server => Ok(bytes),
    }
}

/// Bytes of memory that pages on disk take; 0 without a disk. A disk that cannot hold a single page is a
/// mistake.
pub(super) fn disk_bytes(
    settings: &Settings,
    machine: &Machine,
    page_bytes: usize,
    words_per_position: usize,
    largest: LargestRequest,
    scale: Scale,
) -> Result<usize, LoadError> {
    let used = |count_only| scale == Scale::Server && (count_only || machine.disk.is_some());
    let Some(settings) = settings.kv_disk.as_ref().filter(|disk| used(disk.count_only)) else { return Ok(0) };
    let layout = layout(page_bytes, words_per_position, largest);
    match layout.slots_in(settings.size.0 as u64) {
        0 => Err(LoadError::Limits(format!(
            "kv-disk-size of {} holds not even one page, which takes {}; give more",
            settings.size,
            ByteSize(usize::try_from(layout.slot_bytes()).unwrap_or(usize::MAX))
        ))),
        slots => Ok(DiskTier::memory_bytes(slots, buffer(page_bytes, largest))),
    }
}

/// Where the pages of a version go, and its files. A disk that cannot be used is done without.
pub(super) fn memory(
    settings: &Settings,
    plan: &LoadPlan,
    machine: &Machine,
    identity: &str,
) -> (Option<HostMemory>, Option<Pool>) {
    let memory = || {
        let tier = MokaTier::new(plan.memory.kv_host, settings.engine.kv_host_ttl);
        (plan.memory.kv_host > 0).then(|| Box::new(tier) as Box<dyn HostTier>)
    };
    let (tier, pool) = match on_disk(plan, machine, identity, &memory) {
        Some(Ok((tier, pool))) => (Some(Box::new(tier) as Box<dyn HostTier>), Some(pool)),
        Some(Err(error)) => {
            warn!(%error, "contexts of this version are not kept on disk");
            (memory(), None)
        }
        None => (memory(), None),
    };
    let host = tier.map(|tier| HostMemory {
        tier,
        page_bytes: plan.page_bytes,
        // So that a largest request, when it is admitted, evicts pages that are in host memory already.
        window: plan.largest.pages(),
    });
    (host, pool)
}

fn on_disk(
    plan: &LoadPlan,
    machine: &Machine,
    identity: &str,
    memory: &dyn Fn() -> Option<Box<dyn HostTier>>,
) -> Option<Result<(DiskTier, Pool), DiskError>> {
    let disk = machine.disk.as_ref().filter(|_| plan.memory.kv_disk > 0)?;
    let layout = layout(plan.page_bytes, plan.words_per_position, plan.largest);
    let device = machine.gpu.as_ref().map_or("cpu", |gpu| gpu.name());
    let identity = disk::identity(identity, device, PAGE_SIZE, layout);
    let buffer = buffer(plan.page_bytes, plan.largest);
    let opened = disk.pool(&identity).and_then(|pool| Ok((pool.tier(memory(), layout, buffer)?, pool)));
    if let Ok((tier, _)) = &opened
        && let Some(usage) = tier.disk()
    {
        info!(pages = usage.pages, bytes = %ByteSize(usage.bytes as usize), "found contexts on disk");
    }
    Some(opened)
}

fn layout(page_bytes: usize, words_per_position: usize, largest: LargestRequest) -> SlotLayout {
    SlotLayout { page_bytes, most_words: largest.context.saturating_mul(words_per_position) }
}

fn buffer(page_bytes: usize, largest: LargestRequest) -> usize {
    largest.pages().saturating_mul(page_bytes).clamp(LEAST_BUFFER, MOST_BUFFER)
}
