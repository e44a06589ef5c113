//! Parquet catalogs, written here column by column as common tools lay them out.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use beamline_catalog::{
    Catalog, CatalogError, CatalogLimits, ItemIndex, Place, RecordProblem, RecordUnit, SidPart,
    WrittenSymbols,
};
use parquet::data_type::{ByteArray, ByteArrayType, Int32Type, Int64Type};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;

/// The values of a column. Lists are optional lists of optional elements, the layout of Arrow and pandas.
enum Column<'a> {
    Texts(Vec<Option<&'a str>>),
    Integers(Vec<i64>),
    IntegerLists(Vec<Option<Vec<i32>>>),
    TextLists(Vec<Option<Vec<&'a str>>>),
}

impl Column<'_> {
    fn declaration(&self, name: &str) -> String {
        let list = |element| {
            format!("OPTIONAL group {name} (LIST) {{ REPEATED group list {{ OPTIONAL {element}; }} }}")
        };
        match self {
            Self::Texts(_) => format!("OPTIONAL BYTE_ARRAY {name} (UTF8);"),
            Self::Integers(_) => format!("REQUIRED INT64 {name};"),
            Self::IntegerLists(_) => list("INT32 element"),
            Self::TextLists(_) => list("BYTE_ARRAY element (UTF8)"),
        }
    }

    fn write(&self, group: &mut SerializedRowGroupWriter<'_, fs::File>) {
        let mut column = group.next_column().unwrap().unwrap();
        match self {
            Self::Texts(texts) => {
                let values: Vec<ByteArray> = texts.iter().flatten().map(|&text| text.into()).collect();
                let defined: Vec<i16> = texts.iter().map(|text| i16::from(text.is_some())).collect();
                column.typed::<ByteArrayType>().write_batch(&values, Some(&defined), None).unwrap();
            }
            Self::Integers(values) => {
                column.typed::<Int64Type>().write_batch(values, None, None).unwrap();
            }
            Self::IntegerLists(lists) => {
                let (values, defined, repeated) = flatten(lists);
                column.typed::<Int32Type>().write_batch(&values, Some(&defined), Some(&repeated)).unwrap();
            }
            Self::TextLists(lists) => {
                let (values, defined, repeated) = flatten(lists);
                let values: Vec<ByteArray> = values.into_iter().map(ByteArray::from).collect();
                column
                    .typed::<ByteArrayType>()
                    .write_batch(&values, Some(&defined), Some(&repeated))
                    .unwrap();
            }
        }
        column.close().unwrap();
    }
}

/// Values with definition levels (0 no list, 1 empty list, 3 a value) and repetition levels (1
/// continues a list).
fn flatten<T: Clone>(lists: &[Option<Vec<T>>]) -> (Vec<T>, Vec<i16>, Vec<i16>) {
    let (mut values, mut defined, mut repeated) = (Vec::new(), Vec::new(), Vec::new());
    for list in lists {
        match list.as_deref() {
            None => (defined.push(0), repeated.push(0)),
            Some([]) => (defined.push(1), repeated.push(0)),
            Some(elements) => {
                values.extend_from_slice(elements);
                defined.extend(elements.iter().map(|_| 3));
                repeated.extend((0..elements.len()).map(|i| i16::from(i > 0)));
                ((), ())
            }
        };
    }
    (values, defined, repeated)
}

struct File {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

/// Writes the columns as one row group per call of the outer slice.
fn write(row_groups: &[&[(&str, Column<'_>)]]) -> File {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("catalog.parquet");
    let columns: String = row_groups[0].iter().map(|(name, column)| column.declaration(name)).collect();
    let schema = Arc::new(parse_message_type(&format!("message schema {{ {columns} }}")).unwrap());
    let mut writer =
        SerializedFileWriter::new(fs::File::create(&path).unwrap(), schema, Default::default()).unwrap();
    for columns in row_groups {
        let mut group = writer.next_row_group().unwrap();
        columns.iter().for_each(|(_, column)| column.write(&mut group));
        group.close().unwrap();
    }
    writer.close().unwrap();
    File { _directory: directory, path }
}

fn read(path: &Path) -> Result<Catalog, CatalogError> {
    let limits = CatalogLimits::default();
    let symbols = WrittenSymbols::scan_path(path, &limits)?;
    Catalog::read_path(path, &symbols, &limits)
}

#[test]
fn reads_back_what_was_written() {
    let file = write(&[
        &[
            ("price", Column::Integers(vec![3, 4])),
            ("item_id", Column::Texts(vec![Some("a"), Some("b")])),
            ("sid", Column::IntegerLists(vec![Some(vec![1, 2]), Some(vec![1, 0])])),
            ("tags", Column::TextLists(vec![Some(vec!["new", "toys"]), None])),
            ("title", Column::Texts(vec![None, Some("B")])),
        ],
        &[
            ("price", Column::Integers(vec![5])),
            ("item_id", Column::Texts(vec![Some("c")])),
            ("sid", Column::IntegerLists(vec![Some(vec![1, 2])])),
            ("tags", Column::TextLists(vec![Some(vec![])])),
            ("title", Column::Texts(vec![None])),
        ],
    ]);
    let catalog = read(&file.path).unwrap();
    assert_eq!((catalog.num_items(), catalog.num_leaves()), (3, 2));
    assert_eq!(catalog.items_of(catalog.leaf_of(ItemIndex(0))), [ItemIndex(0), ItemIndex(2)]);
    assert!(catalog.tags(ItemIndex(0)).eq(["new", "toys"]));
    assert_eq!((catalog.tags(ItemIndex(1)).len(), catalog.title(ItemIndex(1))), (0, Some("B")));

    let lines = r#"{"item_id": "a", "sid": [1, 2], "tags": ["toys", "new"]}
{"item_id": "b", "sid": [1, 0], "title": "B"}
{"item_id": "c", "sid": [1, 2]}"#;
    let as_lines = file.path.with_extension("jsonl");
    fs::write(&as_lines, lines).unwrap();
    assert_eq!(read(&as_lines).unwrap().version(), catalog.version(), "the format does not matter");
}

#[test]
fn integer_ids_and_token_strings() {
    let file = write(&[&[
        ("item_id", Column::Integers(vec![17, -3])),
        ("sid", Column::TextLists(vec![Some(vec!["<a_1>", "<b_1>"]), Some(vec!["<a_0>", "<b_1>"])])),
    ]]);
    let catalog = read(&file.path).unwrap();
    assert_eq!((catalog.item("17"), catalog.item("-3")), (Some(ItemIndex(0)), Some(ItemIndex(1))));
    assert_eq!(catalog.leaf_of(ItemIndex(1)).0, 0);
    assert_eq!(
        catalog.sid_parts(catalog.leaf_of(ItemIndex(0))),
        [SidPart::from("<a_1>"), SidPart::from("<b_1>")]
    );
}

#[test]
fn bad_rows_are_named() {
    let file = write(&[&[
        ("item_id", Column::Texts(vec![Some("a"), None, Some("c"), Some("d"), Some("a"), Some("f")])),
        (
            "sid",
            Column::IntegerLists(vec![
                Some(vec![1, 2]),
                Some(vec![1, 2]),
                None,
                Some(vec![1, -2]),
                Some(vec![1, 2]),
                Some(vec![]),
            ]),
        ),
    ]]);
    let Err(CatalogError::BadRecords { listed, omitted: 0 }) = read(&file.path) else { panic!() };
    let found: Vec<(Place, String)> = listed.iter().map(|bad| (bad.place, bad.problem.to_string())).collect();
    let row = |number| Place { unit: RecordUnit::Row, number };
    let expected = [
        (row(2), "field `item_id` is missing"),
        (row(3), "field `sid` is missing"),
        (
            row(4),
            "field `sid` must be a list of integer codes from 0 to 4294967295 or of token strings, got -2",
        ),
        (row(5), "`item_id` \"a\" is already used by row 1"),
        (row(6), "`sid` is empty"),
    ];
    assert_eq!(found, expected.map(|(place, text)| (place, text.to_owned())));
}

#[test]
fn columns_of_the_wrong_type_or_absent() {
    let file =
        write(&[&[("item_id", Column::Texts(vec![Some("a")])), ("sid", Column::Texts(vec![Some("1-2-3")]))]]);
    let Err(CatalogError::BadRecords { listed, .. }) = read(&file.path) else { panic!() };
    assert!(
        matches!(&listed[0].problem, RecordProblem::WrongType { field: "sid", got, .. } if got == "a string")
    );

    let file = write(&[&[("item_id", Column::Texts(vec![Some("a")]))]]);
    assert!(matches!(read(&file.path), Err(CatalogError::MissingColumn { column: "sid", .. })));
}

#[test]
fn damaged_files_are_errors() {
    let file = write(&[&[
        ("item_id", Column::Texts(vec![Some("a"), Some("b")])),
        ("sid", Column::IntegerLists(vec![Some(vec![1, 2]), Some(vec![1, 3])])),
    ]]);
    let good = fs::read(&file.path).unwrap();
    for damaged in [&good[..good.len() / 2], b"", b"PAR1", b"not a table at all"] {
        fs::write(&file.path, damaged).unwrap();
        assert!(matches!(read(&file.path), Err(CatalogError::Parquet { rows_read: 0, .. })));
    }
    // A wrong byte anywhere may go unnoticed or be an error, but must not bring the process down.
    for position in 0..good.len() {
        let mut bytes = good.clone();
        bytes[position] ^= 0x55;
        fs::write(&file.path, bytes).unwrap();
        let _ = read(&file.path);
    }
}
