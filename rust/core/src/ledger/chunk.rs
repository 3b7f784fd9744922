//! Calls that bring a row two tokens or more: which of the stored and the new ones stay.

use std::sync::Mutex;

use super::{Call, ChunkScores, Ledger, SCRATCH, Shape, Slots, WORTH_THREADS, first, note, score_error};
use crate::average::Average;
use crate::decide::{Candidates, Rule, Scores};
use crate::error::{Error, Result, fail};
use crate::spec::Spec;
use crate::threads;
use crate::view::{View, ViewMut};
use crate::worth;

impl Ledger {
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
        let threads = self.chunk_threads(columns.shape()[1]);
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
        // Zeros come untouched from the system, and each thread fills its own.
        let mut plan = vec![0i32; batch * heads * per_lane];
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
        threads::for_each(threads, chunk_lanes, |(i, plan)| {
            plan.fill(-1);
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

        call.decided[layer] = true;
        self.keep(slots, layer, &plan, &new_positions, scores, source);
        Ok(())
    }

    /// Write what was decided: the chunk's `plan` (`[batch, heads, slots]`) and the positions (`[batch, n]`) of its columns.
    fn keep(
        &mut self,
        slots: &mut Slots<'_>,
        layer: usize,
        plan: &[i32],
        new_positions: &[i32],
        scores: Option<ChunkScores<'_>>,
        source: &mut ViewMut<'_, i32, 3>,
    ) {
        let Shape { batch, heads, slots: per_lane, .. } = self.shape;
        let Some(Call { lengths, .. }) = &self.call else { return };
        let n = new_positions.len() / batch;
        let threads = self.chunk_threads(n);
        let of_layer = layer * batch * heads * per_lane..(layer + 1) * batch * heads * per_lane;
        let mut targets: Vec<Option<[&mut [f32]; 2]>> = match &mut slots.scores {
            Some((mass, peak)) => {
                let peaks = peak[of_layer.clone()].chunks_exact_mut(per_lane);
                mass[of_layer.clone()].chunks_exact_mut(per_lane).zip(peaks).map(|(m, p)| Some([m, p])).collect()
            }
            None => (0..batch * heads).map(|_| None).collect(),
        };
        let lanes = (plan.chunks_exact(per_lane).zip(source.data().chunks_exact_mut(per_lane)))
            .zip(slots.positions[of_layer.clone()].chunks_exact_mut(per_lane))
            .zip(self.queues[of_layer].chunks_exact_mut(per_lane))
            .zip(&mut targets)
            .enumerate();
        threads::for_each(threads, lanes, |(i, ((((plan, source), positions), queue), targets))| {
            let b = i / heads;
            if lengths[b] < 2 {
                return source.fill(-1);
            }
            source.copy_from_slice(plan);
            let columns = &new_positions[b * n..][..n];
            let mut empty = 0;
            for (slot, (position, &column)) in positions.iter_mut().zip(plan).enumerate() {
                if column >= 0 {
                    *position = columns[column as usize];
                } else if *position < 0 {
                    queue[empty] = slot as i32;
                    empty += 1;
                }
            }
            if let (Some(targets), Some(scores)) = (targets, scores) {
                for (to, from) in targets.iter_mut().zip([scores.mass, scores.peak]) {
                    let (stored, new) = from.data()[i * (per_lane + n)..][..per_lane + n].split_at(per_lane);
                    for ((to, &from), &position) in to.iter_mut().zip(stored).zip(&*positions) {
                        *to = if position < 0 { 0.0 } else { from };
                    }
                    for (to, &column) in to.iter_mut().zip(plan).filter(|(_, column)| **column >= 0) {
                        *to = new[column as usize];
                    }
                }
            }
        });
        for (b, &len) in lengths.iter().enumerate().filter(|(_, len)| **len > 1) {
            let before = (self.seen[b] - len).min(per_lane);
            self.evictions += (heads * (before + len).saturating_sub(per_lane)) as u64;
        }
    }

    /// Threads that a layer of a chunk of `n` columns is worth.
    fn chunk_threads(&self, n: usize) -> usize {
        let Shape { batch, heads, slots, .. } = self.shape;
        if (slots + n) * batch * heads < WORTH_THREADS { 1 } else { self.threads }
    }
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
