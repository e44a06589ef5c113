//! What is kept of a measurement: one record a point, the same for every engine and section.

use serde::{Deserialize, Serialize};

use super::load::Exchanges;
use super::usable::Beside;

/// One point of one section.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Record {
    /// `S` or `M`.
    pub(super) workload: String,
    /// Which question it answers: `visits`, `beams`, `contexts`, ...
    pub(super) section: String,
    /// `beamline`, or the name of a peer.
    pub(super) engine: String,
    /// `cold` or `warm`; or what else distinguishes the point.
    pub(super) visit: String,
    pub(super) beams: usize,
    /// Median length of the context.
    pub(super) context_tokens: u64,
    /// Fewest cached tokens of any request.
    pub(super) cached_tokens_min: u64,
    /// Median of the cached tokens.
    pub(super) cached_tokens: u64,
    pub(super) concurrency: usize,
    /// Requests answered with a slate.
    pub(super) requests: usize,
    /// Requests refused with a typed error.
    pub(super) refused: usize,
    /// Milliseconds as the client sees them.
    pub(super) ms: Percentiles,
    /// Medians inside the server, without HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) server_ms: Option<ServerTimes>,
    /// Requests answered a second.
    pub(super) per_second: f64,
    /// Requests due a second, in the open loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rate: Option<f64>,
    /// What an M/D/1 queue does at that rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) beside: Option<Beside>,
    /// What is varied where it is none of the above: items of the catalog, share of the pages in use, minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) x: Option<f64>,
    /// Resident memory after the measurement.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) resident_bytes: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Percentiles {
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct ServerTimes {
    pub(super) queue: f64,
    pub(super) prefill: f64,
    pub(super) decode: f64,
    pub(super) total: f64,
}

impl Percentiles {
    /// Nearest-rank percentiles; zeros for nothing.
    pub(super) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let Some(&max) = values.last() else { return Self::default() };
        let at = |share: f64| round(values[((share * values.len() as f64).ceil() as usize).max(1) - 1]);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        Self { mean: round(mean), p50: at(0.5), p90: at(0.9), p99: at(0.99), max: round(max) }
    }
}

/// The lower median of whole numbers; 0 for nothing.
fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(0)
}

/// Microseconds are enough.
fn round(milliseconds: f64) -> f64 {
    (milliseconds * 1e3).round() / 1e3
}

impl Record {
    /// Whether every request was answered, and the P99 lies under an objective.
    pub(super) fn is_good(&self, objective_ms: f64) -> bool {
        self.requests > 0 && self.refused == 0 && self.ms.p99 < objective_ms
    }

    /// Summarises exchanges with beamline.
    pub(super) fn of(
        workload: &str,
        section: &str,
        visit: &str,
        beams: usize,
        concurrency: usize,
        exchanges: &Exchanges,
    ) -> Self {
        let slates: Vec<_> = exchanges.slates().collect();
        let middle = |part: fn(&super::client::Timings) -> f64| {
            Percentiles::of(slates.iter().map(|slate| part(&slate.timings_ms)).collect()).p50
        };
        let server = ServerTimes {
            queue: middle(|t| t.queue),
            prefill: middle(|t| t.prefill),
            decode: middle(|t| t.decode),
            total: middle(|t| t.total),
        };
        Self {
            workload: workload.into(),
            section: section.into(),
            engine: "beamline".into(),
            visit: visit.into(),
            beams,
            context_tokens: median(slates.iter().map(|slate| slate.usage.context_tokens).collect()),
            cached_tokens_min: slates.iter().map(|slate| slate.usage.cached_tokens).min().unwrap_or(0),
            cached_tokens: median(slates.iter().map(|slate| slate.usage.cached_tokens).collect()),
            concurrency,
            requests: slates.len(),
            refused: exchanges.refused(),
            ms: Percentiles::of(exchanges.latencies()),
            server_ms: Some(server),
            per_second: round(slates.len() as f64 / exchanges.seconds.max(1e-9)),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let all = Percentiles::of((1..=100).rev().map(f64::from).collect());
        assert_eq!((all.p50, all.p90, all.p99, all.max, all.mean), (50.0, 90.0, 99.0, 100.0, 50.5));
        let one = Percentiles::of(vec![3.0]);
        assert_eq!((one.p50, one.p99), (3.0, 3.0));
        assert_eq!(Percentiles::of(vec![]).p99, 0.0);
    }
}
