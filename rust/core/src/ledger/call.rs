//! A call of the model from its first to its last step: the slots that are overwritten now, and those that are next.

use super::{Call, Failure, Ledger, Ring, SCRATCH, Shape, Slots, WORTH_THREADS, at, needed, score_error, wrap};
use crate::decide::Rule;
use crate::error::{Result, fail};
use crate::head::{Head, Place, Scores};
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
        if lengths.len() != rows.len() {
            fail!(Tensor, "lengths must have one entry per row, {}, got {}", rows.len(), lengths.len());
        }
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
                let here = self.shape.of(self.shape.head(Place { layer, row, kv_head }));
                let chosen = self.queues[here.start + self.rings[row].start];
                *slot = i64::from(chosen);
                let taken = here.start + chosen as usize;
                self.evictions += u64::from(slots.positions[taken] >= 0);
                slots.clear(taken..taken + 1);
                slots.positions[taken] = self.seen[row] as i32;
            }
        }
        for (&row, &n) in rows.iter().zip(&new) {
            if n == 1 {
                let Ring { start, len } = self.rings[row];
                self.rings[row] = Ring { start: wrap(start + 1, per_head), len: len - 1 };
            }
            self.seen[row] += n;
        }
        if let Some(average) = &mut self.average {
            average.cover(rows.iter().map(|&row| self.seen[row]).max().unwrap_or(0));
        }
        self.call = Some(Call { rows, lengths: new, decided: vec![false; layers] });
        Ok(())
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
            due[row] = 2 * self.spec.interval() - rings[row].len;
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
        let Self { spec, shape, seen, average, queues, call, .. } = self;
        let (spec, shape) = (&*spec, *shape);
        let rows = call.as_ref().map_or(&[][..], |call| &call.rows);
        let mut own = vec![0; shape.rows]; // index of each row in the call
        for (i, &row) in rows.iter().enumerate() {
            own[row] = i;
        }
        if spec.distinct() && distinct.is_none() {
            fail!(Tensor, "{} needs distinct, got None", spec.strategy().name);
        }
        let split = spec.split(shape.slots - 2 * spec.interval());
        let scores = slots.scores.as_ref().filter(|_| spec.strategy().scored);
        let positions = &*slots.positions;
        let failure = Failure::default();
        let threads = if positions.len() < WORTH_THREADS { 1 } else { self.threads };
        let heads = queues.chunks_exact_mut(shape.slots).enumerate();
        let heads = heads.filter(|&(head, _)| due[shape.place(head).row] > 0);
        threads::for_each(threads, heads, |(head, queue)| {
            let (place, here) = (shape.place(head), shape.of(head));
            let scores = Scores {
                mass: scores.map_or(&[], |(mass, _)| &mass[here.clone()]),
                peak: scores.map_or(&[], |(_, peak)| &peak[here.clone()]),
                distinct: distinct.map_or(&[], |distinct| {
                    let pair = (place.layer * rows.len() + own[place.row]) * shape.kv_heads + place.kv_head;
                    &distinct[pair * shape.slots..][..shape.slots]
                }),
            };
            let head_now = Head { place, positions: &positions[here], seen: seen[place.row], scores };
            let heavy = spec.heavy(average.as_ref());
            let rule = Rule { split, adaptive: spec.adaptive(), heavy: &*heavy };
            failure.note(head, append(head_now, &rule, due[place.row], queue, rings[place.row]));
        });
        failure.first()
    }
}

/// Append a head's next victims to its queue, oldest first.
fn append(head: Head<'_>, rule: &Rule<'_>, due: usize, queue: &mut [i32], Ring { start, len }: Ring) -> Result<()> {
    let slots = queue.len();
    SCRATCH.with_borrow_mut(|(scratch, positions)| {
        positions.clear();
        positions.extend_from_slice(head.positions);
        for i in 0..len {
            positions[queue[wrap(start + i, slots)] as usize] = -1;
        }
        scratch.decide(&Head { positions, ..head }, rule).map_err(|bad| score_error(head.place, bad))?;
        let victims = scratch.dropped(positions);
        if victims.len() != due {
            let n = victims.len();
            fail!(
                Cache,
                "{} offers {n} victims where {due} are due: positions were changed from outside",
                at(head.place)
            );
        }
        for (i, &slot) in victims.iter().enumerate() {
            queue[wrap(start + len + i, slots)] = slot as i32;
        }
        Ok(())
    })
}
