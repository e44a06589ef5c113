//! Damaged and random requests: each gets an answer of the right shape, from a server that goes on
//! serving.

use serde_json::{Value, json};

use crate::harness::{Random, Server, history, items};

const CASE: &str = "qwen3-collisions";

/// A value of any shape, biased towards what requests hold.
fn any_value(random: &mut Random, depth: usize, words: &[String]) -> Value {
    match random.below(if depth == 0 { 7 } else { 9 }) {
        0 => Value::Null,
        1 => json!(random.below(2) == 0),
        2 => json!(*random.pick(&[0i64, 1, -1, 2, 50, 513, i64::MAX, i64::MIN])),
        3 => json!(*random.pick(&[0.5f64, -0.0, 1e308, 1e-308])),
        4 => json!(random.pick(words)),
        5 => json!("\u{0}\u{ffff}\u{1F600}".repeat(random.below(40))),
        6 => json!("full_vocab"),
        7 => (0..random.below(5)).map(|_| any_value(random, depth - 1, words)).collect(),
        _ => (0..random.below(4))
            .map(|_| (random.pick(words).clone(), any_value(random, depth - 1, words)))
            .collect(),
    }
}

#[test]
fn whatever_is_sent_has_an_answer() {
    let server = Server::start(CASE, &[]);
    let mut words = items(CASE);
    words.truncate(20);
    let fields = [
        "user_id",
        "history",
        "token_ids",
        "prompt",
        "sid_prefix",
        "num_items",
        "beam_width",
        "beam_widths",
        "model",
        "normalization",
        "priority",
        "filters",
        "timeout_ms",
        "allow_degraded",
        "strict_history",
        "tenant",
        "item_id",
        "exclude_items",
        "allow_items",
    ];
    words.extend(fields.map(String::from));
    let mut random = Random(77);
    let mut answered = 0;
    for round in 0..1500 {
        let past: Vec<String> = (0..random.below(6)).map(|_| words[random.below(20)].clone()).collect();
        let mut request = json!({"history": history(&past), "num_items": 1 + random.below(9)});
        for _ in 0..random.below(3) {
            request[fields[random.below(fields.len())]] = any_value(&mut random, 3, &words);
        }
        let mut body = request.to_string().into_bytes();
        if round % 3 == 0 {
            for _ in 0..1 + random.below(4) {
                let at = random.below(body.len());
                body[at] = random.below(256) as u8;
            }
        }
        let answer =
            server.post_text("/v1/recommend", &String::from_utf8_lossy(&body), "application/json", &[]);
        let shape: Value = answer.json();
        match answer.status {
            200 => {
                answered += 1;
                let ranks =
                    shape["items"].as_array().unwrap().iter().map(|item| item["rank"].as_u64().unwrap());
                assert!(ranks.eq(1..=shape["items_returned"].as_u64().unwrap()), "{shape}");
            }
            400..=499 | 504 => assert!(shape["error"]["type"].is_string(), "{shape}"),
            status => panic!("{status} for {}", String::from_utf8_lossy(&body)),
        }
    }
    assert!(answered > 200, "only {answered} requests were still sound");
    server.still_serves();
}
