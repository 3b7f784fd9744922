//! One job of the core, repeated, for counting instructions: `valgrind --tool=callgrind … instructions JOB REPEATS`.
//!
//! The count of `REPEATS` runs minus that of none, divided by `REPEATS`, is what one run takes.

use liquidfusion_core::ledger::{Ledger, Shape, Slots};
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

fn main() {
    let mut arguments = std::env::args().skip(1);
    let job = arguments.next().unwrap_or_default();
    let repeats: usize = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(1);
    let (rows, n, k) = match &*job {
        "decision" => return decide(repeats),
        "keep1024of2048" => (256, 2048, 1024),
        "evict64of2112" => (256, 2112, 2048),
        "keep2048of131072" => (8, 131_072, 2048),
        _ => {
            eprintln!("jobs: keep1024of2048 evict64of2112 keep2048of131072 decision");
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
