//! The table of layers: what each module must not know, and where unsafe code may stand.
//!
//! Cargo keeps the arrows between crates as they are drawn in docs/ARCHITECTURE.md. This table keeps those
//! within crates, and says no to dependencies that would cross a layer. What is not true today stands in
//! `xtask/tidy-known.txt`.
//!
//! Invariant: every path of the table exists, or tidy fails: a rule must not end because a folder got
//! another name.

/// Parts of the tree that must not know something.
pub(super) struct Layer {
    /// Folders and files. Those of tests are never meant.
    pub(super) paths: &'static [&'static str],
    /// Beginnings of Rust paths that must not appear there.
    pub(super) forbidden: &'static [&'static str],
    /// What to do instead.
    pub(super) instead: &'static str,
}

/// Libraries that speak HTTP or wait for sockets.
const HTTP: &[&str] = &["axum", "http_body", "http_body_util", "hyper", "hyper_util", "tower_http", "ureq"];
/// Kernels and the memory of devices.
const DEVICES: &[&str] = &["beamline_model::cpu", "beamline_model::cuda", "beamline_compute"];

pub(super) const LAYERS: &[Layer] = &[
    Layer {
        paths: &["crates/wording/src"],
        forbidden: &[
            "beamline_catalog",
            "beamline_kv_cache",
            "beamline_model",
            "beamline_scheduler",
            "beamline",
        ],
        instead: "pass texts and numbers: wording is below every other crate",
    },
    Layer {
        paths: &["crates/catalog/src"],
        forbidden: &["beamline_kv_cache", "beamline_model", "beamline_scheduler", "beamline"],
        instead: "leave it to the caller: for a catalog, symbols are opaque numbers",
    },
    Layer {
        paths: &["crates/kv-cache/src"],
        forbidden: &["beamline_catalog", "beamline_model", "beamline_scheduler", "beamline"],
        instead: "leave it to the caller: the cache keeps books, and sees words only",
    },
    Layer {
        paths: &["crates/compute/src"],
        forbidden: &["beamline_catalog", "beamline_model", "beamline_scheduler", "beamline"],
        instead: "pass arrays and shapes: for compute there are rows and pages, no families and no searches",
    },
    Layer {
        paths: &["crates/catalog/src", "crates/kv-cache/src", "crates/scheduler/src"],
        forbidden: &["candle_core", "candle_nn"],
        instead: "do without tensors here; take a trait from the caller",
    },
    Layer {
        // The engine beside the scheduler answers tickets that async code waits for. The scheduler itself is pure.
        paths: &["crates/catalog/src", "crates/kv-cache/src", "crates/scheduler/src/scheduler"],
        forbidden: &["tokio"],
        instead: "do without async here; take a callback from the caller",
    },
    Layer {
        paths: &[
            "crates/catalog/src",
            "crates/compute/src",
            "crates/kv-cache/src",
            "crates/model/src",
            "crates/scheduler/src",
        ],
        forbidden: HTTP,
        instead: "move it to crates/server/src/http",
    },
    Layer {
        paths: &["crates/model/src"],
        forbidden: &["tokio", "beamline_scheduler", "beamline"],
        instead: "leave queues, clocks and requests to the scheduler",
    },
    Layer {
        paths: &["crates/scheduler/src"],
        forbidden: &[
            "beamline_model::cpu",
            "beamline_model::cuda",
            "beamline_model::families",
            "beamline_compute",
            "beamline",
        ],
        instead: "go through `beamline_model::step`, the boundary to the model",
    },
    Layer {
        paths: &["crates/server/src"],
        forbidden: &["candle_core", "candle_nn", "beamline_simulation"],
        instead: "leave tensors to the model, and simulations to their own binary",
    },
    Layer {
        paths: &[
            "crates/server/src/api",
            "crates/server/src/cli",
            "crates/server/src/http",
            "crates/server/src/registry",
            "crates/server/src/service",
        ],
        forbidden: DEVICES,
        instead: "ask `runtime` or a type that the model exports for it",
    },
    Layer {
        paths: &["crates/server/src/api", "crates/server/src/registry", "crates/server/src/service"],
        forbidden: HTTP,
        instead: "move it to crates/server/src/http",
    },
    Layer {
        paths: &["crates/server/src/api", "crates/server/src/registry", "crates/server/src/service"],
        forbidden: &["crate::http", "crate::cli"],
        instead: "turn the arrow round: HTTP and the command line call this module",
    },
    Layer {
        paths: &["crates/server/src/api"],
        forbidden: &["beamline_scheduler", "crate::registry", "crate::runtime", "crate::service"],
        instead: "convert where the engine is called: the API is JSON only",
    },
    Layer {
        paths: &["crates/server/src/service"],
        forbidden: &["crate::registry", "crate::runtime"],
        instead: "move what both need below both",
    },
    Layer {
        paths: &["crates/server/src/error.rs"],
        forbidden: &["crate::api", "crate::http", "crate::registry", "crate::runtime", "crate::service"],
        instead: "write the `From` beside the type that it converts",
    },
];

/// Where unsafe code may stand, tests included. Its argument stands beside it: clippy sees to that.
pub(super) const UNSAFE: &[&str] = &[
    // Vector instructions, and arrays that several threads write.
    "crates/compute/src/cpu",
    // Calls of the driver, and addresses on a device.
    "crates/compute/src/cuda",
    // An allocator that counts.
    "crates/kv-cache/tests/no_allocation.rs",
    // The bare instructions that kernels are measured against.
    "crates/model/examples/kernels",
    // Kernels built for the CPU, loaded as a library.
    "crates/model/tests/common/emulated.rs",
    // A device that times what another one does.
    "crates/server/tests/gpu_bench",
];
