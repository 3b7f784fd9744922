//! How many slots there are and how they are divided.

use crate::error::{Result, fail};
use crate::params::in_range;

/// A budget must leave this many slots beside the sinks.
pub const LEAST_BESIDE_SINKS: usize = 4;

/// Largest accepted count of slots or tokens: positions are `i32`.
pub const MOST_TOKENS: usize = i32::MAX as usize;

/// How many tokens of each kind stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Split {
    /// Attention sinks.
    pub sinks: usize,
    /// Latest positions.
    pub recent: usize,
    /// Keys that point elsewhere than the others'.
    pub distinct: usize,
    /// Largest peak attention.
    pub peak: usize,
    /// Largest attention mass, or what the strategy has in its stead.
    pub mass: usize,
}

/// Shares of the tokens beside the sinks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shares {
    /// Weight of the heavy hitters against `recent`.
    pub heavy: f64,
    /// Weight of the recent window against `heavy`.
    pub recent: f64,
    /// Part of the heavy hitters chosen by distinctness, 0 to 1.
    pub distinct: f64,
    /// Part of the heavy hitters chosen by peak attention, 0 to 1.
    pub peak: f64,
}

impl Shares {
    /// All heavy hitters by mass, but for the newest token, which always stays.
    pub const HEAVY: Self = Self { heavy: 1.0, recent: 0.0, distinct: 0.0, peak: 0.0 };
}

/// Round half up: neither half to even nor truncation.
#[must_use]
pub fn half_up(x: f64) -> usize {
    (x + 0.5).floor() as usize
}

impl Split {
    /// Divide `keep` tokens (at least 1); without `shares` everything beside the sinks is recent.
    #[must_use]
    pub fn of(keep: usize, sink_size: usize, shares: Option<Shares>) -> Self {
        let sinks = sink_size.min(keep.saturating_sub(1));
        let rest = keep - sinks;
        let Some(shares) = shares else {
            return Self { sinks, recent: rest, ..Self::default() };
        };
        let recent = half_up(rest as f64 * shares.recent / (shares.heavy + shares.recent)).max(1);
        let heavy = rest - recent;
        let distinct = half_up(heavy as f64 * shares.distinct);
        let peak = half_up(heavy as f64 * shares.peak).min(heavy - distinct);
        Self { sinks, recent, distinct, peak, mass: heavy - distinct - peak }
    }

    /// All tokens that stay.
    #[must_use]
    pub fn total(&self) -> usize {
        self.sinks + self.recent + self.distinct + self.peak + self.mass
    }
}

/// The budget whose recent part is `window` tokens; where the recent part has no share, the window is the budget.
#[must_use]
pub fn from_window(window: usize, sink_size: usize, shares: Option<Shares>) -> usize {
    let shares = shares.filter(|s| s.recent > 0.0);
    sink_size + shares.map_or(window, |s| half_up(window as f64 * (s.heavy + s.recent) / s.recent))
}

/// The budget that holds `percent` of a prompt, but at least `sink_size + 4`.
pub fn from_percent(percent: f64, prompt_tokens: i64, sink_size: i64) -> Result<usize> {
    if !(percent > 0.0 && percent <= 100.0) {
        fail!(Config, "cache size must be above 0 and at most 100 percent, got {percent}");
    }
    let prompt = in_range("prompt_tokens", prompt_tokens, 1)?;
    let sinks = in_range("sink_size", sink_size, 0)?;
    let part = (percent * prompt as f64 / 100.0).ceil() as usize;
    Ok(part.max(sinks + LEAST_BESIDE_SINKS))
}

/// Tokens between two decisions when none was asked for.
#[must_use]
pub fn default_interval(budget: usize, sinks: usize) -> usize {
    (budget / 32).clamp(1, most_interval(budget, sinks))
}

/// Largest eviction interval: two of them may be queued, the rest must hold every part of the split.
#[must_use]
pub fn most_interval(budget: usize, sinks: usize) -> usize {
    (budget.saturating_sub(sinks) / 8).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGINAL: Shares = Shares { heavy: 0.2, recent: 0.3, distinct: 0.0, peak: 0.5 };

    #[test]
    fn rounds_half_up() {
        assert_eq!([0.4, 0.5, 1.5, 2.5, 2.499_999].map(half_up), [0, 1, 2, 3, 2]);
    }

    #[test]
    fn splits_add_up() {
        for keep in 1..400 {
            for sinks in [0, 1, 4, 30] {
                let shares = [None, Some(ORIGINAL), Some(Shares::HEAVY), Some(Shares { distinct: 0.7, ..ORIGINAL })];
                for shares in shares {
                    let split = Split::of(keep, sinks, shares);
                    assert_eq!(split.total(), keep);
                    assert!(split.recent >= 1 && split.sinks <= sinks);
                }
            }
        }
    }

    #[test]
    fn the_distinct_come_before_the_peaks() {
        let shares = Some(Shares { heavy: 1.0, recent: 1.0, distinct: 0.75, peak: 0.5 });
        assert_eq!(Split::of(20, 0, shares), Split { sinks: 0, recent: 10, distinct: 8, peak: 2, mass: 0 });
    }

    #[test]
    fn window_is_the_recent_part() {
        for window in 1..600 {
            for (heavy, recent) in [(0.2, 0.3), (0.5, 0.5), (1.0, 0.3), (0.0, 1.0), (0.7, 0.01)] {
                let shares = Some(Shares { heavy, recent, ..ORIGINAL });
                let budget = from_window(window, 4, shares);
                assert_eq!(Split::of(budget, 4, shares).recent, window, "{heavy} {recent}");
            }
            assert_eq!(from_window(window, 4, Some(Shares::HEAVY)), window + 4);
        }
    }

    #[test]
    fn percentages() {
        assert_eq!(from_percent(20.0, 1001, 4), Ok(201));
        assert_eq!(from_percent(1.0, 10, 4), Ok(8));
        assert_eq!(from_percent(100.0, 10, 4), Ok(10));
        for percent in [0.0, -1.0, 100.1, f64::NAN, f64::INFINITY] {
            assert!(from_percent(percent, 10, 4).is_err());
        }
        assert!(from_percent(5.0, 0, 4).is_err());
        assert!(from_percent(5.0, 5, -1).is_err());
    }

    #[test]
    fn intervals_stay_small() {
        assert_eq!(default_interval(2048, 4), 64);
        assert_eq!(default_interval(8, 4), 1);
        assert_eq!(default_interval(64, 60), 1);
        assert_eq!(most_interval(64, 0), 8);
    }
}
