//! An answer is a function of the request: not of what was cached, and not of who else is asking.

use serde_json::{Value, json};

use crate::harness::{Random, Server, history, items};

const CASE: &str = "qwen3-untied";

/// What must not differ: the bytes of the slate and of everything that explains it.
pub(crate) fn essence(answer: &Value) -> String {
    ["items", "items_returned", "unknown_items", "dropped_history", "degraded", "reason", "normalization"]
        .map(|field| answer[field].to_string())
        .concat()
}

/// The answer that a server without any cache gives: in a tenant that nobody else is in.
fn cold(server: &Server, request: &Value, tenant: usize) -> Value {
    let mut request = request.clone();
    request["tenant"] = json!(format!("cold {tenant}"));
    let answer = server.recommend(&request).ok();
    assert_eq!(answer["usage"]["cached_tokens"], 0);
    answer
}

fn random_request(random: &mut Random, catalog: &[String], past: &[String]) -> Value {
    let num_items = 1 + random.below(20);
    let mut request = json!({
        "history": history(past),
        "num_items": num_items,
        "beam_width": num_items + random.below(60),
        "normalization": *random.pick(&["full_vocab", "allowed_set"]),
        "priority": *random.pick(&["interactive", "batch", "shadow"]),
    });
    if random.below(3) == 0 {
        let excluded: Vec<&String> = (0..random.below(40)).map(|_| random.pick(catalog)).collect();
        request["filters"] = json!({"exclude_items": excluded, "exclude_seen": random.below(2) == 0});
    }
    if random.below(4) == 0 {
        request["sid_prefix"] = json!([random.below(16)]);
    }
    request
}

#[test]
fn a_returning_user_is_answered_from_the_cache_as_if_there_were_none() {
    let server = Server::start(CASE, &[]);
    let reference = Server::start(CASE, &[]);
    let catalog = items(CASE);
    let mut random = Random(1);
    let mut past: Vec<Vec<String>> = vec![Vec::new(); 6];
    let mut hits = 0;
    for visit in 0..120 {
        let user = random.below(past.len());
        for _ in 0..1 + random.below(6) {
            past[user].push(random.pick(&catalog).clone());
        }
        let mut request = random_request(&mut random, &catalog, &past[user]);
        let expected = cold(&reference, &request, visit);
        request["user_id"] = json!(format!("user {user}"));
        let answer = server.recommend(&request).ok();
        assert_eq!(essence(&answer), essence(&expected), "visit {visit}: {request}");
        hits += usize::from(answer["usage"]["cached_tokens"].as_u64().unwrap() > 0);
        // The same once more: now all whole pages but the end are there.
        let again = server.recommend(&request).ok();
        assert_eq!(essence(&again), essence(&expected), "visit {visit} again: {request}");
        if answer["usage"]["context_tokens"].as_u64().unwrap() > 64 {
            assert!(again["usage"]["cached_tokens"].as_u64().unwrap() >= 32, "{again}");
        }
    }
    assert!(hits > 60, "only {hits} of 120 visits found anything cached");
}

#[test]
fn a_small_cache_changes_nothing_but_the_time() {
    // Room for one largest request and little else, so that pages are evicted all the time.
    let flags = ["--kv-memory", "1MiB", "--max-context", "1024", "--max-beam-width", "128"];
    let server = Server::start(CASE, &flags);
    let reference = Server::start(CASE, &["--max-context", "1024", "--max-beam-width", "128"]);
    let catalog = items(CASE);
    let mut random = Random(5);
    for visit in 0..60 {
        let past: Vec<String> = (0..random.below(150)).map(|_| random.pick(&catalog).clone()).collect();
        let request = random_request(&mut random, &catalog, &past);
        let expected = cold(&reference, &request, visit);
        assert_eq!(essence(&server.recommend(&request).ok()), essence(&expected), "{request}");
    }
    assert!(server.metric("beamline_page_evictions_total", "") > 0.0);
}

#[test]
fn alone_and_among_31_others() {
    let server = Server::start(CASE, &[]);
    let reference = Server::start(CASE, &[]);
    let catalog = items(CASE);
    let mut random = Random(2);
    for round in 0..4 {
        let requests: Vec<Value> = (0..32)
            .map(|_| {
                let past: Vec<String> =
                    (0..random.below(120)).map(|_| random.pick(&catalog).clone()).collect();
                random_request(&mut random, &catalog, &past)
            })
            .collect();
        let alone: Vec<String> =
            requests.iter().enumerate().map(|(i, r)| essence(&cold(&reference, r, 32 * round + i))).collect();
        let together: Vec<String> = std::thread::scope(|scope| {
            let server = &server;
            let send = |request| scope.spawn(move || essence(&server.recommend(request).ok()));
            let threads: Vec<_> = requests.iter().map(send).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (index, (alone, together)) in alone.iter().zip(&together).enumerate() {
            assert_eq!(alone, together, "round {round}: {}", requests[index]);
        }
    }
}

#[test]
fn the_number_of_threads_and_the_size_of_chunks_change_nothing() {
    let one = Server::start(CASE, &["--threads", "1", "--max-step-tokens", "33"]);
    let many = Server::start(CASE, &["--threads", "3"]);
    let catalog = items(CASE);
    let mut random = Random(3);
    for _ in 0..20 {
        let past: Vec<String> = (0..random.below(200)).map(|_| random.pick(&catalog).clone()).collect();
        let request = random_request(&mut random, &catalog, &past);
        assert_eq!(
            essence(&one.recommend(&request).ok()),
            essence(&many.recommend(&request).ok()),
            "{request}"
        );
    }
}

#[test]
fn long_histories_keep_their_cached_beginning_over_visits() {
    let server = Server::start(CASE, &["--max-context", "300"]);
    let reference = Server::start(CASE, &["--max-context", "300"]);
    let catalog = items(CASE);
    let mut random = Random(4);
    let mut past: Vec<String> = (0..80).map(|_| random.pick(&catalog).clone()).collect();
    let (mut last, mut moved, mut hits) = (None, 0, 0);
    for visit in 0..40 {
        past.push(random.pick(&catalog).clone());
        let request = json!({"user_id": "u", "history": history(&past)});
        let answer = server.recommend(&request).ok();
        assert!(answer["usage"]["context_tokens"].as_u64().unwrap() <= 300);
        assert_eq!(essence(&answer), essence(&cold(&reference, &request, visit)));
        let dropped = answer["dropped_history"].as_u64().unwrap();
        assert!(dropped > 0);
        if last.is_some_and(|last| last != dropped) {
            moved += 1;
        }
        if last == Some(dropped) {
            assert!(answer["usage"]["cached_tokens"].as_u64().unwrap() >= 96, "{answer}");
            hits += 1;
        }
        last = Some(dropped);
    }
    assert!((2..=4).contains(&moved) && hits >= 35, "{moved} moves, {hits} hits");
}

#[test]
fn tenants_share_nothing() {
    let server = Server::start(CASE, &[]);
    let past = history(&items(CASE)[..40]);
    let mut request = json!({"user_id": "u", "history": past, "tenant": "a"});
    server.recommend(&request).ok();
    assert!(server.recommend(&request).ok()["usage"]["cached_tokens"].as_u64().unwrap() > 0);
    request["tenant"] = json!("b");
    assert_eq!(server.recommend(&request).ok()["usage"]["cached_tokens"], 0);
}

#[test]
fn a_format_of_keys_and_values_is_named_takes_half_the_memory_and_keeps_every_bit() {
    let catalog = items(CASE);
    let (mut scores, mut bytes) = (Vec::new(), Vec::new());
    for format in ["f32", "bf16"] {
        let flags = ["--kv-format", format, "--max-context", "1024", "--max-beam-width", "64"];
        let server = Server::start(CASE, &[&flags[..], &["--kv-memory", "4MiB"]].concat());
        let request = json!({"history": history(&catalog[..40]), "num_items": 10});
        let first = server.recommend(&request).ok();
        let again = server.recommend(&request).ok();
        assert!(again["usage"]["cached_tokens"].as_u64() > Some(0));
        assert_eq!(essence(&first), essence(&again));
        assert_eq!(first["model"]["kv_format"], format);
        let model = &server.get("/v1/models").ok()["models"][0];
        assert_eq!(model["kv_format"], format);
        server.wait_for("the engine's numbers", |server| server.metric("beamline_pages", "") > 0.0);
        let pages = server.metric("beamline_pages", "");
        bytes.push(model["memory"]["kv_bytes"].as_f64().unwrap() / pages);
        scores.push(first["items"].to_string());
    }
    assert!(scores[0] != scores[1], "the formats compute the same: {scores:?}");
    assert!((bytes[0] / bytes[1] - 2.0).abs() < 1e-9, "bytes of a page {bytes:?}");
}

#[test]
fn a_weight_format_is_named_and_cached_answers_keep_every_bit() {
    let catalog = items(CASE);
    let mut scores = Vec::new();
    for format in ["f32", "bf16", "q8_0"] {
        let server = Server::start(CASE, &["--weight-format", format]);
        let request = json!({"history": history(&catalog[..40]), "num_items": 10});
        let first = server.recommend(&request).ok();
        let again = server.recommend(&request).ok();
        assert!(again["usage"]["cached_tokens"].as_u64() > Some(0));
        assert_eq!(essence(&first), essence(&again));
        assert_eq!(first["model"]["weight_format"], format);
        assert_eq!(server.get("/v1/models").ok()["models"][0]["weight_format"], format);
        scores.push(first["items"].to_string());
    }
    assert!(scores[0] != scores[1] && scores[1] != scores[2], "the formats compute the same: {scores:?}");
}
