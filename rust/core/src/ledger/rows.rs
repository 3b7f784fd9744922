//! Rows as a whole: emptied, copied, put in another order, taken over from elsewhere, or given more slots.

use super::{Ledger, Place, Ring, Shape, Slots, at, most_victims, per_row};
use crate::error::{Result, fail};
use crate::split::MOST_TOKENS;
use crate::view::View;

impl Ledger {
    /// Forget everything: positions -1, scores 0, queues full, counters 0. Also ends a call that was begun.
    pub fn reset(&mut self, slots: &mut Slots<'_>) -> Result<()> {
        self.check_slots(slots)?;
        self.call = None;
        (0..self.shape.rows).for_each(|row| self.clear(slots, row));
        self.evictions = 0;
        Ok(())
    }

    /// Catch up with rows that have taken tokens one by one elsewhere: `steps[i]` of them for `rows[i]` (`None`: all rows).
    ///
    /// As so many calls of one token each, none of which may have been due for victims.
    pub fn advance(&mut self, slots: &mut Slots<'_>, steps: &[i64], rows: Option<&[i64]>) -> Result<()> {
        self.idle("advance")?;
        self.check_slots(slots)?;
        let rows = self.chosen_rows(rows)?;
        per_row("steps", steps, &rows)?;
        let interval = if self.spec.strategy().bounded { self.spec.interval() } else { 0 };
        let mut counts = Vec::with_capacity(rows.len());
        for (i, (&count, &row)) in steps.iter().zip(&rows).enumerate() {
            let queued = self.empty(row) + self.rings[row].len;
            let most = queued.saturating_sub(interval + usize::from(interval > 0));
            match usize::try_from(count) {
                Ok(n) if n <= most.min(MOST_TOKENS - self.seen[row]) || n == 0 => counts.push(n),
                _ => fail!(Cache, "steps[{i}] must be from 0 to {most}, before row {row} needs victims, got {count}"),
            }
        }
        for (&row, &count) in rows.iter().zip(&counts) {
            for head in self.heads_of(row) {
                for step in 0..count {
                    self.take(slots, head, row, step);
                }
            }
            self.pass(row, count, count);
        }
        Ok(())
    }

    /// Forget one row: positions -1, scores 0, queues full, no token seen.
    pub fn release(&mut self, slots: &mut Slots<'_>, row: i64) -> Result<()> {
        self.idle("release")?;
        self.check_slots(slots)?;
        let row = self.row("row", row)?;
        self.clear(slots, row);
        Ok(())
    }

    fn clear(&mut self, slots: &mut Slots<'_>, row: usize) {
        for head in self.heads_of(row) {
            slots.clear(self.shape.of(head));
        }
        self.rings[row] = Ring::default();
        self.seen[row] = 0;
    }

    /// The heads of a row, by number.
    fn heads_of(&self, row: usize) -> impl Iterator<Item = usize> + use<> {
        let shape = self.shape;
        let layers = 0..shape.layers;
        layers.flat_map(move |layer| (0..shape.kv_heads).map(move |kv_head| shape.head(Place { layer, row, kv_head })))
    }

    /// Make row `target` a copy of row `source`: positions, scores, queues and what it has seen.
    pub fn copy_row(&mut self, slots: &mut Slots<'_>, source: i64, target: i64) -> Result<()> {
        self.idle("copy_row")?;
        self.check_slots(slots)?;
        let (source, target) = (self.row("source", source)?, self.row("target", target)?);
        for (from, to) in self.heads_of(source).zip(self.heads_of(target)) {
            let (entries, start) = (self.entries(from), self.entries(to).start);
            self.victims.copy_within(entries, start);
            let (from, to) = (self.shape.of(from), self.shape.of(to).start);
            slots.positions.copy_within(from.clone(), to);
            if let Some((mass, peak)) = &mut slots.scores {
                mass.copy_within(from.clone(), to);
                peak.copy_within(from, to);
            }
        }
        self.rings[target] = self.rings[source];
        self.seen[target] = self.seen[source];
        Ok(())
    }

    /// Row `i` takes the queues of row `rows[i]` and what it has seen; the caller does the same with its tensors.
    pub fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.idle("reorder")?;
        if rows.len() != self.shape.rows {
            fail!(Tensor, "rows must have one entry per row, {}, got {}", self.shape.rows, rows.len());
        }
        let from = rows.iter().map(|&row| self.row("rows", row)).collect::<Result<Vec<_>>>()?;
        if from.iter().enumerate().all(|(to, &from)| to == from) {
            return Ok(());
        }
        let of_row = self.shape.kv_heads * most_victims(&self.spec);
        let old = self.victims.clone();
        for (to, i) in self.victims.chunks_exact_mut(of_row.max(1)).zip(0..) {
            let (layer, row) = (i / self.shape.rows, i % self.shape.rows);
            to.copy_from_slice(&old[(layer * self.shape.rows + from[row]) * of_row..][..of_row]);
        }
        self.rings = from.iter().map(|&row| self.rings[row]).collect();
        self.seen = from.iter().map(|&row| self.seen[row]).collect();
        Ok(())
    }

    /// Take over saved queues (`[layers, rows, kv_heads, slots]`) and counters of some `rows` (`None`: all); their `positions` already hold
    /// what was saved.
    pub fn restore(
        &mut self,
        positions: &[i32],
        queues: View<'_, i32, 4>,
        seen: &[i64],
        rows: Option<&[i64]>,
    ) -> Result<()> {
        self.idle("restore")?;
        let Shape { layers, kv_heads, slots, .. } = self.shape;
        let rows = self.chosen_rows(rows)?;
        queues.expect("queues", [layers, rows.len(), kv_heads, slots])?;
        per_row("seen", seen, &rows)?;
        let bounded = self.spec.strategy().bounded;
        let mut counts = Vec::with_capacity(rows.len());
        for (i, &value) in seen.iter().enumerate() {
            match usize::try_from(value) {
                Ok(n) if n <= if bounded { MOST_TOKENS } else { slots } => counts.push(n),
                _ => fail!(Cache, "seen[{i}] cannot be {value}"),
            }
        }
        let head_of = |i: usize| {
            let (layer, row) = (i / kv_heads / rows.len(), rows[i / kv_heads % rows.len()]);
            Place { layer, row, kv_head: i % kv_heads }
        };
        let mut lens = vec![None; rows.len()];
        let mut stored = vec![0; counts.iter().max().map_or(0, |most| most.div_ceil(64))];
        for (i, queue) in queues.data().chunks_exact(slots).enumerate() {
            let (place, row) = (head_of(i), i / kv_heads % rows.len());
            let positions = &positions[self.shape.of(self.shape.head(place))];
            let refuse = |why: String| -> Result<()> { fail!(Cache, "{}: {why}", at(place)) };
            match check_head(queue, positions, counts[row], &mut stored) {
                Err(why) => refuse(why)?,
                Ok(n) if *lens[row].get_or_insert(n) != n => {
                    refuse(format!("{n} slots are queued, other heads of the row have {}", lens[row].unwrap_or(n)))?;
                }
                Ok(n) if bounded && n <= self.spec.interval() => {
                    refuse(format!("{n} slots are queued, more than {} are needed", self.spec.interval()))?;
                }
                Ok(n) if n > slots - counts[row].min(slots) + most_victims(&self.spec) => {
                    refuse(format!("{n} slots are queued, more than can be"))?;
                }
                Ok(_) => {}
            }
        }
        for (i, queue) in queues.data().chunks_exact(slots).enumerate() {
            let (entries, row) = (self.entries(self.shape.head(head_of(i))), i / kv_heads % rows.len());
            let empty = slots - counts[row].min(slots);
            let victims = &queue[empty..lens[row].unwrap_or(empty)];
            self.victims[entries][..victims.len()].copy_from_slice(victims);
        }
        for ((&row, len), count) in rows.iter().zip(lens).zip(counts) {
            self.seen[row] = count;
            self.rings[row] = Ring { start: 0, len: len.map_or(0, |len| len - self.empty(row)) };
        }
        Ok(())
    }

    /// Go on with more slots per head; the new ones join the end of every queue. Only for unbounded strategies.
    pub fn grow(&mut self, shape: Shape) -> Result<()> {
        self.idle("grow")?;
        if self.spec.strategy().bounded {
            fail!(Cache, "{} is bounded by its budget and cannot grow", self.spec.strategy().name);
        }
        let (old, new) = (self.shape.slots, shape.slots);
        if (Shape { slots: old, ..shape }) != self.shape || new < old || new > MOST_TOKENS {
            let (own, got) = (self.shape.dims(), shape.dims());
            fail!(Tensor, "grow needs the shape {own:?} with at least as many slots, got {got:?}");
        }
        self.shape = shape;
        Ok(())
    }
}

/// Check one saved queue against its positions and return its length. `stored`: a bit for each token seen, none set, nor
/// when this returns a length.
fn check_head(queue: &[i32], positions: &[i32], seen: usize, stored: &mut [u64]) -> std::result::Result<usize, String> {
    let slots = queue.len();
    let len = queue.iter().position(|&s| s < 0).unwrap_or(slots);
    if let Some(entry) = queue[len..].iter().find(|&&s| s != -1) {
        return Err(format!("behind the end of the queue must be -1, got {entry}"));
    }
    let held = seen.min(slots);
    let mut queued = vec![false; slots];
    for &slot in &queue[..len] {
        match queued.get_mut(slot as usize) {
            Some(q) if !*q => *q = true,
            Some(_) => return Err(format!("slot {slot} is queued twice")),
            None => return Err(format!("slot {slot} is queued, there are {slots}")),
        }
    }
    let mut count = 0;
    for (slot, &position) in positions.iter().enumerate() {
        match position {
            -1 if queued[slot] => {}
            -1 => return Err(format!("the empty slot {slot} is not queued")),
            p if p >= 0 && (p as usize) < seen => {
                let (word, bit) = (p as usize / 64, 1 << (p % 64));
                if stored[word] & bit != 0 {
                    return Err(format!("position {p} is stored twice"));
                }
                stored[word] |= bit;
                count += 1;
            }
            p => return Err(format!("slot {slot} holds position {p}, {seen} tokens were seen")),
        }
    }
    for &position in positions.iter().filter(|&&position| position >= 0) {
        stored[position as usize / 64] = 0;
    }
    if count != held {
        return Err(format!("{count} tokens are stored where {held} are due"));
    }
    if !queue[..len].iter().take(slots - held).copied().eq(held as i32..slots as i32) {
        return Err(format!("the queue does not begin with the empty slots from {held} on"));
    }
    Ok(len)
}
