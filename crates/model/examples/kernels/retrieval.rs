//! Exact retrieval by inner product: the sieve, the products of what passes, and the best of them.

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_model::families::hstu::retrieval::{ItemTable, TopItems};

use crate::case::{Case, Kernel};
use crate::peaks::Instruction;
use crate::products::numbers;

const ITEMS: usize = 100_000;
const WIDTH: usize = 64;
const COUNT: usize = 100;

struct Retrieval {
    format: WeightFormat,
    /// Packed for the first threads and instructions; how does not depend on them.
    table: Option<ItemTable>,
    users: Vec<f32>,
}

impl Kernel for Retrieval {
    fn prepare(&mut self, cpu: &Cpu) {
        self.table.get_or_insert_with(|| {
            let rows = numbers(ITEMS * WIDTH);
            ItemTable::new(cpu, &rows, WIDTH, 1e-6, 1, self.format).expect("items")
        });
    }

    fn run(&mut self, cpu: &Cpu) {
        let Some(table) = &self.table else { return };
        let allowed = |item: u32| !item.is_multiple_of(3);
        let asked = vec![TopItems { count: COUNT, allowed: &allowed }; self.users.len() / WIDTH];
        table.top(cpu, &self.users, &asked);
    }
}

/// One user, whose time goes into reading the table, and many.
pub(crate) fn cases() -> Vec<Case> {
    let case = |format: WeightFormat, users: usize| Case {
        family: "retrieval",
        format: format.name(),
        shape: format!("{COUNT} of {ITEMS} x {WIDTH}, {users} users"),
        differs_at: &["portable", "avx2", "avx512"],
        instruction: Some(match format {
            WeightFormat::Q8_0 => Instruction::Bytes,
            WeightFormat::F32 | WeightFormat::Bf16 => Instruction::MultiplyAdd,
        }),
        operations: (2 * users * ITEMS * WIDTH) as f64,
        demand: None,
        kernel: Box::new(Retrieval { format, table: None, users: numbers(users * WIDTH) }),
    };
    let formats = [WeightFormat::F32, WeightFormat::Q8_0];
    formats.into_iter().flat_map(|format| [1, 32].map(|users| case(format, users))).collect()
}
