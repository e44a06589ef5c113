//! The engine beside its reference: the same random prompts through both.
//!
//! The engine computes in single precision, the reference in double. What differs by more than rounding is a fault in one
//! of them, or a machine that computes wrongly.

use std::fmt;
use std::sync::Arc;

use beamline_compute::cpu::Cpu;

use super::Reference;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::described::Described;
use crate::error::ModelError;

/// Prompts that are compared.
const PROMPTS: usize = 6;
/// Most tokens of a prompt, without the start token: the reference is slow.
pub(crate) const LONGEST: usize = 48;
/// Differences up to this part of the largest logit are rounding.
const TOLERANCE: f64 = 1e-3;

/// The engine's logits of what follows a context.
pub type EngineLogits<'a> = dyn FnMut(&[u32]) -> Result<Vec<f32>, ModelError> + 'a;

/// A family of models that say what follows a context, with two implementations.
pub trait Referenced: Described + Sized {
    /// The engine's logits of what follows a context, in single precision on the CPU, one context at a time.
    ///
    /// # Errors
    ///
    /// When tensors cannot be used.
    fn engine_logits(
        checkpoint: &Checkpoint<Self>,
        cpu: &Arc<Cpu>,
    ) -> Result<Box<EngineLogits<'static>>, ModelError>;

    /// The same model in plain candle-nn, in double precision.
    ///
    /// # Errors
    ///
    /// When tensors cannot be used.
    fn reference(checkpoint: &Checkpoint<Self>) -> Result<Box<dyn Reference>, ModelError>;
}

/// Compares the two implementations of a checkpoint. The others are as for [`verify`].
///
/// # Errors
///
/// When either fails.
pub fn verify_tokens<C: Referenced>(
    checkpoint: &Checkpoint<C>,
    cpu: &Arc<Cpu>,
    vocab_size: usize,
    start_token: Option<u32>,
) -> Result<Verified, ModelError> {
    let (mut engine, reference) = (C::engine_logits(checkpoint, cpu)?, C::reference(checkpoint)?);
    verify(&mut *engine, &*reference, vocab_size, start_token)
}

/// What came of a comparison.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verified {
    /// Prompts compared.
    pub prompts: usize,
    /// Largest difference of two logits.
    pub largest_difference: f64,
    /// Largest logit, by its size.
    pub largest_logit: f64,
}

impl Verified {
    /// Whether the two differ by rounding only.
    pub fn agrees(&self) -> bool {
        self.largest_difference <= TOLERANCE * self.largest_logit.max(1.0)
    }
}

impl fmt::Display for Verified {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { prompts, largest_difference, largest_logit } = self;
        write!(
            out,
            "{prompts} random prompts through a second implementation in double precision: logits up to {largest_logit:.1} \
             differ by at most {largest_difference:.1e}"
        )
    }
}

/// Compares the two on random prompts over a vocabulary. `start_token` ends every prompt, if there is one.
///
/// # Errors
///
/// When either fails.
pub fn verify(
    engine: &mut EngineLogits<'_>,
    reference: &dyn Reference,
    vocab_size: usize,
    start_token: Option<u32>,
) -> Result<Verified, ModelError> {
    let mut verified = Verified { prompts: PROMPTS, largest_difference: 0.0, largest_logit: 0.0 };
    let mut dice = 0x9E37_79B9_7F4A_7C15_u64;
    for prompt in 0..PROMPTS {
        let length = 1 + prompt * (LONGEST - 1) / (PROMPTS - 1);
        let mut tokens: Vec<u32> = (0..length)
            .map(|_| {
                // xorshift64 (Marsaglia 2003).
                dice ^= dice << 13;
                dice ^= dice >> 7;
                dice ^= dice << 17;
                (dice % vocab_size.max(1) as u64) as u32
            })
            .collect();
        tokens.extend(start_token);
        let (found, expected) = (engine(&tokens)?, reference.logits(&tokens)?);
        if found.len() != expected.len() {
            let message = format!("{} logits, the reference has {}", found.len(), expected.len());
            return Err(ModelError::Internal(message));
        }
        for (found, expected) in found.into_iter().zip(expected) {
            let difference = (f64::from(found) - expected).abs();
            // What is no number differs by as much as there is.
            let difference = if difference.is_nan() { f64::INFINITY } else { difference };
            verified.largest_difference = verified.largest_difference.max(difference);
            verified.largest_logit = verified.largest_logit.max(expected.abs());
        }
    }
    Ok(verified)
}
