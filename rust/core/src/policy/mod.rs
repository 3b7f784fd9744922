//! The eviction strategies: one file each, one trait, one registry.
//!
//! A new strategy is one file beside this one and one entry in [`REGISTRY`]; the bindings, tests and benchmarks enumerate it.

mod full;
mod h2o;
mod liquid_fusion;
mod local;
mod random;
mod snapkv;
mod streaming;
mod tova;

use crate::budget::{Shares, Split};
use crate::error::{Result, fail};
use crate::sinks::Sinks;
use crate::worth::Worth;

/// Factor by which peak attention fades per query token.
pub const PEAK_DECAY: f64 = 0.9995;

/// Query tokens over which `sink_update_rate` takes full effect.
pub const UPDATE_TOKENS: f64 = 64.0;

/// Length of the recent window when neither a budget nor a window is given.
pub const WINDOW_SIZE: usize = 256;

/// Every parameter a strategy may use. `None` means "the strategy's own" in a request and "not used" in defaults and results.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Parameters {
    /// Recent tokens that determine the budget when none is given: the budget itself where the recent window has no share.
    pub window_size: Option<usize>,
    /// Number of attention sinks.
    pub sink_size: Option<usize>,
    /// Rate with which the mass follows the attention; 0 never forgets.
    pub sink_update_rate: Option<f64>,
    /// Weight of the heavy hitters against `recent_ratio`.
    pub heavy_ratio: Option<f64>,
    /// Weight of the recent window against `heavy_ratio`.
    pub recent_ratio: Option<f64>,
    /// Part of the heavy hitters chosen by peak attention.
    pub peak_ratio: Option<f64>,
    /// How sinks are found.
    pub sinks: Option<Sinks>,
    /// Whether attention is weighted with the length of the value vectors.
    pub value_weighted: Option<bool>,
    /// Distance from which a look at a token counts.
    pub look_gap: Option<usize>,
    /// Distance up to which a look within a chunk counts for the peak.
    pub peak_reach: Option<usize>,
    /// Whether mass is judged per query that could look at the token.
    pub averaged: Option<bool>,
    /// Tokens of age that halve an averaged look; 0: age does not matter.
    pub age_half_life: Option<usize>,
}

impl Parameters {
    fn shares(&self) -> Shares {
        Shares {
            heavy: self.heavy_ratio.unwrap_or(0.0),
            recent: self.recent_ratio.unwrap_or(1.0),
            peak: self.peak_ratio.unwrap_or(0.0),
        }
    }
}

/// One way of deciding which tokens stay.
pub trait Strategy: Send + Sync {
    /// Name in the registry, the Python package and the command line.
    fn name(&self) -> &'static str;

    /// One line for humans.
    fn summary(&self) -> &'static str;

    /// Where the method was published; empty for our own.
    fn paper(&self) -> &'static str {
        ""
    }

    /// The parameters this strategy uses, with its own values; `None` for those it does not use.
    fn defaults(&self) -> Parameters;

    /// Whether memory is bounded by a budget.
    fn bounded(&self) -> bool {
        true
    }

    /// Whether attention probabilities are needed.
    fn scored(&self) -> bool {
        true
    }

    /// Factor by which the attention mass fades per query token.
    fn mass_decay(&self, parameters: &Parameters) -> f64 {
        parameters.sink_update_rate.map_or(1.0, |rate| (1.0 - rate).powf(1.0 / UPDATE_TOKENS))
    }

    /// Factor by which the peak attention fades per query token.
    fn peak_decay(&self) -> f64 {
        PEAK_DECAY
    }

    /// How the tokens beside the sinks are shared; `None`: all recent.
    fn shares(&self, parameters: &Parameters) -> Option<Shares> {
        self.scored().then(|| parameters.shares())
    }

    /// Divide `keep` tokens.
    fn split(&self, keep: usize, parameters: &Parameters) -> Split {
        Split::of(keep, parameters.sink_size.unwrap_or(0), self.shares(parameters))
    }

    /// What heavy hitters are chosen by, besides peak attention.
    fn worth(&self) -> Worth {
        Worth::Mass
    }
}

/// All strategies, in the order they are shown.
pub static REGISTRY: &[&dyn Strategy] = &[
    &full::Full,
    &local::Local,
    &streaming::Streaming,
    &h2o::H2o,
    &liquid_fusion::LiquidFusion,
    &tova::Tova,
    &snapkv::SnapKv,
    &random::Random,
];

/// The strategy of that name.
pub fn find(name: &str) -> Result<&'static dyn Strategy> {
    if let Some(strategy) = REGISTRY.iter().find(|s| s.name() == name) {
        return Ok(*strategy);
    }
    let names: Vec<_> = REGISTRY.iter().map(|s| s.name()).collect();
    fail!(Config, "strategy must be one of {}, got {name:?}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for (i, strategy) in REGISTRY.iter().enumerate() {
            assert!(!strategy.summary().is_empty());
            assert_eq!(REGISTRY.iter().position(|s| s.name() == strategy.name()), Some(i));
            assert_eq!(find(strategy.name()).unwrap().name(), strategy.name());
        }
        assert!(find("lru").err().unwrap().to_string().ends_with("got \"lru\""));
    }
}
