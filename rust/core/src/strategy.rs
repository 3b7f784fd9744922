//! The eviction strategies, one row of data each.
//!
//! A new strategy is one row in [`STRATEGIES`], and a new [`crate::score::Score`] if it judges tokens as none does; the bindings, the
//! command line, tests and benchmarks enumerate the table.

use crate::error::{Result, fail};
use crate::params::{Name, PINNED, Value};
use crate::split::Shares;

/// Length of the recent window when neither a budget nor a window is given.
pub const WINDOW_SIZE: i64 = 256;

/// Queries whose attention `snapkv` goes by, and tokens that it protects.
const SNAPKV_WINDOW: usize = 32;

/// How the tokens that stay beside the sinks are divided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Parts {
    /// All are recent.
    Recent,
    /// By the strategy's parameters.
    Ratios,
    /// By these shares.
    Fixed(Shares),
    /// So many recent, or half where that is less, and heavy hitters by mass.
    Window(usize),
}

/// How fast the attention mass fades.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fading {
    /// By this factor per query token.
    Factor(f64),
    /// As `sink_update_rate` says.
    Rate,
}

/// What the heavy hitters that are left after distinctness and peak are chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heavy {
    /// The token's own mass, or its average where the parameter `averaged` says so.
    Mass,
    /// The largest mass from this many positions before the token to as many after it.
    Pooled(usize),
    /// A number drawn for layer, kv head and position.
    Drawn,
}

/// One strategy.
#[derive(Debug)]
pub struct Strategy {
    /// Name in Python and on the command line.
    pub name: &'static str,
    /// One line for humans.
    pub summary: &'static str,
    /// Where the method was published; empty for our own.
    pub paper: &'static str,
    /// The parameters it listens to, with its own values; `None` where the value follows from the budget.
    pub parameters: &'static [(Name, Option<Value>)],
    /// Whether memory is bounded by a budget.
    pub bounded: bool,
    /// Whether attention probabilities are needed.
    pub scored: bool,
    /// How the attention mass fades.
    pub fading: Fading,
    /// How the tokens beside the sinks are divided.
    pub parts: Parts,
    /// What the last of the heavy hitters are chosen by.
    pub heavy: Heavy,
}

const WINDOW: (Name, Option<Value>) = (Name::WindowSize, Some(Value::Int(WINDOW_SIZE)));
const INTERVAL: (Name, Option<Value>) = (Name::EvictionInterval, None);
const SINKS: (Name, Option<Value>) = (Name::SinkSize, Some(Value::Int(4)));

const fn ratio(name: Name, value: f64) -> (Name, Option<Value>) {
    (name, Some(Value::Ratio(value)))
}

/// What a row leaves out: a sliding window.
const PLAIN: Strategy = Strategy {
    name: "",
    summary: "",
    paper: "",
    parameters: &[WINDOW, INTERVAL],
    bounded: true,
    scored: false,
    fading: Fading::Factor(1.0),
    parts: Parts::Recent,
    heavy: Heavy::Mass,
};

/// All strategies, in the order they are shown.
pub static STRATEGIES: &[Strategy] = &[
    Strategy {
        name: "full",
        summary: "every token stays; memory grows with the context",
        parameters: &[],
        bounded: false,
        ..PLAIN
    },
    Strategy { name: "local", summary: "only the latest tokens stay", ..PLAIN },
    Strategy {
        name: "streaming",
        summary: "the first tokens and the latest ones stay",
        paper: "https://arxiv.org/abs/2309.17453",
        parameters: &[WINDOW, SINKS, INTERVAL],
        ..PLAIN
    },
    Strategy {
        name: "h2o",
        summary: "the tokens that gathered the most attention and the latest ones stay",
        paper: "https://arxiv.org/abs/2306.14048",
        parameters: &[WINDOW, ratio(Name::HeavyRatio, 0.5), ratio(Name::RecentRatio, 0.5), INTERVAL],
        scored: true,
        parts: Parts::Ratios,
        ..PLAIN
    },
    // The fading mass keeps the text fluent; the peak keeps what was looked at hard once and may be asked for later. Neither counts looks
    // from nearby, which every token gets; both are weighted with what a look moves: long values, short keys. The values were chosen by
    // measurement, see docs/quality.md.
    Strategy {
        name: "liquid_fusion",
        summary: "the first tokens, the latest ones, and those with distinct keys, large fading attention mass or peak attention stay",
        parameters: &[
            WINDOW,
            SINKS,
            ratio(Name::SinkUpdateRate, 0.3),
            ratio(Name::HeavyRatio, 0.75),
            ratio(Name::RecentRatio, 0.25),
            ratio(Name::DistinctRatio, 0.3),
            ratio(Name::PeakRatio, 0.4),
            (Name::Sinks, Some(Value::Choice(PINNED))),
            (Name::ValueWeighted, Some(Value::Flag(true))),
            (Name::LookGap, Some(Value::Int(8))),
            (Name::PeakReach, None),
            (Name::Averaged, Some(Value::Flag(true))),
            (Name::AgeHalfLife, Some(Value::Int(4096))),
            INTERVAL,
        ],
        scored: true,
        fading: Fading::Rate,
        parts: Parts::Ratios,
        ..PLAIN
    },
    // Heavy hitters whose mass fades at once, so that it is the probability which the newest query gave. The paper averages this over all
    // heads of a layer; here each kv head decides for itself, by the mean of the query heads that share it.
    Strategy {
        name: "tova",
        summary: "the tokens that the last query looked at most stay",
        paper: "https://arxiv.org/abs/2401.06104",
        scored: true,
        fading: Fading::Factor(0.0),
        parts: Parts::Fixed(Shares::HEAVY),
        ..PLAIN
    },
    // The paper compresses a prompt once, by the attention of its last 32 queries. A bounded cache goes on deciding after the prompt, so
    // the hard window of 32 queries becomes an exponential one of the same length. The paper's kernel of 7 positions reaches 3 to either
    // side; it decides per query head, here the query heads that share a kv head decide together, by their mean.
    Strategy {
        name: "snapkv",
        summary: "the latest 32 tokens, and those in whose neighbourhood their queries looked most, stay",
        paper: "https://arxiv.org/abs/2404.14469",
        scored: true,
        fading: Fading::Factor(1.0 - 1.0 / SNAPKV_WINDOW as f64),
        parts: Parts::Window(SNAPKV_WINDOW),
        heavy: Heavy::Pooled(3),
        ..PLAIN
    },
    // Every token has a number of its own, so each (layer, kv head) holds another sample, and a batch row the same one as alone.
    Strategy {
        name: "random",
        summary: "the newest token and a uniform sample of all others stay: a control",
        parts: Parts::Fixed(Shares::HEAVY),
        heavy: Heavy::Drawn,
        ..PLAIN
    },
    // No attention is needed: a key that points where most keys point says little that the others do not. The paper scores all tokens
    // against their mean key, as is done here; that the newest token stays is due to the queue, which must not offer the token just read.
    Strategy {
        name: "keydiff",
        summary: "the newest token and those whose keys point farthest from all others' mean stay",
        paper: "https://arxiv.org/abs/2504.15364",
        parts: Parts::Fixed(Shares { distinct: 1.0, ..Shares::HEAVY }),
        ..PLAIN
    },
];

/// The strategy of that name.
pub fn find(name: &str) -> Result<&'static Strategy> {
    if let Some(strategy) = STRATEGIES.iter().find(|strategy| strategy.name == name) {
        return Ok(strategy);
    }
    let names: Vec<_> = STRATEGIES.iter().map(|strategy| strategy.name).collect();
    fail!(Config, "strategy must be one of {}, got {name:?}", names.join(", "))
}

impl Strategy {
    /// Whether it listens to a parameter.
    #[must_use]
    pub fn listens(&self, name: Name) -> bool {
        self.parameters.iter().any(|&(own, _)| own == name)
    }

    /// The error for a parameter that it does not listen to, or that is unknown.
    pub fn refuse(&self, parameter: &str) -> Result<()> {
        let own: Vec<_> = self.parameters.iter().map(|(name, _)| name.row().name).collect();
        let heard = if own.is_empty() { "no parameter".into() } else { own.join(", ") };
        fail!(Config, "{} does not listen to {parameter}; it listens to {heard}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for (i, strategy) in STRATEGIES.iter().enumerate() {
            assert!(!strategy.summary.is_empty());
            assert_eq!(STRATEGIES.iter().position(|s| s.name == strategy.name), Some(i));
            assert_eq!(find(strategy.name).unwrap().name, strategy.name);
        }
        assert!(find("lru").err().unwrap().to_string().ends_with("got \"lru\""));
    }

    #[test]
    fn own_values_are_in_range() {
        for strategy in STRATEGIES {
            for (name, value) in strategy.parameters {
                assert!(value.is_none_or(|value| name.row().check(value).is_ok()), "{}: {name:?}", strategy.name);
            }
            assert_eq!(
                strategy.bounded,
                strategy.listens(Name::WindowSize) && strategy.listens(Name::EvictionInterval)
            );
        }
    }
}
