//! A relay of TCP connections that can be cut while they are used, as by a load balancer that is replaced.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// The relay, on a loopback port, two threads a connection; it ends with the value.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    stopped: AtomicBool,
    /// Whether connections are ended as they come.
    refuses: AtomicBool,
    /// Both sides of each connection.
    open: Mutex<Vec<TcpStream>>,
}

impl Relay {
    /// Before the server at `upstream`.
    pub fn before(upstream: &str) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free loopback port");
        let address = listener.local_addr().expect("a bound address");
        let shared = Arc::<Shared>::default();
        let (here, upstream) = (Arc::clone(&shared), upstream.to_owned());
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if here.stopped.load(Ordering::Relaxed) {
                    return;
                }
                if !here.refuses.load(Ordering::Relaxed) {
                    // The error is that the other side is not there.
                    drop(here.join(stream, &upstream));
                }
            }
        });
        Self { address, shared }
    }

    /// `http://IP:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        for stream in self.shared.open.lock().expect("no thread panics").drain(..) {
            // One that has ended needs no cut.
            drop(stream.shutdown(Shutdown::Both));
        }
    }

    /// Cuts all connections, and those that come until [`accept`](Self::accept).
    pub fn refuse(&self) {
        self.shared.refuses.store(true, Ordering::Relaxed);
        self.cut();
    }

    /// Lets connections through again.
    pub fn accept(&self) {
        self.shared.refuses.store(false, Ordering::Relaxed);
    }
}

impl Shared {
    fn join(&self, stream: TcpStream, upstream: &str) -> io::Result<()> {
        let other = TcpStream::connect(upstream)?;
        let mut open = self.open.lock().expect("no thread panics");
        open.extend([stream.try_clone()?, other.try_clone()?]);
        for (mut from, mut to) in [(stream.try_clone()?, other.try_clone()?), (other, stream)] {
            thread::spawn(move || {
                drop(io::copy(&mut from, &mut to));
                drop(to.shutdown(Shutdown::Write));
            });
        }
        Ok(())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        self.cut();
        // Wakes who waits for the next one.
        drop(TcpStream::connect(self.address));
    }
}
