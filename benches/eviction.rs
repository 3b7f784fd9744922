//! Selections and whole decisions: every strategy of the registry x rows x slots x k. Run: `cargo bench`.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use liquidfusion_core::ledger::{Ledger, Shape, Slots};
use liquidfusion_core::policy::REGISTRY;
use liquidfusion_core::select::select;
use liquidfusion_core::spec::{Request, Spec};
use liquidfusion_core::view::{View, ViewMut};

/// Attention-like scores: a few large, most tiny.
fn scores(n: usize, mut state: u64) -> Vec<f32> {
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / 16_777_216.0).powi(8)
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn selection(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("select");
    for (rows, n, k) in [(1, 2048, 1024), (256, 2048, 1024), (256, 2112, 2048), (8, 131_072, 2048)] {
        let scores = scores(rows * n, 1);
        let mut out = vec![0; rows * k];
        group.throughput(Throughput::Elements((rows * n) as u64));
        for threads in [1, 2] {
            group.bench_function(BenchmarkId::new(format!("{k} of {n}, {rows} rows"), threads), |bencher| {
                bencher.iter(|| {
                    let scores = View::new("scores", &scores, [rows, n]).unwrap();
                    let out = ViewMut::new("out", &mut out, [rows, k]).unwrap();
                    select(scores, k, out, threads).unwrap();
                });
            });
        }
    }
    group.finish();
}

fn decision(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decision");
    for strategy in REGISTRY.iter().filter(|strategy| strategy.bounded()) {
        for (heads, slots, interval) in [(8, 544, 16), (256, 544, 16), (8, 2112, 64), (256, 2112, 64)] {
            let shape = Shape { layers: 1, batch: 1, heads, slots };
            let budget = Some(slots as i64);
            let request = Request { budget, eviction_interval: Some(interval), ..Request::default() };
            let spec = Spec::new(strategy.name(), &request).unwrap();
            let n = heads * slots;
            let (mut positions, mut mass, mut peak) = (vec![-1; n], scores(n, 1), scores(n, 2));
            let mut ledger = Ledger::new(spec, shape, 2).unwrap();
            let mut chosen = vec![0; heads];
            let mut step = |ledger: &mut Ledger, finish: bool| {
                let mut slots = Slots { positions: &mut positions, scores: Some((&mut mass, &mut peak)) };
                let mut out = ViewMut::new("slots", &mut chosen, [1, 1, heads]).unwrap();
                ledger.begin(&mut slots, &[1], &mut out).unwrap();
                if finish { ledger.finish(&slots).unwrap() } else { 0 }
            };
            while step(&mut ledger, true) == 0 {}
            // One step before the next decision, and taking it.
            for _ in 1..interval {
                step(&mut ledger, true);
            }
            step(&mut ledger, false);
            let before = ledger;
            group.throughput(Throughput::Elements(n as u64));
            let name = format!("{interval} of {slots}, {heads} heads");
            group.bench_function(BenchmarkId::new(strategy.name(), name), |bencher| {
                bencher.iter_batched_ref(
                    || before.clone(),
                    |ledger| {
                        ledger
                            .finish(&Slots { positions: &mut positions, scores: Some((&mut mass, &mut peak)) })
                            .unwrap()
                    },
                    criterion::BatchSize::LargeInput,
                );
            });
        }
    }
    group.finish();
}

criterion_group!(benches, selection, decision);
criterion_main!(benches);
