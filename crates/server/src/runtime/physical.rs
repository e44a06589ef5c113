//! How much memory there is: the machine's, or the limit of this process's control group (a container)
//! if that is less.
//!
//! Place in the flow: asked once at start-up, when no `--model-memory` was given.
//!
//! Invariant: what cannot be read is no limit, and no error; the answer is a default, not a promise.

use std::fs;
use std::path::Path;

/// The share of the memory that models may take unless the settings say otherwise: three quarters. The
/// rest is for the system and for what is not counted, see `docs/OPERATIONS.md`.
const SHARE: (usize, usize) = (3, 4);

/// Memory for all models when none is named; `None` where the system does not say what it has.
pub fn default_budget() -> Option<usize> {
    memory(Path::new("/")).map(|bytes| bytes / SHARE.1 * SHARE.0)
}

/// Bytes of memory, from the files under `root`: `proc/meminfo` and the control groups of this process
/// and their parents, of both versions.
fn memory(root: &Path) -> Option<usize> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let limits = groups.lines().filter_map(|line| {
        // `number:controllers:path`; version 2 has no controllers there.
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let (mount, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            list if list.split(',').any(|name| name == "memory") => {
                ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => return None,
        };
        // Inside a container the path may be that of the host, which is not there; the mount point is.
        let path = Path::new(path.trim_start_matches('/'));
        path.ancestors().filter_map(|group| number(&root.join(mount).join(group).join(file))).min()
    });
    total(root).into_iter().chain(limits).min()
}

/// A file that holds one number. `max` is none, which is what it means.
fn number(path: &Path) -> Option<usize> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn total(root: &Path) -> Option<usize> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const TOTAL: (&str, &str) = ("proc/meminfo", "MemFree:  7 kB\nMemTotal:       4096 kB\n");

    #[test]
    fn the_smallest_limit_counts() {
        let memory = |files: &[(&str, &str)]| memory(machine(files).path());
        assert_eq!(memory(&[]), None);
        assert_eq!(memory(&[TOTAL]), Some(4096 << 10));
        // Version 2: the parent is narrower than the group itself.
        let second = [
            TOTAL,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/memory.max", "1000000\n"),
        ];
        assert_eq!(memory(&second), Some(1_000_000));
        // Version 1 in a container: the path of the group is not there.
        let first = [
            TOTAL,
            ("proc/self/cgroup", "9:cpu:/x\n4:memory,hugetlb:/docker/0123\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000\n"),
        ];
        assert_eq!(memory(&first), Some(2_000_000));
        // No limit is written as a very large one.
        let unlimited = [
            TOTAL,
            ("proc/self/cgroup", "4:memory:/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ];
        assert_eq!(memory(&unlimited), Some(4096 << 10));
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(!cfg!(target_os = "linux") || default_budget().is_some_and(|bytes| bytes > 1 << 20));
    }
}
