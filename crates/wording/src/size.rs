//! A number of bytes as text: powers of 1024 everywhere, so that a log and a report show the same
//! number.

const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];

/// Bytes with a unit: `512 B`, `289.3 KiB`, `1.50 GiB`.
pub fn bytes(count: u64) -> String {
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    // A tenth of a GiB is a lot, so large units get two digits.
    let digits = if unit < 2 { 1 } else { 2 };
    format!("{value:.digits$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn units_are_powers_of_1024() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (296_246, "289.3 KiB"),
            (512 << 20, "512.0 MiB"),
            (3 << 29, "1.50 GiB"),
            (8 << 40, "8.00 TiB"),
            (u64::MAX, "16384.00 PiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }
}
