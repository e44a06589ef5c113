//! Lines for a file or a pipe that may be slow, full or gone: a bounded queue, and one thread that
//! writes.
//!
//! Place in the flow: below the log and the request log. A caller passes a line and goes on.
//!
//! Invariants: passing a line never waits and never fails; the queue is bounded in bytes; a line
//! that is not written is counted; after a failed write the next line begins on its own line.

mod queue;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use queue::{Queue, Work};

/// An open file or pipe.
pub struct Output {
    /// The destination of the lines.
    pub writer: Box<dyn Write + Send>,
    /// Whether the last line of the file has no line end, as after a crash.
    pub torn: bool,
}

/// Opens an output and hears of its failures. All calls run on the writing thread.
pub trait Source: Send + 'static {
    /// Opens the output, at the start and whenever it should be opened again.
    ///
    /// # Errors
    ///
    /// When it cannot be opened. The old output then stays in use.
    fn open(&mut self) -> io::Result<Output>;

    /// Called when lines begin to be dropped, once per outage.
    fn failing(&mut self, error: &io::Error);

    /// Called when the output could not be opened again, so that the old one stays in use.
    fn kept(&mut self, error: &io::Error);
}

/// Accepts lines and writes them on its own thread.
#[derive(Debug)]
pub struct LineWriter {
    queue: Arc<Queue>,
}

impl LineWriter {
    /// Opens the output and starts the thread. At most `max_bytes` wait to be written.
    ///
    /// # Errors
    ///
    /// When the output cannot be opened, or the thread cannot be started.
    pub fn start(name: &str, max_bytes: usize, mut source: impl Source) -> io::Result<Self> {
        let output = source.open()?;
        let queue = Arc::new(Queue::new(max_bytes));
        let work = Arc::clone(&queue);
        std::thread::Builder::new().name(name.into()).spawn(move || write(&work, output, source))?;
        Ok(Self { queue })
    }

    /// A writer whose thread never takes a line.
    #[cfg(test)]
    pub(crate) fn stuck(max_bytes: usize) -> Self {
        Self { queue: Arc::new(Queue::new(max_bytes)) }
    }

    /// Passes a line, including its line end. It is dropped and counted when too many bytes wait.
    pub fn push(&self, line: Vec<u8>) {
        self.queue.push(line);
    }

    /// Opens the output again before the next line, as after a rotation.
    pub fn reopen(&self) {
        self.queue.reopen();
    }

    /// Number of lines that were not written.
    pub fn dropped(&self) -> u64 {
        self.queue.dropped()
    }

    /// Waits until all lines are written, for at most `patience`. Returns whether they are.
    pub fn flush(&self, patience: Duration) -> bool {
        self.queue.flush(patience)
    }

    /// Like [`LineWriter::flush`], and ends the thread. Later lines are dropped.
    pub fn close(&self, patience: Duration) -> bool {
        self.queue.close();
        self.flush(patience)
    }
}

/// The loop of the writing thread.
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
