//! Starting the coordinator, and stopping it.
//!
//! It is stopped in the order in which others depend on it: it stops to be healthy and to accept, watchers are sent away, layers
//! that run come to their end, and what is left of jobs is given back for the next coordinator.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use occy_pipeline::registry::{Options, Traffic};
use occy_proto::FILE_DESCRIPTOR_SET;
use occy_proto::v1::blob_service_server::BlobServiceServer;
use occy_proto::v1::pipeline_service_server::PipelineServiceServer;
use occy_proto::v1::schedule_service_server::ScheduleServiceServer;
use occy_proto::v1::worker_service_server::WorkerServiceServer;
use occy_worker::run::filters;
use occy_worker::telemetry;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};

use crate::access::Access;
use crate::admit::{self, Gate};
use crate::budget::rules::Rules;
use crate::client::{ClientLimits, Clients};
use crate::credentials::SecretKeys;
use crate::engine::embedded::Store;
use crate::engine::jetstream::connect::Place;
use crate::engine::jetstream::{self, JetStream};
use crate::engine::{Engine, Limits};
use crate::fleet::{Fleet, Patience};
use crate::grpc::{Api, Coordinator, MESSAGE_MAX};
use crate::job::runner::Jobs;
use crate::metrics;
use crate::settings::Settings;
use crate::timetable::api::ScheduleApi;
use crate::timetable::{self, ScheduleLimits, Timetable};
use crate::worker::blobs::Blobs;
use crate::worker::connect::Workers;

/// Bytes that a client may have on its way in one stream, and in all streams of a connection: what a layer needs to keep going
/// over a distance, and no more.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;
/// How often a connection that is silent is asked whether it still is there, and how long it may take to answer.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// How long the engine may take for what is put back there at the end of a drain.
const CLOSE: Duration = Duration::from_secs(1);

/// Runs the coordinator until `stop`, then drains it. `listening` hears the address.
pub async fn serve(
    settings: &Settings,
    stop: impl Future<Output = ()> + Send + 'static,
    listening: impl FnOnce(std::net::SocketAddr),
) -> anyhow::Result<()> {
    let fleet = Fleet::embedded(workers(settings), &admit::offered(), &filters(), patience(settings));
    fleet.budgets().configure(Rules(settings.registry_budget.clone()));
    let traffic = Traffic::default();
    let gate = Arc::new(gate(settings, fleet.clone(), &traffic)?);
    let access = Arc::new(Access::new(settings.tokens_file.as_deref()).await?);
    let engine = open_engine(settings).await?;
    let keys = settings.secret_key_file.as_deref().map(SecretKeys::read).transpose()?;
    let jobs = Jobs::new(engine, Arc::clone(&gate), keys, fleet.clone(), settings.running_jobs.max(1));
    let tls = tls(settings).await?;
    let listener = TcpListener::bind(settings.listen).await;
    let listener = listener.with_context(|| format!("failed to listen on {}", settings.listen))?;
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() && settings.tls_client_ca.is_none() && !access.needs_tokens() {
        tracing::warn!(%address, "anybody who reaches this address can use it, and be its worker: neither certificate nor token is needed");
    }
    if !address.ip().is_loopback() && tls.is_none() && access.needs_tokens() {
        tracing::warn!(%address, "tokens can be read on their way to this address: connections are not encrypted");
    }
    let resumed = jobs.resume().await?;
    if resumed > 0 {
        tracing::info!(jobs = resumed, "going on with jobs of an earlier coordinator");
    }
    let (draining, is_draining) = watch::channel(false);
    let timetable = Timetable::new(jobs.clone(), schedule_limits(settings));
    let coordinator = Coordinator {
        gate,
        access: Arc::clone(&access),
        fleet: fleet.clone(),
        jobs: jobs.clone(),
        calls: Arc::new(Semaphore::new(settings.max_calls)),
        max_calls: settings.max_calls,
        draining: is_draining,
    };
    let coordinator = Arc::new(coordinator);
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<PipelineServiceServer<Api>>().await;
    health.set_serving::<ScheduleServiceServer<ScheduleApi>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let schedules = ScheduleApi { coordinator: Arc::clone(&coordinator), timetable: timetable.clone() };
    let schedules = ScheduleServiceServer::new(schedules)
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX);
    let api = PipelineServiceServer::new(Api(coordinator))
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX);
    let workers = WorkerServiceServer::new(Workers { fleet: fleet.clone(), access: Arc::clone(&access) })
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX);
    let blobs = BlobServiceServer::new(Blobs(fleet.attempts().clone()))
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX);
    let mut server = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .trace_fn(telemetry::call_span);
    if let Some(tls) = tls {
        server = server.tls_config(tls)?;
    }
    let router = server
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(api)
        .add_service(schedules)
        .add_service(workers)
        .add_service(blobs);
    let mut all = occy_worker::metrics::registry(traffic);
    metrics::register(&mut all, fleet.clone());
    timetable::metrics::register(&mut all, timetable.counted());
    let exposition = occy_worker::metrics::listen(settings.telemetry.metrics_listen).await?;
    let exposition = occy_worker::metrics::serve(exposition, all);
    listening(address);
    let patience = Duration::from_secs(settings.drain_timeout);
    let begun = |mut is_draining: watch::Receiver<bool>| async move {
        // The sender lives as long as this function.
        let _ = is_draining.wait_for(|&draining| draining).await;
    };
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    // As soon as the drain begins no connection is accepted; calls that are there may come to their end.
    let served = router.serve_with_incoming_shutdown(incoming, begun(draining.subscribe()));
    let drained = async {
        stop.await;
        tracing::info!("stopping: layers that are running come to their end");
        health.set_not_serving::<PipelineServiceServer<Api>>().await;
        health.set_not_serving::<ScheduleServiceServer<ScheduleApi>>().await;
        health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
        draining.send_replace(true);
        jobs.drain(patience).await;
        fleet.close();
        let budgets = fleet.budgets().close(jobs.engine());
        if tokio::time::timeout(CLOSE, budgets).await.is_err() {
            tracing::warn!("the engine took too long: something that was left of quotas is lost");
        }
        Ok(())
    };
    let cut = async {
        begun(draining.subscribe()).await;
        tokio::time::sleep(patience + CLOSE * 2).await;
    };
    tokio::select! {
        result = async { tokio::try_join!(served, drained) } => result.map(|_| ()).context("failed to serve"),
        // A client that does not go is left behind.
        () = cut => Ok(()),
        never = access.keep_reading() => match never {},
        never = jobs.keep_looking() => match never {},
        never = fleet.budgets().keep_leasing(jobs.engine()) => match never {},
        never = jobs.keep_counting() => match never {},
        never = timetable.keep_running(draining.subscribe()) => match never {},
        result = exposition => result,
    }
}

fn schedule_limits(settings: &Settings) -> ScheduleLimits {
    let all = settings.max_schedules;
    ScheduleLimits { all, each: settings.client_schedules.unwrap_or(all) }
}

fn workers(settings: &Settings) -> usize {
    let cores = || std::thread::available_parallelism().map_or(2, usize::from);
    settings.embedded_workers.map_or_else(cores, usize::from)
}

fn patience(settings: &Settings) -> Patience {
    Patience {
        lease: settings.lease,
        attempts: settings.max_attempts.into(),
        unoffered: settings.unoffered_deadline,
    }
}

fn gate(settings: &Settings, fleet: Fleet, traffic: &Traffic) -> anyhow::Result<Gate> {
    let roots = settings.allow_path.iter().map(|path| {
        path.canonicalize().with_context(|| format!("failed to allow the path {}", path.display()))
    });
    Ok(Gate {
        roots: roots.collect::<Result<_, _>>()?,
        registry: Options {
            budget: Some(Arc::new(fleet.budgets().clone())),
            ..settings.registry.options(traffic)
        },
        clients: Clients::new(
            settings.spool.directory(),
            ClientLimits {
                calls: settings.client_calls.unwrap_or(settings.max_calls),
                spool: settings.client_spool.unwrap_or(settings.spool.spool_limit),
            },
        ),
        max_layer_size: settings.max_layer_size,
        parallel: settings.parallel.max(1),
        fleet,
    })
}

async fn open_engine(settings: &Settings) -> anyhow::Result<Arc<dyn Engine>> {
    let directory = settings.state_dir.clone();
    let limits = Limits {
        active: settings.max_jobs,
        active_each: settings.client_jobs.unwrap_or(settings.max_jobs),
        kept: settings.keep_jobs.max(settings.max_jobs),
    };
    if let Some(uri) = &settings.engine {
        let place = Place {
            servers: jetstream::connect::servers(uri)?,
            tls: settings.engine_tls,
            ca_cert: settings.engine_ca_cert.clone(),
            identity: settings.engine_cert.clone().zip(settings.engine_key.clone()),
            credentials: settings.engine_credentials.clone(),
            replicas: settings.engine_replicas.into(),
            lease: settings.engine_lease,
        };
        return Ok(Arc::new(JetStream::open(&place, limits).await?));
    }
    let open = move || {
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("failed to create {}", directory.display()))?;
        anyhow::Ok(Store::open(&directory.join("jobs.redb"), limits)?)
    };
    Ok(Arc::new(tokio::task::spawn_blocking(open).await??))
}

async fn tls(settings: &Settings) -> anyhow::Result<Option<ServerTlsConfig>> {
    let read = |path: std::path::PathBuf| async move {
        tokio::fs::read(&path).await.with_context(|| format!("failed to read {}", path.display()))
    };
    let (Some(certificate), Some(key)) = (settings.tls_cert.clone(), settings.tls_key.clone()) else {
        return Ok(None);
    };
    let identity = Identity::from_pem(read(certificate).await?, read(key).await?);
    let tls = ServerTlsConfig::new().identity(identity);
    Ok(Some(match settings.tls_client_ca.clone() {
        Some(authorities) => tls.client_ca_root(Certificate::from_pem(read(authorities).await?)),
        None => tls,
    }))
}
