//! A call of the model from its first to its last step: the slots that are overwritten now, and those that are next.

use std::sync::Mutex;

use super::{Call, Ledger, SCRATCH, Shape, Slots, WORTH_THREADS, first, note, score_error, wrap};
use crate::decide::{Candidates, Rule, Scores};
use crate::error::{Result, fail};
use crate::threads;
use crate::view::ViewMut;
use crate::worth;

impl Ledger {
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
