//! The engine beside its reference: the same random prompts through both.
//!
//! The engine computes in single precision, the reference in double. What differs by more than
//! rounding is a fault in one of them, or a machine that computes wrongly.

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
    /// Number of requests compared.
    pub requests: usize,
    /// Largest difference of two outputs.
    pub largest_difference: f64,
    /// Largest output, by its size.
    pub largest_output: f64,
    /// Differences up to this part of the largest output, or of one, are rounding.
    pub tolerance: f64,
}

impl Verified {
    /// A comparison of nothing yet.
    pub(crate) fn new(tolerance: f64) -> Self {
        Self { requests: 0, largest_difference: 0.0, largest_output: 0.0, tolerance }
    }

    /// Whether the two differ by rounding only.
    pub fn agrees(&self) -> bool {
        self.largest_difference <= self.tolerance * self.largest_output.max(1.0)
    }

    /// Adds the outputs of a request.
    ///
    /// # Errors
    ///
    /// When there are not as many of both.
    pub(crate) fn add(&mut self, found: &[f32], expected: &[f64]) -> Result<(), ModelError> {
        if found.len() != expected.len() {
            let message = format!("{} outputs, the reference has {}", found.len(), expected.len());
            return Err(ModelError::Internal(message));
        }
        self.requests += 1;
        for (&found, expected) in found.iter().zip(expected) {
            let difference = (f64::from(found) - expected).abs();
            // What is no number differs by as much as there is.
            let difference = if difference.is_nan() { f64::INFINITY } else { difference };
            self.largest_difference = self.largest_difference.max(difference);
            self.largest_output = self.largest_output.max(expected.abs());
        }
        Ok(())
    }
}

impl fmt::Display for Verified {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requests, largest_difference, largest_output, .. } = self;
        write!(
            out,
            "{requests} random requests through a second implementation in double precision: outputs up to \
             {largest_output:.1} differ by at most {largest_difference:.1e}"
        )
    }
}

/// Random numbers, the same in every run: xorshift64 (Marsaglia 2003).
pub(crate) struct Dice(u64);

impl Dice {
    /// Dice of a fixed seed.
    pub(crate) fn new() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }

    /// A number below `count`; 0 if that is 0.
    pub(crate) fn below(&mut self, count: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % count.max(1) as u64) as usize
    }
}

/// Compares the two on random prompts over a vocabulary. `start_token` ends every prompt, if there
/// is one.
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
    let (mut verified, mut dice) = (Verified::new(TOLERANCE), Dice::new());
    for prompt in 0..PROMPTS {
        let length = 1 + prompt * (LONGEST - 1) / (PROMPTS - 1);
        let mut tokens: Vec<u32> = (0..length).map(|_| dice.below(vocab_size) as u32).collect();
        tokens.extend(start_token);
        verified.add(&engine(&tokens)?, &reference.logits(&tokens)?)?;
    }
    Ok(verified)
}
