//! `Spec`, and what the registry knows about the strategies.

use liquidfusion_core::policy::{self, Parameters};
use liquidfusion_core::simd;
use liquidfusion_core::sinks::Sinks;
use liquidfusion_core::spec::{Request, Spec};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::args::{float, int, optional_bool, optional_float, optional_int, text};
use crate::error::raise;

/// A strategy with resolved, validated parameters.
#[pyclass(name = "Spec", module = "liquidfusion._core", frozen)]
pub(crate) struct PySpec(pub(crate) Spec);

/// Every parameter with its value; `None` for those not used.
fn parameters<'py>(py: Python<'py>, p: &Parameters) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("window_size", p.window_size)?;
    dict.set_item("sink_size", p.sink_size)?;
    dict.set_item("sink_update_rate", p.sink_update_rate)?;
    dict.set_item("heavy_ratio", p.heavy_ratio)?;
    dict.set_item("recent_ratio", p.recent_ratio)?;
    dict.set_item("peak_ratio", p.peak_ratio)?;
    dict.set_item("sinks", p.sinks.map(Sinks::name))?;
    dict.set_item("value_weighted", p.value_weighted)?;
    dict.set_item("look_gap", p.look_gap)?;
    dict.set_item("peak_reach", p.peak_reach)?;
    dict.set_item("averaged", p.averaged)?;
    dict.set_item("age_half_life", p.age_half_life)?;
    Ok(dict)
}

impl PySpec {
    /// The keyword arguments that make this spec again.
    fn arguments<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = self.params(py)?;
        dict.set_item("budget", self.0.budget())?;
        Ok(dict)
    }
}

#[pymethods]
impl PySpec {
    #[new]
    #[pyo3(signature = (strategy, budget=None, *, window_size=None, sink_size=None, sink_update_rate=None, heavy_ratio=None,
        recent_ratio=None, peak_ratio=None, eviction_interval=None, sinks=None, value_weighted=None, look_gap=None, peak_reach=None,
        averaged=None, age_half_life=None))]
    #[expect(clippy::too_many_arguments, reason = "Python keyword arguments")]
    fn new(
        strategy: &Bound<'_, PyAny>,
        budget: Option<&Bound<'_, PyAny>>,
        window_size: Option<&Bound<'_, PyAny>>,
        sink_size: Option<&Bound<'_, PyAny>>,
        sink_update_rate: Option<&Bound<'_, PyAny>>,
        heavy_ratio: Option<&Bound<'_, PyAny>>,
        recent_ratio: Option<&Bound<'_, PyAny>>,
        peak_ratio: Option<&Bound<'_, PyAny>>,
        eviction_interval: Option<&Bound<'_, PyAny>>,
        sinks: Option<&Bound<'_, PyAny>>,
        value_weighted: Option<&Bound<'_, PyAny>>,
        look_gap: Option<&Bound<'_, PyAny>>,
        peak_reach: Option<&Bound<'_, PyAny>>,
        averaged: Option<&Bound<'_, PyAny>>,
        age_half_life: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let py = strategy.py();
        let sinks = sinks.map(|v| Sinks::parse(&text("sinks", v)?).map_err(|error| raise(py, error))).transpose()?;
        let request = Request {
            budget: optional_int("budget", budget)?,
            window_size: optional_int("window_size", window_size)?,
            sink_size: optional_int("sink_size", sink_size)?,
            sink_update_rate: optional_float("sink_update_rate", sink_update_rate)?,
            heavy_ratio: optional_float("heavy_ratio", heavy_ratio)?,
            recent_ratio: optional_float("recent_ratio", recent_ratio)?,
            peak_ratio: optional_float("peak_ratio", peak_ratio)?,
            eviction_interval: optional_int("eviction_interval", eviction_interval)?,
            sinks,
            value_weighted: optional_bool("value_weighted", value_weighted)?,
            look_gap: optional_int("look_gap", look_gap)?,
            peak_reach: optional_int("peak_reach", peak_reach)?,
            averaged: optional_bool("averaged", averaged)?,
            age_half_life: optional_int("age_half_life", age_half_life)?,
        };
        let name = text("strategy", strategy)?;
        let spec = simd::check().and_then(|()| Spec::new(&name, &request));
        spec.map(Self).map_err(|error| raise(py, error))
    }

    /// Name of the strategy.
    #[getter]
    fn strategy(&self) -> &'static str {
        self.0.strategy().name()
    }

    /// Slots per layer, row and head; None when unbounded.
    #[getter]
    fn budget(&self) -> Option<usize> {
        self.0.budget()
    }

    /// Victims are chosen at least this many tokens before they are needed.
    #[getter]
    fn interval(&self) -> usize {
        self.0.interval()
    }

    /// Factor by which the attention mass fades per query token.
    #[getter]
    fn mass_decay(&self) -> f64 {
        self.0.mass_decay()
    }

    /// Factor by which the peak attention fades per query token.
    #[getter]
    fn peak_decay(&self) -> f64 {
        self.0.peak_decay()
    }

    /// Whether attention probabilities are needed.
    #[getter]
    fn scored(&self) -> bool {
        self.0.strategy().scored()
    }

    /// Whether memory is bounded.
    #[getter]
    fn bounded(&self) -> bool {
        self.0.strategy().bounded()
    }

    /// Whether probabilities are weighted with the length of the value vectors.
    #[getter]
    fn value_weighted(&self) -> bool {
        self.0.value_weighted()
    }

    /// A look at a token counts from this distance on, in tokens.
    #[getter]
    fn look_gap(&self) -> usize {
        self.0.look_gap()
    }

    /// A look at a token of its own chunk counts for the peak up to this many tokens away; None: from anywhere.
    #[getter]
    fn peak_reach(&self) -> Option<usize> {
        self.0.peak_reach()
    }

    /// Whether mass is judged per query that could look at the token.
    #[getter]
    fn averaged(&self) -> bool {
        self.0.averaged()
    }

    /// The parameters in force, None for those not used.
    #[getter]
    fn params<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = parameters(py, self.0.parameters())?;
        dict.set_item("eviction_interval", self.bounded().then(|| self.0.interval()))?;
        Ok(dict)
    }

    /// (sinks, recent, peak, mass) when `keep` tokens stay.
    fn split(&self, keep: &Bound<'_, PyAny>) -> PyResult<(usize, usize, usize, usize)> {
        let value = int("keep", keep)?;
        let Some(keep) = usize::try_from(value).ok().filter(|&k| (1..=i32::MAX as usize).contains(&k)) else {
            let text = format!("keep must be an integer from 1 to {}, got {value}", i32::MAX);
            return Err(crate::error::config_error(keep.py(), text));
        };
        let split = self.0.split(keep);
        Ok((split.sinks, split.recent, split.peak, split.mass))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let mut parts = vec![format!("{:?}", self.strategy())];
        for (name, value) in self.arguments(py)? {
            if !value.is_none() {
                parts.push(format!("{name}={}", value.repr()?));
            }
        }
        Ok(format!("Spec({})", parts.join(", ")))
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.strategy() == other.strategy()
            && (self.budget(), self.interval()) == (other.budget(), other.interval())
            && self.0.parameters() == other.0.parameters()
    }

    fn __hash__(&self) -> u64 {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        (self.strategy(), self.budget(), self.interval()).hash(&mut hasher);
        hasher.finish()
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        Ok((PyTuple::new(py, [self.strategy()])?, self.arguments(py)?))
    }
}

/// What the registry knows: name, summary, paper, parameters used and their defaults.
#[pyfunction]
pub(crate) fn strategies(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let list = PyList::empty(py);
    for strategy in policy::REGISTRY {
        let defaults = PyDict::new(py);
        for (name, value) in parameters(py, &strategy.defaults())? {
            if !value.is_none() {
                defaults.set_item(name, value)?;
            }
        }
        // These follow from the budget.
        if strategy.bounded() {
            defaults.set_item("eviction_interval", py.None())?;
        }
        if strategy.defaults().peak_ratio.is_some() {
            defaults.set_item("peak_reach", py.None())?;
        }
        let info = PyDict::new(py);
        info.set_item("name", strategy.name())?;
        info.set_item("summary", strategy.summary())?;
        info.set_item("paper", strategy.paper())?;
        info.set_item("parameters", defaults.keys())?;
        info.set_item("defaults", defaults)?;
        list.append(info)?;
    }
    Ok(list)
}

/// The budget that holds `percent` of a prompt, but at least `sink_size + 4`.
#[pyfunction]
pub(crate) fn budget_from_percent(
    percent: &Bound<'_, PyAny>,
    prompt_tokens: &Bound<'_, PyAny>,
    sink_size: &Bound<'_, PyAny>,
) -> PyResult<usize> {
    liquidfusion_core::budget::from_percent(
        float("percent", percent)?,
        int("prompt_tokens", prompt_tokens)?,
        int("sink_size", sink_size)?,
    )
    .map_err(|error| raise(percent.py(), error))
}
