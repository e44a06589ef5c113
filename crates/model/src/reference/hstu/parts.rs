//! Norms, products and MLPs that the variants of HSTU are made of. Any type, any device.

use candle_core::{D, Module, Result, Tensor};
use candle_nn::ops::sigmoid;
use candle_nn::{LayerNorm, Linear, VarBuilder, linear};

use crate::families::hstu::config::{Layout, Normalization};

/// Layer norm over the last dimension (Ba et al. 2016), with weight and bias where there are any.
#[derive(Debug)]
pub(super) struct Norm {
    /// Without the bias: candle's kernel for both computes in single precision, whatever the type
    /// is.
    norm: LayerNorm,
    bias: Option<Tensor>,
}

impl Norm {
    /// A norm with the tensors `{name}weight` and `{name}bias`, `[width]`.
    pub(super) fn affine(width: usize, eps: f64, vb: &VarBuilder<'_>, name: &str) -> Result<Self> {
        let [weight, bias] = ["weight", "bias"].map(|part| vb.get(width, &format!("{name}{part}")));
        Ok(Self { norm: LayerNorm::new_no_bias(weight?, eps), bias: Some(bias?) })
    }

    /// A norm without tensors.
    pub(super) fn plain(eps: f64, vb: &VarBuilder<'_>) -> Result<Self> {
        let one = Tensor::ones(1, vb.dtype(), vb.device())?;
        Ok(Self { norm: LayerNorm::new_no_bias(one, eps), bias: None })
    }

    /// The same with one weight and one bias for each head, for rows `[rows, heads, dim]`.
    pub(super) fn of_heads(self) -> Result<Self> {
        let Some(bias) = self.bias else { return Ok(self) };
        let norm = LayerNorm::new_no_bias(self.norm.weight().unsqueeze(1)?, self.norm.eps());
        Ok(Self { norm, bias: Some(bias.unsqueeze(1)?) })
    }
}

impl Module for Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.norm.forward(x)?;
        self.bias.as_ref().map_or(Ok(x.clone()), |bias| x.broadcast_add(bias))
    }
}

/// `x / max(|x|, eps)` of each row.
pub(super) fn unit(x: &Tensor, eps: f64) -> Result<Tensor> {
    x.broadcast_div(&x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(eps)?)
}

/// What is done to a final state.
#[derive(Debug)]
pub(super) enum Final {
    /// Division by the length, or by this if that is more.
    Unit(f64),
    /// A layer norm.
    Norm(Norm),
    /// Nothing at all.
    Same,
}

impl Final {
    /// As a configuration has it.
    pub(super) fn new(normalization: Normalization, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(match normalization {
            Normalization::L2 { eps } => Self::Unit(eps),
            Normalization::LayerNorm { eps } => Self::Norm(Norm::plain(eps, vb)?),
            Normalization::None {} => Self::Same,
        })
    }
}

impl Module for Final {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Unit(eps) => unit(x, *eps),
            Self::Norm(norm) => norm.forward(x),
            Self::Same => Ok(x.clone()),
        }
    }
}

/// A weight that lies in a file as `layout` says, as `[to, from]`.
pub(super) fn weight(
    [from, to]: [usize; 2],
    layout: Layout,
    vb: &VarBuilder<'_>,
    name: &str,
) -> Result<Tensor> {
    match layout {
        Layout::InOut => vb.get((from, to), name)?.t()?.contiguous(),
        Layout::OutIn => vb.get((to, from), name),
    }
}

/// `Linear -> x * sigmoid(norm(x)) -> Linear (-> norm)`: tensors `0`, `1`, `2` (and `3`).
#[derive(Debug)]
pub(super) struct SwishMlp {
    first: Linear,
    inner: Norm,
    second: Linear,
    norm: Option<Norm>,
}

impl SwishMlp {
    /// From `inputs` over `hidden` to `outputs`. One of no inputs reads a column of zeros.
    pub(super) fn new(
        [inputs, hidden, outputs]: [usize; 3],
        eps: f64,
        normed: bool,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let first = match inputs {
            0 => {
                let weight = Tensor::zeros((hidden, 1), vb.dtype(), vb.device())?;
                Linear::new(weight, Some(vb.get(hidden, "0.bias")?))
            }
            _ => linear(inputs, hidden, vb.pp(0))?,
        };
        let norm = if normed { Some(Norm::affine(outputs, eps, vb, "3.")?) } else { None };
        let inner = Norm::affine(hidden, eps, vb, "1.")?;
        Ok(Self { first, inner, second: linear(hidden, outputs, vb.pp(2))?, norm })
    }
}

impl Module for SwishMlp {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.first.forward(x)?;
        let x = (&x * sigmoid(&self.inner.forward(&x)?)?)?;
        let x = self.second.forward(&x)?;
        self.norm.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(&x))
    }
}
