//! What the device could do at best: the rate of its matrix products, and of its memory.

use std::sync::Arc;
use std::time::Instant;

use beamline_compute::cuda::device::{Device, Memory, Product, Written};
use beamline_model::checkpoint::config::Config;
use serde_json::json;

use crate::Output;

fn seconds(device: &dyn Device, times: usize, mut work: impl FnMut()) -> f64 {
    work();
    device.wait().unwrap();
    let start = Instant::now();
    (0..times).for_each(|_| work());
    device.wait().unwrap();
    start.elapsed().as_secs_f64() / times as f64
}

pub(crate) fn measure(
    device: &Arc<dyn Device>,
    shape: &str,
    config: &Config,
    quick: bool,
    output: &mut Output,
) {
    let rows = match (shape, quick) {
        ("tiny", _) => vec![4],
        (_, true) => vec![512, 8192],
        (_, false) => vec![256, 512, 1000, 2048, 5000, 8192, 16_384],
    };
    let qkv = (config.heads + 2 * config.kv_heads) * config.head_dim;
    let products = [
        ("qkv", config.hidden_size, qkv),
        ("output", config.heads * config.head_dim, config.hidden_size),
        ("gate_up", config.hidden_size, 2 * config.intermediate_size),
        ("down", config.intermediate_size, config.hidden_size),
        ("square", if shape == "tiny" { 8 } else { 8192 }, if shape == "tiny" { 8 } else { 8192 }),
    ];
    for (name, inputs, outputs) in products {
        for &rows in &rows {
            let x = Memory::zeroed(device, 2 * rows * inputs).unwrap();
            let weight = Memory::zeroed(device, 2 * outputs * inputs).unwrap();
            let out = Memory::zeroed(device, 2 * rows * outputs).unwrap();
            let product = Product {
                x: x.address(),
                weight: weight.address(),
                out: out.address(),
                rows,
                inputs,
                outputs,
                written: Written::Bf16,
            };
            // SAFETY: the memory above is that large.
            let took = seconds(&**device, 10, || unsafe { device.multiply(product) }.unwrap());
            let rate = 2.0 * (rows * inputs * outputs) as f64 / took / 1e12;
            output.put(&json!({
                "section": "floor", "product": name, "rows": rows, "inputs": inputs, "outputs": outputs,
                "tflops": rate, "note": "inputs are zeros, which draw less power than others",
            }));
        }
    }
    let bytes: usize = if shape == "tiny" { 1 << 16 } else { 4 << 30 };
    let memory = Memory::zeroed(device, bytes).unwrap();
    let took = seconds(&**device, 10, || device.zero(memory.address(), bytes).unwrap());
    output.put(&json!({"section": "floor", "memory": "write", "gb_per_second": bytes as f64 / took / 1e9}));
}
