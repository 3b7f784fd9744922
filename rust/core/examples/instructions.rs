//! One job of the core, repeated, for timing it and for counting instructions:
//! `valgrind --tool=callgrind … instructions JOB REPEATS`.
//!
//! The count of `REPEATS` runs minus that of none, divided by `REPEATS`, is what one run takes.

use liquidfusion_core::ledger::{ChunkScores, Ledger, Shape, Slots};
use liquidfusion_core::params::{Name, Value};
use liquidfusion_core::spec::Spec;
use liquidfusion_core::view::{View, ViewMut};

/// Attention-like scores: a few large, most tiny.
fn scores(n: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / 16_777_216.0).powi(8)
    };
    std::iter::repeat_with(next).take(n).collect()
}

/// Decisions of `liquid_fusion` about 32 layers and 8 heads; a repeat is one decision and the steps between two.
fn decide(rows: usize, slots: usize, interval: usize, repeats: usize) {
    let shape = Shape { layers: 32, rows, kv_heads: 8, slots };
    let given = [(Name::EvictionInterval, Value::Int(interval as i64)), (Name::DistinctRatio, Value::Ratio(0.0))];
    let spec = Spec::new("liquid_fusion", Some(slots as i64), &given).expect("the request is valid");
    let heads = 256 * rows;
    let n = heads * slots;
    let (mut positions, mut mass, mut peak) = (vec![-1; n], vec![0.0; n], vec![0.0; n]);
    let mut ledger = Ledger::new(spec, shape, 1).expect("the shape fits");
    let mut out = vec![0; heads];
    let (new_mass, new_peak) = (scores(n), scores(n));
    let (mut best, mut all, mut chosen) = (f64::INFINITY, Vec::new(), 0);
    for _ in 0..slots + interval * repeats {
        let mut tensors = Slots { positions: &mut positions, scores: Some((&mut mass, &mut peak)) };
        let mut view = ViewMut::new("slots", &mut out, [32, rows, 8]).expect("the shape fits");
        ledger.begin(&mut tensors, &vec![1; rows], None, &mut view).expect("the call is in order");
        for (head, slot) in out.iter().enumerate() {
            let at = head * slots + usize::try_from(*slot).expect("a slot was chosen");
            (mass[at], peak[at]) = (new_mass[at], new_peak[at]);
        }
        let start = std::time::Instant::now();
        let tensors = Slots { positions: &mut positions, scores: Some((&mut mass, &mut peak)) };
        let victims = ledger.finish(&tensors, None).expect("the scores are valid");
        if victims > 0 {
            best = best.min(start.elapsed().as_secs_f64());
            all.push(start.elapsed().as_secs_f64());
        }
        chosen += victims;
    }
    all.sort_unstable_by(f64::total_cmp);
    let median = all.get(all.len() / 2).copied().unwrap_or(f64::NAN);
    println!("decision: {:.1} µs, median {:.1} µs, {chosen} victims", best * 1e6, median * 1e6);
}

/// Decisions of `liquid_fusion` about a chunk of 32,768 columns after 2,048 stored tokens, one layer of 8 heads.
fn decide_chunk(repeats: usize) {
    let shape = Shape { layers: 1, rows: 1, kv_heads: 8, slots: 2048 };
    let given = [(Name::DistinctRatio, Value::Ratio(0.0))];
    let spec = Spec::new("liquid_fusion", Some(2048), &given).expect("the request is valid");
    let (n, new) = (8 * shape.slots, 32_768);
    let (mut positions, mut mass, mut peak) = (vec![-1; n], vec![0.0; n], vec![0.0; n]);
    let mut ledger = Ledger::new(spec, shape, 1).expect("the shape fits");
    let ranks: Vec<i32> = (0..new).collect();
    let ranks = View::new("columns", &ranks, [1, new as usize]).expect("the shape fits");
    let wide = shape.slots + new as usize;
    let scores = scores(16 * wide);
    let (new_mass, new_peak) = scores.split_at(8 * wide);
    let view = |values| View::new("scores", values, [1, 8, wide]).expect("the shape fits");
    let known = ChunkScores { scores: Some((view(new_mass), view(new_peak))), distinct: None };
    let (mut out, mut source) = (vec![0; 8], vec![0; n]);
    let mut best = f64::INFINITY;
    for _ in 0..repeats {
        let mut tensors = Slots { positions: &mut positions, scores: Some((&mut mass, &mut peak)) };
        let mut view = ViewMut::new("slots", &mut out, [1, 1, 8]).expect("the shape fits");
        ledger.begin(&mut tensors, &[i64::from(new)], None, &mut view).expect("the call is in order");
        let mut source = ViewMut::new("source", &mut source, [1, 8, shape.slots]).expect("the shape fits");
        let start = std::time::Instant::now();
        ledger.chunk(&mut tensors, 0, ranks, known, &mut source).expect("the scores are valid");
        best = best.min(start.elapsed().as_secs_f64());
        ledger.finish(&tensors, None).expect("the call is in order");
    }
    println!("chunk: {:.1} µs, last column {:?}", best * 1e6, source.last());
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let job = arguments.next().unwrap_or_default();
    let repeats: usize = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(1);
    match &*job {
        "decision" => decide(1, 2112, 64, repeats),
        "interval1" => decide(64, 2048, 1, repeats),
        "chunk" => decide_chunk(repeats),
        _ => {
            eprintln!("jobs: decision interval1 chunk");
            std::process::exit(2);
        }
    }
}
