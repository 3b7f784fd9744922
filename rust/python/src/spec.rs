//! `Spec`, and the tables of strategies and parameters.

use liquidfusion_core::params::{self, Kind, Name, PARAMETERS, Parameter, Value};
use liquidfusion_core::simd;
use liquidfusion_core::spec::{PEAK_DECAY, Spec};
use liquidfusion_core::split::{self, MOST_TOKENS};
use liquidfusion_core::strategy::{self, STRATEGIES, Strategy};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::args::{boolean, float, int, optional_int, text};
use crate::error::{config_error, raise};

/// A strategy with resolved, validated parameters.
#[pyclass(name = "Spec", module = "liquidfusion._core", frozen)]
pub(crate) struct PySpec(pub(crate) Spec);

fn object(py: Python<'_>, value: Option<Value>) -> PyResult<Bound<'_, PyAny>> {
    Ok(match value {
        None => py.None().into_bound(py),
        Some(Value::Int(value)) => value.into_pyobject(py)?.into_any(),
        Some(Value::Ratio(value)) => value.into_pyobject(py)?.into_any(),
        Some(Value::Flag(value)) => value.into_pyobject(py)?.to_owned().into_any(),
        Some(Value::Choice(value)) => value.into_pyobject(py)?.into_any(),
    })
}

/// What came for a parameter, as its kind has it.
fn value(parameter: &Parameter, came: &Bound<'_, PyAny>) -> PyResult<Value> {
    let name = parameter.name;
    Ok(match parameter.kind {
        Kind::Int { .. } => Value::Int(int(name, came)?),
        // Of the two zeros the one that everybody means.
        Kind::Ratio { .. } => Value::Ratio(float(name, came)? + 0.0),
        Kind::Flag => Value::Flag(boolean(name, came)?),
        Kind::Choice(words) => {
            let word = text(name, came)?;
            let Some(known) = words.iter().find(|known| **known == word) else {
                let accepted: Vec<_> = words.iter().map(|known| format!("{known:?}")).collect();
                let text = format!("{name} must be {}, got {word:?}", accepted.join(" or "));
                return Err(config_error(came.py(), text));
            };
            Value::Choice(known)
        }
    })
}

fn given(strategy: &Strategy, parameters: &Bound<'_, PyDict>) -> PyResult<Vec<(Name, Value)>> {
    let mut given = Vec::new();
    for (name, came) in parameters {
        let name = text("a parameter's name", &name)?;
        match params::find(&name) {
            None => strategy.refuse(&name).map_err(|error| raise(parameters.py(), error))?,
            Some(_) if came.is_none() => {}
            Some(parameter) => given.push((parameter.id, value(parameter, &came)?)),
        }
    }
    Ok(given)
}

impl PySpec {
    /// The keyword arguments that make this spec again.
    fn arguments<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (budget, given) = self.0.arguments();
        let dict = PyDict::new(py);
        if budget.is_some() {
            dict.set_item("budget", budget)?;
        }
        for (name, value) in given {
            dict.set_item(name.row().name, object(py, Some(value))?)?;
        }
        Ok(dict)
    }
}

#[pymethods]
impl PySpec {
    #[new]
    #[pyo3(signature = (strategy, budget=None, **parameters))]
    fn new(
        strategy: &Bound<'_, PyAny>,
        budget: Option<&Bound<'_, PyAny>>,
        parameters: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let py = strategy.py();
        let name = text("strategy", strategy)?;
        let row = simd::check().and_then(|()| strategy::find(&name)).map_err(|error| raise(py, error))?;
        let given = parameters.map_or(Ok(Vec::new()), |parameters| given(row, parameters))?;
        Spec::new(&name, optional_int("budget", budget)?, &given).map(Self).map_err(|error| raise(py, error))
    }

    /// Name of the strategy.
    #[getter]
    fn strategy(&self) -> &'static str {
        self.0.strategy().name
    }

    /// Slots per layer, row and kv head; None when unbounded.
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
    #[expect(clippy::unused_self, reason = "Python reads it beside mass_decay")]
    fn peak_decay(&self) -> f64 {
        PEAK_DECAY
    }

    /// Whether attention probabilities are needed.
    #[getter]
    fn scored(&self) -> bool {
        self.0.strategy().scored
    }

    /// Whether decisions need to be told how distinct each token's key is.
    #[getter]
    fn distinct(&self) -> bool {
        self.0.distinct()
    }

    /// Whether memory is bounded.
    #[getter]
    fn bounded(&self) -> bool {
        self.0.strategy().bounded
    }

    /// Whether probabilities are weighted with the length of the value vectors.
    #[getter]
    fn value_weighted(&self) -> bool {
        self.0.values().flag(Name::ValueWeighted)
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

    /// Every parameter with its value; None for those not used.
    #[getter]
    fn params<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for parameter in &PARAMETERS {
            dict.set_item(parameter.name, object(py, self.0.values().get(parameter.id))?)?;
        }
        Ok(dict)
    }

    /// (sinks, recent, peak, mass) when `keep` tokens stay; what they leave is chosen by distinctness.
    fn split(&self, keep: &Bound<'_, PyAny>) -> PyResult<(usize, usize, usize, usize)> {
        let value = int("keep", keep)?;
        let Some(keep) = usize::try_from(value).ok().filter(|k| (1..=MOST_TOKENS).contains(k)) else {
            let text = format!("keep must be an integer from 1 to {MOST_TOKENS}, got {value}");
            return Err(config_error(keep.py(), text));
        };
        let split = self.0.split(keep);
        Ok((split.sinks, split.recent, split.peak, split.mass))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let mut parts = vec![format!("{:?}", self.strategy())];
        for (name, value) in self.arguments(py)? {
            parts.push(format!("{name}={}", value.repr()?));
        }
        Ok(format!("Spec({})", parts.join(", ")))
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.0 == other.0
    }

    fn __hash__(&self) -> u64 {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        // Ratios are left out: those that are equal need not have equal bits.
        (self.strategy(), self.0.budget(), self.0.interval(), self.0.look_gap()).hash(&mut hasher);
        hasher.finish()
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        Ok((PyTuple::new(py, [self.strategy()])?, self.arguments(py)?))
    }
}

/// What the table knows of the strategies: name, summary, paper, parameters listened to and their own values.
#[pyfunction]
pub(crate) fn strategies(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let list = PyList::empty(py);
    for strategy in STRATEGIES {
        let defaults = PyDict::new(py);
        for &(name, value) in strategy.parameters {
            defaults.set_item(name.row().name, object(py, value)?)?;
        }
        let info = PyDict::new(py);
        info.set_item("name", strategy.name)?;
        info.set_item("summary", strategy.summary)?;
        info.set_item("paper", strategy.paper)?;
        info.set_item("parameters", defaults.keys())?;
        info.set_item("defaults", defaults)?;
        list.append(info)?;
    }
    Ok(list)
}

/// The one table of parameters: name, kind, range and explanation of each.
#[pyfunction]
pub(crate) fn parameters(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let list = PyList::empty(py);
    for parameter in &PARAMETERS {
        let info = PyDict::new(py);
        info.set_item("name", parameter.name)?;
        let (kind, least, most, open_low, choices) = match parameter.kind {
            Kind::Int { least } => {
                ("int", Some(Value::Int(least as i64)), Some(Value::Int(MOST_TOKENS as i64)), false, &[][..])
            }
            Kind::Ratio { above } => ("float", Some(Value::Ratio(0.0)), Some(Value::Ratio(1.0)), above, &[][..]),
            Kind::Flag => ("bool", None, None, false, &[][..]),
            Kind::Choice(words) => ("choice", None, None, false, words),
        };
        info.set_item("kind", kind)?;
        info.set_item("least", object(py, least)?)?;
        info.set_item("most", object(py, most)?)?;
        info.set_item("open_low", open_low)?;
        info.set_item("choices", choices)?;
        info.set_item("help", parameter.help)?;
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
    split::from_percent(float("percent", percent)?, int("prompt_tokens", prompt_tokens)?, int("sink_size", sink_size)?)
        .map_err(|error| raise(percent.py(), error))
}
