//! A context that was moved to host memory and back is the one that was computed, bit for bit.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;
#[path = "common/moved.rs"]
mod moved;

use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::pages::PageStore;
use beamline_kv_cache::PageContents;
use beamline_model::families::decoder::page_shape;
use beamline_model::task::Found;
use common::{CASES, Loaded};

fn bits(found: &Found) -> Vec<(u32, u64)> {
    found.hypotheses.iter().map(|h| (h.leaf.0, h.score.to_bits())).collect()
}

#[test]
fn a_context_that_was_moved_away_and_back_changes_no_bit() {
    for case in CASES {
        let loaded = Loaded::open(case);
        for format in KvFormat::ALL {
            let shape = page_shape(loaded.model.config(), format);
            assert_eq!(PageStore::new(shape, 1).unwrap().page_bytes(), shape.page_bytes());
            let executor = |pages| loaded.executor_in(format, pages);
            let [cold, warm] = moved::cold_and_brought_back(&loaded, shape.page_bytes(), executor);
            assert_eq!(bits(&cold), bits(&warm), "{case} in {format}");
        }
    }
}
