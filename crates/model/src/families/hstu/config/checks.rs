//! Ranges that sizes, scales and tables must lie in, in words that name the field.

use serde::{Deserialize, Deserializer};

use super::{ContextualConfig, TableConfig};

/// Largest value accepted for a size, so that products of sizes cannot overflow.
pub(super) const MAX_SIZE: usize = 1 << 24;

/// Most rows of a table of ids.
pub(super) const MAX_ROWS: usize = 1 << 31;

/// Largest factor or divisor: seconds of many years.
const MAX_FACTOR: f64 = 1e12;

/// Most levels of a semantic ID.
pub(super) const MAX_LEVELS: usize = 64;

/// A field that may be null and must be there.
pub(super) fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    from: D,
) -> Result<Option<T>, D::Error> {
    Option::deserialize(from)
}

pub(super) fn size(name: &str, value: usize) -> Result<(), String> {
    in_range(name, value, MAX_SIZE)
}

pub(super) fn in_range(name: &str, value: usize, most: usize) -> Result<(), String> {
    if (1..=most).contains(&value) { Ok(()) } else { Err(format!("{name} is {value}, expected 1 to {most}")) }
}

/// A factor or divisor: more than 0 in single precision, and no more than any model has.
pub(super) fn positive(name: &str, value: f64) -> Result<(), String> {
    most(name, value, MAX_FACTOR)
}

/// What keeps a divisor from zero.
pub(super) fn epsilon(name: &str, value: f64) -> Result<(), String> {
    most(name, value, 1.0)
}

fn most(name: &str, value: f64, most: f64) -> Result<(), String> {
    if value as f32 > 0.0 && value <= most {
        Ok(())
    } else {
        Err(format!("{name} is {value}, expected more than 0 and at most {most}"))
    }
}

pub(super) fn require(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.to_owned()) }
}

pub(super) fn check_tables(tables: &[TableConfig], used: &[&str]) -> Result<(), String> {
    if let Some(name) = used.iter().find(|name| tables.iter().all(|table| table.name != **name)) {
        return Err(format!("input.tables has no table {name:?}"));
    }
    for (index, table) in tables.iter().enumerate() {
        in_range(&format!("input.tables: rows of {}", table.name), table.rows, MAX_ROWS)?;
        let first = tables.iter().position(|other| other.name == table.name);
        require(first == Some(index), &format!("input.tables names {} twice", table.name))?;
        require(used.contains(&table.name.as_str()), &format!("input.tables: nothing uses {}", table.name))?;
    }
    Ok(())
}

pub(super) fn check_contextual(contextual: &[ContextualConfig]) -> Result<(), String> {
    contextual
        .iter()
        .try_for_each(|feature| in_range(&format!("slots of {}", feature.name), feature.slots, 4096))
}
