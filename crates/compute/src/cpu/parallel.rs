//! Parallel loops.
//!
//! Place in the flow: everything in this backend that runs on several threads runs through [`Cpu::each`] or
//! [`Cpu::each_part`].
//!
//! A step is hundreds of short loops one after the other, so two things matter. Threads take the next
//! task when they have done one, so that none waits long at the end. A waiting thread stays awake,
//! because being woken by the system takes longer than many of these loops do, above all on a virtual
//! machine. The threads are those of a rayon pool.
//!
//! Invariant: every index below the count is given to exactly one call of the task.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::LocalKey;

use super::{Cpu, SPINS_BEFORE_YIELD};

/// A loop in progress.
struct Loop<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    count: usize,
    /// Tasks taken at a time.
    grain: usize,
    next: AtomicUsize,
    done: AtomicUsize,
}

/// Counts tasks as done, also when one of them panics.
struct Done<'a>(&'a AtomicUsize, usize);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        // A thread that sees the tasks done also sees what they have written.
        self.0.fetch_add(self.1, Ordering::Release);
    }
}

impl Loop<'_> {
    fn work(&self) {
        loop {
            let first = self.next.fetch_add(self.grain, Ordering::Relaxed);
            if first >= self.count {
                return;
            }
            let tasks = first..self.count.min(first + self.grain);
            let _done = Done(&self.done, tasks.len());
            tasks.for_each(self.task);
        }
    }

    /// Until the others have finished what they took.
    fn wait(&self) {
        let mut spins = 0_u32;
        while self.done.load(Ordering::Acquire) < self.count {
            spins += 1;
            if spins.is_multiple_of(SPINS_BEFORE_YIELD) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// Offers the loop to `threads` threads, this one included. Those that have no time are not waited for.
    fn share(&self, threads: usize) {
        if threads == 1 {
            return self.work();
        }
        let others = threads / 2;
        rayon::join(
            || {
                self.share(threads - others);
                self.wait();
            },
            || self.share(others),
        );
    }
}

impl Cpu {
    /// Calls `task` with every number below `count`, `grain` of them in a row on one thread.
    pub fn each(&self, count: usize, grain: usize, task: impl Fn(usize) + Sync) {
        let grain = grain.max(1);
        let threads = self.threads().min(count.div_ceil(grain));
        if threads <= 1 {
            return (0..count).for_each(task);
        }
        let shared = Loop { task: &task, count, grain, next: AtomicUsize::new(0), done: AtomicUsize::new(0) };
        self.run(|| shared.share(threads));
    }

    /// Calls `task` with every part, and its number.
    pub fn each_part<S: Split>(&self, split: S, task: impl Fn(usize, S::Part) + Sync) {
        // SAFETY: `each` gives every number to exactly one call.
        self.each(split.parts(), 1, |index| task(index, unsafe { split.part(index) }));
    }
}

/// Runs `task` on groups of rows of [`rows_of_group`], each group on one thread. A single group is all
/// rows, and threads share each product of it. The single group uses `scratch`, several use that of
/// their thread. A thread that waits for others may run another loop meanwhile, which must not find its
/// scratch in use.
pub fn each_group<S: Split, C: 'static>(
    cpu: &Cpu,
    groups: S,
    scratch: &mut C,
    of_thread: &'static LocalKey<RefCell<C>>,
    task: impl Fn(&Cpu, &mut C, S::Part) + Sync,
) {
    match groups.parts() {
        0 => {}
        // SAFETY: the only part, taken once.
        1 => task(cpu, scratch, unsafe { groups.part(0) }),
        _ => {
            let alone = cpu.alone();
            cpu.each_part(groups, |_, part| {
                of_thread.with_borrow_mut(|scratch| task(&alone, scratch, part));
            });
        }
    }
}

/// Something cut into parts that different threads may have at the same time.
pub trait Split: Sync {
    /// One part, to be used by one thread.
    type Part;

    /// The number of parts.
    fn parts(&self) -> usize;

    /// A part by its number.
    ///
    /// # Safety
    ///
    /// No number is given twice.
    unsafe fn part(&self, index: usize) -> Self::Part;
}

/// A slice in parts of equal length, the last of which may be shorter, to be read.
pub struct Read<'a, T>(&'a [T], usize);

/// The same, to be written.
pub struct Write<'a, T> {
    values: *mut T,
    len: usize,
    size: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a part is an exclusive borrow of values no other part has, so sharing this among threads is
// sending the values to them.
unsafe impl<T: Send> Sync for Write<'_, T> {}

/// Cuts a slice into parts of `size` values, to be read.
pub fn read<T>(values: &[T], size: usize) -> Read<'_, T> {
    Read(values, size)
}

/// Cuts a slice into parts of `size` values, to be written.
pub fn write<T>(values: &mut [T], size: usize) -> Write<'_, T> {
    assert!(size > 0, "parts have a size");
    Write { values: values.as_mut_ptr(), len: values.len(), size, _borrow: PhantomData }
}

impl<'a, T: Sync> Split for Read<'a, T> {
    type Part = &'a [T];

    fn parts(&self) -> usize {
        self.0.len().div_ceil(self.1)
    }

    unsafe fn part(&self, index: usize) -> &'a [T] {
        let start = index * self.1;
        &self.0[start..self.0.len().min(start + self.1)]
    }
}

impl<'a, T: Send> Split for Write<'a, T> {
    type Part = &'a mut [T];

    fn parts(&self) -> usize {
        self.len.div_ceil(self.size)
    }

    unsafe fn part(&self, index: usize) -> &'a mut [T] {
        let start = index * self.size;
        assert!(start < self.len, "part {index} exists");
        // SAFETY: within the borrowed slice by the assertion and the minimum; exclusive, because parts
        // do not overlap and by contract none is given twice.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(start), self.size.min(self.len - start)) }
    }
}

impl<A: Split, B: Split> Split for (A, B) {
    type Part = (A::Part, B::Part);

    fn parts(&self) -> usize {
        assert_eq!(self.0.parts(), self.1.parts(), "as many parts of one as of the other");
        self.0.parts()
    }

    unsafe fn part(&self, index: usize) -> Self::Part {
        // SAFETY: by contract.
        unsafe { (self.0.part(index), self.1.part(index)) }
    }
}

/// Rows of a group, for work that looks at one row at a time. It is all rows of the step where threads
/// had better share the weights. Otherwise groups are as equal as possible, with the same number for
/// each thread.
pub fn rows_of_group(rows: usize, threads: usize) -> usize {
    match rows / threads {
        share if share < LEAST_GROUP => rows.max(1),
        // Of one group for each thread, none should be larger than the others.
        share if share <= LARGEST_GROUP => rows.div_ceil(threads),
        share => share.div_ceil(share.div_ceil(LARGEST_GROUP)).next_multiple_of(TILE_ROWS),
    }
}

/// Rows per thread from which on a step is cut into groups of rows.
const LEAST_GROUP: usize = 96;
/// Most rows of a group: their activations stay in a core's own cache.
const LARGEST_GROUP: usize = 192;
/// Groups are multiples of this, so that only the last one has a lower tile.
const TILE_ROWS: usize = 12;

/// The beginning of a buffer that only grows; what it holds is overwritten by the caller.
pub fn at_least(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Moves some rows, given in ascending order, to the front.
pub fn keep_rows<'a>(values: &'a mut [f32], width: usize, rows: &[usize]) -> &'a mut [f32] {
    for (kept, &row) in rows.iter().enumerate() {
        values.copy_within(row * width..(row + 1) * width, kept * width);
    }
    &mut values[..rows.len() * width]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_threads_and_the_grain() {
        for threads in [1, 2, 3, 8] {
            let cpu = Cpu::new(threads).unwrap();
            for count in [0, 1, 2, 7, 1000] {
                for grain in [0, 1, 3, 2000] {
                    let calls: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                    cpu.each(count, grain, |index| {
                        calls[index].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(calls.iter().all(|calls| calls.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn parts_cover_a_slice_and_fit_together() {
        let cpu = Cpu::new(3).unwrap();
        let from: Vec<u32> = (0..1003).collect();
        let (mut doubled, mut numbers) = (vec![0; 1003], vec![0; 101]);
        cpu.each_part(
            (read(&from, 10), (write(&mut doubled, 10), write(&mut numbers, 1))),
            |index, (from, (to, number))| {
                number[0] = index;
                to.iter_mut().zip(from).for_each(|(to, from)| *to = 2 * from);
            },
        );
        assert!(doubled.iter().zip(&from).all(|(doubled, from)| *doubled == 2 * from));
        assert!(numbers.iter().enumerate().all(|(index, number)| index == *number));
    }

    #[test]
    fn loops_within_loops_and_from_many_threads_come_to_an_end() {
        let cpu = Cpu::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        cpu.run_awake(|| {
                            cpu.each(5, 1, |_| {
                                cpu.each(3, 1, |_| {
                                    sum.fetch_add(1, Ordering::Relaxed);
                                });
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 200 * 15);
    }

    #[test]
    fn a_panic_comes_out_and_the_threads_live_on() {
        let cpu = Cpu::new(2).unwrap();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            cpu.each(100, 1, |index| assert!(index != 57, "57"));
        }));
        assert!(panicked.is_err());
        let sum = AtomicUsize::new(0);
        cpu.each(100, 1, |index| {
            sum.fetch_add(index, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 4950);
    }
}
