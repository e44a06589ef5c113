//! Which part of a computed context another request may use. It is a property of the model,
//! enforced where pages are matched and published.

/// Which positions of a context have KV that another request may use.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug)]
pub enum ReuseClass {
    /// Decoder-only: KV of a position depends on the positions up to it and on nothing else.
    CrossRequest,
    /// HSTU research: the last row's bias depends on the time of the query, so the last row is
    /// always recomputed.
    CrossRequestMinusLast,
    /// HSTU production: positions count back from the end, so one more action changes every row.
    WithinRequest,
    /// Encoder-decoder: every row attends to the whole history, so only an identical history hits.
    ///
    /// No *prefix* of such a context is reusable, but the context as a whole is. Match and publish
    /// it in [`Namespace::narrowed_to`](crate::Namespace::narrowed_to) its words, which no other
    /// context can address, with the words padded to whole pages. A match that covers less than all
    /// of them (the tail was evicted) is useless: release it and compute the context anew.
    Exact,
}

impl ReuseClass {
    /// How many leading positions of a context of `context_len` positions may be matched and
    /// published in the model's namespace. The cache rounds this down to whole pages.
    pub fn reusable_positions(self, context_len: usize) -> usize {
        match self {
            Self::CrossRequest => context_len,
            Self::CrossRequestMinusLast => context_len.saturating_sub(1),
            Self::WithinRequest | Self::Exact => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ReuseClass;

    #[test]
    fn positions_by_class() {
        let of = |class: ReuseClass| [0, 1, 64].map(|len| class.reusable_positions(len));
        assert_eq!(of(ReuseClass::CrossRequest), [0, 1, 64]);
        assert_eq!(of(ReuseClass::CrossRequestMinusLast), [0, 0, 63]);
        assert_eq!(of(ReuseClass::WithinRequest), [0, 0, 0]);
        assert_eq!(of(ReuseClass::Exact), [0, 0, 0]);
    }
}
