//! The k largest of many non-negative scores, by threshold.
//!
//! A finite non-negative float orders like its bits, so scores become integer keys and the k-th largest is found by counting:
//! interpolate a threshold, count the keys above it, tighten. Rows resemble each other, so where vectors can be packed the first look
//! takes out the keys around the last row's threshold, and the search ends among those. Ties are settled by position, the newer staying.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

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

impl Hint {
    /// Where a cut that takes `k` of `n` keys is expected, and as far around as chance may have it.
    #[inline(always)]
    fn around(&self, k: usize, n: usize) -> Range<i32> {
        let (k, n) = (k as f64, n as f64);
        let reach = (self.spacing * (3.0 * (k * (n - k) / n).sqrt() + 4.0)) as i32;
        self.key.saturating_sub(reach)..self.key.saturating_add(reach)
    }
}

/// Reusable memory of searches.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    ties: Vec<i32>,
    /// Keys taken out, by turns.
    near: [Vec<i32>; 2],
}

/// Grow a buffer whose contents do not matter.
pub(crate) fn at_least<T: Copy + Default>(buffer: &mut Vec<T>, n: usize) {
    if buffer.len() < n {
        buffer.resize(n, T::default());
    }
}

/// How many keys are below `least`.
#[inline(always)]
fn count_below(keys: &[i32], least: i32) -> usize {
    keys.iter().map(|&key| u32::from(least > key)).sum::<u32>() as usize
}

/// As many keys are compared with each other rather than searched.
const RANKED: usize = 32;

/// The largest of the first `n` keys that at least `least` of those reach; what is behind them means nothing.
#[inline(always)]
fn ranked<L: Lanes>(lanes: L, keys: &[i32; RANKED], n: usize, least: usize) -> i32 {
    let most_below = (n - least) as u32;
    let mut found = 0;
    for (some, index) in keys.as_chunks::<16>().0.iter().zip([0, 16]) {
        let below = lanes.below(some, &keys[..n]);
        for ((&one, below), i) in some.iter().zip(below).zip(index..) {
            found = found.max(if below <= most_below && i < n as i32 { one } else { 0 });
        }
    }
    found
}

/// Keys between which the cut is searched: `low` takes `over` too many, `high` takes `under` too few.
#[derive(Debug, Clone, Copy)]
struct Bracket {
    low: i32,
    high: i32,
    over: usize,
    under: usize,
    low_counted: bool,
    high_counted: bool,
    /// `over` and `under`, but halved when their end has not moved for a while (the Illinois rule), so that a guess falls on its other side.
    low_weight: f64,
    high_weight: f64,
    last_low: Option<bool>,
    /// How far beyond the end that was counted to guess: further every time.
    reach: f64,
}

impl Bracket {
    #[inline(always)]
    fn of(k: usize, field: Field) -> Self {
        let (over, under) = (field.count - k, k);
        Self {
            low: 0,
            high: field.most.saturating_add(1),
            over,
            under,
            low_counted: false,
            high_counted: false,
            low_weight: over as f64,
            high_weight: under as f64,
            last_low: None,
            reach: 1.0,
        }
    }

    /// Learn that `count` keys, of which `k` are to be taken, reach `guess`.
    #[inline(always)]
    fn learn(&mut self, guess: i32, count: usize, k: usize) {
        if count > k {
            (self.low, self.over, self.low_counted) = (guess, count - k, true);
        } else {
            (self.high, self.under, self.high_counted) = (guess, k - count, true);
        }
    }

    /// The threshold that takes neither too many nor too few.
    #[inline(always)]
    fn found(&self) -> Option<i32> {
        (self.under == 0).then_some(self.high)
    }

    /// How far apart two neighbouring keys are, if that can be told.
    #[inline(always)]
    fn spacing(&self) -> Option<f64> {
        let inside = self.over + self.under;
        let told = self.low_counted && self.high_counted && inside >= 16 && self.high - self.low > 1;
        told.then(|| f64::from(self.high - self.low) / inside as f64)
    }

    /// Where to look, when both ends were counted: where the cut is expected, and as far around as chance may have it.
    #[inline(always)]
    fn expected(&self, turn: u32) -> Range<i32> {
        let inside = self.over + self.under;
        let width = f64::from(self.high - self.low);
        if inside <= RANKED {
            return self.low..self.high;
        }
        if turn % 4 == 3 {
            // Now and then the middle half, which bounds the number of turns whatever the distribution.
            let quarter = (self.high - self.low) / 4;
            return self.low + quarter..self.high - quarter;
        }
        let (over, under, inside) = (self.over as f64, self.under as f64, inside as f64);
        let reach = (2.5 * (over * under / inside).sqrt() + 2.0) / inside;
        let part = over / inside;
        self.low.saturating_add((width * (part - reach)) as i32)
            ..self.low.saturating_add((width * (part + reach)) as i32)
    }

    /// A threshold to count the keys that reach it.
    #[inline(always)]
    fn guess(&mut self, turn: u32, hint: &Hint) -> i32 {
        if turn == 0 && hint.spacing > 0.0 {
            return hint.key;
        }
        let width = f64::from(self.high - self.low);
        // From the counted end, `missing` keys away, far enough that chance seldom leaves them all on one side.
        let beyond = |missing: usize| {
            let missing = missing as f64;
            self.reach * hint.spacing * (missing + 1.5 * missing.sqrt())
        };
        let step = if turn % 8 == 7 {
            // Bisection now and then bounds the number of turns whatever the distribution.
            width * 0.5
        } else if self.low_counted == self.high_counted || hint.spacing == 0.0 {
            width * (self.low_weight / (self.low_weight + self.high_weight))
        } else if self.low_counted {
            beyond(self.over)
        } else {
            width - beyond(self.under)
        };
        self.reach *= 2.0;
        self.low.saturating_add(step as i32)
    }

    /// Learn what a guess led to.
    #[inline(always)]
    fn guessed(&mut self, guess: i32, count: usize, k: usize) {
        self.learn(guess, count, k);
        let to_low = count > k;
        let again = self.last_low == Some(to_low);
        let halved = if again { 0.5 } else { 1.0 };
        if to_low {
            self.low_weight = self.over as f64;
            self.high_weight *= halved;
        } else {
            self.high_weight = self.under as f64;
            self.low_weight *= halved;
        }
        self.last_low = Some(to_low);
    }
}

/// Where to cut so that `k` keys are taken, or all that take part if they are fewer. `positions` settle ties.
#[inline(always)]
pub(crate) fn cut<L: Lanes>(
    lanes: L,
    keys: &[i32],
    k: usize,
    field: Field,
    hint: &mut Hint,
    positions: impl Fn(usize) -> i32,
    memory: &mut Memory,
) -> Cut {
    // Without a check there is nothing to refuse.
    search::<L, false>(lanes, keys, k, field, hint, positions, memory).unwrap_or(Cut::NOTHING)
}

/// As `cut`, and with `CHECK` nothing where a key exceeds the field's `most`, as an unsigned number; else none may.
#[inline(always)]
fn search<L: Lanes, const CHECK: bool>(
    lanes: L,
    keys: &[i32],
    k: usize,
    field: Field,
    hint: &mut Hint,
    positions: impl Fn(usize) -> i32,
    memory: &mut Memory,
) -> Option<Cut> {
    let chosen = k > 0 && field.count > k;
    let looks = keys.len() >= L::LOOKS_FROM;
    let by_hint = looks && hint.spacing > 0.0;
    // A look checks on the way.
    if CHECK && !(chosen && by_hint) && keys.iter().fold(0, |worst, &key| worst.max(key as u32)) > field.most as u32 {
        return None;
    }
    if !chosen {
        return Some(if k == 0 { Cut::NOTHING } else { Cut { key: 0, position: 0 } });
    }
    let mut bracket = Bracket::of(k, field);
    let mut turn = 0;
    // What is searched, how many that is, and how many keys a threshold below all of it takes.
    let (mut packed, mut len, mut total) = (None, keys.len(), field.count);
    while bracket.high - bracket.low > 1 {
        let [first, second] = &mut memory.near;
        let (source, target) = match packed {
            None => (keys, first),
            Some(false) => (&**first, second),
            Some(true) => (&**second, first),
        };
        if packed.is_some()
            && len <= RANKED
            && let Some(few) = source.first_chunk()
        {
            let key = ranked(lanes, few, len, k + len - total);
            bracket.learn(key, total - count_below(&source[..len], key), k);
            if bracket.high != key {
                bracket.learn(key + 1, total - count_below(&source[..len], key + 1), k);
            }
        } else if looks && (turn == 0 && by_hint || bracket.low_counted && bracket.high_counted) {
            let window = if turn == 0 { hint.around(k, field.count) } else { bracket.expected(turn) };
            let start = window.start.clamp(bracket.low, bracket.high - 1);
            let end = window.end.clamp(start + 1, bracket.high);
            at_least(target, len.max(RANKED));
            let look = lanes.look(&source[..len], start..end, &mut target[..len]);
            if CHECK && turn == 0 && look.worst > field.most as u32 {
                return None;
            }
            let from_start = total - look.below;
            let from_end = from_start - look.inside;
            if from_end < k && k < from_start {
                (packed, len, total) = (Some(packed == Some(false)), look.inside, from_start);
            }
            bracket.learn(start, from_start, k);
            if from_start > k {
                bracket.learn(end, from_end, k);
            }
            turn += 1;
        } else {
            let guess = bracket.guess(turn, hint).clamp(bracket.low + 1, bracket.high - 1);
            bracket.guessed(guess, total - count_below(&source[..len], guess), k);
            turn += 1;
        }
        hint.spacing = bracket.spacing().unwrap_or(hint.spacing);
        if let Some(key) = bracket.found() {
            hint.key = key;
            return Some(Cut { key, position: 0 });
        }
    }
    hint.key = bracket.low;
    Some(Cut { key: bracket.low, position: tied(keys, bracket, &mut memory.ties, positions) })
}

/// The first position that is taken of those whose key is the bracket's low one.
#[inline(always)]
fn tied(keys: &[i32], bracket: Bracket, ties: &mut Vec<i32>, positions: impl Fn(usize) -> i32) -> i32 {
    ties.clear();
    ties.extend(keys.iter().enumerate().filter(|&(_, &key)| key == bracket.low).map(|(i, _)| positions(i)));
    let from = ties.len() - bracket.under;
    *ties.select_nth_unstable(from).1
}

thread_local! {
    /// Where this thread's last search ended, and its memory.
    static LAST: RefCell<(Hint, Memory)> = RefCell::default();
}

/// Mark the `k` largest scores of a row; `None` if one has bits beyond `FINITE`.
struct Search<'a> {
    row: &'a [i32],
    k: usize,
    last: &'a mut (Hint, Memory),
    marks: &'a mut [u64],
}

impl Work for Search<'_> {
    type Output = Option<()>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Option<()> {
        let Self { row, k, last: (hint, memory), marks } = self;
        let field = Field { count: row.len(), most: FINITE as i32 };
        let Cut { key, position } = search::<L, true>(lanes, row, k, field, hint, |i| i as i32, memory)?;
        lanes.mark::<true>(row, key - 1, marks);
        for (i, _) in row[..position as usize].iter().enumerate().filter(|&(_, &other)| other == key) {
            marks[i / 64] &= !(1 << (i % 64));
        }
        Some(())
    }
}

/// Write down what is marked.
struct Take<'a> {
    marks: &'a [u64],
    out: &'a mut [i32],
}

impl Work for Take<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        lanes.expand(self.marks, self.out);
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
    // Every row is checked before any is written. What is chosen of each is marked by the bit meanwhile, while the row is in the
    // first-level cache: marks are read again sooner than scores.
    let words = n.div_ceil(64);
    let mut marks = vec![0; rows * words];
    let doubtful = AtomicBool::new(false);
    let keys: &[i32] = bytemuck::cast_slice(data);
    threads::for_each(threads, keys.chunks_exact(n).zip(marks.chunks_exact_mut(words)), |(row, marks)| {
        if LAST.with_borrow_mut(|last| simd::dispatch(Search { row, k, last, marks })).is_none() {
            doubtful.store(true, Ordering::Relaxed);
        }
    });
    if doubtful.into_inner() {
        if let Some(i) = data.iter().position(|&s| !valid(s)) {
            fail!(Score, "scores[{}, {}] is {}; scores must be finite and not negative", i / n, i % n, data[i]);
        }
        // Some are -0.0, which equals 0.0.
        let unsigned: Vec<f32> = data.iter().map(|score| score.abs()).collect();
        return select(View::new("scores", &unsigned, [rows, n])?, k, out, threads);
    }
    let rows = marks.chunks_exact(words).zip(out.data().chunks_exact_mut(k));
    threads::for_each(threads, rows, |(marks, out)| simd::dispatch(Take { marks, out }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::tests::everywhere;

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
            let naive = naive(&scores, k);
            // The second time it starts where the first ended, and then where that of a part ended.
            everywhere(|| {
                for _ in 0..2 {
                    assert_eq!(fast(&scores, 1, k, 1), naive);
                }
                fast(&scores[scores.len() / 2..], 1, 1, 1);
                assert_eq!(fast(&scores, 1, k, 1), naive);
            });
        }
    }

    #[test]
    fn rows_need_not_resemble_each_other() {
        // Enough for every instruction set to pack.
        let n = if cfg!(miri) { 150 } else { 9000 };
        let shapes: [fn(usize) -> f32; 6] = [
            |i| (i * 7919 % 9001) as f32,
            |i| (-((i * 31 % 97) as f32)).exp2(),
            |_| 0.5,
            |i| if i % 3 == 0 { 1e-30 } else { 1.0 + (i % 7) as f32 },
            |i| if i % 50 == 0 { i as f32 } else { 0.0 },
            |i| f32::from_bits(0x3f80_0000 + i as u32),
        ];
        let scores: Vec<f32> = shapes.iter().flat_map(|shape| (0..n).map(shape)).collect();
        for k in [1, 2, n / 20, n / 2, n - 40, n - 1, n] {
            let naive: Vec<i32> = scores.chunks(n).flat_map(|row| naive(row, k)).collect();
            everywhere(|| assert_eq!(fast(&scores, shapes.len(), k, 1), naive));
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
