//! What a results file shows as a picture: a panel per section and workload.

use super::record::Record;
use super::report::Report;
use crate::plot::{Axis, Curve, Panel, draw};

/// What a section shows: the label of its x axis, where x lies in a record, the label of its y axis, and y.
type Question = (&'static str, &'static str, fn(&Record) -> f64, &'static str, fn(&Record) -> f64);

const QUESTIONS: [Question; 8] = [
    ("visits", "beams", |r| r.beams as f64, "P50, ms", |r| r.ms.p50),
    ("beams", "beams", |r| r.beams as f64, "P50, ms", |r| r.ms.p50),
    ("contexts", "context tokens", |r| r.context_tokens as f64, "P50, ms", |r| r.ms.p50),
    ("concurrency", "requests at once", |r| r.concurrency as f64, "answered a second", |r| r.per_second),
    ("open-loop", "arrivals a second", |r| r.rate.unwrap_or(0.0), "P99, ms", |r| r.ms.p99),
    ("catalogs", "items", |r| r.x.unwrap_or(0.0), "P50, ms", |r| r.ms.p50),
    ("pages", "share of pages in use", |r| r.x.unwrap_or(0.0), "P50, ms", |r| r.ms.p50),
    ("soak", "minute", |r| r.x.unwrap_or(0.0), "P99, ms", |r| r.ms.p99),
];

/// The picture; nothing if there is no curve with two points.
pub(super) fn svg(report: &Report) -> Option<String> {
    let mut panels = Vec::new();
    for (section, x, x_of, y, y_of) in QUESTIONS {
        for workload in ["S", "M"] {
            let mut curves: Vec<Curve> = Vec::new();
            let records =
                report.runs.iter().flat_map(|run| run.records.iter().map(move |record| (run, record)));
            for (run, r) in records.filter(|(_, r)| r.section == section && r.workload == workload) {
                let engine = if r.engine == "beamline" { String::new() } else { format!("{} ", r.engine) };
                let width = if ["visits", "beams"].contains(&section) {
                    String::new()
                } else {
                    format!(", {} beams", r.beams)
                };
                let label = if run.label.is_empty() { String::new() } else { format!(" ({})", run.label) };
                let name = format!("{engine}{}{width}{label}", r.visit);
                let point = (x_of(r), y_of(r));
                match curves.iter_mut().find(|curve| curve.name == name) {
                    Some(curve) => curve.points.push(point),
                    None => curves.push(Curve { name, points: vec![point] }),
                }
            }
            curves.retain(|curve| {
                curve.points.len() > 1 && curve.points.iter().all(|p| p.0 > 0.0 && p.1 > 0.0)
            });
            for curve in &mut curves {
                curve.points.sort_by(|a, b| a.0.total_cmp(&b.0));
            }
            if !curves.is_empty() {
                let (x, y) = (Axis::logarithmic(x), Axis::logarithmic(y));
                panels.push(Panel { title: format!("{workload}: {section}"), x, y, curves });
            }
        }
    }
    if panels.is_empty() { None } else { Some(draw(&panels)) }
}
