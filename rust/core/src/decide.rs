//! One decision of one head: which of its candidates stay.

use std::ops::Range;

use crate::head::{BadScore, DISTINCT, FINITE, Head, MASS, PEAK, Place, Scores};
use crate::score::{Distinct, Peak, Score};
use crate::select::{ABSENT, Field, below, cut, ordinal};
use crate::simd::{self, Lanes, Work};
use crate::split::Split;

/// How many tokens of each kind stay, and what the last of the heavy hitters are chosen by.
pub(crate) struct Rule<'a> {
    pub(crate) split: Split,
    /// Whether sinks are chosen by worth, instead of being the first tokens.
    pub(crate) adaptive: bool,
    pub(crate) heavy: &'a dyn Score,
}

/// Candidates that are left after a contest, as [`Head`] has them.
#[derive(Debug, Default)]
pub(crate) struct Left {
    count: usize,
    index: Vec<i32>,
    positions: Vec<i32>,
    scores: [Vec<f32>; 3],
}

/// Reusable memory of one thread.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// 0, 1, 2, …
    numbers: Vec<i32>,
    positions: Vec<i32>,
    worth: Vec<f32>,
    ordinals: Vec<i32>,
    /// What the contests for sinks, distinctness, peak and mass leave, and where their searches ended last.
    contests: [(Left, i32); 4],
}

/// Grow a buffer, whose contents do not matter, to at least `n`.
fn at_least<T: Copy + Default>(buffer: &mut Vec<T>, n: usize) -> &mut [T] {
    if buffer.len() < n {
        buffer.resize(n, T::default());
    }
    &mut buffer[..n]
}

/// What a head brings to a decision.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shown<'a> {
    pub(crate) place: Place,
    /// One more than the newest position.
    pub(crate) seen: usize,
    /// Positions in its slots, -1 where there is none.
    pub(crate) stored: &'a [i32],
    /// Positions of a chunk's columns, -1 for padding.
    pub(crate) columns: &'a [i32],
    pub(crate) scores: Scores<'a>,
}

impl Scratch {
    /// The candidates that do not stay: which they are, ascending, and their positions. Slots that are `queued` are none of the candidates,
    /// of which there are more than the rule has room for; without one all stay, and only their scores are checked.
    pub(crate) fn decide<'a>(
        &'a mut self,
        shown: Shown<'a>,
        queued: impl Iterator<Item = i32>,
        rule: Option<&Rule<'_>>,
    ) -> Result<[&'a [i32]; 2], BadScore> {
        let Self { numbers, positions, worth, ordinals, contests } = self;
        let Shown { place, seen, stored, columns, scores } = shown;
        let n = stored.len() + columns.len();
        numbers.extend(numbers.len() as i32..n as i32);
        let positions = at_least(positions, n);
        let good = simd::dispatch(Show { shown, positions });
        queued.for_each(|slot| positions[slot as usize] = -1);
        let mut left = Head { place, seen, index: &numbers[..n], positions, scores };
        if !good {
            left.check()?;
        }
        let Some(&Rule { split: Split { sinks, recent, distinct, peak, mass }, adaptive, heavy }) = rule else {
            return Ok([&[]; 2]);
        };
        let (pinned, chosen) = if adaptive { (0, sinks) } else { (sinks, 0) };
        let (within, mut count) = simd::dispatch(Open { positions, seen, pinned, recent });
        // In this order: who is taken for one reason does not take a place for another. With each reason, what those after it need.
        let reasons: [(usize, &dyn Score, &[usize]); 4] = [
            (chosen, heavy, &[MASS, PEAK, DISTINCT]),
            (distinct, &Distinct, &[MASS, PEAK]),
            (peak, &Peak, &[MASS]),
            (mass, heavy, &[]),
        ];
        for ((k, score, needed), (into, near)) in reasons.into_iter().zip(contests) {
            // The last contest is held even for nothing: it drops those that take no part.
            if k == 0 && !needed.is_empty() {
                continue;
            }
            let n = left.positions.len();
            let search = (0 < k && k < count).then(|| score.worth(left, &within, at_least(worth, n)));
            let all = k > 0 && k >= count;
            let ordinals = at_least(ordinals, n);
            let (within, signed) = (&within, score.signed());
            count = simd::dispatch(Take { left, within, search, signed, all, ordinals, k, count, near, needed, into });
            left = into.head(left);
        }
        Ok([left.index, left.positions])
    }
}

impl Left {
    fn head<'a>(&'a self, Head { place, seen, .. }: Head<'_>) -> Head<'a> {
        let scores = self.scores.each_ref().map(|scores| scores.get(..self.count).unwrap_or_default());
        Head { place, seen, index: &self.index[..self.count], positions: &self.positions[..self.count], scores }
    }
}

/// Copy the positions, and tell whether all scores may be used, whoever they belong to. In one go, as a rule from afar.
struct Show<'a> {
    shown: Shown<'a>,
    positions: &'a mut [i32],
}

impl Work for Show<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) -> bool {
        let Self { shown: Shown { stored, columns, scores: [mass, peak, distinct], .. }, positions } = self;
        let mut worst = distinct.iter().fold(0, |worst, value| worst.max(value.abs().to_bits()));
        if mass.is_empty() {
            positions[..stored.len()].copy_from_slice(stored);
            positions[stored.len()..].copy_from_slice(columns);
            return worst <= FINITE;
        }
        let at = stored.len();
        let (to_stored, to_columns) = positions.split_at_mut(at);
        let parts = [(stored, to_stored, &mass[..at], &peak[..at]), (columns, to_columns, &mass[at..], &peak[at..])];
        for (from, to, mass, peak) in parts {
            for ((to, &from), (mass, peak)) in to.iter_mut().zip(from).zip(mass.iter().zip(peak)) {
                *to = from;
                worst = worst.max(mass.to_bits()).max(peak.to_bits());
            }
        }
        worst <= FINITE
    }
}

/// Find between which positions the contests are: behind the pinned sinks, before the recent window. Returns how many candidates are there,
/// too.
struct Open<'a> {
    positions: &'a [i32],
    seen: usize,
    pinned: usize,
    recent: usize,
}

impl Work for Open<'_> {
    type Output = (Range<i32>, usize);

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) -> Self::Output {
        let Self { positions, seen, pinned, recent } = self;
        let first = pinned as i32;
        let old = below(positions, first);
        // Where a pinned sink is missing, one more is recent.
        let window = (recent + pinned).saturating_sub(old - below(positions, 0));
        // As a rule every token of the recent window is there, and none has to be searched.
        let newest = (seen.saturating_sub(window) as i32).max(first);
        let older = below(positions, newest);
        if positions.len() - older == window {
            return (first..newest, older - old);
        }
        let mut others: Vec<i32> = positions.iter().copied().filter(|&p| p >= first).collect();
        let newest = match others.len().checked_sub(window) {
            Some(from) if from < others.len() => *others.select_nth_unstable(from).1,
            Some(_) => i32::MAX,
            None => first,
        };
        (first..newest, below(positions, newest) - old)
    }
}

/// Take the `k` of greatest worth among the candidates that are `within`, and drop those that are not. Returns how many are left.
struct Take<'a> {
    left: Head<'a>,
    within: &'a Range<i32>,
    /// What the candidates are worth, where that matters.
    search: Option<&'a [f32]>,
    /// Whether it may be negative; else its bits are its ordinal, but for the sign of zero.
    signed: bool,
    /// Whether all are taken.
    all: bool,
    ordinals: &'a mut [i32],
    k: usize,
    /// How many are within.
    count: usize,
    near: &'a mut i32,
    /// The scores that are needed again.
    needed: &'a [usize],
    into: &'a mut Left,
}

impl Work for Take<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> usize {
        let Self { left, within, search, signed, all, ordinals, k, count, near, needed, into } = self;
        let positions = left.positions;
        let inside = |position: i32| (position >= within.start) & (position < within.end);
        let mut bound = if all { ABSENT } else { i32::MAX };
        if let Some(worth) = search {
            let least = if signed { ABSENT + 1 } else { 0 };
            let rows = ordinals.iter_mut().zip(worth).zip(positions);
            let mut most = ABSENT;
            if signed {
                rows.for_each(|((to, &worth), &position)| {
                    *to = if inside(position) { ordinal(worth) } else { ABSENT };
                    most = most.max(*to);
                });
            } else {
                rows.for_each(|((to, &worth), &position)| {
                    *to = if inside(position) { worth.abs().to_bits() as i32 } else { ABSENT };
                    most = most.max(*to);
                });
            }
            let field = Field { count, least, most };
            bound = cut(ordinals, positions, k, field, near).settle(ordinals, positions);
        } else {
            for (to, &position) in ordinals.iter_mut().zip(positions) {
                *to = if inside(position) { 0 } else { ABSENT };
            }
        }
        let n = positions.len();
        let Left { index, positions: to, scores, .. } = into;
        let (index, to) = (at_least(index, n), at_least(to, n));
        let mut needed = needed.iter().filter(|&&which| !left.scores[which].is_empty());
        let from = |which: usize| bytemuck::cast_slice(left.scores[which]);
        into.count = if let Some(&first) = needed.next() {
            let score = bytemuck::cast_slice_mut(at_least(&mut scores[first], n));
            lanes.pack(ordinals, bound, [left.index, positions, from(first)], [index, to, score])
        } else {
            lanes.pack(ordinals, bound, [left.index, positions], [index, to])
        };
        for &which in needed {
            let score = bytemuck::cast_slice_mut(at_least(&mut scores[which], n));
            lanes.pack(ordinals, bound, [from(which)], [score]);
        }
        into.count
    }
}
