//! From ids, actions and times to the rows before the first layer, one part per variant.
//!
//! ```text
//! research   x[i] = (item, with its action) * scale + position[i];  zero where the item is padding
//! dlrm       x[i] = (content MLP + additional MLP + action MLP, or a contextual slot) * scale
//!                   + position[p] + time[b]
//! nvidia     x[i] = (contextual | item | action) * scale + position[min(i, last)]
//! ```
//!
//! Positions of `dlrm` count back from the end of the history, and its times from the query. So its
//! context serves one request only.
//!
//! What must not be here: layers, pages.

use std::collections::BTreeMap;
use std::ops::Range;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::linear::{Linear, Rows, WeightFormat};
use beamline_compute::cpu::parallel::write;
use beamline_compute::cpu::time_buckets::square_root_bucket;

use super::config::{
    Combine, DlrmInput, HstuConfig, NvidiaInput, ResearchInput, StackConfig, TimeClamp, VariantConfig,
};
use super::inputs::Prepared;
use super::layer_tensors::out_in;
use super::mlp::{Swish, SwishShape, apply};
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;
use crate::families::hstu::config::Layout;

const ITEMS: &str = "_embedding_module._item_emb.weight";
const ACTIONS: &str = "_embedding_module._action_emb.weight";
const RATINGS: &str = "_input_features_preproc._rating_emb.weight";
const POSITIONS: &str = "_input_features_preproc._pos_emb.weight";
const DLRM_TABLES: &str = "_embedding_collection.embeddings.";
const PREPROCESSOR: &str = "_hstu_transducer._input_preprocessor.";
const POSITION_ENCODER: &str = "_hstu_transducer._positional_encoder.";
const NVIDIA_TABLES: &str = "_embedding_collection._data_parallel_embedding_collection.embeddings.";
const NVIDIA_POSITIONS: &str = "_hstu_block._preprocessor._positional_encoder._position_embeddings_weight";

/// A table of rows.
#[derive(Debug)]
pub(crate) struct Table {
    width: usize,
    values: Vec<f32>,
}

impl Table {
    pub(crate) fn load(tensors: &Tensors, name: &str) -> Result<Self, ModelError> {
        let tensor = tensors.load(name)?;
        let (_, width) = tensor.dims2()?;
        Ok(Self { width, values: tensor.flatten_all()?.to_vec1()? })
    }

    #[inline]
    pub(crate) fn row(&self, id: usize) -> &[f32] {
        &self.values[id * self.width..][..self.width]
    }

    fn bytes(&self) -> usize {
        4 * self.values.len()
    }
}

/// What turns a request into rows.
#[derive(Debug)]
pub(crate) enum Embedder {
    Research(Research),
    Dlrm(Box<Dlrm>),
    Nvidia(Nvidia),
}

impl Embedder {
    /// Names and shapes of the tensors it needs.
    pub(crate) fn expect(config: &HstuConfig, expected: &mut BTreeMap<String, Vec<usize>>) {
        match &config.variant {
            VariantConfig::Research(input, _) => Research::expect(input, &config.stack, expected),
            VariantConfig::Dlrm(input, _) => Dlrm::expect(input, &config.stack, expected),
            VariantConfig::Nvidia(input, _) => Nvidia::expect(input, &config.stack, expected),
        }
    }

    pub(crate) fn load(
        config: &HstuConfig,
        tensors: &Tensors,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        Ok(match &config.variant {
            VariantConfig::Research(input, _) => {
                Self::Research(Research::load(input, &config.stack, tensors)?)
            }
            VariantConfig::Dlrm(input, _) => {
                Self::Dlrm(Box::new(Dlrm::load(input, &config.stack, tensors, format)?))
            }
            VariantConfig::Nvidia(input, _) => Self::Nvidia(Nvidia::load(input, &config.stack, tensors)?),
        })
    }

    /// Appends the rows of some positions of a context.
    pub(crate) fn context(&self, cpu: &Cpu, request: &Prepared, positions: Range<usize>, out: &mut Vec<f32>) {
        match self {
            Self::Research(research) => {
                each_row(cpu, positions.len(), research.positions.width, out, |index, out| {
                    research.event(request, positions.start + index, out);
                });
            }
            Self::Dlrm(dlrm) => dlrm.context(cpu, request, positions, out),
            Self::Nvidia(nvidia) => {
                each_row(cpu, positions.len(), nvidia.positions.width, out, |index, out| {
                    nvidia.event(request, positions.start + index, out);
                });
            }
        }
    }

    /// Appends the rows of some candidates.
    pub(crate) fn candidates(
        &self,
        cpu: &Cpu,
        request: &Prepared,
        candidates: Range<usize>,
        out: &mut Vec<f32>,
    ) {
        match self {
            Self::Research(_) => unreachable!("a prepared request of this variant has no candidates"),
            Self::Dlrm(dlrm) => dlrm.candidates(cpu, request, candidates, out),
            Self::Nvidia(nvidia) => {
                let items = &request.request.candidates.items[candidates];
                each_row(cpu, items.len(), nvidia.positions.width, out, |index, out| {
                    let table = &nvidia.config.item_table;
                    nvidia.row(table, items[index], request.context_len(), out);
                });
            }
        }
    }

    /// Appends the rows of generated tokens, all at one position.
    pub(crate) fn tokens(&self, tokens: &[u32], position: usize, out: &mut Vec<f32>) {
        match self {
            Self::Research(research) => {
                let (start, width) = (out.len(), research.positions.width);
                out.resize(start + tokens.len() * width, 0.0);
                for (&token, out) in tokens.iter().zip(out[start..].chunks_exact_mut(width)) {
                    research.row(token, research.generated, position, out);
                }
            }
            Self::Dlrm(_) | Self::Nvidia(_) => unreachable!("a model of this variant has no token head"),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Research(research) => {
                research.items.bytes()
                    + research.positions.bytes()
                    + research.actions.as_ref().map_or(0, |(table, _)| table.bytes())
            }
            Self::Dlrm(dlrm) => {
                let tables: usize = dlrm.tables.values().map(Table::bytes).sum();
                let mlps = dlrm.content.bytes() + dlrm.additional.bytes() + dlrm.action.bytes();
                let slots: usize = dlrm.slots.iter().map(Linear::bytes).sum();
                tables + mlps + slots + dlrm.positions.bytes() + dlrm.times.bytes()
            }
            Self::Nvidia(nvidia) => {
                nvidia.tables.values().map(Table::bytes).sum::<usize>() + nvidia.positions.bytes()
            }
        }
    }

    /// The item table of the research variant.
    pub(crate) fn items_name() -> &'static str {
        ITEMS
    }

    /// Embeddings of a feature of a candidate, `dlrm` only.
    pub(crate) fn dlrm(&self) -> Option<&Dlrm> {
        match self {
            Self::Dlrm(dlrm) => Some(dlrm),
            _ => None,
        }
    }
}

/// Rows that are worth a task of their own.
const ROWS_PER_TASK: usize = 16;

/// Appends `count` rows; `row` fills in each. Most of the time is spent waiting for the memory of a
/// table, so threads share the rows.
fn each_row(
    cpu: &Cpu,
    count: usize,
    width: usize,
    out: &mut Vec<f32>,
    row: impl Fn(usize, &mut [f32]) + Sync,
) {
    let start = out.len();
    out.resize(start + count * width, 0.0);
    cpu.each_part(write(&mut out[start..], ROWS_PER_TASK * width), |task, rows| {
        for (index, out) in rows.chunks_exact_mut(width).enumerate() {
            row(task * ROWS_PER_TASK + index, out);
        }
    });
}

/// `row * scale + position`.
fn positioned<'a>(row: impl Iterator<Item = &'a f32>, scale: f32, position: &[f32], out: &mut [f32]) {
    for ((out, x), position) in out.iter_mut().zip(row).zip(position) {
        *out = x * scale + position;
    }
}

#[derive(Debug)]
pub(crate) struct Research {
    items: Table,
    actions: Option<(Table, Combine)>,
    generated: u32,
    positions: Table,
    padding: Option<u32>,
    scale: f32,
}

impl Research {
    fn expect(input: &ResearchInput, stack: &StackConfig, expected: &mut BTreeMap<String, Vec<usize>>) {
        expected.insert(ITEMS.into(), vec![input.num_items + 1, input.item_dim(stack)]);
        expected.insert(POSITIONS.into(), vec![input.position.rows, stack.model_dim]);
        if let (Some(actions), (_, Some(name), _)) = (input.actions, Self::tables(input)) {
            expected.insert(name.into(), vec![actions.count, actions.dim]);
        }
    }

    /// What its tables are called: items, actions, positions.
    pub(crate) fn tables(input: &ResearchInput) -> (&'static str, Option<&'static str>, &'static str) {
        let actions = input.actions.map(|actions| match actions.combine {
            Combine::Add => ACTIONS,
            Combine::Concat => RATINGS,
        });
        (ITEMS, actions, POSITIONS)
    }

    fn load(input: &ResearchInput, stack: &StackConfig, tensors: &Tensors) -> Result<Self, ModelError> {
        let (items, actions, positions) = Self::tables(input);
        let combine = input.actions.map(|actions| actions.combine);
        let actions = actions.map(|name| Table::load(tensors, name)).transpose()?;
        Ok(Self {
            items: Table::load(tensors, items)?,
            actions: actions.zip(combine),
            generated: input.actions.map_or(0, |actions| actions.generated),
            positions: Table::load(tensors, positions)?,
            padding: input.padding_id,
            scale: input.position.scale.value(stack),
        })
    }

    fn event(&self, request: &Prepared, position: usize, out: &mut [f32]) {
        let events = &request.request.events;
        let action = events.actions.get(position).copied().unwrap_or_default();
        self.row(events.items[position], action, position, out);
    }

    fn row(&self, item: u32, action: u32, position: usize, out: &mut [f32]) {
        let position = self.positions.row(position);
        if self.padding == Some(item) {
            // The row of the padding item is not zero in checkpoints.
            out.fill(0.0);
            return;
        }
        let item = self.items.row(item as usize);
        match &self.actions {
            None => positioned(item.iter(), self.scale, position, out),
            Some((actions, Combine::Concat)) => {
                let row = item.iter().chain(actions.row(action as usize));
                positioned(row, self.scale, position, out);
            }
            Some((actions, Combine::Add)) => {
                let row = item.iter().zip(actions.row(action as usize)).zip(position);
                for (out, ((x, action), position)) in out.iter_mut().zip(row) {
                    *out = (x + action) * self.scale + position;
                }
            }
        }
    }
}

#[derive(Debug)]
pub(crate) struct Dlrm {
    config: DlrmInput,
    width: usize,
    tables: BTreeMap<String, Table>,
    content: Swish,
    additional: Swish,
    action: Swish,
    /// Embeddings of the actions, `[action][dim]`.
    actions: Table,
    target_action: Vec<f32>,
    /// One per contextual slot.
    slots: Vec<Linear>,
    positions: Table,
    times: Table,
    highest_time: usize,
    scale: f32,
}

impl Dlrm {
    fn mlps(input: &DlrmInput, stack: &StackConfig) -> [(&'static str, SwishShape); 3] {
        let shape = |inputs: usize| SwishShape {
            inputs,
            hidden: input.hidden_dim,
            outputs: stack.model_dim,
            normed: true,
        };
        [
            ("_content_embedding_mlp", shape(input.embedding_dim)),
            ("_additional_embedding_mlp", shape((input.features.len() - 1) * input.embedding_dim)),
            ("_action_embedding_mlp", shape(input.action_weights.len() * input.action_dim)),
        ]
    }

    fn expect(input: &DlrmInput, stack: &StackConfig, expected: &mut BTreeMap<String, Vec<usize>>) {
        for table in &input.tables {
            expected
                .insert(format!("{DLRM_TABLES}{}.weight", table.name), vec![table.rows, input.embedding_dim]);
        }
        for (name, shape) in Self::mlps(input, stack) {
            shape.expect(&format!("{PREPROCESSOR}{name}"), expected);
        }
        let (actions, slots) = (input.action_weights.len(), input.slots());
        let mut add = |name: &str, shape: Vec<usize>| {
            expected.insert(name.to_owned(), shape);
        };
        let encoder = format!("{PREPROCESSOR}_action_encoder.");
        add(&format!("{encoder}_action_embedding_table"), vec![actions, input.action_dim]);
        add(&format!("{encoder}_target_action_embedding_table"), vec![1, actions * input.action_dim]);
        if slots > 0 {
            let shape = vec![slots, input.embedding_dim, stack.model_dim];
            add(&format!("{PREPROCESSOR}_batched_contextual_linear_weights"), shape);
            add(&format!("{PREPROCESSOR}_batched_contextual_linear_bias"), vec![slots, stack.model_dim]);
        }
        add(
            &format!("{POSITION_ENCODER}_position_embeddings_weight"),
            vec![input.position.rows, stack.model_dim],
        );
        add(
            &format!("{POSITION_ENCODER}_timestamp_embeddings_weight"),
            vec![input.time.rows, stack.model_dim],
        );
    }

    /// The buffer of the action bits, which the configuration holds too.
    pub(crate) const ACTION_WEIGHTS: &str =
        "_hstu_transducer._input_preprocessor._action_encoder._combined_action_weights";

    fn load(
        input: &DlrmInput,
        stack: &StackConfig,
        tensors: &Tensors,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let name = Self::ACTION_WEIGHTS;
        let expected: Vec<i64> = input.action_weights.iter().copied().map(i64::from).collect();
        if let Some(stored) = tensors.integers(name)?.filter(|stored| *stored != expected) {
            return Err(ModelError::Mismatch(vec![format!(
                "{name} is {stored:?}, input.action_weights is {expected:?}"
            )]));
        }
        let mlps = Self::mlps(input, stack);
        let mlp = |index: usize| {
            let (name, shape) = mlps[index];
            Swish::load(tensors, &format!("{PREPROCESSOR}{name}"), shape, input.norm_eps, format)
        };
        let mut slots = Vec::new();
        if input.slots() > 0 {
            let weights = tensors.load(&format!("{PREPROCESSOR}_batched_contextual_linear_weights"))?;
            let biases = tensors.load(&format!("{PREPROCESSOR}_batched_contextual_linear_bias"))?;
            for slot in 0..input.slots() {
                let weight = out_in(weights.get(slot)?, Layout::InOut)?;
                slots.push(Linear::pack(&[weight], Some(&[biases.get(slot)?]), format)?);
            }
        }
        let encoder = format!("{PREPROCESSOR}_action_encoder.");
        let table = |name: &str| Table::load(tensors, name);
        Ok(Self {
            width: stack.model_dim,
            tables: input
                .tables
                .iter()
                .map(|entry| Ok((entry.name.clone(), table(&format!("{DLRM_TABLES}{}.weight", entry.name))?)))
                .collect::<Result<_, ModelError>>()?,
            content: mlp(0)?,
            additional: mlp(1)?,
            action: mlp(2)?,
            actions: table(&format!("{encoder}_action_embedding_table"))?,
            target_action: table(&format!("{encoder}_target_action_embedding_table"))?.values,
            slots,
            positions: table(&format!("{POSITION_ENCODER}_position_embeddings_weight"))?,
            times: table(&format!("{POSITION_ENCODER}_timestamp_embeddings_weight"))?,
            highest_time: match input.time.clamp {
                TimeClamp::Rows => input.time.rows - 1,
                TimeClamp::ModelDim => (stack.model_dim - 1).min(input.time.rows - 1),
            },
            scale: input.position.scale.value(stack),
            config: input.clone(),
        })
    }

    /// The table that a feature's ids are rows of.
    pub(crate) fn feature(&self, name: &str) -> Option<(usize, &Table)> {
        let index = self.config.features.iter().position(|feature| feature.name == name)?;
        Some((index, self.tables.get(&self.config.features[index].table)?))
    }

    fn table(&self, name: &str) -> &Table {
        match self.tables.get(name) {
            Some(table) => table,
            None => unreachable!("the configuration was checked: there is a table {name:?}"),
        }
    }

    /// Content and additional features of events or candidates, summed.
    fn contents(&self, cpu: &Cpu, items: &[u32], additional: &[Vec<u32>], range: Range<usize>) -> Vec<f32> {
        let count = range.len();
        let features = &self.config.features;
        let table = self.table(&features[0].table);
        let mut content = Vec::with_capacity(count * self.config.embedding_dim);
        items[range.clone()].iter().for_each(|&id| content.extend_from_slice(table.row(id as usize)));
        let mut x = self.content.forward(cpu, &content, count);
        let mut others = Vec::with_capacity(count * (features.len() - 1) * self.config.embedding_dim);
        for index in range {
            for (feature, ids) in features[1..].iter().zip(additional) {
                others.extend_from_slice(self.table(&feature.table).row(ids[index] as usize));
            }
        }
        add(&mut x, &self.additional.forward(cpu, &others, count));
        x
    }

    fn context(&self, cpu: &Cpu, request: &Prepared, positions: Range<usize>, out: &mut Vec<f32>) {
        let (given, slots) = (&request.request, self.slots.len());
        let last_time = given.query_time;
        let mut rows = Rows::default();
        for slot in positions.start..positions.end.min(slots) {
            let x = match request.slots[slot] {
                Some(id) => self.table(&self.slot_table(slot)).row(id as usize).to_vec(),
                None => vec![0.0; self.config.embedding_dim],
            };
            let x = apply(cpu, &self.slots[slot], &x, &mut rows);
            // Contextual rows have the time 0.
            self.push(out, &x, slot, last_time);
        }
        let events = positions.start.max(slots) - slots..positions.end.max(slots) - slots;
        if events.is_empty() {
            return;
        }
        let history = &given.events;
        let mut x = self.contents(cpu, &history.items, &history.additional, events.clone());
        let mut actions = Vec::with_capacity(events.len() * self.target_action.len());
        for event in events.clone() {
            for (index, bits) in self.config.action_weights.iter().enumerate() {
                let done = history.actions[event] & bits != 0;
                actions.extend(self.actions.row(index).iter().map(|x| if done { *x } else { 0.0 }));
            }
        }
        add(&mut x, &self.action.forward(cpu, &actions, events.len()));
        for (event, x) in events.zip(x.chunks_exact(self.width)) {
            let position = request.context_len() - (event + slots) + slots;
            self.push(out, x, position, last_time - history.times[event]);
        }
    }

    fn candidates(&self, cpu: &Cpu, request: &Prepared, candidates: Range<usize>, out: &mut Vec<f32>) {
        let given = &request.request.candidates;
        let mut x = self.contents(cpu, &given.items, &given.additional, candidates.clone());
        let actions = self.target_action.repeat(candidates.len());
        add(&mut x, &self.action.forward(cpu, &actions, candidates.len()));
        for x in x.chunks_exact(self.width) {
            self.push(out, x, self.slots.len(), 0);
        }
    }

    /// Appends a row, scaled, with its position and its age.
    fn push(&self, out: &mut Vec<f32>, x: &[f32], position: usize, age: i64) {
        let position = self.positions.row(position.min(self.config.position.rows - 1));
        let bucket = square_root_bucket(age, self.config.time.divisor as f32, self.highest_time);
        let time = self.times.row(bucket);
        out.extend(x.iter().zip(position).zip(time).map(|((x, p), t)| x * self.scale + p + t));
    }

    fn slot_table(&self, slot: usize) -> String {
        let mut slots = self.config.contextual.iter().flat_map(|c| std::iter::repeat_n(&c.table, c.slots));
        slots.nth(slot).cloned().unwrap_or_default()
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

#[derive(Debug)]
pub(crate) struct Nvidia {
    config: NvidiaInput,
    tables: BTreeMap<String, Table>,
    positions: Table,
    scale: f32,
}

impl Nvidia {
    fn expect(input: &NvidiaInput, stack: &StackConfig, expected: &mut BTreeMap<String, Vec<usize>>) {
        for table in &input.tables {
            expected
                .insert(format!("{NVIDIA_TABLES}{}.weight", table.name), vec![table.rows, stack.model_dim]);
        }
        expected.insert(NVIDIA_POSITIONS.into(), vec![input.position.rows, stack.model_dim]);
    }

    fn load(input: &NvidiaInput, stack: &StackConfig, tensors: &Tensors) -> Result<Self, ModelError> {
        let table = |name: &str| Table::load(tensors, &format!("{NVIDIA_TABLES}{name}.weight"));
        Ok(Self {
            tables: input
                .tables
                .iter()
                .map(|entry| Ok((entry.name.clone(), table(&entry.name)?)))
                .collect::<Result<_, ModelError>>()?,
            positions: Table::load(tensors, NVIDIA_POSITIONS)?,
            scale: input.position.scale.value(stack),
            config: input.clone(),
        })
    }

    fn row(&self, table: &str, id: u32, position: usize, out: &mut [f32]) {
        let Some(table) = self.tables.get(table) else {
            unreachable!("the configuration was checked: there is a table {table:?}")
        };
        let position = self.positions.row(position.min(self.config.position.rows - 1));
        positioned(table.row(id as usize).iter(), self.scale, position, out);
    }

    fn event(&self, request: &Prepared, position: usize, out: &mut [f32]) {
        let (contextual, events) = (&request.contextual_rows, &request.request.events);
        if let Some(&(feature, id)) = contextual.get(position) {
            return self.row(&self.config.contextual[feature as usize].table, id, position, out);
        }
        let row = position - contextual.len();
        let (table, id) = match &self.config.action_table {
            None => (&self.config.item_table, events.items[row]),
            Some(_) if row.is_multiple_of(2) => (&self.config.item_table, events.items[row / 2]),
            Some(actions) => (actions, events.actions[row / 2]),
        };
        self.row(table, id, position, out);
    }
}
