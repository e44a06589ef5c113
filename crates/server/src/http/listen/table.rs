//! All open connections: which get a place, and which have to give one up.
//!
//! There are `limit` places. When all are taken, the least useful connection gives its place to a
//! new one. If all are useful, the new one becomes a spare, for which only health and metrics are
//! answered. So idle, slow and busy connections cannot keep a health check out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::{Semaphore, SemaphorePermit};

use super::conn::Conn;
use crate::http::pace::LeastPace;

/// Number of places beyond the limit.
pub(crate) const SPARES: usize = 128;

#[derive(Debug, Default)]
struct Open {
    next: u64,
    conns: HashMap<u64, Arc<Conn>>,
    spares: usize,
}

/// The table of open connections.
#[derive(Debug)]
pub(super) struct Table {
    limit: usize,
    least_pace: LeastPace,
    open: Mutex<Open>,
    /// Permits for spares that wait for a place.
    waiting: Semaphore,
}

/// The place of a connection, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) table: Arc<Table>,
    id: u64,
    /// The connection that has the place.
    pub(super) conn: Arc<Conn>,
}

impl Table {
    pub(super) fn new(limit: usize, least_pace: LeastPace) -> Self {
        Self { limit, least_pace, open: Mutex::default(), waiting: Semaphore::new(SPARES / 4) }
    }

    /// A place for a new connection, if one is free or another connection gives its own up.
    pub(super) fn admit(self: &Arc<Self>, now: Instant) -> Option<Place> {
        let mut open = self.lock();
        let spare = open.conns.len() - open.spares >= self.limit && !open.close_one(now, false);
        if spare && open.spares >= SPARES && !open.close_one(now, true) {
            return None;
        }
        let conn = Arc::new(Conn::new(spare, self.least_pace, now));
        let id = open.next;
        open.next += 1;
        open.spares += usize::from(spare);
        open.conns.insert(id, Arc::clone(&conn));
        Some(Place { table: Arc::clone(self), id, conn })
    }

    /// Tries to get a place within the limit for a spare connection. Returns whether it has one
    /// now.
    pub(super) fn promote(&self, conn: &Conn, now: Instant) -> bool {
        let mut open = self.lock();
        if conn.is_spare() && (open.conns.len() - open.spares < self.limit || open.close_one(now, false)) {
            conn.promote();
            open.spares -= 1;
        }
        !conn.is_spare()
    }

    /// The permit to wait for a place as a spare. Few may wait, because most spares are for health
    /// checks.
    pub(super) fn wait(&self) -> Option<SemaphorePermit<'_>> {
        self.waiting.try_acquire().ok()
    }

    /// Closes the least useful connection, if any may be closed.
    pub(super) fn make_room(&self, now: Instant) {
        let open = self.lock();
        let _ = open.close_one(now, true) || open.close_one(now, false);
    }

    /// Closes connections whose peers do not read, and idle ones while the server drains.
    pub(super) fn close_those_over(&self, now: Instant, draining: bool) {
        let open = self.lock();
        open.conns.values().filter(|conn| conn.is_over(now, draining)).for_each(|conn| conn.close());
    }

    /// Changes of the map are single operations, so a panic elsewhere leaves no inconsistent state.
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// Closes the least useful connection among the spares, or among the others. Returns whether
    /// there was one.
    fn close_one(&self, now: Instant, spare: bool) -> bool {
        let conns = self.conns.values().filter(|conn| conn.is_spare() == spare);
        let ranked = conns.filter_map(|conn| Some((conn.rank(now)?, conn)));
        let first = ranked.min_by_key(|(rank, _)| *rank).map(|(_, conn)| conn);
        first.inspect(|conn| conn.close()).is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.table.lock();
        open.conns.remove(&self.id);
        open.spares -= usize::from(self.conn.is_spare());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn table(limit: usize) -> Arc<Table> {
        Arc::new(Table::new(limit, LeastPace { window: Duration::from_secs(30), bytes: 1000 }))
    }

    #[test]
    fn idle_connections_give_way_and_those_at_work_leave_spares() {
        let (table, start) = (table(2), Instant::now());
        let later = start + Duration::from_secs(5);
        let idle = table.admit(start).unwrap();
        let working = table.admit(start).unwrap();
        working.conn.request_began(start, false);
        // The idle connection gives way; until it has ended, there is one more.
        let third = table.admit(later).unwrap();
        assert!(!third.conn.is_spare() && idle.conn.rank(later).is_none());
        third.conn.request_began(later, false);
        let fourth = table.admit(later).unwrap();
        assert!(fourth.conn.is_spare());
        assert!(!table.promote(&fourth.conn, later));
        drop(idle);
        drop(working);
        assert!(table.promote(&fourth.conn, later) && !fourth.conn.is_spare());
        assert_eq!(table.lock().spares, 0);
        third.conn.request_ended(later);
        let later = later + Duration::from_secs(5);
        assert!(!table.admit(later).unwrap().conn.is_spare());
    }

    #[test]
    fn spares_are_bounded_and_give_way_among_themselves() {
        let (table, start) = (table(1), Instant::now());
        let working = table.admit(start).unwrap();
        working.conn.request_began(start, false);
        let spares: Vec<_> = (0..SPARES).map(|_| table.admit(start).unwrap()).collect();
        assert!(table.admit(start).is_none(), "all came in this moment");
        let later = start + Duration::from_millis(50);
        assert!(table.admit(later).is_some_and(|place| place.conn.is_spare()));
        drop(spares);
        let open = table.lock();
        assert_eq!((open.spares, open.conns.len()), (0, 1));
    }
}
