//! How work is spread over threads.
//!
//! Each thread has its own row of neighbouring items, so that caches keep what they hold from one pass to the next and nobody fetches
//! ahead what another one reads; who is done takes from the end of others' rows, so that a helper that wakes late does less. The calling
//! thread always works itself. The thread that called first belongs to the pool and takes back what no helper has begun: where the cores
//! are busy with other work it waits for nobody. Every item is independent, so results do not depend on the thread count.

use std::sync::{Mutex, OnceLock, PoisonError};

use crate::error::{Result, fail};

/// Caps the threads of every call that names no cap itself.
pub const VARIABLE: &str = "LIQUIDFUSION_NUM_THREADS";

/// The part of what is left of a row that is taken at a time: small enough that the threads end together.
const PART: usize = 8;

struct Pool {
    pool: rayon::ThreadPool,
    process: u32,
}

/// Threads to use: `cap`, or else the environment's cap, or else one per available core.
pub fn resolve(cap: Option<i64>) -> Result<usize> {
    if let Some(cap) = cap {
        return positive("threads", &cap.to_string());
    }
    if let Ok(text) = std::env::var(VARIABLE) {
        return positive(VARIABLE, &text);
    }
    // The common cap of numerical libraries; its other forms ("4,2") are not ours to reject.
    let omp = std::env::var("OMP_NUM_THREADS").ok().and_then(|text| positive("", &text).ok());
    Ok(omp.unwrap_or(usize::MAX).min(cores()))
}

fn positive(name: &str, text: &str) -> Result<usize> {
    match text.trim().parse() {
        Ok(n) if n >= 1 => Ok(n),
        _ => fail!(Config, "{name} must be an integer of at least 1, got {text}"),
    }
}

fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// The helpers, or none when there is one core, when threads cannot be had, or in a forked child, which has no threads.
fn helpers() -> Option<&'static rayon::ThreadPool> {
    static POOL: OnceLock<Option<Pool>> = OnceLock::new();
    let pool = POOL.get_or_init(|| {
        if cores() < 2 {
            return None;
        }
        let builder =
            || rayon::ThreadPoolBuilder::new().num_threads(cores()).thread_name(|i| format!("liquidfusion-{i}"));
        // A thread of somebody else's pool cannot be one of ours.
        let pool = builder().use_current_thread().build().or_else(|_| builder().build()).ok()?;
        Some(Pool { pool, process: std::process::id() })
    });
    pool.as_ref().filter(|p| p.process == std::process::id()).map(|p| &p.pool)
}

/// Run `work` on every item, on at most `threads` threads.
pub(crate) fn for_each<I, F>(threads: usize, items: I, work: F)
where
    I: Iterator + Send,
    I::Item: Send,
    F: Fn(I::Item) + Sync,
{
    let Some(pool) = (threads > 1).then(helpers).flatten() else {
        return items.for_each(work);
    };
    let mut items: Vec<Option<I::Item>> = items.map(Some).collect();
    let threads = threads.min(pool.current_num_threads());
    let per_row = items.len().div_ceil(threads).max(1);
    let rows: Vec<_> = items.chunks_mut(per_row).map(Mutex::new).collect();
    let drain = |own: usize| {
        for (i, row) in rows.iter().enumerate().cycle().skip(own).take(rows.len()) {
            loop {
                let part = {
                    let mut left = row.lock().unwrap_or_else(PoisonError::into_inner);
                    let n = left.len().div_ceil(PART);
                    let at = left.len() - n;
                    if i == own { left.split_off_mut(..n) } else { left.split_off_mut(at..) }
                };
                match part {
                    Some(part) if !part.is_empty() => part.iter_mut().filter_map(Option::take).for_each(&work),
                    _ => break,
                }
            }
        }
    };
    pool.in_place_scope(|scope| {
        for helper in 1..threads {
            let drain = &drain;
            scope.spawn(move |_| drain(helper));
        }
        drain(0);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_once() {
        for threads in 1..5 {
            let mut data = vec![0; 1000];
            for_each(threads, data.iter_mut().enumerate(), |(i, x)| *x += i);
            assert!(data.iter().enumerate().all(|(i, &x)| i == x));
        }
    }

    #[test]
    fn every_item_once_from_several_threads() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(every_item_once);
            }
        });
    }

    #[test]
    fn caps_are_checked() {
        assert_eq!(resolve(Some(3)), Ok(3));
        for bad in [0, -1] {
            assert!(resolve(Some(bad)).unwrap_err().to_string().contains(&bad.to_string()));
        }
        assert!(positive("x", "two").is_err());
    }
}
