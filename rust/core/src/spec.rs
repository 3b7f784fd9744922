//! A strategy with validated, resolved parameters.

use crate::budget::{self, LEAST_BESIDE_SINKS, Split, in_range};
use crate::error::{Result, fail};
use crate::policy::{self, Parameters, Strategy};
use crate::sinks::Sinks;
use crate::worth::Worth;

/// What a user asked for; `None` leaves the strategy its own default.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Request {
    /// Slots per layer, row and head.
    pub budget: Option<i64>,
    /// Recent tokens that determine the budget when none is given.
    pub window_size: Option<i64>,
    /// Number of attention sinks.
    pub sink_size: Option<i64>,
    /// Rate with which the mass follows the attention, 0 to 1.
    pub sink_update_rate: Option<f64>,
    /// Weight of the heavy hitters, 0 to 1.
    pub heavy_ratio: Option<f64>,
    /// Weight of the recent window, above 0 to 1.
    pub recent_ratio: Option<f64>,
    /// Part of the heavy hitters chosen by peak attention, 0 to 1.
    pub peak_ratio: Option<f64>,
    /// Tokens between two decisions.
    pub eviction_interval: Option<i64>,
    /// How sinks are found.
    pub sinks: Option<Sinks>,
    /// Whether attention is weighted with the length of the value vectors.
    pub value_weighted: Option<bool>,
    /// Tokens after a token before its looks count.
    pub look_gap: Option<i64>,
    /// How far a token's chunk may look at it for its peak.
    pub peak_reach: Option<i64>,
    /// Whether mass is judged per query that could look.
    pub averaged: Option<bool>,
    /// Tokens of age that halve an averaged look; 0 for none.
    pub age_half_life: Option<i64>,
}

/// A strategy ready for use.
#[derive(Clone)]
pub struct Spec {
    strategy: &'static dyn Strategy,
    budget: Option<usize>,
    interval: usize,
    parameters: Parameters,
}

impl std::fmt::Debug for Spec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spec")
            .field("strategy", &self.strategy.name())
            .field("budget", &self.budget)
            .field("interval", &self.interval)
            .field("parameters", &self.parameters)
            .finish()
    }
}

fn ratio(name: &str, value: Option<f64>, zero: bool) -> Result<()> {
    match value {
        Some(v) if !(v <= 1.0 && (v > 0.0 || zero && v >= 0.0)) => {
            let from = if zero { "from 0 to 1" } else { "above 0 and at most 1" };
            fail!(Config, "{name} must be a number {from}, got {v}")
        }
        _ => Ok(()),
    }
}

impl Spec {
    /// Check everything and fill in the strategy's own values. A parameter the strategy does not use is checked and ignored.
    pub fn new(strategy: &str, request: &Request) -> Result<Self> {
        let strategy = policy::find(strategy)?;
        let asked = |name, value: Option<i64>, least| value.map(|v| in_range(name, v, least)).transpose();
        let budget = asked("budget", request.budget, 1)?;
        let window = asked("window_size", request.window_size, 1)?;
        let sink_size = asked("sink_size", request.sink_size, 0)?;
        let interval = asked("eviction_interval", request.eviction_interval, 1)?;
        let look_gap = asked("look_gap", request.look_gap, 0)?;
        let peak_reach = asked("peak_reach", request.peak_reach, 1)?;
        let age_half_life = asked("age_half_life", request.age_half_life, 0)?;
        ratio("sink_update_rate", request.sink_update_rate, true)?;
        ratio("heavy_ratio", request.heavy_ratio, true)?;
        ratio("recent_ratio", request.recent_ratio, false)?;
        ratio("peak_ratio", request.peak_ratio, true)?;

        let own = strategy.defaults();
        let mut parameters = Parameters {
            window_size: own.window_size.map(|v| window.unwrap_or(v)),
            sink_size: own.sink_size.map(|v| sink_size.unwrap_or(v)),
            sink_update_rate: own.sink_update_rate.map(|v| request.sink_update_rate.unwrap_or(v)),
            heavy_ratio: own.heavy_ratio.map(|v| request.heavy_ratio.unwrap_or(v)),
            recent_ratio: own.recent_ratio.map(|v| request.recent_ratio.unwrap_or(v)),
            peak_ratio: own.peak_ratio.map(|v| request.peak_ratio.unwrap_or(v)),
            sinks: own.sinks.map(|v| request.sinks.unwrap_or(v)),
            value_weighted: own.value_weighted.map(|v| request.value_weighted.unwrap_or(v)),
            look_gap: own.look_gap.map(|v| look_gap.unwrap_or(v)),
            peak_reach: None,
            averaged: own.averaged.map(|v| request.averaged.unwrap_or(v)),
            age_half_life: own.age_half_life.map(|v| age_half_life.unwrap_or(v)),
        };
        if !strategy.bounded() {
            return Ok(Self { strategy, budget: None, interval: 1, parameters });
        }

        let sinks = parameters.sink_size.unwrap_or(0);
        let (size, from) = match (budget, parameters.window_size) {
            (Some(budget), _) => {
                // An explicit budget decides; the window is not in force.
                parameters.window_size = None;
                (budget, format!("budget {budget}"))
            }
            (None, Some(window)) => (
                budget::from_window(window, sinks, strategy.shares(&parameters)),
                format!("window_size {window} (a budget of ")
                    + &budget::from_window(window, sinks, strategy.shares(&parameters)).to_string()
                    + ")",
            ),
            (None, None) => fail!(Config, "{} needs a budget", strategy.name()),
        };
        if size < sinks + LEAST_BESIDE_SINKS || size > budget::MOST_TOKENS {
            fail!(
                Config,
                "{from} is out of range: {} with {sinks} sinks needs a budget from {} to {}",
                strategy.name(),
                sinks + LEAST_BESIDE_SINKS,
                budget::MOST_TOKENS
            );
        }
        let most = budget::most_interval(size, sinks);
        let interval = interval.unwrap_or_else(|| budget::default_interval(size, sinks));
        if interval > most {
            fail!(
                Config,
                "eviction_interval must be at most {most} with a budget of {size} and {sinks} sinks, got {interval}"
            );
        }
        // Looks that are left out must fall on tokens that the recent window protects anyway.
        let recent = strategy.split(size, &parameters).recent;
        parameters.look_gap = parameters.look_gap.map(|gap| gap.min(recent));
        parameters.peak_reach = parameters.peak_ratio.map(|_| peak_reach.unwrap_or(size));
        Ok(Self { strategy, budget: Some(size), interval, parameters })
    }

    /// The strategy.
    #[must_use]
    pub fn strategy(&self) -> &'static dyn Strategy {
        self.strategy
    }

    /// Slots per layer, row and head; `None` when unbounded.
    #[must_use]
    pub fn budget(&self) -> Option<usize> {
        self.budget
    }

    /// Victims are chosen at least this many tokens before they are needed.
    #[must_use]
    pub fn interval(&self) -> usize {
        self.interval
    }

    /// The parameters in force; `None` for those not used.
    #[must_use]
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Factor by which the attention mass fades per query token.
    #[must_use]
    pub fn mass_decay(&self) -> f64 {
        self.strategy.mass_decay(&self.parameters)
    }

    /// Factor by which the peak attention fades per query token.
    #[must_use]
    pub fn peak_decay(&self) -> f64 {
        self.strategy.peak_decay()
    }

    /// Whether scores are weighted with the length of the value vectors.
    #[must_use]
    pub fn value_weighted(&self) -> bool {
        self.parameters.value_weighted.unwrap_or(false)
    }

    /// A look at a token counts once this many tokens lie between: 0 counts a token's own query, 1 the next one.
    #[must_use]
    pub fn look_gap(&self) -> usize {
        self.parameters.look_gap.unwrap_or(0)
    }

    /// A look at a token of its own chunk counts for the peak up to this many tokens away.
    ///
    /// In a chunk longer than the budget every token is still there to be looked at from afar, late, by a phrase that repeats; such
    /// fresh peaks would drive out those of tokens that matter. Fed in shorter chunks, most of these tokens would have been gone.
    #[must_use]
    pub fn peak_reach(&self) -> Option<usize> {
        self.parameters.peak_reach
    }

    /// Whether mass is judged per query that could look at the token.
    #[must_use]
    pub fn averaged(&self) -> bool {
        self.parameters.averaged.unwrap_or(false)
    }

    /// Tokens of age that halve an averaged look, where age matters.
    #[must_use]
    pub fn age_half_life(&self) -> Option<usize> {
        self.parameters.age_half_life.filter(|&tokens| tokens > 0)
    }

    /// How sinks are found.
    #[must_use]
    pub fn sinks(&self) -> Sinks {
        self.parameters.sinks.unwrap_or_default()
    }

    /// What heavy hitters are chosen by, besides peak attention.
    #[must_use]
    pub fn worth(&self) -> Worth {
        self.strategy.worth()
    }

    /// Divide `keep` tokens.
    #[must_use]
    pub fn split(&self, keep: usize) -> Split {
        self.strategy.split(keep, &self.parameters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::REGISTRY;

    fn config_error(strategy: &str, request: &Request) -> String {
        match Spec::new(strategy, request) {
            Err(crate::Error::Config(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn defaults_resolve_for_every_strategy() {
        for strategy in REGISTRY {
            let spec = Spec::new(strategy.name(), &Request::default()).unwrap();
            assert_eq!(spec.budget().is_some(), strategy.bounded());
            if let Some(budget) = spec.budget() {
                assert!(spec.split(budget).recent == 256 || budget == 256, "{}", strategy.name());
                assert_eq!(spec.split(budget).total(), budget);
                let given = Request { budget: Some(budget as i64), ..Request::default() };
                assert_eq!(Spec::new(strategy.name(), &given).unwrap().split(budget), spec.split(budget));
            }
        }
    }

    #[test]
    fn bad_values_are_named() {
        let base = Request::default();
        for strategy in REGISTRY {
            let text = config_error(strategy.name(), &Request { heavy_ratio: Some(-0.5), ..base });
            assert_eq!(text, "heavy_ratio must be a number from 0 to 1, got -0.5");
            assert!(config_error(strategy.name(), &Request { peak_ratio: Some(f64::NAN), ..base }).contains("NaN"));
            assert!(config_error(strategy.name(), &Request { recent_ratio: Some(0.0), ..base }).contains("above 0"));
            assert!(config_error(strategy.name(), &Request { sink_size: Some(-1), ..base }).contains("got -1"));
        }
        assert!(config_error("h2o", &Request { budget: Some(3), ..base }).contains("budget 3 is out of range"));
        assert!(config_error("streaming", &Request { budget: Some(7), ..base }).contains("from 8 to"));
        let text = config_error("local", &Request { budget: Some(80), eviction_interval: Some(11), ..base });
        assert_eq!(text, "eviction_interval must be at most 10 with a budget of 80 and 0 sinks, got 11");
        assert!(config_error("streaming", &Request { window_size: Some(2), ..base }).contains("window_size 2"));
    }

    #[test]
    fn unused_parameters_are_ignored() {
        let request = Request { sink_size: Some(9), peak_ratio: Some(1.0), budget: Some(64), ..Request::default() };
        let spec = Spec::new("h2o", &request).unwrap();
        assert_eq!(spec.parameters().sink_size, None);
        assert_eq!(spec.split(64), Split { sinks: 0, recent: 32, peak: 0, mass: 32 });
        let full = Spec::new("full", &request).unwrap();
        assert_eq!((full.budget(), *full.parameters()), (None, Parameters::default()));
    }

    #[test]
    fn rivals_have_their_papers_numbers() {
        let sized = |name, budget| Spec::new(name, &Request { budget: Some(budget), ..Request::default() }).unwrap();
        let split = |recent, mass| Split { sinks: 0, recent, peak: 0, mass };
        for name in ["tova", "random"] {
            assert_eq!(sized(name, 40).split(40), split(1, 39));
            assert_eq!(sized(name, 40).split(1), split(1, 0));
        }
        assert_eq!(
            [40, 65, 500, 1].map(|keep| sized("snapkv", 500).split(keep)),
            [split(20, 20), split(32, 33), split(32, 468), split(1, 0)]
        );
        assert_eq!(
            ["tova", "snapkv"].map(|name| sized(name, 40).mass_decay().to_bits()),
            [0.0, 0.96875].map(f64::to_bits)
        );
        assert!(config_error("tova", &Request { budget: Some(3), ..Request::default() }).contains("from 4 to"));
    }

    #[test]
    fn decay_follows_the_update_rate() {
        let rate =
            |r| Spec::new("liquid_fusion", &Request { sink_update_rate: Some(r), ..Request::default() }).unwrap();
        assert!((rate(0.1).mass_decay() - 0.9f64.powf(1.0 / 64.0)).abs() < 1e-15);
        assert!((rate(0.0).mass_decay() - 1.0).abs() < 1e-15);
        assert!(rate(1.0).mass_decay().abs() < 1e-15);
    }
}
