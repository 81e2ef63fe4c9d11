//! Which addresses a registry may send us to.
//!
//! A token server's realm, an upload's `Location` and a redirect are chosen by the registry, that is by a stranger. A name of
//! theirs must lead to a public address, unless it is the registry's own host or the user allowed it; else a registry could
//! make us ask, say, a cloud's metadata service. The check stands in the resolver of the process that connects, and the
//! addresses that were checked are the ones that are connected to, so a second answer of the DNS changes nothing.
//!
//! Where a proxy is configured, the proxy resolves names and this check sees only literal addresses: the proxy's own rules
//! hold then.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// A network or a host that may be connected to although its addresses are not public.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedNetwork {
    /// All addresses that share the first `prefix` bits with this one.
    Network {
        /// An address of the network.
        address: IpAddr,
        /// How many bits name the network: at most 32, or 128 for IPv6.
        prefix: u8,
    },
    /// Whatever addresses this host has. In lower case, without a port.
    Host(String),
}

/// A text that is neither `ADDRESS/BITS`, nor an address, nor a host name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid network {0:?}: expected ADDRESS/BITS, an address, or a host name")]
pub struct InvalidNetwork(String);

/// A host that must not be connected to.
#[derive(Debug, thiserror::Error)]
#[error("{host} is at {address}, which is not public")]
pub(super) struct Refused {
    pub(super) host: String,
    pub(super) address: IpAddr,
}

/// The rule, with its exceptions.
#[derive(Clone, Debug)]
pub(super) struct Guard(Arc<[AllowedNetwork]>);

impl Guard {
    pub(super) fn new(allowed: &[AllowedNetwork]) -> Self {
        Self(allowed.iter().cloned().chain(proxy_hosts()).collect())
    }

    /// Literal addresses never reach a resolver, so they are looked at here.
    pub(super) fn check_url(&self, url: &Url) -> Result<(), Refused> {
        match url.host() {
            Some(Host::Ipv4(address)) => self.check(url.host_str().unwrap_or(""), address.into()),
            Some(Host::Ipv6(address)) => self.check(url.host_str().unwrap_or(""), address.into()),
            Some(Host::Domain(_)) | None => Ok(()),
        }
    }

    fn check(&self, host: &str, address: IpAddr) -> Result<(), Refused> {
        if is_public(address) || self.0.iter().any(|allowed| allowed.contains(host, address)) {
            Ok(())
        } else {
            Err(Refused { host: host.to_owned(), address })
        }
    }
}

/// A resolver that hands out only addresses that may be connected to.
pub(super) struct GuardedResolver(pub(super) Guard);

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.0.clone();
        Box::pin(async move {
            let host = name.as_str();
            let mut good: Vec<SocketAddr> = Vec::new();
            let mut refused = None;
            for address in tokio::net::lookup_host((host, 0)).await? {
                match guard.check(host, address.ip()) {
                    Ok(()) => good.push(address),
                    Err(error) => refused = Some(error),
                }
            }
            match refused {
                Some(error) if good.is_empty() => Err(error.into()),
                _ => Ok(Box::new(good.into_iter()) as Addrs),
            }
        })
    }
}

impl AllowedNetwork {
    fn contains(&self, host: &str, address: IpAddr) -> bool {
        match self {
            Self::Host(name) => name.eq_ignore_ascii_case(host),
            Self::Network { address: network, prefix } => match (network, unmapped(address)) {
                (IpAddr::V4(network), IpAddr::V4(address)) => {
                    let mask = u32::MAX.checked_shl(32 - u32::from(*prefix)).unwrap_or(0);
                    network.to_bits() & mask == address.to_bits() & mask
                }
                (IpAddr::V6(network), IpAddr::V6(address)) => {
                    let mask = u128::MAX.checked_shl(128 - u32::from(*prefix)).unwrap_or(0);
                    network.to_bits() & mask == address.to_bits() & mask
                }
                _ => false,
            },
        }
    }
}

impl FromStr for AllowedNetwork {
    type Err = InvalidNetwork;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = || InvalidNetwork(text.chars().take(300).collect());
        let (name, prefix) = match text.split_once('/') {
            Some((name, prefix)) => (name, Some(prefix.parse::<u8>().map_err(|_| fail())?)),
            None => (text, None),
        };
        let bare = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
        if let Ok(address) = bare.parse::<IpAddr>() {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            let prefix = prefix.unwrap_or(bits);
            return if prefix <= bits { Ok(Self::Network { address, prefix }) } else { Err(fail()) };
        }
        let is_name = !name.is_empty()
            && name.len() <= 255
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
        if prefix.is_none() && is_name { Ok(Self::Host(name.to_ascii_lowercase())) } else { Err(fail()) }
    }
}

impl fmt::Display for AllowedNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network { address, prefix } => write!(f, "{address}/{prefix}"),
            Self::Host(name) => f.write_str(name),
        }
    }
}

/// Whether an address is anyone's on the Internet: not private, loopback, link-local, shared (RFC 6598), multicast or reserved,
/// and not a metadata service that a cloud has put at a public address.
pub fn is_public(address: IpAddr) -> bool {
    match unmapped(address) {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = address.is_loopback()
        || address.is_private()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_broadcast()
        || address.is_documentation()
        || a == 0
        || a >= 240
        || (a == 100 && (64..128).contains(&b)) // RFC 6598; Alibaba's metadata service is in it
        || (a, b, c) == (192, 0, 0) // RFC 6890; Oracle's metadata service is in it
        || (a == 198 && (b == 18 || b == 19)) // RFC 2544
        || address == Ipv4Addr::new(168, 63, 129, 16); // Azure's platform service
    !special
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let s = address.segments();
    let embedded =
        |high: u16, low: u16| is_public_v4(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)));
    match s {
        // 6to4 (RFC 3056) and NAT64 (RFC 6052) lead to the IPv4 address inside.
        [0x2002, high, low, ..] => embedded(high, low),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        // Of the rest only 2000::/3 is assigned; Teredo and documentation are parts of it.
        [0x2001, 0, ..] | [0x2001, 0xdb8, ..] | [0x3fff, ..] => false,
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

/// `::ffff:a.b.c.d` is a.b.c.d.
fn unmapped(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, IpAddr::V4),
        IpAddr::V4(_) => address,
    }
}

/// Whether a URL's host can only be this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    match bare.parse::<IpAddr>() {
        Ok(address) => unmapped(address).is_loopback(),
        Err(_) => bare.eq_ignore_ascii_case("localhost"),
    }
}

/// The proxies that the environment names: the operator's choice, usually at a private address.
fn proxy_hosts() -> impl Iterator<Item = AllowedNetwork> {
    ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]
        .into_iter()
        .filter_map(|name| std::env::var(name).ok())
        .filter_map(|proxy| {
            let url = if proxy.contains("://") { proxy } else { format!("http://{proxy}") };
            match Url::parse(&url).ok()?.host()? {
                Host::Domain(name) => Some(AllowedNetwork::Host(name.to_ascii_lowercase())),
                Host::Ipv4(_) | Host::Ipv6(_) => None,
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_are_public() {
        for text in [
            "127.0.0.1",
            "10.0.0.1",
            "172.16.3.4",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "100.100.100.200",
            "0.0.0.0",
            "168.63.129.16",
            "192.0.0.192",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "fd00:ec2::254",
            "fc00::1",
            "ff02::1",
            "::ffff:10.0.0.1",
            "::ffff:127.0.0.1",
            "64:ff9b::a00:1",
            "2002:7f00:1::",
            "2001:db8::1",
            "2001:0:1::",
            "fec0::1",
        ] {
            assert!(!is_public(text.parse().unwrap()), "{text}");
        }
        for text in
            ["1.1.1.1", "52.216.0.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::101:101"]
        {
            assert!(is_public(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn networks_and_hosts_can_be_allowed() {
        let guard = |allowed: &str| Guard::new(&[allowed.parse().unwrap()]);
        let private: IpAddr = "10.1.2.3".parse().unwrap();
        for (allowed, host, good) in [
            ("10.0.0.0/8", "x", true),
            ("10.1.2.3", "x", true),
            ("10.1.2.4", "x", false),
            ("0.0.0.0/0", "x", true),
            ("10.1.2.4/31", "x", false),
            ("::/0", "x", false),
            ("Registry.Internal", "registry.internal", true),
            ("registry.internal", "other.internal", false),
        ] {
            assert_eq!(guard(allowed).check(host, private).is_ok(), good, "{allowed}");
        }
        let mapped = "::ffff:10.1.2.3".parse().unwrap();
        assert!(guard("10.0.0.0/8").check("x", mapped).is_ok());
        for bad in ["", "10.0.0.0/33", "::/129", "name/8", "a b", "10.0.0.0/x"] {
            assert!(bad.parse::<AllowedNetwork>().is_err(), "{bad}");
        }
    }

    #[test]
    fn literal_addresses_in_urls_are_checked() {
        let guard = Guard::new(&[]);
        for url in ["http://169.254.169.254/token", "https://[::1]/", "http://2130706433/", "http://0x7f.1/"]
        {
            assert!(guard.check_url(&Url::parse(url).unwrap()).is_err(), "{url}");
        }
        assert!(guard.check_url(&Url::parse("https://1.1.1.1/").unwrap()).is_ok());
    }

    #[tokio::test]
    async fn names_are_checked_once_they_are_resolved() {
        let resolver = GuardedResolver(Guard::new(&[]));
        let error = match resolver.resolve("localhost".parse().unwrap()).await {
            Ok(_) => panic!("localhost was resolved"),
            Err(error) => error,
        };
        assert!(error.downcast_ref::<Refused>().is_some());
        let allowed = GuardedResolver(Guard::new(&["localhost".parse().unwrap()]));
        assert!(allowed.resolve("localhost".parse().unwrap()).await.is_ok());
    }
}
