//! Tests with a pipe that breaks, a full disk, a reader that is stuck, and a file that was moved.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

/// The bytes that reached the disk, and how many of the next writes fail after half of the bytes.
#[derive(Clone, Default)]
struct Disk {
    text: Arc<Mutex<Vec<u8>>>,
    failures: Arc<Mutex<u32>>,
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut failures = self.failures.lock().unwrap();
        let mut text = self.text.lock().unwrap();
        if *failures == 0 {
            return text.write(bytes);
        }
        *failures -= 1;
        text.extend_from_slice(&bytes[..bytes.len() / 2]);
        Err(io::Error::other("full"))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Source for Disk {
    fn open(&mut self) -> io::Result<Output> {
        Ok(Output { writer: Box::new(self.clone()), torn: false })
    }
    fn failing(&mut self, _: &io::Error) {}
    fn kept(&mut self, _: &io::Error) {}
}

impl Disk {
    fn text(&self) -> String {
        String::from_utf8(self.text.lock().unwrap().clone()).unwrap()
    }
}

/// A pipe whose reader takes nothing until the test lets it.
struct Pipe(Receiver<()>);

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.recv().map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Stuck(Option<Receiver<()>>);

impl Stuck {
    fn new() -> (Self, Sender<()>) {
        let (sender, receiver) = channel();
        (Self(Some(receiver)), sender)
    }
}

impl Source for Stuck {
    fn open(&mut self) -> io::Result<Output> {
        let pipe = Pipe(self.0.take().unwrap());
        Ok(Output { writer: Box::new(pipe), torn: false })
    }
    fn failing(&mut self, _: &io::Error) {}
    fn kept(&mut self, _: &io::Error) {}
}

#[test]
fn after_a_failure_lines_are_whole_again_and_the_lost_are_counted() {
    let disk = Disk::default();
    let writer = LineWriter::start("disk", 1 << 20, disk.clone()).unwrap();
    *disk.failures.lock().unwrap() = 1;
    writer.push(b"first\n".to_vec());
    assert!(writer.flush(PATIENCE));
    writer.push(b"second\n".to_vec());
    assert!(writer.close(PATIENCE));
    assert_eq!((&disk.text()[..], writer.dropped()), ("fir\nsecond\n", 1));
}

#[test]
fn a_stuck_reader_holds_nobody_up_and_memory_is_bounded() {
    let (source, reader) = Stuck::new();
    let writer = LineWriter::start("pipe", 10_000, source).unwrap();
    for _ in 0..10_000 {
        writer.push(vec![b'x'; 100]);
    }
    assert!(writer.queue_bytes() <= 10_000);
    assert!(writer.dropped() >= 9_000);
    // Closing does not wait for a reader that never comes.
    assert!(!writer.close(Duration::from_millis(10)));
    drop(reader);
}

#[test]
fn lines_after_the_end_are_counted() {
    let disk = Disk::default();
    let writer = LineWriter::start("disk", 1 << 20, disk.clone()).unwrap();
    assert!(writer.close(PATIENCE));
    writer.push(b"late\n".to_vec());
    assert_eq!((&disk.text()[..], writer.dropped()), ("", 1));
}

impl LineWriter {
    fn queue_bytes(&self) -> usize {
        self.queue.waiting()
    }
}
