//! Times the CUDA engine on random weights of known shapes: the figures that decide for model authors
//! and for buyers of hardware.
//!
//! ```text
//! gpu_bench measure --out results.json             everything, on GPU 0
//! gpu_bench measure --sections points --quick      fewer points
//! gpu_bench measure --folder FOLDER                nothing: writes all except weights, for
//!                                                  beamline serve --random-weights
//! cargo test --test gpu_bench                      a tiny shape on the emulated device: no times,
//!                                                  only that the program works
//! ```
//!
//! One JSON object per line. Times are of the engine: from the moment that all requests of a batch are
//! handed in until the last is answered, scheduling and search included, HTTP and tokenization not.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a measuring program fails by panicking, and prints"
)]

#[path = "../../../model/tests/common/emulated.rs"]
mod emulated;
mod expansion;
mod floor;
mod folder;
mod load;
mod points;
mod profile;
mod shapes;
mod stepped;
mod world;

use std::io::Write;
use std::sync::Arc;

use beamline_compute::cuda::device::Device;
use clap::Parser;
use serde_json::Value;

use crate::profile::Profile;

/// What to measure.
#[derive(Debug, Parser)]
struct Args {
    /// Number of the GPU; without the feature `cuda`, or with `emulated`, the CPU runs the kernels.
    #[arg(long, default_value = "0")]
    device: String,
    /// File for the results, one JSON object per line; also printed.
    #[arg(long)]
    out: Option<std::path::PathBuf>,
    /// Measure nothing; write a folder with everything of this shape except weights, for
    /// `beamline serve --random-weights FOLDER/config.json`.
    #[arg(long)]
    folder: Option<std::path::PathBuf>,
    /// What to measure: floor, points, reuse, host, beams, load, expansion, profile.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "floor,points,reuse,host,profile,expansion,beams,load"
    )]
    sections: Vec<String>,
    /// Shape of the model, whose weights are random: qwen3-0.6b, qwen3-1.7b, qwen3-8b, tiny, or a
    /// config.json.
    #[arg(long, alias = "random-weights", default_value = "qwen3-1.7b")]
    shape: String,
    /// Items of the catalog.
    #[arg(long, default_value_t = 1_500_000)]
    items: usize,
    /// Times that each point is measured.
    #[arg(long, default_value_t = 20)]
    repetitions: usize,
    /// Fewer points, fewer repetitions.
    #[arg(long)]
    quick: bool,
}

/// Where results go.
struct Output {
    file: Option<std::fs::File>,
    gpu: String,
}

impl Output {
    /// Writes a line, with what it was measured on.
    fn put(&mut self, result: &Value) {
        let mut result = result.clone();
        result["gpu"] = self.gpu.as_str().into();
        if self.gpu.contains("no GPU") {
            result["rehearsal"] = "no GPU: no time here means anything".into();
        }
        println!("{result}");
        if let Some(file) = &mut self.file {
            writeln!(file, "{result}").unwrap();
        }
    }
}

fn open(device: &str) -> Option<Arc<dyn Device>> {
    #[cfg(feature = "cuda")]
    if device != "emulated" {
        return Some(beamline_compute::cuda::gpu::Gpu::open(device.parse().unwrap()).unwrap());
    }
    let _ = device;
    emulated::Emulated::open()
}

fn main() {
    // Run by `cargo test`, without arguments of its own, it shows that it works.
    let tiny = "gpu_bench --device emulated --shape tiny --items 300 --repetitions 1 --quick";
    let args = match std::env::args().nth(1).as_deref() {
        Some("measure") => Args::parse_from(std::env::args().take(1).chain(std::env::args().skip(2))),
        _ => Args::parse_from(tiny.split(' ')),
    };
    if let Some(folder) = &args.folder {
        folder::write(folder, &args);
        return;
    }
    let Some(device) = open(&args.device) else { return };
    // Everything goes through a device that can say where the time goes.
    let profile = Profile::of(device);
    let device: Arc<dyn Device> = profile.clone();
    let file = args.out.as_ref().map(|path| std::fs::File::create(path).unwrap());
    let mut output = Output { file, gpu: device.name().to_owned() };
    let shape = shapes::config(&args.shape);
    let needs_world =
        args.sections.iter().any(|section| !matches!(section.as_str(), "floor" | "expansion" | "host"));
    let has = |name: &str| args.sections.iter().any(|section| section == name);
    if has("floor") {
        floor::measure(&device, &args.shape, &shape, args.quick, &mut output);
    }
    if has("expansion") {
        expansion::measure(&device, &args, &mut output);
    }
    if has("host") {
        points::measure_host(&device, &shape, &args, &mut output);
    }
    if !needs_world {
        return;
    }
    let world = world::World::new(&device, &args, &shape);
    if has("points") {
        points::measure(&world, &args, &mut output);
    }
    if has("reuse") {
        points::measure_reuse(&world, &args, &mut output);
    }
    if has("beams") {
        points::measure_wide(&world, &args, &mut output);
    }
    if has("profile") {
        points::measure_profile(&world, &profile, &args, &mut output);
    }
    if has("load") {
        load::measure(&world, &args, &mut output);
    }
}
