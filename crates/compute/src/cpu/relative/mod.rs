//! Attention with a relative bias (T5): the numbers by distance, whole sequences, and branch rows.
//!
//! ```text
//! bias     a number for each head and distance
//! whole    all rows of a sequence see each other: an encoder
//! branch   a row sees the start row, its ancestors and itself: a decoder
//! ```

pub mod bias;
pub mod branch;
pub mod whole;
