//! The slots of all layers, batch rows and kv heads: who is stored where, and which slots are overwritten next.
//!
//! A call of the model is `begin`, one `chunk` per layer if a row brought two tokens or more, `finish`. Positions and scores
//! belong to the caller and are passed in; the ledger owns the reuse queues and the counters.

mod call;
mod chunk;
mod rows;

pub use chunk::ChunkScores;

use std::cell::RefCell;

use crate::decide::Scratch;
use crate::error::{Error, Result, fail};
use crate::head::{BadScore, Place};
use crate::score::Average;
use crate::spec::Spec;
use crate::split::MOST_TOKENS;
use crate::view::{View, ViewMut};

/// Slots to decide about below which helpers cost more than they bring.
const WORTH_THREADS: usize = 1 << 16;

/// Reusable memory of one thread.
#[derive(Default)]
struct Memory {
    scratch: Scratch,
    /// Positions of a head's candidates.
    positions: Vec<i32>,
    places: Vec<i32>,
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

/// Extents of the slot tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Attention layers.
    pub layers: usize,
    /// Batch rows.
    pub rows: usize,
    /// Key-value heads of a layer.
    pub kv_heads: usize,
    /// Slots per head.
    pub slots: usize,
}

impl Shape {
    /// Sizes of a slot tensor.
    #[must_use]
    pub fn dims(self) -> [usize; 4] {
        [self.layers, self.rows, self.kv_heads, self.slots]
    }

    /// All heads there are.
    fn heads(self) -> usize {
        self.layers * self.rows * self.kv_heads
    }

    /// The number of a head.
    fn head(self, Place { layer, row, kv_head }: Place) -> usize {
        (layer * self.rows + row) * self.kv_heads + kv_head
    }

    /// Where a head is, by its number.
    fn place(self, head: usize) -> Place {
        let (layer, row) = (head / self.kv_heads / self.rows, head / self.kv_heads % self.rows);
        Place { layer, row, kv_head: head % self.kv_heads }
    }

    /// The slots of a head in a slot tensor.
    fn of(self, head: usize) -> std::ops::Range<usize> {
        head * self.slots..(head + 1) * self.slots
    }
}

/// The caller's slot tensors, all `[layers, rows, kv_heads, slots]`; no scores for strategies that need none.
#[derive(Debug)]
pub struct Slots<'a> {
    /// Position of the token in each slot, -1 when empty.
    pub positions: &'a mut [i32],
    /// Attention mass and peak attention.
    pub scores: Option<(&'a mut [f32], &'a mut [f32])>,
}

impl Slots<'_> {
    /// Empty a range of slots.
    fn clear(&mut self, range: std::ops::Range<usize>) {
        self.positions[range.clone()].fill(-1);
        if let Some((mass, peak)) = &mut self.scores {
            mass[range.clone()].fill(0.0);
            peak[range].fill(0.0);
        }
    }
}

/// The call between `begin` and `finish`.
#[derive(Debug, Clone)]
struct Call {
    /// The ledger's row of each row of the call.
    rows: Vec<usize>,
    /// The row of the call of each of the ledger's rows, if it takes part.
    own: Vec<Option<usize>>,
    /// Real tokens that each row of the call brought.
    lengths: Vec<usize>,
    /// Layers whose chunk was decided.
    decided: Vec<bool>,
}

impl Call {
    /// Real tokens that a row of the ledger gets.
    fn length(&self, row: usize) -> usize {
        self.own[row].map_or(0, |i| self.lengths[i])
    }
}

/// What is in use of a row's rings of victims: all heads of a row advance together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Ring {
    start: usize,
    len: usize,
}

impl Ring {
    /// Where it is in a head's entries, of which there are so many, in its order.
    fn parts(self, entries: usize) -> [std::ops::Range<usize>; 2] {
        let end = self.start + self.len;
        [self.start..end.min(entries), 0..end.saturating_sub(entries)]
    }
}

/// Reuse queues and counters.
///
/// A row that has seen `n` tokens holds them in its first `n` slots until they are all in use. So its queue is the slots from there on, of
/// which nothing need be stored, and then the victims.
#[derive(Debug, Clone)]
pub struct Ledger {
    spec: Spec,
    average: Option<Average>,
    shape: Shape,
    /// The victims' slots in the order in which they are overwritten, `Ledger::entries` for each head.
    victims: Vec<i32>,
    rings: Vec<Ring>,
    seen: Vec<usize>,
    evictions: u64,
    call: Option<Call>,
    threads: usize,
}

impl Ledger {
    /// A ledger of empty slots. A bounded strategy needs exactly its budget of slots.
    pub fn new(spec: Spec, shape: Shape, threads: usize) -> Result<Self> {
        if shape.dims().contains(&0) {
            fail!(Tensor, "layers, batch, heads and slots must be at least 1, got {:?}", shape.dims());
        }
        match spec.budget() {
            Some(budget) if budget != shape.slots => {
                fail!(Tensor, "a budget of {budget} needs {budget} slots, got {}", shape.slots)
            }
            _ if shape.slots > MOST_TOKENS => fail!(Tensor, "there can be {MOST_TOKENS} slots, got {}", shape.slots),
            _ => {}
        }
        Ok(Self {
            average: Average::of(&spec),
            victims: vec![0; shape.heads() * most_victims(&spec)],
            spec,
            shape,
            rings: vec![Ring::default(); shape.rows],
            seen: vec![0; shape.rows],
            evictions: 0,
            call: None,
            threads,
        })
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
    pub fn queue_lengths(&self) -> Vec<usize> {
        (0..self.shape.rows).map(|row| self.empty(row) + self.rings[row].len).collect()
    }

    /// Tokens evicted so far: overwritten victims and tokens dropped by chunks, summed over all heads.
    #[must_use]
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Bytes of the queues.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        size_of_val(&*self.victims)
    }

    /// Copy queue entries `skip[i]` and following of `rows[i]` (`None`: all rows) into `out` (`[layers, rows, kv_heads, n]`), -1 beyond
    /// the end.
    pub fn peek(&self, skip: &[i64], rows: Option<&[i64]>, out: &mut ViewMut<'_, i32, 4>) -> Result<()> {
        let Shape { layers, kv_heads, .. } = self.shape;
        let (rows, n) = (self.chosen_rows(rows)?, out.shape()[3]);
        out.expect("out", [layers, rows.len(), kv_heads, n])?;
        per_row("skip", skip, &rows)?;
        if let Some(bad) = skip.iter().find(|&&s| s < 0) {
            fail!(Config, "skip must not be negative, got {bad}");
        }
        if n == 0 {
            return Ok(());
        }
        for (i, out) in out.data().chunks_exact_mut(kv_heads * n).enumerate() {
            let (layer, i) = (i / rows.len(), i % rows.len());
            let skip = usize::try_from(skip[i]).unwrap_or(usize::MAX);
            for (kv_head, out) in out.chunks_exact_mut(n).enumerate() {
                let mut queue = self.queue(self.shape.head(Place { layer, row: rows[i], kv_head })).skip(skip);
                out.fill_with(|| queue.next().unwrap_or(-1));
            }
        }
        Ok(())
    }

    fn check_slots(&self, slots: &Slots<'_>) -> Result<()> {
        let n = self.shape.heads() * self.shape.slots;
        let scores = slots.scores.as_ref().map_or((n, n), |(mass, peak)| (mass.len(), peak.len()));
        if slots.positions.len() != n || scores != (n, n) {
            fail!(Tensor, "positions, mass and peak must have the shape {:?}", self.shape.dims());
        }
        if self.spec.strategy().scored && slots.scores.is_none() {
            fail!(Tensor, "{} needs mass and peak, got None", self.spec.strategy().name);
        }
        Ok(())
    }

    fn idle(&self, what: &str) -> Result<()> {
        if self.call.is_some() {
            fail!(Cache, "{what} must not come between begin and finish: finish the call, or reset");
        }
        Ok(())
    }

    /// The queue of one head.
    fn queue(&self, head: usize) -> impl Iterator<Item = i32> {
        let (entries, row) = (&self.victims[self.entries(head)], self.shape.place(head).row);
        let empty = self.shape.slots - self.empty(row)..self.shape.slots;
        let victims = self.ring(row).parts(entries.len()).into_iter().flat_map(|part| &entries[part]).copied();
        empty.map(|slot| slot as i32).chain(victims)
    }

    /// The victims of a head, among those of all.
    fn entries(&self, head: usize) -> std::ops::Range<usize> {
        let each = most_victims(&self.spec);
        head * each..(head + 1) * each
    }

    /// Slots of each head of a row that are still empty.
    fn empty(&self, row: usize) -> usize {
        self.shape.slots - self.stored(self.seen[row])
    }

    /// A row's ring, as the running call leaves it: a chunk makes the choice anew.
    fn ring(&self, row: usize) -> Ring {
        let chunk = self.call.as_ref().is_some_and(|call| call.length(row) > 1);
        if chunk { Ring::default() } else { self.rings[row] }
    }

    /// Rows of the running call that choose their next victims when it ends.
    #[must_use]
    pub fn due(&self) -> Vec<usize> {
        let Some(call) = &self.call else { return Vec::new() };
        let low = |row: &usize| call.length(*row) > 0 && self.empty(*row) + self.ring(*row).len <= self.spec.interval();
        if self.spec.strategy().bounded { call.rows.iter().copied().filter(low).collect() } else { Vec::new() }
    }

    /// Tokens a row stores after so many: all of them, or its budget.
    fn stored(&self, seen: usize) -> usize {
        seen.min(self.shape.slots)
    }

    /// The ledger's rows that `rows` names, all of them if it does not; none twice.
    fn chosen_rows(&self, rows: Option<&[i64]>) -> Result<Vec<usize>> {
        let Some(rows) = rows else { return Ok((0..self.shape.rows).collect()) };
        let mut free = vec![true; self.shape.rows];
        rows.iter()
            .map(|&value| {
                let row = self.row("rows", value)?;
                if !std::mem::take(&mut free[row]) {
                    fail!(Config, "rows must name a row once, got {row} twice");
                }
                Ok(row)
            })
            .collect()
    }

    fn row(&self, name: &str, value: i64) -> Result<usize> {
        match usize::try_from(value) {
            Ok(row) if row < self.shape.rows => Ok(row),
            _ => fail!(Config, "{name} must be from 0 to {}, got {value}", self.shape.rows - 1),
        }
    }
}

fn per_row(name: &str, values: &[i64], rows: &[usize]) -> Result<()> {
    if values.len() != rows.len() {
        fail!(Tensor, "{name} must have one entry per row, {}, got {}", rows.len(), values.len());
    }
    Ok(())
}

/// Victims that a head can have at a time.
fn most_victims(spec: &Spec) -> usize {
    if spec.strategy().bounded { 2 * spec.interval() } else { 0 }
}

fn wrap(i: usize, len: usize) -> usize {
    if i >= len { i - len } else { i }
}

fn at(Place { layer, row, kv_head }: Place) -> String {
    format!("layer {layer}, row {row}, head {kv_head}")
}

fn score_error(place: Place, BadScore { name, index, value }: BadScore) -> Error {
    let accepted =
        if name == "distinct" { "distinctness must be finite" } else { "scores must be finite and not negative" };
    Error::Score(format!("{name} of {}, index {index} is {value}; {accepted}", at(place)))
}

/// The part of `distinct` that is meant, or none where none is needed.
fn needed<'a, const D: usize>(
    spec: &Spec,
    distinct: Option<View<'a, f32, D>>,
    shape: [usize; D],
) -> Result<Option<&'a [f32]>> {
    if let Some(distinct) = distinct {
        distinct.expect("distinct", shape)?;
    }
    Ok(distinct.filter(|_| spec.distinct()).map(|distinct| distinct.data()))
}
