//! The thread that writes.

use std::io::Write;
use std::sync::mpsc::Receiver;

use super::line::LoggedAnswer;

/// Bytes after which lines are written even if more are waiting.
const CHUNK: usize = 256 << 10;

/// What the thread is told.
pub(super) enum Message {
    /// To be written.
    Line(Box<LoggedAnswer>),
    /// Nothing more will come.
    Close,
}

/// Writes until it is told to stop. Lines reach the file as soon as no more of them wait, so that whoever reads along sees
/// them. `torn` says that the file does not end with the end of a line.
pub(super) fn write(
    messages: &Receiver<Message>,
    mut file: impl Write,
    mut torn: bool,
    dropped: impl Fn(u64),
) {
    let (mut buffer, mut failing, mut open) = (Vec::new(), false, true);
    while open {
        let Ok(mut message) = messages.recv() else { return };
        buffer.clear();
        let mut lines = 0_u64;
        loop {
            match message {
                Message::Close => open = false,
                Message::Line(line) => match append(&mut buffer, &line) {
                    Ok(()) => lines += 1,
                    Err(_) => dropped(1),
                },
            }
            match messages.try_recv() {
                Ok(next) if open && buffer.len() < CHUNK => message = next,
                // Taken from the channel and over the chunk: it begins the next one.
                Ok(next) if open => {
                    put(&mut file, &buffer, lines, &mut torn, &mut failing, &dropped);
                    buffer.clear();
                    lines = 0;
                    message = next;
                }
                _ => break,
            }
        }
        put(&mut file, &buffer, lines, &mut torn, &mut failing, &dropped);
    }
}

/// Appends a line, or nothing.
fn append(buffer: &mut Vec<u8>, line: &LoggedAnswer) -> serde_json::Result<()> {
    let before = buffer.len();
    if let Err(error) = serde_json::to_writer(&mut *buffer, line) {
        buffer.truncate(before);
        return Err(error);
    }
    buffer.push(b'\n');
    Ok(())
}

/// Writes whole lines. After a failure the next attempt begins on a line of its own.
fn put(
    file: &mut impl Write,
    buffer: &[u8],
    lines: u64,
    torn: &mut bool,
    failing: &mut bool,
    dropped: impl Fn(u64),
) {
    if buffer.is_empty() {
        return;
    }
    let repair: &[u8] = if *torn { b"\n" } else { b"" };
    match file.write_all(repair).and_then(|()| file.write_all(buffer)).and_then(|()| file.flush()) {
        Ok(()) => (*torn, *failing) = (false, false),
        Err(error) => {
            // Once per outage, not once per line.
            if !*failing {
                tracing::error!(%error, "cannot write the request log; lines are dropped and counted");
            }
            (*torn, *failing) = (true, true);
            dropped(lines);
        }
    }
}
