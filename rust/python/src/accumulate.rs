//! `accumulate`: attention probabilities into mass and peak.

use liquidfusion_core::accumulate::{self as core, Decay, Looks};
use liquidfusion_core::view::{View, ViewMut};
use pyo3::prelude::*;

use crate::args::{float, ints, threads_of};
use crate::error::{config_error, released};
use crate::tensor::{Access, Tensor, disjoint};

/// Add one call's attention probabilities to mass and peak.
#[pyfunction]
#[pyo3(signature = (probabilities, ages, elapsed, mass, peak, mass_decay, peak_decay, *, weights=None, threads=None))]
#[expect(clippy::too_many_arguments, reason = "Python keyword arguments")]
pub(crate) fn accumulate(
    py: Python<'_>,
    probabilities: &Bound<'_, PyAny>,
    ages: &Bound<'_, PyAny>,
    elapsed: &Bound<'_, PyAny>,
    mass: &Bound<'_, PyAny>,
    peak: &Bound<'_, PyAny>,
    mass_decay: &Bound<'_, PyAny>,
    peak_decay: &Bound<'_, PyAny>,
    weights: Option<&Bound<'_, PyAny>>,
    threads: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    const SCORES: &str = "[batch, kv_heads, columns]";
    const PROBABILITIES: &str = "[batch, kv_heads, group, queries, columns]";
    let probabilities = Tensor::import("probabilities", PROBABILITIES, probabilities, Access::Read)?;
    let weights = weights.map(|w| Tensor::import("weights", SCORES, w, Access::Read)).transpose()?;
    let call = Call {
        ages: Tensor::import("ages", "[batch, queries]", ages, Access::Read)?,
        elapsed: elapsed_of(elapsed)?,
        mass: Tensor::import("mass", SCORES, mass, Access::Write)?,
        peak: Tensor::import("peak", SCORES, peak, Access::Write)?,
        weights,
        decay: Decay { mass: float("mass_decay", mass_decay)?, peak: float("peak_decay", peak_decay)? },
        threads: threads_of(py, threads)?,
    };
    call.run(py, &probabilities)
}

fn elapsed_of(elapsed: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let check = |n: i64| {
        u32::try_from(n)
            .map_err(|_| config_error(elapsed.py(), format!("elapsed must be from 0 to {}, got {n}", u32::MAX)))
    };
    ints("elapsed", elapsed)?.into_iter().map(check).collect()
}

struct Call {
    ages: Tensor<i32, 2>,
    elapsed: Vec<u32>,
    mass: Tensor<f32, 3>,
    peak: Tensor<f32, 3>,
    weights: Option<Tensor<f32, 3>>,
    decay: Decay,
    threads: usize,
}

impl Call {
    fn run(mut self, py: Python<'_>, probabilities: &Tensor<f32, 5>) -> PyResult<()> {
        let written = [("mass", self.mass.span()), ("peak", self.peak.span())];
        disjoint(py, &written)?;
        let mut read = vec![("probabilities", probabilities.span()), ("ages", self.ages.span())];
        read.extend(self.weights.as_ref().map(|w| ("weights", w.span())));
        for span in read {
            disjoint(py, &[&written[..], &[span]].concat())?;
        }
        released(py, || {
            let looks = Looks {
                probabilities: View::new("probabilities", probabilities.slice(), probabilities.shape())?,
                ages: View::new("ages", self.ages.slice(), self.ages.shape())?,
                elapsed: &self.elapsed,
                weights: match &self.weights {
                    Some(w) => Some(View::new("weights", w.slice(), w.shape())?),
                    None => None,
                },
            };
            let (mass_shape, peak_shape) = (self.mass.shape(), self.peak.shape());
            let mass = ViewMut::new("mass", self.mass.slice_mut(), mass_shape)?;
            let peak = ViewMut::new("peak", self.peak.slice_mut(), peak_shape)?;
            core::accumulate(&looks, mass, peak, self.decay, self.threads)
        })
    }
}
