//! Metrics in Prometheus' text format.
//!
//! Place in the flow: requests are counted where they end. Counters of the engine are copied at
//! every scrape.
//!
//! Buckets are dense from 1 to 150 ms, where answers should be.

mod process;

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use beamline_kv_cache::disk::DiskUsage;
use beamline_scheduler::EngineStats;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_util::MetricKindMask;

use crate::api::Timings;
use crate::logging;
use crate::registry::Registry;
use crate::request_log::RequestLog;

const STAGE_SECONDS: &str = "beamline_stage_seconds";
const HTTP_SECONDS: &str = "beamline_http_request_seconds";

/// How long a gauge that is no longer set is still shown.
const FORGET_GAUGES: Duration = Duration::from_secs(3600);

/// Bounds of the histograms, in milliseconds.
const BUCKETS_MS: [f64; 33] = [
    0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.5, 15.0, 17.5, 20.0, 25.0, 30.0, 35.0,
    40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0, 125.0, 150.0, 250.0, 500.0, 1000.0, 2500.0, 10000.0,
];

/// Why metrics could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start metrics: {0}")]
pub struct MetricsError(String);

/// Starts recording metrics, once per process.
///
/// # Errors
///
/// When recording was started before.
pub fn start() -> Result<PrometheusHandle, MetricsError> {
    let seconds = BUCKETS_MS.map(|ms| ms / 1e3);
    let builder = [STAGE_SECONDS, HTTP_SECONDS]
        .into_iter()
        .try_fold(PrometheusBuilder::new(), |builder, name| {
            builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), &seconds)
        })
        .map_err(|error| MetricsError(error.to_string()))?
        // Every scrape sets every gauge, except those of unloaded models and replaced catalogs,
        // which must not accumulate.
        .idle_timeout(MetricKindMask::GAUGE, Some(FORGET_GAUGES));
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|error| MetricsError(error.to_string()))?;
    describe();
    Ok(handle)
}

fn describe() {
    process::describe();
    describe_counter!(
        "beamline_requests_total",
        "Requests by endpoint and outcome: ok, the type of the error, or cancelled."
    );
    describe_histogram!(HTTP_SECONDS, "Time from the head of a request to its answer, by endpoint.");
    describe_histogram!(STAGE_SECONDS, "Time of answered requests by stage: queue, prefill, decode, total.");
    describe_counter!("beamline_items_total", "Items returned.");
    describe_gauge!("beamline_build_info", "1, with the version of the server.");
    describe_gauge!(
        "beamline_model_info",
        "1, with name and digest of the model and the version of its catalog."
    );
    describe_gauge!(
        "beamline_model_memory_bytes",
        "Memory of all models by kind: used, which counts weights, KV pages and catalogs, and limit."
    );
    describe_counter!("beamline_log_lines_dropped_total", "Lines of the log that stderr did not take.");
    describe_counter!(
        "beamline_request_log_dropped_total",
        "Lines of the request log that were not written."
    );
    describe_gauge!("beamline_ready", "1 while requests are taken.");
    describe_gauge!("beamline_requests_queued", "Requests waiting for admission.");
    describe_gauge!("beamline_requests_running", "Requests being computed.");
    describe_counter!("beamline_engine_requests_total", "Requests by how they ended in the engine.");
    describe_counter!("beamline_engine_retries_total", "Requests tried again alone after a failed step.");
    describe_counter!("beamline_steps_total", "Passes through the model by result.");
    describe_gauge!(
        "beamline_failed_steps_in_a_row",
        "Failed passes since the last one that succeeded, of the engine that has most: a model that never recovers."
    );
    describe_counter!("beamline_step_microseconds_total", "Time of the passes that succeeded.");
    describe_counter!("beamline_rows_total", "Rows computed: context and branch.");
    describe_gauge!("beamline_pages", "KV pages: free, referenced by requests, or cached for later.");
    describe_gauge!("beamline_sessions", "Users whose newest context is remembered.");
    describe_counter!("beamline_prefix_lookups_total", "Searches for a cached prefix.");
    describe_counter!(
        "beamline_prefix_tokens_total",
        "Context tokens by where they came from: hit (KV pages), restored (host memory or disk), miss (computed)."
    );
    describe_counter!("beamline_page_evictions_total", "Cached pages given up to make room.");
    describe_gauge!("beamline_host_pages", "Evicted KV pages kept in host memory.");
    describe_gauge!("beamline_host_bytes", "Host memory for evicted KV pages: used, and capacity.");
    describe_counter!("beamline_host_lookups_total", "Searches in host memory for what no KV page held.");
    describe_counter!("beamline_host_exported_pages_total", "KV pages copied into host memory.");
    describe_counter!("beamline_host_restored_pages_total", "KV pages that came back from host memory.");
    describe_counter!(
        "beamline_host_dropped_pages_total",
        "Pages dropped from host memory: for room, for age."
    );
    describe_disk();
    describe_counter!(
        "beamline_hash_collisions_total",
        "Pages with the right hash and the wrong content. More than 0 is worth an alarm."
    );
    describe_gauge!("beamline_engine_heartbeat_age_seconds", "Time since the engine's loop last came round.");
}

fn describe_disk() {
    describe_gauge!(
        "beamline_disk_working",
        "Versions whose KV pages are kept on disk; fewer after an error."
    );
    describe_gauge!("beamline_disk_pages", "KV pages on disk.");
    describe_gauge!("beamline_disk_bytes", "Disk for KV pages: used, and capacity.");
    describe_gauge!("beamline_disk_reads_in_flight", "KV pages that are being read from disk.");
    describe_gauge!("beamline_disk_writes_waiting", "KV pages that wait to be written to disk.");
    describe_counter!("beamline_disk_hits_total", "KV pages that were read from disk and found intact.");
    describe_counter!("beamline_disk_misses_total", "Searches that ended at a KV page that is not on disk.");
    describe_counter!("beamline_disk_written_pages_total", "KV pages written to disk.");
    describe_counter!("beamline_disk_dropped_writes_total", "KV pages not written: the disk was too slow.");
    describe_counter!("beamline_disk_dropped_pages_total", "KV pages dropped from disk: for room, for age.");
    describe_counter!(
        "beamline_disk_checksum_failures_total",
        "KV pages on disk that were not what had been written. They are never used."
    );
    describe_counter!(
        "beamline_disk_errors_total",
        "Errors of the disk for KV pages. It is not used after one."
    );
}

/// Copies the numbers that need no model: those of the process, and the lines that the log and, if
/// there is one, the request log could not write.
pub fn publish_process(request_log: Option<&RequestLog>) {
    process::publish();
    counter!("beamline_log_lines_dropped_total").absolute(logging::dropped_lines());
    if let Some(log) = request_log {
        counter!("beamline_request_log_dropped_total").absolute(log.dropped_lines());
    }
}

/// Counts a request that has ended.
pub fn request_ended(endpoint: &'static str, outcome: String, took: Duration) {
    counter!("beamline_requests_total", "endpoint" => endpoint, "outcome" => outcome).increment(1);
    histogram!(HTTP_SECONDS, "endpoint" => endpoint).record(took.as_secs_f64());
}

/// Records the timings and items of a request that the engine answered.
pub fn answered(timings: &Timings, items: usize) {
    let Timings { queue, prefill, decode, total } = *timings;
    for (stage, ms) in [("queue", queue), ("prefill", prefill), ("decode", decode), ("total", total)] {
        histogram!(STAGE_SECONDS, "stage" => stage).record(ms / 1e3);
    }
    counter!("beamline_items_total").increment(items as u64);
}

/// Copies the counters and gauges of the engines.
pub fn publish(registry: &Registry, ready: bool) {
    let EngineStats { scheduler, cache } = registry.stats();
    publish_models(registry);
    let (used, limit) = registry.memory();
    gauge!("beamline_model_memory_bytes", "kind" => "used").set(used as f64);
    if let Some(limit) = limit {
        gauge!("beamline_model_memory_bytes", "kind" => "limit").set(limit as f64);
    }
    gauge!("beamline_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    gauge!("beamline_ready").set(if ready { 1.0 } else { 0.0 });
    gauge!("beamline_requests_queued").set(scheduler.queued as f64);
    gauge!("beamline_requests_running").set(scheduler.running as f64);
    let ends = [
        ("accepted", scheduler.accepted),
        ("refused", scheduler.refused),
        ("finished", scheduler.finished),
        ("failed", scheduler.failed),
        ("expired", scheduler.expired),
        ("cancelled", scheduler.cancelled),
        ("dropped", scheduler.dropped),
        ("degraded", scheduler.degraded),
    ];
    for (end, count) in ends {
        counter!("beamline_engine_requests_total", "end" => end).absolute(count);
    }
    counter!("beamline_engine_retries_total").absolute(scheduler.retried);
    counter!("beamline_steps_total", "result" => "ok").absolute(scheduler.steps);
    counter!("beamline_steps_total", "result" => "failed").absolute(scheduler.failed_steps);
    gauge!("beamline_failed_steps_in_a_row").set(scheduler.failed_in_a_row as f64);
    counter!("beamline_step_microseconds_total").absolute(scheduler.step_micros);
    counter!("beamline_rows_total", "kind" => "context").absolute(scheduler.context_rows);
    counter!("beamline_rows_total", "kind" => "branch").absolute(scheduler.branch_rows);
    gauge!("beamline_pages", "state" => "free").set(cache.free as f64);
    gauge!("beamline_pages", "state" => "referenced").set(cache.referenced as f64);
    gauge!("beamline_pages", "state" => "cached").set(cache.cached_unreferenced as f64);
    gauge!("beamline_sessions").set(cache.sessions as f64);
    counter!("beamline_prefix_lookups_total").absolute(cache.lookups);
    counter!("beamline_prefix_tokens_total", "result" => "hit").absolute(scheduler.hit_tokens);
    counter!("beamline_prefix_tokens_total", "result" => "restored").absolute(scheduler.restored_tokens);
    counter!("beamline_prefix_tokens_total", "result" => "miss").absolute(scheduler.missed_tokens);
    counter!("beamline_page_evictions_total").absolute(cache.evictions);
    gauge!("beamline_host_pages").set(cache.host.pages as f64);
    gauge!("beamline_host_bytes", "kind" => "used").set(cache.host.bytes as f64);
    gauge!("beamline_host_bytes", "kind" => "capacity").set(cache.host.capacity as f64);
    counter!("beamline_host_lookups_total").absolute(cache.host_lookups);
    counter!("beamline_host_exported_pages_total").absolute(cache.host_exports);
    counter!("beamline_host_restored_pages_total").absolute(scheduler.restored_pages);
    counter!("beamline_host_dropped_pages_total", "reason" => "room").absolute(cache.host.evictions);
    counter!("beamline_host_dropped_pages_total", "reason" => "age").absolute(cache.host.expirations);
    publish_disk(cache.disk);
    counter!("beamline_hash_collisions_total").absolute(cache.hash_collisions);
    let age = registry.heartbeat_age();
    gauge!("beamline_engine_heartbeat_age_seconds").set(age.as_secs_f64());
}

fn publish_disk(disk: DiskUsage) {
    gauge!("beamline_disk_working").set(disk.working as f64);
    gauge!("beamline_disk_pages").set(disk.pages as f64);
    gauge!("beamline_disk_bytes", "kind" => "used").set(disk.bytes as f64);
    gauge!("beamline_disk_bytes", "kind" => "capacity").set(disk.capacity as f64);
    gauge!("beamline_disk_reads_in_flight").set(disk.reading as f64);
    gauge!("beamline_disk_writes_waiting").set(disk.waiting as f64);
    counter!("beamline_disk_hits_total").absolute(disk.hits);
    counter!("beamline_disk_misses_total").absolute(disk.misses);
    counter!("beamline_disk_written_pages_total").absolute(disk.writes);
    counter!("beamline_disk_dropped_writes_total").absolute(disk.dropped);
    counter!("beamline_disk_dropped_pages_total", "reason" => "room").absolute(disk.evictions);
    counter!("beamline_disk_dropped_pages_total", "reason" => "age").absolute(disk.expirations);
    counter!("beamline_disk_checksum_failures_total").absolute(disk.damaged);
    counter!("beamline_disk_errors_total").absolute(disk.errors);
}

/// Sets 1 for every served version with its catalog, and 0 for earlier ones.
fn publish_models(registry: &Registry) {
    static KNOWN: Mutex<BTreeSet<[String; 3]>> = Mutex::new(BTreeSet::new());
    let now: BTreeSet<[String; 3]> = registry
        .served()
        .iter()
        .map(|served| [served.name.clone(), served.digest.clone(), served.catalog.version().to_owned()])
        .collect();
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    for model in known.union(&now) {
        let [name, sha256, catalog_version] = model.clone();
        let labels = [("name", name), ("sha256", sha256), ("catalog_version", catalog_version)];
        gauge!("beamline_model_info", &labels).set(if now.contains(model) { 1.0 } else { 0.0 });
    }
    *known = now;
}
