//! What scheduling costs: 100,000 layers that wait, 1,000 workers that are simulated.
//!
//!     cargo bench -p occy-server --bench schedule
//!
//! First the decisions alone, as fast as they go, of tenants, jobs and workers of many kinds. Then a fleet with everything that
//! waits in it, where each worker takes a while for a layer: from the moment in which a slot is free to that in which the next
//! layer has it. Memory is the process's own, before and after the layers have come.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use occy_server::fleet::{Fleet, Lease, Patience};
use occy_server::schedule::{Capabilities, Schedule, Standing};

const LAYERS: usize = 100_000;
const WORKERS: usize = 1000;
const JOBS: usize = 500;
const TENANTS: usize = 20;
/// How long a simulated worker takes for a layer: up to twice this, 50 ms in the mean.
const WORK: Duration = Duration::from_millis(50);

fn main() {
    decisions();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(dispatch());
}

fn set(words: &[usize]) -> Capabilities {
    Arc::new(words.iter().map(|word| format!("filter:{word}")).collect())
}

/// Kinds of jobs: what one, two or none of six filters need.
fn needs(job: usize) -> Capabilities {
    match job % 3 {
        0 => set(&[]),
        1 => set(&[job % 6]),
        _ => set(&[job % 6, (job / 6) % 6]),
    }
}

fn tenant(number: usize) -> Standing {
    Standing { tenant: format!("tenant {number}").into(), priority: 0 }
}

/// Kinds of workers: half can do everything, the others lack something.
fn offers(worker: usize) -> Capabilities {
    let all = 0..6;
    set(&all.filter(|word| worker.is_multiple_of(2) || word % 6 != worker % 6).collect::<Vec<_>>())
}

/// Every layer is begun and ended once; a slot that is given back is given away again at once.
fn decisions() {
    let before = memory();
    let mut schedule = Schedule::default();
    for worker in 0..WORKERS {
        schedule.add_worker(&offers(worker), 1);
    }
    let tenants: Vec<_> = (0..TENANTS).map(tenant).collect();
    let queues: Vec<_> =
        (0..JOBS).map(|job| schedule.add_queue(&tenants[job % TENANTS], &needs(job))).collect();
    let start = Instant::now();
    for layer in 0..LAYERS {
        schedule.push(queues[layer % JOBS], fastrand::u64(1..1 << 30));
    }
    let pushed = start.elapsed();
    let each = memory().saturating_sub(before) / LAYERS as u64;
    let mut begun = 0;
    let mut running = Vec::with_capacity(WORKERS);
    let start = Instant::now();
    loop {
        while let Some(assignment) = schedule.begin_next() {
            running.push(assignment);
            begun += 1;
        }
        if running.is_empty() {
            break;
        }
        schedule.end(running.swap_remove(fastrand::usize(..running.len())));
    }
    let elapsed = start.elapsed();
    assert_eq!(begun, LAYERS);
    println!("decisions, {JOBS} jobs of {TENANTS} tenants, workers and jobs of many kinds");
    println!("  layers queued per second     {:>12.0}", LAYERS as f64 / pushed.as_secs_f64());
    println!("  layers begun per second      {:>12.0}", LAYERS as f64 / elapsed.as_secs_f64());
    println!("  bytes per waiting layer      {each:>12}");
}

/// A fleet of workers that take their time.
async fn dispatch() {
    let fleet = Fleet::embedded(WORKERS, &set(&[0, 1, 2, 3, 4, 5]), &[], Patience::default());
    let queue = |job: usize| fleet.queue(&tenant(job % TENANTS), &needs(job), false);
    let queues: Vec<_> = (0..JOBS).map(queue).map(Arc::new).collect();
    let freed = Arc::new(Freed::default());
    let before = memory();
    // Nobody begins before all of them wait.
    let mut blocked = Vec::with_capacity(WORKERS);
    for _ in 0..WORKERS {
        blocked.push(queues[0].lease(None).await);
    }
    let layer = |layer: usize| {
        let (queue, freed) = (Arc::clone(&queues[layer % JOBS]), Arc::clone(&freed));
        tokio::spawn(async move {
            let lease = queue.lease(Some(fastrand::u64(1..1 << 30))).await;
            let waited = freed.since(lease.worker());
            tokio::time::sleep(WORK.mul_f64(2.0 * fastrand::f64())).await;
            freed.now(lease);
            waited
        })
    };
    let tasks: Vec<_> = (0..LAYERS).map(layer).collect();
    // Long enough for every task to come to where it waits.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let each = memory().saturating_sub(before) / LAYERS as u64;
    let start = Instant::now();
    blocked.into_iter().for_each(|lease| freed.now(lease));
    let mut times = Vec::with_capacity(LAYERS);
    for task in tasks {
        times.push(task.await.expect("no task panics"));
    }
    let elapsed = start.elapsed();
    times.sort_unstable();
    let at = |percent: usize| times[(LAYERS - 1) * percent / 100].as_secs_f64() * 1000.0;
    let (p50, p99, most) = (at(50), at(99), at(100));
    let ideal = WORKERS as f64 / WORK.as_secs_f64();
    println!("a fleet of {WORKERS} workers, each layer {WORK:?} in the mean");
    println!("  layers per second            {:>12.0} of {ideal:.0}", LAYERS as f64 / elapsed.as_secs_f64());
    println!("  from a free slot to a layer  p50 {p50:.3} ms, p99 {p99:.3} ms, most {most:.3} ms");
    println!("  bytes per waiting layer      {each:>12}, the task that waits included");
}

/// When each worker's slot became free.
#[derive(Default)]
struct Freed(Mutex<HashMap<String, Instant>>);

impl Freed {
    /// The lease's worker is free now.
    fn now(&self, lease: Lease) {
        self.0.lock().expect("nobody panics").insert(lease.worker().to_owned(), Instant::now());
        drop(lease);
    }

    /// How long a worker was free.
    fn since(&self, worker: &str) -> Duration {
        self.0.lock().expect("nobody panics").get(worker).map(Instant::elapsed).unwrap_or_default()
    }
}

/// Bytes of this process that are in memory.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}
