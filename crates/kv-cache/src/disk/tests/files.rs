//! Slot files: a read gives back what was written, however the bytes are damaged, or fails.

use super::*;
use crate::disk::{ReadError, entry::Entry};

#[test]
fn what_was_written_is_read_and_nothing_else() {
    let (disk, ns_a) = (with_pages(3), ns("a"));
    let (files, opened) = disk.open(b"model");
    assert_eq!((opened, files.entries(3).unwrap().len()), (Opened::Kept, 3));
    for number in 0..3 {
        let read = |slot, key, page: &HostPage| files.read(slot, key, page);
        assert_eq!(read(number, key(number), &empty(ns_a, number)).unwrap(), contents(number));
        let refused = [
            read(number, key(number), &empty(ns("b"), number)),
            read(number, key(number + 1), &empty(ns_a, number + 1)),
            read((number + 1) % 3, key(number), &empty(ns_a, number)),
        ];
        assert!(refused.iter().all(Result::is_err));
        for changed in 0..words(number).len() {
            let mut other = words(number);
            other[changed] ^= 1;
            let other = HostPage::new(ns_a, other.into(), LAYOUT.page_bytes);
            assert!(matches!(read(number, key(number), &other), Err(ReadError::Another)), "word {changed}");
        }
    }
    assert!(matches!(files.read(3, key(3), &empty(ns_a, 3)), Err(ReadError::Damaged)), "beyond the end");
}

#[test]
fn files_of_another_pool_key_version_or_size_are_emptied() {
    let disk = with_pages(2);
    let (files, opened) = disk.open(b"another model");
    assert!(matches!(opened, Opened::Replaced(why) if why.contains("another model")));
    assert_eq!(files.entries(2).unwrap(), []);
    assert!(disk.pages.copy().is_empty());
    for (at, what) in [(0, "not one of beamline's"), (16, "another version"), (24, "another size")] {
        let disk = with_pages(2);
        disk.index.bytes.lock().unwrap()[at] ^= 1;
        assert!(matches!(disk.open(b"model").1, Opened::Replaced(why) if why.contains(what)), "{what}");
    }
    // Entries of one pool are invalid in another, wherever they are put.
    let (theirs, own) = (with_pages(2), Disk::default());
    own.open(b"another model");
    let header = 4096;
    own.index.write_at(header, &theirs.index.copy()[header as usize..]).unwrap();
    assert_eq!(own.open(b"another model").0.entries(2).unwrap(), []);
}

/// Reads everything the files offer and checks that it is right. Returns how many pages there were.
fn read_all(index: &[u8], pages: &[u8], what: &str) -> usize {
    let disk = Disk { index: Memory::of(index), pages: Memory::of(pages) };
    let (files, _) = disk.open(b"model");
    let mut found = 0;
    for (slot, Entry { key: found_key, .. }) in files.entries(4).unwrap() {
        for number in 0..4 {
            if let Ok(read) = files.read(slot, found_key, &empty(ns("a"), number)) {
                assert_eq!((read, found_key), (contents(number), key(number)), "{what}");
                found += 1;
            }
        }
    }
    found
}

#[test]
fn no_damage_at_any_byte_gives_a_wrong_page() {
    let disk = with_pages(3);
    let (index, pages) = (disk.index.copy(), disk.pages.copy());
    assert_eq!(read_all(&index, &pages, "intact"), 3);
    let most = |found: usize, most: usize, what: &str| assert!(found <= most, "{what}: {found}");
    for at in 0..index.len() {
        for bits in [1, 0x80, 0xff] {
            let mut bytes = index.clone();
            bytes[at] ^= bits;
            let what = format!("index byte {at} xor {bits}");
            most(read_all(&bytes, &pages, &what), if at < 4096 { 0 } else { 2 }, &what);
        }
        let what = format!("index cut at {at}");
        most(read_all(&index[..at], &pages, &what), at.saturating_sub(4096) / 256, &what);
    }
    for at in 0..pages.len() {
        let data = 24 + 4 * words((at / 4096) as u32).len();
        // Padding is not checked.
        let (all, left) = if at % 4096 < data { (&[1, 0x80, 0xff][..], 2) } else { (&[0xff][..], 3) };
        for bits in all {
            let mut bytes = pages.clone();
            bytes[at] ^= bits;
            let what = format!("pages byte {at} xor {bits}");
            assert_eq!(read_all(&index, &bytes, &what), left, "{what}");
        }
        let what = format!("pages cut at {at}");
        most(read_all(&index, &pages[..at], &what), at.div_ceil(4096), &what);
    }
}

#[test]
fn a_write_that_a_crash_cut_anywhere_gives_the_old_page_or_none() {
    let before = with_pages(3);
    let after = Disk { index: Memory::of(&before.index.copy()), pages: Memory::of(&before.pages.copy()) };
    after.files().write(1, 9, NOW, key(3), &page(ns("a"), 3)).unwrap();
    let (old, new) = ([before.index.copy(), before.pages.copy()], [after.index.copy(), after.pages.copy()]);
    // The pieces of a write may reach the disk in any order.
    for index in 0..=256 {
        for data in 0..=64 {
            let mix = |file: usize, start: usize, count: usize| {
                let mut bytes = old[file].clone();
                bytes[start..start + count].copy_from_slice(&new[file][start..start + count]);
                bytes
            };
            let found =
                read_all(&mix(0, 4096 + 256, index), &mix(1, 4096, data), &format!("{index}, {data}"));
            assert!((2..=3).contains(&found));
        }
    }
    assert_eq!(read_all(&new[0], &new[1], "the whole write"), 3);
}
