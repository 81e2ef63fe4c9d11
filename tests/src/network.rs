//! A network of this machine's own, whose nodes have an address each, and whose packets from one node to another can be lost.
//!
//! Each node is a network namespace with one link to a switch, which stands in a namespace too: no rule that this machine has for
//! its own packets reaches them. The tests themselves have the first address.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::tools::{run, tool};

/// The network. It ends with the value, when the processes on its nodes have.
#[derive(Debug)]
pub struct Network {
    /// What the names of its namespaces begin with.
    name: String,
    /// The first three numbers of its addresses.
    prefix: String,
    nodes: u32,
}

/// One node of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    namespace: String,
    ip: String,
}

/// Which packets are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Those that the first sends to the second.
    There,
    /// Those that the second sends to the first.
    Back,
    /// Both.
    All,
}

impl Network {
    /// One without nodes; None, which is said, where this user may make none.
    pub fn start(test: &str) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let id = std::process::id();
        let name = format!("oc{id}n{number}");
        let switch = format!("{name}-switch");
        let made = run("ip", ["netns", "add", &switch], b"");
        let rules = ["netns", "exec", &switch, "iptables", "--wait", "--list"];
        for tried in [made, run("ip", rules, b"")] {
            if !tried.status.success() {
                eprintln!("NOT RUN: {test}: {}", String::from_utf8_lossy(&tried.stderr).trim());
                drop(run("ip", ["netns", "del", &switch], b""));
                return None;
            }
        }
        // Other runs, and what one has left behind that was killed, may have some.
        let taken = tool("ip", ["-oneline", "addr"]);
        let prefixes = (0..256).map(|at| format!("10.213.{}", (id * 8 + number + at) % 256));
        let mut free = prefixes.filter(|prefix| !taken.contains(&format!(" {prefix}.1/")));
        let prefix = free.next().expect("a range of addresses that nobody has");
        let network = Self { name, prefix, nodes: 1 };
        let host = network.host();
        ip(&["-n", &switch, "link", "add", "dev", "switch", "type", "bridge"]);
        ip(&["-n", &switch, "link", "set", "dev", "switch", "up"]);
        ip(&["link", "add", "dev", &host, "type", "veth", "peer", "name", "port1", "netns", &switch]);
        ip(&["-n", &switch, "link", "set", "dev", "port1", "master", "switch", "up"]);
        ip(&["addr", "add", &format!("{}.1/24", network.prefix), "dev", &host]);
        ip(&["link", "set", "dev", &host, "up"]);
        Some(network)
    }

    /// This machine's own link: names of links are short.
    fn host(&self) -> String {
        self.name.clone()
    }

    /// All its addresses, as `ADDRESS/BITS`.
    pub fn range(&self) -> String {
        format!("{}.0/24", self.prefix)
    }

    /// Another node.
    pub fn node(&mut self) -> Node {
        self.nodes += 1;
        let number = self.nodes;
        let (switch, port) = (format!("{}-switch", self.name), format!("port{number}"));
        let namespace = format!("{}-{number}", self.name);
        let ip_address = format!("{}.{number}", self.prefix);
        ip(&["netns", "add", &namespace]);
        ip(&["-n", &namespace, "link", "set", "dev", "lo", "up"]);
        ip(&[
            "-n", &namespace, "link", "add", "dev", "eth0", "type", "veth", "peer", "name", &port, "netns",
            &switch,
        ]);
        ip(&["-n", &switch, "link", "set", "dev", &port, "master", "switch", "up"]);
        ip(&["-n", &namespace, "addr", "add", &format!("{ip_address}/24"), "dev", "eth0"]);
        ip(&["-n", &namespace, "link", "set", "dev", "eth0", "up"]);
        Node { namespace, ip: ip_address }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for number in 2..=self.nodes {
            drop(run("ip", ["netns", "del", &format!("{}-{number}", self.name)], b""));
        }
        // With the switch this machine's own link goes.
        drop(run("ip", ["netns", "del", &format!("{}-switch", self.name)], b""));
    }
}

impl Node {
    /// Its address.
    pub fn ip(&self) -> &str {
        &self.ip
    }

    /// A program that is started on it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, program]);
        command
    }

    /// Packets between it and another node are lost from now on.
    pub fn cut(&self, other: &Self, lost: Lost) {
        self.rule("-A", other, lost);
    }

    /// Undoes that very cut.
    pub fn join(&self, other: &Self, lost: Lost) {
        self.rule("-D", other, lost);
    }

    fn rule(&self, action: &str, other: &Self, lost: Lost) {
        let ends = match lost {
            Lost::There => &[(self, other)][..],
            Lost::Back => &[(other, self)],
            Lost::All => &[(self, other), (other, self)],
        };
        for (from, to) in ends {
            let rule = [
                "netns",
                "exec",
                &to.namespace,
                "iptables",
                "--wait",
                action,
                "INPUT",
                "-s",
                &from.ip,
                "-j",
                "DROP",
            ];
            ip(&rule);
        }
    }
}

fn ip(arguments: &[&str]) {
    tool("ip", arguments);
}
