//! The content version of a catalog.
//!
//! Two catalogs have the same version when they hold the same items in the same order, with the
//! same symbols and tags: everything that decides which items an answer contains. Titles and the
//! form of the file decide nothing and are left out.

/// Size of the buffer, in bytes: enough to hash with wide instructions, small enough to stay in the
/// cache.
const BUFFER_BYTES: usize = 64 << 10;

/// Digests the items of a catalog, in order.
#[derive(Debug, Default)]
pub(crate) struct ContentHasher {
    hasher: blake3::Hasher,
    /// Buffers the records, which are short: the hash is several times faster over long inputs.
    buffer: Vec<u8>,
}

impl ContentHasher {
    /// Adds an item. `tags` are sorted and without repetitions. Every text is preceded by its
    /// length and every list by its count, so that different contents cannot give the same bytes.
    pub(crate) fn add<'a>(
        &mut self,
        item_id: &str,
        path: &[u32],
        tags: impl ExactSizeIterator<Item = &'a str>,
    ) {
        self.text(item_id);
        self.number(path.len());
        path.iter().for_each(|symbol| self.buffer.extend_from_slice(&symbol.to_le_bytes()));
        self.number(tags.len());
        tags.for_each(|tag| self.text(tag));
        if self.buffer.len() >= BUFFER_BYTES {
            self.hasher.update(&self.buffer);
            self.buffer.clear();
        }
    }

    /// The version: 16 hexadecimal digits.
    pub(crate) fn finish(mut self) -> String {
        self.hasher.update(&self.buffer);
        let digest = self.hasher.finalize().to_hex();
        digest.as_str().chars().take(16).collect()
    }

    fn text(&mut self, text: &str) {
        self.number(text.len());
        self.buffer.extend_from_slice(text.as_bytes());
    }

    fn number(&mut self, n: usize) {
        self.buffer.extend_from_slice(&(n as u64).to_le_bytes());
    }
}
