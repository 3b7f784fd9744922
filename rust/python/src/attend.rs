//! `softmax`, `step` and `step_coded`: attention on the CPU.

use std::ops::Range;

use dlpark::DlpackElement;
use half::{bf16, f16};
use liquidfusion_core::accumulate::Decay;
use liquidfusion_core::attend::{self as core, Held, Number, Scores, Token, Window};
use liquidfusion_core::coded;
use liquidfusion_core::codes::Bits;
use liquidfusion_core::view::{View, ViewMut};
use pyo3::prelude::*;

use crate::args::{boolean, float, int, ints, threads_of};
use crate::error::{config_error, raise, released, tensor_error};
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

    fn view(&mut self) -> liquidfusion_core::Result<Scores<'_>> {
        let (mass, peak) = (self.mass.shape(), self.peak.shape());
        Ok(Scores {
            mass: ViewMut::new("mass", self.mass.slice_mut(), mass)?,
            peak: ViewMut::new("peak", self.peak.slice_mut(), peak)?,
            decay: self.decay,
            gap: self.gap,
            weighted: self.weighted,
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
    let call = Call::import(py, (slot, position, positions), scale, (window, chunked), scores, threads)?;
    match dtype {
        t if t.is::<f32>() => call.run::<f32>(py, tensors),
        t if t.is::<bf16>() => call.run::<bf16>(py, tensors),
        t => Err(tensor_error(py, format!("keys must be float32 or bfloat16, got {}", dtype_name(t)))),
    }
}

type Any<'a, 'py> = &'a Bound<'py, PyAny>;
type Span<'a> = (&'a str, Range<usize>);

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
    fn import(
        py: Python<'_>,
        (slot, position, positions): (Any<'_, '_>, Any<'_, '_>, Any<'_, '_>),
        scale: Any<'_, '_>,
        (window, chunked): (Any<'_, '_>, Any<'_, '_>),
        scores: Option<Any<'_, '_>>,
        threads: Option<Any<'_, '_>>,
    ) -> PyResult<Self> {
        Ok(Self {
            slot: Tensor::import("slot", "[batch, kv_heads]", slot, Access::Read)?,
            position: (ints("position", position)?.into_iter())
                .map(|at| small(py, "position", at))
                .collect::<PyResult<_>>()?,
            positions: Tensor::import("positions", "[batch, kv_heads, slots]", positions, Access::Read)?,
            scale: float("scale", scale)? as f32,
            window: window_of(window, chunked)?,
            scores: scores.map(Looking::import).transpose()?,
            threads: threads_of(py, threads)?,
        })
    }

    /// Refuse memory that is written and shared; what is only read may be shared among itself.
    fn disjoint<'a>(&self, py: Python<'_>, mut written: Vec<Span<'a>>, mut read: Vec<Span<'a>>) -> PyResult<()> {
        if let Some(scores) = &self.scores {
            written.extend([("mass", scores.mass.span()), ("peak", scores.peak.span())]);
        }
        disjoint(py, &written)?;
        read.extend([("slot", self.slot.span()), ("positions", self.positions.span())]);
        for span in read {
            for written in &written {
                disjoint(py, &[written.clone(), span.clone()])?;
            }
        }
        Ok(())
    }

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
        let written = vec![("keys", keys.span()), ("values", values.span()), ("out", out.span())];
        self.disjoint(py, written, vec![("query", query.span()), ("key", key.span()), ("value", value.span())])?;
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
            let scores = self.scores.as_mut().map(Looking::view).transpose()?;
            let out = ViewMut::new("out", out.slice_mut(), out_shape)?;
            core::step(&token, held, self.scale, self.window, out, scores, self.threads)
        })
    }
}

/// Coded keys or values as they came: `(codes, scales, first, bits)`.
struct Coded {
    codes: Tensor<u8, 4>,
    scales: Tensor<f16, 3>,
    first: Option<Tensor<bf16, 4>>,
    bits: Bits,
}

impl Coded {
    fn import(name: &str, side: Any<'_, '_>) -> PyResult<Self> {
        const CODES: &str = "[batch, kv_heads, slots, bytes]";
        const FIRST: &str = "[batch, kv_heads, first slots, width]";
        let (py, item) = (side.py(), |i: usize| side.get_item(i));
        let (codes, scales, first) = (item(0)?, item(1)?, item(2)?);
        let named = |part: &str| format!("{name} {part}");
        Ok(Self {
            codes: Tensor::import(&named("codes"), CODES, &codes, Access::Write)?,
            scales: Tensor::import(&named("scales"), "[batch, kv_heads, slots]", &scales, Access::Write)?,
            first: if first.is_none() {
                None
            } else {
                Some(Tensor::import(&named("first"), FIRST, &first, Access::Write)?)
            },
            bits: Bits::new(int("bits", &item(3)?)?).map_err(|error| raise(py, error))?,
        })
    }

    fn spans(&self, names: [&'static str; 3]) -> Vec<Span<'static>> {
        let mut spans = vec![(names[0], self.codes.span()), (names[1], self.scales.span())];
        spans.extend(self.first.as_ref().map(|first| (names[2], first.span())));
        spans
    }

    fn view(&mut self) -> liquidfusion_core::Result<coded::Coded<'_>> {
        let (codes, scales) = (self.codes.shape(), self.scales.shape());
        Ok(coded::Coded {
            bits: self.bits,
            codes: ViewMut::new("codes", self.codes.slice_mut(), codes)?,
            scales: ViewMut::new("scales", self.scales.slice_mut(), scales)?,
            first: match &mut self.first {
                None => None,
                Some(first) => {
                    let shape = first.shape();
                    Some(ViewMut::new("first", first.slice_mut(), shape)?)
                }
            },
        })
    }
}

/// One decode step of a layer whose slots are coded.
#[pyfunction]
#[pyo3(signature = (query, key, value, slot, position, keys, values, mu, positions, scale, window, chunked, out, scores=None, *, threads=None))]
#[expect(clippy::too_many_arguments, reason = "a kernel's")]
pub(crate) fn step_coded(
    py: Python<'_>,
    query: &Bound<'_, PyAny>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    slot: &Bound<'_, PyAny>,
    position: &Bound<'_, PyAny>,
    keys: &Bound<'_, PyAny>,
    values: &Bound<'_, PyAny>,
    mu: Option<&Bound<'_, PyAny>>,
    positions: &Bound<'_, PyAny>,
    scale: &Bound<'_, PyAny>,
    window: &Bound<'_, PyAny>,
    chunked: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    scores: Option<&Bound<'_, PyAny>>,
    threads: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    const TOKEN: &str = "[batch, heads, 1, d]";
    let (mut keys, mut values) = (Coded::import("keys", keys)?, Coded::import("values", values)?);
    let mut call = Call::import(py, (slot, position, positions), scale, (window, chunked), scores, threads)?;
    let mut out: Tensor<f32, 4> = Tensor::import("out", TOKEN, out, Access::Write)?;
    let query: Tensor<f32, 4> = Tensor::import("query", TOKEN, query, Access::Read)?;
    let key: Tensor<f32, 4> = Tensor::import("key", TOKEN, key, Access::Read)?;
    let value: Tensor<f32, 4> = Tensor::import("value", TOKEN, value, Access::Read)?;
    let mu = mu.map(|mu| Tensor::<f32, 2>::import("mu", "[kv_heads, head_dim]", mu, Access::Read)).transpose()?;
    let mut written = vec![("out", out.span())];
    written.extend(keys.spans(["keys codes", "keys scales", "keys first"]));
    written.extend(values.spans(["values codes", "values scales", "values first"]));
    let mut read = vec![("query", query.span()), ("key", key.span()), ("value", value.span())];
    read.extend(mu.as_ref().map(|mu| ("mu", mu.span())));
    call.disjoint(py, written, read)?;
    released(py, || {
        let token = Token {
            query: View::new("query", query.slice(), query.shape())?,
            key: View::new("key", key.slice(), key.shape())?,
            value: View::new("value", value.slice(), value.shape())?,
            slot: View::new("slot", call.slot.slice(), call.slot.shape())?,
            position: &call.position,
        };
        let held = coded::Held {
            keys: keys.view()?,
            values: values.view()?,
            mu: mu.as_ref().map(|mu| View::new("mu", mu.slice(), mu.shape())).transpose()?,
            positions: View::new("positions", call.positions.slice(), call.positions.shape())?,
        };
        let scores = call.scores.as_mut().map(Looking::view).transpose()?;
        let shape = out.shape();
        let out = ViewMut::new("out", out.slice_mut(), shape)?;
        coded::step(&token, held, call.scale, call.window, out, scores, call.threads)
    })
}
