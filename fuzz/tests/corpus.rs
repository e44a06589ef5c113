//! Every input of the corpus, once: those that failed in the past among them.

use std::time::Instant;

use beamline_fuzz::{TARGETS, limits, seeds};

#[test]
fn no_input_of_the_corpus_fails() {
    for target in TARGETS {
        let inputs = seeds::seeds(&target).unwrap();
        assert!(!inputs.is_empty(), "{} has no seed", target.name);
        for input in inputs {
            let begun = Instant::now();
            (target.run)(&input);
            let what = String::from_utf8_lossy(&input[..input.len().min(80)]).into_owned();
            assert!(begun.elapsed() < limits::TIME, "{}: {what}", target.name);
        }
    }
}
