//! Keys and certificates, made by `openssl` once a test run.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tempfile::TempDir;

use crate::tools::tool;

/// A certificate authority, a server's certificate for 127.0.0.1 and localhost, a client's, and a key that signs tokens.
#[derive(Debug)]
pub struct Certificates {
    directory: TempDir,
}

impl Certificates {
    /// The ones of this test run.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Certificates> = OnceLock::new();
        SHARED.get_or_init(Self::make)
    }

    /// `NAME.crt` or `NAME.key` of `ca`, `server`, `client`, `token`, and of `self` and `other`: self-signed certificates for
    /// localhost alone, as `openssl req -x509` makes them, which say that they are authorities'.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn make() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| text(&directory.path().join(name));
        let ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
        let request = |name: &str, key: &[&str], more: &[&str]| {
            let (key_file, subject) = (at(&format!("{name}.key")), format!("/CN=occy test {name}"));
            let fixed = ["req", "-batch", "-subj", &subject, "-keyout", &key_file];
            tool("openssl", [&fixed[..], key, more].concat());
        };
        let days = ["-x509", "-days", "2", "-out"];
        request("ca", &ec, &[&days[..], &[&at("ca.crt")]].concat());
        request("token", &["-newkey", "rsa:2048", "-nodes"], &[&days[..], &[&at("token.crt")]].concat());
        for name in ["self", "other"] {
            let more = [
                &at(&format!("{name}.crt")),
                "-subj",
                "/CN=localhost",
                "-addext",
                "subjectAltName=DNS:localhost",
            ];
            request(name, &ec, &[&days[..], &more].concat());
        }
        for (name, extension) in [
            ("server", "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth\n"),
            ("client", "extendedKeyUsage=clientAuth\n"),
        ] {
            request(name, &ec, &["-out", &at(&format!("{name}.csr"))]);
            let extensions = at(&format!("{name}.ext"));
            crate::tools::write(&extensions, extension);
            let (csr, crt) = (at(&format!("{name}.csr")), at(&format!("{name}.crt")));
            let (ca, ca_key) = (at("ca.crt"), at("ca.key"));
            let sign = ["x509", "-req", "-days", "2", "-CAcreateserial", "-in", &csr, "-out", &crt];
            tool("openssl", [&sign[..], &["-CA", &ca, "-CAkey", &ca_key, "-extfile", &extensions]].concat());
        }
        Self { directory }
    }
}

/// A path as text.
pub fn text(path: &Path) -> String {
    path.to_str().expect("temporary paths are UTF-8").to_owned()
}
