//! Environment variables that look like settings but are not.
//!
//! A misspelt flag or key of the file is refused. The environment also holds variables of other
//! programs, so an unknown variable is only a warning.

use std::collections::BTreeSet;

use beamline_wording::did_you_mean;

use super::key;

/// The prefix of all variables of settings.
const PREFIX: &str = "BEAMLINE_";
/// Variables that are not flags: for a processor's instruction set, and for tests.
const OTHERS: [&str; 12] = [
    key::VARIABLE,
    "BEAMLINE_CPU_ISA",
    "BEAMLINE_CONFORMANCE",
    "BEAMLINE_EVERY",
    "BEAMLINE_FIXTURES",
    "BEAMLINE_GPU",
    "BEAMLINE_LOG_FILE",
    "BEAMLINE_ROUNDS",
    "BEAMLINE_SEED",
    "BEAMLINE_SOAK",
    "BEAMLINE_STAND_IN_SEED",
    "BEAMLINE_SWAPS",
];
/// Prefixes of the variables that Kubernetes sets for a service called beamline.
const KUBERNETES: [&str; 2] = ["BEAMLINE_SERVICE_", "BEAMLINE_PORT_"];
/// Another variable of Kubernetes, whose value is an address. With any other value, the user
/// probably meant `BEAMLINE_LISTEN`.
const PORT: &str = "BEAMLINE_PORT";
/// Wrong names that users try, and the right ones.
const MEANT: [(&str, &str); 3] = [
    (PORT, "BEAMLINE_LISTEN"),
    ("BEAMLINE_HOST", "BEAMLINE_LISTEN"),
    ("BEAMLINE_MODEL", "BEAMLINE_CHECKPOINT"),
];

/// A warning for each variable that begins like a setting and is not one. `flags` are the variables
/// of all flags; `present` holds names and values.
pub fn warnings(flags: &BTreeSet<String>, present: impl Iterator<Item = (String, String)>) -> Vec<String> {
    let known = || flags.iter().map(String::as_str).chain(OTHERS);
    let foreign = |name: &str, value: &str| {
        KUBERNETES.iter().any(|beginning| name.starts_with(beginning))
            || (name == PORT && value.contains("://"))
    };
    let unknown = present.filter(|(name, value)| {
        name.starts_with(PREFIX) && !foreign(name, value) && !known().any(|one| one == name)
    });
    let mut warnings: Vec<String> = unknown
        .map(|(name, _)| {
            let meant = MEANT
                .iter()
                .find(|(tried, _)| *tried == name)
                .map(|(_, meant)| format!("; set {meant} instead"));
            let hint = meant.unwrap_or_else(|| did_you_mean(&name, known()));
            format!("the variable {name} is set and no setting has this name{hint}")
        })
        .collect();
    warnings.sort();
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_variable_is_named_and_others_are_not() {
        let flags = BTreeSet::from(["BEAMLINE_LISTEN".to_owned(), "BEAMLINE_THREADS".to_owned()]);
        let present = [
            ("BEAMLINE_LISTN", "1"),
            ("BEAMLINE_THREADS", "1"),
            ("BEAMLINE_ADMIN_KEY", "secret"),
            ("BEAMLINE_SERVICE_HOST", "10.0.0.1"),
            ("BEAMLINE_PORT_8080_TCP_ADDR", "10.0.0.1"),
            ("BEAMLINE_COLOUR_OF_THE_SKY", "blue"),
            ("PATH", "/bin"),
        ];
        let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        assert_eq!(
            warnings(&flags, present.into_iter().map(owned)),
            [
                "the variable BEAMLINE_COLOUR_OF_THE_SKY is set and no setting has this name",
                "the variable BEAMLINE_LISTN is set and no setting has this name; did you mean `BEAMLINE_LISTEN`?",
            ]
        );
        let port = |value: &str| warnings(&flags, std::iter::once(owned((PORT, value))));
        assert_eq!(port("tcp://10.0.0.1:8080"), [""; 0]);
        assert!(port("9000")[0].contains("set BEAMLINE_LISTEN instead"));
    }
}
