//! Batches: interrupted and gone on with, TREC runs, Parquet.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Instant;

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::{Value, json};

use crate::harness::{PATIENCE, Random, beamline, fixture, history, items};

const CASE: &str = "qwen3-untied";

/// A directory with an input.
struct Job {
    directory: tempfile::TempDir,
}

impl Job {
    fn new(input: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("in.jsonl"), input).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn command(&self, input: &str, output: &str, flags: &[&str]) -> Command {
        let mut command = beamline();
        command
            .current_dir(self.directory.path())
            .args(["batch", "--kv-memory", "32MiB", "--threads", "1", "--checkpoint"])
            .arg(fs::canonicalize(fixture(CASE)).unwrap())
            .args([input, output])
            .args(flags);
        command
    }

    fn run(&self, input: &str, output: &str, flags: &[&str]) -> Output {
        self.command(input, output, flags).output().unwrap()
    }

    /// Answers all of an input, over whatever was there.
    #[track_caller]
    fn complete(&self, input: &str, output: &str, flags: &[&str]) -> String {
        let flags =
            if self.path(output).exists() { [flags, &["--restart"]].concat() } else { flags.to_vec() };
        let done = self.run(input, output, &flags);
        assert!(done.status.success(), "{}", stderr(&done));
        self.read(output)
    }

    /// Starts a run and ends it by a signal when it has got `lines` further. Returns whether it was
    /// still running.
    fn interrupt(&self, output: &str, flags: &[&str], lines: u64, signal: &str) -> bool {
        let flags = [flags, &["--checkpoint-ms", "0", "--in-flight", "4"]].concat();
        let before = self.line(output);
        let mut child = self.command("in.jsonl", output, &flags).stderr(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        while self.line(output) < before + lines {
            if child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(start.elapsed() < PATIENCE, "the batch does not get on");
        }
        end(&mut child, signal)
    }

    /// How far the manifest says a run is.
    fn line(&self, output: &str) -> u64 {
        let manifest = fs::read_to_string(self.path(&format!("{output}.partial.json")));
        let manifest = manifest.ok().and_then(|text| serde_json::from_str::<Value>(&text).ok());
        manifest.map_or(0, |manifest| manifest["progress"]["line"].as_u64().unwrap())
    }
}

fn end(child: &mut Child, signal: &str) -> bool {
    let running = child.try_wait().unwrap().is_none();
    let pid = child.id().to_string();
    let _ = Command::new("kill").args([&format!("-{signal}"), &pid]).stderr(Stdio::null()).status();
    let code = child.wait().unwrap().code();
    let expected = match signal {
        "TERM" => Some(143),
        "INT" => Some(130),
        _ => None,
    };
    // It may have come to its end in between.
    assert!(code == expected || code == Some(0), "{code:?}");
    running && code == expected
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Requests of all kinds, wrong ones and blank lines among them.
fn requests(count: usize) -> String {
    let catalog = items(CASE);
    let mut random = Random(11);
    let line = |index: usize| {
        let past: Vec<String> = (0..random.below(40)).map(|_| random.pick(&catalog).clone()).collect();
        match index % 50 {
            17 => "{broken".to_owned(),
            23 => String::new(),
            31 => json!({"id": format!("q{index}"), "history": [], "beams": 3}).to_string(),
            40 => json!({"user_id": format!("u{index}"), "history": history(&past)}).to_string(),
            _ => json!({"id": format!("q{index}"), "history": history(&past), "beam_width": 60}).to_string(),
        }
    };
    (0..count).map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn an_interrupted_batch_ends_with_the_bytes_of_an_uninterrupted_one() {
    let job = Job::new(&requests(400));
    let expected = job.complete("in.jsonl", "whole.jsonl", &["--trec", "whole.trec"]);
    let (flags, mut random) = (["--trec", "out.trec"], Random(3));
    let mut interrupted = 0;
    for round in 0.. {
        let signal = ["KILL", "TERM", "KILL", "INT"][round % 4];
        if !job.interrupt("out.jsonl", &flags, random.below(60) as u64, signal) {
            break;
        }
        assert!(!job.path("out.jsonl").exists() && !job.path("out.trec").exists());
        interrupted += 1;
    }
    assert!(interrupted >= 5, "only {interrupted} interruptions");
    if !job.path("out.jsonl").exists() {
        job.complete("in.jsonl", "out.jsonl", &flags);
    }
    assert!(job.read("out.jsonl") == expected, "the answers differ");
    assert!(job.read("out.trec") == job.read("whole.trec"), "the TREC runs differ");
    assert_eq!(fs::read_dir(job.directory.path()).unwrap().count(), 5, "nothing is left over");
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let job = Job::new(&requests(300));
    let expected = job.complete("in.jsonl", "whole.jsonl", &[]);
    assert!(job.interrupt("out.jsonl", &[], 20, "KILL"));
    let refused = |input: &str, flags: &[&str], parts: &[&str]| {
        let output = job.run(input, "out.jsonl", flags);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(parts.iter().all(|part| text.contains(part)), "{parts:?} are not in {text}");
    };
    refused(
        "in.jsonl",
        &["--default-beam-width", "20"],
        &["default-beam-width: 50 then, 20 now", "--restart"],
    );
    refused("in.jsonl", &["--trec", "out.trec"], &["trec: null then, \"out.trec\" now"]);
    refused("in.jsonl", &["--history-cut", "exact"], &["history-cut: \"coarse\" then, \"exact\" now"]);
    let smaller: Vec<String> = fs::read_to_string(fixture(CASE).join("catalog.jsonl"))
        .unwrap()
        .lines()
        .skip(1)
        .map(str::to_owned)
        .collect();
    fs::write(job.path("catalog.jsonl"), smaller.join("\n")).unwrap();
    refused("in.jsonl", &["--catalog", "catalog.jsonl"], &["catalog version: \""]);
    fs::write(job.path("other.jsonl"), requests(300).replacen("q3", "r3", 1)).unwrap();
    refused("other.jsonl", &[], &["lines of the input have changed"]);
    fs::write(job.path("short.jsonl"), requests(5)).unwrap();
    refused("short.jsonl", &[], &["the input ends after 5 lines"]);

    // None of this has touched what was done.
    assert!(job.line("out.jsonl") >= 20);
    let done = job.run("in.jsonl", "out.jsonl", &[]);
    assert!(stderr(&done).contains("going on after line"), "{}", stderr(&done));
    assert!(job.read("out.jsonl") == expected);

    fs::remove_file(job.path("out.jsonl")).unwrap();
    assert!(job.interrupt("out.jsonl", &[], 20, "TERM"));
    let anew = job.run("in.jsonl", "out.jsonl", &["--restart", "--default-beam-width", "20"]);
    assert!(anew.status.success() && !stderr(&anew).contains("going on"), "{}", stderr(&anew));
    refused("in.jsonl", &[], &["out.jsonl exists already", "--restart"]);
    fs::remove_file(job.path("out.jsonl")).unwrap();
    fs::write(job.path("out.jsonl.partial"), "mine").unwrap();
    refused("in.jsonl", &[], &["out.jsonl.partial exists"]);
}

#[test]
fn a_run_that_was_no_use_fails() {
    let job = Job::new("{\"history\": []}\n{broken\n{broken\n");
    let code = |output: &str, flags: &[&str]| job.run("in.jsonl", output, flags).status.code();
    assert_eq!(code("a.jsonl", &[]), Some(0));
    assert_eq!(code("b.jsonl", &["--max-errors", "2"]), Some(0));
    assert_eq!(code("c.jsonl", &["--max-errors", "1"]), Some(3));
    assert_eq!(job.read("c.jsonl"), job.read("a.jsonl"), "the output is complete all the same");
    fs::write(job.path("in.jsonl"), "{broken\n").unwrap();
    let none = job.run("in.jsonl", "d.jsonl", &[]);
    assert_eq!(none.status.code(), Some(1));
    assert!(stderr(&none).contains("no request was answered"), "{}", stderr(&none));

    // An output of another input is not written over, nor is a run.
    let refused = job.run("in.jsonl", "a.jsonl", &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("a.jsonl exists already"), "{}", stderr(&refused));
    fs::write(job.path("old.trec"), "mine").unwrap();
    assert_eq!(code("e.jsonl", &["--trec", "old.trec"]), Some(1));
    assert_eq!(job.read("old.trec"), "mine");
}

#[test]
fn a_full_stderr_costs_no_answer_and_no_exit_code() {
    let job = Job::new("{\"history\": []}\n{broken\n");
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let code = |output: &str, flags: &[&str]| {
        job.command("in.jsonl", output, flags).stderr(full()).status().unwrap().code()
    };
    assert_eq!(code("a.jsonl", &[]), Some(0));
    assert_eq!(job.read("a.jsonl").lines().count(), 2);
    assert_eq!(code("b.jsonl", &["--max-errors", "0"]), Some(3));
}

#[test]
fn a_trec_run_keeps_the_order_of_the_slate() {
    let job = Job::new(
        "{\"id\": \"q\", \"history\": [], \"num_items\": 4}\n{\"user_id\": \"u\", \"history\": [], \"num_items\": 2}\n\n{\"history\": []}\n",
    );
    let rows = |text: &str| -> Vec<Vec<String>> {
        text.lines().map(|row| row.split(' ').map(str::to_owned).collect()).collect()
    };
    let answers = job.complete("in.jsonl", "out.jsonl", &["--trec", "rank.trec", "--trec-tag", "mine"]);
    job.complete("in.jsonl", "out.jsonl", &["--trec", "real.trec", "--trec-scores", "log-probability"]);
    let answers: Vec<Value> = answers.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (rank, real) = (rows(&job.read("rank.trec")), rows(&job.read("real.trec")));
    assert_eq!((rank.len(), real.len()), (16, 16));
    let slates = [("q", 4, 0), ("u", 2, 1), ("4", 10, 2)];
    let expected = slates.iter().flat_map(|(qid, count, line)| {
        (0..*count).map(|place| (*qid, *count, &answers[*line]["items"][place], place))
    });
    for ((qid, count, item, place), (rank, real)) in expected.zip(rank.iter().zip(&real)) {
        let (id, place_text) = (item["item_id"].as_str().unwrap(), (place + 1).to_string());
        assert_eq!(rank[..], [qid, "Q0", id, &place_text, &(count - place).to_string(), "mine"]);
        assert_eq!((&real[2][..], &real[5][..]), (id, "beamline"));
        assert_eq!(real[4].parse::<f64>().unwrap().to_bits(), item["score"].as_f64().unwrap().to_bits());
    }
    fs::write(job.path("in.jsonl"), "{\"history\": []}\n{\"id\": \"a b\", \"history\": []}").unwrap();
    let refused = job.run("in.jsonl", "bad.jsonl", &["--trec", "bad.trec"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("line 2: \"a b\" cannot be the qid"), "{}", stderr(&refused));
    let tag = job.run("in.jsonl", "bad.jsonl", &["--trec", "bad.trec", "--trec-tag", "a b"]);
    assert_eq!(tag.status.code(), Some(2));
}

/// A user, history and number of items, any of which may be missing.
type Row = (Option<&'static str>, Vec<(String, i64)>, Option<i64>);

/// Writes rows as Arrow and pandas lay them out; histories as structs or as plain item ids.
fn write_parquet(path: &Path, rows: &[Row], structs: bool, extra: bool) {
    let element = match structs {
        true => "OPTIONAL group element { OPTIONAL BYTE_ARRAY item_id (UTF8); OPTIONAL INT64 timestamp; }",
        false => "OPTIONAL BYTE_ARRAY element (UTF8);",
    };
    let extra_column = if extra { "REQUIRED INT64 price;" } else { "" };
    let schema = format!(
        "message rows {{ OPTIONAL BYTE_ARRAY user_id (UTF8); OPTIONAL group history (LIST) {{ REPEATED group list {{ \
         {element} }} }} OPTIONAL INT64 num_items; {extra_column} }}"
    );
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let mut writer =
        SerializedFileWriter::new(fs::File::create(path).unwrap(), schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let bytes = |texts: Vec<&str>| texts.into_iter().map(ByteArray::from).collect::<Vec<_>>();

    let mut column = group.next_column().unwrap().unwrap();
    let users = bytes(rows.iter().filter_map(|row| row.0).collect());
    let defined: Vec<i16> = rows.iter().map(|row| i16::from(row.0.is_some())).collect();
    column.typed::<ByteArrayType>().write_batch(&users, Some(&defined), None).unwrap();
    column.close().unwrap();

    // Definition levels: 1 is an empty list, the highest a value.
    let value = if structs { 4 } else { 3 };
    let (mut defined, mut repeated) = (Vec::new(), Vec::new());
    for (_, actions, _) in rows {
        let levels = if actions.is_empty() { vec![(1, 0)] } else { vec![(value, 1); actions.len()] };
        for (index, (level, repeat)) in levels.into_iter().enumerate() {
            defined.push(level);
            repeated.push(if index == 0 { 0 } else { repeat });
        }
    }
    let actions = || rows.iter().flat_map(|row| &row.1);
    let mut column = group.next_column().unwrap().unwrap();
    let ids = bytes(actions().map(|(id, _)| id.as_str()).collect());
    column.typed::<ByteArrayType>().write_batch(&ids, Some(&defined), Some(&repeated)).unwrap();
    column.close().unwrap();
    if structs {
        let mut column = group.next_column().unwrap().unwrap();
        let times: Vec<i64> = actions().map(|(_, time)| *time).collect();
        column.typed::<Int64Type>().write_batch(&times, Some(&defined), Some(&repeated)).unwrap();
        column.close().unwrap();
    }
    let mut column = group.next_column().unwrap().unwrap();
    let numbers: Vec<i64> = rows.iter().filter_map(|row| row.2).collect();
    let defined: Vec<i16> = rows.iter().map(|row| i16::from(row.2.is_some())).collect();
    column.typed::<Int64Type>().write_batch(&numbers, Some(&defined), None).unwrap();
    column.close().unwrap();
    if extra {
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&vec![1; rows.len()], None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn rows_are_answered_as_lines_are() {
    let catalog = items(CASE);
    let past = |from: usize| (from..from + 6).map(|index| (catalog[index].clone(), index as i64)).collect();
    let rows: Vec<Row> = vec![
        (Some("u1"), past(0), Some(3)),
        (None, past(20), None),
        (Some("u3"), Vec::new(), Some(2)),
        (Some("u4"), past(9), Some(0)),
    ];
    let line = |(user, actions, count): &Row| {
        let ids: Vec<String> = actions.iter().map(|(id, _)| id.clone()).collect();
        json!({"user_id": user, "history": history(&ids), "num_items": count}).to_string()
    };
    let job = Job::new(&rows.iter().map(line).collect::<Vec<_>>().join("\n"));
    write_parquet(&job.path("structs.parquet"), &rows, true, false);
    write_parquet(&job.path("ids.parquet"), &rows, false, false);
    write_parquet(&job.path("extra.parquet"), &rows, true, true);
    let expected = job.complete("in.jsonl", "lines.out", &["--trec", "lines.trec"]);
    assert_eq!(expected.lines().count(), 4);
    for input in ["structs.parquet", "ids.parquet"] {
        assert_eq!(job.complete(input, "rows.out", &["--trec", "rows.trec"]), expected, "{input}");
        assert_eq!(job.read("rows.trec"), job.read("lines.trec"));
    }
    let refused = job.run("extra.parquet", "extra.out", &[]);
    assert!(!refused.status.success());
    assert!(stderr(&refused).contains("columns \"price\""), "{}", stderr(&refused));
    assert_eq!(job.complete("extra.parquet", "rows.out", &["--ignore-unknown-columns"]), expected);
    fs::write(job.path("broken.parquet"), "PAR1 no").unwrap();
    assert_eq!(job.run("broken.parquet", "broken.out", &[]).status.code(), Some(1));
}
