//! One decision of one head: which of its candidates stay.

use crate::head::{BadScore, Head};
use crate::score::{Distinct, Peak, Score};
use crate::select::{ABSENT, Field, cut, ordinal};
use crate::simd::{self, Work};
use crate::split::Split;

/// How many tokens of each kind stay, and what the last of the heavy hitters are chosen by.
pub(crate) struct Rule<'a> {
    pub(crate) split: Split,
    /// Whether sinks are chosen by worth, instead of being the first tokens.
    pub(crate) adaptive: bool,
    pub(crate) heavy: &'a dyn Score,
}

/// Reusable memory of one thread.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Of each candidate 1 while it may still be taken, else 0; when all is decided, 1 for those that do not stay.
    pub(crate) open: Vec<u8>,
    victims: Vec<i32>,
    worth: Vec<f32>,
    ordinals: Vec<i32>,
    /// Where the searches for sinks, distinctness, peak and mass ended last.
    near: [i32; 4],
}

impl Scratch {
    /// Decide about the candidates of `head`, more than the split has room for, and leave the outcome in `open`.
    pub(crate) fn decide(&mut self, head: &Head<'_>, rule: &Rule<'_>) -> Result<(), BadScore> {
        let Split { sinks, recent, distinct, peak, mass } = rule.split;
        let n = head.positions.len();
        let Self { open, worth, ordinals, near, .. } = self;
        open.resize(n, 0);
        let pinned = if rule.adaptive { 0 } else { sinks };
        let mut left = simd::dispatch(Contest { head, pinned, recent, open })?;
        // In this order: who is taken for one reason does not take a place for another.
        let chosen = if rule.adaptive { sinks } else { 0 };
        let contests: [(usize, &dyn Score); 4] =
            [(chosen, rule.heavy), (distinct, &Distinct), (peak, &Peak), (mass, rule.heavy)];
        for ((k, score), near) in contests.into_iter().zip(near) {
            if left <= k {
                open.fill(0);
                break;
            }
            if k > 0 {
                worth.resize(n, 0.0);
                ordinals.resize(n, 0);
                score.worth(head, open, worth);
                simd::dispatch(Take { positions: head.positions, worth, ordinals, k, left, near, open });
                left -= k;
            }
        }
        Ok(())
    }

    /// The candidates that do not stay, oldest first.
    pub(crate) fn dropped(&mut self, positions: &[i32]) -> &[i32] {
        let Self { open, victims, .. } = self;
        victims.clear();
        // Most stay: eight are passed at a time.
        for (word, eight) in open.chunks(8).enumerate() {
            if eight.iter().fold(0, |any, &open| any | open) > 0 {
                victims.extend((8 * word as i32..).zip(eight).filter(|&(_, &open)| open > 0).map(|(i, _)| i));
            }
        }
        victims.sort_unstable_by_key(|&i| positions[i as usize]);
        victims
    }
}

/// Check the scores, and open the contest to all that are neither pinned sinks nor recent; returns how many that are.
struct Contest<'a> {
    head: &'a Head<'a>,
    pinned: usize,
    recent: usize,
    open: &'a mut [u8],
}

impl Work for Contest<'_> {
    type Output = Result<usize, BadScore>;

    #[inline(always)]
    fn run<S: pulp::Simd>(self, _: S) -> Self::Output {
        let Self { head: Head { positions, seen, .. }, pinned, recent, open } = self;
        self.head.check()?;
        let within =
            |from: i32, to: i32| positions.iter().map(|&p| u32::from((p >= from) & (p < to))).sum::<u32>() as usize;
        let first = pinned as i32;
        // Where a pinned sink is missing, one more is recent.
        let window = recent + pinned - within(0, first);
        // As a rule every token of the recent window is there, and none has to be searched.
        let mut newest = (seen.saturating_sub(window) as i32).max(first);
        if within(newest, i32::MAX) != window {
            let mut others: Vec<i32> = positions.iter().copied().filter(|&p| p >= first).collect();
            newest = match others.len().checked_sub(window) {
                Some(from) if from < others.len() => *others.select_nth_unstable(from).1,
                Some(_) => i32::MAX,
                None => first,
            };
        }
        for (open, &p) in open.iter_mut().zip(*positions) {
            *open = u8::from((p >= first) & (p < newest));
        }
        Ok(within(first, newest))
    }
}

/// Take the `k` of greatest worth among those that are open, which are more.
struct Take<'a> {
    positions: &'a [i32],
    worth: &'a [f32],
    ordinals: &'a mut [i32],
    k: usize,
    left: usize,
    near: &'a mut i32,
    open: &'a mut [u8],
}

impl Work for Take<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: pulp::Simd>(self, _: S) {
        let Self { positions, worth, ordinals, k, left, near, open } = self;
        let (mut least, mut most) = (i32::MAX, ABSENT);
        for ((to, &worth), &open) in ordinals.iter_mut().zip(worth).zip(&*open) {
            let own = ordinal(worth);
            *to = if open > 0 { own } else { ABSENT };
            most = most.max(*to);
            least = least.min(if open > 0 { own } else { i32::MAX });
        }
        let cut = cut(ordinals, positions, k, Field { count: left, least, most }, near);
        for ((open, &ordinal), &position) in open.iter_mut().zip(&*ordinals).zip(positions) {
            *open &= u8::from(!cut.takes(ordinal, position));
        }
    }
}
