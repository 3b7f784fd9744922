//! The ledger and a naive core, fed the same random calls. Shared by the property tests and the fuzz target.
//!
//! Invariants, checked after every step: the same positions in the same slots, the same queues and counters as the naive core;
//! a row stores `min(seen, budget)` tokens, each once, the newest among them; pinned sinks and all of the recent window are stored;
//! a call that fails leaves everything as it was.

pub(crate) mod naive;

use liquidfusion_core::Error;
use liquidfusion_core::ledger::{ChunkScores, Ledger, Shape, Slots};
use liquidfusion_core::policy::REGISTRY;
use liquidfusion_core::sinks::Sinks;
use liquidfusion_core::spec::{Request, Spec};
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
    heads: Vec<Head>,
}

impl Machine {
    fn draw(choices: &mut Choices<'_>) -> Self {
        let strategy = REGISTRY[choices.below(REGISTRY.len())];
        let budget = 12 + choices.below(24);
        let sink_size = choices.below(5);
        let most = ((budget - sink_size) / 8).max(1);
        let request = Request {
            budget: Some(budget as i64),
            sink_size: Some(sink_size as i64),
            sink_update_rate: Some([0.0, 0.1, 0.5, 1.0][choices.below(4)]),
            heavy_ratio: Some([0.2, 0.5, 1.0, 0.0][choices.below(4)]),
            recent_ratio: Some([0.3, 0.5, 1.0][choices.below(3)]),
            peak_ratio: Some([0.0, 0.5, 1.0][choices.below(3)]),
            eviction_interval: Some(1 + choices.below(most) as i64),
            sinks: Some([Sinks::Pinned, Sinks::Adaptive][choices.below(2)]),
            age_half_life: Some([0, 5, 40, 300][choices.below(4)]),
            ..Request::default()
        };
        let spec = Spec::new(strategy.name(), &request).unwrap();
        let slots = spec.budget().unwrap_or(budget);
        let shape =
            Shape { layers: 1 + choices.below(2), batch: 1 + choices.below(3), heads: 1 + choices.below(2), slots };
        let lanes = shape.layers * shape.batch * shape.heads;
        let n = lanes * slots;
        Self {
            ledger: Ledger::new(spec.clone(), shape, 1 + choices.below(3)).unwrap(),
            positions: vec![-1; n],
            mass: vec![0.0; n],
            peak: vec![0.0; n],
            heads: Self::fresh(&spec, shape),
            spec,
            shape,
        }
    }

    fn fresh(spec: &Spec, shape: Shape) -> Vec<Head> {
        let Shape { layers, batch, heads, slots } = shape;
        (0..layers * batch * heads).map(|lane| Head::new(spec, slots, (lane / heads / batch, lane % heads))).collect()
    }

    fn slots(&mut self) -> (&mut Ledger, Slots<'_>) {
        let scores = self.spec.strategy().scored().then_some((&mut self.mass[..], &mut self.peak[..]));
        (&mut self.ledger, Slots { positions: &mut self.positions, scores })
    }

    fn row(&self, lane: usize) -> usize {
        lane / self.shape.heads % self.shape.batch
    }

    fn call(&mut self, lengths: &[usize], choices: &mut Choices<'_>) {
        let Shape { layers, batch, heads, slots } = self.shape;
        if !self.spec.strategy().bounded() {
            self.grow(lengths);
        }
        let slots = self.shape.slots.max(slots);
        let signed: Vec<i64> = lengths.iter().map(|&n| n as i64).collect();
        let mut chosen = vec![-7; layers * batch * heads];
        let (ledger, mut tensors) = self.slots();
        ledger
            .begin(&mut tensors, &signed, &mut ViewMut::new("slots", &mut chosen, [layers, batch, heads]).unwrap())
            .unwrap();
        for (lane, &slot) in chosen.iter().enumerate() {
            if lengths[self.row(lane)] == 1 {
                assert_eq!(slot, self.heads[lane].decode() as i64);
            } else {
                assert_eq!(slot, -1);
            }
        }
        // Every stored token is looked at anew.
        for (lane, slot) in (0..self.heads.len()).flat_map(|lane| (0..slots).map(move |slot| (lane, slot))) {
            let i = lane * slots + slot;
            if self.positions[i] >= 0 && lengths[self.row(lane)] == 1 {
                (self.mass[i], self.peak[i]) = (choices.score(), choices.score());
                self.heads[lane].look(slot, self.mass[i], self.peak[i]);
            }
        }
        if lengths.iter().any(|&n| n > 1) {
            for layer in 0..layers {
                self.chunk(layer, lengths, choices);
            }
        }
        if choices.below(4) == 0 {
            self.spoil(choices);
        }
        let (ledger, tensors) = self.slots();
        let victims = ledger.finish(&tensors).unwrap();
        let mut expected = 0;
        for lane in 0..self.heads.len() {
            if lengths[self.row(lane)] > 0 {
                expected += self.heads[lane].watermark() as u64;
            }
        }
        assert_eq!(victims, expected);
    }

    fn chunk(&mut self, layer: usize, lengths: &[usize], choices: &mut Choices<'_>) {
        let Shape { batch, heads, slots, .. } = self.shape;
        let n = lengths.iter().max().unwrap() + choices.below(3);
        let mut columns = vec![-1; batch * n];
        for (b, &length) in lengths.iter().enumerate() {
            let padding = choices.below(n - length + 1);
            for rank in 0..length {
                columns[b * n + padding + rank] = rank as i32;
            }
        }
        let wide = slots + n;
        let mut draw = || (0..batch * heads * wide).map(|_| choices.score()).collect::<Vec<_>>();
        let (mass, peak) = (draw(), draw());
        let mut source = vec![-7; batch * heads * slots];
        let wanted = self.spec.strategy().scored();
        let (ledger, mut tensors) = self.slots();
        let view = |data| View::new("scores", data, [batch, heads, wide]).unwrap();
        let scores = wanted.then(|| ChunkScores { mass: view(&mass), peak: view(&peak) });
        let columns_view = View::new("columns", &columns, [batch, n]).unwrap();
        let mut source_view = ViewMut::new("source", &mut source, [batch, heads, slots]).unwrap();
        ledger.chunk(&mut tensors, layer, columns_view, scores, &mut source_view).unwrap();
        for b in 0..batch {
            for h in 0..heads {
                let (lane, i) = ((layer * batch + b) * heads + h, b * heads + h);
                let source = &source[i * slots..][..slots];
                if lengths[b] < 2 {
                    assert!(source.iter().all(|&c| c == -1));
                    continue;
                }
                let range = i * wide..(i + 1) * wide;
                let columns = &columns[b * n..][..n];
                let expected = self.heads[lane].chunk(columns, lengths[b], &mass[range.clone()], &peak[range]);
                assert_eq!(source, expected);
            }
        }
    }

    /// A bad score must be refused, and nothing changed by it.
    fn spoil(&mut self, choices: &mut Choices<'_>) {
        let i = choices.below(self.mass.len());
        let bad = [f32::NAN, f32::INFINITY, -1.0][choices.below(3)];
        let (kept, before) = (self.mass[i], self.ledger.clone());
        self.mass[i] = bad;
        let positions = self.positions.clone();
        let (ledger, tensors) = self.slots();
        match ledger.finish(&tensors) {
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
        self.mass[i] = kept;
    }

    fn grow(&mut self, lengths: &[usize]) {
        let old = self.shape.slots;
        let needed = lengths.iter().zip(self.ledger.seen()).map(|(n, seen)| n + seen).max().unwrap();
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
        let Shape { layers, batch, heads, slots } = self.shape;
        let rows: Vec<usize> = (0..batch).map(|_| choices.below(batch)).collect();
        self.ledger.reorder(&rows.iter().map(|&r| r as i64).collect::<Vec<_>>()).unwrap();
        let old = (self.heads.clone(), self.positions.clone(), self.mass.clone(), self.peak.clone());
        for lane in 0..layers * batch * heads {
            let (layer, b, h) = (lane / heads / batch, self.row(lane), lane % heads);
            let from = (layer * batch + rows[b]) * heads + h;
            self.heads[lane] = old.0[from].clone();
            let (to, from) = (lane * slots..(lane + 1) * slots, from * slots..(from + 1) * slots);
            self.positions[to.clone()].copy_from_slice(&old.1[from.clone()]);
            self.mass[to.clone()].copy_from_slice(&old.2[from.clone()]);
            self.peak[to].copy_from_slice(&old.3[from]);
        }
    }

    fn queues(&self) -> Vec<i32> {
        let mut queues = vec![-7; self.positions.len()];
        self.ledger.queues(&mut ViewMut::new("out", &mut queues, self.shape.dims()).unwrap()).unwrap();
        queues
    }

    /// A ledger made from what was saved goes on as if nothing had happened.
    fn restore(&mut self) {
        let queues = self.queues();
        let seen: Vec<i64> = self.ledger.seen().iter().map(|&n| n as i64).collect();
        let mut fresh = Ledger::new(self.spec.clone(), self.shape, 1).unwrap();
        fresh.restore(&self.positions, View::new("queues", &queues, self.shape.dims()).unwrap(), &seen).unwrap();
        self.ledger = fresh;
    }

    fn reset(&mut self) {
        let (ledger, mut tensors) = self.slots();
        ledger.reset(&mut tensors).unwrap();
        self.heads = Self::fresh(&self.spec, self.shape);
    }

    fn check(&self) {
        let queues = self.queues();
        let bounded = self.spec.strategy().bounded();
        for (lane, head) in self.heads.iter().enumerate() {
            let here = lane * self.shape.slots..(lane + 1) * self.shape.slots;
            let positions = &self.positions[here.clone()];
            assert_eq!(positions, head.positions());
            let queue: Vec<usize> = queues[here].iter().filter(|&&s| s >= 0).map(|&s| s as usize).collect();
            assert_eq!(queue, head.queue());
            let seen = self.ledger.seen()[self.row(lane)];
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
            if self.spec.sinks() == Sinks::Pinned {
                assert!((0..split.sinks.min(seen)).all(|p| stored.contains(&p)));
            }
        }
    }
}

/// Run the calls that `bytes` describe.
pub(crate) fn run(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let mut machine = Machine::draw(&mut choices);
    let batch = machine.shape.batch;
    let mut steps = 0;
    while !choices.0.is_empty() && steps < 200 {
        steps += 1;
        match choices.below(16) {
            0 => machine.reset(),
            1 => machine.reorder(&mut choices),
            2 => machine.restore(),
            3..=5 => {
                let lengths: Vec<usize> = (0..batch).map(|_| choices.below(50)).collect();
                machine.call(&lengths, &mut choices);
            }
            _ => {
                let lengths: Vec<usize> = (0..batch).map(|_| usize::from(choices.below(8) > 0)).collect();
                machine.call(&lengths, &mut choices);
            }
        }
        machine.check();
    }
}
