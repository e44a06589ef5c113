//! Real logs of users' events, as visits in order of time.
//!
//! - MovieLens 100K (`ml-100k/ml-100k.inter`): ratings with their times.
//! - Beauty (`beauty/sequences.txt`): purchases in order, without times. Times are drawn: see
//!   [`Log::beauty`].
//!
//! The data are read from a directory that the user names; none of them are part of this repository.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::random::Random;

/// Time within which Beauty's users begin, in seconds: 90 days.
const BEGINNINGS: f64 = 90.0 * 86_400.0;
/// Mean time from one of their purchases to the next, in seconds: three days.
const MEAN_GAP: f64 = 3.0 * 86_400.0;

/// A log: the items and times of each user's events, oldest first.
#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    /// Name of the log.
    pub name: &'static str,
    /// Per user, each event as (time in seconds, item).
    pub users: Vec<Vec<(f64, u32)>>,
}

/// A moment at which a user asks for recommendations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Visit {
    /// Time of the visit, in seconds.
    pub at: f64,
    /// Number of the user.
    pub user: usize,
    /// Number of items in the history at that time.
    pub items: usize,
}

impl Log {
    /// MovieLens 100K. `None` if the directory does not have it.
    ///
    /// # Errors
    ///
    /// When the file is there and cannot be read.
    pub fn movielens(data: &Path) -> Result<Option<Self>> {
        let Some(text) = read(&data.join("ml-100k/ml-100k.inter"))? else { return Ok(None) };
        let mut users: BTreeMap<u32, Vec<(f64, u32)>> = BTreeMap::new();
        for (number, line) in text.lines().enumerate().skip(1) {
            let fields: Vec<&str> = line.split('\t').collect();
            let parsed = match fields[..] {
                [user, item, _, time] => {
                    user.parse().ok().zip(item.parse().ok()).zip(time.trim().parse().ok())
                }
                _ => None,
            };
            let ((user, item), time) =
                parsed.with_context(|| format!("ml-100k.inter, line {}", number + 1))?;
            users.entry(user).or_default().push((time, item));
        }
        ensure!(!users.is_empty(), "ml-100k.inter has no ratings");
        let mut users: Vec<_> = users.into_values().collect();
        users.iter_mut().for_each(|events| events.sort_by(|a, b| a.0.total_cmp(&b.0)));
        Ok(Some(Self { name: "MovieLens 100K", users }))
    }

    /// Beauty, with drawn times: a user begins at some moment of 90 days, and from one purchase to
    /// the next it is three days on average, exponentially distributed. `None` if the directory
    /// does not have it.
    ///
    /// # Errors
    ///
    /// When the file is there and cannot be read.
    pub fn beauty(data: &Path) -> Result<Option<Self>> {
        let Some(text) = read(&data.join("beauty/sequences.txt"))? else { return Ok(None) };
        let mut random = Random::new(11);
        let mut users = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let mut at = random.unit() * BEGINNINGS;
            let mut events = Vec::new();
            for item in line.split_whitespace().skip(1) {
                let item = item.parse().with_context(|| format!("sequences.txt, line {}", number + 1))?;
                events.push((at, item));
                at += random.gap(MEAN_GAP);
            }
            users.push(events);
        }
        ensure!(!users.is_empty(), "sequences.txt has no users");
        Ok(Some(Self { name: "Beauty, drawn times", users }))
    }

    /// The visits of all users in order of time. Events of a user that follow each other within
    /// `gap` seconds are one visit, and the user asks at its end.
    #[must_use]
    pub fn visits(&self, gap: f64) -> Vec<Visit> {
        let mut visits = Vec::new();
        for (user, events) in self.users.iter().enumerate() {
            for (index, &(at, _)) in events.iter().enumerate() {
                if events.get(index + 1).is_none_or(|next| next.0 - at > gap) {
                    visits.push(Visit { at, user, items: index + 1 });
                }
            }
        }
        visits.sort_by(|a, b| a.at.total_cmp(&b.at).then(a.user.cmp(&b.user)));
        visits
    }
}

fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_within_the_gap_are_one_visit() {
        let log = Log { name: "l", users: vec![vec![(0.0, 1), (5.0, 2), (100.0, 3)], vec![(3.0, 9)]] };
        let of = |gap| log.visits(gap).iter().map(|v| (v.at, v.user, v.items)).collect::<Vec<_>>();
        assert_eq!(of(10.0), [(3.0, 1, 1), (5.0, 0, 2), (100.0, 0, 3)]);
        assert_eq!(of(0.0), [(0.0, 0, 1), (3.0, 1, 1), (5.0, 0, 2), (100.0, 0, 3)]);
    }

    #[test]
    fn logs_are_read_and_bad_lines_named() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Log::movielens(folder.path()).unwrap(), None, "what is not there is left out");
        assert_eq!(Log::beauty(folder.path()).unwrap(), None);
        for name in ["ml-100k", "beauty"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let path = folder.path().join("ml-100k/ml-100k.inter");
        fs::write(&path, "user\titem\trating\ttime\n7\t2\t3\t20\n7\t1\t3\t10\n").unwrap();
        let log = Log::movielens(folder.path()).unwrap().unwrap();
        assert_eq!(log.users, [[(10.0, 1), (20.0, 2)]]);
        fs::write(&path, "user\titem\trating\ttime\n7\t2\t3\n").unwrap();
        let error = format!("{:#}", Log::movielens(folder.path()).unwrap_err());
        assert!(error.contains("line 2"), "{error}");
        fs::write(folder.path().join("beauty/sequences.txt"), "1 5 6 7\n2 8\n").unwrap();
        let log = Log::beauty(folder.path()).unwrap().unwrap();
        assert_eq!(log.users[0].iter().map(|event| event.1).collect::<Vec<_>>(), [5, 6, 7]);
        assert!(log.users[0].is_sorted_by(|a, b| a.0 < b.0));
    }
}
