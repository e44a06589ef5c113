//! Times: seconds since 1970, as whole numbers, oldest first. Tables that know their unit are converted.

use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer};

use super::written::{WholeVisitor, Written};

/// The beginning of the year 5000. A later time was written in another unit.
const LATEST: i64 = 95_617_584_000;

/// A time, in seconds since 1970.
pub struct Timestamp(i64);

impl Written for Timestamp {
    type Value = i64;

    fn value(self) -> i64 {
        self.0
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = "seconds since 1970 as a whole number, for example 1767225600";
        deserializer.deserialize_any(WholeVisitor(PhantomData, expected)).map(Self)
    }
}

/// The unit of times in a column of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unit {
    /// Seconds, the unit of a plain number.
    #[default]
    Seconds,
    /// Thousandths of a second.
    Milliseconds,
    /// Millionths of a second.
    Microseconds,
    /// Billionths of a second.
    Nanoseconds,
    /// Days: a date, which means its beginning in UTC.
    Days,
}

impl Unit {
    /// The second that contains a time.
    pub fn seconds(self, value: i64) -> i64 {
        match self {
            Self::Seconds => value,
            Self::Milliseconds => value.div_euclid(1_000),
            Self::Microseconds => value.div_euclid(1_000_000),
            Self::Nanoseconds => value.div_euclid(1_000_000_000),
            Self::Days => value.saturating_mul(86_400),
        }
    }
}

/// Checks that a time can be seconds since 1970.
///
/// # Errors
///
/// Advice that reads on from the name of the field.
pub fn check(seconds: i64) -> Result<(), String> {
    let beyond = seconds.saturating_abs();
    if beyond < LATEST {
        return Ok(());
    }
    // For instants of our days, each unit has its own order of magnitude.
    let (unit, factor) = match beyond {
        0..100_000_000_000_000 => ("milliseconds", "1,000"),
        100_000_000_000_000..100_000_000_000_000_000 => ("microseconds", "1,000,000"),
        _ => ("nanoseconds", "1,000,000,000"),
    };
    let side = if seconds < 0 { "long before the year 0" } else { "after the year 5000" };
    Err(format!("is {seconds}, {side}: times are seconds since 1970. Divide {unit} by {factor}"))
}

/// Checks that the times of a history do not run backwards. Events without a time are skipped.
///
/// # Errors
///
/// The two events that are out of order, in words that read on from the name of the field.
pub fn check_order(times: impl IntoIterator<Item = Option<i64>>) -> Result<(), String> {
    let mut last: Option<(usize, i64)> = None;
    for (index, time) in times.into_iter().enumerate() {
        let Some(time) = time else { continue };
        if let Some((before, earlier)) = last
            && time < earlier
        {
            return Err(format!(
                "runs backwards: event {index} is at {time}, event {before} before it at {earlier}. Order the history \
                 oldest first"
            ));
        }
        last = Some((index, time));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_becomes_seconds() {
        let instant = 1_702_254_317_999_999_999;
        for (unit, value) in [
            (Unit::Seconds, instant / 1_000_000_000),
            (Unit::Milliseconds, instant / 1_000_000),
            (Unit::Microseconds, instant / 1_000),
            (Unit::Nanoseconds, instant),
        ] {
            assert_eq!(unit.seconds(value), 1_702_254_317, "{unit:?}");
        }
        assert_eq!(Unit::Nanoseconds.seconds(-1), -1);
        assert_eq!(Unit::Days.seconds(2), 172_800);
    }

    #[test]
    fn another_unit_is_named() {
        assert_eq!(check(1_702_254_317), Ok(()));
        assert_eq!(check(-1_702_254_317), Ok(()));
        assert!(check(1_702_254_317_000).unwrap_err().ends_with("Divide milliseconds by 1,000"));
        assert!(check(1_702_254_317_000_000).unwrap_err().ends_with("Divide microseconds by 1,000,000"));
        assert!(check(1_702_254_317_000_000_000).unwrap_err().ends_with("nanoseconds by 1,000,000,000"));
        assert!(check(i64::MIN).unwrap_err().contains("before the year 0"));
    }

    #[test]
    fn times_that_run_backwards_are_named_by_their_places() {
        assert_eq!(check_order([Some(1), None, Some(1), Some(2)]), Ok(()));
        let error = check_order([Some(3), None, Some(2)]).unwrap_err();
        assert!(error.starts_with("runs backwards: event 2 is at 2, event 0 before it at 3"), "{error}");
        assert!(error.ends_with("oldest first"), "{error}");
    }

    #[test]
    fn text_is_told_what_a_time_is() {
        for json in ["\"2026-01-01\"", "\"1702254317\"", "1.5"] {
            let error = serde_json::from_str::<Timestamp>(json).err().unwrap().to_string();
            assert!(error.contains("expected seconds since 1970 as a whole number"), "{error}");
        }
        assert_eq!(serde_json::from_str::<Timestamp>("1702254317.0").unwrap().0, 1_702_254_317);
    }
}
