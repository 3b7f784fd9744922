//! Whole decisions: every bounded strategy x heads x slots, and the search inside them. Run: `cargo bench`.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use liquidfusion_core::ledger::{Ledger, Shape, Slots};
use liquidfusion_core::params::{Name, Value};
use liquidfusion_core::select::{Field, cut, ordinal};
use liquidfusion_core::spec::Spec;
use liquidfusion_core::strategy::STRATEGIES;
use liquidfusion_core::view::{View, ViewMut};

/// Attention-like scores: a few large, most tiny.
fn scores(n: usize, mut state: u64) -> Vec<f32> {
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / 16_777_216.0).powi(8)
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn search(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("search");
    for (n, k) in [(2048, 1024), (2112, 2048), (131_072, 2048)] {
        let heads: Vec<Vec<i32>> = (1..33).map(|i| scores(n, i).into_iter().map(ordinal).collect()).collect();
        let positions: Vec<i32> = (0..n as i32).collect();
        group.throughput(Throughput::Elements((32 * n) as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{k} of {n}, 32 heads")), |bencher| {
            let mut near = 0;
            bencher.iter(|| {
                for ordinals in &heads {
                    let below_near = ordinals.iter().filter(|&&ordinal| ordinal < near).count();
                    let field = Field { count: n, least: 0, most: ordinal(1.0), near, below_near };
                    near = std::hint::black_box(cut(ordinals, &positions, k, field)).ordinal;
                }
            });
        });
    }
    group.finish();
}

fn decision(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decision");
    for strategy in STRATEGIES.iter().filter(|strategy| strategy.bounded) {
        for (kv_heads, slots, interval) in [(8, 544, 16), (256, 544, 16), (8, 2112, 64), (256, 2112, 64)] {
            let shape = Shape { layers: 1, rows: 1, kv_heads, slots };
            let given = [(Name::EvictionInterval, Value::Int(interval))];
            let spec = Spec::new(strategy.name, Some(slots as i64), &given).unwrap();
            let n = kv_heads * slots;
            let (mut positions, mut mass, mut peak) = (vec![-1; n], scores(n, 1), scores(n, 2));
            let distinct = scores(n, 3);
            let distinct = View::new("distinct", &distinct, shape.dims()).unwrap();
            let mut ledger = Ledger::new(spec, shape, 2).unwrap();
            let mut chosen = vec![0; kv_heads];
            let mut step = |ledger: &mut Ledger, finish: bool| {
                let mut tensors = Slots { positions: &mut positions, scores: Some((&mut mass, &mut peak)) };
                let mut out = ViewMut::new("slots", &mut chosen, [1, 1, kv_heads]).unwrap();
                ledger.begin(&mut tensors, &[1], None, &mut out).unwrap();
                if finish { ledger.finish(&tensors, Some(distinct)).unwrap() } else { 0 }
            };
            while step(&mut ledger, true) == 0 {}
            // One step before the next decision, and taking it.
            for _ in 1..interval {
                step(&mut ledger, true);
            }
            step(&mut ledger, false);
            let before = ledger;
            group.throughput(Throughput::Elements(n as u64));
            let name = format!("{interval} of {slots}, {kv_heads} heads");
            group.bench_function(BenchmarkId::new(strategy.name, name), |bencher| {
                bencher.iter_batched_ref(
                    || before.clone(),
                    |ledger| {
                        let tensors = Slots { positions: &mut positions, scores: Some((&mut mass, &mut peak)) };
                        ledger.finish(&tensors, Some(distinct)).unwrap()
                    },
                    criterion::BatchSize::LargeInput,
                );
            });
        }
    }
    group.finish();
}

criterion_group!(benches, search, decision);
criterion_main!(benches);
