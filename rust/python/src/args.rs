//! Numbers from Python, with errors that name the parameter.

use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;

use crate::error::{config_error, raise};

fn shown(value: &Bound<'_, PyAny>) -> String {
    value.repr().map_or_else(|_| "something without a repr".into(), |text| text.to_string())
}

/// An integer (anything with `__index__`); those beyond 64 bits saturate, to be refused by the range check that follows.
pub(crate) fn int(name: &str, value: &Bound<'_, PyAny>) -> PyResult<i64> {
    value.extract().or_else(|error: PyErr| {
        if error.is_instance_of::<PyOverflowError>(value.py()) {
            return Ok(if value.lt(0)? { i64::MIN } else { i64::MAX });
        }
        Err(config_error(value.py(), format!("{name} must be an integer, got {}", shown(value))))
    })
}

/// An integer, or `None`.
pub(crate) fn optional_int(name: &str, value: Option<&Bound<'_, PyAny>>) -> PyResult<Option<i64>> {
    value.map(|v| int(name, v)).transpose()
}

/// A number.
pub(crate) fn float(name: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    value.extract().map_err(|_| config_error(value.py(), format!("{name} must be a number, got {}", shown(value))))
}

/// A boolean.
pub(crate) fn boolean(name: &str, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    value.extract().map_err(|_| config_error(value.py(), format!("{name} must be True or False, got {}", shown(value))))
}

/// A text.
pub(crate) fn text(name: &str, value: &Bound<'_, PyAny>) -> PyResult<String> {
    value.extract().map_err(|_| config_error(value.py(), format!("{name} must be a string, got {}", shown(value))))
}

/// A sequence of integers.
pub(crate) fn ints(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<i64>> {
    let items = value.try_iter().map_err(|_| {
        config_error(value.py(), format!("{name} must be a sequence of integers, got {}", shown(value)))
    })?;
    items.map(|item| int(name, &item?)).collect()
}

/// Threads of the core: this cap, or else the environment's, or else one per core.
pub(crate) fn threads_of(py: Python<'_>, threads: Option<&Bound<'_, PyAny>>) -> PyResult<usize> {
    liquidfusion_core::threads::resolve(optional_int("threads", threads)?).map_err(|error| raise(py, error))
}
