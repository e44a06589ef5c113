//! Maps a SID part as written to the `u32` symbol that the trie stores.
//!
//! The trie only compares symbols. So their numeric order is the order of leaves, and the rule that
//! breaks ties of equal score. A model maps parts to token ids; [`WrittenSymbols`] serves without a
//! model.

use std::collections::BTreeSet;
use std::path::Path;

use hashbrown::HashMap;

use crate::read;
use crate::{CatalogError, CatalogLimits, ItemRecord, SidPart};

/// Gives every SID part of every level its symbol.
///
/// Within a level, different parts must have different symbols; a catalog that uses two parts with
/// the same symbol is refused. A catalog asks once per distinct part and level, so a lookup need
/// not be fast.
pub trait SymbolTable {
    /// The number of levels, if it is known without looking at a catalog.
    fn depth(&self) -> Option<usize>;

    /// The symbol of `part` at `level` (counted from 0), or `None` if the level has no such part.
    fn symbol(&self, level: usize, part: &SidPart) -> Option<u32>;

    /// What to write instead of a part that the level does not have. It becomes the end of an error
    /// message.
    fn advice(&self, level: usize, part: &SidPart) -> Option<String> {
        let _ = level;
        let SidPart::Token(text) = part else { return None };
        text.parse::<u32>().ok().map(|code| format!("it is text: write the code as an integer, {code}"))
    }
}

/// Symbols taken from the catalog itself: a code is its own symbol; the token strings of a level
/// are numbered in sorted order.
#[derive(Clone, Debug, Default)]
pub struct WrittenSymbols {
    /// Numbers of the token strings of each level; no entry for levels written in codes.
    tokens: Vec<HashMap<SidPart, u32>>,
}

impl WrittenSymbols {
    /// For catalogs written in integer codes: every code is known, and no token string is.
    pub fn codes() -> Self {
        Self::default()
    }

    /// Reads a file once to learn its token strings. Skips bad records: reading the catalog reports
    /// them.
    ///
    /// # Errors
    ///
    /// If the file as a whole cannot be read.
    pub fn scan_path(path: &Path, limits: &CatalogLimits) -> Result<Self, CatalogError> {
        let mut scan = Scan::default();
        read::for_each_record(path, limits, &mut |_, record| {
            if let Ok(record) = record
                && record.sid.len() <= usize::from(limits.max_depth)
            {
                scan.add(&record);
            }
            Ok(())
        })?;
        Ok(scan.finish())
    }

    /// Learns the token strings of records in memory.
    pub fn scan_records<'a>(records: impl IntoIterator<Item = &'a ItemRecord>) -> Self {
        let mut scan = Scan::default();
        records.into_iter().for_each(|record| scan.add(record));
        scan.finish()
    }
}

impl SymbolTable for WrittenSymbols {
    fn depth(&self) -> Option<usize> {
        None
    }

    fn symbol(&self, level: usize, part: &SidPart) -> Option<u32> {
        match part {
            SidPart::Code(code) => Some(*code),
            SidPart::Token(_) => self.tokens.get(level)?.get(part).copied(),
        }
    }
}

/// The distinct token strings of each level.
#[derive(Default)]
struct Scan {
    levels: Vec<BTreeSet<SidPart>>,
}

impl Scan {
    fn add(&mut self, record: &ItemRecord) {
        for (level, part) in record.sid.iter().enumerate() {
            if matches!(part, SidPart::Code(_)) {
                continue;
            }
            if self.levels.len() <= level {
                self.levels.resize_with(level + 1, BTreeSet::new);
            }
            if !self.levels[level].contains(part) {
                self.levels[level].insert(part.clone());
            }
        }
    }

    fn finish(self) -> WrittenSymbols {
        let number = |parts: BTreeSet<SidPart>| parts.into_iter().zip(0..).collect();
        WrittenSymbols { tokens: self.levels.into_iter().map(number).collect() }
    }
}
