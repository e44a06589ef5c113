//! Moving the contents of pages to host memory and back: what the host tier needs of the page store.
//!
//! The contents are the bytes of the page as they lie in memory, layer by layer and head by head, keys before values. They
//! are moved, never converted, so a page that comes back is the same bit for bit. They mean nothing outside the store
//! that they came from: another model, number format or layout is another store with a tier of its own.

use beamline_kv_cache::{PageContents, PageId, TransferError};

use super::pages::PageStore;

impl PageContents for PageStore {
    fn page_bytes(&self) -> usize {
        let layers = (0..self.layers()).flat_map(|layer| self.layer(layer));
        layers
            .map(|head| size_of_val(head.context_keys(PageId(0))) + size_of_val(head.values(PageId(0))))
            .sum()
    }

    fn export(&self, page: PageId, mut to: &mut [u8]) -> Result<(), TransferError> {
        for head in (0..self.layers()).flat_map(|layer| self.layer(layer)) {
            for part in [head.context_keys(page), head.values(page)] {
                let bytes = bytemuck::cast_slice(part);
                let (now, later) = to.split_at_mut(bytes.len());
                now.copy_from_slice(bytes);
                to = later;
            }
        }
        assert!(to.is_empty(), "a page is exported whole");
        Ok(())
    }

    fn import(&mut self, mut from: &[u8], page: PageId) -> Result<(), TransferError> {
        for layer in 0..self.layers() {
            for head in self.layer_mut(layer) {
                for part in head.page_mut(page) {
                    let bytes: &mut [u8] = bytemuck::cast_slice_mut(part);
                    let (now, later) = from.split_at(bytes.len());
                    bytes.copy_from_slice(now);
                    from = later;
                }
            }
        }
        assert!(from.is_empty(), "a page is imported whole");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::pages::{Destination, PAGE_SIZE};

    #[test]
    fn a_page_comes_back_bit_for_bit_and_touches_no_other() {
        let (layers, heads, head_dim, value_dim) = (2, 3, 20, 18);
        let mut store = PageStore::new(layers, heads, head_dim, value_dim, 4).unwrap();
        let number = |seed: usize| f32::from_bits((seed as u32).wrapping_mul(0x9e37_79b9));
        for page in 0..4_usize {
            for offset in 0..PAGE_SIZE {
                for layer in 0..layers {
                    for (head, pages) in store.layer_mut(layer).iter_mut().enumerate() {
                        let seed = ((page * PAGE_SIZE + offset) * layers + layer) * heads + head;
                        let key: Vec<f32> = (0..head_dim).map(|i| number(seed * 64 + i)).collect();
                        let value: Vec<f32> = (0..value_dim).map(|i| number(seed * 64 + 32 + i)).collect();
                        pages.write(Destination::Context { page: PageId(page as u32), offset }, &key, &value);
                    }
                }
            }
        }
        let bytes = store.page_bytes();
        assert_eq!(
            bytes,
            PageStore::bytes_per_page_of(layers, heads, head_dim, value_dim),
            "what memory is planned with"
        );
        let copy = |store: &PageStore, page: u32| {
            let mut contents = vec![0; bytes];
            store.export(PageId(page), &mut contents).unwrap();
            contents
        };
        let before: Vec<Vec<u8>> = (0..4).map(|page| copy(&store, page)).collect();
        assert!(before[0] != before[1]);
        store.import(&before[1], PageId(3)).unwrap();
        let expected = [&before[0], &before[1], &before[2], &before[1]];
        assert!((0..4).all(|page| copy(&store, page) == *expected[page as usize]));
    }
}
