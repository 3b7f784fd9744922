//! The k largest of many non-negative scores, by threshold.
//!
//! A finite non-negative float orders like its bits, so scores become integer keys (bits + 1; 0 marks what takes no part) and
//! the k-th largest is found by counting. Nothing is moved or sorted, ties are settled by position, the newer staying.

use crate::error::{Result, fail};
use crate::threads;
use crate::view::{View, ViewMut};

/// Bits of the largest finite float; every acceptable score has bits up to this, or those of -0.0.
pub(crate) const FINITE: u32 = 0x7f7f_ffff;

/// Key of a valid score: at least 1, ordered like the score (-0.0 equals 0.0).
#[inline(always)]
pub(crate) fn key(score: f32) -> i32 {
    (score.to_bits() & i32::MAX as u32) as i32 + 1
}

/// Whether a score may be used.
#[inline(always)]
pub(crate) fn valid(score: f32) -> bool {
    (0.0..=f32::MAX).contains(&score)
}

/// What is chosen: keys above `key`, and keys equal to it at `position` or later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) key: i32,
    pub(crate) position: i32,
}

impl Cut {
    pub(crate) const NOTHING: Self = Self { key: i32::MAX, position: 0 };

    #[inline(always)]
    pub(crate) fn takes(self, key: i32, position: i32) -> bool {
        key > self.key || (key == self.key && position >= self.position)
    }
}

#[inline(always)]
fn count_from(keys: &[i32], least: i32) -> usize {
    keys.iter().map(|&key| u32::from(key >= least)).sum::<u32>() as usize
}

/// Where to cut so that `k` keys are taken, or all that take part if they are fewer. `positions` settle ties; `ties` is scratch.
#[inline(always)]
pub(crate) fn cut(keys: &[i32], k: usize, positions: impl Fn(usize) -> i32, ties: &mut Vec<i32>) -> Cut {
    if k == 0 {
        return Cut::NOTHING;
    }
    if count_from(keys, 1) <= k {
        return Cut { key: 1, position: 0 };
    }
    let (mut low, mut high) = (1, keys.iter().fold(0, |a, &b| a.max(b)) + 1);
    let mut above = 0;
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        let count = count_from(keys, middle);
        if count == k {
            return Cut { key: middle, position: 0 };
        }
        if count > k {
            low = middle;
        } else {
            (high, above) = (middle, count);
        }
    }
    ties.clear();
    ties.extend(keys.iter().enumerate().filter(|&(_, &key)| key == low).map(|(i, _)| positions(i)));
    let from = ties.len() - (k - above);
    let (_, &mut position, _) = ties.select_nth_unstable(from);
    Cut { key: low, position }
}

/// Indices of the `k` largest scores of each row, ascending; ties keep the larger index.
pub fn select(scores: View<'_, f32, 2>, k: usize, mut out: ViewMut<'_, i32, 2>, threads: usize) -> Result<()> {
    let [rows, n] = scores.shape();
    if k == 0 || k > n {
        fail!(Config, "k must be from 1 to {n}, the scores in a row, got {k}");
    }
    out.expect("out", [rows, k])?;
    if let Some(i) = scores.data().iter().position(|&s| !valid(s)) {
        fail!(Score, "scores[{}, {}] is {}; scores must be finite and not negative", i / n, i % n, scores.data()[i]);
    }
    threads::for_each(threads, scores.data().chunks_exact(n).zip(out.data().chunks_exact_mut(k)), |(row, out)| {
        let keys: Vec<i32> = row.iter().map(|&s| key(s)).collect();
        let cut = cut(&keys, k, |i| i as i32, &mut Vec::new());
        let chosen = keys.iter().enumerate().filter(|&(i, &key)| cut.takes(key, i as i32));
        for (slot, (i, _)) in out.iter_mut().zip(chosen) {
            *slot = i as i32;
        }
    });
    Ok(())
}
