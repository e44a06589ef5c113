//! Checks records one by one and builds a catalog from the good ones, or an error from the bad ones.
//!
//! Everything that can be wrong with a record is found before any part of the record is stored. So
//! a bad record leaves no trace except its entry in the error (and perhaps codes in a codebook that
//! is then discarded).

use crate::catalog::Parts;
use crate::codebook::CodebookBuilder;
use crate::line_map::LineMap;
use crate::order::SymbolPaths;
use crate::strings::{Interned, Interner, StringTable};
use crate::tags::TagTableBuilder;
use crate::trie::{self, Leaf};
use crate::version::ContentHasher;
use crate::{
    BadRecord, Catalog, CatalogError, CatalogLimits, ItemRecord, Place, RecordProblem, RecordUnit, SidPart,
    SymbolTable,
};

/// A catalog under construction.
pub(crate) struct CatalogBuilder<'a> {
    symbols: &'a dyn SymbolTable,
    limits: &'a CatalogLimits,
    /// Taken from the symbol table if known there, else from the first good record.
    depth: Option<usize>,
    ids: Interner,
    titles: Titles,
    tags: TagTableBuilder,
    codebook: CodebookBuilder,
    paths: SymbolPaths,
    version: ContentHasher,
    lines: LineMap,
    bad: Vec<BadRecord>,
    num_bad_unlisted: u64,
    /// Scratch: the symbol path of the current record.
    path: Vec<u32>,
}

impl<'a> CatalogBuilder<'a> {
    pub(crate) fn new(symbols: &'a dyn SymbolTable, limits: &'a CatalogLimits) -> Self {
        Self {
            symbols,
            limits,
            depth: symbols.depth(),
            ids: Interner::default(),
            titles: Titles::default(),
            tags: TagTableBuilder::default(),
            codebook: CodebookBuilder::default(),
            paths: SymbolPaths::default(),
            version: ContentHasher::default(),
            lines: LineMap::default(),
            bad: Vec::new(),
            num_bad_unlisted: 0,
            path: Vec::new(),
        }
    }

    /// Adds the record found at `place`, or notes what is wrong with it. The only error here is a
    /// catalog that is too large as a whole.
    pub(crate) fn push(
        &mut self,
        place: Place,
        record: Result<ItemRecord, RecordProblem>,
    ) -> Result<(), CatalogError> {
        if self.ids.len() >= self.limits.max_items as usize {
            return Err(CatalogError::TooManyItems { place, limit: self.limits.max_items });
        }
        if let Err(problem) = record.and_then(|record| self.add(place, &record)) {
            if self.bad.len() < self.limits.max_listed_problems {
                self.bad.push(BadRecord { place, problem, alike: 0 });
            } else if let Some(same) = self.bad.iter_mut().find(|bad| bad.problem == problem) {
                same.alike += 1;
            } else {
                self.num_bad_unlisted += 1;
            }
        }
        Ok(())
    }

    fn add(&mut self, place: Place, record: &ItemRecord) -> Result<(), RecordProblem> {
        self.check_texts(record)?;
        self.check_depth(record.sid.len())?;
        self.codebook.translate(&record.sid, self.symbols, &mut self.path)?;
        let item = match self.ids.intern(&record.item_id) {
            Interned::New(item) => item,
            Interned::Known(other) => {
                let first = Place { number: self.lines.line_of(other), ..place };
                return Err(RecordProblem::DuplicateItemId { item_id: record.item_id.clone(), first });
            }
        };

        self.lines.push(item, place.number);
        self.depth = Some(record.sid.len());
        self.paths.push(&self.path);
        self.titles.push(record.title.as_deref().unwrap_or_default());
        let mut tags: Vec<&str> = record.tags.iter().map(String::as_str).collect();
        tags.sort_unstable();
        tags.dedup();
        self.version.add(&record.item_id, &self.path, tags.iter().copied());
        self.tags.push(&tags);
        Ok(())
    }

    fn check_texts(&self, record: &ItemRecord) -> Result<(), RecordProblem> {
        let limits = self.limits;
        let fits = |field, text: &str, limit| match text.len() {
            bytes if bytes > limit => Err(RecordProblem::TextTooLong { field, bytes, limit }),
            _ => Ok(()),
        };
        if record.item_id.is_empty() {
            return Err(RecordProblem::EmptyItemId);
        }
        fits("item_id", &record.item_id, limits.max_item_id_bytes)?;
        fits("title", record.title.as_deref().unwrap_or_default(), limits.max_title_bytes)?;
        if record.tags.len() > limits.max_tags_per_item {
            return Err(RecordProblem::TooManyTags {
                got: record.tags.len(),
                limit: limits.max_tags_per_item,
            });
        }
        record.tags.iter().try_for_each(|tag| fits("tags", tag, limits.max_tag_bytes))?;
        record.sid.iter().try_for_each(|part| match part {
            SidPart::Code(_) => Ok(()),
            SidPart::Token(text) => fits("sid", text, limits.max_token_bytes),
        })
    }

    fn check_depth(&self, got: usize) -> Result<(), RecordProblem> {
        let limit = self.limits.max_depth;
        match self.depth {
            _ if got == 0 => Err(RecordProblem::EmptySid),
            Some(expected) if got != expected => Err(RecordProblem::WrongDepth { expected, got }),
            _ if got > usize::from(limit) => Err(RecordProblem::SidTooDeep { got, limit }),
            _ => Ok(()),
        }
    }

    /// Builds the catalog, if every record was good.
    pub(crate) fn finish(self) -> Result<Catalog, CatalogError> {
        if !self.bad.is_empty() || self.num_bad_unlisted > 0 {
            return Err(CatalogError::BadRecords { listed: self.bad, omitted: self.num_bad_unlisted });
        }
        if self.ids.len() == 0 {
            return Err(CatalogError::Empty);
        }
        let mut ids = self.ids;
        ids.shrink_to_fit();
        let items_by_leaf = self.paths.sorted_items();
        let (trie, leaf_items) = trie::build(&self.paths, &items_by_leaf);
        // The paths are the largest table that is needed only up to here.
        drop(self.paths);
        let mut leaf_of = vec![Leaf(0); items_by_leaf.len()];
        for leaf in 0..leaf_items.len() {
            for position in leaf_items.range(leaf) {
                leaf_of[items_by_leaf[position as usize].0 as usize] = Leaf(leaf);
            }
        }
        Ok(Catalog::from_parts(Parts {
            version: self.version.finish(),
            ids,
            titles: self.titles.finish(),
            tags: self.tags.finish(),
            codebook: self.codebook.finish(),
            trie,
            leaf_of,
            leaf_items,
            items_by_leaf,
            tag_filter_cache_bytes: self.limits.tag_filter_cache_bytes,
        }))
    }
}

/// Titles of all items; empty for as long as no item has one.
#[derive(Debug, Default)]
struct Titles {
    table: StringTable,
    num_without: u32,
}

impl Titles {
    fn push(&mut self, title: &str) {
        if title.is_empty() && self.table.len() == 0 {
            self.num_without += 1;
            return;
        }
        if self.table.len() == 0 {
            (0..self.num_without).for_each(|_| self.table.push(""));
        }
        self.table.push(title);
    }

    fn finish(mut self) -> Option<StringTable> {
        self.table.shrink_to_fit();
        (self.table.len() > 0).then_some(self.table)
    }
}

/// Builds a catalog from records in memory.
pub(crate) fn from_records(
    records: impl IntoIterator<Item = ItemRecord>,
    symbols: &dyn SymbolTable,
    limits: &CatalogLimits,
) -> Result<Catalog, CatalogError> {
    let mut builder = CatalogBuilder::new(symbols, limits);
    for (record, number) in records.into_iter().zip(1..) {
        builder.push(Place { unit: RecordUnit::Record, number }, Ok(record))?;
    }
    builder.finish()
}
