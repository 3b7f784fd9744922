//! `encode`, `code_logits`, `code_outputs` and `code_squares`.

use half::f16;
use liquidfusion_core::codes::{self as core, Bits, Codes};
use liquidfusion_core::view::{View, ViewMut};
use pyo3::prelude::*;

use crate::args::{int, threads_of};
use crate::error::{raise, released};
use crate::tensor::{Access, Tensor, disjoint};

const STATES: &str = "[batch, kv_heads, columns, head_dim]";
const CODES: &str = "[batch, kv_heads, slots, bytes]";
const SCALES: &str = "[batch, kv_heads, slots]";

/// Coded slots as they came.
struct Coded {
    bits: Bits,
    codes: Tensor<u8, 4>,
    scales: Tensor<f16, 3>,
    threads: usize,
}

impl Coded {
    fn import(
        bits: &Bound<'_, PyAny>,
        codes: &Bound<'_, PyAny>,
        scales: &Bound<'_, PyAny>,
        threads: Option<&Bound<'_, PyAny>>,
        access: Access,
    ) -> PyResult<Self> {
        let py = codes.py();
        Ok(Self {
            bits: Bits::new(int("bits", bits)?).map_err(|error| raise(py, error))?,
            codes: Tensor::import("codes", CODES, codes, access)?,
            scales: Tensor::import("scales", SCALES, scales, access)?,
            threads: threads_of(py, threads)?,
        })
    }

    fn view(&self) -> liquidfusion_core::Result<Codes<'_>> {
        Ok(Codes {
            bits: self.bits,
            codes: View::new("codes", self.codes.slice(), self.codes.shape())?,
            scales: View::new("scales", self.scales.slice(), self.scales.shape())?,
        })
    }
}

/// Code keys or values.
#[pyfunction]
#[pyo3(signature = (states, mu, bits, codes, scales, *, threads=None))]
pub(crate) fn encode(
    py: Python<'_>,
    states: &Bound<'_, PyAny>,
    mu: Option<&Bound<'_, PyAny>>,
    bits: &Bound<'_, PyAny>,
    codes: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
    threads: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let states: Tensor<f32, 4> = Tensor::import("states", STATES, states, Access::Read)?;
    let mu = mu.map(|mu| Tensor::<f32, 2>::import("mu", "[kv_heads, head_dim]", mu, Access::Read)).transpose()?;
    let mut to = Coded::import(bits, codes, scales, threads, Access::Write)?;
    let mut spans = vec![("codes", to.codes.span()), ("scales", to.scales.span()), ("states", states.span())];
    spans.extend(mu.as_ref().map(|mu| ("mu", mu.span())));
    disjoint(py, &spans)?;
    released(py, || {
        let mu = mu.as_ref().map(|mu| View::new("mu", mu.slice(), mu.shape())).transpose()?;
        let (codes_shape, scales_shape) = (to.codes.shape(), to.scales.shape());
        core::encode(
            View::new("states", states.slice(), states.shape())?,
            mu,
            to.bits,
            ViewMut::new("codes", to.codes.slice_mut(), codes_shape)?,
            ViewMut::new("scales", to.scales.slice_mut(), scales_shape)?,
            to.threads,
        )
    })
}

/// Products of rotated queries with coded keys.
#[pyfunction]
#[pyo3(signature = (query, codes, scales, bits, out, *, threads=None))]
pub(crate) fn code_logits(
    py: Python<'_>,
    query: &Bound<'_, PyAny>,
    codes: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
    bits: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    threads: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let query: Tensor<f32, 4> = Tensor::import("query", "[batch, kv_heads, queries, width]", query, Access::Read)?;
    let mut out: Tensor<f32, 4> = Tensor::import("out", "[batch, kv_heads, queries, slots]", out, Access::Write)?;
    let keys = Coded::import(bits, codes, scales, threads, Access::Read)?;
    let read = [("query", query.span()), ("codes", keys.codes.span()), ("scales", keys.scales.span())];
    read.iter().try_for_each(|span| disjoint(py, &[("out", out.span()), span.clone()]))?;
    released(py, || {
        let shape = out.shape();
        let query = View::new("query", query.slice(), query.shape())?;
        core::logits(query, keys.view()?, ViewMut::new("out", out.slice_mut(), shape)?, keys.threads)
    })
}

/// Sums of coded values, still rotated.
#[pyfunction]
#[pyo3(signature = (probabilities, codes, scales, bits, out, *, threads=None))]
pub(crate) fn code_outputs(
    py: Python<'_>,
    probabilities: &Bound<'_, PyAny>,
    codes: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
    bits: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    threads: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    const LOOKS: &str = "[batch, kv_heads, queries, slots]";
    let looks: Tensor<f32, 4> = Tensor::import("probabilities", LOOKS, probabilities, Access::Read)?;
    let mut out: Tensor<f32, 4> = Tensor::import("out", "[batch, kv_heads, queries, width]", out, Access::Write)?;
    let values = Coded::import(bits, codes, scales, threads, Access::Read)?;
    let read = [("probabilities", looks.span()), ("codes", values.codes.span()), ("scales", values.scales.span())];
    read.iter().try_for_each(|span| disjoint(py, &[("out", out.span()), span.clone()]))?;
    released(py, || {
        let shape = out.shape();
        let looks = View::new("probabilities", looks.slice(), looks.shape())?;
        core::outputs(looks, values.view()?, ViewMut::new("out", out.slice_mut(), shape)?, values.threads)
    })
}

/// Squared lengths of coded vectors.
#[pyfunction]
#[pyo3(signature = (codes, scales, bits, out, *, threads=None))]
pub(crate) fn code_squares(
    py: Python<'_>,
    codes: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
    bits: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    threads: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let mut out: Tensor<f32, 3> = Tensor::import("out", SCALES, out, Access::Write)?;
    let vectors = Coded::import(bits, codes, scales, threads, Access::Read)?;
    let read = [("codes", vectors.codes.span()), ("scales", vectors.scales.span())];
    read.iter().try_for_each(|span| disjoint(py, &[("out", out.span()), span.clone()]))?;
    released(py, || {
        let shape = out.shape();
        core::squares(vectors.view()?, ViewMut::new("out", out.slice_mut(), shape)?, vectors.threads)
    })
}
