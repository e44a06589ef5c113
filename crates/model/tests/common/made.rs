//! Checkpoints made up on the spot: random weights, any shape.
#![allow(unreachable_pub, reason = "a module of several test crates")]

use std::collections::BTreeMap;
use std::path::Path;

use beamline_model::checkpoint::config::Config;
use beamline_model::families::decoder::expected_tensors;
use safetensors::tensor::TensorView;

/// Numbers between -1 and 1, the same for the same seed.
pub fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (0..count)
        .map(|_| {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Writes config.json and a model.safetensors with every tensor the configuration needs.
pub fn write(directory: &Path, config: &serde_json::Value, seed: u64) -> BTreeMap<String, Vec<f32>> {
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let shapes = expected_tensors(&Config::parse(&config.to_string()).unwrap());
    let tensors: BTreeMap<String, Vec<f32>> = shapes
        .iter()
        .enumerate()
        .map(|(index, (name, shape))| {
            let values = numbers(shape.iter().product(), seed.wrapping_mul(1000).wrapping_add(index as u64));
            // Norm weights around one, the rest small enough that states stay of order one.
            let width = *shape.last().unwrap() as f32;
            let scale = |x: f32| if shape.len() == 1 { 1.0 + 0.3 * x } else { x * (3.0 / width).sqrt() };
            (name.clone(), values.into_iter().map(scale).collect())
        })
        .collect();
    write_tensors(directory, &tensors, &shapes);
    tensors
}

/// Writes the tensors to model.safetensors.
pub fn write_tensors(
    directory: &Path,
    tensors: &BTreeMap<String, Vec<f32>>,
    shapes: &BTreeMap<String, Vec<usize>>,
) {
    let bytes: BTreeMap<&String, Vec<u8>> = tensors
        .iter()
        .map(|(name, values)| (name, values.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let views = bytes.iter().map(|(name, bytes)| {
        (*name, TensorView::new(safetensors::Dtype::F32, shapes[*name].clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).unwrap();
}
