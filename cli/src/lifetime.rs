//! Lifetimes as people write them: `4` and `1.5` are hours, `30m`, `90s` and `1h30m` say their units.

use jiff::SignedDuration;

/// Reads a lifetime; hours.
///
/// Only nonsense is refused here. What is too long is the server's to say: its limit is a setting.
///
/// # Errors
///
/// In words, when it is no duration above zero.
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

/// A lifetime with its units, such as `1h 30m`; hours come in.
pub(crate) fn in_words(hours: f64) -> String {
    let lifetime = SignedDuration::try_from_secs_f64((hours * 3600.0).round()).unwrap_or(SignedDuration::MAX);
    format!("{lifetime:#}")
}

/// One number for each unit, the larger unit first.
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
    fn lifetimes_are_told_with_units() {
        for (hours, text) in [(4.0, "4h"), (1.5, "1h 30m"), (6.0 / 3600.0, "6s"), (48.0, "48h")] {
            assert_eq!(in_words(hours), text);
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
