//! `Ledger`: the core's ledger on tensors that torch owns, bound once.

use std::sync::{Mutex, MutexGuard, PoisonError};

use liquidfusion_core::ledger::{ChunkScores, Ledger, Shape, Slots};
use liquidfusion_core::view::{View, ViewMut};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use crate::args::{int, ints, threads_of};
use crate::error::{config_error, raise, released, tensor_error};
use crate::spec::PySpec;
use crate::tensor::{Access, Tensor, disjoint};

const SLOTS: &str = "[layers, batch, kv_heads, slots]";

/// The caller's slot tensors.
struct Bindings {
    positions: Tensor<i32, 4>,
    scores: Option<(Tensor<f32, 4>, Tensor<f32, 4>)>,
}

struct State {
    ledger: Ledger,
    bindings: Bindings,
}

/// Reuse queues and counters, on positions, mass and peak bound for life.
#[pyclass(name = "Ledger", module = "liquidfusion._core", frozen)]
pub(crate) struct PyLedger(Mutex<State>);

impl Bindings {
    fn import(
        positions: &Bound<'_, PyAny>,
        mass: Option<&Bound<'_, PyAny>>,
        peak: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let py = positions.py();
        let positions = Tensor::import("positions", SLOTS, positions, Access::Write)?;
        let scores = match (mass, peak) {
            (None, None) => None,
            (Some(mass), Some(peak)) => {
                let mass = Tensor::import("mass", SLOTS, mass, Access::Write)?;
                let peak = Tensor::import("peak", SLOTS, peak, Access::Write)?;
                mass.expect(py, "mass", positions.shape())?;
                peak.expect(py, "peak", positions.shape())?;
                Some((mass, peak))
            }
            _ => return Err(tensor_error(py, "mass and peak must both be tensors or both None".into())),
        };
        let bindings = Self { positions, scores };
        disjoint(py, &bindings.spans())?;
        Ok(bindings)
    }

    fn shape(&self) -> Shape {
        let [layers, rows, kv_heads, slots] = self.positions.shape();
        Shape { layers, rows, kv_heads, slots }
    }

    fn spans(&self) -> Vec<(&'static str, std::ops::Range<usize>)> {
        let mut spans = vec![("positions", self.positions.span())];
        if let Some((mass, peak)) = &self.scores {
            spans.extend([("the ledger's mass", mass.span()), ("the ledger's peak", peak.span())]);
        }
        spans
    }

    fn slots(&mut self) -> Slots<'_> {
        Slots {
            positions: self.positions.slice_mut(),
            scores: self.scores.as_mut().map(|(mass, peak)| (mass.slice_mut(), peak.slice_mut())),
        }
    }
}

impl PyLedger {
    fn lock(&self, py: Python<'_>) -> MutexGuard<'_, State> {
        self.0.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner)
    }
}

/// Rows by number, or `None` for all.
fn some_rows(rows: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Vec<i64>>> {
    rows.map(|rows| ints("rows", rows)).transpose()
}

#[pymethods]
impl PyLedger {
    #[new]
    #[pyo3(signature = (spec, positions, mass, peak, *, threads=None))]
    fn new(
        spec: &PySpec,
        positions: &Bound<'_, PyAny>,
        mass: Option<&Bound<'_, PyAny>>,
        peak: Option<&Bound<'_, PyAny>>,
        threads: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let py = positions.py();
        let threads = threads_of(py, threads)?;
        let bindings = Bindings::import(positions, mass, peak)?;
        if spec.0.strategy().scored && bindings.scores.is_none() {
            let text = format!("{} needs the tensors mass and peak, got None", spec.0.strategy().name);
            return Err(tensor_error(py, text));
        }
        let ledger = Ledger::new(spec.0.clone(), bindings.shape(), threads).map_err(|error| raise(py, error))?;
        Ok(Self(Mutex::new(State { ledger, bindings })))
    }

    /// Start a call of `lengths[i]` real new tokens for each of `rows` (None: all); rows with one token get the slot to write.
    #[pyo3(signature = (lengths, slots, rows=None))]
    fn begin(
        &self,
        lengths: &Bound<'_, PyAny>,
        slots: &Bound<'_, PyAny>,
        rows: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let py = lengths.py();
        let rows = some_rows(rows)?;
        let lengths = ints("lengths", lengths)?;
        let mut out = Tensor::<i64, 3>::import("slots", "[layers, batch, kv_heads]", slots, Access::Write)?;
        let mut state = self.lock(py);
        let state = &mut *state;
        let mut spans = state.bindings.spans();
        spans.push(("slots", out.span()));
        disjoint(py, &spans)?;
        released(py, || {
            let shape = out.shape();
            let mut out = ViewMut::new("slots", out.slice_mut(), shape)?;
            state.ledger.begin(&mut state.bindings.slots(), &lengths, rows.as_deref(), &mut out)
        })
    }

    /// Decide which tokens of a layer and its chunk stay.
    #[pyo3(signature = (layer, columns, mass, peak, source, distinct=None))]
    fn chunk(
        &self,
        layer: &Bound<'_, PyAny>,
        columns: &Bound<'_, PyAny>,
        mass: Option<&Bound<'_, PyAny>>,
        peak: Option<&Bound<'_, PyAny>>,
        source: &Bound<'_, PyAny>,
        distinct: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        const SCORES: &str = "[batch, kv_heads, slots + columns]";
        let py = layer.py();
        let value = int("layer", layer)?;
        let layer =
            usize::try_from(value).map_err(|_| config_error(py, format!("layer must not be negative, got {value}")))?;
        let columns = Tensor::<i32, 2>::import("columns", "[batch, n]", columns, Access::Read)?;
        let scores = match (mass, peak) {
            (None, None) => None,
            (Some(mass), Some(peak)) => Some((
                Tensor::<f32, 3>::import("mass", SCORES, mass, Access::Read)?,
                Tensor::<f32, 3>::import("peak", SCORES, peak, Access::Read)?,
            )),
            _ => return Err(tensor_error(py, "mass and peak must both be tensors or both None".into())),
        };
        let distinct = distinct.map(|d| Tensor::<f32, 3>::import("distinct", SCORES, d, Access::Read)).transpose()?;
        let mut source = Tensor::<i32, 3>::import("source", "[batch, kv_heads, slots]", source, Access::Write)?;
        let mut state = self.lock(py);
        let state = &mut *state;
        let written = state.bindings.spans().into_iter().chain([("source", source.span())]).collect::<Vec<_>>();
        disjoint(py, &written)?;
        let mut read = vec![("columns", columns.span())];
        if let Some((mass, peak)) = &scores {
            read.extend([("mass", mass.span()), ("peak", peak.span())]);
        }
        read.extend(distinct.as_ref().map(|distinct| ("distinct", distinct.span())));
        // What is only read may be shared among itself.
        for span in read {
            disjoint(py, &[&written[..], &[span]].concat())?;
        }
        released(py, || {
            let columns = View::new("columns", columns.slice(), columns.shape())?;
            let mut known = ChunkScores::default();
            if let Some((mass, peak)) = &scores {
                let mass = View::new("mass", mass.slice(), mass.shape())?;
                known.scores = Some((mass, View::new("peak", peak.slice(), peak.shape())?));
            }
            if let Some(distinct) = &distinct {
                known.distinct = Some(View::new("distinct", distinct.slice(), distinct.shape())?);
            }
            let shape = source.shape();
            let mut source = ViewMut::new("source", source.slice_mut(), shape)?;
            state.ledger.chunk(&mut state.bindings.slots(), layer, columns, known, &mut source)
        })
    }

    /// End a call: choose the next victims where they are due; returns how many.
    #[pyo3(signature = (distinct=None))]
    fn finish(&self, py: Python<'_>, distinct: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        let distinct = distinct.map(|d| Tensor::<f32, 4>::import("distinct", SLOTS, d, Access::Read)).transpose()?;
        let mut state = self.lock(py);
        let state = &mut *state;
        if let Some(distinct) = &distinct {
            disjoint(py, &[state.bindings.spans(), vec![("distinct", distinct.span())]].concat())?;
        }
        released(py, || {
            let distinct = match &distinct {
                Some(distinct) => Some(View::new("distinct", distinct.slice(), distinct.shape())?),
                None => None,
            };
            state.ledger.finish(&state.bindings.slots(), distinct)
        })
    }

    /// Copy queue entries `skip[i]` and following of some rows (None: all), -1 beyond the end.
    #[pyo3(signature = (out, skip, rows=None))]
    fn peek(&self, out: &Bound<'_, PyAny>, skip: &Bound<'_, PyAny>, rows: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let py = out.py();
        let rows = some_rows(rows)?;
        let skip = ints("skip", skip)?;
        let mut out = Tensor::<i32, 4>::import("out", "[layers, batch, kv_heads, n]", out, Access::Write)?;
        let state = self.lock(py);
        let state = &*state;
        let shape = out.shape();
        released(py, || state.ledger.peek(&skip, rows.as_deref(), &mut ViewMut::new("out", out.slice_mut(), shape)?))
    }

    /// Rows of the running call that choose their next victims when it ends.
    fn due(&self, py: Python<'_>) -> Vec<usize> {
        self.lock(py).ledger.due()
    }

    /// Length of each row's queues.
    fn queue_lengths(&self, py: Python<'_>) -> Vec<usize> {
        self.lock(py).ledger.queue_lengths()
    }

    /// Copy the queues of some rows (None: all), padded with -1.
    #[pyo3(signature = (out, rows=None))]
    fn queues(&self, out: &Bound<'_, PyAny>, rows: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let py = out.py();
        let rows = some_rows(rows)?;
        let mut out = Tensor::<i32, 4>::import("out", SLOTS, out, Access::Write)?;
        let state = self.lock(py);
        let state = &*state;
        let Shape { layers, rows: all, kv_heads, slots } = state.ledger.shape();
        let count = rows.as_ref().map_or(all, Vec::len);
        out.expect(py, "out", [layers, count, kv_heads, slots])?;
        let shape = out.shape();
        let skip = vec![0; count];
        released(py, || state.ledger.peek(&skip, rows.as_deref(), &mut ViewMut::new("out", out.slice_mut(), shape)?))
    }

    /// Take over saved queues and counters of some rows (None: all); the bound tensors already hold what was saved.
    #[pyo3(signature = (queues, seen, rows=None))]
    fn restore(
        &self,
        queues: &Bound<'_, PyAny>,
        seen: &Bound<'_, PyAny>,
        rows: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let py = queues.py();
        let rows = some_rows(rows)?;
        let queues = Tensor::<i32, 4>::import("queues", SLOTS, queues, Access::Read)?;
        let seen = ints("seen", seen)?;
        let mut state = self.lock(py);
        let state = &mut *state;
        released(py, || {
            let queues = View::new("queues", queues.slice(), queues.shape())?;
            state.ledger.restore(state.bindings.positions.slice(), queues, &seen, rows.as_deref())
        })
    }

    /// Catch up with rows (None: all) that have taken `steps[i]` tokens one by one elsewhere.
    #[pyo3(signature = (steps, rows=None))]
    fn advance(&self, steps: &Bound<'_, PyAny>, rows: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let py = steps.py();
        let (rows, steps) = (some_rows(rows)?, ints("steps", steps)?);
        let mut state = self.lock(py);
        let state = &mut *state;
        released(py, || state.ledger.advance(&mut state.bindings.slots(), &steps, rows.as_deref()))
    }

    /// Empty one row: positions -1, scores 0, queues full, no token seen.
    fn release(&self, row: &Bound<'_, PyAny>) -> PyResult<()> {
        let (py, row) = (row.py(), int("row", row)?);
        let mut state = self.lock(py);
        let state = &mut *state;
        released(py, || state.ledger.release(&mut state.bindings.slots(), row))
    }

    /// Make row `target` a copy of row `source`, the bound tensors included.
    fn copy_row(&self, source: &Bound<'_, PyAny>, target: &Bound<'_, PyAny>) -> PyResult<()> {
        let (py, source, target) = (source.py(), int("source", source)?, int("target", target)?);
        let mut state = self.lock(py);
        let state = &mut *state;
        released(py, || state.ledger.copy_row(&mut state.bindings.slots(), source, target))
    }

    /// Row `i` takes the state of row `rows[i]`; the caller does the same with its tensors.
    fn reorder(&self, rows: &Bound<'_, PyAny>) -> PyResult<()> {
        let rows_ = ints("rows", rows)?;
        let mut state = self.lock(rows.py());
        let ledger = &mut state.ledger;
        released(rows.py(), || ledger.reorder(&rows_))
    }

    /// Rebind to tensors with more slots, whose first ones hold the old contents.
    fn grow(
        &self,
        positions: &Bound<'_, PyAny>,
        mass: Option<&Bound<'_, PyAny>>,
        peak: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let py = positions.py();
        let bindings = Bindings::import(positions, mass, peak)?;
        let mut state = self.lock(py);
        state.ledger.grow(bindings.shape()).map_err(|error| raise(py, error))?;
        state.bindings = bindings;
        Ok(())
    }

    /// Forget everything: positions -1, scores 0, queues full, counters 0.
    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        let mut state = self.lock(py);
        let state = &mut *state;
        released(py, || state.ledger.reset(&mut state.bindings.slots()))
    }

    /// Real tokens each row has seen.
    #[getter]
    fn seen(&self, py: Python<'_>) -> Vec<usize> {
        self.lock(py).ledger.seen().to_vec()
    }

    /// Tokens evicted so far, summed over layers, rows and heads.
    #[getter]
    fn evictions(&self, py: Python<'_>) -> u64 {
        self.lock(py).ledger.evictions()
    }

    /// Bytes of the queues.
    #[getter]
    fn nbytes(&self, py: Python<'_>) -> usize {
        self.lock(py).ledger.nbytes()
    }
}
