//! HTTP/1.1 as plainly as it goes: requests, responses, and a client. [`crate::server`] is the other side.

use std::io::{self, Read, Write};
use std::net::TcpStream;
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
pub(crate) fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
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

    pub(crate) fn write(&self, stream: &mut impl Write, method: &str) -> io::Result<()> {
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

/// Reads a chunked body up to, but not including, its very last byte.
pub(crate) fn read_chunks(reader: &mut impl Read) -> io::Result<Vec<u8>> {
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

pub(crate) fn parse_head(head: &[u8]) -> Option<(String, Vec<(String, String)>)> {
    let text = String::from_utf8_lossy(head);
    let mut lines = text.split("\r\n");
    let line = lines.next()?.to_owned();
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
        .collect();
    Some((line, headers))
}

pub(crate) fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}
