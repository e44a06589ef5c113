//! The state of one connection, and whether it may be closed to make room.
//!
//! This is a small state machine behind a lock that is only held briefly. The connection's task
//! reports events, and the table of connections decides. Time is an argument.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::http::pace::{LeastPace, Pace};

/// How long a connection may wait for its first request before others may take its place.
const FRESH_FOR: Duration = Duration::from_millis(20);
/// How long a connection may idle between two requests before others may take its place.
const IDLE_FOR: Duration = Duration::from_secs(1);
/// How long a body may take before others may take its connection's place.
const READING_FOR: Duration = Duration::from_secs(2);
/// How long a peer may not read before others may take its place.
const STALLED_FOR: Duration = Duration::from_millis(250);
/// How long a peer may not read before a drain stops waiting for it.
const DRAIN_STALLED_FOR: Duration = Duration::from_secs(2);
/// How long an idle connection is left open while the server drains: a request may be on its way.
const DRAINING_FOR: Duration = Duration::from_millis(50);

/// The current activity of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No request has arrived yet.
    Fresh,
    /// The last request was answered.
    Idle,
    /// The body of a request is arriving.
    Reading,
    /// A handler is running.
    Working,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    since: Instant,
    /// Set while there are bytes to write that the peer does not take.
    writing: Option<Pace>,
    /// Whether the current request has a body that was not read to its end.
    unread: bool,
    /// Whether the connection was asked to close.
    closing: bool,
}

/// The state of one connection.
#[derive(Debug)]
pub(super) struct Conn {
    /// Whether the connection is beyond the limit. The table of connections changes this.
    spare: AtomicBool,
    least_pace: LeastPace,
    state: Mutex<State>,
    close: Notify,
}

/// Decides which connection is closed first: the one with the smallest rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank(u8, Instant);

impl Conn {
    /// A connection that was just accepted. Its peer must read at the minimum pace.
    pub(super) fn new(spare: bool, least_pace: LeastPace, now: Instant) -> Self {
        let state = State { phase: Phase::Fresh, since: now, writing: None, unread: false, closing: false };
        Self { spare: AtomicBool::new(spare), least_pace, state: Mutex::new(state), close: Notify::new() }
    }

    /// Whether the connection is beyond the limit and only serves health checks.
    pub(super) fn is_spare(&self) -> bool {
        self.spare.load(Ordering::Relaxed)
    }

    /// Records that the connection got a place within the limit.
    pub(super) fn promote(&self) {
        self.spare.store(false, Ordering::Relaxed);
    }

    /// Records that a request arrived, with or without a body still to come.
    pub(super) fn request_began(&self, now: Instant, has_body: bool) {
        let mut state = self.lock();
        (state.phase, state.since) = (if has_body { Phase::Reading } else { Phase::Working }, now);
        // It was about to be closed as idle, and is no longer idle.
        (state.unread, state.closing) = (has_body, false);
    }

    /// Records that the body of the request was read to its end.
    pub(super) fn body_ended(&self, now: Instant) {
        let mut state = self.lock();
        state.unread = false;
        if state.phase == Phase::Reading {
            (state.phase, state.since) = (Phase::Working, now);
        }
    }

    /// Records that the request was answered, or its handler dropped.
    pub(super) fn request_ended(&self, now: Instant) {
        let mut state = self.lock();
        (state.phase, state.since) = (Phase::Idle, now);
    }

    /// Whether any part of the current request's body was left unread.
    pub(super) fn has_unread_body(&self) -> bool {
        self.lock().unread
    }

    /// Whether a handler is running that needs no more input from the client.
    pub(super) fn is_working(&self) -> bool {
        self.lock().phase == Phase::Working
    }

    /// Records that the peer does not take the bytes to write.
    pub(super) fn write_blocked(&self, now: Instant) {
        let mut state = self.lock();
        let least_pace = self.least_pace;
        state.writing.get_or_insert_with(|| Pace::new(least_pace, now));
    }

    /// Records that the peer took `bytes` of the bytes that it did not take before.
    pub(super) fn wrote(&self, now: Instant, bytes: usize) {
        if let Some(pace) = &mut self.lock().writing {
            pace.moved(now, bytes as u64);
        }
    }

    /// Records that everything is written.
    pub(super) fn flushed(&self) {
        self.lock().writing = None;
    }

    /// Whether to close the connection: its peer reads too slowly, or it is idle while the server
    /// drains.
    pub(super) fn is_over(&self, now: Instant, draining: bool) -> bool {
        let state = self.lock();
        let for_at_least = |time| now.saturating_duration_since(state.since) >= time;
        match (&state.writing, state.phase) {
            (Some(pace), _) if draining => now >= pace.began() + DRAIN_STALLED_FOR,
            (Some(pace), _) => now >= pace.deadline(),
            (None, Phase::Fresh | Phase::Idle) => draining && for_at_least(DRAINING_FOR),
            (None, Phase::Reading | Phase::Working) => false,
        }
    }

    /// The rank of a connection that may be closed to make room; `None` if it may not.
    pub(super) fn rank(&self, now: Instant) -> Option<Rank> {
        let state = self.lock();
        let since = state.since;
        let after = |rank, time| (now.saturating_duration_since(since) >= time).then_some(Rank(rank, since));
        match (&state.writing, state.phase) {
            _ if state.closing => None,
            (Some(pace), _) => (now >= pace.began() + STALLED_FOR).then_some(Rank(1, pace.began())),
            (None, Phase::Fresh) => after(0, FRESH_FOR),
            (None, Phase::Idle) => after(2, if self.is_spare() { FRESH_FOR } else { IDLE_FOR }),
            (None, Phase::Reading) => after(3, READING_FOR),
            (None, Phase::Working) => None,
        }
    }

    /// Asks the connection's task to close. A request that arrives meanwhile is still answered.
    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.close.notify_one();
    }

    /// Waits until the connection should be closed.
    pub(super) async fn closed(&self) {
        loop {
            self.close.notified().await;
            if self.lock().closing {
                return;
            }
        }
    }

    /// Every change is a single assignment, so a panic elsewhere leaves no inconsistent state.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: LeastPace = LeastPace { window: Duration::from_secs(30), bytes: 1000 };

    #[test]
    fn who_is_at_work_is_never_closed_and_the_idle_go_first() {
        let start = Instant::now();
        let later = start + Duration::from_secs(10);
        let conn = || Conn::new(false, PACE, start);
        let (fresh, idle, reading, working, stalled) = (conn(), conn(), conn(), conn(), conn());
        idle.request_began(start, false);
        idle.request_ended(start);
        reading.request_began(start, true);
        working.request_began(start, true);
        working.body_ended(start);
        stalled.request_began(start, false);
        stalled.write_blocked(start);
        let rank = |conn: &Conn| conn.rank(later);
        let order = [&fresh, &stalled, &idle, &reading].map(|conn| rank(conn).unwrap());
        assert!(order.is_sorted());
        assert_eq!(rank(&working), None);
        // No connection is closed in the moment in which it was accepted.
        assert!([&fresh, &idle, &reading, &stalled].iter().all(|conn| conn.rank(start).is_none()));
        // A connection is asked to close only once, and a request that came first is answered.
        fresh.close();
        assert_eq!(rank(&fresh), None);
        fresh.request_began(later, false);
        assert!(!fresh.lock().closing);
    }

    #[test]
    fn who_does_not_read_is_over_and_a_drain_waits_for_no_idle_one() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let conn = Conn::new(false, PACE, start);
        conn.request_began(start, false);
        conn.write_blocked(start);
        conn.request_ended(start);
        assert!(!conn.is_over(at(29_999), false) && conn.is_over(at(30_000), false));
        assert!(!conn.is_over(at(1_999), true) && conn.is_over(at(2_000), true));
        conn.wrote(at(29_000), 999);
        assert!(conn.is_over(at(30_000), false), "a trickle is no reading");
        conn.wrote(at(29_500), 1);
        assert!(!conn.is_over(at(59_000), false));
        conn.flushed();
        assert!(!conn.is_over(at(1_000_000), false) && conn.is_over(at(1_000_000), true));
        conn.request_began(at(1_000_000), false);
        assert!(!conn.is_over(at(2_000_000), true), "a request at hand is finished");
    }
}
