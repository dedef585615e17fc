//! Lifetimes as people write them: `4` and `1.5` are hours; `30m`, `90s` and `1h30m` have units.

use jiff::SignedDuration;

/// Parses a lifetime into hours. The maximum is for the server to enforce.
///
/// # Errors
///
/// When it is not a duration above zero.
pub(crate) fn parse(text: &str) -> Result<f64, String> {
    let hours = match text.parse::<f64>() {
        Ok(hours) => Some(hours),
        Err(_) => with_units(text),
    };
    match hours {
        Some(hours) if hours.is_finite() && hours > 0.0 => Ok(hours),
        Some(_) => Err("a lifetime must be above zero".to_owned()),
        None => Err("expected hours (4, 1.5) or a duration with units (30m, 90s, 1h30m)".to_owned()),
    }
}

/// Formats hours with units, such as `1h 30m`.
pub(crate) fn format(hours: f64) -> String {
    let lifetime = SignedDuration::try_from_secs_f64((hours * 3600.0).round()).unwrap_or(SignedDuration::MAX);
    format!("{lifetime:#}")
}

/// Numbers with units, in descending order of the units.
fn with_units(text: &str) -> Option<f64> {
    let mut rest = text.trim();
    let mut hours = 0.0;
    let mut smallest = f64::INFINITY;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let unit = match tail.chars().next()? {
            'd' => 24.0,
            'h' => 1.0,
            'm' => 1.0 / 60.0,
            's' => 1.0 / 3600.0,
            _ => return None,
        };
        if unit >= smallest {
            return None;
        }
        smallest = unit;
        hours += number.parse::<f64>().ok()? * unit;
        rest = &tail[1..];
    }
    (smallest < f64::INFINITY).then_some(hours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_are_formatted_with_units() {
        for (hours, text) in [(4.0, "4h"), (1.5, "1h 30m"), (6.0 / 3600.0, "6s"), (48.0, "48h")] {
            assert_eq!(format(hours), text);
        }
    }

    #[test]
    fn hours_minutes_and_seconds_are_understood() {
        for (text, hours) in [
            ("4", 4.0),
            ("1.5", 1.5),
            ("2h", 2.0),
            ("30m", 0.5),
            ("90s", 0.025),
            ("1h30m", 1.5),
            ("2d", 48.0),
            ("49", 49.0),
        ] {
            let parsed = parse(text).expect(text);
            assert!((parsed - hours).abs() < 1e-9, "{text}: {parsed}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in
            ["", "-1", "0", "0s", "NaN", "inf", "-inf", "later", "4x", "h", "30m1h", "1h1h", "m5", "1..5h", "-5m"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
