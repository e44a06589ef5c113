//! JSON-lines catalogs: which lines are accepted, and the exact error for every other.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::fs;
use std::path::PathBuf;

use beamline_catalog::{
    BadRecord, Catalog, CatalogError, CatalogLimits, ItemIndex, Place, RecordProblem, RecordUnit, SidPart,
    WrittenSymbols,
};

/// A file in a temporary directory that is deleted with it.
struct File {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

fn file(name: &str, contents: impl AsRef<[u8]>) -> File {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    fs::write(&path, contents).unwrap();
    File { _directory: directory, path }
}

fn read_with(contents: impl AsRef<[u8]>, limits: &CatalogLimits) -> Result<Catalog, CatalogError> {
    let file = file("catalog.jsonl", contents);
    let symbols = WrittenSymbols::scan_path(&file.path, limits)?;
    Catalog::read_path(&file.path, &symbols, limits)
}

fn read(contents: impl AsRef<[u8]>) -> Result<Catalog, CatalogError> {
    read_with(contents, &CatalogLimits::default())
}

fn problems_with(contents: impl AsRef<[u8]>, limits: &CatalogLimits) -> Vec<(u64, RecordProblem)> {
    match read_with(contents, limits) {
        Err(CatalogError::BadRecords { listed, omitted: 0 }) => {
            assert!(listed.iter().all(|bad| bad.place.unit == RecordUnit::Line));
            listed.into_iter().map(|bad| (bad.place.number, bad.problem)).collect()
        }
        other => panic!("{other:?}"),
    }
}

fn problems(contents: impl AsRef<[u8]>) -> Vec<(u64, RecordProblem)> {
    problems_with(contents, &CatalogLimits::default())
}

/// The error about the second of two lines, of which the first is good.
fn message(line: &str) -> String {
    let found = problems(format!("{{\"item_id\": \"first\", \"sid\": [1, 2]}}\n{line}\n"));
    let [(2, problem)] = &found[..] else { panic!("{found:?}") };
    problem.to_string()
}

#[test]
fn accepts_what_people_write() {
    let catalog = read(concat!(
        "\u{feff}{\"item_id\": \"a\", \"sid\": [1, 2], \"tags\": [\"new\"], \"title\": \"A \\u00e9\"}\r\n",
        "\r\n",
        "   \n",
        "{\"extra\": {\"x\": [1, 2]}, \"sid\": [1, 3], \"item_id\": \"b\", \"tags\": null, \"title\": null}\n",
        "{\"item_id\": \"c\", \"sid\": [0, 4294967295]}",
    ))
    .unwrap();
    assert_eq!((catalog.num_items(), catalog.num_leaves(), catalog.depth()), (3, 3, 2));
    assert_eq!(catalog.title(ItemIndex(0)), Some("A é"));
    assert_eq!((catalog.title(ItemIndex(1)), catalog.tags(ItemIndex(1)).len()), (None, 0));
    assert!(catalog.tags(ItemIndex(0)).eq(["new"]));
    assert_eq!(catalog.leaf_of(ItemIndex(2)).0, 0);
}

#[test]
fn token_strings_are_ordered_as_text_and_written_back() {
    let catalog = read(concat!(
        "{\"item_id\": \"a\", \"sid\": [\"<a_2>\", \"<b_1>\"]}\n",
        "{\"item_id\": \"b\", \"sid\": [\"<a_10>\", \"<b_1>\"]}\n",
    ))
    .unwrap();
    assert_eq!(catalog.leaf_of(ItemIndex(1)).0, 0);
    let sid = catalog.sid_parts(catalog.leaf_of(ItemIndex(0)));
    assert_eq!(sid, [SidPart::from("<a_2>"), SidPart::from("<b_1>")]);
}

#[test]
fn says_what_is_wrong_with_a_line() {
    for (line, expected) in [
        (r#"{"item_id": "a", "sid": [1, 2]"#, "EOF while parsing an object (column 30)"),
        (r#"["a", [1, 2], [], null]"#, "expected a JSON object"),
        (r#"{"item_id": 5.0, "sid": [1, 2]}"#, "5.0 is a float, expected an id: text, or an integer"),
        (r#"{"item_id": true, "sid": [1, 2]}"#, "invalid type: boolean `true`, expected an id"),
        (r#"{"item_id": "a", "sid": [1, 2.5]}"#, "invalid type: floating point `2.5`, expected a SID part"),
        (r#"{"item_id": "a", "sid": [1, -2]}"#, "invalid value: integer `-2`, expected a SID part"),
        (r#"{"item_id": "a", "sid": 7}"#, "invalid type: integer `7`, expected a sequence"),
        (
            r#"{"item_id": "a", "sid": [1, 2], "tags": "new"}"#,
            "invalid type: string \"new\", expected a sequence",
        ),
        (r#"{"sid": [1, 2]}"#, "field `item_id` is missing"),
        (r#"{"item_id": null, "sid": [1, 2]}"#, "field `item_id` is missing"),
        (r#"{"item_id": "a"}"#, "field `sid` is missing"),
        (r#"{"item_id": "", "sid": [1, 2]}"#, "`item_id` is empty"),
        (r#"{"item_id": "a", "sid": []}"#, "`sid` is empty"),
        (r#"{"item_id": "a", "sid": [1, 2, 3]}"#, "`sid` has 3 levels, expected 2"),
        (
            r#"{"item_id": "a", "sid": [1, "<b_2>"]}"#,
            "`sid` level 1 is \"<b_2>\", but this catalog is written in integer codes",
        ),
        (r#"{"item_id": "first", "sid": [3, 4]}"#, "`item_id` \"first\" is already used by line 1"),
    ] {
        let message = message(line);
        assert!(message.starts_with(expected), "{line}\n{message}");
    }
}

#[test]
fn unknown_codes_are_named_with_their_level() {
    let file = file("catalog.jsonl", "{\"item_id\": \"a\", \"sid\": [\"<a_1>\", \"<b_9>\"]}\n");
    let error =
        Catalog::read_path(&file.path, &WrittenSymbols::codes(), &CatalogLimits::default()).unwrap_err();
    assert_eq!(error.to_string(), "1 bad record\n  line 1: `sid` level 0: unknown code \"<a_1>\"");
}

#[test]
fn a_code_in_quotation_marks_is_told_what_it_should_be() {
    let file = file("catalog.jsonl", "{\"item_id\": \"a\", \"sid\": [\"6\"]}\n");
    let error =
        Catalog::read_path(&file.path, &WrittenSymbols::codes(), &CatalogLimits::default()).unwrap_err();
    assert!(error.to_string().ends_with("it is text: write the code as an integer, 6"), "{error}");
}

#[test]
fn an_integer_id_is_its_decimal_text() {
    let catalog = read("{\"item_id\": 5, \"sid\": [1]}\n{\"item_id\": -7, \"sid\": [1]}\n").unwrap();
    assert_eq!((catalog.item("5"), catalog.item("-7")), (Some(ItemIndex(0)), Some(ItemIndex(1))));
    let twice = problems("{\"item_id\": 5, \"sid\": [1]}\n{\"item_id\": \"5\", \"sid\": [1]}\n");
    assert!(matches!(&twice[..], [(2, RecordProblem::DuplicateItemId { .. })]), "{twice:?}");
}

#[test]
fn utf_16_is_named() {
    let text: Vec<u8> = "\u{feff}{}\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let error = read(text).unwrap_err();
    assert!(matches!(error, CatalogError::Utf16(_)));
    assert!(error.to_string().ends_with("save it as UTF-8"), "{error}");
}

fn read_index(text: &str) -> Result<Catalog, CatalogError> {
    let (file, limits) = (file("items.index.json", text), CatalogLimits::default());
    let symbols = WrittenSymbols::scan_path(&file.path, &limits)?;
    Catalog::read_path(&file.path, &symbols, &limits)
}

#[test]
fn an_object_of_items_and_codes_is_a_catalog() {
    let catalog = read_index(concat!(
        "\u{feff}{\"0\": [\"<a_9>\", \"<b_2>\"],\r\n",
        "\"1\": [\"<a_15>\", \"<b_11>\"], \"2\": [\"<a_15>\", \"<b_11>\"]}\n",
    ))
    .unwrap();
    assert_eq!((catalog.num_items(), catalog.num_leaves(), catalog.depth()), (3, 2, 2));
    let sid = catalog.sid_parts(catalog.leaf_of(catalog.item("0").unwrap()));
    assert_eq!(sid, [SidPart::from("<a_9>"), SidPart::from("<b_2>")]);
    assert_eq!(read_index("{\"7\": [3, 0], \"8\": [0, 1]}").unwrap().num_leaves(), 2);
}

#[test]
fn an_object_says_which_entries_are_wrong() {
    let error = read_index("{\"a\": [1, 2], \"b\": 7, \"c\": [1], \"a\": [1, 2]}").unwrap_err().to_string();
    assert!(error.starts_with("3 bad records\n  record 2: codes of item \"b\": "), "{error}");
    assert!(error.contains("\n  record 3: `sid` has 1 levels, expected 2\n"), "{error}");
    assert!(error.contains("record 4: `item_id` \"a\" is already used by record 1"), "{error}");
    for text in ["", "{\"a\": [1]", "{\"a\": [1]} {}", "nonsense"] {
        assert!(matches!(read_index(text), Err(CatalogError::Index { .. })), "{text}");
    }
    let list = read_index("[{\"item_id\": \"a\", \"sid\": [1]}]").unwrap_err().to_string();
    assert!(list.contains("write a list of items as .jsonl, one per line"), "{list}");
    assert!(matches!(read_index("{}"), Err(CatalogError::Empty)));
}

#[test]
fn lines_are_counted_with_blank_ones() {
    let good = |id: &str| format!("{{\"item_id\": \"{id}\", \"sid\": [1]}}\n");
    let text = format!("\n{}not json\n\n{}{}{}", good("a"), good("b"), good("a"), good("b"));
    let found = problems(text);
    let places: Vec<u64> = found.iter().map(|&(line, _)| line).collect();
    assert_eq!(places, [3, 6, 7]);
    let first = |number| Place { unit: RecordUnit::Line, number };
    assert_eq!(found[1].1, RecordProblem::DuplicateItemId { item_id: "a".to_owned(), first: first(2) });
    assert_eq!(found[2].1, RecordProblem::DuplicateItemId { item_id: "b".to_owned(), first: first(5) });
}

#[test]
fn every_limit_is_enforced() {
    let limits = CatalogLimits {
        max_items: 2,
        max_depth: 3,
        max_item_id_bytes: 4,
        max_token_bytes: 6,
        max_tags_per_item: 2,
        max_tag_bytes: 3,
        max_title_bytes: 5,
        ..CatalogLimits::default()
    };
    let only = |line: &str| {
        let found = problems_with(line, &limits);
        assert_eq!((found.len(), found[0].0), (1, 1));
        found[0].1.clone()
    };
    assert_eq!(
        only(r#"{"item_id": "abcde", "sid": [1]}"#),
        RecordProblem::TextTooLong { field: "item_id", bytes: 5, limit: 4 }
    );
    assert_eq!(
        only(r#"{"item_id": "a", "sid": [1], "title": "123456"}"#),
        RecordProblem::TextTooLong { field: "title", bytes: 6, limit: 5 }
    );
    assert_eq!(
        only(r#"{"item_id": "a", "sid": [1], "tags": ["ab", "long"]}"#),
        RecordProblem::TextTooLong { field: "tags", bytes: 4, limit: 3 }
    );
    assert_eq!(
        only(r#"{"item_id": "a", "sid": ["<a_1234>"]}"#),
        RecordProblem::TextTooLong { field: "sid", bytes: 8, limit: 6 }
    );
    assert_eq!(
        only(r#"{"item_id": "a", "sid": [1], "tags": ["a", "b", "c"]}"#),
        RecordProblem::TooManyTags { got: 3, limit: 2 }
    );
    assert_eq!(
        only(r#"{"item_id": "a", "sid": [1, 2, 3, 4]}"#),
        RecordProblem::SidTooDeep { got: 4, limit: 3 }
    );

    let three = "{\"item_id\": \"a\", \"sid\": [1]}\n{\"item_id\": \"b\", \"sid\": [1]}\n\n{\"item_id\": \"c\", \"sid\": [1]}\n";
    let error = read_with(three, &limits).unwrap_err();
    assert_eq!(error.to_string(), "line 4: more than 2 items, the limit of a catalog");
    assert!(read_with(three, &CatalogLimits { max_items: 3, ..limits }).is_ok());
}

#[test]
fn overlong_lines_are_skipped_without_being_held() {
    let exact = r#"{"item_id": "a", "sid": [1]}"#;
    let limits = CatalogLimits { max_line_bytes: exact.len(), ..CatalogLimits::default() };
    for end in ["\n", "\r\n", ""] {
        assert!(read_with(format!("{exact}{end}"), &limits).is_ok(), "{end:?}");
    }
    for end in ["\n", "\r\n", ""] {
        let text = format!("{exact}\n{exact} {end}{}", if end.is_empty() { "" } else { exact });
        let found = problems_with(text, &limits);
        assert_eq!(found[0], (2, RecordProblem::LineTooLong { limit: exact.len() }));
        assert_eq!(
            found.len(),
            if end.is_empty() { 1 } else { 2 },
            "the next line is read as a line of its own"
        );
    }
    let long = format!("{}\n{exact}\n", "x".repeat(1_000_000));
    assert_eq!(problems_with(long, &limits), [(1, RecordProblem::LineTooLong { limit: exact.len() })]);
}

#[test]
fn many_bad_lines_become_one_error() {
    let text: String = (0..30).map(|i| format!("{{\"item_id\": \"{i}\"}}\n")).collect();
    match read(&text) {
        Err(error @ CatalogError::BadRecords { .. }) => {
            let message = error.to_string();
            let expected = "30 bad records\n  lines 1, 2, 3, 4, 5 and 25 more: field `sid` is missing";
            assert_eq!(message, expected);
        }
        other => panic!("{other:?}"),
    }
    let other = format!("{text}{}\n", r#"{"item_id": "x", "sid": []}"#);
    let message = read(other).unwrap_err().to_string();
    assert!(message.ends_with("and 1 more with other problems"), "{message}");
    let none_listed = CatalogLimits { max_listed_problems: 0, ..CatalogLimits::default() };
    let error = read_with(&text, &none_listed).unwrap_err();
    assert!(
        matches!(error, CatalogError::BadRecords { listed, omitted: 30 } if listed == Vec::<BadRecord>::new())
    );
}

#[test]
fn files_that_are_no_catalogs() {
    assert!(matches!(read(""), Err(CatalogError::Empty)));
    let long_value = format!("{{\"item_id\": \"a\", \"sid\": \"{}\"}}", "é".repeat(100_000));
    assert!(problems(long_value)[0].1.to_string().len() < 500, "values are quoted only in part");
    assert!(matches!(read("\u{feff}\n \n"), Err(CatalogError::Empty)));
    assert_eq!(problems(b"{\"item_id\": \"\xff\", \"sid\": [1]}\n").len(), 1);
    assert_eq!(problems("[".repeat(200_000)).len(), 1);

    let limits = CatalogLimits::default();
    let read_path = |path: &std::path::Path| Catalog::read_path(path, &WrittenSymbols::codes(), &limits);
    let text = file("catalog.csv", "a,1");
    assert!(matches!(read_path(&text.path), Err(CatalogError::UnknownFormat(path)) if path == text.path));
    let missing = text.path.with_file_name("absent.jsonl");
    assert!(matches!(read_path(&missing), Err(CatalogError::Io { path, .. }) if path == missing));
}
