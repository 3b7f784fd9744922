//! A call of the model from its first to its last step: the slots that are overwritten now, and those that are next.

use super::{
    Call, Ledger, MEMORY, Memory, Ring, Shape, Slots, WORTH_THREADS, at, most_victims, needed, per_row, score_error,
    wrap,
};
use crate::decide::Rule;
use crate::error::{Result, fail};
use crate::head::{Head, Place};
use crate::simd::{places, vectorised};
use crate::split::MOST_TOKENS;
use crate::threads;
use crate::view::{View, ViewMut};

impl Ledger {
    /// Start a call of `lengths[i]` real new tokens for each of the ledger's `rows` (`None`: all); other rows rest.
    ///
    /// A row with one token gives each of its heads the slot to write, in `out` (`[layers, rows of the call, kv_heads]`): the first of the
    /// queue, now holding the new position and zero scores. Other rows get -1.
    pub fn begin(
        &mut self,
        slots: &mut Slots<'_>,
        lengths: &[i64],
        rows: Option<&[i64]>,
        out: &mut ViewMut<'_, i64, 3>,
    ) -> Result<()> {
        self.check_slots(slots)?;
        let Shape { layers, kv_heads, slots: per_head, .. } = self.shape;
        if self.call.is_some() {
            fail!(Cache, "begin must not come twice: finish the call, or reset");
        }
        let rows = self.chosen_rows(rows)?;
        out.expect("slots", [layers, rows.len(), kv_heads])?;
        per_row("lengths", lengths, &rows)?;
        let mut new = Vec::with_capacity(rows.len());
        for (i, (&length, &row)) in lengths.iter().zip(&rows).enumerate() {
            let most = MOST_TOKENS - self.seen[row];
            match usize::try_from(length) {
                Ok(n) if n <= most => new.push(n),
                _ => fail!(Config, "lengths[{i}] must be from 0 to {most}, got {length}"),
            }
            if !self.spec.strategy().bounded && self.seen[row] + new[i] > per_head {
                fail!(Cache, "row {row} needs {} slots and has {per_head}: grow first", self.seen[row] + new[i]);
            }
        }

        for (i, out) in out.data().chunks_exact_mut(kv_heads).enumerate() {
            let (layer, i) = (i / rows.len(), i % rows.len());
            let row = rows[i];
            if new[i] != 1 {
                out.fill(-1);
                continue;
            }
            for (kv_head, slot) in out.iter_mut().enumerate() {
                *slot = i64::from(self.take(slots, self.shape.head(Place { layer, row, kv_head }), row, 0));
            }
        }
        for (&row, &n) in rows.iter().zip(&new) {
            self.pass(row, n, usize::from(n == 1));
        }
        let mut own = vec![None; self.shape.rows];
        rows.iter().enumerate().for_each(|(i, &row)| own[row] = Some(i));
        self.call = Some(Call { rows, own, lengths: new, decided: vec![false; layers] });
        Ok(())
    }

    /// Give the slot that is `step` further on in a head's queue to the row's next token but so many, with scores of 0.
    pub(super) fn take(&mut self, slots: &mut Slots<'_>, head: usize, row: usize, step: usize) -> i32 {
        let (here, entries, empty) = (self.shape.of(head), self.entries(head), self.empty(row));
        let slot = match step.checked_sub(empty) {
            None => (self.seen[row] + step) as i32,
            Some(step) => self.victims[entries.start + wrap(self.rings[row].start + step, entries.len())],
        };
        let taken = here.start + slot as usize;
        self.evictions += u64::from(slots.positions[taken] >= 0);
        slots.clear(taken..taken + 1);
        slots.positions[taken] = (self.seen[row] + step) as i32;
        slot
    }

    /// Count a row's `new` tokens, for which so many slots were `taken`.
    pub(super) fn pass(&mut self, row: usize, new: usize, taken: usize) {
        let (Ring { start, len }, victims) = (self.rings[row], taken.saturating_sub(self.empty(row)));
        self.rings[row] = Ring { start: wrap(start + victims, most_victims(&self.spec)), len: len - victims };
        self.seen[row] += new;
        if let Some(average) = &mut self.average {
            average.cover(self.seen[row]);
        }
    }

    /// End a call: rows whose queue holds no more than an interval of slots choose their next victims. Returns how many were chosen.
    ///
    /// `distinct` (`[layers, rows of the call, kv_heads, slots]`) is how far each stored token's key points from the mean of those that are
    /// held; only strategies that go by it need it, and only when victims are chosen.
    pub fn finish(&mut self, slots: &Slots<'_>, distinct: Option<View<'_, f32, 4>>) -> Result<u64> {
        self.check_slots(slots)?;
        let Some(call) = &self.call else { fail!(Cache, "finish must come after begin") };
        if call.lengths.iter().any(|&n| n > 1)
            && let Some(layer) = call.decided.iter().position(|&decided| !decided)
        {
            fail!(Cache, "finish must come after every layer's chunk; layer {layer} is missing");
        }
        let Shape { layers, kv_heads, slots: per_head, .. } = self.shape;
        let distinct = needed(&self.spec, distinct, [layers, call.rows.len(), kv_heads, per_head])?;
        // Each row's ring once its chunk counts, and how many victims join it.
        let mut rings: Vec<Ring> = (0..self.shape.rows).map(|row| self.ring(row)).collect();
        let mut due = vec![0; self.shape.rows];
        for row in self.due() {
            due[row] = 2 * self.spec.interval() - self.empty(row) - rings[row].len;
        }
        if due.iter().any(|&victims| victims > 0) {
            self.choose(slots, distinct, &rings, &due)?;
        }
        for (ring, &victims) in rings.iter_mut().zip(&due) {
            ring.len += victims;
        }
        self.rings = rings;
        self.call = None;
        Ok(due.iter().map(|&victims| victims as u64).sum::<u64>() * (self.shape.layers * self.shape.kv_heads) as u64)
    }

    /// Append the victims that are due in each row to its heads' queues, where nobody reads until the length is committed.
    fn choose(&mut self, slots: &Slots<'_>, distinct: Option<&[f32]>, rings: &[Ring], due: &[usize]) -> Result<()> {
        let Self { spec, shape, seen, average, victims: chosen, call, .. } = self;
        let (spec, shape) = (&*spec, *shape);
        let Some(Call { rows, own, .. }) = call else { fail!(Cache, "finish must come after begin") };
        if spec.distinct() && distinct.is_none() {
            fail!(Tensor, "{} needs distinct, got None", spec.strategy().name);
        }
        let split = spec.split(shape.slots - 2 * spec.interval());
        let heavy = spec.heavy(average.as_ref());
        let rule = Rule { split, adaptive: spec.adaptive(), heavy: &*heavy };
        let scores = slots.scores.as_ref().filter(|_| spec.strategy().scored);
        let stored = &*slots.positions;
        let threads = if stored.len() < WORTH_THREADS { 1 } else { self.threads };
        let entries = most_victims(spec);
        let heads = chosen.chunks_exact_mut(entries).enumerate();
        let heads = heads.filter(|&(head, _)| due[shape.place(head).row] > 0);
        threads::try_for_each(threads, heads, |(head, queue)| {
            let (place, here) = (shape.place(head), shape.of(head));
            let scores = [
                scores.map_or(&[][..], |(mass, _)| &mass[here.clone()]),
                scores.map_or(&[][..], |(_, peak)| &peak[here.clone()]),
                distinct.map_or(&[][..], |distinct| {
                    let row = own[place.row].unwrap_or_default();
                    let pair = (place.layer * rows.len() + row) * shape.kv_heads + place.kv_head;
                    &distinct[pair * shape.slots..][..shape.slots]
                }),
            ];
            let (ring, due) = (rings[place.row], due[place.row]);
            MEMORY.with_borrow_mut(|Memory { scratch, positions, places: room }| {
                positions.clear();
                positions.extend_from_slice(&stored[here]);
                for slot in ring.parts(entries).into_iter().flat_map(|part| &queue[part]) {
                    positions[*slot as usize] = -1;
                }
                let head = Head { place, seen: seen[place.row], positions, scores };
                head.check().map_err(|bad| score_error(place, bad))?;
                let open = scratch.decide(head, &rule);
                let victims = places(open.ordinals, open.bound, room);
                if victims.len() != due {
                    let (at, n) = (at(place), victims.len());
                    fail!(Cache, "{at} offers {n} victims where {due} are due: positions were changed from outside");
                }
                oldest_first(victims, positions);
                let [a, b] = Ring { start: wrap(ring.start + ring.len, entries), len: due }.parts(entries);
                let (first, second) = victims.split_at(a.len());
                queue[a].copy_from_slice(first);
                queue[b].copy_from_slice(second);
                Ok(())
            })
        })
    }
}

vectorised! {
    /// Put slots in the order of their positions.
    fn oldest_first<'a>(slots: &'a mut [i32], positions: &'a [i32]) -> () {
        // As many are compared with each other rather than sorted.
        const FEW: usize = 64;
        let (mut own, mut older, mut ordered) = ([i32::MAX; FEW], [0u32; FEW], [-1; FEW]);
        if slots.len() <= FEW {
            own.iter_mut().zip(&*slots).for_each(|(own, &slot)| *own = positions[slot as usize]);
            for &other in &own[..slots.len()] {
                for (older, &own) in older.iter_mut().zip(&own) {
                    *older += u32::from(other < own);
                }
            }
            slots.iter().zip(older).for_each(|(&slot, older)| ordered[older as usize] = slot);
        }
        match ordered.get(..slots.len()) {
            // None is missing unless two are equally old, which in a sound ledger none are.
            Some(ordered) if !ordered.contains(&-1) => slots.copy_from_slice(ordered),
            _ => slots.sort_unstable_by_key(|&slot| (positions[slot as usize], slot)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::tests::everywhere;

    #[test]
    fn victims_come_in_the_order_of_their_positions() {
        for n in [0, 1, 5, 63, 64, 65, 200] {
            let slots: Vec<i32> = (0..n).map(|i| 2 * i + 1).collect();
            // Some in one place, which no sound ledger has.
            let positions: Vec<i32> = (0..2 * n).map(|i| i * 7919 % 1_000_003 % 150).collect();
            let mut naive = slots.clone();
            naive.sort_by_key(|&slot| (positions[slot as usize], slot));
            everywhere(|| {
                let mut ordered = slots.clone();
                oldest_first(&mut ordered, &positions);
                assert_eq!(ordered, naive);
            });
        }
    }
}
