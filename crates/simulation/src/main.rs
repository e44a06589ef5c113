//! Prints the results of the simulations as JSON. `cargo xtask simulate` and `cargo xtask hit-rate`
//! draw them.

#![allow(clippy::print_stdout, reason = "what it prints is what it is for")]

use std::path::PathBuf;

use anyhow::{Context, Result};
use beamline_simulation::curve::Curve;
use beamline_simulation::{fit, hit_rate, scenarios};
use clap::Parser;
use serde_json::json;

/// Simulate the scheduler and the cache in virtual time.
#[derive(Parser)]
enum Command {
    /// Compare the scheduler with reference policies, over measured cost curves.
    Simulate {
        /// Simulate fewer requests.
        #[arg(long)]
        quick: bool,
        /// File with cost curves to use instead of `crates/simulation/curves.json`, in the same
        /// format.
        #[arg(long, value_name = "FILE")]
        curves: Option<PathBuf>,
    },
    /// Fit a cost curve to a results file of `cargo xtask bench --sections beams,contexts`.
    Fit {
        /// Path of the results file.
        results: PathBuf,
        /// Workload to fit.
        #[arg(long, default_value = "S")]
        workload: String,
    },
    /// Measure which part of real logs is cached, by memory size.
    HitRate {
        /// Directory with `ml-100k/ml-100k.inter`, `beauty/sequences.txt`, or both.
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
    },
}

fn main() -> Result<()> {
    let found = match Command::parse() {
        Command::Simulate { quick, curves } => {
            let curves = match curves {
                None => Curve::all()?,
                Some(path) => Curve::read(&read(&path)?)?,
            };
            let records = scenarios::all(&curves, quick)?;
            json!({"what": "waiting under each policy, in virtual time", "curves": curves, "records": records})
        }
        Command::Fit { results, workload } => {
            let name = results.file_name().unwrap_or_default().to_string_lossy();
            json!([fit::fit(&read(&results)?, &workload, &format!("fitted to {name}"))?])
        }
        Command::HitRate { data } => {
            let curves = Curve::all()?;
            let curve = curves.iter().find(|curve| curve.name == "S").context("no curve of S")?;
            let records = hit_rate::all(&data, curve)?;
            json!({"what": "context tokens of real logs that are cached, by memory", "curve": curve, "records": records})
        }
    };
    println!("{found:#}");
    Ok(())
}

fn read(path: &PathBuf) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
