//! The threads: jobs are carried out and reported.

use std::{collections::HashSet, sync::atomic::AtomicU64, time::Duration};

use super::*;
use crate::disk::{DiskIo, DiskThreads, Done, Job};

#[test]
fn threads_carry_out_what_they_are_given_and_wake_whoever_waits() {
    let (disk, ns) = (Disk::default(), ns("a"));
    let mut threads = DiskThreads::start(disk.files()).unwrap();
    let woken = Arc::new(AtomicU64::new(0));
    threads.set_waker({
        let woken = Arc::clone(&woken);
        Arc::new(move || {
            woken.fetch_add(1, Ordering::SeqCst);
        })
    });
    let next = |threads: &mut DiskThreads| {
        loop {
            threads.wait(Duration::from_secs(1));
            if let Some(done) = threads.done() {
                return done;
            }
        }
    };
    for slot in 0..20 {
        let page = page(ns, slot);
        threads.start(Job::Write { slot, turn: 1, at: NOW, key: key(slot), page });
    }
    for slot in 0..20 {
        let Done::Written { slot: written, result: Ok(()), .. } = next(&mut threads) else { panic!() };
        assert_eq!(written, slot, "in order");
    }
    for slot in 0..20 {
        threads.start(Job::Read { slot, key: key(slot), page: empty(ns, slot) });
    }
    let mut read = HashSet::new();
    for _ in 0..20 {
        let Done::Read { slot, result: Ok(read_contents), .. } = next(&mut threads) else { panic!() };
        assert_eq!(read_contents, contents(slot));
        read.insert(slot);
    }
    assert_eq!(read.len(), 20);
    // The call for the last job may still be under way.
    while woken.load(Ordering::SeqCst) < 40 {
        std::thread::yield_now();
    }
    assert!(threads.now() > NOW && threads.readers() > 0);
}
