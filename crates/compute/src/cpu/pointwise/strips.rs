//! Blocks that continue each other, taken as one, so that keys and values are read from far away
//! less often.

use crate::cpu::attention::{Block, Sees};

/// Most blocks of a strip.
pub(super) const TALLEST_STRIP: usize = 4;

/// Joins at most `most` blocks at a time that continue each other: rows that follow, of the same
/// context.
pub(super) fn strips_of(blocks: &[Block], most: usize) -> Vec<Block> {
    let mut strips: Vec<Block> = Vec::with_capacity(blocks.len().div_ceil(most));
    let mut joined = 0;
    for block in blocks {
        if let Some(strip) = strips.last_mut().filter(|strip| joined < most && continues(strip, block)) {
            strip.rows.end = block.rows.end;
            joined += 1;
        } else {
            strips.push(block.clone());
            joined = 1;
        }
    }
    strips
}

/// Whether the rows of a block could as well be the next rows of another.
fn continues(before: &Block, block: &Block) -> bool {
    let rows = before.rows.len();
    let seen = match (&before.sees, &block.sees) {
        (Sees::Causal { first_position: first }, Sees::Causal { first_position }) => {
            first + rows == *first_position
        }
        (
            Sees::Branch { context_len, ancestors, lineage, branch_pages },
            Sees::Branch { context_len: other_len, ancestors: others, lineage: next, branch_pages: pages },
        ) => {
            (context_len, ancestors, branch_pages) == (other_len, others, pages)
                && lineage + rows * ancestors == *next
        }
        _ => false,
    };
    seen && before.rows.end == block.rows.start && before.context_pages == block.context_pages
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    fn causal(rows: Range<usize>, first_position: usize) -> Block {
        Block { rows, context_pages: 0..20, sees: Sees::Causal { first_position } }
    }

    #[test]
    fn blocks_are_joined_only_where_one_continues_the_other() {
        let branch = |rows: Range<usize>, lineage| Block {
            rows,
            context_pages: 0..20,
            sees: Sees::Branch { context_len: 640, ancestors: 2, lineage, branch_pages: 20..24 },
        };
        let other = Block { context_pages: 24..44, ..causal(106..110, 106) };
        let blocks = [
            causal(0..10, 22),
            causal(10..42, 32),
            causal(42..74, 64),
            // Another position, another context, another kind.
            causal(74..106, 128),
            other,
            branch(110..142, 0),
            branch(142..150, 64),
            branch(150..152, 0),
        ];
        let rows = |most| strips_of(&blocks, most).into_iter().map(|strip| strip.rows).collect::<Vec<_>>();
        assert_eq!(rows(3), [0..74, 74..106, 106..110, 110..150, 150..152]);
        assert_eq!(rows(2), [0..42, 42..74, 74..106, 106..110, 110..150, 150..152]);
        assert_eq!(strips_of(&blocks, 1), blocks);
    }
}
