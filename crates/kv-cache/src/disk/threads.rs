//! The threads that read and write: one writes, several read.
//!
//! They end when [`DiskThreads`] is dropped. A thread that hangs in the operating system at the end
//! is left behind, with the files.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use super::{DiskIo, Done, Job, SlotFiles, Storage, Waker};

/// Number of threads that read. Disks are faster at several reads than at one.
const READERS: usize = 4;

/// Carries out jobs on its own threads.
pub struct DiskThreads {
    writes: mpsc::Sender<Job>,
    reads: mpsc::Sender<Job>,
    done: mpsc::Receiver<Done>,
    /// A result that [`DiskIo::wait`] has already received.
    next: Option<Done>,
    waker: Arc<Mutex<Option<Waker>>>,
}

/// What each thread needs.
struct Hand<S> {
    files: Arc<SlotFiles<S>>,
    done: mpsc::Sender<Done>,
    waker: Arc<Mutex<Option<Waker>>>,
}

impl DiskThreads {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// When the operating system starts no thread.
    pub fn start<S: Storage + 'static>(files: SlotFiles<S>) -> io::Result<Self> {
        let (files, waker) = (Arc::new(files), Arc::new(Mutex::new(None)));
        let (sender, done) = mpsc::channel();
        let hand = || Hand { files: Arc::clone(&files), done: sender.clone(), waker: Arc::clone(&waker) };
        let (writes, jobs) = mpsc::channel();
        spawn("beamline-kv-write", hand(), move || jobs.recv().ok())?;
        let (reads, jobs) = mpsc::channel();
        let jobs = Arc::new(Mutex::new(jobs));
        for _ in 0..READERS {
            let jobs: Arc<Mutex<mpsc::Receiver<Job>>> = Arc::clone(&jobs);
            // The thread that holds the lock waits for the next job; the others wait for the lock.
            let next = move || jobs.lock().unwrap_or_else(PoisonError::into_inner).recv().ok();
            spawn("beamline-kv-read", hand(), next)?;
        }
        Ok(Self { writes, reads, done, next: None, waker })
    }
}

fn spawn<S: Storage + 'static>(
    name: &str,
    hand: Hand<S>,
    mut next: impl FnMut() -> Option<Job> + Send + 'static,
) -> io::Result<()> {
    let run = move || {
        while let Some(job) = next() {
            hand.carry_out(job);
        }
    };
    std::thread::Builder::new().name(name.into()).spawn(run).map(drop)
}

impl<S: Storage> Hand<S> {
    fn carry_out(&self, job: Job) {
        let done = match job {
            Job::Write { slot, turn, at, key, page } => {
                Done::Written { slot, key, result: self.files.write(slot, turn, at, key, &page) }
            }
            Job::Read { slot, key, page } => {
                let start = Instant::now();
                let result = self.files.read(slot, key, &page);
                Done::Read { slot, key, page, result, took: start.elapsed() }
            }
            Job::Erase { slot } => Done::Erased { slot, result: self.files.erase(slot) },
            Job::Discard => {
                // The tier is off: an error here would have no consequence.
                let _ = self.files.discard();
                return;
            }
        };
        // Without a receiver there is no one to wake.
        if self.done.send(done).is_ok() {
            let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).clone();
            waker.inspect(|wake| wake());
        }
    }
}

impl DiskIo for DiskThreads {
    fn start(&mut self, job: Job) {
        let to = if let Job::Read { .. } = &job { &self.reads } else { &self.writes };
        // A thread ends before its sender only by a panic. Its jobs are then never done.
        let _ = to.send(job);
    }

    fn done(&mut self) -> Option<Done> {
        self.next.take().or_else(|| self.done.try_recv().ok())
    }

    fn now(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
    }

    fn readers(&self) -> usize {
        READERS
    }

    fn wait(&mut self, most: Duration) {
        if self.next.is_none() {
            self.next = self.done.recv_timeout(most).ok();
        }
    }

    fn set_waker(&mut self, waker: Waker) {
        *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(waker);
    }
}
