//! The source line of each accepted item, to name both places of a duplicate id.
//!
//! Items mostly come from consecutive lines, so only the breaks (blank and refused lines) are
//! stored. The map lives only while the catalog is read.

/// Line number per item, as runs of consecutive lines.
#[derive(Debug, Default)]
pub(crate) struct LineMap {
    /// Each run as (first item of the run, its line).
    runs: Vec<(u32, u64)>,
}

impl LineMap {
    /// Records that `item`, the next in order, came from `line`.
    pub(crate) fn push(&mut self, item: u32, line: u64) {
        if self.runs.last().is_none_or(|&(first, start)| start + u64::from(item - first) != line) {
            self.runs.push((item, line));
        }
    }

    /// The line of an item that was already pushed.
    pub(crate) fn line_of(&self, item: u32) -> u64 {
        let (first, start) = self.runs[self.runs.partition_point(|&(first, _)| first <= item) - 1];
        start + u64::from(item - first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_lines_across_gaps() {
        let lines = [1, 2, 5, 6, 7, 20];
        let mut map = LineMap::default();
        lines.iter().enumerate().for_each(|(item, &line)| map.push(item as u32, line));
        assert_eq!(map.runs.len(), 3);
        assert!(lines.iter().enumerate().all(|(item, &line)| map.line_of(item as u32) == line));
    }
}
