//! Core errors as the exceptions of `liquidfusion.exceptions`.

use liquidfusion_core::Error;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

macro_rules! class {
    ($py:expr, $name:literal) => {{
        static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        CLASS.import($py, "liquidfusion.exceptions", $name)
    }};
}

/// The exception for a core error.
pub(crate) fn raise(py: Python<'_>, error: Error) -> PyErr {
    let (class, text) = match error {
        Error::Config(text) => (class!(py, "ConfigError"), text),
        Error::Tensor(text) => (class!(py, "TensorError"), text),
        Error::Score(text) => (class!(py, "ScoreError"), text),
        Error::Cache(text) => (class!(py, "CacheError"), text),
    };
    match class {
        Ok(class) => PyErr::from_type(class.clone(), text),
        Err(error) => error,
    }
}

/// `TensorError` with this text.
pub(crate) fn tensor_error(py: Python<'_>, text: String) -> PyErr {
    raise(py, Error::Tensor(text))
}

/// `ConfigError` with this text.
pub(crate) fn config_error(py: Python<'_>, text: String) -> PyErr {
    raise(py, Error::Config(text))
}

/// Run `work` without the GIL; should it panic, a bug, raise `CacheError` rather than pyo3's `PanicException`.
pub(crate) fn released<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> liquidfusion_core::Result<T> + Send,
) -> PyResult<T> {
    let outcome = py.detach(|| std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)));
    outcome
        .unwrap_or_else(|_| Err(Error::Cache("internal error in the eviction core, please report it".into())))
        .map_err(|error| raise(py, error))
}
