//! The metrics of a process that Prometheus' own clients report, under the same names: memory, CPU
//! time, open files, start.
//!
//! Invariant: numbers that the system does not provide are left out. All of them come from /proc,
//! so there are none on other systems than Linux.

/// The numbers of this process at one moment.
#[cfg(target_os = "linux")]
struct Numbers {
    resident_bytes: u64,
    virtual_bytes: u64,
    cpu_seconds: u64,
    threads: i64,
    /// Start of the process, in seconds since 1970.
    start: Option<f64>,
    open_files: Option<usize>,
}

#[cfg(target_os = "linux")]
impl Numbers {
    fn read() -> Option<Self> {
        let process = procfs::process::Process::myself().ok()?;
        let stat = process.stat().ok()?;
        let ticks = procfs::ticks_per_second();
        let start = |boot: u64| boot as f64 + stat.starttime as f64 / ticks as f64;
        Some(Self {
            resident_bytes: stat.rss.saturating_mul(procfs::page_size()),
            virtual_bytes: stat.vsize,
            cpu_seconds: stat.utime.saturating_add(stat.stime) / ticks.max(1),
            threads: stat.num_threads,
            start: procfs::boot_time_secs().ok().map(start),
            open_files: process.fd_count().ok(),
        })
    }
}

/// Registers the descriptions of the metrics.
pub(super) fn describe() {
    use metrics::{describe_counter, describe_gauge};
    describe_gauge!("process_resident_memory_bytes", "Memory of the process that is in RAM.");
    describe_gauge!("process_virtual_memory_bytes", "Address space of the process.");
    describe_counter!("process_cpu_seconds_total", "CPU time of the process, in whole seconds.");
    describe_gauge!("process_threads", "Threads of the process.");
    describe_gauge!("process_start_time_seconds", "When the process started, in seconds since 1970.");
    describe_gauge!("process_open_fds", "Open file descriptors, connections among them.");
    describe_gauge!("process_max_fds", "Most file descriptors that may be open.");
}

/// Copies the current numbers.
pub(super) fn publish() {
    use metrics::gauge;
    if let Ok(most) = rlimit::Resource::NOFILE.get_soft() {
        gauge!("process_max_fds").set(most as f64);
    }
    #[cfg(target_os = "linux")]
    if let Some(numbers) = Numbers::read() {
        gauge!("process_resident_memory_bytes").set(numbers.resident_bytes as f64);
        gauge!("process_virtual_memory_bytes").set(numbers.virtual_bytes as f64);
        metrics::counter!("process_cpu_seconds_total").absolute(numbers.cpu_seconds);
        gauge!("process_threads").set(numbers.threads as f64);
        if let Some(start) = numbers.start {
            gauge!("process_start_time_seconds").set(start);
        }
        if let Some(open) = numbers.open_files {
            gauge!("process_open_fds").set(open as f64);
        }
    }
}
