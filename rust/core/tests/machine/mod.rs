//! The ledger and a naive core, fed the same random calls. Shared by the property tests and the fuzz target.
//!
//! Invariants, checked after every step: the same positions in the same slots, the same queues and counters as the naive core;
//! a row stores `min(seen, budget)` tokens, each once, the newest among them; pinned sinks and all of the recent window are stored;
//! a call that fails leaves everything as it was.

pub(crate) mod naive;

use liquidfusion_core::Error;
use liquidfusion_core::ledger::{ChunkScores, Ledger, Shape, Slots};
use liquidfusion_core::params::{Name, Value};
use liquidfusion_core::spec::Spec;
use liquidfusion_core::strategy::STRATEGIES;
use liquidfusion_core::view::{View, ViewMut};
use naive::Head;

/// Choices drawn from a string of bytes; zeros when it ends.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn next(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn below(&mut self, n: usize) -> usize {
        usize::from(self.next()) % n
    }

    /// A score; few different ones, so that ties are common.
    fn score(&mut self) -> f32 {
        match self.next() {
            byte @ 0..64 => f32::from(byte / 8),
            byte => f32::from(byte) * 1.7e-3,
        }
    }
}

struct Machine {
    spec: Spec,
    shape: Shape,
    ledger: Ledger,
    positions: Vec<i32>,
    mass: Vec<f32>,
    peak: Vec<f32>,
    distinct: Vec<f32>,
    heads: Vec<Head>,
}

impl Machine {
    fn draw(choices: &mut Choices<'_>) -> Self {
        let strategy = &STRATEGIES[choices.below(STRATEGIES.len())];
        let budget = 12 + choices.below(24);
        let sink_size = choices.below(5);
        let most = ((budget - sink_size) / 8).max(1);
        let mut given = vec![
            (Name::SinkSize, Value::Int(sink_size as i64)),
            (Name::SinkUpdateRate, Value::Ratio([0.0, 0.1, 0.5, 1.0][choices.below(4)])),
            (Name::HeavyRatio, Value::Ratio([0.2, 0.5, 1.0, 0.0][choices.below(4)])),
            (Name::RecentRatio, Value::Ratio([0.3, 0.5, 1.0][choices.below(3)])),
            (Name::DistinctRatio, Value::Ratio([0.0, 0.3, 1.0][choices.below(3)])),
            (Name::PeakRatio, Value::Ratio([0.0, 0.5, 1.0][choices.below(3)])),
            (Name::EvictionInterval, Value::Int(1 + choices.below(most) as i64)),
            (Name::Sinks, Value::Choice(["pinned", "adaptive"][choices.below(2)])),
            (Name::AgeHalfLife, Value::Int([0, 5, 40, 300][choices.below(4)])),
        ];
        given.retain(|&(name, _)| strategy.listens(name));
        let spec = Spec::new(strategy.name, Some(budget as i64), &given).unwrap();
        let slots = spec.budget().unwrap_or(budget);
        let shape =
            Shape { layers: 1 + choices.below(2), rows: 1 + choices.below(3), kv_heads: 1 + choices.below(2), slots };
        let n = shape.layers * shape.rows * shape.kv_heads * slots;
        Self {
            ledger: Ledger::new(spec.clone(), shape, 1 + choices.below(3)).unwrap(),
            positions: vec![-1; n],
            mass: vec![0.0; n],
            peak: vec![0.0; n],
            distinct: vec![0.0; n],
            heads: Self::fresh(&spec, shape),
            spec,
            shape,
        }
    }

    fn fresh(spec: &Spec, shape: Shape) -> Vec<Head> {
        let Shape { layers, rows, kv_heads, slots } = shape;
        (0..layers * rows * kv_heads)
            .map(|head| Head::new(spec, slots, (head / kv_heads / rows, head % kv_heads)))
            .collect()
    }

    fn slots(&mut self) -> (&mut Ledger, Slots<'_>) {
        let scores = self.spec.strategy().scored.then_some((&mut self.mass[..], &mut self.peak[..]));
        (&mut self.ledger, Slots { positions: &mut self.positions, scores })
    }

    fn row(&self, head: usize) -> usize {
        head / self.shape.kv_heads % self.shape.rows
    }

    /// One call; `lengths` are per row of the ledger, `None` for rows that are no part of it.
    fn call(&mut self, lengths: &[Option<usize>], choices: &mut Choices<'_>) {
        if !self.spec.strategy().bounded {
            self.grow(lengths);
        }
        let Shape { layers, kv_heads, slots, .. } = self.shape;
        let mut rows: Vec<usize> = (0..lengths.len()).filter(|&row| lengths[row].is_some()).collect();
        if choices.below(2) == 0 {
            rows.reverse();
        }
        let signed: Vec<i64> = rows.iter().map(|&row| lengths[row].unwrap() as i64).collect();
        let named: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let named = (rows.len() < lengths.len() || rows.windows(2).any(|two| two[0] > two[1])).then_some(&named[..]);
        let mut chosen = vec![-7; layers * rows.len() * kv_heads];
        let (ledger, mut tensors) = self.slots();
        let mut out = ViewMut::new("slots", &mut chosen, [layers, rows.len(), kv_heads]).unwrap();
        ledger.begin(&mut tensors, &signed, named, &mut out).unwrap();
        for (i, &slot) in chosen.iter().enumerate() {
            let (layer, row) = (i / kv_heads / rows.len(), rows[i / kv_heads % rows.len()]);
            let head = &mut self.heads[(layer * lengths.len() + row) * kv_heads + i % kv_heads];
            assert_eq!(slot, if lengths[row] == Some(1) { head.decode() as i64 } else { -1 });
        }
        // Every stored token is looked at anew.
        for (head, slot) in (0..self.heads.len()).flat_map(|head| (0..slots).map(move |slot| (head, slot))) {
            let i = head * slots + slot;
            if self.positions[i] >= 0 && lengths[self.row(head)] == Some(1) {
                (self.mass[i], self.peak[i]) = (choices.score(), choices.score());
                self.heads[head].look(slot, self.mass[i], self.peak[i]);
            }
        }
        if lengths.iter().any(|&n| n > Some(1)) {
            for layer in 0..layers {
                self.chunk(layer, lengths, &rows, choices);
            }
        }
        self.distinct = (0..self.positions.len()).map(|_| choices.score() - 0.2).collect();
        if choices.below(4) == 0 {
            self.spoil(&rows, choices);
        }
        let distinct = self.distinct_of(&rows);
        let distinct = View::new("distinct", &distinct, [layers, rows.len(), kv_heads, slots]).unwrap();
        let (ledger, tensors) = self.slots();
        let victims = ledger.finish(&tensors, Some(distinct)).unwrap();
        let mut expected = 0;
        for head in 0..self.heads.len() {
            if lengths[self.row(head)].is_some_and(|n| n > 0) {
                expected += self.heads[head].watermark(&self.distinct[head * slots..][..slots]) as u64;
            }
        }
        assert_eq!(victims, expected);
    }

    /// Distinctness of a call's rows, in their order.
    fn distinct_of(&self, rows: &[usize]) -> Vec<f32> {
        let Shape { layers, rows: all, kv_heads, slots } = self.shape;
        let each = kv_heads * slots;
        (0..layers)
            .flat_map(|layer| rows.iter().map(move |row| (layer * all + row) * each))
            .flat_map(|from| self.distinct[from..from + each].iter().copied())
            .collect()
    }

    fn chunk(&mut self, layer: usize, lengths: &[Option<usize>], rows: &[usize], choices: &mut Choices<'_>) {
        let Shape { kv_heads, slots, .. } = self.shape;
        let lengths: Vec<usize> = rows.iter().map(|&row| lengths[row].unwrap()).collect();
        let n = lengths.iter().max().unwrap() + choices.below(3);
        let mut ranks = vec![-1; rows.len() * n];
        for (i, &length) in lengths.iter().enumerate() {
            let padding = choices.below(n - length + 1);
            for rank in 0..length {
                ranks[i * n + padding + rank] = rank as i32;
            }
        }
        let wide = slots + n;
        let mut draw = || (0..rows.len() * kv_heads * wide).map(|_| choices.score()).collect::<Vec<_>>();
        let (mass, peak, mut distinct) = (draw(), draw(), draw());
        for distinct in &mut distinct {
            *distinct -= 0.2;
        }
        let mut source = vec![-7; rows.len() * kv_heads * slots];
        let wanted = self.spec.strategy().scored;
        let (ledger, mut tensors) = self.slots();
        let view = |data| View::new("scores", data, [rows.len(), kv_heads, wide]).unwrap();
        let known = ChunkScores { scores: wanted.then(|| (view(&mass), view(&peak))), distinct: Some(view(&distinct)) };
        let ranks_view = View::new("columns", &ranks, [rows.len(), n]).unwrap();
        let mut source_view = ViewMut::new("source", &mut source, [rows.len(), kv_heads, slots]).unwrap();
        ledger.chunk(&mut tensors, layer, ranks_view, known, &mut source_view).unwrap();
        for (i, source) in source.chunks(slots).enumerate() {
            let (row, kv_head) = (i / kv_heads, i % kv_heads);
            if lengths[row] < 2 {
                assert!(source.iter().all(|&column| column == -1));
                continue;
            }
            let head = &mut self.heads[(layer * self.shape.rows + rows[row]) * kv_heads + kv_head];
            let range = i * wide..(i + 1) * wide;
            let scores = [&mass[range.clone()], &peak[range.clone()], &distinct[range]];
            assert_eq!(source, head.chunk(&ranks[row * n..][..n], lengths[row], scores));
        }
    }

    /// A bad score must be refused, and nothing changed by it.
    fn spoil(&mut self, rows: &[usize], choices: &mut Choices<'_>) {
        let i = choices.below(self.mass.len());
        let bad = [f32::NAN, f32::INFINITY, -1.0][choices.below(3)];
        let (kept, before) = ((self.mass[i], self.distinct[i]), self.ledger.clone());
        (self.mass[i], self.distinct[i]) = (bad, f32::NAN);
        let positions = self.positions.clone();
        let distinct = self.distinct_of(rows);
        let Shape { layers, kv_heads, slots, .. } = self.shape;
        let distinct = View::new("distinct", &distinct, [layers, rows.len(), kv_heads, slots]).unwrap();
        let (ledger, tensors) = self.slots();
        match ledger.finish(&tensors, Some(distinct)) {
            // That the queues are as before, the next finish shows.
            Err(Error::Score(_)) => {
                assert_eq!(self.ledger.queue_lengths(), before.queue_lengths());
                assert_eq!(self.ledger.seen(), before.seen());
                assert_eq!(self.ledger.evictions(), before.evictions());
            }
            // Not read, as no victims were due or no token is there.
            Ok(_) => self.ledger = before,
            Err(error) => panic!("{error}"),
        }
        assert_eq!(positions, self.positions);
        (self.mass[i], self.distinct[i]) = kept;
    }

    fn grow(&mut self, lengths: &[Option<usize>]) {
        let old = self.shape.slots;
        let needed = lengths.iter().zip(self.ledger.seen()).map(|(n, seen)| n.unwrap_or(0) + seen).max().unwrap();
        if needed <= old {
            return;
        }
        let new = needed + 3;
        self.shape.slots = new;
        self.ledger.grow(self.shape).unwrap();
        let mut positions = vec![-1; self.heads.len() * new];
        for (to, from) in positions.chunks_mut(new).zip(self.positions.chunks(old)) {
            to[..old].copy_from_slice(from);
        }
        (self.mass, self.peak) = (vec![0.0; positions.len()], vec![0.0; positions.len()]);
        self.positions = positions;
        for head in &mut self.heads {
            head.grow(new);
        }
    }

    fn reorder(&mut self, choices: &mut Choices<'_>) {
        let rows: Vec<usize> = (0..self.shape.rows).map(|_| choices.below(self.shape.rows)).collect();
        self.ledger.reorder(&rows.iter().map(|&row| row as i64).collect::<Vec<_>>()).unwrap();
        let old = (self.positions.clone(), self.mass.clone(), self.peak.clone());
        self.take_rows(&rows);
        let Shape { slots, .. } = self.shape;
        for head in 0..self.heads.len() {
            let (to, from) = (head * slots..(head + 1) * slots, self.other(head, rows[self.row(head)]) * slots);
            let from = from..from + slots;
            self.positions[to.clone()].copy_from_slice(&old.0[from.clone()]);
            self.mass[to.clone()].copy_from_slice(&old.1[from.clone()]);
            self.peak[to].copy_from_slice(&old.2[from]);
        }
    }

    /// The head of another row that is otherwise where `head` is.
    fn other(&self, head: usize, row: usize) -> usize {
        let Shape { rows, kv_heads, .. } = self.shape;
        (head / kv_heads / rows * rows + row) * kv_heads + head % kv_heads
    }

    /// The naive heads of row `i` become those of row `rows[i]`.
    fn take_rows(&mut self, rows: &[usize]) {
        let old = self.heads.clone();
        for head in 0..old.len() {
            self.heads[head] = old[self.other(head, rows[self.row(head)])].clone();
        }
    }

    fn copy_row(&mut self, choices: &mut Choices<'_>) {
        let (source, target) = (choices.below(self.shape.rows), choices.below(self.shape.rows));
        let (ledger, mut tensors) = self.slots();
        ledger.copy_row(&mut tensors, source as i64, target as i64).unwrap();
        let rows: Vec<usize> = (0..self.shape.rows).map(|row| if row == target { source } else { row }).collect();
        self.take_rows(&rows);
        for head in (0..self.heads.len()).filter(|&head| self.spec.strategy().scored && self.row(head) == target) {
            let of = |head: usize| head * self.shape.slots..(head + 1) * self.shape.slots;
            let (to, from) = (of(head), of(self.other(head, source)));
            assert_eq!(self.mass[to.clone()], self.mass[from.clone()]);
            assert_eq!(self.peak[to], self.peak[from]);
        }
    }

    fn release(&mut self, choices: &mut Choices<'_>) {
        let row = choices.below(self.shape.rows);
        let (ledger, mut tensors) = self.slots();
        ledger.release(&mut tensors, row as i64).unwrap();
        for (head, fresh) in Self::fresh(&self.spec, self.shape).into_iter().enumerate() {
            if self.row(head) == row {
                self.heads[head] = fresh;
                let here = head * self.shape.slots..(head + 1) * self.shape.slots;
                let scored = self.spec.strategy().scored;
                assert!(!scored || self.mass[here.clone()].iter().chain(&self.peak[here]).all(|&score| score == 0.0));
            }
        }
    }

    fn queues(&self) -> Vec<i32> {
        let mut queues = vec![-7; self.positions.len()];
        self.ledger
            .peek(&vec![0; self.shape.rows], None, &mut ViewMut::new("out", &mut queues, self.shape.dims()).unwrap())
            .unwrap();
        queues
    }

    /// A ledger made from what was saved, row by row, goes on as if nothing had happened.
    fn restore(&mut self) {
        let (queues, Shape { layers, rows, kv_heads, slots }) = (self.queues(), self.shape);
        let mut fresh = Ledger::new(self.spec.clone(), self.shape, 1).unwrap();
        for row in (0..rows).rev() {
            let of_row = |(head, _): &(usize, &[i32])| head / kv_heads % rows == row;
            let queues: Vec<i32> =
                queues.chunks(slots).enumerate().filter(of_row).flat_map(|(_, queue)| queue.to_vec()).collect();
            let queues = View::new("queues", &queues, [layers, 1, kv_heads, slots]).unwrap();
            fresh.restore(&self.positions, queues, &[self.ledger.seen()[row] as i64], Some(&[row as i64])).unwrap();
        }
        self.ledger = fresh;
    }

    fn reset(&mut self) {
        let (ledger, mut tensors) = self.slots();
        ledger.reset(&mut tensors).unwrap();
        self.heads = Self::fresh(&self.spec, self.shape);
    }

    fn check(&self) {
        let queues = self.queues();
        let bounded = self.spec.strategy().bounded;
        for (number, head) in self.heads.iter().enumerate() {
            let here = number * self.shape.slots..(number + 1) * self.shape.slots;
            let positions = &self.positions[here.clone()];
            assert_eq!(positions, head.positions());
            let queue: Vec<usize> = queues[here].iter().filter(|&&s| s >= 0).map(|&s| s as usize).collect();
            assert_eq!(queue, head.queue());
            let seen = self.ledger.seen()[self.row(number)];
            assert_eq!(seen, head.seen());

            let mut stored: Vec<usize> = positions.iter().filter(|&&p| p >= 0).map(|&p| p as usize).collect();
            stored.sort_unstable();
            stored.dedup();
            assert_eq!(stored.len(), seen.min(self.shape.slots));
            if seen == 0 {
                continue;
            }
            let split = self.spec.split(self.shape.slots);
            let recent =
                if bounded { self.spec.split(self.shape.slots - 2 * self.spec.interval()).recent } else { seen };
            assert!((seen.saturating_sub(recent)..seen).all(|p| stored.contains(&p)));
            if !self.spec.adaptive() {
                assert!((0..split.sinks.min(seen)).all(|p| stored.contains(&p)));
            }
        }
    }
}

/// Run the calls that `bytes` describe.
pub(crate) fn run(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let mut machine = Machine::draw(&mut choices);
    let rows = machine.shape.rows;
    let mut steps = 0;
    while !choices.0.is_empty() && steps < 200 {
        steps += 1;
        match choices.below(16) {
            0 => machine.reset(),
            1 => machine.reorder(&mut choices),
            2 => machine.restore(),
            3 => machine.copy_row(&mut choices),
            4 => machine.release(&mut choices),
            kind => {
                let lengths: Vec<Option<usize>> = (0..rows)
                    .map(|_| {
                        let length = if kind < 8 { choices.below(50) } else { usize::from(choices.below(8) > 0) };
                        (choices.below(8) > 0).then_some(length)
                    })
                    .collect();
                machine.call(&lengths, &mut choices);
            }
        }
        machine.check();
    }
}
