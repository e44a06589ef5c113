//! Moving the contents of pages to host memory and back: what the host tier needs of the page store.
//!
//! The contents are the bytes of the page as they lie in memory, layer by layer and head by head, keys
//! before values. They are moved, never converted, so a page that comes back is the same bit for bit.
//! They have a meaning only in the store that they came from: another model, number format or layout is
//! another store with a tier of its own.

use beamline_kv_cache::{PageContents, PageId, TransferError};

use super::pages::PageStore;

impl PageContents for PageStore {
    fn page_bytes(&self) -> usize {
        self.shape().page_bytes()
    }

    fn export(&self, page: PageId, mut to: &mut [u8]) -> Result<(), TransferError> {
        self.for_each_part(page, |part| {
            let (now, later) = std::mem::take(&mut to).split_at_mut(part.len());
            now.copy_from_slice(part);
            to = later;
        });
        assert!(to.is_empty(), "a page is exported whole");
        Ok(())
    }

    fn import(&mut self, mut from: &[u8], page: PageId) -> Result<(), TransferError> {
        self.for_each_part_mut(page, |part| {
            let (now, later) = from.split_at(part.len());
            part.copy_from_slice(now);
            from = later;
        });
        assert!(from.is_empty(), "a page is imported whole");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::kv_format::KvFormat;
    use crate::cpu::pages::{Destination, PAGE_SIZE, PageShape};

    #[test]
    fn a_page_comes_back_bit_for_bit_and_touches_no_other() {
        for format in KvFormat::ALL {
            let shape = PageShape { format, layers: 2, heads: 3, key_dim: 20, value_dim: 18 };
            let mut store = PageStore::new(shape, 4).unwrap();
            let number = |seed: usize| f32::from_bits((seed as u32).wrapping_mul(0x9e37_79b9));
            for (place, layer) in (0..4 * PAGE_SIZE).flat_map(|place| (0..2).map(move |layer| (place, layer)))
            {
                for head in 0..3 {
                    let seed = (place * 2 + layer) * 3 + head;
                    let key: Vec<f32> = (0..20).map(|i| number(seed * 64 + i)).collect();
                    let value: Vec<f32> = (0..18).map(|i| number(seed * 64 + 32 + i)).collect();
                    let (page, offset) = (PageId((place / PAGE_SIZE) as u32), place % PAGE_SIZE);
                    store.write(layer, head, Destination::Context { page, offset }, &key, &value);
                }
            }
            let bytes = store.page_bytes();
            assert_eq!(bytes, format.bytes() * 2 * 3 * PAGE_SIZE * (20 + 32), "what memory is planned with");
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
}
