//! Every beam of the fixtures that read tokens, over HTTP, against Hugging Face in double precision.
//!
//! The folder is that of `BEAMLINE_CONFORMANCE`. The rule is that of the fixtures: scores within the
//! tolerance everywhere, the same set where the gap at the cut is clear, and the same order where the
//! gaps between ranks are clear.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Server, history};
use crate::hstu_models::folder;

/// Least tolerance of single precision: see [`folder::tolerance`].
const SCORES: f64 = 2e-4;

fn strings(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|item| item.as_str().unwrap().to_owned()).collect()
}

/// Items with their scores, in the order of the list.
fn expected(record: &Value) -> Vec<(String, f64)> {
    let paths = record["items"].as_array().unwrap().iter().zip(record["scores"].as_array().unwrap());
    paths
        .flat_map(|(items, score)| strings(items).into_iter().map(|item| (item, score.as_f64().unwrap())))
        .collect()
}

fn check(case: &Path) {
    let server = Server::start_at(case, &[]);
    let record = folder::read_json(&case.join("cases.json"));
    let tolerance = folder::tolerance(SCORES, &record["max_abs_difference_from_f64"]["score.f32"]);
    let case = case.display();
    let leaves = record["paths"].as_u64().unwrap();
    let total = record["items"].as_u64().unwrap();
    let named = |list: &str, field: &str| -> BTreeMap<String, Vec<String>> {
        let entries = record[list].as_array().unwrap().iter();
        entries.map(|entry| (entry["name"].as_str().unwrap().to_owned(), strings(&entry[field]))).collect()
    };
    let (prompts, filters) = (named("prompts", "history"), named("filters", "exclude"));
    let beams = record["beams"].as_array().unwrap();
    for beam in beams {
        let what = format!(
            "{case} {} {} {} {}",
            beam["prompt"], beam["normalization"], beam["beam_width"], beam["filter"]
        );
        // All items of all leaves when the list is exhaustive; else a beam is as wide as the list is long.
        let width = beam["beam_width"].as_u64().unwrap_or(total.max(leaves));
        let exclude = beam["filter"].as_str().map(|name| filters[name].clone()).unwrap_or_default();
        let answer = server
            .recommend(&json!({
                "history": history(&prompts[beam["prompt"].as_str().unwrap()]),
                "num_items": width,
                "beam_width": width,
                "normalization": beam["normalization"],
                "filters": {"exclude_items": exclude},
            }))
            .ok();
        let found: Vec<(String, f64)> = answer["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|item| (item["item_id"].as_str().unwrap().to_owned(), item["score"].as_f64().unwrap()))
            .collect();

        let mut expected_items = expected(beam);
        let cut = expected_items.len() > width as usize;
        expected_items.truncate(width as usize);
        assert_eq!(found.len(), expected_items.len(), "{what}: length");
        assert!(found.windows(2).all(|pair| pair[0].1 >= pair[1].1), "{what}: sorted");

        let exhaustive = beams.iter().find(|other| {
            other["beam_width"] == "all"
                && other["filter"].is_null()
                && other["prompt"] == beam["prompt"]
                && other["normalization"] == beam["normalization"]
        });
        let transfers = beam["filter"].is_null() || beam["normalization"] == "full_vocab";
        let mut known: BTreeMap<String, f64> = expected(beam).into_iter().collect();
        known.extend(exhaustive.filter(|_| transfers).map(expected).unwrap_or_default());
        for (item, score) in &found {
            assert!(!exclude.contains(item), "{what}: {item} is excluded");
            if let Some(expected) = known.get(item) {
                assert!((score - expected).abs() <= tolerance, "{what}: {item} {score} against {expected}");
            }
        }
        let clear = |name: &str| beam[name].as_f64().is_none_or(|gap| gap > 2.0 * tolerance);
        if clear("smallest_cut_gap") {
            for (found, expected) in found.iter().zip(&expected_items) {
                assert!((found.1 - expected.1).abs() <= tolerance, "{what}: rank by rank");
            }
            let set =
                |list: &[(String, f64)]| list.iter().map(|(item, _)| item.clone()).collect::<BTreeSet<_>>();
            if !cut {
                assert_eq!(set(&found), set(&expected_items), "{what}: set");
            }
            if clear("smallest_rank_gap") {
                let order =
                    |list: &[(String, f64)]| list.iter().map(|(item, _)| item.clone()).collect::<Vec<_>>();
                assert_eq!(order(&found), order(&expected_items), "{what}: order");
            }
        }
    }
}

#[test]
fn every_beam_of_every_token_model() {
    // One server a case, side by side: each waits for its answers most of the time.
    let failed = std::thread::scope(|scope| {
        let cases = folder::token_models().into_iter().map(|case| scope.spawn(move || check(&case)));
        cases.collect::<Vec<_>>().into_iter().filter_map(|case| case.join().err()).count()
    });
    assert_eq!(failed, 0, "cases failed; see above");
}
