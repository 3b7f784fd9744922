//! How work is spread over threads.
//!
//! Each thread has its own row of neighbouring items, so that caches keep what they hold from one pass to the next and nobody fetches
//! ahead what another one reads; who is done takes from the end of others' rows, so that a helper that wakes late does less. The calling
//! thread always works itself, has helpers of its own, and takes back what none of them has begun: where the cores are busy with other
//! work it waits for nobody. Every item is independent, so results do not depend on the thread count.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::error::{Result, fail};

/// Caps the threads of every call that names no cap itself.
pub const VARIABLE: &str = "LIQUIDFUSION_NUM_THREADS";

/// The part of what is left of a row that is taken at a time: small enough that the threads end together.
const PART: usize = 8;

/// Calling threads that have helpers at a time; a further one works alone, so that a program of many threads does not multiply them.
const CALLERS: usize = 4;

static CALLING: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Made by a thread's first call, gone with the thread.
    static HELPERS: Option<Helpers> = Helpers::new();
}

/// A pool that its calling thread is a member of.
struct Helpers {
    pool: rayon::ThreadPool,
    process: u32,
}

impl Helpers {
    /// None when there is one core, when threads cannot be had, or when this one is a member of somebody else's pool.
    fn new() -> Option<Self> {
        if cores() < 2 || CALLING.fetch_update(Relaxed, Relaxed, |n| (n < CALLERS).then_some(n + 1)).is_err() {
            return None;
        }
        let named = rayon::ThreadPoolBuilder::new().thread_name(|i| format!("liquidfusion-{i}"));
        let built = named.num_threads(cores()).use_current_thread().build();
        if built.is_err() {
            CALLING.fetch_sub(1, Relaxed);
        }
        built.ok().map(|pool| Self { pool, process: std::process::id() })
    }

    /// Whether they are there: a forked child has no threads but its first.
    fn here(&self) -> bool {
        self.process == std::process::id()
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        CALLING.fetch_sub(1, Relaxed);
    }
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

/// Run `work` on every item, on at most `threads` threads.
pub(crate) fn for_each<I, F>(threads: usize, items: I, work: F)
where
    I: Iterator + Send,
    I::Item: Send,
    F: Fn(I::Item) + Sync,
{
    if threads < 2 {
        return items.for_each(work);
    }
    HELPERS.with(|helpers| match helpers.as_ref().filter(|own| own.here()) {
        Some(helpers) => together(&helpers.pool, threads, items, work),
        None => items.for_each(work),
    });
}

/// The same for work that may fail: all is done, and the error of the first item that has one is returned.
pub(crate) fn try_for_each<I, F>(threads: usize, items: I, work: F) -> Result<()>
where
    I: Iterator + Send,
    I::Item: Send,
    F: Fn(I::Item) -> Result<()> + Sync,
{
    let first = Mutex::new(None);
    for_each(threads, items.enumerate(), |(i, item)| {
        if let Err(error) = work(item) {
            let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
            if first.as_ref().is_none_or(|&(known, _)| i < known) {
                *first = Some((i, error));
            }
        }
    });
    first.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), |(_, error)| Err(error))
}

fn together<I, F>(pool: &rayon::ThreadPool, threads: usize, items: I, work: F)
where
    I: Iterator + Send,
    I::Item: Send,
    F: Fn(I::Item) + Sync,
{
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
    fn a_call_waits_for_no_other_threads_call() {
        let (done, wait) = (std::sync::Barrier::new(2), Mutex::new(()));
        std::thread::scope(|scope| {
            // All helpers of this thread are stuck until the other thread's call has ended.
            scope.spawn(|| {
                done.wait();
                for_each(usize::MAX, 0..64, |_| drop(wait.lock()));
            });
            scope.spawn(|| {
                let held = wait.lock().unwrap();
                done.wait();
                every_item_once();
                drop(held);
            });
        });
    }

    #[test]
    fn helpers_go_with_their_thread() {
        for _ in 0..3 * CALLERS {
            std::thread::spawn(|| {
                every_item_once();
                assert!(CALLING.load(Relaxed) <= CALLERS);
            })
            .join()
            .unwrap();
        }
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
