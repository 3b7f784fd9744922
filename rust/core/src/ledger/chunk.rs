//! Calls that bring a row two tokens or more: which of the stored and the new ones stay.

use super::{Call, Failure, Ledger, Place, SCRATCH, Shape, Slots, WORTH_THREADS, at, needed, score_error};
use crate::decide::{Decided, Rule, Shown};
use crate::error::{Result, fail};
use crate::head::{DISTINCT, Scores};
use crate::simd::pack;
use crate::threads;
use crate::view::{View, ViewMut};

/// What is known about a layer's stored tokens and its chunk, `[rows of the call, kv_heads, slots + columns]`, stored tokens first.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChunkScores<'a> {
    /// Attention mass and peak attention, up to date.
    pub scores: Option<(View<'a, f32, 3>, View<'a, f32, 3>)>,
    /// How far each key points from the mean of all candidates' keys; needed where the tokens do not all fit.
    pub distinct: Option<View<'a, f32, 3>>,
}

/// What a layer's chunk comes to, before it is written.
struct Plan {
    /// The column that goes into each slot, or -1, `[rows of the call, kv_heads, slots]`.
    source: Vec<i32>,
    /// Positions of the columns, -1 for padding, `[rows of the call, columns]`.
    columns: Vec<i32>,
}

impl Ledger {
    /// Decide which tokens of a layer and its chunk stay, for the rows with two new tokens or more.
    ///
    /// `ranks` (`[rows of the call, columns]`) numbers each row's new tokens from 0, -1 for padding. `source` (`[rows of the call, kv_heads,
    /// slots]`) becomes the column whose keys and values go into each slot, or -1.
    pub fn chunk(
        &mut self,
        slots: &mut Slots<'_>,
        layer: usize,
        ranks: View<'_, i32, 2>,
        known: ChunkScores<'_>,
        source: &mut ViewMut<'_, i32, 3>,
    ) -> Result<()> {
        self.check_slots(slots)?;
        let Shape { layers, kv_heads, slots: per_head, .. } = self.shape;
        let Some(call) = &self.call else { fail!(Cache, "chunk must come between begin and finish") };
        if layer >= layers {
            fail!(Config, "layer must be from 0 to {}, got {layer}", layers - 1);
        }
        if call.decided[layer] {
            fail!(Cache, "the chunk of layer {layer} was already decided in this call");
        }
        let (rows, n) = (call.rows.len(), ranks.shape()[1]);
        let wide = [rows, kv_heads, per_head + n];
        ranks.expect("columns", [rows, n])?;
        source.expect("source", [rows, kv_heads, per_head])?;
        if let Some((mass, peak)) = known.scores {
            mass.expect("mass", wide)?;
            peak.expect("peak", wide)?;
        } else if self.spec.strategy().scored {
            fail!(Tensor, "{} needs mass and peak, got None", self.spec.strategy().name);
        }
        let distinct = needed(&self.spec, known.distinct, wide)?;
        for (i, row) in ranks.data().chunks_exact(n.max(1)).enumerate() {
            check_ranks(i, row, call.lengths[i])?;
        }
        if n == 0 && call.lengths.iter().any(|&n| n > 0) {
            fail!(Tensor, "columns must have one column per new token, got none");
        }

        let plan = self.plan(slots, layer, ranks, known, distinct)?;
        self.keep(slots, layer, &plan, known, source);
        if let Some(call) = &mut self.call {
            call.decided[layer] = true;
        }
        Ok(())
    }

    /// Decide head by head; nothing is written before every head succeeded.
    fn plan(
        &self,
        slots: &Slots<'_>,
        layer: usize,
        ranks: View<'_, i32, 2>,
        known: ChunkScores<'_>,
        distinct: Option<&[f32]>,
    ) -> Result<Plan> {
        let Some(Call { rows, lengths, .. }) = &self.call else { fail!(Cache, "chunk must come after begin") };
        let Shape { kv_heads, slots: per_head, .. } = self.shape;
        let n = ranks.shape()[1];
        let mut columns = ranks.data().to_vec();
        for (i, row) in columns.chunks_exact_mut(n.max(1)).enumerate() {
            let before = (self.seen[rows[i]] - lengths[i]) as i32;
            for rank in row {
                *rank = if *rank < 0 { -1 } else { before + *rank };
            }
        }
        let scores = known.scores.filter(|_| self.spec.strategy().scored);
        // Zeros come untouched from the system, and each thread fills its own.
        let mut source = vec![0; rows.len() * kv_heads * per_head];
        let failure = Failure::default();
        let heads = source.chunks_exact_mut(per_head).enumerate().filter(|(i, _)| lengths[i / kv_heads] > 1);
        threads::for_each(self.chunk_threads(rows.len(), n), heads, |(i, source)| {
            let row = i / kv_heads;
            let wide = i * (per_head + n)..(i + 1) * (per_head + n);
            let place = Place { layer, row: rows[row], kv_head: i % kv_heads };
            let stored = &slots.positions[self.shape.of(self.shape.head(place))];
            let scores = [
                scores.map_or(&[][..], |(mass, _)| &mass.data()[wide.clone()]),
                scores.map_or(&[][..], |(_, peak)| &peak.data()[wide.clone()]),
                distinct.map_or(&[][..], |distinct| &distinct[wide]),
            ];
            let candidates = [stored, &columns[row * n..][..n]];
            if let Err(error) = self.fill(place, lengths[row], candidates, scores, source) {
                failure.note(i, error);
            }
        });
        failure.first()?;
        Ok(Plan { source, columns })
    }

    /// Fill `source` with the column that goes into each slot of a head.
    fn fill(
        &self,
        place: Place,
        len: usize,
        [stored, columns]: [&[i32]; 2],
        scores: Scores<'_>,
        source: &mut [i32],
    ) -> Result<()> {
        let seen = self.seen[place.row];
        let (count, due) = (stored.iter().filter(|&&p| p >= 0).count(), self.stored(seen - len));
        if count != due {
            let place = at(place);
            fail!(Cache, "{place} stores {count} tokens where {due} are due: positions were changed from outside");
        }
        let full = count + len > stored.len();
        if full && self.spec.distinct() && scores[DISTINCT].is_empty() {
            fail!(Tensor, "{} needs distinct, got None", self.spec.strategy().name);
        }
        let heavy = self.spec.heavy(self.average.as_ref());
        let rule = Rule { split: self.spec.split(stored.len()), adaptive: self.spec.adaptive(), heavy: &*heavy };
        let shown = Shown { place, seen, stored, columns, scores };
        SCRATCH.with_borrow_mut(|scratch| {
            let decided = scratch.decide(shown, [&[]; 2], full.then_some(&rule));
            let Decided { dropped, positions, room } = decided.map_err(|bad| score_error(place, bad))?;
            for &i in dropped.iter() {
                positions[i as usize] = -1;
            }
            // The oldest of the columns that stay goes into the first slot that is free.
            let (slots, columns) = positions.split_at_mut(stored.len());
            for position in columns.iter_mut() {
                *position = !*position;
            }
            let count = pack(columns, 0, room, [], []);
            let mut staying = room[..count].iter().copied();
            for (source, &position) in source.iter_mut().zip(&*slots) {
                *source = if position < 0 { staying.next().unwrap_or(-1) } else { -1 };
            }
            Ok(())
        })
    }

    /// Write what was decided.
    fn keep(
        &mut self,
        slots: &mut Slots<'_>,
        layer: usize,
        plan: &Plan,
        known: ChunkScores<'_>,
        source: &mut ViewMut<'_, i32, 3>,
    ) {
        let Some(Call { rows, own, lengths, .. }) = &self.call else { return };
        let Shape { kv_heads, slots: per_head, .. } = self.shape;
        let n = plan.columns.len() / rows.len().max(1);
        let threads = self.chunk_threads(rows.len(), n);
        let of_layer =
            layer * self.shape.rows * kv_heads * per_head..(layer + 1) * self.shape.rows * kv_heads * per_head;
        let mut targets: Vec<Option<[&mut [f32]; 2]>> = match &mut slots.scores {
            Some((mass, peak)) => {
                let peaks = peak[of_layer.clone()].chunks_exact_mut(per_head);
                mass[of_layer.clone()].chunks_exact_mut(per_head).zip(peaks).map(|(m, p)| Some([m, p])).collect()
            }
            None => (0..self.shape.rows * kv_heads).map(|_| None).collect(),
        };
        let heads = (slots.positions[of_layer.clone()].chunks_exact_mut(per_head))
            .zip(&mut targets)
            .enumerate()
            .filter_map(|(i, head)| own[i / kv_heads].map(|row| (row, row * kv_heads + i % kv_heads, head)))
            .filter(|&(row, ..)| lengths[row] > 1);
        threads::for_each(threads, heads, |(row, i, (positions, targets))| {
            let source = &plan.source[i * per_head..][..per_head];
            let columns = &plan.columns[row * n..][..n];
            for (position, &column) in positions.iter_mut().zip(source).filter(|(_, column)| **column >= 0) {
                *position = columns[column as usize];
            }
            if let (Some(targets), Some((mass, peak))) = (targets, known.scores) {
                for (to, from) in targets.iter_mut().zip([mass, peak]) {
                    let (stored, new) = from.data()[i * (per_head + n)..][..per_head + n].split_at(per_head);
                    for ((to, &from), &position) in to.iter_mut().zip(stored).zip(&*positions) {
                        *to = if position < 0 { 0.0 } else { from };
                    }
                    for (to, &column) in to.iter_mut().zip(source).filter(|(_, column)| **column >= 0) {
                        *to = new[column as usize];
                    }
                }
            }
        });
        let heads = source.data().chunks_exact_mut(per_head).zip(plan.source.chunks_exact(per_head)).enumerate();
        threads::for_each(threads, heads, |(i, (to, from))| {
            if lengths[i / kv_heads] > 1 { to.copy_from_slice(from) } else { to.fill(-1) }
        });
        for (&row, &len) in rows.iter().zip(lengths).filter(|(_, len)| **len > 1) {
            let dropped = self.stored(self.seen[row] - len) + len - self.stored(self.seen[row]);
            self.evictions += (dropped * kv_heads) as u64;
        }
    }

    /// Threads that a layer of a chunk of `n` columns is worth.
    fn chunk_threads(&self, rows: usize, n: usize) -> usize {
        if (self.shape.slots + n) * rows * self.shape.kv_heads < WORTH_THREADS { 1 } else { self.threads }
    }
}

fn check_ranks(row: usize, ranks: &[i32], len: usize) -> Result<()> {
    let mut next = 0;
    for &rank in ranks {
        match usize::try_from(rank) {
            Ok(rank) if rank == next => next += 1,
            Ok(_) => {
                fail!(Tensor, "columns of row {row} must count its new tokens from 0; after {next} of them came {rank}")
            }
            Err(_) if rank == -1 => {}
            Err(_) => fail!(Tensor, "columns of row {row} must be ranks, or -1 for padding, got {rank}"),
        }
    }
    if next != len {
        fail!(Tensor, "columns of row {row} must number its {len} new tokens, got {next}");
    }
    Ok(())
}
