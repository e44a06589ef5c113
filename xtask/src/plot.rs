//! Curves as one SVG picture: panels with axes, lines, dots and text, nothing else.

use std::fmt::Write as _;

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 280.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 44.0;
const COLOURS: [&str; 6] = ["#1c5cab", "#b4610a", "#2f7d4f", "#8a4fa8", "#a8324a", "#5f6b76"];

/// Joined points with a name.
pub(crate) struct Curve {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// What an axis says, and how it is divided.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Axis {
    pub(crate) label: &'static str,
    pub(crate) scale: Scale,
}

/// How an axis is divided. A logarithmic one shows nothing that is not above 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    Logarithmic,
    Linear,
}

impl Axis {
    pub(crate) fn logarithmic(label: &'static str) -> Self {
        Self { label, scale: Scale::Logarithmic }
    }

    pub(crate) fn linear(label: &'static str) -> Self {
        Self { label, scale: Scale::Linear }
    }
}

pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) x: Axis,
    pub(crate) y: Axis,
    pub(crate) curves: Vec<Curve>,
}

/// The picture: two panels a row.
pub(crate) fn draw(panels: &[Panel]) -> String {
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
        let x_axis = self.x.scale.around(points().map(|p| p.0), 1.08);
        let y_axis = self.y.scale.around(points().map(|p| p.1), 1.25);
        let x_at = |x: f64| LEFT + x_axis.share(x) * (WIDTH - LEFT - RIGHT);
        let y_at = |y: f64| HEIGHT - BOTTOM - y_axis.share(y) * (HEIGHT - BOTTOM - TOP);
        text(out, WIDTH / 2.0, 18.0, "middle", &self.title);
        text(out, (LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 10.0, "middle", self.x.label);
        let middle = (TOP + HEIGHT - BOTTOM) / 2.0;
        let _ = write!(out, r#"<g transform="rotate(-90 14 {middle})">"#);
        text(out, 14.0, middle, "middle", self.y.label);
        out.push_str("</g>");
        for tick in y_axis.ticks() {
            let y = y_at(tick);
            let _ = write!(
                out,
                r##"<line x1="{LEFT}" x2="{}" y1="{y:.1}" y2="{y:.1}" stroke="#d9d7d2"/>"##,
                WIDTH - RIGHT
            );
            text(out, LEFT - 6.0, y + 4.0, "end", &number(tick));
        }
        for tick in x_axis.ticks() {
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

/// The numbers that an axis shows.
#[derive(Clone, Copy, Debug)]
struct Range {
    scale: Scale,
    low: f64,
    high: f64,
}

impl Scale {
    /// A range around all values, wider by a factor; a linear one begins at nothing.
    fn around(self, values: impl Iterator<Item = f64>, wider: f64) -> Range {
        let (low, high) =
            values.fold((f64::INFINITY, 0.0f64), |(low, high), value| (low.min(value), high.max(value)));
        match self {
            Self::Logarithmic => Range { scale: self, low: low / wider, high: high * wider },
            Self::Linear => Range { scale: self, low: 0.0, high: (high * wider).max(f64::MIN_POSITIVE) },
        }
    }
}

impl Range {
    /// Where a value lies, from 0 to 1.
    fn share(self, value: f64) -> f64 {
        match self.scale {
            Scale::Logarithmic => (value / self.low).ln() / (self.high / self.low).ln(),
            Scale::Linear => (value - self.low) / (self.high - self.low),
        }
    }

    /// Round numbers. Logarithmic: 1, 2 and 5 times powers of ten; powers alone where those would be too
    /// many.
    fn ticks(self) -> Vec<f64> {
        let Self { scale, low, high } = self;
        if scale == Scale::Linear {
            let unit = 10f64.powi(high.log10().floor() as i32);
            let step =
                [0.1, 0.2, 0.5, 1.0, 2.0].into_iter().map(|part| part * unit).find(|step| high / step < 8.0);
            let step = step.unwrap_or(unit);
            return (0..8).map(|n| f64::from(n) * step).filter(|tick| *tick <= high).collect();
        }
        let steps: &[f64] = if high / low > 500.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let first = low.log10().floor() as i32;
        let all = (first..=high.log10().ceil() as i32)
            .flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
        all.filter(|&tick| tick >= low && tick <= high).collect()
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let ticks = |scale: Scale, values: &[f64]| scale.around(values.iter().copied(), 1.0).ticks();
        assert_eq!(ticks(Scale::Linear, &[3.0, 95.0]), [0.0, 20.0, 40.0, 60.0, 80.0]);
        assert_eq!(ticks(Scale::Linear, &[0.0, 2.0]), [0.0, 0.5, 1.0, 1.5, 2.0]);
        assert_eq!(ticks(Scale::Logarithmic, &[1.0, 40.0]), [1.0, 2.0, 5.0, 10.0, 20.0]);
        assert_eq!(ticks(Scale::Logarithmic, &[1.0, 1000.0]), [1.0, 10.0, 100.0, 1000.0]);
    }

    #[test]
    fn names_cannot_break_the_picture() {
        let curve = Curve { name: "a < b & c".into(), points: vec![(1.0, 1.0), (2.0, 0.0)] };
        let (x, y) = (Axis::logarithmic("x"), Axis::linear("y"));
        let picture = draw(&[Panel { title: "t".into(), x, y, curves: vec![curve] }]);
        assert!(picture.contains("a &lt; b &amp; c") && !picture.contains("NaN") && !picture.contains("inf"));
    }
}
