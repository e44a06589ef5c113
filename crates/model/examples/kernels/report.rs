//! Figures, as a table and as JSON.

use beamline_compute::cpu::isa::Isa;
use serde::Serialize;

use crate::case::Case;

/// One measurement of a kernel.
#[derive(Serialize)]
pub(crate) struct Figure {
    family: &'static str,
    format: &'static str,
    shape: String,
    isa: &'static str,
    threads: usize,
    seconds: f64,
    /// Billions of operations a second; of values, where nothing is multiplied.
    rate: f64,
    /// The rate of a plain loop of the kernel's instruction.
    plain_loop: Option<f64>,
    share: Option<f64>,
    /// The least share that `--check` lets pass.
    demand: Option<f64>,
}

impl Figure {
    pub(crate) fn new(case: &Case, isa: Isa, threads: usize, seconds: f64, plain_loop: Option<f64>) -> Self {
        let rate = case.operations / seconds / 1e9;
        Self {
            family: case.family,
            format: case.format,
            shape: case.shape.clone(),
            isa: isa.name(),
            threads,
            seconds,
            rate,
            plain_loop,
            share: plain_loop.map(|peak| rate / peak),
            // Other programs on the machine take cores from a measurement on all of them.
            demand: if threads == 1 { case.demand } else { None },
        }
    }

    fn is_slow(&self) -> bool {
        self.share.zip(self.demand).is_some_and(|(share, demand)| share < demand)
    }
}

/// Figures that are below what is demanded of them.
pub(crate) fn below_demand(figures: &[Figure]) -> usize {
    figures.iter().filter(|figure| figure.is_slow()).count()
}

/// Prints a table.
pub(crate) fn print(figures: &[Figure]) {
    println!(
        "{:<10} {:>7} {:<9} {:<5} {:<34} {:>10} {:>8} {:>8} {:>6}",
        "isa", "threads", "family", "format", "shape", "us", "G/s", "loop", "share"
    );
    for figure in figures {
        println!(
            "{:<10} {:>7} {:<9} {:<5} {:<34} {:>10.1} {:>8.1} {:>8} {:>6}{}",
            figure.isa,
            figure.threads,
            figure.family,
            figure.format,
            figure.shape,
            figure.seconds * 1e6,
            figure.rate,
            figure.plain_loop.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}")),
            figure.share.map_or_else(|| "-".to_owned(), |share| format!("{:.0} %", 100.0 * share)),
            if figure.is_slow() { "  slow" } else { "" },
        );
    }
}
