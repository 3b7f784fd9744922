//! One decision of one head: which of its candidates stay.

use crate::head::Head;
use crate::score::{Distinct, Open, Peak, Score};
use crate::select::{Field, OUTSIDE, cut, ordinal};
use crate::simd::vectorised;
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
    worth: Vec<f32>,
    ordinals: Vec<i32>,
    /// Where the searches for sinks, distinctness, peak and mass ended last.
    nears: [i32; 4],
}

/// The first `n` of a buffer whose contents do not matter.
fn at_least<T: Copy + Default>(buffer: &mut Vec<T>, n: usize) -> &mut [T] {
    if buffer.len() < n {
        buffer.resize(n, T::default());
    }
    &mut buffer[..n]
}

impl Scratch {
    /// Find out who does not stay: those candidates of a head that are still open when all places are taken.
    ///
    /// One contest after another, and who is taken for one reason takes no place for another. As the first, the newest stay; where a
    /// pinned sink is yet to come, one more of them.
    pub(crate) fn decide(&mut self, head: Head<'_>, rule: &Rule<'_>) -> Open<'_> {
        let Self { worth, ordinals, nears } = self;
        let Head { seen, positions, .. } = head;
        let (worth, ordinals) = (at_least(worth, positions.len()), at_least(ordinals, positions.len()));
        let Rule { split, adaptive, heavy } = *rule;
        let (pinned, chosen) = if adaptive { (0, split.sinks) } else { (split.sinks, 0) };
        let (sinks, newest) = enter(positions, pinned as i32, (seen - split.recent.min(seen)) as i32, ordinals);
        let window = (split.recent + pinned).saturating_sub(sinks);
        let (mut left, mut bound) = (newest.count, settle(ordinals, positions, window, newest).0);
        left = left.saturating_sub(window);
        let reasons: [(usize, &dyn Score); 4] =
            [(chosen, heavy), (split.distinct, &Distinct), (split.peak, &Peak), (split.mass, heavy)];
        for ((k, score), near) in reasons.into_iter().zip(nears).filter(|((k, _), _)| *k > 0) {
            let worth = score.worth(head, Open { ordinals, bound }, worth);
            let field = go_on(ordinals, bound, worth, left, *near);
            (bound, *near) = settle(ordinals, positions, k, field);
            left = left.saturating_sub(k);
        }
        Open { ordinals, bound }
    }
}

vectorised! {
    /// Fill `ordinals` for the first contest, which is about positions from `first` on. Returns how many sinks come before, and the field.
    fn enter<'a>(positions: &'a [i32], first: i32, near: i32, ordinals: &'a mut [i32]) -> (usize, Field) {
        let (mut inside, mut there, mut below) = (0u32, 0u32, 0u32);
        for (to, &position) in ordinals.iter_mut().zip(positions) {
            *to = if position < first { OUTSIDE } else { position };
            inside += u32::from(position >= first);
            there += u32::from(position >= 0);
            below += u32::from(*to < near);
        }
        let (count, below_near) = (inside as usize, below as usize);
        ((there - inside) as usize, Field { count, least: first, most: OUTSIDE - 1, near, below_near })
    }
}

vectorised! {
    /// Turn the `ordinals` of the last contest into those of the next, which is about the `count` that are still open.
    fn go_on<'a>(ordinals: &'a mut [i32], bound: i32, worth: &'a [f32], count: usize, near: i32) -> Field {
        let (mut least, mut most, mut below) = (OUTSIDE, i32::MIN, 0u32);
        for (to, &worth) in ordinals.iter_mut().zip(worth) {
            let (own, open) = (ordinal(worth), *to < bound);
            *to = if open { own } else { OUTSIDE };
            least = least.min(*to);
            most = most.max(if open { own } else { i32::MIN });
            below += u32::from(*to < near);
        }
        Field { count, least, most, near, below_near: below as usize }
    }
}

vectorised! {
    /// Give `k` places to the largest ordinals. Returns the bound below which those are that stay open, and where the search ended.
    fn settle<'a>(ordinals: &'a mut [i32], positions: &'a [i32], k: usize, field: Field) -> (i32, i32) {
        if k == 0 {
            return (OUTSIDE, field.near);
        }
        if k >= field.count {
            return (i32::MIN, field.near);
        }
        let cut = cut(ordinals, positions, k, field);
        (cut.settle(ordinals, positions), cut.ordinal)
    }
}
