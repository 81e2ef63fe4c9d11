//! HTTP/1.1 as plainly as it goes, written to the socket: a server that can misbehave on purpose, and a client.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// A request, whole.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Such as `GET`.
    pub method: String,
    /// The path with its query.
    pub path: String,
    /// In order.
    pub headers: Vec<(String, String)>,
    /// The body, however it was framed.
    pub body: Vec<u8>,
}

/// A response, whole, and how it is to be delivered.
#[derive(Clone, Debug, Default)]
pub struct Response {
    /// Such as 200.
    pub status: u16,
    /// In order. `Content-Length` is added when it is missing.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
    /// What goes wrong on the way.
    pub delivery: Delivery,
}

/// How a response gets to the client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Delivery {
    /// As it should.
    #[default]
    Whole,
    /// The connection is closed after so many bytes of the body.
    Truncated(usize),
    /// The connection is reset after so many bytes of the body; with `None`, before the head.
    Reset(Option<usize>),
    /// In so many pieces, with a pause after each.
    Slow(usize, Duration),
}

/// A header's first value.
fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

impl Request {
    /// A request without headers or a body.
    pub fn new(method: &str, path: &str) -> Self {
        Self { method: method.to_owned(), path: path.to_owned(), ..Self::default() }
    }

    /// With one more header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With a body.
    #[must_use]
    pub fn body(mut self, body: &[u8]) -> Self {
        self.body = body.to_vec();
        self
    }

    /// A header's first value.
    pub fn get(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// Takes a header away.
    pub fn remove(&mut self, name: &str) {
        self.headers.retain(|(key, _)| !key.eq_ignore_ascii_case(name));
    }

    /// Values of a query parameter, percent-decoded.
    pub fn query(&self, name: &str) -> Vec<String> {
        let query = self.path.split_once('?').map(|(_, query)| query).unwrap_or_default();
        pairs(query).into_iter().filter(|(key, _)| key == name).map(|(_, value)| value).collect()
    }

    /// Sends it on a connection of its own and waits for the whole response.
    pub fn send(&self, address: &str) -> io::Result<Response> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.path);
        if self.get("host").is_none() {
            head += &format!("Host: {address}\r\n");
        }
        for (name, value) in &self.headers {
            if !["connection", "content-length", "transfer-encoding"]
                .contains(&name.to_ascii_lowercase().as_str())
            {
                head += &format!("{name}: {value}\r\n");
            }
        }
        head += &format!("Content-Length: {}\r\nConnection: close\r\n\r\n", self.body.len());
        stream.write_all(head.as_bytes())?;
        stream.write_all(&self.body)?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        Response::parse(&bytes, &self.method)
    }
}

/// The pairs of a query or a form, percent-decoded.
pub fn pairs(text: &str) -> Vec<(String, String)> {
    let decode = |text: &str| {
        let mut bytes = Vec::new();
        let mut rest = text.as_bytes();
        while let Some((&first, tail)) = rest.split_first() {
            let escaped = (first == b'%').then(|| tail.get(..2)).flatten();
            match escaped.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()) {
                Some(byte) => {
                    bytes.push(byte);
                    rest = &tail[2..];
                }
                None => {
                    bytes.push(if first == b'+' { b' ' } else { first });
                    rest = tail;
                }
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    text.split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (decode(key), decode(value)))
        .collect()
}

impl Response {
    /// An answer without a body.
    pub fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    /// 200 with a body of the media type.
    pub fn ok(media_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self { body: body.into(), ..Self::status(200) }.header("Content-Type", media_type)
    }

    /// With another status.
    #[must_use]
    pub fn status_of(self, status: u16) -> Self {
        Self { status, ..self }
    }

    /// With a header added.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With another body, of its own length.
    #[must_use]
    pub fn with_body(mut self, body: Vec<u8>) -> Self {
        self.headers.retain(|(key, _)| !key.eq_ignore_ascii_case("content-length"));
        Self { body, ..self }
    }

    /// With a header in place of those of the same name.
    #[must_use]
    pub fn replace(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(key, _)| !key.eq_ignore_ascii_case(name));
        self.header(name, value)
    }

    /// A header's first value.
    pub fn get(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    fn parse(bytes: &[u8], method: &str) -> io::Result<Self> {
        let broken = || io::Error::new(io::ErrorKind::UnexpectedEof, "broken response");
        let end = find(bytes, b"\r\n\r\n").ok_or_else(broken)?;
        let (line, headers) = parse_head(&bytes[..end]).ok_or_else(broken)?;
        let status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(broken)?;
        let rest = &bytes[end + 4..];
        let chunked = header(&headers, "transfer-encoding").is_some_and(|value| value.contains("chunked"));
        let body = if method == "HEAD" {
            Vec::new()
        } else if chunked {
            let mut reader = rest;
            read_chunks(&mut reader)?
        } else {
            match header(&headers, "content-length").and_then(|length| length.parse::<usize>().ok()) {
                Some(length) => rest.get(..length).ok_or_else(broken)?.to_vec(),
                None => rest.to_vec(),
            }
        };
        Ok(Self { status, headers, body, delivery: Delivery::Whole })
    }

    fn write(&self, stream: &mut TcpStream, method: &str) -> io::Result<()> {
        if self.delivery == Delivery::Reset(None) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let mut head = format!("HTTP/1.1 {} Test\r\n", self.status);
        for (name, value) in &self.headers {
            if !["connection", "transfer-encoding"].contains(&name.to_ascii_lowercase().as_str()) {
                head += &format!("{name}: {value}\r\n");
            }
        }
        if self.get("content-length").is_none() && self.status != 204 {
            head += &format!("Content-Length: {}\r\n", self.body.len());
        }
        head += "\r\n";
        stream.write_all(head.as_bytes())?;
        if method == "HEAD" {
            return Ok(());
        }
        match self.delivery {
            Delivery::Whole => stream.write_all(&self.body),
            Delivery::Truncated(at) | Delivery::Reset(Some(at)) => {
                stream.write_all(&self.body[..at.min(self.body.len())])?;
                // What was sent must arrive before the connection goes.
                thread::sleep(Duration::from_millis(20));
                Err(io::ErrorKind::ConnectionReset.into())
            }
            Delivery::Slow(pieces, pause) => {
                for piece in self.body.chunks(self.body.len().div_ceil(pieces).max(1)) {
                    stream.write_all(piece)?;
                    thread::sleep(pause);
                }
                Ok(())
            }
            Delivery::Reset(None) => Ok(()),
        }
    }
}

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
        let handler: Arc<Handler> = Arc::new(handler);
        let server = Self { address, stopped: Arc::clone(&stopped), seen: Arc::clone(&seen) };
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (handler, seen) = (Arc::clone(&handler), Arc::clone(&seen));
                // The error is that the client went away, or that this server was told to.
                thread::spawn(move || drop(serve(stream, &*handler, &seen)));
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

    /// How many requests so far fit.
    pub fn count(&self, method: &str, pattern: &str) -> usize {
        self.seen().iter().filter(|seen| seen.is(method, pattern)).count()
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

fn serve(mut stream: TcpStream, handler: &Handler, seen: &Mutex<Vec<Seen>>) -> io::Result<()> {
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
        response.write(&mut stream, &method).or_else(|error| {
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
        // A client that tries TLS first is told at once that there is none.
        if length == 0 || window[0] == 0x16 {
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

/// Reads a chunked body up to, but not including, its very last byte.
fn read_chunks(reader: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            reader.read_exact(&mut byte)?;
            line.push(byte[0]);
        }
        let text = String::from_utf8_lossy(&line);
        let size = usize::from_str_radix(text.trim().split(';').next().unwrap_or_default(), 16)
            .map_err(|_| io::ErrorKind::InvalidData)?;
        if size == 0 {
            reader.read_exact(&mut [0])?;
            return Ok(body);
        }
        let start = body.len();
        body.resize(start + size, 0);
        reader.read_exact(&mut body[start..])?;
        reader.read_exact(&mut [0; 2])?;
    }
}

fn parse_head(head: &[u8]) -> Option<(String, Vec<(String, String)>)> {
    let text = String::from_utf8_lossy(head);
    let mut lines = text.split("\r\n");
    let line = lines.next()?.to_owned();
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
        .collect();
    Some((line, headers))
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}
