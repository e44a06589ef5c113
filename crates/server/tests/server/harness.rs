//! Starts servers, talks to them, stops them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/hf").join(name)
}

pub(crate) fn beamline() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_beamline"));
    // The settings of the person who runs the tests must not matter.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("BEAMLINE_")) {
        command.env_remove(name);
    }
    command
}

/// A running server; killed when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
    agent: ureq::Agent,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: ureq::http::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }

    #[track_caller]
    pub(crate) fn fails(&self, status: u16, kind: &str) -> Value {
        assert_eq!(self.status, status, "{}", self.text);
        let body = self.json();
        assert_eq!(body["error"]["type"], kind, "{}", self.text);
        assert!(body["error"]["message"].as_str().is_some_and(|message| !message.is_empty()));
        body["error"].clone()
    }
}

impl Server {
    pub(crate) fn start(checkpoint: &str, flags: &[&str]) -> Self {
        Self::start_at(&fixture(checkpoint), flags)
    }

    pub(crate) fn start_at(checkpoint: &Path, flags: &[&str]) -> Self {
        Self::start_with(checkpoint, flags, &[])
    }

    pub(crate) fn start_with(checkpoint: &Path, flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let checkpoint = checkpoint.to_str().unwrap();
        let server = Self::spawn_with(&[&["--checkpoint", checkpoint], flags].concat(), environment);
        server.wait_for("readiness", |server| server.get("/readyz").status == 200);
        server
    }

    /// A server that listens, and may not be ready.
    pub(crate) fn spawn(flags: &[&str]) -> Self {
        Self::spawn_with(flags, &[])
    }

    pub(crate) fn spawn_with(flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = beamline();
        command.envs(environment.iter().copied());
        Self::spawn_as(command, flags)
    }

    /// A server whose log goes elsewhere; what the test keeps of it is in the child.
    pub(crate) fn start_logging_to(checkpoint: &str, flags: &[&str], stderr: Stdio) -> Self {
        let mut command = beamline();
        command.stderr(stderr);
        let checkpoint = fixture(checkpoint);
        let flags = [&["--checkpoint", checkpoint.to_str().unwrap()], flags].concat();
        let server = Self::spawn_as(command, &flags);
        server.wait_for("readiness", |server| server.get("/readyz").status == 200);
        server
    }

    /// A server that may open this number of files.
    pub(crate) fn start_with_open_files(checkpoint: &str, files: usize, flags: &[&str]) -> Self {
        Self::start_limited(checkpoint, &format!("ulimit -n {files}"), flags, Stdio::null())
    }

    /// A server for which a shell has set limits.
    pub(crate) fn start_limited(checkpoint: &str, limits: &str, flags: &[&str], stderr: Stdio) -> Self {
        let own = beamline();
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{limits} && exec \"$0\" \"$@\"")]).arg(own.get_program());
        command.stderr(stderr);
        let checkpoint = fixture(checkpoint);
        let flags = [&["--checkpoint", checkpoint.to_str().unwrap()], flags].concat();
        let server = Self::spawn_as(command, &flags);
        server.wait_for("readiness", |server| server.get("/readyz").status == 200);
        server
    }

    /// The log, if it is a pipe.
    pub(crate) fn take_stderr(&mut self) -> std::process::ChildStderr {
        self.child.stderr.take().unwrap()
    }

    fn spawn_as(mut command: Command, flags: &[&str]) -> Self {
        let unless = |flag: &str, default: &'static str| {
            if flags.contains(&flag) { vec![] } else { vec![flag.to_owned(), default.to_owned()] }
        };
        let mut child = command
            .arg("serve")
            .args(unless("--log", "error"))
            .args(unless("--listen", "127.0.0.1:0"))
            .args(unless("--kv-memory", "32MiB"))
            .args(flags)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").unwrap().parse().unwrap();
        let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE));
        Self { child, address, agent: config.build().into() }
    }

    /// Sends a body, or none, by any method.
    pub(crate) fn call(
        &self,
        method: &str,
        path: &str,
        body: Option<&str>,
        headers: &[(&str, &str)],
    ) -> Answer {
        let mut request = ureq::http::Request::builder().method(method).uri(self.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        match body {
            Some(body) => answer(self.agent.run(request.body(body.to_owned()).unwrap())),
            None => answer(self.agent.run(request.body(()).unwrap())),
        }
    }

    pub(crate) fn put(&self, path: &str, body: &Value) -> Answer {
        self.call("PUT", path, Some(&body.to_string()), &[("content-type", "application/json")])
    }

    /// Resident memory in bytes.
    pub(crate) fn resident(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() << 10
    }

    /// The number of a thread, by its name.
    #[cfg(target_os = "linux")]
    pub(crate) fn thread(&self, name: &str) -> i32 {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let named =
            |path: &Path| std::fs::read_to_string(path.join("comm")).is_ok_and(|is| is.trim() == name);
        let found = threads.map(|thread| thread.unwrap().path()).find(|path| named(path));
        let found = found.unwrap_or_else(|| panic!("there is no thread {name}"));
        found.file_name().unwrap().to_str().unwrap().parse().unwrap()
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        answer(self.agent.get(self.url(path)).call())
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_text(path, &body.to_string(), "application/json", &[])
    }

    pub(crate) fn post_text(&self, path: &str, body: &str, media: &str, headers: &[(&str, &str)]) -> Answer {
        let mut request = self.agent.post(self.url(path)).header("content-type", media);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        answer(request.send(body))
    }

    pub(crate) fn recommend(&self, body: &Value) -> Answer {
        self.post("/v1/recommend", body)
    }

    /// Sends a request and keeps the connection, without waiting for the answer.
    pub(crate) fn send_raw(&self, head: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).unwrap();
        stream
    }

    /// Sends a request to a server that may end at any moment, and reads the answer to its end if one comes.
    pub(crate) fn try_raw(&self, head: &str, body: &str) -> Option<String> {
        let mut stream = TcpStream::connect(self.address).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    }

    pub(crate) fn send_recommend(&self, body: &Value) -> TcpStream {
        let body = body.to_string();
        let head = format!(
            "POST /v1/recommend HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {}",
            body.len()
        );
        self.send_raw(&head, &body)
    }

    /// The sum of the samples of a metric whose labels hold a text.
    pub(crate) fn metric(&self, name: &str, label: &str) -> f64 {
        let text = self.get("/metrics").text;
        let samples = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(label)
        });
        samples.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    pub(crate) fn wait_for(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        self.wait_at_most(PATIENCE, what, condition);
    }

    pub(crate) fn wait_at_most(&self, patience: Duration, what: &str, condition: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            assert!(start.elapsed() < patience, "waited too long for {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn still_serves(&self) {
        self.recommend(&json!({"history": [], "num_items": 3})).ok();
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the server does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn answer(result: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Answer {
    let mut response = result.unwrap();
    let text = response.body_mut().with_config().limit(64 << 20).read_to_string().unwrap();
    Answer { status: response.status().as_u16(), headers: response.headers().clone(), text }
}

/// Reads a raw answer to its end.
pub(crate) fn read_raw(mut stream: TcpStream) -> String {
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    text
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Item ids of a fixture's catalog.
pub(crate) fn items(name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(fixture(name).join("catalog.jsonl")).unwrap();
    let id =
        |line: &str| serde_json::from_str::<Value>(line).unwrap()["item_id"].as_str().unwrap().to_owned();
    text.lines().map(id).collect()
}

pub(crate) fn history(ids: &[String]) -> Value {
    ids.iter().map(|id| json!({"item_id": id})).collect()
}

pub(crate) fn ids(answer: &Value) -> Vec<String> {
    answer["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["item_id"].as_str().unwrap().to_owned())
        .collect()
}

/// Numbers that look random and are the same in every run (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}
