//! `liquidfusion._core`: the Rust core for Python.
//!
//! `tensor` makes zero-copy views and holds the only unsafe code; the rest checks arguments, releases the GIL and maps errors.
#![deny(clippy::undocumented_unsafe_blocks)]

mod accumulate;
mod args;
mod attend;
mod codes;
mod error;
mod ledger;
mod spec;
mod tensor;

use pyo3::prelude::*;
use pyo3::types::PyDict;

/// How this extension was built and what it uses here: version, profile, target, simd.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    info.set_item("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS))?;
    info.set_item("simd", liquidfusion_core::simd::name())?;
    Ok(info)
}

/// The Rust core of `LiquidFusion`.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<spec::PySpec>()?;
    module.add_class::<ledger::PyLedger>()?;
    module.add_function(wrap_pyfunction!(spec::strategies, module)?)?;
    module.add_function(wrap_pyfunction!(spec::parameters, module)?)?;
    module.add_function(wrap_pyfunction!(spec::budget_from_percent, module)?)?;
    module.add_function(wrap_pyfunction!(accumulate::accumulate, module)?)?;
    module.add_function(wrap_pyfunction!(attend::softmax, module)?)?;
    module.add_function(wrap_pyfunction!(attend::step_coded, module)?)?;
    module.add_function(wrap_pyfunction!(attend::step, module)?)?;
    module.add_function(wrap_pyfunction!(codes::encode, module)?)?;
    module.add_function(wrap_pyfunction!(codes::code_logits, module)?)?;
    module.add_function(wrap_pyfunction!(codes::code_outputs, module)?)?;
    module.add_function(wrap_pyfunction!(codes::code_squares, module)?)?;
    module.add_function(wrap_pyfunction!(build_info, module)?)?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))
}
