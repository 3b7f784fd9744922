//! `softmax` and `step`: attention on the CPU.

use dlpark::DlpackElement;
use half::bf16;
use liquidfusion_core::accumulate::Decay;
use liquidfusion_core::attend::{self as core, Held, Number, Scores, Token, Window};
use liquidfusion_core::view::{View, ViewMut};
use pyo3::prelude::*;

use crate::args::{boolean, float, int, ints, threads_of};
use crate::error::{config_error, released, tensor_error};
use crate::tensor::{Access, AnyTensor, Tensor, disjoint, dtype_name};

fn small(py: Python<'_>, name: &str, value: i64) -> PyResult<i32> {
    i32::try_from(value).map_err(|_| config_error(py, format!("{name} must be from 0 to {}, got {value}", i32::MAX)))
}

fn window_of(window: &Bound<'_, PyAny>, chunked: &Bound<'_, PyAny>) -> PyResult<Window> {
    let size = small(window.py(), "window", int("window", window)?)?;
    Ok(match (size, boolean("chunked", chunked)?) {
        (0, _) => Window::All,
        (size, false) => Window::Sliding(size),
        (size, true) => Window::Chunked(size),
    })
}

/// Softmax of products of queries and keys, in place.
#[pyfunction]
#[pyo3(signature = (products, queries, columns, scale, window, chunked, *, threads=None))]
#[expect(clippy::too_many_arguments, reason = "a kernel's")]
pub(crate) fn softmax(
    py: Python<'_>,
    products: &Bound<'_, PyAny>,
    queries: &Bound<'_, PyAny>,
    columns: &Bound<'_, PyAny>,
    scale: &Bound<'_, PyAny>,
    window: &Bound<'_, PyAny>,
    chunked: &Bound<'_, PyAny>,
    threads: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    const PRODUCTS: &str = "[batch, kv_heads, group, queries, columns]";
    let mut products: Tensor<f32, 5> = Tensor::import("products", PRODUCTS, products, Access::Write)?;
    let queries: Tensor<i32, 2> = Tensor::import("queries", "[batch, queries]", queries, Access::Read)?;
    let columns: Tensor<i32, 3> = Tensor::import("columns", "[batch, kv_heads or 1, columns]", columns, Access::Read)?;
    let (scale, window, threads) =
        (float("scale", scale)? as f32, window_of(window, chunked)?, threads_of(py, threads)?);
    for read in [("queries", queries.span()), ("columns", columns.span())] {
        disjoint(py, &[("products", products.span()), read])?;
    }
    released(py, || {
        let shape = products.shape();
        let products = ViewMut::new("products", products.slice_mut(), shape)?;
        let queries = View::new("queries", queries.slice(), queries.shape())?;
        let columns = View::new("columns", columns.slice(), columns.shape())?;
        core::softmax(products, queries, columns, scale, window, threads)
    })
}

/// Mass and peak with the rule by which looks count, as they came: `(mass, peak, mass_decay, peak_decay, gap, weighted)`.
struct Looking {
    mass: Tensor<f32, 3>,
    peak: Tensor<f32, 3>,
    decay: Decay,
    gap: i32,
    weighted: bool,
}

impl Looking {
    fn import(scores: &Bound<'_, PyAny>) -> PyResult<Self> {
        const SCORES: &str = "[batch, kv_heads, slots]";
        let item = |i: usize| scores.get_item(i);
        Ok(Self {
            mass: Tensor::import("mass", SCORES, &item(0)?, Access::Write)?,
            peak: Tensor::import("peak", SCORES, &item(1)?, Access::Write)?,
            decay: Decay { mass: float("mass_decay", &item(2)?)?, peak: float("peak_decay", &item(3)?)? },
            gap: small(scores.py(), "gap", int("gap", &item(4)?)?)?,
            weighted: boolean("weighted", &item(5)?)?,
        })
    }
}

/// One decode step of a layer: write each row's token into its slot, and attend.
#[pyfunction]
#[pyo3(signature = (query, key, value, slot, position, keys, values, positions, scale, window, chunked, out, scores=None, *, threads=None))]
#[expect(clippy::too_many_arguments, reason = "a kernel's")]
pub(crate) fn step(
    py: Python<'_>,
    query: &Bound<'_, PyAny>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    slot: &Bound<'_, PyAny>,
    position: &Bound<'_, PyAny>,
    keys: &Bound<'_, PyAny>,
    values: &Bound<'_, PyAny>,
    positions: &Bound<'_, PyAny>,
    scale: &Bound<'_, PyAny>,
    window: &Bound<'_, PyAny>,
    chunked: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    scores: Option<&Bound<'_, PyAny>>,
    threads: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let keys = AnyTensor::import("keys", keys, Access::Write)?;
    let (dtype, tensors) = (keys.dtype, (query, key, value, keys, values, out));
    let call = Call {
        slot: Tensor::import("slot", "[batch, kv_heads]", slot, Access::Read)?,
        position: (ints("position", position)?.into_iter())
            .map(|at| small(py, "position", at))
            .collect::<PyResult<_>>()?,
        positions: Tensor::import("positions", "[batch, kv_heads, slots]", positions, Access::Read)?,
        scale: float("scale", scale)? as f32,
        window: window_of(window, chunked)?,
        scores: scores.map(Looking::import).transpose()?,
        threads: threads_of(py, threads)?,
    };
    match dtype {
        t if t.is::<f32>() => call.run::<f32>(py, tensors),
        t if t.is::<bf16>() => call.run::<bf16>(py, tensors),
        t => Err(tensor_error(py, format!("keys must be float32 or bfloat16, got {}", dtype_name(t)))),
    }
}

type Any<'a, 'py> = &'a Bound<'py, PyAny>;

struct Call {
    slot: Tensor<i64, 2>,
    position: Vec<i32>,
    positions: Tensor<i32, 3>,
    scale: f32,
    window: Window,
    scores: Option<Looking>,
    threads: usize,
}

impl Call {
    fn run<T: Number + DlpackElement>(
        mut self,
        py: Python<'_>,
        (query, key, value, keys, values, out): (
            Any<'_, '_>,
            Any<'_, '_>,
            Any<'_, '_>,
            AnyTensor,
            Any<'_, '_>,
            Any<'_, '_>,
        ),
    ) -> PyResult<()> {
        const SLOTS: &str = "[batch, kv_heads, slots, d]";
        const TOKEN: &str = "[batch, heads, 1, d]";
        let mut keys = keys.typed::<T, 4>(py, "keys", SLOTS)?;
        let mut values: Tensor<T, 4> = Tensor::import("values", SLOTS, values, Access::Write)?;
        let mut out: Tensor<T, 4> = Tensor::import("out", TOKEN, out, Access::Write)?;
        let query: Tensor<T, 4> = Tensor::import("query", TOKEN, query, Access::Read)?;
        let key: Tensor<T, 4> = Tensor::import("key", TOKEN, key, Access::Read)?;
        let value: Tensor<T, 4> = Tensor::import("value", TOKEN, value, Access::Read)?;
        let mut written = vec![("keys", keys.span()), ("values", values.span()), ("out", out.span())];
        if let Some(scores) = &self.scores {
            written.extend([("mass", scores.mass.span()), ("peak", scores.peak.span())]);
        }
        disjoint(py, &written)?;
        let read = [
            ("query", query.span()),
            ("key", key.span()),
            ("value", value.span()),
            ("slot", self.slot.span()),
            ("positions", self.positions.span()),
        ];
        // What is only read may be shared among itself.
        for span in read {
            for written in &written {
                disjoint(py, &[written.clone(), span.clone()])?;
            }
        }
        released(py, || {
            let token = Token {
                query: View::new("query", query.slice(), query.shape())?,
                key: View::new("key", key.slice(), key.shape())?,
                value: View::new("value", value.slice(), value.shape())?,
                slot: View::new("slot", self.slot.slice(), self.slot.shape())?,
                position: &self.position,
            };
            let (keys_shape, values_shape, out_shape) = (keys.shape(), values.shape(), out.shape());
            let held = Held {
                keys: ViewMut::new("keys", keys.slice_mut(), keys_shape)?,
                values: ViewMut::new("values", values.slice_mut(), values_shape)?,
                positions: View::new("positions", self.positions.slice(), self.positions.shape())?,
            };
            let scores = match &mut self.scores {
                None => None,
                Some(own) => {
                    let (mass_shape, peak_shape) = (own.mass.shape(), own.peak.shape());
                    Some(Scores {
                        mass: ViewMut::new("mass", own.mass.slice_mut(), mass_shape)?,
                        peak: ViewMut::new("peak", own.peak.slice_mut(), peak_shape)?,
                        decay: own.decay,
                        gap: own.gap,
                        weighted: own.weighted,
                    })
                }
            };
            let out = ViewMut::new("out", out.slice_mut(), out_shape)?;
            core::step(&token, held, self.scale, self.window, out, scores, self.threads)
        })
    }
}
