//! The command as `cargo xtask` calls it: its input, output and errors.

// Helper functions are test code too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::{Command, Output};

use serde_json::{Value, json};

fn simulation(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_beamline-simulation")).args(arguments).output().unwrap()
}

fn printed(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn curves_of_another_machine_are_taken_and_the_scheduler_is_near_the_queue_it_is_held_against() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("curves.json");
    // Ten milliseconds for a context of 100 rows: computing requests together saves little.
    let curve = json!([{
        "name": "mine", "source": "a test", "fixed_us": 100, "context_row_us": 99.0, "context_read_ns": 0,
        "branch_us": [], "branch_read_ns": 0, "position_bytes": 1,
        "visits": [{"name": "cold", "context": 100, "cached": 0, "beams": 1, "steps": 1}],
    }]);
    fs::write(&path, curve.to_string()).unwrap();
    let found = printed(&simulation(&["simulate", "--quick", "--curves", path.to_str().unwrap()]));
    let records = found["records"].as_array().unwrap();
    let p50 = |policy: &str, case: &str| {
        let record = records.iter().find(|record| record["policy"] == policy && record["case"] == case);
        record.unwrap()["p50_ms"].as_f64().unwrap()
    };
    for policy in ["beamline", "first come", "sharing", "shortest first"] {
        assert_eq!(p50(policy, "10 %"), 10.0, "{policy}");
    }
    assert!(p50("first come", "95 %") > 2.0 * p50("first come", "10 %"));
    assert!(records.iter().all(|record| record["refused"] == 0 && record["lost"] == 0));
}

#[test]
fn a_damaged_curve_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("curves.json");
    fs::write(&path, r#"[{"name": "mine"}]"#).unwrap();
    let output = simulation(&["simulate", "--curves", path.to_str().unwrap()]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("missing field"));
}

#[test]
fn logs_that_are_there_are_replayed_and_others_loudly_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    let output = simulation(&["hit-rate", "--data", data]);
    assert!(!output.status.success(), "there is nothing to replay");
    fs::create_dir(folder.path().join("ml-100k")).unwrap();
    let mut log = String::from("user_id\titem_id\trating\ttimestamp\n");
    for event in 0..400 {
        log.push_str(&format!("{}\t{}\t3\t{}\n", event % 10, event, 100 * event));
    }
    fs::write(folder.path().join("ml-100k/ml-100k.inter"), log).unwrap();
    let output = simulation(&["hit-rate", "--data", data]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("SKIPPED: no beauty/sequences.txt"));
    let found = printed(&output);
    let share = |budget: f64| {
        let of = |record: &&Value| {
            record["budget"] == budget && record["host_bytes"] == 0 && record["gap_s"] == 0.0
        };
        found["records"].as_array().unwrap().iter().find(of).unwrap()["cached"].as_f64().unwrap()
    };
    assert!(share(1.0) > 0.7 && share(0.01) < 0.1, "{} {}", share(0.01), share(1.0));
}

#[test]
fn a_results_file_without_what_a_curve_needs_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("results.json");
    fs::write(&path, r#"{"runs": []}"#).unwrap();
    let output = simulation(&["fit", path.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("no sections"));
}
