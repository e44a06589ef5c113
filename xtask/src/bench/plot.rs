//! Curves as one SVG picture: a panel per question, logarithmic axes, nothing but lines, dots and text.

use std::fmt::Write as _;

use super::record::Record;
use super::report::Report;

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 280.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 44.0;
const COLOURS: [&str; 6] = ["#1c5cab", "#b4610a", "#2f7d4f", "#8a4fa8", "#a8324a", "#5f6b76"];

/// Joined points with a name.
struct Curve {
    name: String,
    points: Vec<(f64, f64)>,
}

struct Panel {
    title: String,
    x: &'static str,
    y: &'static str,
    curves: Vec<Curve>,
}

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
                panels.push(Panel { title: format!("{workload}: {section}"), x, y, curves });
            }
        }
    }
    if panels.is_empty() { None } else { Some(draw(&panels)) }
}

fn draw(panels: &[Panel]) -> String {
    let rows = panels.len().div_ceil(2) as f64;
    let legend = panels.iter().map(|panel| panel.curves.len()).max().unwrap_or(0) as f64 * 14.0;
    let height = HEIGHT + legend;
    let mut out = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#ffffff"/>"##,
        2.0 * WIDTH,
        rows * height
    );
    for (index, panel) in panels.iter().enumerate() {
        let _ = write!(
            out,
            r#"<g transform="translate({} {})">"#,
            (index % 2) as f64 * WIDTH,
            (index / 2) as f64 * height
        );
        panel.draw(&mut out);
        out.push_str("</g>");
    }
    out.push_str("</svg>\n");
    out
}

impl Panel {
    fn draw(&self, out: &mut String) {
        let points = || self.curves.iter().flat_map(|curve| &curve.points);
        let (x_low, x_high) = decades(points().map(|p| p.0), 1.08);
        let (y_low, y_high) = decades(points().map(|p| p.1), 1.25);
        let x_at = |x: f64| LEFT + (x / x_low).ln() / (x_high / x_low).ln() * (WIDTH - LEFT - RIGHT);
        let y_at =
            |y: f64| HEIGHT - BOTTOM - (y / y_low).ln() / (y_high / y_low).ln() * (HEIGHT - BOTTOM - TOP);
        text(out, WIDTH / 2.0, 18.0, "middle", &self.title);
        text(out, (LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 10.0, "middle", self.x);
        let middle = (TOP + HEIGHT - BOTTOM) / 2.0;
        let _ = write!(out, r#"<g transform="rotate(-90 14 {middle})">"#);
        text(out, 14.0, middle, "middle", self.y);
        out.push_str("</g>");
        for tick in ticks(y_low, y_high) {
            let y = y_at(tick);
            let _ = write!(
                out,
                r##"<line x1="{LEFT}" x2="{}" y1="{y:.1}" y2="{y:.1}" stroke="#d9d7d2"/>"##,
                WIDTH - RIGHT
            );
            text(out, LEFT - 6.0, y + 4.0, "end", &number(tick));
        }
        for tick in ticks(x_low, x_high) {
            let x = x_at(tick);
            let _ = write!(
                out,
                r##"<line x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{}" stroke="#eceae5"/>"##,
                HEIGHT - BOTTOM
            );
            text(out, x, HEIGHT - BOTTOM + 15.0, "middle", &number(tick));
        }
        for (index, curve) in self.curves.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let line: Vec<String> =
                curve.points.iter().map(|&(x, y)| format!("{:.1},{:.1}", x_at(x), y_at(y))).collect();
            let _ = write!(
                out,
                r#"<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{}"/>"#,
                line.join(" ")
            );
            for &(x, y) in &curve.points {
                let _ = write!(
                    out,
                    r#"<circle cx="{:.1}" cy="{:.1}" r="3" fill="{colour}"><title>{}: {} at {}</title></circle>"#,
                    x_at(x),
                    y_at(y),
                    escape(&curve.name),
                    number(y),
                    number(x)
                );
            }
            let y = HEIGHT + 4.0 + 14.0 * index as f64;
            let _ =
                write!(out, r#"<rect x="{LEFT}" y="{}" width="10" height="3" fill="{colour}"/>"#, y - 5.0);
            text(out, LEFT + 16.0, y, "start", &curve.name);
        }
    }
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, what: &str) {
    let _ = write!(out, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#, escape(what));
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// A range around all values, wider by a factor.
fn decades(values: impl Iterator<Item = f64>, wider: f64) -> (f64, f64) {
    let (low, high) =
        values.fold((f64::INFINITY, 0.0f64), |(low, high), value| (low.min(value), high.max(value)));
    (low / wider, high * wider)
}

/// 1, 2 and 5 times powers of ten; powers alone where those would be too many.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let steps: &[f64] = if high / low > 500.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let first = low.log10().floor() as i32;
    let all = (first..=high.log10().ceil() as i32)
        .flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
    all.filter(|&tick| tick >= low && tick <= high).collect()
}

fn number(value: f64) -> String {
    if value >= 1e6 {
        format!("{} M", (value / 1e5).round() / 10.0)
    } else if value >= 1e4 {
        format!("{} k", (value / 1e2).round() / 10.0)
    } else if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{}", (value * 100.0).round() / 100.0)
    }
}
