//! Independent cases on all threads of the machine, with results in the order of the cases.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, anyhow};

/// Runs every case.
///
/// # Errors
///
/// The error of the first case that fails.
pub(crate) fn each<C: Sync, R: Send>(cases: &[C], run: impl Fn(&C) -> Result<R> + Sync) -> Result<Vec<R>> {
    let done: Mutex<Vec<(usize, Result<R>)>> = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(index) else { return };
                    let result = run(case);
                    if let Ok(mut done) = done.lock() {
                        done.push((index, result));
                    }
                }
            });
        }
    });
    let mut done = done.into_inner().map_err(|_| anyhow!("a simulation panicked"))?;
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn results_are_in_the_order_of_the_cases_and_an_error_is_not_lost() {
        let cases: Vec<u32> = (0..100).collect();
        assert_eq!(each(&cases, |case| Ok(2 * case)).unwrap(), (0..100).map(|n| 2 * n).collect::<Vec<_>>());
        let failing = |case: &u32| if *case == 70 { bail!("no") } else { Ok(()) };
        assert!(each(&cases, failing).is_err());
    }
}
