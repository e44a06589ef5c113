//! HSTU by its equations, in double precision, one row after the other over a whole sequence: no pages,
//! no blocks, no tiles. It reads constants from the JSON and tensors by name. With the code under test
//! it shares only the table of time buckets.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "every test uses its own part")]

use beamline_compute::cpu::time_buckets::bucket;
use serde_json::Value;

use super::hstu::Tensors;

pub type Row = Vec<f64>;

pub struct Naive<'a> {
    pub config: &'a Value,
    pub tensors: &'a Tensors,
}

pub fn layer_norm(x: &[f64], eps: f64) -> Row {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
    x.iter().map(|x| (x - mean) / (variance + eps).sqrt()).collect()
}

pub fn l2(x: &[f64], eps: f64) -> Row {
    let length = x.iter().map(|x| x * x).sum::<f64>().sqrt().max(eps);
    x.iter().map(|x| x / length).collect()
}

pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

impl Naive<'_> {
    pub fn vector(&self, name: &str) -> Row {
        self.tensors[name].1.iter().map(|&x| f64::from(x)).collect()
    }

    pub fn row(&self, name: &str, index: usize) -> Row {
        let (shape, values) = &self.tensors[name];
        values[index * shape[1]..(index + 1) * shape[1]].iter().map(|&x| f64::from(x)).collect()
    }

    /// `x` times a matrix, stored `[in, out]` or `[out, in]`.
    pub fn product(&self, x: &[f64], name: &str, in_out: bool) -> Row {
        let (shape, values) = &self.tensors[name];
        let (outputs, inputs) = if in_out { (shape[1], shape[0]) } else { (shape[0], shape[1]) };
        assert_eq!(inputs, x.len());
        let weight = |input: usize, output: usize| {
            f64::from(if in_out { values[input * outputs + output] } else { values[output * inputs + input] })
        };
        (0..outputs).map(|output| (0..inputs).map(|input| x[input] * weight(input, output)).sum()).collect()
    }

    pub fn affine(&self, x: Row, weight: &str, bias: &str) -> Row {
        let (weight, bias) = (self.vector(weight), self.vector(bias));
        x.iter().zip(weight).zip(bias).map(|((x, w), b)| x * w + b).collect()
    }

    fn number(&self, name: &str) -> usize {
        self.config["stack"][name].as_u64().unwrap() as usize
    }

    /// All layers of a variant without affine input of its own. `sees(row, column)` says which rows a
    /// row sees; `times[row + 1]` is the time of the prediction of a row.
    pub fn layers(
        &self,
        mut x: Vec<Row>,
        sees: &dyn Fn(usize, usize) -> bool,
        next: &[i64],
        times: &[i64],
        positions: &[usize],
    ) -> Vec<Row> {
        let stack = &self.config["stack"];
        let (heads, dqk, dv) = (self.number("heads"), self.number("key_dim"), self.number("value_dim"));
        let nvidia = self.config["hstu_variant"] == "nvidia";
        let in_out = stack["uvqk_layout"] == "in_out";
        let divisor = stack["attention_divisor"].as_f64().unwrap();
        let scale = stack["logit_scale"].as_f64().unwrap_or(1.0 / (dqk as f64).sqrt());
        let eps = stack["input_norm"]["eps"].as_f64().unwrap();
        for layer in 0..self.number("layers") {
            let prefix = if nvidia {
                format!("_hstu_block._attention_layers.{layer}.")
            } else {
                format!("_hstu._attention_layers.{layer}.")
            };
            let name = |name: &str| format!("{prefix}{name}");
            let (uvqk, projection) = match (nvidia, in_out) {
                (false, _) => ("_uvqk", "_o.weight"),
                (true, true) => ("_linear_uvqk_weight", "_linear_proj_weight"),
                (true, false) => ("_linear_uvqk.weight", "_linear_proj.weight"),
            };
            let mut parts: Vec<[Row; 4]> = Vec::new();
            for x in &x {
                let mut normed = layer_norm(x, eps);
                if stack["input_norm"]["affine"] == true {
                    normed =
                        self.affine(normed, &name("_input_layernorm_weight"), &name("_input_layernorm_bias"));
                }
                let mut h = self.product(&normed, &name(uvqk), in_out);
                if nvidia {
                    let bias = if in_out { "_linear_uvqk_bias" } else { "_linear_uvqk.bias" };
                    h.iter_mut().zip(self.vector(&name(bias))).for_each(|(h, b)| *h += b);
                }
                h.iter_mut().for_each(|h| *h = silu(*h));
                let (u, rest) = h.split_at(heads * dv);
                let (v, rest) = rest.split_at(heads * dv);
                let (q, k) = rest.split_at(heads * dqk);
                parts.push([u.to_vec(), v.to_vec(), q.to_vec(), k.to_vec()]);
            }
            let bias = (!nvidia).then(|| {
                (self.vector(&name("_rel_attn_bias._pos_w")), self.vector(&name("_rel_attn_bias._ts_w")))
            });
            let mut out = Vec::new();
            for i in 0..x.len() {
                let mut a = vec![0.0; heads * dv];
                for head in 0..heads {
                    for j in (0..x.len()).filter(|&j| sees(i, j)) {
                        let (q, k) = (&parts[i][2][head * dqk..][..dqk], &parts[j][3][head * dqk..][..dqk]);
                        let mut s = scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
                        if let Some((pos, ts)) = &bias {
                            let n = pos.len().div_ceil(2);
                            s += pos[n - 1 + positions[j] - positions[i]] + ts[bucket(next[i] - times[j])];
                        }
                        let p = silu(s) / divisor;
                        for d in 0..dv {
                            a[head * dv + d] += p * parts[j][1][head * dv + d];
                        }
                    }
                }
                let mut n = layer_norm(&a, stack["output_norm"]["eps"].as_f64().unwrap());
                if nvidia {
                    n = self.affine(n, &name("_output_layernorm_weight"), &name("_output_layernorm_bias"));
                }
                let y: Row = n.iter().zip(&parts[i][0]).map(|(n, u)| n * u).collect();
                let mut next = self.product(&y, &name(projection), nvidia && in_out);
                if !nvidia {
                    next.iter_mut().zip(self.vector(&name("_o.bias"))).for_each(|(x, b)| *x += b);
                }
                if stack["residual"] == true {
                    next.iter_mut().zip(&x[i]).for_each(|(next, x)| *next += x);
                }
                out.push(next);
            }
            x = out;
        }
        x
    }
}
