//! A newcomer's first mistakes: each leads to a message that says the next step, once and in plain words.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::harness::{Server, beamline, fixture};
use crate::loading::{copy, edit_json};

const CASE: &str = "qwen3-untied";

/// Words of Rust and of operating systems that no message for people holds.
const JARGON: [&str; 9] = ["Some(", "None", "u64", "u32", "usize", "i64", "os error", "panicked", "Err("];

/// What a command that must fail says.
fn said(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = String::from_utf8([stdout, stderr].concat()).unwrap();
    assert!(!status.success(), "{text}");
    for word in JARGON {
        assert!(!text.contains(word), "{word}: {text}");
    }
    text
}

fn serve(checkpoint: &Path) -> String {
    said(beamline().args(["serve", "--listen", "0", "--log", "error", "--checkpoint"]).arg(checkpoint))
}

fn inspect(checkpoint: &Path) -> String {
    said(beamline().arg("inspect").arg(checkpoint))
}

/// `serve` and `inspect` refuse a folder with the same words, `serve` before it says that it listens.
#[track_caller]
fn both_say(checkpoint: &Path, next_step: &str) {
    let served = serve(checkpoint);
    assert!(served.contains(next_step) && !served.contains("listening"), "{served}");
    assert_eq!(served.matches(next_step).count(), 1, "{served}");
    let inspected = inspect(checkpoint);
    assert!(inspected.contains(next_step) && !inspected.contains("no problems"), "{inspected}");
    assert_eq!(inspected.matches(next_step).count(), 1, "{inspected}");
}

/// A running demo, ended when dropped.
struct Demo {
    child: Child,
    text: String,
}

impl Demo {
    /// Starts it, and reads what it prints until it is ready.
    fn start(flags: &[&str]) -> Self {
        let mut child = beamline()
            .args(flags)
            .args(["--kv-memory", "32MiB", "--log", "error"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let text: Vec<String> = lines.by_ref().take_while(|line| !line.contains("Ctrl-C")).collect();
        Self { child, text: text.join("\n") }
    }

    fn address(&self) -> &str {
        self.text.lines().next().unwrap().strip_prefix("listening on http://").unwrap()
    }

    /// The command to copy.
    fn curl(&self) -> &str {
        let start = self.text.find("curl").unwrap();
        &self.text[start..start + self.text[start..].find("\n\n").unwrap()]
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn flags_alone_serve_the_demo_and_a_port_is_enough() {
    let demo = Demo::start(&["--listen", "0"]);
    assert!(demo.address().starts_with("127.0.0.1:"));
    let port = demo.address().rsplit_once(':').unwrap().1;
    let taken = said(beamline().args(["--listen", port]));
    assert!(taken.contains("is in use") && taken.contains("--listen 127.0.0.1:PORT"), "{taken}");
    let wrong = said(beamline().args(["--listen", "shop.example:80"]));
    assert!(wrong.contains("write 127.0.0.1:8080 or 8080 for this machine only"), "{wrong}");
}

/// The request and the answer of the README are those of the demo.
#[test]
fn the_readme_shows_the_request_that_the_demo_prints_and_its_answer() {
    let demo = Demo::start(&["demo", "--listen", "0"]);
    let curl = demo.curl().replace(demo.address(), "127.0.0.1:8080");
    let readme = include_str!("../../../../README.md");
    assert!(readme.contains(&curl), "{curl}");
    let body = demo.curl().split_once("-d '").unwrap().1.rsplit_once('\'').unwrap().0;
    let ask = || -> Value {
        let url = format!("http://{}/v1/recommend", demo.address());
        let mut answer = ureq::post(url).header("content-type", "application/json").send(body).unwrap();
        let mut text = String::new();
        answer.body_mut().as_reader().read_to_string(&mut text).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let (first, second) = (ask(), ask());
    let shown = readme.split("```json\n").nth(1).unwrap().split("```").next().unwrap();
    let shown: Value = serde_json::from_str(shown).unwrap();
    let ids = |answer: &Value| -> Vec<Value> {
        answer["items"].as_array().unwrap().iter().map(|item| item["item_id"].clone()).collect()
    };
    assert_eq!(ids(&shown), ids(&first));
    assert_eq!(shown["usage"], first["usage"]);
    assert_eq!(shown["catalog_version"], first["catalog_version"]);
    assert_eq!(first["items"], second["items"]);
    assert!(second["usage"]["cached_tokens"].as_u64().unwrap() > 0, "as the demo says");
}

#[test]
fn a_checkpoint_without_its_flag_is_told_the_flag() {
    let directory = fixture(CASE);
    for command in [&[][..], &["serve"]] {
        let text = said(beamline().args(command).arg(&directory));
        assert!(text.contains(&format!("beamline serve --checkpoint {}", directory.display())), "{text}");
        assert!(text.contains("beamline inspect"), "{text}");
    }
    let nothing = said(beamline().arg("serve"));
    assert!(nothing.contains("give --checkpoint DIR"), "{nothing}");
}

#[test]
fn a_wrong_folder_is_told_the_right_one() {
    let root = tempfile::tempdir().unwrap();
    let inner = root.path().join("out/checkpoint-500");
    std::fs::create_dir_all(&inner).unwrap();
    std::fs::write(inner.join("config.json"), "{}").unwrap();
    both_say(&root.path().join("out"), "name that folder");
    both_say(&root.path().join("uot"), &format!("did you mean {}?", root.path().join("out").display()));
    let snapshot = root.path().join("models--shop--tiger/snapshots/0a1b");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::write(snapshot.join("config.json"), "{}").unwrap();
    both_say(&root.path().join("models--shop--tiger"), &format!("{}: name that", snapshot.display()));
    both_say(&inner.join("config.json"), "name the directory that holds config.json");
}

#[test]
fn files_of_the_wrong_kind_say_how_to_make_the_right_ones() {
    let directory = copy(CASE);
    let path = |name: &str| directory.path().join(name);
    let pickled = || std::fs::rename(path("model.safetensors"), path("pytorch_model.bin")).unwrap();
    pickled();
    both_say(directory.path(), "safe_serialization=True");
    std::fs::rename(path("pytorch_model.bin"), path("model.safetensors")).unwrap();

    std::fs::write(path("adapter_config.json"), "{}").unwrap();
    both_say(directory.path(), "merge_and_unload()");
    std::fs::remove_file(path("adapter_config.json")).unwrap();

    let tokenizer = std::fs::read(path("tokenizer.json")).unwrap();
    std::fs::write(
        path("tokenizer.json"),
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
    )
    .unwrap();
    both_say(directory.path(), "git lfs pull");
    std::fs::remove_file(path("tokenizer.json")).unwrap();
    std::fs::write(path("tokenizer.model"), "").unwrap();
    both_say(directory.path(), "use_fast=True");
    std::fs::write(path("tokenizer.json"), tokenizer).unwrap();

    let convention = std::fs::read(path("convention.json")).unwrap();
    std::fs::remove_file(path("convention.json")).unwrap();
    both_say(directory.path(), "name a preset such as --convention minionerec");
    std::fs::write(path("convention.json"), convention).unwrap();

    std::fs::rename(path("catalog.jsonl"), path("items.jsonl")).unwrap();
    both_say(directory.path(), "name one with --catalog FILE; is items.jsonl the catalog?");
    std::fs::rename(path("items.jsonl"), path("catalog.jsonl")).unwrap();
    let good = beamline().arg("inspect").arg(directory.path()).output().unwrap();
    let text = String::from_utf8(good.stdout).unwrap();
    assert!(good.status.success() && text.contains("no problems found: `beamline serve` serves"), "{text}");
}

/// The files are right, and a server with these settings would not start.
#[test]
fn inspect_finds_what_only_a_server_would_suffer() {
    let run = |flags: &[&str]| beamline().arg("inspect").arg(fixture(CASE)).args(flags).output().unwrap();
    for (flags, problem) in [
        (&["--kv-memory", "1MiB"][..], "give more memory"),
        (&["--max-context", "20"], "a history of one item takes"),
        (&["--model-memory", "1MiB"], "raise --model-memory"),
    ] {
        let output = run(flags);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.code() == Some(1) && text.contains(problem), "{text}");
    }
    let quick = String::from_utf8(run(&["--quick", "--kv-memory", "1MiB"]).stdout).unwrap();
    assert!(quick.contains("run it without --quick"), "{quick}");
    let limits = beamline().args(["inspect", "--limits", "--max-beam-width", "77"]).output().unwrap();
    let limits = String::from_utf8(limits.stdout).unwrap();
    assert!(
        limits.contains("77  --max-beam-width") && limits.contains("2.0 MiB  --max-body-bytes"),
        "{limits}"
    );
}

#[test]
fn a_misspelt_setting_is_told_the_right_one() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("beamline.toml");
    std::fs::write(&file, "[model]\ncheckpiont = 'x'\n").unwrap();
    let text = said(beamline().args(["serve", "--config"]).arg(&file));
    assert!(text.contains("line 2") && text.contains("did you mean `checkpoint`?"), "{text}");
    assert_eq!(text.matches("checkpiont = ").count(), 1, "the line is shown once: {text}");

    let flag = said(beamline().args(["serve", "--chekpoint", "x"]));
    assert!(flag.contains("--checkpoint"), "{flag}");
    let elsewhere = said(beamline().args(["--port", "9000"]));
    assert!(elsewhere.contains("Here it is: --listen 9000"), "{elsewhere}");
    let number = said(beamline().args(["serve", "--checkpoint", "x", "--threads", "two"]));
    assert!(number.contains("expected a whole number"), "{number}");
    let size = said(beamline().args(["serve", "--checkpoint", "x", "--kv-memory", "lots"]));
    assert!(size.contains("such as 512MiB"), "{size}");
    let variable = said(beamline().args(["inspect", "nowhere"]).env("BEAMLINE_LISTN", "1"));
    assert!(
        variable.contains("BEAMLINE_LISTN") && variable.contains("did you mean `BEAMLINE_LISTEN`?"),
        "{variable}"
    );
    let served = said(
        beamline().args(["serve", "--checkpoint", "nowhere", "--listen", "0"]).env("BEAMLINE_LISTN", "1"),
    );
    assert!(served.contains("did you mean `BEAMLINE_LISTEN`?"), "{served}");
}

#[test]
fn what_cannot_be_read_is_said_once() {
    for command in [
        &["serve", "--config", "/nowhere/beamline.toml"][..],
        &["serve", "--checkpoint", "/nowhere/checkpoint", "--listen", "0", "--log", "off"],
        &["catalog", "check", "/nowhere/catalog.jsonl"],
        &["recommend", "--request", "/nowhere/request.json"],
    ] {
        let text = said(beamline().args(command));
        assert!(text.matches("/nowhere/").count() == 1 && text.matches("o such ").count() == 1, "{text}");
    }
}

#[test]
fn a_server_that_is_not_there_is_told_how_to_name() {
    let text = said(beamline().args(["models", "list", "--server", "http://127.0.0.1:9"]));
    assert!(text.contains("is the server running? Name it with --server URL"), "{text}");
    let text = said(beamline().args(["models", "list", "--server", "127.0.0.1:9"]));
    assert!(text.contains("write http://HOST:PORT"), "{text}");
    let text = said(beamline().args(["catalog", "push", "catalog.jsonl"]));
    assert!(text.contains("for example: beamline catalog push shop catalog.jsonl"), "{text}");
}

#[test]
fn recommend_asks_the_demo_or_a_running_server() {
    let ask = |flags: &[&str]| {
        let output = beamline().arg("recommend").args(flags).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let history = "soft-baby-blanket-dogs, soft-night-light-circus";
    let (table, note) = ask(&["--history", history, "-n", "2"]);
    assert!(note.contains("the demo answers") && !table.contains("skipped"), "{table}{note}");

    let server = Server::start(CASE, &[]);
    let url = format!("http://{}", server.address);
    let (answer, _) = ask(&["--server", &url, "--cold-start", "--json", "-n", "3"]);
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["items_returned"], 3);
    let directory = tempfile::tempdir().unwrap();
    let request = directory.path().join("request.json");
    std::fs::write(&request, r#"{"history": [], "num_items": 3}"#).unwrap();
    let (other, _) = ask(&["--server", &url, "--request", request.to_str().unwrap(), "--json"]);
    let other: Value = serde_json::from_str(&other).unwrap();
    assert_eq!(other["items"], answer["items"]);
    let both = said(
        beamline().args(["recommend", "--cold-start", "--server", &url, "--checkpoint"]).arg(fixture(CASE)),
    );
    assert!(both.contains("give one of them"), "{both}");
}

/// The version that `catalog check` prints is the one that a server shows, or none.
#[test]
fn catalog_check_prints_the_version_of_the_server() {
    let served = Server::start(CASE, &[]).get("/v1/models").ok();
    let version = served["models"][0]["catalog"]["version"].as_str().unwrap().to_owned();
    let directory = tempfile::tempdir().unwrap();
    let alone = directory.path().join("catalog.jsonl");
    std::fs::copy(fixture(CASE).join("catalog.jsonl"), &alone).unwrap();
    let check = |flags: &[&Path]| {
        let output = beamline().args(["catalog", "check"]).args(flags).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let beside = check(&[&fixture(CASE).join("catalog.jsonl")]);
    assert!(beside.starts_with(&format!("catalog {version}\n")), "{beside}");
    assert!(check(&[&alone, Path::new("--checkpoint"), &fixture(CASE)]).contains(&version));
    let unknown = check(&[&alone]);
    assert!(!unknown.contains(&version) && unknown.contains("--checkpoint DIR"), "{unknown}");
}

#[test]
fn a_folder_with_a_problem_in_a_field_is_read_to_its_end() {
    let directory = copy(CASE);
    edit_json(directory.path().join("config.json"), |config| config["rope_theta"] = "fast".into());
    let text = inspect(directory.path());
    assert!(text.contains("rope_theta") && text.contains("sha256") && text.contains("problem"), "{text}");
}

#[test]
fn the_version_names_commit_and_features() {
    let output = beamline().arg("--version").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("beamline 0.") && text.contains("(commit ") && text.contains("CUDA)"), "{text}");
}

#[test]
fn shells_complete_commands_and_flags() {
    for shell in ["bash", "zsh", "fish"] {
        let output = beamline().args(["completions", shell]).output().unwrap();
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success() && script.contains("weight-format") && script.contains("inspect"),
            "{shell}"
        );
    }
}
