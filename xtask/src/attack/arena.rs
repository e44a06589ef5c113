//! What attacks are given: servers on ports of the system, a folder that is deleted afterwards, and time.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::server::Server;
use crate::root;

/// Where attacks take place.
pub(super) struct Arena {
    binary: PathBuf,
    /// The checkpoint that servers serve.
    pub(super) checkpoint: PathBuf,
    /// How long an attack lasts that could go on.
    pub(super) time: Duration,
    folder: TempDir,
}

impl Arena {
    /// An arena for a program, or the one that is built from this workspace.
    ///
    /// # Errors
    ///
    /// When it cannot be built.
    pub(super) fn new(binary: Option<PathBuf>, checkpoint: &Path, time: Duration) -> Result<Self> {
        let binary = match binary {
            Some(binary) => binary,
            None => {
                crate::build(&["--bin", "beamline"])?;
                root().join("target/release/beamline")
            }
        };
        let checkpoint = root().join(checkpoint);
        let checkpoint = checkpoint
            .canonicalize()
            .with_context(|| format!("there is no checkpoint at {}", checkpoint.display()))?;
        Ok(Self { binary, checkpoint, time, folder: tempfile::tempdir()? })
    }

    /// A server of the checkpoint, ready. Its log is not looked at.
    pub(super) fn serve(&self, flags: &[&str]) -> Result<Server> {
        self.serve_logging_to(flags, Stdio::null())
    }

    /// As [`Arena::serve`], with a log that goes elsewhere.
    pub(super) fn serve_logging_to(&self, flags: &[&str], stderr: Stdio) -> Result<Server> {
        let mut command = Command::new(&self.binary);
        command.stderr(stderr);
        self.start(command, flags)
    }

    /// As [`Arena::serve`], with a limit of open files.
    pub(super) fn serve_with_open_files(&self, files: u32) -> Result<Server> {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -n {files} && exec \"$0\" \"$@\"")]).arg(&self.binary);
        command.stderr(Stdio::null());
        self.start(command, &[])
    }

    fn start(&self, mut command: Command, flags: &[&str]) -> Result<Server> {
        command.args(["serve", "--listen", "127.0.0.1:0", "--checkpoint"]).arg(&self.checkpoint).args(flags);
        Server::start(command)
    }

    /// Whether `beamline serve` has a flag: some attacks need one that not every build has.
    pub(super) fn has_flag(&self, flag: &str) -> Result<bool> {
        let help = Command::new(&self.binary).args(["serve", "--help"]).output()?;
        Ok(String::from_utf8_lossy(&help.stdout).contains(flag))
    }

    /// An empty folder.
    pub(super) fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.path().join(name);
        std::fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// A model root with a copy of the checkpoint in `victim/NAME`.
    pub(super) fn root_with_copy(&self, name: &str) -> Result<(PathBuf, PathBuf)> {
        let root = self.folder(name)?;
        let copy = root.join("victim").join(name);
        std::fs::create_dir_all(&copy)?;
        for entry in std::fs::read_dir(&self.checkpoint)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                std::fs::copy(entry.path(), copy.join(entry.file_name()))?;
            }
        }
        Ok((root, copy))
    }
}
