//! Encoder-decoders over HTTP: what is special to a context that is found as a whole or not at all, and
//! to a decoder that begins with a token of its own. Their beams are compared in `conformance`.

use serde_json::{Value, json};

use crate::harness::{Server, beamline, fixture, history, ids, items};

const CASE: &str = "t5-tiger";

fn visit(known: &[String], count: usize, more: Value) -> Value {
    let mut body =
        json!({"history": history(&known[..count]), "num_items": 20, "beam_width": 32, "user_id": "u"});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[test]
fn an_identical_history_is_found_and_any_other_is_computed() {
    let server = Server::start(CASE, &[]);
    let known = items(CASE);
    let cold = server.recommend(&visit(&known, 12, json!({}))).ok();
    let context = cold["usage"]["context_tokens"].clone();
    // Four codes an item, the end of the text, and the start of the decoder.
    assert_eq!((&context, &cold["usage"]["cached_tokens"]), (&json!(12 * 4 + 2), &json!(0)));
    let again = server.recommend(&visit(&known, 12, json!({}))).ok();
    assert_eq!((&again["usage"]["cached_tokens"], &again["items"]), (&context, &cold["items"]));
    // A longer history begins alike, and every row of it is another.
    let longer = server.recommend(&visit(&known, 13, json!({}))).ok();
    assert_eq!(longer["usage"]["cached_tokens"], 0);
    let stranger = server.recommend(&visit(&known, 12, json!({"tenant": "other"}))).ok();
    assert_eq!((&stranger["usage"]["cached_tokens"], &stranger["items"]), (&json!(0), &cold["items"]));
    // What is warmed is found.
    server.post("/v1/warm", &json!({"history": history(&known[..20])})).ok();
    let warm = server.recommend(&visit(&known, 20, json!({}))).ok();
    assert_eq!(warm["usage"]["cached_tokens"], warm["usage"]["context_tokens"]);
}

#[test]
fn a_history_that_is_too_long_for_one_step_loses_its_oldest_items() {
    let known = items(CASE);
    let long: Vec<String> = (0..300).map(|index| known[index * 7 % known.len()].clone()).collect();
    let server = Server::start(CASE, &["--max-step-tokens", "256"]);
    let answer = server.recommend(&visit(&long, 300, json!({}))).ok();
    let (context, dropped) = (&answer["usage"]["context_tokens"], &answer["dropped_history"]);
    let (context, dropped) = (context.as_u64().unwrap(), dropped.as_u64().unwrap());
    assert!(context <= 256 && context == (300 - dropped) * 4 + 2, "{context} tokens, {dropped} dropped");
    // What is left is asked for alone.
    let kept = &long[dropped as usize..];
    let same = server.recommend(&visit(kept, kept.len(), json!({"tenant": "other"}))).ok();
    assert_eq!(same["items"], answer["items"]);
}

#[test]
fn nobody_is_a_history_like_any_other() {
    let server = Server::start(CASE, &[]);
    let answer = server.recommend(&json!({"history": [], "num_items": 5})).ok();
    assert_eq!((ids(&answer).len(), &answer["usage"]["context_tokens"]), (5, &json!(2)));
    let empty = json!({"token_ids": [], "num_items": 5});
    server.recommend(&empty).fails(422, "empty_context");
}

#[test]
fn a_forced_prefix_is_the_part_of_the_whole_search_that_begins_with_it() {
    let server = Server::start(CASE, &[]);
    let known = items(CASE);
    let all = json!({"num_items": 120, "beam_width": 120});
    for normalization in ["full_vocab", "allowed_set"] {
        let whole = server
            .recommend(&visit(
                &known,
                9,
                json!({"num_items": 120, "beam_width": 120, "normalization": normalization}),
            ))
            .ok();
        for levels in 1..=3 {
            let prefix = &whole["items"][3]["sid"].as_array().unwrap()[..levels];
            let mut body = visit(&known, 9, all.clone());
            body["sid_prefix"] = json!(prefix);
            body["normalization"] = json!(normalization);
            let forced = server.recommend(&body).ok();
            let begins = |item: &&Value| item["sid"].as_array().unwrap().starts_with(prefix);
            let expected: Vec<&Value> = whole["items"].as_array().unwrap().iter().filter(begins).collect();
            let found = forced["items"].as_array().unwrap();
            assert_eq!(found.len(), expected.len());
            let mut in_widths = body.clone();
            in_widths.as_object_mut().unwrap().remove("beam_width");
            in_widths["beam_widths"] = json!(vec![120; 4 - levels]);
            assert_eq!(server.recommend(&in_widths).ok()["items"], forced["items"]);
            let score = |item: &Value| item["score"].as_f64().unwrap();
            // The probability of the prefix does not count: all scores differ by it.
            let prefix_score = score(expected[0]) - score(&found[0]);
            assert!(prefix_score <= 1e-9, "{prefix_score}");
            for (found, expected) in found.iter().zip(expected) {
                assert_eq!(found["item_id"], expected["item_id"]);
                assert!((score(expected) - score(found) - prefix_score).abs() < 1e-4);
            }
        }
    }
}

#[test]
fn candidates_are_ranked_by_the_scores_that_a_search_gives_them() {
    let server = Server::start(CASE, &[]);
    let known = items(CASE);
    let found = server.recommend(&visit(&known, 7, json!({"num_items": 120, "beam_width": 120}))).ok();
    let candidates: Vec<Value> = known[40..60].iter().map(|item| json!({"item_id": item})).collect();
    let ranked =
        server.post("/v1/rank", &json!({"history": history(&known[..7]), "candidates": candidates})).ok();
    for candidate in ranked["candidates"].as_array().unwrap() {
        let same = |item: &&Value| item["item_id"] == candidate["item_id"];
        let searched = found["items"].as_array().unwrap().iter().find(same).unwrap();
        let score = candidate["predictions"]["log_probability"].as_f64().unwrap();
        assert!((score - searched["score"].as_f64().unwrap()).abs() < 1e-4, "{candidate}");
    }
}

#[test]
fn inspect_says_what_serve_does_and_names_a_convention_of_the_other_kind() {
    let run = |checkpoint: &std::path::Path| {
        let output = beamline().arg("inspect").arg(checkpoint).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    for case in [CASE, "t5-tiger-gated"] {
        let (good, text) = run(&fixture(case));
        assert!(good, "{text}");
        assert!(text.contains("T5ForConditionalGeneration"), "{text}");
    }
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(fixture(CASE)).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    let file = copy.path().join("convention.json");
    let convention = std::fs::read_to_string(&file).unwrap();
    for (from, to, said) in [
        ("\"encoder-decoder\"", "\"decoder\"", "decoder_start_token is of encoder-decoder models"),
        (
            "\"text\": \"<pad>\",\n  \"id\": 0",
            "\"text\": \"</s>\",\n  \"id\": 1",
            "decoder_start_token_id in config.json is 0",
        ),
    ] {
        let changed = convention.replace(from, to);
        assert_ne!(changed, convention, "{from}");
        std::fs::write(&file, changed).unwrap();
        let (good, text) = run(copy.path());
        assert!(!good && text.contains(said), "{text}");
    }
}
