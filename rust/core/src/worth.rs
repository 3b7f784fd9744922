//! What a token is worth when heavy hitters are chosen: its attention mass, its neighbourhood's, or a number drawn for it.
//!
//! The last two are worked out at the decision, into masses that stand in for the token's own.

use crate::decide::Candidates;

/// What heavy hitters are chosen by, besides peak attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Worth {
    /// The token's own mass.
    #[default]
    Mass,
    /// The largest mass from this many positions before the token to as many after it, among the tokens before the recent window.
    Pooled(usize),
    /// A number that depends on layer, kv head and position only.
    Random,
}

/// A layer and a kv head, by number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lane {
    pub(crate) layer: usize,
    pub(crate) head: usize,
}

/// Fill `out` with the largest mass within `reach` positions of each candidate; the newest `recent` neither get nor give any.
pub(crate) fn pool(candidates: &Candidates<'_>, mass: &[f32], reach: usize, recent: usize, out: &mut Vec<f32>) {
    let positions = candidates.positions();
    let mut order: Vec<usize> = (0..positions.len()).filter(|&i| positions[i] >= 0).collect();
    order.sort_unstable_by_key(|&i| positions[i]);
    order.truncate(order.len().saturating_sub(recent));
    out.clear();
    out.resize(positions.len(), 0.0);
    for (rank, &i) in order.iter().enumerate() {
        let around = &order[rank.saturating_sub(reach)..(rank + reach + 1).min(order.len())];
        let near = around.iter().filter(|&&j| positions[i].abs_diff(positions[j]) as usize <= reach);
        out[i] = near.map(|&j| mass[j]).fold(0.0, f32::max);
    }
}

/// Fill `out` with a number from 0 to 1 for each candidate.
pub(crate) fn draw(candidates: &Candidates<'_>, lane: Lane, out: &mut Vec<f32>) {
    out.clear();
    out.extend(candidates.stored.iter().chain(candidates.columns).map(|&position| drawn(lane, position)));
}

/// The n-th number of splitmix64, seeded with 0, n being made of layer, kv head and position; its upper 24 bits, as a fraction.
///
/// Source: Steele et al., "Fast Splittable Pseudorandom Number Generators", <https://doi.org/10.1145/2714064.2660195>.
fn drawn(lane: Lane, position: i32) -> f32 {
    let n = (lane.layer as u64) << 48 ^ (lane.head as u64) << 32 ^ u64::from(position as u32);
    let mut word = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((word ^ word >> 31) >> 40) as f32 / (1 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_reaches_over_positions() {
        // Slot 3 is queued, slot 1 empty; 20 is too far from 10, and 21 and 22 are recent.
        let (stored, mass) = ([10, -1, 5, 9, 7], [1.0, 90.0, 4.0, 80.0, 2.0, 0.5, 60.0, 70.0]);
        let candidates =
            Candidates { stored: &stored, queued: [&[3], &[]], columns: &[20, 21, 22], seen: 23, scores: None };
        let mut pooled = Vec::new();
        pool(&candidates, &mass, 3, 2, &mut pooled);
        assert_eq!(pooled, [2.0, 0.0, 4.0, 0.0, 4.0, 0.5, 0.0, 0.0]);
    }

    #[test]
    fn drawn_numbers_are_those_of_splitmix64() {
        // The first outputs for the seed 0 are 0xe220a8397b1dcdaf and 0x6e789e6aa1b965f4.
        let first = |position| (drawn(Lane { layer: 0, head: 0 }, position) * (1 << 24) as f32) as u32;
        assert_eq!([first(0), first(1)], [0xe2_20a8, 0x6e_789e]);
        let lanes = (0..3).flat_map(|layer| (0..3).map(move |head| Lane { layer, head }));
        for lane in lanes {
            let sum: f32 = (0..1000).map(|position| drawn(lane, position)).sum();
            assert!((450.0..550.0).contains(&sum), "{lane:?}: {sum}");
        }
    }
}
