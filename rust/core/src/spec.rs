//! A strategy with its parameters resolved: a row of the table, ready for use.

use crate::error::{Result, fail};
use crate::params::{ADAPTIVE, Name, PARAMETERS, Value, Values, in_range};
use crate::score::{Average, Averaged, Drawn, Mass, Pooled, Score};
use crate::split::{self, LEAST_BESIDE_SINKS, MOST_TOKENS, Shares, Split};
use crate::strategy::{self, Fading, Heavy, Parts, Strategy};

/// Factor by which peak attention fades per query token.
pub const PEAK_DECAY: f64 = 0.9995;

/// Query tokens over which `sink_update_rate` takes full effect.
pub const UPDATE_TOKENS: f64 = 64.0;

/// A strategy ready for use.
#[derive(Debug, Clone)]
pub struct Spec {
    strategy: &'static Strategy,
    budget: Option<usize>,
    values: Values,
}

impl Spec {
    /// Check everything and fill in the strategy's own values.
    ///
    /// A parameter that the strategy does not listen to is an error. With a budget `window_size` is not in force.
    pub fn new(strategy: &str, budget: Option<i64>, given: &[(Name, Value)]) -> Result<Self> {
        let strategy = strategy::find(strategy)?;
        let budget = budget.map(|value| in_range("budget", value, 1)).transpose()?;
        let mut values = Values::default();
        for &(name, own) in strategy.parameters {
            values.set(name, own);
        }
        for &(name, value) in given {
            name.row().check(value)?;
            if !strategy.listens(name) {
                strategy.refuse(name.row().name)?;
            }
            values.set(name, Some(value));
        }
        let mut spec = Self { strategy, budget, values };
        if strategy.bounded {
            spec.fit()?;
        } else {
            spec.budget = None;
        }
        Ok(spec)
    }

    /// Settle the budget, and what depends on it.
    fn fit(&mut self) -> Result<()> {
        let name = self.strategy.name;
        let sinks = self.values.int(Name::SinkSize).unwrap_or(0);
        let (size, from) = match (self.budget, self.values.int(Name::WindowSize)) {
            (Some(budget), _) => {
                self.values.set(Name::WindowSize, None);
                (budget, format!("budget {budget}"))
            }
            (None, Some(window)) => {
                let size = split::from_window(window, sinks, self.shares());
                (size, format!("window_size {window} (a budget of {size})"))
            }
            (None, None) => fail!(Config, "{name} needs a budget"),
        };
        let least = sinks + LEAST_BESIDE_SINKS;
        if size < least || size > MOST_TOKENS {
            fail!(
                Config,
                "{from} is out of range: {name} with {sinks} sinks needs a budget from {least} to {MOST_TOKENS}"
            );
        }
        self.budget = Some(size);
        let most = split::most_interval(size, sinks);
        let interval = self.values.int(Name::EvictionInterval).unwrap_or_else(|| split::default_interval(size, sinks));
        if interval > most {
            fail!(
                Config,
                "eviction_interval must be at most {most} with a budget of {size} and {sinks} sinks, got {interval}"
            );
        }
        self.set_int(Name::EvictionInterval, interval);
        if self.strategy.listens(Name::LookGap) {
            // Looks that are left out must fall on tokens that the recent window protects anyway.
            self.set_int(Name::LookGap, self.look_gap().min(self.split(size).recent));
        }
        if self.strategy.listens(Name::PeakReach) {
            self.set_int(Name::PeakReach, self.peak_reach().unwrap_or(size));
        }
        Ok(())
    }

    fn set_int(&mut self, name: Name, value: usize) {
        self.values.set(name, Some(Value::Int(value as i64)));
    }

    /// The strategy.
    #[must_use]
    pub fn strategy(&self) -> &'static Strategy {
        self.strategy
    }

    /// Slots per layer, row and kv head; `None` when unbounded.
    #[must_use]
    pub fn budget(&self) -> Option<usize> {
        self.budget
    }

    /// The parameters in force; none for those not used.
    #[must_use]
    pub fn values(&self) -> &Values {
        &self.values
    }

    /// Victims are chosen at least this many tokens before they are needed.
    #[must_use]
    pub fn interval(&self) -> usize {
        self.values.int(Name::EvictionInterval).unwrap_or(1)
    }

    /// Factor by which the attention mass fades per query token.
    #[must_use]
    pub fn mass_decay(&self) -> f64 {
        match self.strategy.fading {
            Fading::Factor(factor) => factor,
            Fading::Rate => (1.0 - self.values.ratio(Name::SinkUpdateRate).unwrap_or(0.0)).powf(1.0 / UPDATE_TOKENS),
        }
    }

    /// A look at a token counts once this many tokens lie between: 0 counts a token's own query, 1 the next one.
    #[must_use]
    pub fn look_gap(&self) -> usize {
        self.values.int(Name::LookGap).unwrap_or(0)
    }

    /// A look at a token of its own chunk counts for the peak up to this many tokens away.
    ///
    /// In a chunk longer than the budget every token is still there to be looked at from afar, late, by a phrase that repeats; such
    /// fresh peaks would drive out those of tokens that matter. Fed in shorter chunks, most of these tokens would have been gone.
    #[must_use]
    pub fn peak_reach(&self) -> Option<usize> {
        self.values.int(Name::PeakReach)
    }

    /// Whether mass is judged per query that could look at the token.
    #[must_use]
    pub fn averaged(&self) -> bool {
        self.values.flag(Name::Averaged)
    }

    /// Tokens of age that halve an averaged mass, where age matters.
    #[must_use]
    pub fn age_half_life(&self) -> Option<usize> {
        self.values.int(Name::AgeHalfLife).filter(|&tokens| tokens > 0)
    }

    /// Whether the sinks are chosen at each decision, instead of being the first tokens.
    #[must_use]
    pub fn adaptive(&self) -> bool {
        self.values.get(Name::Sinks) == Some(Value::Choice(ADAPTIVE))
    }

    /// Whether decisions need to be told how distinct each token's key is.
    #[must_use]
    pub fn distinct(&self) -> bool {
        self.shares().is_some_and(|shares| shares.distinct > 0.0)
    }

    fn shares(&self) -> Option<Shares> {
        let ratio = |name| self.values.ratio(name).unwrap_or(0.0);
        match self.strategy.parts {
            Parts::Recent => None,
            Parts::Fixed(shares) => Some(shares),
            Parts::Window(_) => Some(Shares::HEAVY),
            Parts::Ratios => Some(Shares {
                heavy: ratio(Name::HeavyRatio),
                recent: ratio(Name::RecentRatio),
                distinct: ratio(Name::DistinctRatio),
                peak: ratio(Name::PeakRatio),
            }),
        }
    }

    /// How many tokens of each kind stay when `keep` stay in all, at least 1.
    #[must_use]
    pub fn split(&self, keep: usize) -> Split {
        if let Parts::Window(window) = self.strategy.parts {
            let recent = window.min(keep / 2).max(1);
            return Split { recent, mass: keep - recent, ..Split::default() };
        }
        Split::of(keep, self.values.int(Name::SinkSize).unwrap_or(0), self.shares())
    }

    /// What the last of the heavy hitters are chosen by.
    pub(crate) fn heavy<'a>(&self, average: Option<&'a Average>) -> Box<dyn Score + 'a> {
        match (self.strategy.heavy, average) {
            (Heavy::Mass, None) => Box::new(Mass),
            (Heavy::Mass, Some(average)) => Box::new(Averaged(average)),
            (Heavy::Pooled(reach), _) => Box::new(Pooled(reach)),
            (Heavy::Drawn, _) => Box::new(Drawn),
        }
    }

    /// What makes this spec again: its budget, unless that follows from the window, and the parameters in force.
    #[must_use]
    pub fn arguments(&self) -> (Option<usize>, Vec<(Name, Value)>) {
        let budget = self.budget.filter(|_| self.values.get(Name::WindowSize).is_none());
        let given = PARAMETERS.iter().filter_map(|row| self.values.get(row.id).map(|value| (row.id, value)));
        (budget, given.collect())
    }
}

impl PartialEq for Spec {
    fn eq(&self, other: &Self) -> bool {
        (self.strategy.name, self.budget, self.values) == (other.strategy.name, other.budget, other.values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::strategy::STRATEGIES;

    fn spec(name: &str, budget: Option<i64>, given: &[(Name, Value)]) -> Spec {
        Spec::new(name, budget, given).unwrap()
    }

    fn config_error(name: &str, budget: Option<i64>, given: &[(Name, Value)]) -> String {
        match Spec::new(name, budget, given) {
            Err(crate::Error::Config(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn windows_and_budgets() {
        let budgets: Vec<_> = STRATEGIES.iter().map(|s| spec(s.name, None, &[]).budget()).collect();
        let expected = [None, Some(256), Some(260), Some(512), Some(1028), Some(256), Some(256), Some(256), Some(256)];
        assert_eq!(budgets, expected);
        let given = spec("h2o", Some(64), &[(Name::WindowSize, Value::Int(9))]);
        assert_eq!((given.budget(), given.values().int(Name::WindowSize)), (Some(64), None));
        assert_eq!(spec("full", Some(64), &[]).budget(), None);
    }

    #[test]
    fn own_and_given_parameters() {
        let own = spec("liquid_fusion", Some(64), &[]);
        assert_eq!(own.split(64), Split { sinks: 4, recent: 15, distinct: 14, peak: 18, mass: 13 });
        assert_eq!((own.look_gap(), own.peak_reach(), own.interval()), (8, Some(64), 2));
        let without = spec("liquid_fusion", Some(64), &[(Name::DistinctRatio, Value::Ratio(0.0))]);
        assert_eq!(without.split(64), Split { sinks: 4, recent: 15, distinct: 0, peak: 18, mass: 27 });
        assert_eq!([own.distinct(), without.distinct()], [true, false]);
        let narrow = spec("liquid_fusion", Some(64), &[(Name::LookGap, Value::Int(50))]);
        assert_eq!(narrow.look_gap(), 15);
    }

    #[test]
    fn what_is_not_listened_to_is_refused() {
        let text = config_error("h2o", None, &[(Name::SinkSize, Value::Int(4))]);
        assert!(text.starts_with("h2o does not listen to sink_size; it listens to window_size, heavy_ratio"), "{text}");
        assert!(config_error("full", None, &[(Name::PeakRatio, Value::Ratio(2.0))]).contains("got 2"));
        let text = config_error("full", None, &[(Name::WindowSize, Value::Int(4))]);
        assert!(text.ends_with("it listens to no parameter"), "{text}");
    }

    #[test]
    fn sizes_are_checked() {
        assert!(config_error("liquid_fusion", Some(7), &[]).contains("budget 7 is out of range"));
        assert!(
            config_error("local", None, &[(Name::WindowSize, Value::Int(2))]).contains("window_size 2 (a budget of 2)")
        );
        assert!(config_error("tova", Some(3), &[]).contains("from 4 to"));
        let text = config_error("h2o", Some(64), &[(Name::EvictionInterval, Value::Int(9))]);
        assert!(text.contains("at most 8"), "{text}");
    }

    #[test]
    fn rivals_have_their_papers_numbers() {
        let split = |recent, mass| Split { recent, mass, ..Split::default() };
        for name in ["tova", "random"] {
            assert_eq!(spec(name, Some(40), &[]).split(40), split(1, 39));
            assert_eq!(spec(name, Some(40), &[]).split(1), split(1, 0));
        }
        assert_eq!(
            [40, 65, 500, 1].map(|keep| spec("snapkv", Some(500), &[]).split(keep)),
            [split(20, 20), split(32, 33), split(32, 468), split(1, 0)]
        );
        let keydiff = spec("keydiff", Some(40), &[]);
        assert_eq!(keydiff.split(40), Split { recent: 1, distinct: 39, ..Split::default() });
        assert!(keydiff.distinct() && !keydiff.strategy().scored);
        let decay = |name| spec(name, Some(40), &[]).mass_decay();
        assert_eq!(["tova", "snapkv", "h2o"].map(|name| decay(name).to_bits()), [0.0, 0.96875, 1.0].map(f64::to_bits));
    }

    #[test]
    fn decay_follows_the_update_rate() {
        let decay = |rate| spec("liquid_fusion", None, &[(Name::SinkUpdateRate, Value::Ratio(rate))]).mass_decay();
        assert!((decay(0.1) - 0.9f64.powf(1.0 / 64.0)).abs() < 1e-15);
        assert!((decay(0.0) - 1.0).abs() < 1e-15);
        assert!(decay(1.0).abs() < 1e-15);
    }

    #[test]
    fn arguments_make_the_same_again() {
        for strategy in STRATEGIES {
            for budget in [None, Some(64)] {
                let one = spec(strategy.name, budget, &[]);
                let (size, given) = one.arguments();
                assert_eq!(spec(strategy.name, size.map(|n| n as i64), &given), one);
            }
        }
        assert_ne!(spec("h2o", None, &[]), spec("h2o", Some(512), &[]));
        assert_ne!(spec("h2o", Some(64), &[]), spec("tova", Some(64), &[]));
    }
}
