//! Types from the schema of a Parquet file that its values do not show: which columns are times,
//! and in which unit.
//!
//! The decoder returns times as plain integers, so the unit must be looked up here. Paths are those
//! of the values: the names of columns and struct fields, without the layers of lists.

use parquet::basic::{ConvertedType, LogicalType, Repetition, TimeUnit, Type as PhysicalType};
use parquet::schema::types::{Type, TypePtr};

use crate::api::timestamp::Unit;

/// A column that cannot be a field of a request.
#[derive(Debug, thiserror::Error)]
pub(super) enum WrongColumn {
    /// A time in a column whose field is not a time.
    #[error(
        "column `{path}` holds times ({unit:?}), but that field is not a time; write it as text or as a number"
    )]
    NoTime {
        /// Path of the column.
        path: String,
        /// Unit of the column's times.
        unit: Unit,
    },
    /// A type that no field of a request has.
    #[error("column `{path}` is {what}, which no field of a request can be; write it as text or as a number")]
    Type {
        /// Path of the column.
        path: String,
        /// Name of the type.
        what: &'static str,
    },
}

/// Whether a column is the index of a table that pandas wrote, which no request asks for.
pub(super) fn is_index(name: &str) -> bool {
    let number = name.strip_prefix("__index_level_").and_then(|rest| rest.strip_suffix("__"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit()))
}

/// The path of a column or struct field, and the unit of its times.
type Time = (Vec<String>, Unit);

/// Lists all columns and fields that are times, with their units.
///
/// # Errors
///
/// When a column has a type that no field of a request has.
pub(super) fn times(columns: &[TypePtr]) -> Result<Vec<Time>, WrongColumn> {
    let mut found = Vec::new();
    for column in columns {
        visit(column, &mut vec![column.name().to_owned()], &mut found)?;
    }
    Ok(found)
}

fn visit(column: &Type, path: &mut Vec<String>, found: &mut Vec<Time>) -> Result<(), WrongColumn> {
    if column.is_primitive() {
        if let Some(unit) = unit(column).map_err(|what| WrongColumn::Type { path: path.join("."), what })? {
            found.push((path.clone(), unit));
        }
        return Ok(());
    }
    if let Some(element) = element(column) {
        return visit(element, path, found);
    }
    for field in column.get_fields() {
        path.push(field.name().to_owned());
        visit(field, path, found)?;
        path.pop();
    }
    Ok(())
}

/// The element type of a list. The layers of a list have no names of their own in the values.
fn element(list: &Type) -> Option<&Type> {
    if list.get_basic_info().converted_type() != ConvertedType::LIST {
        return None;
    }
    let [repeated] = list.get_fields() else { return None };
    let is_layer = repeated.is_group()
        && repeated.get_fields().len() == 1
        && repeated.get_basic_info().has_repetition()
        && repeated.get_basic_info().repetition() == Repetition::REPEATED
        && repeated.name() != "array"
        && repeated.name() != format!("{}_tuple", list.name());
    match repeated.get_fields() {
        [inner] if is_layer => Some(inner),
        _ => Some(repeated),
    }
}

/// The unit of a column of times; `None` for other columns.
fn unit(column: &Type) -> Result<Option<Unit>, &'static str> {
    let info = column.get_basic_info();
    match info.logical_type_ref() {
        Some(LogicalType::Timestamp(timestamp)) => {
            return Ok(Some(match timestamp.unit {
                TimeUnit::MILLIS => Unit::Milliseconds,
                TimeUnit::MICROS => Unit::Microseconds,
                TimeUnit::NANOS => Unit::Nanoseconds,
            }));
        }
        Some(LogicalType::Float16) => return Err("a 16-bit float"),
        Some(LogicalType::Uuid) => return Err("a UUID in bytes"),
        _ => {}
    }
    match info.converted_type() {
        ConvertedType::TIMESTAMP_MILLIS => Ok(Some(Unit::Milliseconds)),
        ConvertedType::TIMESTAMP_MICROS => Ok(Some(Unit::Microseconds)),
        ConvertedType::DATE => Ok(Some(Unit::Days)),
        ConvertedType::TIME_MILLIS | ConvertedType::TIME_MICROS => Err("a time of day"),
        ConvertedType::INTERVAL => Err("an interval"),
        ConvertedType::DECIMAL => Err("a decimal number"),
        // The old timestamps of Impala and Spark; the decoder converts them to milliseconds.
        _ if column.get_physical_type() == PhysicalType::INT96 => Ok(Some(Unit::Milliseconds)),
        _ => match info.logical_type_ref() {
            Some(LogicalType::Time { .. }) => Err("a time of day"),
            _ => Ok(None),
        },
    }
}

#[cfg(test)]
mod tests {
    use parquet::schema::parser::parse_message_type;

    use super::*;

    fn found(schema: &str) -> Result<Vec<(String, Unit)>, String> {
        let schema = parse_message_type(&format!("message rows {{ {schema} }}")).unwrap();
        let found = times(schema.get_fields()).map_err(|error| error.to_string())?;
        Ok(found.into_iter().map(|(path, unit)| (path.join("."), unit)).collect())
    }

    #[test]
    fn units_are_found_in_every_layout_of_a_list() {
        let list = |element: &str| {
            format!("OPTIONAL group history (LIST) {{ REPEATED group list {{ {element} }} }}")
        };
        let event = "OPTIONAL group element { OPTIONAL BYTE_ARRAY item_id (UTF8); OPTIONAL INT64 timestamp (TIMESTAMP(NANOS,false)); }";
        let nanos = vec![("history.timestamp".to_owned(), Unit::Nanoseconds)];
        assert_eq!(found(&list(event)), Ok(nanos.clone()));
        let two_layers = "OPTIONAL group history (LIST) { REPEATED group history_tuple { OPTIONAL INT64 timestamp (TIMESTAMP(NANOS,true)); } }";
        assert_eq!(found(two_layers), Ok(nanos));
        assert_eq!(
            found(
                "OPTIONAL INT64 query_time (TIMESTAMP_MILLIS); OPTIONAL INT96 old; OPTIONAL INT32 day (DATE); REQUIRED INT64 num_items;"
            ),
            Ok(vec![
                ("query_time".to_owned(), Unit::Milliseconds),
                ("old".to_owned(), Unit::Milliseconds),
                ("day".to_owned(), Unit::Days),
            ])
        );
    }

    #[test]
    fn types_without_a_meaning_are_named() {
        for (column, what) in [
            ("OPTIONAL INT64 query_time (TIME(NANOS,true))", "a time of day"),
            ("OPTIONAL INT32 num_items (DECIMAL(9,2))", "a decimal number"),
        ] {
            let error = found(&format!("{column};")).unwrap_err();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn only_the_index_of_pandas_is_passed_over() {
        assert!(is_index("__index_level_0__") && is_index("__index_level_12__"));
        for name in ["index", "__index_level___", "__index_level_x__", "__index_level_0"] {
            assert!(!is_index(name), "{name}");
        }
    }
}
