//! The one table of parameters: every name, kind, range and explanation that Python, the command line and the docs show.
//!
//! A new parameter is one line in [`Name`] and one row in [`PARAMETERS`].

use crate::error::{Result, fail};
use crate::split::MOST_TOKENS;

/// A parameter, by its place in [`PARAMETERS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the table says what each is")]
pub enum Name {
    WindowSize,
    SinkSize,
    SinkUpdateRate,
    HeavyRatio,
    RecentRatio,
    DistinctRatio,
    PeakRatio,
    Sinks,
    ValueWeighted,
    LookGap,
    PeakReach,
    Averaged,
    AgeHalfLife,
    EvictionInterval,
}

/// What values a parameter takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// A whole number from `least` to [`MOST_TOKENS`].
    Int {
        /// The smallest one.
        least: usize,
    },
    /// A number from 0 to 1; `above` excludes 0 itself.
    Ratio {
        /// Whether 0 is excluded.
        above: bool,
    },
    /// Yes or no.
    Flag,
    /// One of these words.
    Choice(&'static [&'static str]),
}

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Parameter {
    /// Its place.
    pub id: Name,
    /// Its name in Python; on the command line with dashes.
    pub name: &'static str,
    /// Its values.
    pub kind: Kind,
    /// One sentence for users.
    pub help: &'static str,
}

/// A value of a parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// Of [`Kind::Int`].
    Int(i64),
    /// Of [`Kind::Ratio`].
    Ratio(f64),
    /// Of [`Kind::Flag`].
    Flag(bool),
    /// Of [`Kind::Choice`].
    Choice(&'static str),
}

const fn row(id: Name, name: &'static str, kind: Kind, help: &'static str) -> Parameter {
    Parameter { id, name, kind, help }
}

const fn whole(least: usize) -> Kind {
    Kind::Int { least }
}

const RATIO: Kind = Kind::Ratio { above: false };

/// The names of [`Name::Sinks`]' values.
pub const PINNED: &str = "pinned";
/// See [`PINNED`].
pub const ADAPTIVE: &str = "adaptive";

/// How many parameters there are.
pub const COUNT: usize = 14;

/// Every parameter a strategy may listen to, in the order they are shown.
pub static PARAMETERS: [Parameter; COUNT] = [
    row(
        Name::WindowSize,
        "window_size",
        whole(1),
        "Recent tokens that stay; the budget follows from it where none is given.",
    ),
    row(Name::SinkSize, "sink_size", whole(0), "Tokens that stay as attention sinks."),
    row(
        Name::SinkUpdateRate,
        "sink_update_rate",
        RATIO,
        "How fast the attention mass forgets: the part of it that 64 tokens replace; 0 never forgets.",
    ),
    row(Name::HeavyRatio, "heavy_ratio", RATIO, "Weight of the heavy hitters against recent_ratio."),
    row(
        Name::RecentRatio,
        "recent_ratio",
        Kind::Ratio { above: true },
        "Weight of the recent window against heavy_ratio.",
    ),
    row(
        Name::DistinctRatio,
        "distinct_ratio",
        RATIO,
        "Part of the heavy hitters chosen because their keys point elsewhere than the others'.",
    ),
    row(
        Name::PeakRatio,
        "peak_ratio",
        RATIO,
        "Part of the heavy hitters chosen by the strongest single look they got.",
    ),
    row(
        Name::Sinks,
        "sinks",
        Kind::Choice(&[PINNED, ADAPTIVE]),
        "Which tokens are sinks: the first ones, or at each decision those with the largest mass.",
    ),
    row(
        Name::ValueWeighted,
        "value_weighted",
        Kind::Flag,
        "Whether a look counts by the length of the token's value over that of its key.",
    ),
    row(Name::LookGap, "look_gap", whole(0), "Looks at a token count from the query this many tokens later."),
    row(
        Name::PeakReach,
        "peak_reach",
        whole(1),
        "Looks within one chunk count for the peak up to this many tokens away; by default the budget.",
    ),
    row(
        Name::Averaged,
        "averaged",
        Kind::Flag,
        "Whether mass is judged per query that was late enough to look at the token.",
    ),
    row(
        Name::AgeHalfLife,
        "age_half_life",
        whole(0),
        "An averaged mass halves with every so many tokens of the token's age; 0: it does not.",
    ),
    row(
        Name::EvictionInterval,
        "eviction_interval",
        whole(1),
        "Tokens between two choices of what is evicted next; by default a 32nd of the budget.",
    ),
];

/// The parameter of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Parameter> {
    PARAMETERS.iter().find(|parameter| parameter.name == name)
}

impl Name {
    /// Its row in the table.
    #[must_use]
    pub fn row(self) -> &'static Parameter {
        &PARAMETERS[self as usize]
    }
}

impl Parameter {
    /// Refuse a value out of range, or of another kind.
    pub fn check(&self, value: Value) -> Result<()> {
        let name = self.name;
        match (self.kind, value) {
            (Kind::Int { least }, Value::Int(v)) => in_range(name, v, least).map(|_| ()),
            (Kind::Ratio { above }, Value::Ratio(v)) if !(v <= 1.0 && (v > 0.0 || !above && v >= 0.0)) => {
                let from = if above { "above 0 and at most 1" } else { "from 0 to 1" };
                fail!(Config, "{name} must be a number {from}, got {v}")
            }
            (Kind::Ratio { .. }, Value::Ratio(_)) | (Kind::Flag, Value::Flag(_)) => Ok(()),
            (Kind::Choice(words), Value::Choice(v)) if words.contains(&v) => Ok(()),
            (kind, value) => fail!(Config, "{name} must be of the kind {kind:?}, got {value:?}"),
        }
    }
}

/// Check a whole number.
pub(crate) fn in_range(name: &str, value: i64, least: usize) -> Result<usize> {
    match usize::try_from(value) {
        Ok(v) if (least..=MOST_TOKENS).contains(&v) => Ok(v),
        _ => fail!(Config, "{name} must be an integer from {least} to {MOST_TOKENS}, got {value}"),
    }
}

/// Checked values of some parameters; the others have none.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Values([Option<Value>; COUNT]);

impl Values {
    /// The value, if it has one.
    #[must_use]
    pub fn get(&self, name: Name) -> Option<Value> {
        self.0[name as usize]
    }

    pub(crate) fn set(&mut self, name: Name, value: Option<Value>) {
        self.0[name as usize] = value;
    }

    /// The value of a whole number.
    #[must_use]
    pub fn int(&self, name: Name) -> Option<usize> {
        match self.get(name) {
            Some(Value::Int(value)) => usize::try_from(value).ok(),
            _ => None,
        }
    }

    /// The value of a ratio.
    #[must_use]
    pub fn ratio(&self, name: Name) -> Option<f64> {
        match self.get(name) {
            Some(Value::Ratio(value)) => Some(value),
            _ => None,
        }
    }

    /// Whether a flag has a value, and that is yes.
    #[must_use]
    pub fn flag(&self, name: Name) -> bool {
        self.get(name) == Some(Value::Flag(true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_in_their_places() {
        for (i, parameter) in PARAMETERS.iter().enumerate() {
            assert_eq!(parameter.id as usize, i);
            assert!(parameter.help.ends_with('.'), "{}", parameter.name);
            assert_eq!(find(parameter.name).map(|found| found.id), Some(parameter.id));
        }
        assert!(find("window").is_none());
    }

    #[test]
    fn ranges_are_checked() {
        let refused = |name: Name, value| name.row().check(value).unwrap_err().to_string();
        assert!(Name::PeakRatio.row().check(Value::Ratio(0.0)).is_ok());
        assert_eq!(refused(Name::PeakRatio, Value::Ratio(1.5)), "peak_ratio must be a number from 0 to 1, got 1.5");
        assert!(refused(Name::RecentRatio, Value::Ratio(0.0)).contains("above 0"));
        assert!(refused(Name::HeavyRatio, Value::Ratio(f64::NAN)).ends_with("got NaN"));
        assert!(refused(Name::PeakReach, Value::Int(0)).contains("from 1 to 2147483647, got 0"));
        assert!(refused(Name::Sinks, Value::Choice("loose")).contains("loose"));
        assert!(refused(Name::Sinks, Value::Int(3)).contains("Int(3)"));
    }
}
