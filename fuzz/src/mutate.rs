//! Mutations: bytes for any input, and values for JSON, so that damage reaches what lies behind the parser.
//!
//! Everything follows from the generator's seed.

use fastrand::Rng;
use serde_json::{Map, Value};

use crate::limits;
use crate::targets::Shape;

/// Numbers at which parsers and sizes break.
const NUMBERS: [&str; 18] = [
    "0",
    "-1",
    "1",
    "2",
    "255",
    "256",
    "65536",
    "2147483647",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "1e999",
    "-0.0",
    "0.5",
];

/// Text at which parsers break: marks, escapes, brackets, formats.
const TEXTS: [&str; 14] = [
    "",
    "\u{feff}",
    "\0",
    "\u{1b}[31m",
    "\n",
    "<a_{}>",
    "{}",
    "{}{}",
    "%s",
    "../../x",
    "NaN",
    "\u{10ffff}",
    "\"",
    "null",
];

/// An input made from one of `inputs`, sometimes joined with another.
pub fn mutate(random: &mut Rng, shape: Shape, inputs: &[Vec<u8>]) -> Vec<u8> {
    let pick =
        |random: &mut Rng| inputs.get(random.usize(..inputs.len().max(1))).cloned().unwrap_or_default();
    let mut input = pick(random);
    for _ in 0..=random.usize(..4) {
        let structured = match shape {
            Shape::Json if random.bool() => json(random, &input),
            Shape::JsonLines if random.bool() => json_line(random, &input),
            Shape::Safetensors if random.bool() => header(random, &input),
            _ => None,
        };
        input = structured.unwrap_or_else(|| {
            let other = pick(random);
            bytes(random, input.clone(), &other)
        });
    }
    input.truncate(limits::INPUT);
    input
}

fn bytes(random: &mut Rng, mut input: Vec<u8>, other: &[u8]) -> Vec<u8> {
    let at = random.usize(..=input.len());
    match random.u8(..9) {
        0 if at < input.len() => input[at] ^= 1 << random.u8(..8),
        1 if at < input.len() => input[at] = random.u8(..),
        2 => input.truncate(at),
        3 => drop(input.drain(at..(at + random.usize(..16)).min(input.len()))),
        4 => {
            // The same once more, or many times.
            let end = (at + random.usize(..64)).min(input.len());
            let part = input[at..end].repeat(if random.u8(..16) == 0 { 500 } else { 1 });
            input.splice(at..at, part);
        }
        5 => drop(input.splice(at.., other.iter().skip(at).copied())),
        6 => drop(input.splice(at..at, NUMBERS[random.usize(..NUMBERS.len())].bytes())),
        7 => drop(input.splice(at..at, TEXTS[random.usize(..TEXTS.len())].bytes())),
        _ => {
            // A length or an offset, as binary formats hold them.
            let value = random.u64(..) >> random.u8(..64);
            let word = if random.bool() { value.to_le_bytes() } else { (value as u32 as u64).to_le_bytes() };
            let len = word.len().min(input.len() - at);
            input[at..at + len].copy_from_slice(&word[..len]);
        }
    }
    input
}

fn json(random: &mut Rng, input: &[u8]) -> Option<Vec<u8>> {
    let mut value: Value = serde_json::from_slice(input).ok()?;
    change(random, &mut value, 0);
    serde_json::to_vec(&value).ok()
}

fn json_line(random: &mut Rng, input: &[u8]) -> Option<Vec<u8>> {
    let mut lines: Vec<Vec<u8>> = input.split(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect();
    let at = random.usize(..lines.len());
    let line = json(random, &lines[at])?;
    if random.bool() {
        lines[at] = line;
    } else {
        lines.push(line);
    }
    Some(lines.join(&b'\n'))
}

/// The JSON header of a safetensors file, its length kept right.
fn header(random: &mut Rng, input: &[u8]) -> Option<Vec<u8>> {
    let length = u64::from_le_bytes(*input.first_chunk::<8>()?);
    let end = usize::try_from(length).ok()?.checked_add(8).filter(|&end| end <= input.len())?;
    let changed = json(random, &input[8..end])?;
    let mut file = (changed.len() as u64).to_le_bytes().to_vec();
    file.extend(changed);
    file.extend(&input[end..]);
    Some(file)
}

/// Changes a value somewhere.
fn change(random: &mut Rng, value: &mut Value, depth: usize) {
    let deeper = depth < 8 && random.u8(..4) != 0;
    match value {
        Value::Object(fields) if deeper && !fields.is_empty() => {
            let at = random.usize(..fields.len());
            if let Some((_, value)) = fields.iter_mut().nth(at) {
                change(random, value, depth + 1);
            }
        }
        Value::Array(values) if deeper && !values.is_empty() => {
            let at = random.usize(..values.len());
            change(random, &mut values[at], depth + 1);
        }
        Value::Object(fields) if random.bool() => change_fields(random, fields),
        Value::Array(values) if random.bool() && !values.is_empty() => {
            let copy = values[random.usize(..values.len())].clone();
            let count = if random.u8(..16) == 0 { 3000 } else { 1 };
            values.extend(std::iter::repeat_n(copy, count));
        }
        _ => *value = any(random, value),
    }
}

/// Leaves a field out, spells one wrongly, or gives one another's value.
fn change_fields(random: &mut Rng, fields: &mut Map<String, Value>) {
    let names: Vec<String> = fields.keys().cloned().collect();
    let Some(name) = random.choice(&names) else { return };
    match random.u8(..3) {
        0 => drop(fields.remove(name)),
        1 => {
            let value = fields.remove(name).unwrap_or_default();
            let mut name = name.clone();
            name.insert_str(0, TEXTS[random.usize(..TEXTS.len())]);
            fields.insert(name, value);
        }
        _ => {
            let other = random.choice(&names).and_then(|other| fields.get(other).cloned());
            fields.insert(name.clone(), other.unwrap_or_default());
        }
    }
}

/// Another value in the place of this one.
fn any(random: &mut Rng, old: &Value) -> Value {
    let text = |random: &mut Rng| TEXTS[random.usize(..TEXTS.len())];
    match random.u8(..9) {
        0 => Value::Null,
        1 => Value::Bool(random.bool()),
        // A number as text, and text longer than any limit.
        2 => Value::String(old.to_string()),
        3 => Value::String(text(random).repeat(1 + random.usize(..2000))),
        4 => Value::Array(vec![old.clone(); random.usize(..3)]),
        5 => Value::Object(Map::from_iter([(text(random).to_owned(), old.clone())])),
        6 => Value::String(text(random).to_owned()),
        _ => serde_json::from_str(NUMBERS[random.usize(..NUMBERS.len())]).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_follows_from_the_seed() {
        let inputs = [br#"{"a": [1, {"b": "c"}]}"#.to_vec(), b"{}".to_vec()];
        for shape in [Shape::Json, Shape::JsonLines, Shape::Safetensors, Shape::Bytes] {
            let run = || {
                let mut random = Rng::with_seed(7);
                (0..200).map(|_| mutate(&mut random, shape, &inputs)).collect::<Vec<_>>()
            };
            assert_eq!(run(), run());
            assert!(run().iter().all(|input| input.len() <= limits::INPUT));
        }
    }

    #[test]
    fn a_header_keeps_its_length() {
        let mut random = Rng::with_seed(1);
        for _ in 0..100 {
            let Some(file) = header(&mut random, crate::seeds::WEIGHTS) else { panic!("a sound file") };
            let length = u64::from_le_bytes(*file.first_chunk::<8>().unwrap()) as usize;
            assert!(serde_json::from_slice::<Value>(&file[8..8 + length]).is_ok());
        }
    }

    #[test]
    fn no_input_is_too_small() {
        let mut random = Rng::with_seed(3);
        for shape in [Shape::Json, Shape::JsonLines, Shape::Safetensors, Shape::Bytes] {
            for _ in 0..200 {
                mutate(&mut random, shape, &[Vec::new()]);
                mutate(&mut random, shape, &[]);
            }
        }
    }
}
