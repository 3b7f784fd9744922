//! The k largest of many non-negative scores, by threshold.
//!
//! A finite non-negative float orders like its bits, so scores become integer keys and the k-th largest is found by counting:
//! interpolate a threshold, count the keys above it, tighten. Nothing is moved or sorted, one count reads eight keys a cycle,
//! and half a dozen counts do. Ties are settled by position, the newer staying.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Result, fail};
use crate::simd::{self, Lanes, Work};
use crate::threads;
use crate::view::{View, ViewMut};

/// Bits of the largest finite float; every acceptable score has bits up to this, or those of -0.0.
pub(crate) const FINITE: u32 = 0x7f7f_ffff;

/// Scores below which helpers cost more than they bring.
const WORTH_THREADS: usize = 1 << 17;

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

/// The key of what takes no part: above every score's, so that it is never below a cut.
pub(crate) const OUTSIDE: i32 = i32::MAX;

/// The keys that take part: how many, and what none of them exceeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Field {
    pub(crate) count: usize,
    pub(crate) most: i32,
}

/// Where the last search of this kind ended. Rows resemble each other, so the next one starts there. It changes the number of
/// counts, never the result.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Hint {
    key: i32,
    /// How far apart two neighbouring keys were; 0 before the first search.
    spacing: f64,
}

/// How many keys are below `least`.
#[inline(always)]
fn count_below(keys: &[i32], least: i32) -> usize {
    keys.iter().map(|&key| u32::from(least > key)).sum::<u32>() as usize
}

/// Where to cut so that `k` keys are taken, or all that take part if they are fewer. `positions` settle ties; `ties` is scratch.
#[inline(always)]
pub(crate) fn cut(
    keys: &[i32],
    k: usize,
    field: Field,
    hint: &mut Hint,
    positions: impl Fn(usize) -> i32,
    ties: &mut Vec<i32>,
) -> Cut {
    if k == 0 {
        return Cut::NOTHING;
    }
    if field.count <= k {
        return Cut { key: 0, position: 0 };
    }
    // `low` takes `over` too many, `high` takes `under` too few. The weights are the same numbers, but halved when their end has
    // not moved for a while (the Illinois rule), so that a guess falls on its other side.
    let (mut low, mut high) = (0, field.most.saturating_add(1));
    let (mut over, mut under) = (field.count - k, k);
    let (mut low_weight, mut high_weight) = (over as f64, under as f64);
    let (mut low_counted, mut high_counted) = (false, false);
    let mut last_low = None;
    let mut reach = 1.0;
    let mut turn = 0;
    let mut guess = hint.key;
    while high - low > 1 {
        if turn > 0 || hint.spacing == 0.0 {
            let width = f64::from(high - low);
            // From the counted end, `missing` keys away, far enough that chance seldom leaves them all on one side.
            let beyond = |missing: usize| {
                let missing = missing as f64;
                reach * hint.spacing * (missing + 1.5 * missing.sqrt())
            };
            let step = if turn % 8 == 7 {
                // Bisection now and then bounds the number of turns whatever the distribution.
                width * 0.5
            } else if low_counted == high_counted || hint.spacing == 0.0 {
                width * (low_weight / (low_weight + high_weight))
            } else if low_counted {
                beyond(over)
            } else {
                width - beyond(under)
            };
            reach *= 2.0;
            guess = low.saturating_add(step as i32);
        }
        turn += 1;
        guess = guess.clamp(low + 1, high - 1);
        let count = field.count - count_below(keys, guess);
        let to_low = count > k;
        if to_low {
            (low, over, low_counted) = (guess, count - k, true);
            low_weight = over as f64;
        } else {
            (high, under, high_counted) = (guess, k - count, true);
            high_weight = under as f64;
        }
        if low_counted && high_counted && over + under >= 16 {
            hint.spacing = f64::from(high - low) / (over + under) as f64;
        }
        if count == k {
            hint.key = guess;
            return Cut { key: guess, position: 0 };
        }
        if last_low == Some(to_low) {
            if to_low {
                high_weight *= 0.5;
            } else {
                low_weight *= 0.5;
            }
        }
        last_low = Some(to_low);
    }
    hint.key = low;
    ties.clear();
    ties.extend(keys.iter().enumerate().filter(|&(_, &key)| key == low).map(|(i, _)| positions(i)));
    let from = ties.len() - under;
    let (_, &mut position, _) = ties.select_nth_unstable(from);
    Cut { key: low, position }
}

thread_local! {
    /// Where this thread's last search ended, and memory for ties.
    static LAST: RefCell<(Hint, Vec<i32>)> = RefCell::default();
}

/// Where to cut a row of scores, and the largest of their bits; without meaning if those are beyond `FINITE`.
struct Search<'a> {
    row: &'a [i32],
    k: usize,
    last: &'a mut (Hint, Vec<i32>),
}

impl Work for Search<'_> {
    type Output = (Cut, u32);

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) -> (Cut, u32) {
        let worst = self.row.iter().fold(0, |worst, &key| worst.max(key as u32));
        if worst > FINITE {
            return (Cut::NOTHING, worst);
        }
        let field = Field { count: self.row.len(), most: FINITE as i32 };
        let (hint, ties) = self.last;
        (cut(self.row, self.k, field, hint, |i| i as i32, ties), worst)
    }
}

/// Write down what a cut takes.
struct Take<'a> {
    row: &'a [i32],
    cut: Cut,
    out: &'a mut [i32],
}

impl Work for Take<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { row, cut, out } = self;
        if cut.position == 0 {
            lanes.indices::<true>(row, cut.key - 1, out);
        } else {
            let taken = row.iter().enumerate().filter(|&(i, &key)| cut.takes(key, i as i32));
            for (slot, (i, _)) in out.iter_mut().zip(taken) {
                *slot = i as i32;
            }
        }
    }
}

/// Indices of the `k` largest scores of each row, ascending; ties keep the larger index.
pub fn select(scores: View<'_, f32, 2>, k: usize, mut out: ViewMut<'_, i32, 2>, threads: usize) -> Result<()> {
    let [rows, n] = scores.shape();
    if k == 0 || k > n {
        fail!(Config, "k must be from 1 to {n}, the scores in a row, got {k}");
    }
    out.expect("out", [rows, k])?;
    let data = scores.data();
    let threads = if data.len() < WORTH_THREADS { 1 } else { threads };
    // Every row is checked and searched before any is written.
    let mut cuts = vec![Cut::NOTHING; rows];
    let worst = AtomicU32::new(0);
    let keys: &[i32] = bytemuck::cast_slice(data);
    threads::for_each(threads, keys.chunks_exact(n).zip(&mut cuts), |(row, cut)| {
        let (found, met) = LAST.with_borrow_mut(|last| simd::dispatch(Search { row, k, last }));
        *cut = found;
        if met > FINITE {
            worst.fetch_max(met, Ordering::Relaxed);
        }
    });
    if worst.into_inner() > FINITE {
        if let Some(i) = data.iter().position(|&s| !valid(s)) {
            fail!(Score, "scores[{}, {}] is {}; scores must be finite and not negative", i / n, i % n, data[i]);
        }
        // Some are -0.0, which equals 0.0.
        let unsigned: Vec<f32> = data.iter().map(|score| score.abs()).collect();
        return select(View::new("scores", &unsigned, [rows, n])?, k, out, threads);
    }
    let rows = keys.chunks_exact(n).zip(cuts).zip(out.data().chunks_exact_mut(k));
    threads::for_each(threads, rows, |((row, cut), out)| simd::dispatch(Take { row, cut, out }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(scores: &[f32], k: usize) -> Vec<i32> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap().then(b.cmp(&a)));
        let mut chosen: Vec<i32> = order[..k].iter().map(|&i| i as i32).collect();
        chosen.sort_unstable();
        chosen
    }

    fn fast(scores: &[f32], rows: usize, k: usize, threads: usize) -> Vec<i32> {
        let mut out = vec![0; rows * k];
        let scores = View::new("scores", scores, [rows, scores.len() / rows]).unwrap();
        select(scores, k, ViewMut::new("out", &mut out, [rows, k]).unwrap(), threads).unwrap();
        out
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig {
            cases: if cfg!(miri) { 4 } else { 256 },
            failure_persistence: None,
            ..Default::default()
        })]

        #[test]
        fn agrees_with_sorting(
            scores in proptest::collection::vec(
                proptest::prop_oneof![
                    proptest::prelude::Just(0.0f32), proptest::prelude::Just(-0.0), proptest::prelude::Just(0.25),
                    0.0f32..1.0, 0.0f32..1e-38, proptest::prelude::Just(f32::MAX),
                ],
                1..if cfg!(miri) { 40 } else { 300 },
            ),
            part in 0.0f64..1.0,
        ) {
            let k = 1 + (part * scores.len() as f64) as usize;
            assert_eq!(fast(&scores, 1, k, 1), naive(&scores, k));
        }
    }

    #[test]
    fn rows_are_independent_of_threads() {
        let scores: Vec<f32> = (0..64 * 301).map(|i| ((i * 7919) % 1009) as f32).collect();
        let one = fast(&scores, 64, 100, 1);
        assert_eq!(one, fast(&scores, 64, 100, 4));
        for (row, chosen) in scores.chunks(301).zip(one.chunks(100)) {
            assert_eq!(chosen, naive(row, 100));
        }
    }

    #[test]
    fn bad_scores_are_named() {
        for bad in [f32::NAN, f32::INFINITY, -1.0, -f32::NAN] {
            let mut out = [7; 2];
            let result = select(
                View::new("scores", &[1.0, 2.0, 0.5, bad], [2, 2]).unwrap(),
                1,
                ViewMut::new("out", &mut out, [2, 1]).unwrap(),
                1,
            );
            assert!(result.unwrap_err().to_string().starts_with("scores[1, 1] is "));
            assert_eq!(out, [7, 7]);
        }
    }
}
