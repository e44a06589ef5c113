//! Checkpoints that cannot be served: a clear error and exit code 1, never a panic; and `inspect` finds
//! the same.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::{Server, beamline, fixture};

const CASE: &str = "qwen3-untied";

/// A copy of a fixture to be damaged.
pub(crate) fn copy(name: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
    }
    directory
}

pub(crate) fn stderr_of_serve(checkpoint: &Path, flags: &[&str]) -> String {
    let output = beamline()
        .args(["serve", "--listen", "127.0.0.1:0", "--log", "error", "--checkpoint"])
        .arg(checkpoint)
        .args(flags)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

pub(crate) fn edit(path: PathBuf, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(&path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

pub(crate) fn edit_json(path: PathBuf, change: impl FnOnce(&mut Value)) {
    edit(path, |bytes| {
        let mut value = serde_json::from_slice(bytes).unwrap();
        change(&mut value);
        *bytes = value.to_string().into_bytes();
    });
}

/// Rewrites the header of a safetensors file.
fn edit_header(path: PathBuf, change: impl FnOnce(&mut Value)) {
    edit(path, |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        change(&mut header);
        let header = header.to_string().into_bytes();
        let mut whole = (header.len() as u64).to_le_bytes().to_vec();
        whole.extend_from_slice(&header);
        whole.extend_from_slice(&bytes[8 + length..]);
        *bytes = whole;
    });
}

#[test]
fn damaged_checkpoints_are_refused_with_the_reason() {
    type Damage = Box<dyn FnOnce(&Path)>;
    let weights = |directory: &Path| directory.join("model.safetensors");
    let damages: Vec<(&str, &str, Damage)> = vec![
        ("no config", "config.json", Box::new(|d| std::fs::remove_file(d.join("config.json")).unwrap())),
        ("no weights", "model.safetensors", Box::new(move |d| std::fs::remove_file(weights(d)).unwrap())),
        ("truncated", "model.safetensors", Box::new(move |d| edit(weights(d), |b| b.truncate(b.len() / 2)))),
        (
            "header too long",
            "header",
            Box::new(move |d| edit(weights(d), |b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes()))),
        ),
        (
            "overflowing shape",
            "model.safetensors",
            Box::new(move |d| {
                edit_header(weights(d), |h| h["model.norm.weight"]["shape"] = json!([u64::MAX, u64::MAX]));
            }),
        ),
        (
            "lying offsets",
            "model.safetensors",
            Box::new(move |d| {
                edit_header(weights(d), |h| h["model.norm.weight"]["data_offsets"] = json!([0, 1_u64 << 60]));
            }),
        ),
        (
            "missing tensor",
            "missing model.norm.weight",
            Box::new(move |d| {
                edit_header(weights(d), |h| {
                    let tensor = h.as_object_mut().unwrap().remove("model.norm.weight").unwrap();
                    h["model.another.weight"] = tensor;
                });
            }),
        ),
        (
            "wrong shape",
            "has shape",
            Box::new(|d| edit_json(d.join("config.json"), |c| c["intermediate_size"] = json!(64))),
        ),
        (
            "NaN",
            "not finite",
            Box::new(move |d| {
                edit(weights(d), |b| {
                    let end = b.len();
                    b[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
                });
            }),
        ),
        (
            "zeros in the second half",
            "nothing but zeros",
            Box::new(move |d| {
                edit(weights(d), |b| {
                    let half = b.len() / 2;
                    b[half..].fill(0);
                });
            }),
        ),
        (
            "a base in quotes",
            "rope_theta is \"1000000\", expected a number",
            Box::new(|d| {
                edit_json(d.join("config.json"), |c| c["rope_parameters"]["rope_theta"] = json!("1000000"))
            }),
        ),
        (
            "two rope blocks",
            "rope_parameters and rope_scaling are both there",
            Box::new(|d| {
                edit_json(d.join("config.json"), |c| {
                    c["rope_scaling"] = json!({"type": "linear", "factor": 2.0})
                });
            }),
        ),
        (
            "more layers than any model has",
            "num_hidden_layers is 16777216",
            Box::new(|d| edit_json(d.join("config.json"), |c| c["num_hidden_layers"] = json!(1 << 24))),
        ),
        (
            "a config without end",
            "more than the limit",
            Box::new(|d| std::fs::File::create(d.join("config.json")).unwrap().set_len(6 << 30).unwrap()),
        ),
        (
            "a convention without end",
            "more than the limit",
            Box::new(|d| std::fs::File::create(d.join("convention.json")).unwrap().set_len(6 << 30).unwrap()),
        ),
        (
            "a device for weights",
            "not a regular file",
            Box::new(move |d| {
                std::fs::remove_file(weights(d)).unwrap();
                std::os::unix::fs::symlink("/dev/zero", weights(d)).unwrap();
            }),
        ),
        (
            "another architecture",
            "BertModel",
            Box::new(|d| edit_json(d.join("config.json"), |c| c["architectures"] = json!(["BertModel"]))),
        ),
        (
            "tokenizer without the tokens",
            "lacks",
            Box::new(|d| {
                edit_json(d.join("convention.json"), |c| {
                    c["level_token_patterns"] = json!(["<x_{}>", "<y_{}>", "<z_{}>"]);
                });
            }),
        ),
        (
            "broken tokenizer",
            "tokenizer.json",
            Box::new(|d| std::fs::write(d.join("tokenizer.json"), "{").unwrap()),
        ),
        (
            "no convention",
            "convention",
            Box::new(|d| std::fs::remove_file(d.join("convention.json")).unwrap()),
        ),
        (
            "duplicate items",
            "line 131",
            Box::new(|d| {
                edit(d.join("catalog.jsonl"), |b| {
                    let first = b.split(|byte| *byte == b'\n').next().unwrap().to_vec();
                    b.extend(first);
                });
            }),
        ),
        (
            "a code without a token",
            "unknown code 99",
            Box::new(|d| {
                std::fs::write(d.join("catalog.jsonl"), r#"{"item_id": "a", "sid": [1, 2, 99]}"#).unwrap()
            }),
        ),
    ];
    for (what, reason, damage) in damages {
        let directory = copy(CASE);
        damage(directory.path());
        let text = stderr_of_serve(directory.path(), &[]);
        assert!(text.contains(reason), "{what}: {text}");
        let inspected = beamline().arg("inspect").arg(directory.path()).output().unwrap();
        let text = String::from_utf8(inspected.stdout).unwrap();
        assert_eq!(inspected.status.code(), Some(1), "{what}: {text}");
        assert!(text.contains(reason), "{what}: {text}");
    }
}

#[test]
fn settings_that_cannot_work_are_refused_with_the_reason() {
    let checkpoint = fixture(CASE);
    let small = stderr_of_serve(&checkpoint, &["--kv-memory", "1MiB"]);
    assert!(small.contains("needs") && small.contains("--max-context"), "{small}");
    let narrow = stderr_of_serve(&checkpoint, &["--max-context", "20"]);
    assert!(narrow.contains("a history of one item takes 32 tokens"), "{narrow}");
    let contradiction = stderr_of_serve(&checkpoint, &["--default-beam-width", "600"]);
    assert!(
        contradiction.contains("default-beam-width (600) is more than max-beam-width (512)"),
        "{contradiction}"
    );
    let preset = stderr_of_serve(&checkpoint, &["--convention", "nonesuch"]);
    assert!(preset.contains("unknown preset"), "{preset}");
    let catalog = stderr_of_serve(&checkpoint, &["--catalog", "/nowhere/catalog.jsonl"]);
    assert!(catalog.contains("/nowhere/catalog.jsonl"), "{catalog}");
}

#[test]
fn a_port_that_is_in_use_is_told() {
    let server = Server::start(CASE, &[]);
    let output = beamline()
        .args(["serve", "--checkpoint"])
        .arg(fixture(CASE))
        .args(["--listen", &server.address.to_string()])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains(&format!("port {} is in use", server.address.port())), "{text}");
}

#[test]
fn settings_come_from_flags_environment_and_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("beamline.toml");
    let checkpoint = fixture(CASE);
    let text = format!("[model]\ncheckpoint = {checkpoint:?}\nname = 'file'\n[limits]\nmax_beam_width = 7\n");
    std::fs::write(&file, text).unwrap();
    let name = |flags: &[&str], environment: &[(&str, &str)]| {
        let output = beamline()
            .args(["recommend", "--cold-start", "--json", "-n", "1", "--config"])
            .arg(&file)
            .args(flags)
            .envs(environment.iter().copied())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(answer["usage"]["beam_width"], 7);
        answer["model"]["name"].as_str().unwrap().to_owned()
    };
    assert_eq!(name(&[], &[]), "file");
    assert_eq!(name(&[], &[("BEAMLINE_NAME", "environment")]), "environment");
    assert_eq!(name(&["--name", "flag"], &[("BEAMLINE_NAME", "environment")]), "flag");
    std::fs::write(&file, "[model]\nchekpoint = 'x'\n").unwrap();
    let output = beamline().args(["recommend", "--cold-start", "--config"]).arg(&file).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && text.contains("chekpoint"), "{text}");
}
