//! Subcommands that answer once.

use std::io::{BufRead, BufReader, Write};
use std::process::{Output, Stdio};

use serde_json::{Value, json};

use crate::harness::{Random, Server, beamline, fixture, history, items};

const CASE: &str = "qwen3-untied";

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn batch(input: &str, flags: &[&str]) -> Output {
    let mut child = beamline()
        .args(["batch", "--kv-memory", "32MiB", "--checkpoint"])
        .arg(fixture(CASE))
        .args(flags)
        .args(["-", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    output
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_binary_without_cuda_says_so() {
    let asked = ["recommend", "--device", "cuda", "--history", "a", "--checkpoint"];
    let output = beamline().args(asked).arg(fixture(CASE)).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("device cuda:0: this binary was built without CUDA"), "{error}");
}

#[test]
fn a_batch_is_answered_in_order_and_the_same_every_time() {
    let catalog = items(CASE);
    let mut random = Random(7);
    let mut input = String::new();
    for index in 0..300 {
        let past: Vec<String> = (0..random.below(60)).map(|_| random.pick(&catalog).clone()).collect();
        let line = match index {
            40 => "{broken".to_owned(),
            50 => String::new(),
            60 => json!({"id": 60, "history": [{"item_id": "x"}]}).to_string(),
            70 => json!({"id": [70], "history": [], "beams": 3}).to_string(),
            _ => json!({"id": format!("r{index}"), "history": history(&past), "num_items": 5}).to_string(),
        };
        input.push_str(&line);
        input.push('\n');
    }
    let first = batch(&input, &[]);
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    assert!(String::from_utf8_lossy(&first.stderr).contains("296 answered, 3 errors"));
    let lines: Vec<Value> = stdout(&first).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers: Vec<u64> = lines.iter().map(|line| line["line"].as_u64().unwrap()).collect();
    let expected: Vec<u64> = (1..=300).filter(|number| *number != 51).collect();
    assert_eq!(numbers, expected);
    assert_eq!(lines[40]["error"]["type"], "invalid_json");
    assert_eq!((&lines[59]["id"], &lines[59]["error"]["type"]), (&json!(60), &json!("no_known_items")));
    assert_eq!((&lines[69]["id"], &lines[69]["error"]["param"]), (&json!([70]), &json!("beams")));
    assert_eq!((&lines[0]["id"], &lines[0]["items_returned"]), (&json!("r0"), &json!(5)));
    assert!(lines[0].get("timings_ms").is_none() && lines[0].get("request_id").is_none());

    let second = batch(&input, &["--in-flight", "3", "--threads", "1"]);
    assert_eq!(stdout(&first), stdout(&second), "output depends on more than the input");
    let timed = batch("{\"history\": []}\n", &["--timings"]);
    let line: Value = serde_json::from_str(stdout(&timed).trim()).unwrap();
    assert!(line["timings_ms"]["total"].as_f64().unwrap() > 0.0 && line["usage"]["cached_tokens"] == 0);
}

#[test]
fn a_batch_answers_as_the_server_does() {
    let server = Server::start(CASE, &[]);
    let request = json!({"history": history(&items(CASE)[..9]), "num_items": 7});
    let answer = server.recommend(&request).ok();
    let line: Value = serde_json::from_str(stdout(&batch(&request.to_string(), &[])).trim()).unwrap();
    assert_eq!(line["items"].to_string(), answer["items"].to_string());
}

#[test]
fn a_batch_between_files_appears_when_it_is_complete() {
    let directory = tempfile::tempdir().unwrap();
    let (input, output) = (directory.path().join("in.jsonl"), directory.path().join("out.jsonl"));
    std::fs::write(&input, "{\"history\": []}\n{\"history\": [], \"num_items\": 2}").unwrap();
    std::fs::write(&output, "old").unwrap();
    let run = |flags: &[&str]| {
        let files = [&input, &output];
        beamline()
            .args(["batch", "--checkpoint"])
            .arg(fixture(CASE))
            .args(flags)
            .args(files)
            .output()
            .unwrap()
    };
    let failed = run(&["--catalog", "/nowhere.jsonl"]);
    assert_eq!(failed.status.code(), Some(1));
    assert_eq!(std::fs::read_to_string(&output).unwrap(), "old");
    let refused = run(&[]);
    assert_eq!(refused.status.code(), Some(1), "an output is not written over unasked");
    assert_eq!(std::fs::read_to_string(&output).unwrap(), "old");
    assert!(run(&["--restart"]).status.success());
    assert_eq!(std::fs::read_to_string(&output).unwrap().lines().count(), 2);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2, "nothing is left over");
}

#[test]
fn recommend_prints_a_table_or_json() {
    let catalog = items(CASE);
    let past = format!("{},{},stranger", catalog[0], catalog[1]);
    let run = |flags: &[&str]| {
        beamline().args(["recommend", "--checkpoint"]).arg(fixture(CASE)).args(flags).output().unwrap()
    };
    let table = run(&["--history", &past, "-n", "3"]);
    let text = stdout(&table);
    assert!(table.status.success(), "{}", String::from_utf8_lossy(&table.stderr));
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines[0].starts_with("rank") && lines[0].contains("score") && lines[0].contains("item"),
        "{text}"
    );
    assert!(lines[1].trim_start().starts_with("1  -") && lines[3].trim_start().starts_with("3  -"), "{text}");
    assert!(text.contains("skipped: stranger"));

    let json = run(&["--history", &past, "-n", "3", "--json", "--sid-prefix", "4", "--exclude-seen"]);
    let answer: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(answer["items"].as_array().unwrap().iter().all(|item| item["sid"][0] == 4));

    let json = run(&["--history", &past, "-n", "3", "--json", "--beam-widths", "5,9,3"]);
    let answer: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(
        (&answer["usage"]["beam_width"], &answer["items_returned"]),
        (&Value::from(9), &Value::from(3))
    );
    let both = run(&["--history", &past, "--beam-widths", "5,9,10", "--beam-width", "9"]);
    assert_eq!(both.status.code(), Some(2), "one width or several");

    let error = run(&["--history", "stranger"]);
    assert_eq!(error.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&error.stderr).contains("no_known_items"));
    assert_eq!(run(&[]).status.code(), Some(2), "a history is required");
}

#[test]
fn inspect_notes_a_catalog_in_another_form_than_declared() {
    let note = |form: &str| {
        let directory = crate::loading::copy(CASE);
        crate::loading::edit_json(directory.path().join("convention.json"), |convention| {
            convention["catalog_sid_form"] = form.into();
        });
        let output = beamline().args(["inspect", "--quick"]).arg(directory.path()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}");
        text.contains("convention.json: catalog_sid_form: it says")
    };
    assert!(note("tokens") && !note("codes"));
}

#[test]
fn inspect_shows_what_is_there_and_lists_all_problems() {
    let good = beamline().arg("inspect").arg(fixture("qwen3-tied-bf16-sharded")).output().unwrap();
    let text = stdout(&good);
    assert!(good.status.success(), "{text}");
    for part in ["Qwen3ForCausalLM", "BF16", "tied output matrix", "sha256", "140 items", "no problems found"]
    {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let broken = crate::loading::copy(CASE);
    std::fs::remove_file(broken.path().join("tokenizer.json")).unwrap();
    let config = std::fs::read_to_string(broken.path().join("config.json")).unwrap();
    let config = config.replace("\"intermediate_size\": 96", "\"intermediate_size\": 64");
    std::fs::write(broken.path().join("config.json"), config).unwrap();
    let output = beamline().arg("inspect").arg(broken.path()).output().unwrap();
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(1));
    // Three matrices in each of two layers, and the tokenizer.
    assert!(
        text.contains("7 problems") && text.contains("tokenizer.json") && text.contains("down_proj"),
        "{text}"
    );
}

#[test]
fn catalog_check_reports_or_names_the_lines() {
    let good = fixture("qwen3-collisions").join("catalog.jsonl");
    let run =
        |flags: &[&std::ffi::OsStr]| beamline().args(["catalog", "check"]).args(flags).output().unwrap();
    let checkpoint = fixture("qwen3-collisions");
    for flags in
        [vec![good.as_os_str()], vec![good.as_os_str(), "--checkpoint".as_ref(), checkpoint.as_os_str()]]
    {
        let output = run(&flags);
        let text = stdout(&output);
        assert!(output.status.success() && text.contains("150 items on 90 SIDs"), "{text}");
    }
    let json: Value = serde_json::from_slice(&run(&[good.as_os_str(), "--json".as_ref()]).stdout).unwrap();
    assert_eq!(json["items"], 150);

    let directory = tempfile::tempdir().unwrap();
    let bad = directory.path().join("bad.jsonl");
    let lines = [
        r#"{"item_id": "a", "sid": [1, 2, 3]}"#,
        r#"{"item_id": "a", "sid": [1, 2, 4]}"#,
        r#"{"item_id": "", "sid": [1, 2, 4]}"#,
        r#"{"item_id": "c", "sid": [1, 2]}"#,
        "nonsense",
    ];
    std::fs::write(&bad, lines.join("\n")).unwrap();
    let output = run(&[bad.as_os_str()]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    for line in
        ["4 bad records", "line 2: `item_id` \"a\" is already used by line 1", "line 3", "line 4", "line 5"]
    {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[test]
fn help_is_there_for_every_subcommand() {
    for command in [
        &["--help"][..],
        &["serve", "--help"],
        &["batch", "--help"],
        &["recommend", "--help"],
        &["catalog", "check", "--help"],
    ] {
        let output = beamline().args(command).output().unwrap();
        assert!(output.status.success() && stdout(&output).contains("Usage: beamline"), "{command:?}");
    }
    assert!(
        stdout(&beamline().args(["serve", "--help"]).output().unwrap()).contains("BEAMLINE_MAX_BEAM_WIDTH")
    );
}

#[test]
fn the_demo_prints_a_request_that_works() {
    let mut child = beamline()
        .args(["demo", "--listen", "127.0.0.1:0", "--log", "error", "--kv-memory", "32MiB", "--demo-dir"])
        .arg(fixture(CASE))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let text: Vec<String> = lines.take_while(|line| !line.contains("Run it twice")).collect();
    let curl = text.join("\n");
    let curl = &curl[curl.find("curl").unwrap()..];
    let url = curl.split_whitespace().find(|word| word.starts_with("http://")).unwrap();
    let body = curl.split_once("-d '").unwrap().1.rsplit_once('\'').unwrap().0;
    let ask = || -> Value {
        let mut response = ureq::post(url).header("content-type", "application/json").send(body).unwrap();
        response.body_mut().read_json().unwrap()
    };
    let (first, second) = (ask(), ask());
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(first["items_returned"], 3);
    assert_eq!(first["items"], second["items"]);
    assert!(second["usage"]["cached_tokens"].as_u64().unwrap() > 0, "as the demo says");
}
