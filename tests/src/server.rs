//! A server that can misbehave on purpose, and remembers what it was asked.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::http::{Delivery, Request, Response, find, header, parse_head, read_chunks};

/// A request that a server answered.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The request without its body.
    pub request: Request,
    /// How long the body was.
    pub body: usize,
    /// What was answered.
    pub status: u16,
}

impl Seen {
    /// Whether it is of the method and its path without the query fits the pattern, in which `*` stands for anything.
    pub fn is(&self, method: &str, pattern: &str) -> bool {
        fits(&self.request, method, pattern)
    }
}

/// Whether a request is of the method (`*` for any) and its path without the query fits the pattern.
pub fn fits(request: &Request, method: &str, pattern: &str) -> bool {
    let path = request.path.split('?').next().unwrap_or_default();
    (method == "*" || request.method == method) && wildcard(pattern, path)
}

fn wildcard(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, tail)) => text.strip_prefix(head).is_some_and(|rest| {
            (0..=rest.len()).filter(|at| rest.is_char_boundary(*at)).any(|at| wildcard(tail, &rest[at..]))
        }),
    }
}

type Handler = dyn Fn(&Request) -> Response + Send + Sync;

/// A server on a loopback port, a thread a connection; it ends with the value.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stopped: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Seen>>>,
    sent: Arc<AtomicU64>,
}

impl Server {
    /// Starts to serve on 127.0.0.1.
    pub fn start(handler: impl Fn(&Request) -> Response + Send + Sync + 'static) -> Self {
        Self::start_on("127.0.0.1", handler)
    }

    /// Starts to serve on the address, on a port that is free.
    pub fn start_on(ip: &str, handler: impl Fn(&Request) -> Response + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((ip, 0)).expect("a free loopback port");
        let address = listener.local_addr().expect("a bound address");
        let (stopped, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (handler, sent): (Arc<Handler>, _) = (Arc::new(handler), Arc::<AtomicU64>::default());
        let server =
            Self { address, stopped: Arc::clone(&stopped), seen: Arc::clone(&seen), sent: Arc::clone(&sent) };
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (handler, seen, sent) = (Arc::clone(&handler), Arc::clone(&seen), Arc::clone(&sent));
                // The error is that the client went away, or that this server was told to.
                thread::spawn(move || drop(serve(stream, &*handler, &seen, &sent)));
            }
        });
        server
    }

    /// `IP:PORT`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// All requests so far, in the order of their answers.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no handler panics").clone()
    }

    /// The requests so far, a line each: method, path without its query, length of the body, status.
    pub fn story(&self) -> String {
        let line = |seen: Seen| {
            let path = seen.request.path.split('?').next().unwrap_or_default().to_owned();
            format!("{} {path} ({} bytes): {}\n", seen.request.method, seen.body, seen.status)
        };
        self.seen().into_iter().map(line).collect()
    }

    /// How many requests so far fit.
    pub fn count(&self, method: &str, pattern: &str) -> usize {
        self.seen().iter().filter(|seen| seen.is(method, pattern)).count()
    }

    /// How many bytes of answers clients have taken so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Forgets the requests so far.
    pub fn forget(&self) {
        self.seen.lock().expect("no handler panics").clear();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        drop(TcpStream::connect(self.address));
    }
}

/// A stream whose bytes are counted.
struct Counted<'a>(&'a mut TcpStream, &'a AtomicU64);

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.0.write(bytes)?;
        self.1.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn serve(
    mut stream: TcpStream,
    handler: &Handler,
    seen: &Mutex<Vec<Seen>>,
    sent: &AtomicU64,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let Some(request) = read_request(&mut stream)? else { return Ok(()) };
        let response = handler(&request);
        let body = request.body.len();
        let method = request.method.clone();
        let is_last = request.get("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        seen.lock().expect("no handler panics").push(Seen {
            request: Request { body: Vec::new(), ..request },
            body,
            status: response.status,
        });
        // An error here drops the stream with a byte unread, which resets the connection instead of closing it.
        response.write(&mut Counted(&mut stream, sent), &method).or_else(|error| {
            if matches!(response.delivery, Delivery::Truncated(_)) {
                stream.read_exact(&mut [0])?;
            }
            Err(error)
        })?;
        stream.read_exact(&mut [0])?;
        if is_last {
            return Ok(());
        }
    }
}

/// Reads all of a request but its last byte, which stays in the kernel until the answer is out.
fn read_request(stream: &mut TcpStream) -> io::Result<Option<Request>> {
    let mut window = vec![0; 64 * 1024];
    let end = loop {
        let length = stream.peek(&mut window)?;
        if length == 0 {
            return Ok(None);
        }
        // What real servers say to a client that tries TLS.
        if window[0] == 0x16 {
            stream.read_exact(&mut window[..length])?;
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")?;
            return Ok(None);
        }
        if let Some(end) = find(&window[..length], b"\r\n\r\n") {
            break end;
        }
        thread::sleep(Duration::from_millis(1));
    };
    let (line, headers) = parse_head(&window[..end]).ok_or(io::ErrorKind::InvalidData)?;
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let chunked = header(&headers, "transfer-encoding").is_some_and(|value| value.contains("chunked"));
    let length = header(&headers, "content-length").and_then(|length| length.parse().ok()).unwrap_or(0_usize);
    let body = if chunked {
        stream.read_exact(&mut window[..end + 4])?;
        read_chunks(stream)?
    } else if length > 0 {
        stream.read_exact(&mut window[..end + 4])?;
        let mut body = vec![0; length];
        stream.read_exact(&mut body[..length - 1])?;
        stream.peek(&mut body[length - 1..])?;
        body
    } else {
        stream.read_exact(&mut window[..end + 3])?;
        Vec::new()
    };
    Ok(Some(Request { method, path, headers, body }))
}
