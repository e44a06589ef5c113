//! Whether `/livez` distinguishes a long step from an engine that stands still. One model of 300 million
//! parameters has steps that take longer than the limit; another engine has a stopped thread.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use beamline_model::checkpoint::config::Config;
use beamline_model::families::decoder::expected_tensors;
use serde_json::{Value, json};

use crate::harness::{Server, fixture, read_json};
use crate::made;

const CASE: &str = "qwen3-untied";
/// A layer of the large model takes a small part of this, and a step is made to take twice as long.
const LIMIT: Duration = Duration::from_millis(1500);
/// 600 MB are read twice, on a machine that may be busy.
const LOADING: Duration = Duration::from_secs(300);
/// The longest context that is tried; a machine that computes it within the limit has outgrown this test.
const LONGEST: u32 = 16_384;

/// Layers enough that each is a small part of a step.
const LAYERS: usize = 44;

/// A checkpoint of 300 million parameters that share their values, so that it is made quickly.
fn large() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json", "convention.json", "catalog.jsonl"] {
        std::fs::copy(fixture(CASE).join(file), directory.path().join(file)).unwrap();
    }
    let mut config = read_json(&fixture(CASE).join("config.json"));
    for (name, value) in [
        ("hidden_size", json!(768)),
        ("intermediate_size", json!(2304)),
        ("head_dim", json!(64)),
        ("num_attention_heads", json!(12)),
        ("num_key_value_heads", json!(4)),
        ("num_hidden_layers", json!(LAYERS)),
        ("layer_types", json!(vec!["full_attention"; LAYERS])),
        ("max_position_embeddings", json!(2 * LONGEST)),
    ] {
        config[name] = value;
    }
    let shapes = expected_tensors(&Config::parse(&config.to_string()).unwrap());
    let parameters: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
    assert!(parameters > 300_000_000, "{parameters}");
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    write_weights(&directory.path().join("model.safetensors"), &shapes);
    directory
}

/// Writes tensors in bfloat16: matrices of small numbers, and norms of ones.
fn write_weights(path: &Path, shapes: &BTreeMap<String, Vec<usize>>) {
    let upper_half = |x: f32| (x.to_bits() >> 16) as u16;
    let bytes = |values: Vec<f32>| -> Vec<u8> {
        values.into_iter().flat_map(|x| upper_half(x).to_le_bytes()).collect()
    };
    let small = bytes(made::numbers(1 << 18, 1).into_iter().map(|x| x * 0.05).collect());
    let ones = bytes(vec![1.0; 1 << 18]);
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in shapes {
        let begin = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}));
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = BufWriter::new(std::fs::File::create(path).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    for shape in shapes.values() {
        let block = if shape.len() == 1 { &ones } else { &small };
        let mut left = 2 * shape.iter().product::<usize>();
        while left > 0 {
            let part = left.min(block.len());
            file.write_all(&block[..part]).unwrap();
            left -= part;
        }
    }
    file.flush().unwrap();
}

/// Sets a flag when dropped.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Asks `/livez` over and over while `work` works, and fails if it ever says no. Returns how often it
/// was asked.
fn alive_while<T>(server: &Server, work: impl FnOnce() -> T) -> (T, usize) {
    let (over, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let done = thread::scope(|scope| {
        let asking = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let answer = server.get("/livez");
                assert_eq!(answer.status, 200, "after {asked:?} good answers: {}", answer.text);
                asked.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(5));
            }
        });
        // Also when the work fails: the scope waits for those who ask.
        let end = End(&over);
        let done = work();
        drop(end);
        asking.join().unwrap();
        done
    });
    (done, asked.into_inner())
}

#[test]
fn a_large_model_is_alive_during_steps_that_take_longer_than_the_limit() {
    let directory = large();
    let limit = LIMIT.as_millis().to_string();
    let longest = (LONGEST + 64).to_string();
    let flags = [
        &["--liveness-timeout-ms", &limit, "--max-step-tokens", &longest, "--max-context", &longest][..],
        &["--kv-memory", "2GiB", "--weight-format", "q8_0"],
    ];
    let checkpoint = ["--checkpoint", directory.path().to_str().unwrap()];
    let server = Server::spawn(&[&checkpoint[..], &flags.concat()].concat());
    server.wait_at_most(LOADING, "readiness", |server| server.get("/readyz").status == 200);
    // Twice as long until one step takes twice the limit. So the test is independent of the machine's
    // speed, and a layer is a small part of the limit on any.
    let mut tokens = 32;
    loop {
        assert!(tokens <= LONGEST, "no step takes long enough");
        let context: Vec<u32> = (0..tokens).map(|index| (index * 7 + tokens) % 360).collect();
        let body = json!({"token_ids": context, "beam_width": 2, "num_items": 2, "timeout_ms": 60_000});
        let (answer, asked) = alive_while(&server, || server.recommend(&body).ok());
        assert_eq!(answer["usage"]["steps"], 3, "the context is one step, and two expansions follow");
        assert!(asked > 0);
        if answer["timings_ms"]["prefill"].as_f64().unwrap() > 2.0 * LIMIT.as_millis() as f64 {
            break;
        }
        tokens *= 2;
    }
}

#[cfg(target_os = "linux")]
mod stopped {
    use std::time::Duration;

    use nix::errno::Errno;
    use nix::sys::ptrace;
    use nix::sys::wait::{WaitPidFlag, waitpid};
    use nix::unistd::Pid;
    use serde_json::json;

    use super::CASE;
    use crate::harness::{Server, read_raw};

    const LIMIT: Duration = Duration::from_millis(400);

    /// A thread of another process that stands still until this is dropped.
    struct Stopped(Pid);

    impl Stopped {
        /// Stops the engine, as a debugger does: first the thread that computes for it, which would end the
        /// step at hand and beat until then, last its own.
        fn engine(server: &Server) -> Result<[Self; 2], Errno> {
            Ok([Self::thread(server, "beamline-cpu-0")?, Self::thread(server, "beamline-engine")?])
        }

        fn thread(server: &Server, name: &str) -> Result<Self, Errno> {
            let thread = Pid::from_raw(server.thread(name));
            ptrace::seize(thread, ptrace::Options::empty())?;
            ptrace::interrupt(thread)?;
            waitpid(thread, Some(WaitPidFlag::__WALL))?;
            Ok(Self(thread))
        }
    }

    impl Drop for Stopped {
        fn drop(&mut self) {
            let _ = ptrace::detach(self.0, None);
        }
    }

    #[test]
    fn an_engine_that_stands_still_is_dead_within_the_limit() {
        let limit = LIMIT.as_millis().to_string();
        let flags = ["--liveness-timeout-ms", &limit, "--threads", "1", "--max-step-tokens", "64"];
        let server = Server::start(CASE, &flags);
        // Once with nothing to do, and once in the middle of a request.
        for busy in [false, true] {
            assert_eq!(server.get("/livez").status, 200);
            let tokens: Vec<u32> = (0..4000).map(|index| index * 7 % 360).collect();
            let request =
                busy.then(|| server.send_recommend(&json!({"token_ids": tokens, "beam_width": 256})));
            if busy {
                server.wait_for("the request to run", |server| {
                    server.metric("beamline_requests_running", "") > 0.0
                });
            }
            let stopped = match Stopped::engine(&server) {
                Ok(stopped) => stopped,
                Err(error) => {
                    println!("SKIPPED: threads of other processes cannot be stopped here: {error}");
                    return;
                }
            };
            // Its last beat was before it stood still. So the limit has passed, however slow this machine is.
            std::thread::sleep(LIMIT + Duration::from_millis(1));
            server.get("/livez").fails(503, "unhealthy");
            server.get("/readyz").fails(503, "unhealthy");
            drop(stopped);
            server.wait_for("life to come back", |server| server.get("/livez").status == 200);
            server.wait_for("readiness to come back", |server| server.get("/readyz").status == 200);
            if let Some(request) = request {
                let text = read_raw(request);
                assert!(text.starts_with("HTTP/1.1 200"), "{text}");
            }
        }
    }
}
