//! The slots of all layers, batch rows and kv heads: who is stored where, and which slots are overwritten next.
//!
//! A call of the model is `begin`, one `chunk` per layer if a row brought two tokens or more, `finish`. Positions and scores
//! belong to the caller and are passed in; the ledger owns the reuse queues and the counters.

mod call;
mod chunk;
mod restore;

use std::cell::RefCell;
use std::sync::Mutex;

use crate::average::Average;
use crate::decide::{BadScore, Scores, Scratch};
use crate::error::{Error, Result, fail};
use crate::spec::Spec;
use crate::view::{View, ViewMut};

/// Slots to decide about below which helpers cost more than they bring.
const WORTH_THREADS: usize = 1 << 16;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Extents of the slot tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Attention layers.
    pub layers: usize,
    /// Batch rows.
    pub batch: usize,
    /// Key-value heads.
    pub heads: usize,
    /// Slots per layer, row and head.
    pub slots: usize,
}

impl Shape {
    /// Sizes of a slot tensor.
    #[must_use]
    pub fn dims(self) -> [usize; 4] {
        [self.layers, self.batch, self.heads, self.slots]
    }

    fn lanes(self) -> usize {
        self.layers * self.batch * self.heads
    }
}

/// The caller's slot tensors, all `[layers, batch, heads, slots]`; empty scores for strategies that need none.
#[derive(Debug)]
pub struct Slots<'a> {
    /// Position of the token in each slot, -1 when empty.
    pub positions: &'a mut [i32],
    /// Attention mass and peak attention.
    pub scores: Option<(&'a mut [f32], &'a mut [f32])>,
}

/// A chunk's attention mass and peak, `[batch, heads, slots + columns]`, stored slots first.
#[derive(Debug, Clone, Copy)]
pub struct ChunkScores<'a> {
    /// Attention mass.
    pub mass: View<'a, f32, 3>,
    /// Peak attention.
    pub peak: View<'a, f32, 3>,
}

/// The call between `begin` and `finish`.
#[derive(Debug, Clone)]
struct Call {
    lengths: Vec<usize>,
    /// Layers whose chunk was decided; all of them at once when no row has a chunk.
    decided: Vec<bool>,
}

impl Call {
    fn has_chunk(&self) -> bool {
        self.lengths.iter().any(|&n| n > 1)
    }
}

/// Reuse queues and counters.
#[derive(Debug, Clone)]
pub struct Ledger {
    spec: Spec,
    average: Option<Average>,
    shape: Shape,
    /// Rings of slots, one of `slots` entries per layer, row and head. All of a row share `start` and `len`.
    queues: Vec<i32>,
    start: Vec<usize>,
    len: Vec<usize>,
    seen: Vec<usize>,
    evictions: u64,
    call: Option<Call>,
    threads: usize,
}

impl Ledger {
    /// A ledger of empty slots. A bounded strategy needs exactly its budget of slots.
    pub fn new(spec: Spec, shape: Shape, threads: usize) -> Result<Self> {
        check_shape(&spec, shape)?;
        let mut ledger = Self {
            average: Average::of(&spec),
            spec,
            shape,
            queues: vec![0; shape.lanes() * shape.slots],
            start: vec![0; shape.batch],
            len: vec![0; shape.batch],
            seen: vec![0; shape.batch],
            evictions: 0,
            call: None,
            threads,
        };
        ledger.clear();
        Ok(ledger)
    }

    /// The strategy.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Extents of the slot tensors.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Real tokens each row has seen.
    #[must_use]
    pub fn seen(&self) -> &[usize] {
        &self.seen
    }

    /// Length of each row's queues.
    #[must_use]
    pub fn queue_lengths(&self) -> &[usize] {
        &self.len
    }

    /// Tokens evicted so far: overwritten victims and tokens dropped by chunks, summed over layers, rows and heads.
    #[must_use]
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Bytes of the queues.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        size_of_val(&*self.queues)
    }

    fn clear(&mut self) {
        for queue in self.queues.chunks_exact_mut(self.shape.slots) {
            for (i, entry) in queue.iter_mut().enumerate() {
                *entry = i as i32;
            }
        }
        self.start.fill(0);
        self.len.fill(self.shape.slots);
        self.seen.fill(0);
        self.evictions = 0;
        self.call = None;
    }

    /// Forget everything: positions -1, scores 0, queues full, counters 0.
    pub fn reset(&mut self, slots: &mut Slots<'_>) -> Result<()> {
        self.check_slots(slots)?;
        slots.positions.fill(-1);
        if let Some((mass, peak)) = &mut slots.scores {
            mass.fill(0.0);
            peak.fill(0.0);
        }
        self.clear();
        Ok(())
    }

    fn check_slots(&self, slots: &Slots<'_>) -> Result<()> {
        let n = self.shape.lanes() * self.shape.slots;
        let scores = slots.scores.as_ref().map_or((n, n), |(mass, peak)| (mass.len(), peak.len()));
        if slots.positions.len() != n || scores != (n, n) {
            fail!(Tensor, "positions, mass and peak must have the shape {:?}", self.shape.dims());
        }
        if self.spec.strategy().scored() && slots.scores.is_none() {
            fail!(Tensor, "{} needs mass and peak, got None", self.spec.strategy().name());
        }
        Ok(())
    }

    fn idle(&self, what: &str) -> Result<()> {
        if self.call.is_some() {
            fail!(Cache, "{what} must not come between begin and finish: finish the call, or reset");
        }
        Ok(())
    }

    /// The ring of one lane (layer, row and head).
    fn ring(&self, lane: usize) -> impl ExactSizeIterator<Item = i32> {
        let b = lane / self.shape.heads % self.shape.batch;
        let ring = &self.queues[lane * self.shape.slots..][..self.shape.slots];
        let (start, len) = (self.start[b], self.len[b]);
        (0..len).map(move |i| ring[wrap(start + i, ring.len())])
    }

    /// Tokens a row stores: all it has seen, or its budget.
    fn stored(&self, b: usize) -> usize {
        self.seen[b].min(self.shape.slots)
    }

    /// Copy queue entries `skip[b]` and following into `out` (`[layers, batch, heads, n]`), -1 beyond the end.
    pub fn peek(&self, skip: &[i64], out: &mut ViewMut<'_, i32, 4>) -> Result<()> {
        self.idle("peek")?;
        let Shape { layers, batch, heads, .. } = self.shape;
        let n = out.shape()[3];
        out.expect("out", [layers, batch, heads, n])?;
        if skip.len() != batch {
            fail!(Tensor, "skip must have one entry per row, {batch}, got {}", skip.len());
        }
        if let Some(bad) = skip.iter().find(|&&s| s < 0) {
            fail!(Config, "skip must not be negative, got {bad}");
        }
        if n == 0 {
            return Ok(());
        }
        for (lane, out) in out.data().chunks_exact_mut(n).enumerate() {
            let skip = usize::try_from(skip[lane / heads % batch]).unwrap_or(usize::MAX);
            let mut queue = self.ring(lane).skip(skip);
            out.fill_with(|| queue.next().unwrap_or(-1));
        }
        Ok(())
    }

    /// Copy all queues into `out` (`[layers, batch, heads, slots]`), padded with -1.
    pub fn queues(&self, out: &mut ViewMut<'_, i32, 4>) -> Result<()> {
        out.expect("out", self.shape.dims())?;
        self.peek(&vec![0; self.shape.batch], out)
    }
}

fn wrap(i: usize, len: usize) -> usize {
    if i >= len { i - len } else { i }
}

fn check_shape(spec: &Spec, shape: Shape) -> Result<()> {
    if shape.dims().contains(&0) {
        fail!(Tensor, "layers, batch, heads and slots must be at least 1, got {:?}", shape.dims());
    }
    match spec.budget() {
        Some(budget) if budget != shape.slots => {
            fail!(Tensor, "a budget of {budget} needs {budget} slots, got {}", shape.slots)
        }
        _ if shape.slots > i32::MAX as usize => fail!(Tensor, "there can be 2147483647 slots, got {}", shape.slots),
        _ => Ok(()),
    }
}

/// Keep the error of the first lane, whichever thread found it.
fn note(failure: &Mutex<Option<(usize, Error)>>, lane: usize, error: Error) {
    let mut slot = failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if slot.as_ref().is_none_or(|(first, _)| lane < *first) {
        *slot = Some((lane, error));
    }
}

fn first(failure: Mutex<Option<(usize, Error)>>) -> Result<()> {
    match failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

fn score_error(bad: BadScore, scores: Option<Scores<'_>>, place: &impl Fn() -> String) -> Error {
    let (name, values) = match (bad.peak, scores) {
        (true, Some(scores)) => ("peak", scores.peak),
        (false, Some(scores)) => ("mass", scores.mass),
        (_, None) => ("score", &[] as &[f32]),
    };
    let value = values.get(bad.index).copied().unwrap_or(f32::NAN);
    Error::Score(format!(
        "{name} of {}, index {} is {value}; scores must be finite and not negative",
        place(),
        bad.index
    ))
}
