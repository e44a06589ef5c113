//! A folder with everything except weights, for `beamline serve --random-weights FOLDER/config.json`:
//! config, tokenizer, convention, and a catalog of random items.

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use crate::Args;
use crate::shapes::{LEVELS, codes, config_json, first_token};
use crate::world::random;

const LETTERS: [&str; LEVELS] = ["a", "b", "c"];

fn token(level: usize, code: u32) -> String {
    format!("<s_{}_{code}>", LETTERS[level])
}

pub(crate) fn write(folder: &Path, args: &Args) {
    std::fs::create_dir_all(folder).unwrap();
    let text = config_json(&args.shape);
    let config = crate::shapes::config(&args.shape);
    let (first, codes) = (first_token(&config), codes(&config));
    let tokens = || (0..LEVELS).flat_map(|level| (0..codes).map(move |code| (level, code)));
    let id = |level: usize, code: u32| first + level as u32 * codes + code;
    let vocabulary: serde_json::Map<String, Value> = std::iter::once(("<unknown>".to_owned(), json!(0)))
        .chain(tokens().map(|(level, code)| (token(level, code), json!(id(level, code)))))
        .collect();
    let added: Vec<Value> = tokens()
        .map(|(level, code)| {
            json!({"id": id(level, code), "content": token(level, code), "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unknown>"},
    });
    let convention = json!({
        "levels": LEVELS, "level_token_patterns": LETTERS.map(|letter| format!("<s_{letter}_{{}}>")),
        "level_code_counts": vec![codes; LEVELS], "codes_with_tokens": "all",
    });
    for (name, text) in [
        ("config.json", text),
        ("tokenizer.json", tokenizer.to_string()),
        ("convention.json", convention.to_string()),
    ] {
        std::fs::write(folder.join(name), text).unwrap();
    }
    let mut random = random(7);
    let mut catalog = std::io::BufWriter::new(std::fs::File::create(folder.join("catalog.jsonl")).unwrap());
    for item in 0..args.items {
        let sid = [(); LEVELS].map(|()| random(u64::from(codes)));
        writeln!(catalog, "{}", json!({"item_id": format!("item-{item}"), "sid": sid})).unwrap();
    }
}
