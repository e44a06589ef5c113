//! What one input may cost.

use std::time::Duration;

/// Longest time. Generous, because the machine may be busy: what hangs or grows without bound takes longer.
pub const TIME: Duration = Duration::from_secs(20);

/// Most memory by which one input may grow the process.
pub const MEMORY: usize = 512 << 20;

/// Longest input that is made.
pub const INPUT: usize = 64 << 10;
