//! Lines for a file or a pipe that may be slow, full or gone: a bounded queue, and one thread that writes.
//!
//! Place in the flow: below the log and the request log. A caller hands a line over and goes on.
//!
//! Invariants: handing over never waits and never fails; the queue is bounded in bytes; a line that is not written is
//! counted; after a failed write the next line begins on a line of its own.

mod queue;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use queue::{Queue, Work};

/// A file or a pipe.
pub struct Output {
    /// Where lines go.
    pub writer: Box<dyn Write + Send>,
    /// Whether the last line there has no end, as a crash leaves it.
    pub torn: bool,
}

/// How an output is opened, and what its owner wants to hear. All of it runs on the writing thread.
pub trait Source: Send + 'static {
    /// Opens the output, at the start and whenever it should be opened again.
    ///
    /// # Errors
    ///
    /// When it cannot be opened. The old output then stays in use.
    fn open(&mut self) -> io::Result<Output>;

    /// Lines are being dropped. Called once per outage.
    fn failing(&mut self, error: &io::Error);

    /// The output could not be opened again.
    fn kept(&mut self, error: &io::Error);
}

/// Takes lines.
#[derive(Debug)]
pub struct LineWriter {
    queue: Arc<Queue>,
}

impl LineWriter {
    /// Opens the output and starts the thread. At most `max_bytes` wait to be written.
    ///
    /// # Errors
    ///
    /// When the output cannot be opened, or there is no thread.
    pub fn start(name: &str, max_bytes: usize, mut source: impl Source) -> io::Result<Self> {
        let output = source.open()?;
        let queue = Arc::new(Queue::new(max_bytes));
        let work = Arc::clone(&queue);
        std::thread::Builder::new().name(name.into()).spawn(move || write(&work, output, source))?;
        Ok(Self { queue })
    }

    /// A writer whose thread never takes anything.
    #[cfg(test)]
    pub(crate) fn stuck(max_bytes: usize) -> Self {
        Self { queue: Arc::new(Queue::new(max_bytes)) }
    }

    /// Hands a line over, its end included. It is dropped and counted when too many bytes wait.
    pub fn push(&self, line: Vec<u8>) {
        self.queue.push(line);
    }

    /// Opens the output again before the next line, as after a rotation.
    pub fn reopen(&self) {
        self.queue.reopen();
    }

    /// Lines that were not written.
    pub fn dropped(&self) -> u64 {
        self.queue.dropped()
    }

    /// Waits until all lines are written, at most for `patience`. Says whether they are.
    pub fn flush(&self, patience: Duration) -> bool {
        self.queue.flush(patience)
    }

    /// As [`LineWriter::flush`], and ends the thread. Later lines are dropped.
    pub fn close(&self, patience: Duration) -> bool {
        self.queue.close();
        self.flush(patience)
    }
}

/// The thread.
fn write(queue: &Queue, mut output: Output, mut source: impl Source) {
    let mut failing = false;
    while let Some(Work { reopen, bytes, lines }) = queue.take() {
        if reopen {
            match source.open() {
                Ok(opened) => (output, failing) = (opened, false),
                Err(error) => source.kept(&error),
            }
        }
        match put(&mut output, &bytes) {
            Ok(()) => failing = false,
            Err(error) => {
                queue.lost(lines);
                if !failing {
                    source.failing(&error);
                }
                failing = true;
            }
        }
        queue.done();
    }
}

fn put(output: &mut Output, bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let repair: &[u8] = if output.torn { b"\n" } else { b"" };
    output.torn = true;
    output.writer.write_all(repair)?;
    output.writer.write_all(bytes)?;
    output.writer.flush()?;
    output.torn = false;
    Ok(())
}
