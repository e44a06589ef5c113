//! A server of its own for a measurement: started on a free port, watched, and stopped at the end.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::client::Client;

/// Longest time a checkpoint and its catalog may take to load.
const LOADING: Duration = Duration::from_secs(600);

/// What servers of a run have in common.
#[derive(Clone, Debug)]
pub(super) struct Launch {
    /// The `beamline` program.
    pub(super) binary: PathBuf,
    /// Threads of the forward pass.
    pub(super) threads: usize,
    /// Further arguments of `beamline serve`.
    pub(super) arguments: Vec<String>,
    /// Where logs go.
    pub(super) logs: PathBuf,
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    address: String,
    agent: ureq::Agent,
}

impl Launch {
    /// Starts a server for a checkpoint and waits until it is ready.
    ///
    /// # Errors
    ///
    /// When it does not start or does not become ready; its log says why.
    pub(super) fn start(&self, checkpoint: &Path, more: &[&str]) -> Result<Server> {
        std::fs::create_dir_all(&self.logs)?;
        let log = self.logs.join("server.log");
        let mut command = Command::new(&self.binary);
        command
            .args(["serve", "--listen", "127.0.0.1:0", "--log", "warn", "--checkpoint"])
            .arg(checkpoint)
            .args(["--threads", &self.threads.to_string()])
            .args(more)
            .args(&self.arguments)
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?);
        eprintln!("$ {command:?}");
        let mut child = command.spawn().with_context(|| format!("cannot start {}", self.binary.display()))?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let Some(address) = line.trim().strip_prefix("listening on ").map(str::to_owned) else {
            let _ = child.kill();
            let _ = child.wait();
            bail!("the server did not start: {}", std::fs::read_to_string(&log).unwrap_or_default());
        };
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        let mut server = Server { child, address, agent: ureq::Agent::new_with_config(config) };
        let started = Instant::now();
        while !server.is_ready() {
            if server.child.try_wait()?.is_some() || started.elapsed() > LOADING {
                bail!(
                    "the server did not become ready: {}",
                    std::fs::read_to_string(&log).unwrap_or_default()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }
}

impl Server {
    /// A new connection to it.
    pub(super) fn client(&self) -> Client {
        Client::new(&self.address)
    }

    /// Ends it at once, with signal 9.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub(super) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn is_ready(&self) -> bool {
        self.agent.get(format!("{}/readyz", self.address)).call().is_ok_and(|answer| answer.status() == 200)
    }

    /// The sum of all samples of a metric whose name and labels begin with `prefix`.
    ///
    /// # Errors
    ///
    /// When the metrics cannot be read.
    pub(super) fn metric(&self, prefix: &str) -> Result<f64> {
        let text = self.agent.get(format!("{}/metrics", self.address)).call()?.body_mut().read_to_string()?;
        let lines = text.lines().filter(|line| line.starts_with(prefix));
        Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    ///
    /// Where the system does not say.
    pub(super) fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS")).context("no VmRSS")?;
        let kib: u64 = line.split_whitespace().nth(1).context("no VmRSS")?.parse()?;
        Ok(kib * 1024)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        let patience = Instant::now();
        while patience.elapsed() < Duration::from_secs(10) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
