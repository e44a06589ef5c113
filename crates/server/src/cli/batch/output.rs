//! The answers and the TREC run, under temporary names until both are complete.
//!
//! A checkpoint flushes both files to disk and then records that in the manifest. Resuming cuts
//! both files to the sizes in the manifest. A lock keeps a second process from writing to the same
//! files.

use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use sha2::Sha256;

use super::answer::Answered;
use super::input::hex;
use super::is_dash;
use super::manifest::{Job, Manifest, Progress, sync_directory, with_suffix};

/// The output files of a run.
pub(super) struct Output {
    answers: Sink,
    trec: Option<Partial>,
    progress: Progress,
    /// Digest of the input at `progress.line`, not yet in hexadecimal.
    digest: Option<Sha256>,
    journal: Option<Journal>,
}

enum Sink {
    Stdout(BufWriter<io::Stdout>),
    File(Partial),
}

/// A file that is not complete.
struct Partial {
    from: PathBuf,
    to: PathBuf,
    writer: BufWriter<File>,
}

/// The manifest file, which keeps the progress.
struct Journal {
    path: PathBuf,
    job: Job,
    pause: Duration,
    last: Instant,
}

/// Checks that no finished file stands where one is to be written. A run that was interrupted while
/// it renamed its files has left a manifest, and may go on.
pub(super) fn refuse_to_overwrite<'a>(
    paths: impl IntoIterator<Item = Option<&'a Path>>,
) -> anyhow::Result<()> {
    let paths: Vec<&Path> = paths.into_iter().flatten().filter(|path| !is_dash(path)).collect();
    let Some(output) = paths.first() else { return Ok(()) };
    if with_suffix(output, ".partial.json").exists() {
        return Ok(());
    }
    for path in paths {
        ensure!(
            // A pipe or a device keeps nothing that could be lost.
            !path.is_file(),
            "{} exists already. Remove it, choose another name, or give --restart to write over it",
            path.display()
        );
    }
    Ok(())
}

impl Output {
    /// Opens the files where the last run left them, or empty ones.
    pub(super) fn open(
        path: &Path,
        trec: Option<&Path>,
        job: Job,
        restart: bool,
        pause: Duration,
    ) -> anyhow::Result<Self> {
        if is_dash(path) {
            // Output to a pipe cannot be taken back, so the run cannot be resumed.
            let trec = trec.map(|trec| Partial::open(trec, 0)).transpose()?;
            let answers = Sink::Stdout(BufWriter::new(io::stdout()));
            return Ok(Self { answers, trec, progress: Progress::default(), digest: None, journal: None });
        }
        let journal = Journal { path: with_suffix(path, ".partial.json"), job, pause, last: Instant::now() };
        let file = Partial::lock(path)?;
        let found = if restart { None } else { Manifest::read(&journal.path)? };
        if let Some(found) = &found {
            found.check(&journal.job, &journal.path)?;
        }
        if found.is_none() && !restart && file.metadata().is_ok_and(|file| file.len() > 0) {
            bail!(
                "{} exists, and nothing says what it is; remove it, or give --restart to write over it",
                with_suffix(path, ".partial").display()
            );
        }
        let progress = found.map(|found| found.progress).unwrap_or_default();
        // Complete files may already have their final names, and are not touched again.
        let (answers, trec) = if progress.complete && !restart {
            (Partial::over(path, file), trec.map(Partial::open_complete).transpose()?.flatten())
        } else {
            if progress.line == 0 {
                // The manifest is written before the first answer, so that no answer is ever
                // without one.
                journal.write(&progress)?;
            }
            let trec = trec.map(|trec| Partial::open(trec, progress.trec_bytes)).transpose()?;
            (Partial::cut(path, file, progress.output_bytes)?, trec)
        };
        Ok(Self { answers: Sink::File(answers), trec, progress, digest: None, journal: Some(journal) })
    }

    /// Whether an interrupted run can be resumed.
    pub(super) fn is_resumable(&self) -> bool {
        self.journal.is_some()
    }

    /// The progress of the run.
    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Writes the output of a record, and makes a checkpoint from time to time.
    pub(super) fn write(&mut self, number: u64, digest: &Sha256, answered: &Answered) -> anyhow::Result<()> {
        self.answers.write_all(&answered.line).context("cannot write the output")?;
        if let Some(trec) = &mut self.trec {
            trec.writer.write_all(&answered.trec).context("cannot write the TREC run")?;
        }
        self.progress.line = number;
        self.progress.output_bytes += answered.line.len() as u64;
        self.progress.trec_bytes += answered.trec.len() as u64;
        match answered.failed {
            true => self.progress.failed += 1,
            false => self.progress.answered += 1,
        }
        self.digest = Some(digest.clone());
        if self.journal.as_ref().is_some_and(|journal| journal.last.elapsed() >= journal.pause) {
            self.checkpoint()?;
        }
        Ok(())
    }

    /// Flushes everything written so far to disk, and records it in the manifest.
    pub(super) fn checkpoint(&mut self) -> anyhow::Result<()> {
        self.answers.sync().context("cannot write the output")?;
        if let Some(trec) = &mut self.trec {
            trec.sync().context("cannot write the TREC run")?;
        }
        if let Some(digest) = self.digest.take() {
            self.progress.input_sha256 = hex(digest);
        }
        if let Some(journal) = &mut self.journal {
            journal.write(&self.progress)?;
            journal.last = Instant::now();
        }
        Ok(())
    }

    /// Gives the files their final names.
    pub(super) fn publish(mut self) -> anyhow::Result<()> {
        self.progress.complete = true;
        self.checkpoint()?;
        self.rename()
    }

    /// Finishes a publication that was interrupted. Returns whether there was one.
    pub(super) fn finish_publication(&mut self) -> anyhow::Result<bool> {
        if self.progress.complete {
            self.rename()?;
        }
        Ok(self.progress.complete)
    }

    fn rename(&self) -> anyhow::Result<()> {
        if let Some(trec) = &self.trec {
            trec.publish(self.progress.trec_bytes)?;
        }
        if let Sink::File(answers) = &self.answers {
            answers.publish(self.progress.output_bytes)?;
        }
        if let Some(journal) = &self.journal {
            fs::remove_file(&journal.path)
                .with_context(|| format!("cannot remove {}", journal.path.display()))?;
        }
        Ok(())
    }
}

impl Sink {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout(writer) => writer.write_all(bytes),
            Self::File(file) => file.writer.write_all(bytes),
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        match self {
            Self::Stdout(writer) => writer.flush(),
            Self::File(file) => file.sync(),
        }
    }
}

impl Partial {
    /// Opens the unfinished file of a name, and locks out other processes.
    fn lock(to: &Path) -> anyhow::Result<File> {
        ensure!(to.file_name().is_some(), "{} is not a file name", to.display());
        let from = with_suffix(to, ".partial");
        let cannot = || format!("cannot write {}", from.display());
        // Not truncated: it may hold answers of an interrupted run.
        let file =
            File::options().write(true).create(true).truncate(false).open(&from).with_context(cannot)?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => bail!("another process is writing {}", from.display()),
            Err(TryLockError::Error(error)) => Err(error).with_context(cannot),
        }
    }

    fn open(to: &Path, bytes: u64) -> anyhow::Result<Self> {
        Self::cut(to, Self::lock(to)?, bytes)
    }

    /// Opens a complete file that does not have its final name yet, if there is one.
    fn open_complete(to: &Path) -> anyhow::Result<Option<Self>> {
        let missing = !with_suffix(to, ".partial").exists();
        if missing { Ok(None) } else { Ok(Some(Self::over(to, Self::lock(to)?))) }
    }

    /// Cuts a file to its first `bytes` bytes, and continues after them.
    fn cut(to: &Path, mut file: File, bytes: u64) -> anyhow::Result<Self> {
        let from = with_suffix(to, ".partial");
        let cannot = || format!("cannot write {}", from.display());
        let length = file.metadata().with_context(cannot)?.len();
        ensure!(
            length >= bytes,
            "{} has {length} bytes, but {bytes} were written; --restart begins anew",
            from.display()
        );
        file.set_len(bytes).with_context(cannot)?;
        file.seek(SeekFrom::Start(bytes)).with_context(cannot)?;
        Ok(Self::over(to, file))
    }

    fn over(to: &Path, file: File) -> Self {
        Self {
            from: with_suffix(to, ".partial"),
            to: to.to_owned(),
            writer: BufWriter::with_capacity(1 << 18, file),
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        self.writer.flush()?;
        self.writer.get_ref().sync_data()
    }

    /// Gives the file its final name. If an earlier attempt did everything but remove the temporary
    /// name, opening has made an empty file.
    fn publish(&self, bytes: u64) -> anyhow::Result<()> {
        let cannot = || format!("cannot write {}", self.to.display());
        let length = self.writer.get_ref().metadata().with_context(cannot)?.len();
        if length == bytes {
            fs::rename(&self.from, &self.to).with_context(cannot)?;
            return sync_directory(&self.to).with_context(cannot);
        }
        let published = fs::metadata(&self.to).is_ok_and(|file| file.len() == bytes);
        ensure!(
            length == 0 && published,
            "{} is not what was written; --restart begins anew",
            self.from.display()
        );
        fs::remove_file(&self.from).with_context(cannot)
    }
}

impl Journal {
    fn write(&self, progress: &Progress) -> anyhow::Result<()> {
        let manifest = Manifest { job: self.job.clone(), progress: progress.clone() };
        manifest.write(&self.path).context("cannot keep the progress")
    }
}
