//! The connection to NATS, and the buckets in it: made when they are not there, and looked at when they are.
//!
//! | bucket | key | value |
//! |---|---|---|
//! | `occystrap_jobs` | id | the job's record, in whose headers is what every coordinator keeps in memory |
//! | `occystrap_parts` | id, kind, name | what does not fit into it: pages of events, what attempts wrote of layers |
//! | `occystrap_keys` | hash of tenant and idempotency key | id |
//! | `occystrap_leases` | id, epoch | nothing; it is there for a lease after the owner was heard of |
//! | `occystrap_locks` | a destination, as a hash | the claim of the job that makes its image visible there |
//! | `occystrap_layers` | a layer, what is done with it and where it goes, as a hash | whose turn it is to do that, and what came of it |
//! | `occystrap_quotas` | a quota of a registry, an account there and an action, as a hash | how much of it was drawn, and until when it holds |
//! | `occystrap_schedules` | hash of tenant and id | the schedule's record, in whose headers is when it has to be looked at |
//!
//! They are key-value buckets as NATS knows them, so that its tools show them. Reads go to the leader of a bucket, never to another
//! replica: what was written is what is read.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::context::CreateStreamErrorKind;
use async_nats::jetstream::stream::{Config, DiscardPolicy, Info, StorageType, Stream};
use async_nats::jetstream::{self, Context, ErrorCode};
use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::{JetStreamError, PATIENCE};

/// How long NATS may take to answer before it is asked again.
const ANSWER: Duration = Duration::from_secs(3);
/// Between two times that a server is tried that is not there at the start.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a new connection may take.
const CONNECT: Duration = Duration::from_secs(10);
/// The first release that speaks what is spoken here.
const OLDEST: (u32, u32) = (2, 9);
/// The largest value, in bytes, that a server has to take: its default.
const PAYLOAD: usize = 1024 * 1024;
/// For how long at most a destination is locked: far longer than a manifest takes, and what is left of a coordinator that died goes then.
const LOCK: Duration = Duration::from_secs(24 * 60 * 60);
/// For how long it is known what came of a layer, or who is at work: who needs longer for one is found not to be, and it is done again.
const LAYER: Duration = Duration::from_secs(60 * 60);

/// Where JetStream is, and what of it is used.
#[derive(Clone, Debug)]
pub struct Place {
    /// `HOST:PORT` of each server that is asked, first of all the first.
    pub servers: Vec<String>,
    /// Whether connections are refused that are not encrypted.
    pub tls: bool,
    /// Certificate authorities that are trusted too, in a PEM file.
    pub ca_cert: Option<PathBuf>,
    /// What this coordinator shows: certificate and key, in PEM files.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// A file of credentials, as NATS's tools write them.
    pub credentials: Option<PathBuf>,
    /// On how many servers everything is kept.
    pub replicas: usize,
    /// For how long an owner need not be heard of.
    pub lease: Duration,
}

/// The buckets.
#[derive(Debug)]
pub(super) struct Buckets {
    pub(super) jobs: Stream,
    pub(super) parts: Stream,
    pub(super) keys: Stream,
    pub(super) leases: Stream,
    pub(super) locks: Stream,
    pub(super) layers: Stream,
    pub(super) schedules: Stream,
    pub(super) quotas: Stream,
    pub(super) context: Context,
    /// Counts how often there was a connection.
    pub(super) connections: watch::Receiver<u64>,
}

/// A bucket's name: what stands before the keys in subjects.
pub(super) fn bucket(name: &str) -> String {
    format!("$KV.occystrap_{name}.")
}

/// The servers of `jetstream://HOST:PORT,HOST:PORT`.
pub fn servers(uri: &str) -> Result<Vec<String>, JetStreamError> {
    let bad = |problem| JetStreamError::Uri { uri: uri.to_owned(), problem };
    let rest = uri.strip_prefix("jetstream://").ok_or_else(|| bad("it does not begin with jetstream://"))?;
    let servers: Vec<_> = rest.split(',').map(str::to_owned).collect();
    let is_server = |server: &String| {
        !server.is_empty()
            && !server.contains(['/', '@', '?', ' '])
            && server.parse::<ServerAddr>().is_ok_and(|address| !address.host().is_empty())
    };
    if servers.iter().all(is_server) {
        Ok(servers)
    } else {
        Err(bad("expected HOST:PORT, with commas between several"))
    }
}

/// Connects, and makes or checks the buckets.
pub(super) async fn connect(place: &Place) -> Result<Buckets, JetStreamError> {
    let (client, connections) = client(place).await?;
    check_server(&client)?;
    let mut context = jetstream::new(client);
    context.set_timeout(ANSWER);
    let forever = |name| open(&context, name, place.replicas, Duration::ZERO);
    Ok(Buckets {
        jobs: forever("jobs").await?,
        parts: forever("parts").await?,
        keys: forever("keys").await?,
        leases: open(&context, "leases", place.replicas, place.lease).await?,
        locks: open(&context, "locks", place.replicas, LOCK).await?,
        layers: open(&context, "layers", place.replicas, LAYER).await?,
        schedules: forever("schedules").await?,
        quotas: forever("quotas").await?,
        context: context.clone(),
        connections,
    })
}

/// Connects; to a server that is not there, when it comes, if that is soon.
async fn client(place: &Place) -> Result<(Client, watch::Receiver<u64>), JetStreamError> {
    let start = Instant::now();
    loop {
        let error = match client_now(place).await {
            Ok(client) => return Ok(client),
            Err(error) => error,
        };
        let is_away = matches!(&error, JetStreamError::Connect { cause, .. }
            // A name that is not known yet is that of a server that is only being started, in Kubernetes.
            if matches!(cause.kind(), ConnectErrorKind::Io | ConnectErrorKind::Dns | ConnectErrorKind::TimedOut));
        if !is_away || start.elapsed() > PATIENCE {
            return Err(error);
        }
        tracing::warn!(%error, "trying again");
        sleep(PAUSE).await;
    }
}

async fn client_now(place: &Place) -> Result<(Client, watch::Receiver<u64>), JetStreamError> {
    let (connected, connections) = watch::channel(0);
    let connected = Arc::new(connected);
    let mut options = ConnectOptions::new()
        .name("occy-server")
        .connection_timeout(CONNECT)
        .request_timeout(Some(ANSWER))
        .require_tls(place.tls || place.ca_cert.is_some() || place.identity.is_some())
        // The client logs them itself.
        .event_callback(move |event| {
            let connected = Arc::clone(&connected);
            async move {
                if matches!(event, Event::Connected) {
                    connected.send_modify(|times| *times += 1);
                }
            }
        });
    if let Some(path) = &place.ca_cert {
        options = options.add_root_certificates(path.clone());
    }
    if let Some((certificate, key)) = &place.identity {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    if let Some(path) = &place.credentials {
        let read = options.credentials_file(path).await;
        options = read.map_err(|cause| JetStreamError::Credentials { path: path.clone(), cause })?;
    }
    let servers = place.servers.clone();
    let connected = options.connect(servers).await;
    let client =
        connected.map_err(|cause| JetStreamError::Connect { servers: place.servers.join(","), cause })?;
    Ok((client, connections))
}

fn check_server(client: &Client) -> Result<(), JetStreamError> {
    let server = client.server_info();
    let mut numbers = server.version.split('.').map(|number| number.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < OLDEST {
        return Err(JetStreamError::Server {
            version: server.version,
            problem: "2.9 is the oldest that can be used",
        });
    }
    if !server.headers {
        return Err(JetStreamError::Server {
            version: server.version,
            problem: "it has headers switched off",
        });
    }
    if server.max_payload < PAYLOAD {
        let problem = "its max_payload is less than 1 MiB";
        return Err(JetStreamError::Server { version: server.version, problem });
    }
    if version < (2, 12) {
        tracing::warn!(
            version = server.version,
            "NATS before 2.12 can lose what it has acknowledged when its machine loses power"
        );
    }
    Ok(())
}

async fn open(
    context: &Context,
    name: &'static str,
    replicas: usize,
    max_age: Duration,
) -> Result<Stream, JetStreamError> {
    let wanted = Config {
        name: format!("KV_occystrap_{name}"),
        description: Some(format!("occystrap: {name}")),
        subjects: vec![format!("{}>", bucket(name))],
        max_messages_per_subject: 1,
        max_age,
        num_replicas: replicas,
        storage: StorageType::File,
        // Full, it refuses what is new and keeps what there is.
        discard: DiscardPolicy::New,
        allow_rollup: true,
        deny_delete: true,
        max_messages: -1,
        max_bytes: -1,
        max_consumers: -1,
        max_message_size: -1,
        duplicate_window: if max_age.is_zero() {
            Duration::from_secs(120)
        } else {
            max_age.min(Duration::from_secs(120))
        },
        ..Config::default()
    };
    let start = Instant::now();
    let made = loop {
        match context.get_or_create_stream(wanted.clone()).await {
            Err(cause) if is_electing(cause.kind()) && start.elapsed() < PATIENCE => {
                tracing::warn!(bucket = name, %cause, "trying again");
                sleep(PAUSE).await;
            }
            made => break made,
        }
    };
    let stream = made.map_err(|cause| JetStreamError::Bucket {
        name,
        problem: match cause.kind() {
            CreateStreamErrorKind::JetStreamUnavailable => {
                "JetStream is not enabled for this account".to_owned()
            }
            _ => cause.to_string(),
        },
    })?;
    check_bucket(name, &wanted, stream.cached_info())?;
    Ok(stream)
}

/// Whether servers of a cluster that has just been started, or has lost one, do not know yet who leads it, or who is there.
fn is_electing(kind: CreateStreamErrorKind) -> bool {
    match kind {
        CreateStreamErrorKind::TimedOut => true,
        CreateStreamErrorKind::JetStream(error) => {
            [ErrorCode::CLUSTER_NOT_AVAILABLE, ErrorCode::CLUSTER_NO_PEERS, ErrorCode::CLUSTER_NOT_LEADER]
                .contains(&error.error_code())
        }
        _ => false,
    }
}

/// Somebody else, or another configuration, may have made it.
fn check_bucket(name: &'static str, wanted: &Config, found: &Info) -> Result<(), JetStreamError> {
    let other = |what: &str, found: String, wanted: String| {
        Err(JetStreamError::Bucket {
            name,
            problem: format!("its {what} is {found}, and {wanted} was asked for"),
        })
    };
    let (is, config) = (&found.config, wanted);
    if is.num_replicas != config.num_replicas {
        return other("number of replicas", is.num_replicas.to_string(), config.num_replicas.to_string());
    }
    if is.max_age != config.max_age {
        return other("maximum age", format!("{:?}", is.max_age), format!("{:?}", config.max_age));
    }
    if is.max_messages_per_subject != 1 {
        return other("history", is.max_messages_per_subject.to_string(), "1".to_owned());
    }
    if is.storage != config.storage || is.discard != config.discard || is.deny_purge {
        return other(
            "storage",
            "another kind".to_owned(),
            "files, which refuse what is new when they are full, and can be purged".to_owned(),
        );
    }
    if is.subjects != config.subjects {
        return other("subjects", is.subjects.join(","), config.subjects.join(","));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read_from_the_uri() {
        assert_eq!(servers("jetstream://a:4222,b:4223").unwrap(), ["a:4222", "b:4223"]);
        assert_eq!(servers("jetstream://[::1]:4222").unwrap(), ["[::1]:4222"]);
        for bad in [
            "nats://a:1",
            "jetstream://",
            "jetstream://a:1,",
            "jetstream://a/b",
            "jetstream://me:secret@a",
            "jetstream://a:x",
        ] {
            assert!(servers(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_bucket_of_another_shape_is_named_with_both_shapes() {
        let wanted = Config { max_messages_per_subject: 1, num_replicas: 3, ..Config::default() };
        let json = serde_json::json!({
            "config": {"name": "x", "retention": "limits", "discard": "old", "storage": "file", "num_replicas": 1, "max_msgs_per_subject": 1},
            "created": "2024-01-01T00:00:00Z",
            "state": {"messages": 0, "bytes": 0, "first_seq": 0, "first_ts": "2024-01-01T00:00:00Z", "last_seq": 0,
                      "last_ts": "2024-01-01T00:00:00Z", "consumer_count": 0},
            "cluster": null,
        });
        let found: Info = serde_json::from_value(json).unwrap();
        let error = check_bucket("jobs", &wanted, &found).unwrap_err().to_string();
        assert!(error.contains("replicas is 1, and 3"), "{error}");
    }
}
