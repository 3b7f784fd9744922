//! One (layer, row, head) by the rules of the design, with lists and sorting; shares nothing with the crate but the parameters.

use liquidfusion_core::params::Name;
use liquidfusion_core::spec::Spec;
use liquidfusion_core::strategy::Heavy;

#[derive(Debug, Clone, Copy, PartialEq)]
struct Token {
    position: usize,
    mass: f32,
    peak: f32,
    distinct: f32,
}

/// Slots, queue and counter of one head.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    spec: Spec,
    /// Layer and kv head.
    place: (usize, usize),
    seen: usize,
    slots: Vec<Option<Token>>,
    queue: Vec<usize>,
}

/// Move the `count` tokens of largest score from `left` to `kept`; of equal ones the newer.
fn take(left: &mut Vec<Token>, kept: &mut Vec<Token>, count: usize, score: impl Fn(&Token) -> f32) {
    left.sort_by(|a, b| score(b).partial_cmp(&score(a)).unwrap().then(b.position.cmp(&a.position)));
    kept.extend(left.drain(..count.min(left.len())));
}

fn round_half_up(x: f64) -> usize {
    (x + 0.5).floor() as usize
}

impl Head {
    pub(crate) fn new(spec: &Spec, slots: usize, place: (usize, usize)) -> Self {
        Self { spec: spec.clone(), place, seen: 0, slots: vec![None; slots], queue: (0..slots).collect() }
    }

    pub(crate) fn seen(&self) -> usize {
        self.seen
    }

    pub(crate) fn queue(&self) -> &[usize] {
        &self.queue
    }

    pub(crate) fn positions(&self) -> Vec<i32> {
        self.slots.iter().map(|slot| slot.map_or(-1, |token| token.position as i32)).collect()
    }

    pub(crate) fn grow(&mut self, slots: usize) {
        self.queue.extend(self.slots.len()..slots);
        self.slots.resize(slots, None);
    }

    /// One new token; returns its slot.
    pub(crate) fn decode(&mut self) -> usize {
        let slot = self.queue.remove(0);
        self.slots[slot] = Some(Token { position: self.seen, mass: 0.0, peak: 0.0, distinct: 0.0 });
        self.seen += 1;
        slot
    }

    pub(crate) fn look(&mut self, slot: usize, mass: f32, peak: f32) {
        let token = self.slots[slot].as_mut().unwrap();
        (token.mass, token.peak) = (mass, peak);
    }

    /// Several new tokens; returns the column that goes into each slot, or -1.
    pub(crate) fn chunk(&mut self, ranks: &[i32], new: usize, [mass, peak, distinct]: [&[f32]; 3]) -> Vec<i32> {
        let slots = self.slots.len();
        for (slot, token) in self.slots.iter_mut().enumerate() {
            if let Some(token) = token {
                (token.mass, token.peak, token.distinct) = (mass[slot], peak[slot], distinct[slot]);
            }
        }
        let fresh: Vec<(i32, Token)> = (ranks.iter().enumerate())
            .filter(|(_, rank)| **rank >= 0)
            .map(|(column, &rank)| {
                let (position, i) = (self.seen + rank as usize, slots + column);
                (column as i32, Token { position, mass: mass[i], peak: peak[i], distinct: distinct[i] })
            })
            .collect();
        self.seen += new;
        let mut all: Vec<Token> = self.slots.iter().flatten().copied().chain(fresh.iter().map(|f| f.1)).collect();
        if all.len() > slots {
            all = self.keep(&all, slots);
        }
        for slot in &mut self.slots {
            if slot.is_some_and(|token| !all.contains(&token)) {
                *slot = None;
            }
        }
        let mut source = vec![-1; slots];
        let mut empty: Vec<usize> = (0..slots).filter(|&slot| self.slots[slot].is_none()).collect();
        for (column, token) in fresh {
            if all.contains(&token) {
                let slot = empty.remove(0);
                self.slots[slot] = Some(token);
                source[slot] = column;
            }
        }
        self.queue = empty;
        source
    }

    /// Choose the next victims if few slots are queued; returns how many.
    pub(crate) fn watermark(&mut self, distinct: &[f32]) -> usize {
        for (token, &distinct) in self.slots.iter_mut().zip(distinct) {
            if let Some(token) = token {
                token.distinct = distinct;
            }
        }
        let interval = self.spec.interval();
        if !self.spec.strategy().bounded || self.queue.len() > interval {
            return 0;
        }
        let due = 2 * interval - self.queue.len();
        let candidates: Vec<(usize, Token)> = (self.slots.iter().enumerate())
            .filter(|(slot, _)| !self.queue.contains(slot))
            .filter_map(|(slot, token)| token.map(|token| (slot, token)))
            .collect();
        let tokens: Vec<Token> = candidates.iter().map(|c| c.1).collect();
        let stay = self.keep(&tokens, tokens.len() - due);
        let mut victims: Vec<_> = candidates.into_iter().filter(|(_, token)| !stay.contains(token)).collect();
        victims.sort_by_key(|(_, token)| token.position);
        assert_eq!(victims.len(), due);
        self.queue.extend(victims.iter().map(|v| v.0));
        due
    }

    /// The `count` tokens that stay.
    fn keep(&self, candidates: &[Token], count: usize) -> Vec<Token> {
        let p = self.spec.values();
        let sinks = p.int(Name::SinkSize).unwrap_or(0).min(count - 1);
        let rest = count - sinks;
        let (recent, distincts, peaks, masses) =
            if let (Some(heavy), Some(recent)) = (p.ratio(Name::HeavyRatio), p.ratio(Name::RecentRatio)) {
                let recent = round_half_up(rest as f64 * recent / (heavy + recent)).max(1);
                let distincts = round_half_up((rest - recent) as f64 * p.ratio(Name::DistinctRatio).unwrap_or(0.0));
                let peaks = round_half_up((rest - recent) as f64 * p.ratio(Name::PeakRatio).unwrap_or(0.0));
                let peaks = peaks.min(rest - recent - distincts);
                (recent, distincts, peaks, rest - recent - distincts - peaks)
            } else {
                // Nothing to set: the strategy's own numbers, which tests of theirs check.
                let split = self.spec.split(count);
                (split.recent, split.distinct, split.peak, split.mass)
            };
        let mut left = candidates.to_vec();
        left.sort_by_key(|token| token.position);
        let mut kept = Vec::new();
        if self.spec.adaptive() {
            kept.extend(left.drain(left.len() - recent..));
            take(&mut left, &mut kept, sinks, |token| self.judged(token));
        } else {
            let first = left.iter().take_while(|token| token.position < sinks).count();
            kept.extend(left.drain(..first));
            let newest = count - kept.len() - distincts - peaks - masses;
            kept.extend(left.drain(left.len() - newest..));
        }
        take(&mut left, &mut kept, distincts, |token| token.distinct);
        take(&mut left, &mut kept, peaks, |token| token.peak);
        let contenders = left.clone();
        take(&mut left, &mut kept, masses, |token| self.worth(token, &contenders));
        kept
    }

    /// What the token is worth among those that contend with it.
    fn worth(&self, token: &Token, contenders: &[Token]) -> f32 {
        match self.spec.strategy().heavy {
            Heavy::Mass => self.judged(token),
            Heavy::Pooled(reach) => (contenders.iter())
                .filter(|other| token.position.abs_diff(other.position) <= reach)
                .map(|other| other.mass)
                .fold(0.0, f32::max),
            Heavy::Drawn => {
                // splitmix64, stepped to where the token's number is: one step for each number before it, all at once.
                let steps = ((self.place.0 as u64) << 48) + ((self.place.1 as u64) << 32) + token.position as u64 + 1;
                let state = steps.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                ((mixed ^ (mixed >> 31)) >> 40) as f32
            }
        }
    }

    /// The mass, or per query that could look where the strategy wants it.
    fn judged(&self, token: &Token) -> f32 {
        if !self.spec.averaged() {
            return token.mass;
        }
        let queries = self.seen.saturating_sub(token.position + self.spec.look_gap()).max(1);
        // What each of the queries that could look weighs, one by one, the oldest the least.
        let decay = self.spec.mass_decay();
        let weights: f64 = (0..queries).rev().map(|age| decay.powi(age as i32)).sum();
        let halvings = self.spec.age_half_life().map_or(0.0, |tokens| queries as f64 / tokens as f64);
        let aged = 0.5f64.powf(halvings.min(24.0));
        token.mass * if decay < 1.0 { (aged / weights) as f32 } else { aged as f32 / weights as f32 }
    }
}
