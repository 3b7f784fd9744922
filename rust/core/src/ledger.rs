//! The slots of all layers, batch rows and kv heads: who is stored where, and which slots are overwritten next.
//!
//! A call of the model is `begin`, one `chunk` per layer if a row brought two tokens or more, `finish`. Positions and scores
//! belong to the caller and are passed in; the ledger owns the reuse queues and the counters.

use std::cell::RefCell;
use std::sync::Mutex;

use crate::average::Average;
use crate::decide::{BadScore, Candidates, Rule, Scores, Scratch};
use crate::error::{Error, Result, fail};
use crate::spec::Spec;
use crate::threads;
use crate::view::{View, ViewMut};
use crate::worth;

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

    /// Start a call of `lengths[b]` real new tokens per row.
    ///
    /// A row with one token gives each of its heads the slot to write, in `out` (`[layers, batch, heads]`): the first of the
    /// queue, now holding the new position and zero scores. Other rows get -1.
    pub fn begin(&mut self, slots: &mut Slots<'_>, lengths: &[i64], out: &mut ViewMut<'_, i64, 3>) -> Result<()> {
        self.check_slots(slots)?;
        let Shape { layers, batch, heads, slots: per_lane } = self.shape;
        if self.call.is_some() {
            fail!(Cache, "begin must not come twice: finish the call, or reset");
        }
        out.expect("slots", [layers, batch, heads])?;
        if lengths.len() != batch {
            fail!(Tensor, "lengths must have one entry per row, {batch}, got {}", lengths.len());
        }
        let mut new = Vec::with_capacity(batch);
        for (b, &length) in lengths.iter().enumerate() {
            let most = i32::MAX as usize - self.seen[b];
            match usize::try_from(length) {
                Ok(n) if n <= most => new.push(n),
                _ => fail!(Config, "lengths[{b}] must be from 0 to {most}, got {length}"),
            }
            if !self.spec.strategy().bounded() && self.seen[b] + new[b] > per_lane {
                fail!(Cache, "row {b} needs {} slots and has {per_lane}: grow first", self.seen[b] + new[b]);
            }
        }

        let mut evicted = 0u64;
        let rows = out.data().chunks_exact_mut(heads).zip(self.queues.chunks_exact(heads * per_lane)).enumerate();
        for (row, (out, queues)) in rows {
            let b = row % batch;
            if new[b] != 1 {
                out.fill(-1);
                continue;
            }
            let (start, position) = (self.start[b], self.seen[b] as i32);
            for (head, (slot, queue)) in out.iter_mut().zip(queues.chunks_exact(per_lane)).enumerate() {
                let chosen = queue[start];
                *slot = i64::from(chosen);
                let at = (row * heads + head) * per_lane + chosen as usize;
                evicted += u64::from(slots.positions[at] >= 0);
                slots.positions[at] = position;
                if let Some((mass, peak)) = &mut slots.scores {
                    mass[at] = 0.0;
                    peak[at] = 0.0;
                }
            }
        }
        self.evictions += evicted;
        for (b, &n) in new.iter().enumerate() {
            if n == 1 {
                self.start[b] = wrap(self.start[b] + 1, per_lane);
                self.len[b] -= 1;
            }
            self.seen[b] += n;
        }
        let call = Call { lengths: new, decided: vec![false; layers] };
        self.call = Some(call);
        Ok(())
    }

    /// Decide which tokens of a layer and its chunk stay, for the rows with two new tokens or more.
    ///
    /// `columns` (`[batch, n]`) is the rank of each new column among its row's new tokens, -1 for padding; `scores` are up to
    /// date. `source` (`[batch, heads, slots]`) becomes the column whose keys and values go into each slot, or -1.
    pub fn chunk(
        &mut self,
        slots: &mut Slots<'_>,
        layer: usize,
        columns: View<'_, i32, 2>,
        scores: Option<ChunkScores<'_>>,
        source: &mut ViewMut<'_, i32, 3>,
    ) -> Result<()> {
        self.check_slots(slots)?;
        let Shape { layers, batch, heads, slots: per_lane } = self.shape;
        let Some(call) = &mut self.call else { fail!(Cache, "chunk must come between begin and finish") };
        if layer >= layers {
            fail!(Config, "layer must be from 0 to {}, got {layer}", layers - 1);
        }
        if call.decided[layer] {
            fail!(Cache, "the chunk of layer {layer} was already decided in this call");
        }
        let n = columns.shape()[1];
        columns.expect("columns", [batch, n])?;
        source.expect("source", [batch, heads, per_lane])?;
        if let Some(ChunkScores { mass, peak }) = scores {
            mass.expect("mass", [batch, heads, per_lane + n])?;
            peak.expect("peak", [batch, heads, per_lane + n])?;
        } else if self.spec.strategy().scored() {
            fail!(Tensor, "{} needs mass and peak, got None", self.spec.strategy().name());
        }
        for (b, row) in columns.data().chunks_exact(n.max(1)).enumerate() {
            check_ranks(b, row, call.lengths[b])?;
        }
        if n == 0 && call.lengths.iter().any(|&n| n > 0) {
            fail!(Tensor, "columns must have one column per new token, got none");
        }

        // Decided lane by lane into `plan`, written only when every lane succeeded.
        let mut plan = vec![-1i32; batch * heads * per_lane];
        let failure = Mutex::new(None::<(usize, Error)>);
        let lane_of = |i: usize| layer * batch * heads + i;
        let chunk_lanes = plan.chunks_exact_mut(per_lane).enumerate().filter(|(i, _)| call.lengths[i / heads] > 1);
        let stored_positions = &*slots.positions;
        let with_scores = self.spec.strategy().scored();
        let mut new_positions = columns.data().to_vec();
        for (b, row) in new_positions.chunks_exact_mut(n.max(1)).enumerate() {
            let before = (self.seen[b] - call.lengths[b]) as i32;
            for rank in row {
                *rank = if *rank < 0 { -1 } else { before + *rank };
            }
        }
        let threads = if (per_lane + n) * batch * heads < WORTH_THREADS { 1 } else { self.threads };
        threads::for_each(threads, chunk_lanes, |(i, plan)| {
            let (b, len) = (i / heads, call.lengths[i / heads]);
            let wide = i * (per_lane + n)..(i + 1) * (per_lane + n);
            let lane = Lane {
                at: worth::Lane { layer, head: i % heads },
                candidates: Candidates {
                    stored: &stored_positions[lane_of(i) * per_lane..][..per_lane],
                    queued: [&[], &[]],
                    columns: &new_positions[b * n..][..n],
                    seen: self.seen[b] as i32,
                    scores: scores.filter(|_| with_scores).map(|scores| Scores {
                        mass: &scores.mass.data()[wide.clone()],
                        peak: &scores.peak.data()[wide],
                    }),
                },
                seen_before: self.seen[b] - len,
                len,
            };
            let place = || format!("layer {layer}, row {b}, head {}", i % heads);
            if let Err(error) = lane.decide(&self.spec, self.average.as_ref(), plan, place) {
                note(&failure, i, error);
            }
        });
        first(failure)?;

        for (i, plan) in plan.chunks_exact(per_lane).enumerate() {
            let b = i / heads;
            source.data()[i * per_lane..][..per_lane].copy_from_slice(plan);
            let len = call.lengths[b];
            if len < 2 {
                continue;
            }
            let at = lane_of(i) * per_lane;
            let positions = &mut slots.positions[at..][..per_lane];
            let before = self.seen[b] - len;
            let mut empty = Vec::new();
            for (slot, (position, &column)) in positions.iter_mut().zip(plan).enumerate() {
                if column >= 0 {
                    *position = before as i32 + columns.data()[b * n + column as usize];
                } else if *position < 0 {
                    empty.push(slot as i32);
                }
            }
            self.queues[at..][..empty.len()].copy_from_slice(&empty);
            self.evictions += (before.min(per_lane) + len).saturating_sub(per_lane) as u64;
            if let (Some((mass, peak)), Some(scores)) = (&mut slots.scores, scores) {
                for (to, from) in [(mass, scores.mass), (peak, scores.peak)] {
                    let from = &from.data()[i * (per_lane + n)..][..per_lane + n];
                    let to = &mut to[at..][..per_lane];
                    for (slot, (to, (&column, &position))) in
                        to.iter_mut().zip(plan.iter().zip(&*positions)).enumerate()
                    {
                        *to = match (position, column) {
                            (..0, _) => 0.0,
                            (_, ..0) => from[slot],
                            _ => from[per_lane + column as usize],
                        };
                    }
                }
            }
        }
        call.decided[layer] = true;
        Ok(())
    }

    /// End a call: rows whose queue holds no more than an interval of slots choose their next victims. Returns how many were chosen.
    pub fn finish(&mut self, slots: &Slots<'_>) -> Result<u64> {
        self.check_slots(slots)?;
        let Some(call) = &self.call else { fail!(Cache, "finish must come after begin") };
        if call.has_chunk()
            && let Some(layer) = call.decided.iter().position(|&d| !d)
        {
            fail!(Cache, "finish must come after every layer's chunk; layer {layer} is missing");
        }
        let Shape { batch, heads, slots: per_lane, .. } = self.shape;
        let interval = self.spec.interval();
        // Where each row's queue starts and ends once its chunk counts.
        let rings: Vec<(usize, usize)> = (0..batch)
            .map(|b| if call.lengths[b] > 1 { (0, per_lane - self.stored(b)) } else { (self.start[b], self.len[b]) })
            .collect();
        let due: Vec<usize> = (0..batch)
            .map(|b| {
                let chosen = self.spec.strategy().bounded() && call.lengths[b] > 0 && rings[b].1 <= interval;
                if chosen { 2 * interval - rings[b].1 } else { 0 }
            })
            .collect();

        let mut chosen = 0;
        if due.iter().any(|&victims| victims > 0) {
            let split = self.spec.split(per_lane - 2 * interval);
            let (sinks, average, worth) = (self.spec.sinks(), self.average.as_ref(), self.spec.worth());
            let (seen, failure) = (&self.seen, Mutex::new(None));
            let positions = &*slots.positions;
            let scores = slots.scores.as_ref().map(|(mass, peak)| (&**mass, &**peak));
            let scores = scores.filter(|_| self.spec.strategy().scored());
            // Victims go behind the end of the ring, where nobody reads until the length is committed.
            let lanes =
                self.queues.chunks_exact_mut(per_lane).enumerate().filter(|(lane, _)| due[lane / heads % batch] > 0);
            let threads = if positions.len() < WORTH_THREADS { 1 } else { self.threads };
            threads::for_each(threads, lanes, |(lane, ring)| {
                let b = lane / heads % batch;
                let here = lane * per_lane..(lane + 1) * per_lane;
                let positions = &positions[here.clone()];
                let scores = scores.map(|(mass, peak)| Scores { mass: &mass[here.clone()], peak: &peak[here] });
                let at = worth::Lane { layer: lane / heads / batch, head: lane % heads };
                let rule = Rule { split, sinks, average, worth, lane: at };
                let place = || format!("layer {}, row {b}, head {}", at.layer, at.head);
                let candidates =
                    Candidates { stored: positions, queued: [&[]; 2], columns: &[], seen: seen[b] as i32, scores };
                if let Err(error) = choose(candidates, rule, due[b], ring, rings[b], place) {
                    note(&failure, lane, error);
                }
            });
            first(failure)?;
            chosen = due.iter().map(|&n| n as u64).sum::<u64>() * (self.shape.layers * heads) as u64;
        }
        for (b, ((start, len), victims)) in rings.into_iter().zip(due).enumerate() {
            self.start[b] = start;
            self.len[b] = len + victims;
        }
        self.call = None;
        Ok(chosen)
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

    /// Take over saved queues and counters; `positions` already hold the saved positions.
    pub fn restore(&mut self, positions: &[i32], queues: View<'_, i32, 4>, seen: &[i64]) -> Result<()> {
        self.idle("restore")?;
        let Shape { batch, heads, slots, .. } = self.shape;
        queues.expect("queues", self.shape.dims())?;
        if seen.len() != batch {
            fail!(Tensor, "seen must have one entry per row, {batch}, got {}", seen.len());
        }
        let bounded = self.spec.strategy().bounded();
        let mut counts = Vec::with_capacity(batch);
        for (b, &value) in seen.iter().enumerate() {
            match usize::try_from(value) {
                Ok(n) if n <= if bounded { i32::MAX as usize } else { slots } => counts.push(n),
                _ => fail!(Cache, "seen[{b}] cannot be {value}"),
            }
        }
        let mut len = vec![None; batch];
        for (lane, (queue, positions)) in
            queues.data().chunks_exact(slots).zip(positions.chunks_exact(slots)).enumerate()
        {
            let b = lane / heads % batch;
            let place = format!("layer {}, row {b}, head {}", lane / heads / batch, lane % heads);
            let n = check_lane(queue, positions, counts[b]).map_err(|why| Error::Cache(format!("{place}: {why}")))?;
            if *len[b].get_or_insert(n) != n {
                fail!(Cache, "{place}: {n} slots are queued, other heads of the row have {}", len[b].unwrap_or(n));
            }
            if bounded && n <= self.spec.interval() {
                fail!(Cache, "{place}: {n} slots are queued, more than {} are needed", self.spec.interval());
            }
        }
        self.queues.copy_from_slice(queues.data());
        self.start.fill(0);
        self.len = len.into_iter().map(|n| n.unwrap_or(slots)).collect();
        self.seen = counts;
        Ok(())
    }

    /// Row `i` takes the state of row `rows[i]`; the caller does the same with its tensors.
    pub fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.idle("reorder")?;
        let Shape { layers, batch, heads, slots } = self.shape;
        if rows.len() != batch {
            fail!(Tensor, "rows must have one entry per row, {batch}, got {}", rows.len());
        }
        let mut from = Vec::with_capacity(batch);
        for &row in rows {
            match usize::try_from(row) {
                Ok(r) if r < batch => from.push(r),
                _ => fail!(Config, "rows must be from 0 to {}, got {row}", batch - 1),
            }
        }
        if from.iter().enumerate().all(|(to, &from)| to == from) {
            return Ok(());
        }
        let mut entries = Vec::new();
        for layer in 0..layers {
            let lane = |b: usize, head: usize| (layer * batch + b) * heads + head;
            entries.clear();
            for (&b, head) in from.iter().flat_map(|b| (0..heads).map(move |head| (b, head))) {
                entries.extend(self.ring(lane(b, head)));
            }
            let mut next = 0;
            for (to, head) in (0..batch).flat_map(|b| (0..heads).map(move |head| (b, head))) {
                let len = self.len[from[to]];
                self.queues[lane(to, head) * slots..][..len].copy_from_slice(&entries[next..next + len]);
                next += len;
            }
            // The other layers of the rows are still where `start` says; theirs is rewound after the last one.
        }
        self.start.fill(0);
        self.len = from.iter().map(|&b| self.len[b]).collect();
        self.seen = from.iter().map(|&b| self.seen[b]).collect();
        Ok(())
    }

    /// Go on with more slots per lane; the new ones join the end of every queue. Only for unbounded strategies.
    pub fn grow(&mut self, shape: Shape) -> Result<()> {
        self.idle("grow")?;
        if self.spec.strategy().bounded() {
            fail!(Cache, "{} is bounded by its budget and cannot grow", self.spec.strategy().name());
        }
        let (old, new) = (self.shape.slots, shape.slots);
        if (Shape { slots: old, ..shape }) != self.shape || new < old || new > i32::MAX as usize {
            fail!(
                Tensor,
                "grow needs the shape {:?} with at least as many slots, got {:?}",
                self.shape.dims(),
                shape.dims()
            );
        }
        let mut queues = vec![0; shape.lanes() * new];
        for (lane, queue) in queues.chunks_exact_mut(new).enumerate() {
            let entries = self.ring(lane).chain(old as i32..new as i32);
            for (to, entry) in queue.iter_mut().zip(entries) {
                *to = entry;
            }
        }
        self.queues = queues;
        self.start.fill(0);
        self.len.iter_mut().for_each(|len| *len += new - old);
        self.shape = shape;
        Ok(())
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

fn check_ranks(b: usize, columns: &[i32], len: usize) -> Result<()> {
    // As a rule padding comes first or last, which is seen at a glance.
    let first = columns.iter().position(|&rank| rank >= 0).unwrap_or(0);
    if let Some((numbered, behind)) = columns[first..].split_at_checked(len) {
        let wrong = (numbered.iter().zip(0..)).fold(0, |wrong, (&rank, due)| wrong | (rank ^ due));
        let not_padding = columns[..first].iter().chain(behind).fold(0, |wrong, &rank| wrong | !rank);
        if wrong | not_padding == 0 {
            return Ok(());
        }
    }
    let mut next = 0;
    for &rank in columns {
        match usize::try_from(rank) {
            Ok(rank) if rank == next => next += 1,
            Ok(_) => {
                fail!(Tensor, "columns of row {b} must count its new tokens from 0; after {next} of them came {rank}")
            }
            Err(_) if rank == -1 => {}
            Err(_) => fail!(Tensor, "columns of row {b} must be ranks, or -1 for padding, got {rank}"),
        }
    }
    if next != len {
        fail!(Tensor, "columns of row {b} must number its {len} new tokens, got {next}");
    }
    Ok(())
}

/// One (layer, row, head) of a chunk.
struct Lane<'a> {
    at: worth::Lane,
    candidates: Candidates<'a>,
    seen_before: usize,
    len: usize,
}

impl Lane<'_> {
    /// Fill `plan` with the column that goes into each slot.
    fn decide(
        &self,
        spec: &Spec,
        average: Option<&Average>,
        plan: &mut [i32],
        place: impl Fn() -> String,
    ) -> Result<()> {
        let Candidates { stored: positions, columns, scores, .. } = self.candidates;
        let slots = positions.len();
        let stored = positions.iter().filter(|&&p| p >= 0).count();
        if stored != self.seen_before.min(slots) {
            fail!(
                Cache,
                "{} stores {stored} tokens where {} are due: positions were changed from outside",
                place(),
                self.seen_before.min(slots)
            );
        }
        SCRATCH.with_borrow_mut(|scratch| {
            let judged = if stored + self.len > slots {
                let rule =
                    Rule { split: spec.split(slots), sinks: spec.sinks(), average, worth: spec.worth(), lane: self.at };
                scratch.decide(self.candidates, rule)
            } else {
                scratch.victims.clear();
                scratch.kept.clear();
                scratch.kept.extend((0..columns.len() as i32).filter(|&column| columns[column as usize] >= 0));
                self.candidates.find_bad().map_or(Ok(()), Err)
            };
            judged.map_err(|bad| score_error(bad, scores, &place))?;
            let mut dropped = scratch.victims.iter().map(|&slot| slot as usize).peekable();
            let free = (0..slots).filter(|&slot| positions[slot] < 0 || dropped.next_if_eq(&slot).is_some());
            for (slot, &column) in free.zip(&scratch.kept) {
                plan[slot] = column;
            }
            Ok(())
        })
    }
}

/// Append a lane's next victims to its ring, oldest first.
fn choose(
    candidates: Candidates<'_>,
    rule: Rule<'_>,
    victims: usize,
    ring: &mut [i32],
    (start, len): (usize, usize),
    place: impl Fn() -> String,
) -> Result<()> {
    let (slots, stored) = (ring.len(), candidates.stored);
    SCRATCH.with_borrow_mut(|scratch| {
        let (from_start, wrapped) = (len.min(slots - start), (start + len).saturating_sub(slots));
        let queued = [&ring[start..start + from_start], &ring[..wrapped]];
        let candidates = Candidates { queued, ..candidates };
        scratch.decide(candidates, rule).map_err(|bad| score_error(bad, candidates.scores, &place))?;
        if scratch.victims.len() != victims {
            fail!(
                Cache,
                "{} offers {} victims where {victims} are due: positions were changed from outside",
                place(),
                scratch.victims.len()
            );
        }
        for (i, &slot) in scratch.oldest_first(stored).iter().enumerate() {
            ring[wrap(start + len + i, slots)] = slot;
        }
        Ok(())
    })
}

/// Check one saved queue against its positions and return its length.
fn check_lane(queue: &[i32], positions: &[i32], seen: usize) -> std::result::Result<usize, String> {
    let slots = queue.len();
    let len = queue.iter().position(|&s| s < 0).unwrap_or(slots);
    if let Some(entry) = queue[len..].iter().find(|&&s| s != -1) {
        return Err(format!("behind the end of the queue must be -1, got {entry}"));
    }
    let mut queued = vec![false; slots];
    for &slot in &queue[..len] {
        match queued.get_mut(slot as usize) {
            Some(q) if !*q => *q = true,
            Some(_) => return Err(format!("slot {slot} is queued twice")),
            None => return Err(format!("slot {slot} is queued, there are {slots}")),
        }
    }
    let mut stored: Vec<i32> = Vec::with_capacity(slots);
    for (slot, &position) in positions.iter().enumerate() {
        match position {
            -1 if queued[slot] => {}
            -1 => return Err(format!("the empty slot {slot} is not queued")),
            p if p >= 0 && (p as usize) < seen => stored.push(p),
            p => return Err(format!("slot {slot} holds position {p}, {seen} tokens were seen")),
        }
    }
    stored.sort_unstable();
    if let Some(&[twice, _]) = stored.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("position {twice} is stored twice"));
    }
    if stored.len() != seen.min(slots) {
        return Err(format!("{} tokens are stored where {} are due", stored.len(), seen.min(slots)));
    }
    Ok(len)
}
