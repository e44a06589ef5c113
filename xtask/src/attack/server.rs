//! One server: started, asked, signalled, stopped.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Longest time in which a server must be ready.
const STARTING: Duration = Duration::from_secs(60);
/// Longest time of an ordinary request.
const ASKING: Duration = Duration::from_secs(30);

/// A running server. Dropping it kills it.
pub(super) struct Server {
    child: Child,
    pub(super) address: SocketAddr,
    agent: ureq::Agent,
}

/// What a server answered.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) text: String,
}

impl Server {
    /// Starts a server and waits until it is ready.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub(super) fn start(mut command: Command) -> Result<Self> {
        let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start beamline")?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let address = line.trim().strip_prefix("listening on http://").and_then(|text| text.parse().ok());
        let config =
            ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(ASKING)).build();
        let agent = ureq::Agent::new_with_config(config);
        let Some(address) = address else {
            let _ = child.kill();
            let _ = child.wait();
            bail!("the server did not start");
        };
        let server = Self { child, address, agent };
        ensure!(server.address.ip().is_loopback(), "attacks are for loopback addresses");
        ensure!(
            server.within(STARTING, |server| server.get("/readyz").is_ok_and(|answer| answer.status == 200)),
            "the server did not become ready"
        );
        Ok(server)
    }

    /// Asks until `condition` holds, at most for `time`. Says whether it came to hold.
    pub(super) fn within(&self, time: Duration, condition: impl Fn(&Self) -> bool) -> bool {
        let start = Instant::now();
        loop {
            if condition(self) {
                return true;
            }
            if start.elapsed() > time {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(super) fn get(&self, path: &str) -> Result<Answer> {
        read(self.agent.get(self.url(path)).call())
    }

    pub(super) fn post(&self, path: &str, body: &str) -> Result<Answer> {
        read(self.agent.post(self.url(path)).header("content-type", "application/json").send(body))
    }

    pub(super) fn patch(&self, path: &str, body: &str) -> Result<Answer> {
        read(self.agent.patch(self.url(path)).header("content-type", "application/json").send(body))
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// The sum of the samples of a metric whose labels hold a text.
    pub(super) fn metric(&self, name: &str, label: &str) -> Result<f64> {
        let text = self.get("/metrics")?.text;
        let samples = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(label)
        });
        Ok(samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// Resident memory in MiB.
    pub(super) fn resident_mib(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS")).context("no VmRSS")?;
        let kib: u64 = line.split_whitespace().nth(1).context("no VmRSS")?.parse()?;
        Ok(kib >> 10)
    }

    /// Sends a signal by its name, as `kill` does.
    pub(super) fn signal(&self, name: &str) -> Result<()> {
        let pid = self.child.id().to_string();
        ensure!(Command::new("kill").args([&format!("-{name}"), &pid]).status()?.success(), "kill failed");
        Ok(())
    }

    /// The log, if it is a pipe.
    pub(super) fn take_stderr(&mut self) -> Result<ChildStderr> {
        self.child.stderr.take().context("the log is no pipe")
    }

    /// Everything that the log has, after the end of the server.
    pub(super) fn log_to_its_end(&mut self) -> Result<String> {
        let mut text = String::new();
        self.take_stderr()?.read_to_string(&mut text)?;
        Ok(text)
    }

    /// How the process ended, if it did.
    pub(super) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Sends a signal that ends the server, and says how long that took and how it ended.
    pub(super) fn end(&mut self, signal: &str, patience: Duration) -> Result<(Duration, Option<ExitStatus>)> {
        let start = Instant::now();
        self.signal(signal)?;
        while start.elapsed() < patience {
            if let Some(status) = self.ended()? {
                return Ok((start.elapsed(), Some(status)));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok((start.elapsed(), None))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(result: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Answer> {
    let mut response = result?;
    let text = response.body_mut().with_config().limit(64 << 20).read_to_string()?;
    Ok(Answer { status: response.status().as_u16(), text })
}
