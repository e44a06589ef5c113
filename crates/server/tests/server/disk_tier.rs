//! Contexts that outlive the process: users who return after kill -9 find theirs, and only the time
//! changes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::determinism::essence;
use crate::harness::{Random, Server, beamline, fixture, history, items};
use crate::loading::{edit, stderr_of_serve};
use crate::root::Root;

const CASE: &str = "qwen3-untied";
/// Room for one largest request and little else, so that every user displaces the others.
const TINY: [&str; 6] = ["--kv-memory", "1MiB", "--max-context", "1024", "--max-beam-width", "128"];
/// A slow machine must not make a request compute what it could have read.
const PATIENT: [&str; 2] = ["--kv-disk-wait-ms", "20000"];

/// Flags of a server over a directory, and more.
fn flags<'a>(directory: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let disk = ["--kv-disk", directory.to_str().unwrap(), "--kv-disk-size", "64MiB"];
    [&TINY[..], &PATIENT, &disk, more].concat()
}

fn visit(user: usize, past: &[String]) -> Value {
    json!({"user_id": format!("u{user}"), "history": history(past), "num_items": 10, "beam_width": 60})
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["cached_tokens"].as_u64().unwrap()
}

/// Users with histories, and what they are answered without any cache.
struct Users {
    reference: Server,
    histories: Vec<Vec<String>>,
    catalog: Vec<String>,
    random: Random,
    asked: usize,
}

impl Users {
    fn new(seed: u64, users: usize) -> Self {
        let (catalog, mut random) = (items(CASE), Random(seed));
        let mut history = || {
            let len = 40 + random.below(70);
            (0..len).map(|_| random.pick(&catalog).clone()).collect()
        };
        let histories = (0..users).map(|_| history()).collect();
        Self { reference: Server::start(CASE, &TINY[2..]), histories, catalog, random, asked: 0 }
    }

    /// All of them come with a few more items. Returns how many found a part of their context, and all
    /// cached tokens.
    fn come(&mut self, server: &Server) -> (usize, u64) {
        let (mut found, mut tokens) = (0, 0);
        for user in 0..self.histories.len() {
            let more = 1 + self.random.below(3);
            for _ in 0..more {
                let item = self.random.pick(&self.catalog).clone();
                self.histories[user].push(item);
            }
            let request = visit(user, &self.histories[user]);
            let mut cold = request.clone();
            self.asked += 1;
            cold["tenant"] = json!(format!("cold {}", self.asked));
            let expected = self.reference.recommend(&cold).ok();
            assert_eq!(cached(&expected), 0);
            let answer = server.recommend(&request).ok();
            assert_eq!(essence(&answer), essence(&expected), "{request}");
            found += usize::from(cached(&answer) > 0);
            tokens += cached(&answer);
        }
        (found, tokens)
    }
}

fn written(server: &Server) {
    server.wait_for("pages to be written", |server| {
        server.metric("beamline_disk_writes_waiting", "") == 0.0
            && server.metric("beamline_disk_pages", "") > 50.0
    });
}

fn kill(mut server: Server) {
    server.signal("KILL");
    server.wait();
}

/// The files of the only pool.
fn pool(directory: &Path) -> PathBuf {
    let mut pools = pools(directory);
    assert_eq!(pools.len(), 1);
    pools.remove(0)
}

fn pools(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_dir()).collect()
}

#[test]
fn users_who_return_after_kill_9_find_their_contexts_and_the_same_answers() {
    for host_memory in ["512KiB", "0"] {
        let directory = tempfile::tempdir().unwrap();
        let flags = flags(directory.path(), &["--kv-host-memory", host_memory]);
        let mut users = Users::new(31, 12);
        let server = Server::start(CASE, &flags);
        users.come(&server);
        let (found, before) = users.come(&server);
        assert!(found >= 11, "{found} of 12 users found a context before the kill");
        written(&server);
        kill(server);

        let server = Server::start(CASE, &flags);
        let (found, after) = users.come(&server);
        println!("{host_memory}: cached tokens {before} before the kill, {after} after it");
        // The last one may have been on its way.
        assert!(found >= 11, "{found} of 12 users found a context after the kill");
        assert!(2 * after > before, "{after} tokens after the kill, {before} before");
        for metric in ["beamline_disk_hits_total", "beamline_disk_pages", "beamline_disk_working"] {
            server.wait_for(metric, |server| server.metric(metric, "") > 0.0);
        }
        for metric in ["beamline_disk_checksum_failures_total", "beamline_disk_errors_total"] {
            assert_eq!(server.metric(metric, ""), 0.0, "{metric}");
        }
        assert!(
            server.metric("beamline_disk_bytes", "used") <= server.metric("beamline_disk_bytes", "capacity")
        );
        assert_eq!(server.metric("beamline_hash_collisions_total", ""), 0.0);
        written(&server);
        kill(server);

        // Bytes are flipped all over, and the end is cut off.
        let pages = pool(directory.path()).join("pages");
        edit(pages, |bytes| {
            let slots = bytes.len() / 4096;
            for at in (0..slots).step_by(9) {
                bytes[at * 4096 + at % 100] ^= 1 << (at % 8);
            }
            bytes.truncate(bytes.len() - bytes.len() / 8);
        });
        let server = Server::start(CASE, &flags);
        let (_, damaged) = users.come(&server);
        assert!(damaged > 0, "what is intact is used");
        server.wait_for("damage to be found", |server| {
            server.metric("beamline_disk_checksum_failures_total", "") > 0.0
        });
        // What was damaged is written anew.
        let (found, _) = users.come(&server);
        assert!(found >= 11);
        kill(server);
        edit(pool(directory.path()).join("index"), |bytes| bytes.truncate(5000));
        users.come(&Server::start(CASE, &flags));
    }
}

#[test]
fn killed_at_any_moment_it_answers_as_before() {
    let directory = tempfile::tempdir().unwrap();
    let flags = flags(directory.path(), &["--kv-host-memory", "1MiB"]);
    let users = Users::new(32, 6);
    let expected: Vec<String> = (0..6)
        .map(|user| essence(&users.reference.recommend(&visit(user, &users.histories[user])).ok()))
        .collect();
    let mut hits = 0;
    for round in 0..6 {
        let server = Server::start(CASE, &flags);
        for (user, expected) in expected.iter().enumerate() {
            let answer = server.recommend(&visit(user, &users.histories[user])).ok();
            assert_eq!(essence(&answer), *expected, "round {round}, user {user}");
            hits += usize::from(cached(&answer) > 0);
        }
        // Others are under way when it dies.
        std::thread::scope(|scope| {
            for user in 0..4 {
                let (server, past) = (&server, &users.histories[user]);
                scope.spawn(move || {
                    for visits in 1..20 {
                        let body = visit(100 + user, &past[visits..]).to_string();
                        let head = format!(
                            "POST /v1/recommend HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
                             content-type: application/json\r\ncontent-length: {}",
                            body.len()
                        );
                        if server.try_raw(&head, &body).is_none() {
                            return;
                        }
                    }
                });
            }
            std::thread::sleep(std::time::Duration::from_millis(20 + 30 * round));
            server.signal("KILL");
        });
    }
    assert!(hits > 0, "nothing was ever found");
}

#[test]
fn pages_on_disk_belong_to_their_tenant_and_checkpoint() {
    let (root, directory) = (Root::new(), tempfile::tempdir().unwrap());
    let flags = flags(directory.path(), &[]);
    let users = Users::new(33, 6);
    let ask = |server: &Server, tenant: &str, user: usize| {
        let mut request = visit(user, &users.histories[user]);
        request["tenant"] = json!(tenant);
        cached(&server.recommend(&request).ok())
    };
    let server = root.serve(&flags);
    (0..6).for_each(|user| assert_eq!(ask(&server, "a", user), 0));
    written(&server);
    kill(server);
    let server = root.serve(&flags);
    assert!((0..5).all(|user| ask(&server, "b", user) == 0), "another tenant's pages were used");
    assert!((0..5).any(|user| ask(&server, "a", user) > 0));
    // Another version begins with nothing, and leaves nothing.
    let models = server.get("/v1/models").ok();
    let (a, memory) = (models["models"][0]["version"].clone(), &models["models"][0]["memory"]);
    assert!(memory["kv_disk_bytes"].as_u64().unwrap() > 1 << 20, "{memory}");
    server.post("/v1/models/shop/load", &json!({"directory": "b", "label": "stable"})).ok();
    assert_eq!(pools(directory.path()).len(), 2);
    assert!((0..6).all(|user| ask(&server, "a", user) == 0), "another checkpoint's pages were used");
    written(&server);
    server.post("/v1/models/shop/unload", &json!({"version": a})).ok();
    assert_eq!(pools(directory.path()).len(), 1, "an unloaded version takes its pages with it");
    kill(server);
    // A start with the first one finds none of its pages, and deletes those of the other.
    let server = root.serve(&flags);
    assert_eq!(pools(directory.path()).len(), 1);
    assert!((0..6).all(|user| ask(&server, "a", user) == 0));
}

#[test]
fn a_disk_that_is_full_is_left_alone_and_no_request_fails() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let kv = directory.path().join("kv");
    let flags = flags(&kv, &["--kv-host-memory", "1MiB"]);
    // In blocks of 512 bytes or of 1024.
    let limits = "trap '' XFSZ && ulimit -f 400";
    let server = Server::start_limited(CASE, limits, &flags, Stdio::from(File::create(&log).unwrap()));
    let mut users = Users::new(34, 8);
    users.come(&server);
    users.come(&server);
    server.wait_for("the disk to be given up", |server| server.metric("beamline_disk_working", "") == 0.0);
    assert!(server.metric("beamline_disk_errors_total", "") > 0.0);
    assert_eq!(server.metric("beamline_disk_pages", ""), 0.0);
    users.come(&server);
    kill(server);
    let log = std::fs::read_to_string(log).unwrap();
    assert_eq!(log.matches("the disk for KV pages failed").count(), 1, "{log}");
    // What was written before it was full is right.
    users.come(&Server::start(CASE, &flags));
}

#[test]
fn a_directory_that_vanishes_costs_no_request() {
    let directory = tempfile::tempdir().unwrap();
    let kv = directory.path().join("kv");
    let mut users = Users::new(35, 4);
    let server = Server::start(CASE, &flags(&kv, &[]));
    users.come(&server);
    std::fs::remove_dir_all(&kv).unwrap();
    users.come(&server);
    users.come(&server);
}

#[test]
fn directories_and_sizes_that_cannot_work_are_refused_by_name() {
    let (checkpoint, directory) = (fixture(CASE), tempfile::tempdir().unwrap());
    let path = directory.path().to_str().unwrap();
    let refused = |more: &[&str]| stderr_of_serve(&checkpoint, more);
    let half = refused(&["--kv-disk", path]);
    assert!(half.contains("give kv-disk-size"), "{half}");
    let small = refused(&["--kv-disk", path, "--kv-disk-size", "1KiB"]);
    assert!(small.contains("kv-disk-size of 1.0 KiB holds not even one page"), "{small}");
    let large = refused(&["--kv-disk", path, "--kv-disk-size", "1000000TiB"]);
    assert!(large.contains("there is room for"), "{large}");
    let server = Server::start(CASE, &flags(directory.path(), &[]));
    let twice = refused(&flags(directory.path(), &[]));
    assert!(twice.contains("another server uses this directory"), "{twice}");
    drop(server);
    let foreign = tempfile::tempdir().unwrap();
    std::fs::write(foreign.path().join("photos.zip"), "").unwrap();
    let foreign = refused(&flags(foreign.path(), &[]));
    assert!(foreign.contains("photos.zip"), "{foreign}");
}

#[test]
fn inspect_counts_the_memory_of_a_disk_and_leaves_the_disk_alone() {
    let directory = tempfile::tempdir().unwrap();
    let kv = directory.path().join("kv");
    let memory = |flags: &[&str]| {
        let output = beamline().arg("inspect").arg(fixture(CASE)).args(flags).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}");
        text.lines().find(|line| line.starts_with("memory")).unwrap().to_owned()
    };
    let with = ["--kv-memory", "16MiB", "--kv-disk", kv.to_str().unwrap(), "--kv-disk-size", "64MiB"];
    assert_ne!(memory(&with[..2]), memory(&with));
    assert!(!kv.exists());
}
