//! Requests that arrive when they like: an open loop at rising rates, and a fixed number at a time.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::world::{World, random};
use crate::{Args, Output};

fn percentile(times: &mut [f64], share: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    times[((times.len() - 1) as f64 * share).round() as usize]
}

fn tenant() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1 << 40);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

pub(crate) fn measure(world: &World, args: &Args, output: &mut Output) {
    let (beam, context, seconds) = if args.shape == "tiny" { (4, 40, 0.3) } else { (256, 5000, 20.0) };
    let seconds = if args.quick { f64::min(seconds, 8.0) } else { seconds };
    let one = || world.answer(vec![world.request(world.history(tenant(), context), beam, tenant())]).0;
    for concurrency in [1, 4, 8] {
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        let all = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..concurrency {
                scope.spawn(|| {
                    while Instant::now() < until {
                        let took = one();
                        all.lock().unwrap().push(took);
                    }
                });
            }
        });
        let mut all = all.into_inner().unwrap();
        output.put(&json!({
            "section": "concurrency", "shape": args.shape, "concurrency": concurrency, "beam": beam, "context": context,
            "answers": all.len(), "per_second": all.len() as f64 / seconds,
            "p50_ms": percentile(&mut all, 0.5), "p99_ms": percentile(&mut all, 0.99),
        }));
    }
    let rates: &[f64] =
        if args.shape == "tiny" { &[20.0] } else { &[5.0, 10.0, 20.0, 30.0, 40.0, 60.0, 80.0] };
    for &rate in rates {
        let (mut random, mut due, mut arrivals) = (random(5), 0.0, Vec::new());
        while due < seconds {
            arrivals.push(due);
            // Poisson arrivals.
            due += -((random(1 << 30) + 1) as f64 / f64::from(1 << 30)).ln() / rate;
        }
        let start = Instant::now();
        let all = Mutex::new(Vec::new());
        let (one, answered) = (&one, &all);
        std::thread::scope(|scope| {
            for &due in &arrivals {
                let at = Duration::from_secs_f64(due);
                std::thread::sleep(at.saturating_sub(start.elapsed()));
                scope.spawn(move || {
                    one();
                    // From the moment it was due, so that waiting is never hidden.
                    let took = (start.elapsed().as_secs_f64() - due) * 1e3;
                    answered.lock().unwrap().push(took);
                });
            }
        });
        let mut all = all.into_inner().unwrap();
        let p99 = percentile(&mut all, 0.99);
        output.put(&json!({
            "section": "open loop", "shape": args.shape, "rate": rate, "beam": beam, "context": context,
            "answers": all.len(), "p50_ms": percentile(&mut all, 0.5), "p99_ms": p99,
        }));
        if p99 > 1000.0 {
            break;
        }
    }
}
