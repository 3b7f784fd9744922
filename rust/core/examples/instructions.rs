//! One job of the core, repeated, for counting instructions: `valgrind --tool=callgrind … instructions JOB REPEATS`.
//!
//! The count of `REPEATS` runs minus that of none, divided by `REPEATS`, is what one run takes.

use liquidfusion_core::ledger::{ChunkScores, Ledger, Shape, Slots};
use liquidfusion_core::select::select;
use liquidfusion_core::spec::{Request, Spec};
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

/// Decisions of `liquid_fusion` about 32 layers, 8 heads and 2112 slots; a repeat is one decision and the 64 steps between two.
fn decide(repeats: usize) {
    let shape = Shape { layers: 32, batch: 1, heads: 8, slots: 2112 };
    let request = Request { budget: Some(2112), eviction_interval: Some(64), ..Request::default() };
    let spec = Spec::new("liquid_fusion", &request).expect("the request is valid");
    let n = 256 * shape.slots;
    let (mut positions, mut mass, mut peak) = (vec![-1; n], vec![0.0; n], vec![0.0; n]);
    let mut ledger = Ledger::new(spec, shape, 1).expect("the shape fits");
    let mut out = vec![0; 256];
    let (new_mass, new_peak) = (scores(n), scores(n));
    let (mut best, mut chosen) = (f64::INFINITY, 0);
    for _ in 0..shape.slots + 64 * repeats {
        let mut slots = Slots { positions: &mut positions, scores: Some((&mut mass, &mut peak)) };
        let mut view = ViewMut::new("slots", &mut out, [32, 1, 8]).expect("the shape fits");
        ledger.begin(&mut slots, &[1], &mut view).expect("the call is in order");
        for (lane, slot) in out.iter().enumerate() {
            let at = lane * shape.slots + usize::try_from(*slot).expect("a slot was chosen");
            (mass[at], peak[at]) = (new_mass[at], new_peak[at]);
        }
        let start = std::time::Instant::now();
        let slots = Slots { positions: &mut positions, scores: Some((&mut mass, &mut peak)) };
        let victims = ledger.finish(&slots).expect("the scores are valid");
        if victims > 0 {
            best = best.min(start.elapsed().as_secs_f64());
        }
        chosen += victims;
    }
    println!("decision: {:.1} µs, {chosen} victims", best * 1e6);
}

/// Decisions of `liquid_fusion` about a chunk of 32,768 columns after 2,048 stored tokens, one layer of 8 heads.
fn decide_chunk(repeats: usize) {
    let shape = Shape { layers: 1, batch: 1, heads: 8, slots: 2048 };
    let request = Request { budget: Some(2048), ..Request::default() };
    let spec = Spec::new("liquid_fusion", &request).expect("the request is valid");
    let (n, new) = (8 * shape.slots, 32_768);
    let (mut positions, mut mass, mut peak) = (vec![-1; n], vec![0.0; n], vec![0.0; n]);
    let mut ledger = Ledger::new(spec, shape, 1).expect("the shape fits");
    let columns: Vec<i32> = (0..new).collect();
    let columns = View::new("columns", &columns, [1, new as usize]).expect("the shape fits");
    let wide = shape.slots + new as usize;
    let scores = scores(16 * wide);
    let (new_mass, new_peak) = scores.split_at(8 * wide);
    let view = |values| View::new("scores", values, [1, 8, wide]).expect("the shape fits");
    let scores = ChunkScores { mass: view(new_mass), peak: view(new_peak) };
    let (mut out, mut source) = (vec![0; 8], vec![0; n]);
    let mut best = f64::INFINITY;
    for _ in 0..repeats {
        let mut slots = Slots { positions: &mut positions, scores: Some((&mut mass, &mut peak)) };
        let mut view = ViewMut::new("slots", &mut out, [1, 1, 8]).expect("the shape fits");
        ledger.begin(&mut slots, &[i64::from(new)], &mut view).expect("the call is in order");
        let mut source = ViewMut::new("source", &mut source, [1, 8, shape.slots]).expect("the shape fits");
        let start = std::time::Instant::now();
        ledger.chunk(&mut slots, 0, columns, Some(scores), &mut source).expect("the scores are valid");
        best = best.min(start.elapsed().as_secs_f64());
        ledger.finish(&slots).expect("the call is in order");
    }
    println!("chunk: {:.1} µs, last column {:?}", best * 1e6, source.last());
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let job = arguments.next().unwrap_or_default();
    let repeats: usize = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(1);
    let (rows, n, k) = match &*job {
        "decision" => return decide(repeats),
        "chunk" => return decide_chunk(repeats),
        "keep1024of2048" => (256, 2048, 1024),
        "evict64of2112" => (256, 2112, 2048),
        "keep2048of131072" => (8, 131_072, 2048),
        _ => {
            eprintln!("jobs: keep1024of2048 evict64of2112 keep2048of131072 decision chunk");
            std::process::exit(2);
        }
    };
    let scores = scores(rows * n);
    let mut out = vec![0; rows * k];
    let mut best = f64::INFINITY;
    for _ in 0..repeats {
        let start = std::time::Instant::now();
        let scores = View::new("scores", &scores, [rows, n]).expect("the shape fits");
        let out = ViewMut::new("out", &mut out, [rows, k]).expect("the shape fits");
        select(scores, k, out, 1).expect("the scores are valid");
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!("{job}: {:.1} µs, last index {:?}", best * 1e6, out.last());
}
