//! A server for the tests of this module: it answers what a closure says, and can misbehave in ways that real servers do when a
//! test cannot make them.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::super::{Access, Client, ConfigFile, Options, Repository};
use crate::digest::Digest;

/// A request as it came.
#[derive(Clone, Debug)]
pub(in crate::registry) struct Seen {
    pub(in crate::registry) method: String,
    /// Path and query.
    pub(in crate::registry) target: String,
    headers: Vec<(String, String)>,
    pub(in crate::registry) body: Vec<u8>,
}

/// What to answer, and how.
#[derive(Clone, Debug)]
pub(in crate::registry) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Without a Content-Length.
    chunked: bool,
    /// Close the connection after so many bytes of the body.
    cut: Option<usize>,
    /// Wait before the answer.
    delay: Duration,
    /// Wait before each byte of the body.
    drip: Duration,
    /// Close the connection without an answer.
    silent: bool,
}

/// What to do with a request before its body was read.
#[derive(Clone, Copy, Debug)]
pub(in crate::registry) enum Head {
    Read,
    /// Close the connection after so many bytes of the body.
    CutBody(u64),
    /// Take the head and nothing more.
    Stall,
    /// Read the body in pieces of 64 KiB with a pause before each.
    Slow(Duration),
}

type Answer = dyn Fn(&Seen) -> Reply + Send + Sync;
type OnHead = dyn Fn(&Seen) -> Head + Send + Sync;

#[derive(Clone)]
pub(in crate::registry) struct TestServer {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Seen {
    pub(in crate::registry) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// `METHOD path`, without the query.
    pub(in crate::registry) fn line(&self) -> String {
        format!("{} {}", self.method, self.path())
    }

    pub(in crate::registry) fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or("")
    }

    /// The decoded values of a query's parameter.
    pub(in crate::registry) fn query(&self, name: &str) -> Vec<String> {
        let query = self.target.split_once('?').map_or("", |(_, query)| query);
        url::form_urlencoded::parse(query.as_bytes())
            .filter(|(n, _)| n == name)
            .map(|(_, value)| value.into_owned())
            .collect()
    }
}

impl Reply {
    pub(in crate::registry) fn new(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
            chunked: false,
            cut: None,
            delay: Duration::ZERO,
            drip: Duration::ZERO,
            silent: false,
        }
    }

    pub(in crate::registry) fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub(in crate::registry) fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    pub(in crate::registry) fn chunked(mut self) -> Self {
        self.chunked = true;
        self
    }

    pub(in crate::registry) fn cut(mut self, after: usize) -> Self {
        self.cut = Some(after);
        self
    }

    pub(in crate::registry) fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    pub(in crate::registry) fn drip(mut self, pause: Duration) -> Self {
        self.drip = pause;
        self
    }

    /// No answer: the connection is closed.
    pub(in crate::registry) fn none() -> Self {
        Self { silent: true, ..Self::new(0) }
    }
}

impl TestServer {
    pub(in crate::registry) async fn start(answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_with(|_| Head::Read, answer).await
    }

    pub(in crate::registry) async fn start_with(
        head: impl Fn(&Seen) -> Head + Send + Sync + 'static,
        answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self { address: listener.local_addr().unwrap(), seen: Arc::default() };
        let (head, answer, seen): (Arc<OnHead>, Arc<Answer>, _) =
            (Arc::new(head), Arc::new(answer), Arc::clone(&server.seen));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (head, answer, seen) = (Arc::clone(&head), Arc::clone(&answer), Arc::clone(&seen));
                tokio::spawn(async move { serve(stream, &*head, &*answer, &seen).await });
            }
        });
        server
    }

    pub(in crate::registry) fn host(&self) -> String {
        self.address.to_string()
    }

    /// A path on this server.
    pub(in crate::registry) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// The same under a name that is another host's.
    pub(in crate::registry) fn foreign_url(&self, path: &str) -> String {
        format!("http://localhost:{}{path}", self.address.port())
    }

    /// All requests so far but the first look at how the registry is spoken to.
    pub(in crate::registry) fn seen(&self) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap().clone();
        seen.into_iter().filter(|seen| seen.target != "/v2/").collect()
    }

    pub(in crate::registry) fn lines(&self) -> Vec<String> {
        self.seen().iter().map(Seen::line).collect()
    }

    /// The repository `app` of this server, for a client in a hurry.
    pub(in crate::registry) fn repository(&self, options: Options) -> Repository {
        let reference = format!("{}/app", self.host()).parse().unwrap();
        Client::new(options).unwrap().repository(&reference, Access::Push)
    }
}

/// Options without the user's configuration, and without long waits.
pub(in crate::registry) fn options() -> Options {
    Options {
        docker_config: ConfigFile::None,
        backoff: Duration::from_millis(2),
        read_timeout: Duration::from_secs(5),
        ..Options::default()
    }
}

/// Bytes that do not repeat early, and their digest.
pub(in crate::registry) fn content(size: usize) -> (Vec<u8>, Digest) {
    let mut random = fastrand::Rng::with_seed(size as u64);
    let bytes: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(size).collect();
    let digest = Digest::sha256(&bytes);
    (bytes, digest)
}

async fn serve(stream: TcpStream, head: &OnHead, answer: &Answer, seen: &Mutex<Vec<Seen>>) -> Option<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut request = read_head(&mut stream).await?;
        let length = request.header("content-length").map_or(0, |length| length.parse().unwrap());
        match head(&request) {
            Head::Read => {}
            Head::Slow(pause) => {
                while (request.body.len() as u64) < length {
                    tokio::time::sleep(pause).await;
                    let piece = (64 * 1024).min(length - request.body.len() as u64);
                    (&mut stream).take(piece).read_to_end(&mut request.body).await.ok()?;
                }
            }
            Head::CutBody(after) => {
                let mut taken = (&mut stream).take(after);
                taken.read_to_end(&mut request.body).await.ok()?;
                seen.lock().unwrap().push(request);
                return None;
            }
            Head::Stall => {
                seen.lock().unwrap().push(request);
                return std::future::pending().await;
            }
        }
        if request.header("transfer-encoding").is_some() {
            panic!("a body without a length: {request:?}");
        }
        let rest = length - request.body.len() as u64;
        (&mut stream).take(rest).read_to_end(&mut request.body).await.ok()?;
        if (request.body.len() as u64) < length {
            return None;
        }
        let reply = answer(&request);
        let is_head = request.method == "HEAD";
        seen.lock().unwrap().push(request);
        tokio::time::sleep(reply.delay).await;
        if reply.silent {
            return None;
        }
        write(&mut stream, &reply, is_head).await?;
        if reply.cut.is_some() {
            return None;
        }
    }
}

async fn read_head(stream: &mut BufReader<TcpStream>) -> Option<Seen> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
        // The first byte of TLS. Servers without it answer in the only way they know.
        if head == [0x16] {
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.ok()?;
            return None;
        }
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let mut words = lines.next()?.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    Some(Seen { method, target, headers, body: Vec::new() })
}

async fn write(stream: &mut BufReader<TcpStream>, reply: &Reply, is_head: bool) -> Option<()> {
    let mut head = format!("HTTP/1.1 {} X\r\n", reply.status);
    for (name, value) in &reply.headers {
        write!(head, "{name}: {value}\r\n").unwrap();
    }
    let named = |name: &str| reply.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
    if reply.chunked {
        head.push_str("Transfer-Encoding: chunked\r\n");
    } else if !named("content-length") && reply.status != 204 {
        write!(head, "Content-Length: {}\r\n", reply.body.len()).unwrap();
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await.ok()?;
    let body = &reply.body[..reply.cut.unwrap_or(reply.body.len())];
    if is_head {
        return Some(());
    }
    if reply.chunked {
        if !body.is_empty() {
            stream.write_all(format!("{:x}\r\n", body.len()).as_bytes()).await.ok()?;
            stream.write_all(body).await.ok()?;
            stream.write_all(b"\r\n").await.ok()?;
        }
        if reply.cut.is_none() {
            stream.write_all(b"0\r\n\r\n").await.ok()?;
        }
    } else if reply.drip.is_zero() {
        stream.write_all(body).await.ok()?;
    } else {
        for byte in body {
            stream.write_all(&[*byte]).await.ok()?;
            stream.flush().await.ok()?;
            tokio::time::sleep(reply.drip).await;
        }
    }
    stream.flush().await.ok()?;
    Some(())
}
