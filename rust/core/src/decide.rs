//! One decision of one head: which of its candidates stay.

use std::ops::Range;

use crate::head::{BadScore, DISTINCT, FINITE, Head, MASS, PEAK, Place, SIGN, Scores};
use crate::score::{Distinct, Peak, Score};
use crate::select::{Field, OUTSIDE, below, cut, ordinal};
use crate::simd::{pack, vectorised};
use crate::split::Split;

/// How many tokens of each kind stay, and what the last of the heavy hitters are chosen by.
pub(crate) struct Rule<'a> {
    pub(crate) split: Split,
    /// Whether sinks are chosen by worth, instead of being the first tokens.
    pub(crate) adaptive: bool,
    pub(crate) heavy: &'a dyn Score,
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

/// What was decided.
pub(crate) struct Decided<'a> {
    /// Which candidates do not stay, ascending: slots, and columns counted on from the last slot.
    pub(crate) dropped: &'a mut [i32],
    /// Positions of all, stored ones first; -1 for empty and queued slots and for padding.
    pub(crate) positions: &'a mut [i32],
    /// As long, to be used for anything.
    pub(crate) room: &'a mut [i32],
}

/// Reusable memory of one thread.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    positions: Vec<i32>,
    worth: Vec<f32>,
    ordinals: Vec<i32>,
    /// What the contests for sinks, distinctness, peak and mass leave, and where their searches ended last.
    contests: [(Left, i32); 4],
}

/// Candidates that are left after a contest.
#[derive(Debug, Default)]
struct Left {
    index: Vec<i32>,
    positions: Vec<i32>,
    scores: [Vec<f32>; 3],
}

/// Grow a buffer, whose contents do not matter, to at least `n`.
fn at_least<T: Copy + Default>(buffer: &mut Vec<T>, n: usize) -> &mut [T] {
    if buffer.len() < n {
        buffer.resize(n, T::default());
    }
    &mut buffer[..n]
}

impl Scratch {
    /// Find out who does not stay. Slots that are `queued` are none of the candidates, of which there are more than the rule has room for;
    /// without one all stay, and only their scores are checked.
    pub(crate) fn decide(
        &mut self,
        shown: Shown<'_>,
        queued: [&[i32]; 2],
        rule: Option<&Rule<'_>>,
    ) -> Result<Decided<'_>, BadScore> {
        let Self { positions, worth, ordinals, contests } = self;
        let Shown { place, seen, stored, columns, scores } = shown;
        let n = stored.len() + columns.len();
        let positions = at_least(positions, n);
        let split = rule.map_or(Split::default(), |rule| rule.split);
        let (pinned, chosen) = if rule.is_some_and(|rule| rule.adaptive) { (0, split.sinks) } else { (split.sinks, 0) };
        // As a rule all sinks and the whole recent window are there. Where a pinned sink is yet to come, one more is recent.
        let window = split.recent + pinned.saturating_sub(seen);
        let within = pinned as i32..seen.saturating_sub(window).max(pinned) as i32;
        let bounds = [0, within.start, within.end];
        let (worst, mut below) = look(shown, bounds, positions);
        for &slot in queued.into_iter().flatten() {
            let position = std::mem::replace(&mut positions[slot as usize], -1);
            for (below, bound) in below.iter_mut().zip(bounds) {
                *below += u32::from(position >= bound);
            }
        }
        let mut left = Head { place, seen, positions, scores };
        if worst > FINITE {
            left.check()?;
        }
        let Some(rule) = rule else { return Ok(Decided { dropped: &mut [], positions, room: at_least(ordinals, n) }) };
        let [absent, old, older] = below.map(|below| below as usize);
        let (within, mut count) = if old - absent == pinned.min(seen) && n - older == window {
            (within, older - old)
        } else {
            look_closely(positions, pinned, split.recent)
        };
        // In this order: who is taken for one reason does not take a place for another. With each reason, what those after it need.
        let reasons: [(usize, &dyn Score, &[usize]); 4] = [
            (chosen, rule.heavy, &[MASS, PEAK, DISTINCT]),
            (split.distinct, &Distinct, &[MASS, PEAK]),
            (split.peak, &Peak, &[MASS]),
            (split.mass, rule.heavy, &[]),
        ];
        let mut index: &[i32] = &[];
        for ((k, score, needed), (into, near)) in reasons.into_iter().zip(&mut *contests) {
            // The last contest is held even for nothing: it drops those that take no part.
            if k == 0 && !needed.is_empty() {
                continue;
            }
            if 0 < k && count <= k {
                count = 0;
                break;
            }
            let n = left.positions.len();
            let (worth, ordinals) = (at_least(worth, n), at_least(ordinals, n));
            let worth = if k > 0 {
                score.worth(left, &within, worth)
            } else {
                worth.fill(0.0);
                worth
            };
            let bound = contest(left.positions, &within, worth, k, count, near, ordinals);
            count = into.fill(left, index, ordinals, bound, needed);
            index = &into.index[..count];
            left = into.head(left, count);
        }
        Ok(Decided { dropped: &mut contests[3].0.index[..count], positions, room: at_least(ordinals, n) })
    }
}

impl Left {
    /// Take over those `from` which an ordinal is below `bound`: numbers, and if scores are `needed`, positions and these. `index` says
    /// which candidates they are, if they are not all. Returns how many they are.
    fn fill(&mut self, from: Head<'_>, index: &[i32], ordinals: &[i32], bound: i32, needed: &[usize]) -> usize {
        let n = ordinals.len();
        let Self { index: own, positions, scores } = self;
        let (own, positions) = (at_least(own, n), at_least(positions, n));
        if needed.is_empty() && !index.is_empty() {
            // Nobody asks for the numbers among those that were left.
            return pack(ordinals, bound, positions, [index], [own]);
        }
        let mut needed = needed.iter().filter(|&&which| !from.scores[which].is_empty());
        let count = if let Some(&first) = needed.next() {
            let to = bytemuck::cast_slice_mut(at_least(&mut scores[first], n));
            let lists = [from.positions, bytemuck::cast_slice(from.scores[first])];
            pack(ordinals, bound, own, lists, [positions, to])
        } else {
            pack(ordinals, bound, own, [from.positions], [positions])
        };
        for &which in needed {
            let to = bytemuck::cast_slice_mut(at_least(&mut scores[which], n));
            pack(ordinals, bound, own, [bytemuck::cast_slice(from.scores[which])], [to]);
        }
        if !index.is_empty() {
            for i in &mut own[..count] {
                *i = index[*i as usize];
            }
        }
        count
    }

    fn head<'a>(&'a self, Head { place, seen, .. }: Head<'_>, count: usize) -> Head<'a> {
        let scores = self.scores.each_ref().map(|scores| scores.get(..count).unwrap_or_default());
        Head { place, seen, positions: self.positions.get(..count).unwrap_or_default(), scores }
    }
}

vectorised! {
    /// Copy the positions, and count those below each of the `bounds`. Returns the largest bits of a score, too, but for the sign of
    /// distinctness: they tell whether all may be used, whoever they belong to.
    fn look<'a>(shown: Shown<'a>, bounds: [i32; 3], positions: &'a mut [i32]) -> (u32, [u32; 3]) {
        let [mass, peak, distinct] = shown.scores;
        let worst = worst(mass, u32::MAX).max(worst(peak, u32::MAX)).max(worst(distinct, !SIGN));
        let (stored, columns) = positions.split_at_mut(shown.stored.len());
        let (mut absent, mut old, mut older) = (0, 0, 0);
        for (from, to) in [(shown.stored, stored), (shown.columns, columns)] {
            for (to, &position) in to.iter_mut().zip(from) {
                *to = position;
                absent += u32::from(position < bounds[0]);
                old += u32::from(position < bounds[1]);
                older += u32::from(position < bounds[2]);
            }
        }
        (worst, [absent, old, older])
    }
}

#[inline(always)]
fn worst(scores: &[f32], mask: u32) -> u32 {
    scores.iter().fold(0, |worst, score| worst.max(score.to_bits() & mask))
}

/// Find where the recent window begins, as `look` cannot see: between which positions the contests are, and how many candidates are there.
fn look_closely(positions: &[i32], pinned: usize, recent: usize) -> (Range<i32>, usize) {
    let first = pinned as i32;
    let old = below(positions, first);
    let window = (recent + pinned).saturating_sub(old - below(positions, 0));
    let mut others: Vec<i32> = positions.iter().copied().filter(|&p| p >= first).collect();
    let newest = match others.len().checked_sub(window) {
        Some(from) if from < others.len() => *others.select_nth_unstable(from).1,
        Some(_) => i32::MAX,
        None => first,
    };
    (first..newest, below(positions, newest) - old)
}

vectorised! {
    /// Hold a contest for `k` places among the `count` candidates `within`. Returns the bound below which the `ordinals` are of those that
    /// were not taken.
    fn contest<'a>(
        positions: &'a [i32],
        within: &'a Range<i32>,
        worth: &'a [f32],
        k: usize,
        count: usize,
        near: &'a mut i32,
        ordinals: &'a mut [i32],
    ) -> i32 {
        let (mut least, mut most, mut counted, first) = (OUTSIDE, i32::MIN, 0, *near);
        for ((to, &worth), &position) in ordinals.iter_mut().zip(worth).zip(positions) {
            let inside = (position >= within.start) & (position < within.end);
            let own = ordinal(worth);
            *to = if inside { own } else { OUTSIDE };
            counted += u32::from(*to < first);
            least = least.min(*to);
            most = most.max(if inside { own } else { i32::MIN });
        }
        if k == 0 {
            return OUTSIDE;
        }
        cut(ordinals, positions, k, Field { count, least, most }, near, counted as usize).settle(ordinals, positions)
    }
}
