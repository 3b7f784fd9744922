//! States that come from elsewhere: saved ones, those of other rows, and more slots.

use super::{Ledger, Shape};
use crate::error::{Error, Result, fail};
use crate::view::View;

impl Ledger {
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
