//! Rows that a block of threads takes together, by the kernel that takes them.
//!
//! Place in the flow: the layouts of both families cut their rows into tiles. Each kernel of attention
//! comes in two kinds, for tiles of many queries and of few.
//!
//! Invariant: which of the two kinds a row goes to changes no bit of its result.

/// What of a model shapes its tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Query heads per key-value head.
    pub group: usize,
    /// Number of key-value heads.
    pub kv_heads: usize,
    /// Queries, rows times group, of a tile or item.
    pub queries: usize,
    /// Queries from which on a tile or item is one of [`Tiles::many`].
    pub few_queries: usize,
}

impl Shape {
    /// Rows of a tile.
    pub fn rows(self) -> usize {
        (self.queries / self.group).max(1)
    }

    fn is_few(self, rows: u32) -> bool {
        rows as usize * self.group <= self.few_queries
    }

    /// Cuts rows into tiles, each its first row and its length.
    pub fn cut(self, first: usize, end: usize) -> impl DoubleEndedIterator<Item = (usize, u32)> {
        let rows = self.rows();
        (first..end).step_by(rows).map(move |start| (start, rows.min(end - start) as u32))
    }

    /// The same, the last tiles first: they see most keys, so that no block is left alone at the end.
    pub fn cut_backwards(self, first: usize, end: usize) -> impl Iterator<Item = (usize, u32)> {
        self.cut(first, end).rev()
    }
}

/// Tiles, or items, by the kernel that takes them: the result is the same bit for bit, the time is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tiles<T> {
    /// Of many queries.
    pub many: Vec<T>,
    /// Of few queries.
    pub few: Vec<T>,
}

impl<T> Default for Tiles<T> {
    fn default() -> Self {
        Self { many: Vec::new(), few: Vec::new() }
    }
}

impl<T> Tiles<T> {
    /// Makes it empty and keeps its memory.
    pub fn clear(&mut self) {
        self.many.clear();
        self.few.clear();
    }

    /// Adds a tile of this number of rows.
    pub fn push(&mut self, shape: Shape, rows: u32, tile: T) {
        if shape.is_few(rows) { self.few.push(tile) } else { self.many.push(tile) }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.many.iter().chain(&self.few)
    }

    /// All of them, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.many.iter_mut().chain(&mut self.few)
    }

    /// How many there are of each kind.
    pub fn counts(&self) -> [usize; 2] {
        [self.many.len(), self.few.len()]
    }
}
