//! Calls that bring a row two tokens or more: which of the stored and the new ones stay.

use std::ops::Range;

use super::{Call, Ledger, MEMORY, Memory, Place, Shape, Slots, WORTH_THREADS, at, needed, score_error};
use crate::decide::Rule;
use crate::error::{Result, fail};
use crate::head::{DISTINCT, Head, Scores};
use crate::score::Open;
use crate::simd::places;
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

        let mut columns = ranks.data().to_vec();
        for (i, row) in columns.chunks_exact_mut(n.max(1)).enumerate() {
            let before = (self.seen[call.rows[i]] - call.lengths[i]) as i32;
            for rank in row {
                *rank = if *rank < 0 { -1 } else { before + *rank };
            }
        }
        // Head by head; nothing is written before every head succeeded. Zeros come untouched from the system, and each thread fills its own.
        let mut plan = vec![0; rows * kv_heads * per_head];
        let heads = plan.chunks_exact_mut(per_head).enumerate();
        threads::try_for_each(self.chunk_threads(n), heads, |(i, source)| {
            let row = i / kv_heads;
            if call.lengths[row] < 2 {
                source.fill(-1);
                return Ok(());
            }
            let place = Place { layer, row: call.rows[row], kv_head: i % kv_heads };
            let stored = &slots.positions[self.shape.of(self.shape.head(place))];
            let wide = i * (per_head + n)..(i + 1) * (per_head + n);
            let scores = known.scores.filter(|_| self.spec.strategy().scored);
            let scores = [
                scores.map_or(&[][..], |(mass, _)| &mass.data()[wide.clone()]),
                scores.map_or(&[][..], |(_, peak)| &peak.data()[wide.clone()]),
                distinct.map_or(&[][..], |distinct| &distinct[wide]),
            ];
            MEMORY.with_borrow_mut(|memory| {
                memory.positions.clear();
                memory.positions.extend_from_slice(stored);
                memory.positions.extend_from_slice(&columns[row * n..][..n]);
                self.fill(place, call.lengths[row], scores, memory, source)
            })
        })?;
        let heads = source.data().chunks_exact_mut(per_head).zip(plan.chunks_exact(per_head));
        threads::for_each(self.chunk_threads(n), heads, |(source, plan)| source.copy_from_slice(plan));
        self.keep(slots, layer, &columns, known, &plan);
        let Some(Call { rows, lengths, decided, .. }) = &mut self.call else { return Ok(()) };
        decided[layer] = true;
        for (&row, &len) in rows.iter().zip(&*lengths).filter(|(_, len)| **len > 1) {
            let (before, after) = (self.seen[row] - len, self.seen[row]);
            self.evictions += ((before.min(per_head) + len - after.min(per_head)) * kv_heads) as u64;
        }
        Ok(())
    }

    /// Fill `source` with the column that goes into each slot of a head; the positions of its candidates are in `memory`.
    fn fill(
        &self,
        place: Place,
        len: usize,
        scores: Scores<'_>,
        Memory { scratch, positions, places: room }: &mut Memory,
        source: &mut [i32],
    ) -> Result<()> {
        let seen = self.seen[place.row];
        let (slots, due) = (source.len(), self.stored(seen - len));
        let count = positions[..slots].iter().filter(|&&position| position >= 0).count();
        if count != due {
            let place = at(place);
            fail!(Cache, "{place} stores {count} tokens where {due} are due: positions were changed from outside");
        }
        let head = Head { place, seen, positions, scores };
        head.check().map_err(|bad| score_error(place, bad))?;
        if count + len > slots {
            if self.spec.distinct() && scores[DISTINCT].is_empty() {
                fail!(Tensor, "{} needs distinct, got None", self.spec.strategy().name);
            }
            let heavy = self.spec.heavy(self.average.as_ref());
            let rule = Rule { split: self.spec.split(slots), adaptive: self.spec.adaptive(), heavy: &*heavy };
            let Open { ordinals, bound } = scratch.decide(head, &rule);
            for (position, &ordinal) in positions.iter_mut().zip(ordinals) {
                *position = if ordinal < bound { -1 } else { *position };
            }
        }
        // The oldest of the columns that stay goes into the first slot that is free.
        let (slots, columns) = positions.split_at_mut(slots);
        for position in columns.iter_mut() {
            *position = !*position;
        }
        let mut staying = places(columns, 0, room).iter().copied();
        for (source, &mut position) in source.iter_mut().zip(slots) {
            *source = if position < 0 { staying.next().unwrap_or(-1) } else { -1 };
        }
        Ok(())
    }

    /// Write what was decided.
    fn keep(&self, slots: &mut Slots<'_>, layer: usize, columns: &[i32], known: ChunkScores<'_>, source: &[i32]) {
        let Shape { kv_heads, slots: per_head, .. } = self.shape;
        let n = columns.len() * kv_heads * per_head / source.len();
        let source = |i: usize| &source[i * per_head..][..per_head];
        self.for_each_head(layer, n, slots.positions, |_, i, positions| {
            let columns = &columns[i / kv_heads * n..][..n];
            for (position, &column) in positions.iter_mut().zip(source(i)).filter(|(_, column)| **column >= 0) {
                *position = columns[column as usize];
            }
        });
        let (Some((mass, peak)), Some(new)) = (&mut slots.scores, known.scores) else { return };
        for (scores, new) in [(mass, new.0), (peak, new.1)] {
            self.for_each_head(layer, n, scores, |here, i, scores| {
                let (stored, new) = new.data()[i * (per_head + n)..][..per_head + n].split_at(per_head);
                for ((to, &from), &position) in scores.iter_mut().zip(stored).zip(&slots.positions[here]) {
                    *to = if position < 0 { 0.0 } else { from };
                }
                for (to, &column) in scores.iter_mut().zip(source(i)).filter(|(_, column)| **column >= 0) {
                    *to = new[column as usize];
                }
            });
        }
    }

    /// Run `work` on the part that each head of a layer has in a slot tensor, if its row has a chunk: where that is, and which head of the
    /// call it is.
    fn for_each_head<T: Send>(
        &self,
        layer: usize,
        n: usize,
        tensor: &mut [T],
        work: impl Fn(Range<usize>, usize, &mut [T]) + Sync,
    ) {
        let (Shape { rows, kv_heads, slots, .. }, Some(call)) = (self.shape, &self.call) else { return };
        let heads = tensor.chunks_exact_mut(slots).enumerate().skip(layer * rows * kv_heads).take(rows * kv_heads);
        let heads = heads.filter_map(|(head, part)| {
            let row = call.own[self.shape.place(head).row].filter(|&row| call.lengths[row] > 1)?;
            Some((self.shape.of(head), row * kv_heads + head % kv_heads, part))
        });
        threads::for_each(self.chunk_threads(n), heads, |(here, i, part)| work(here, i, part));
    }

    /// Threads that a layer of a chunk of `n` columns is worth.
    fn chunk_threads(&self, n: usize) -> usize {
        let rows = self.call.as_ref().map_or(0, |call| call.rows.len());
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
