//! Every input of the corpus, once. Among them are those that failed in the past, and those that a
//! driver has found and nobody has looked at yet.

use std::time::Instant;

use beamline_fuzz::{TARGETS, failed, limits, seeds};

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

#[test]
fn no_input_fails_that_a_driver_has_kept() {
    for target in TARGETS {
        for (path, input) in failed::inputs(target.name).unwrap() {
            // Said first: some failures end the process.
            println!("{}: {}", target.name, path.display());
            let begun = Instant::now();
            (target.run)(&input);
            assert!(begun.elapsed() < limits::TIME, "{}", path.display());
        }
    }
}
