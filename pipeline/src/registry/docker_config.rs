//! Docker's `config.json`: which entry or helper is a host's (`cli/config/configfile`).

use std::collections::HashMap;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;

use super::credentials::Credentials;
use crate::reference;

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Config {
    auths: HashMap<String, Entry>,
    creds_store: Option<String>,
    cred_helpers: HashMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lookup {
    Credentials(Credentials),
    Helper(String),
    Unusable,
    Nothing,
}

impl Config {
    /// A host's own helper comes first, then what stands in the file, then the common store.
    pub(super) fn lookup(&self, host: &str) -> Lookup {
        if let Some(helper) = find_host(&self.cred_helpers, host).filter(|helper| !helper.is_empty()) {
            return Lookup::Helper(helper.clone());
        }
        match find_host(&self.auths, host).map(Entry::credentials) {
            Some(Ok(Some(credentials))) => return Lookup::Credentials(credentials),
            Some(Err(Undecodable)) => return Lookup::Unusable,
            // An entry without content says that the store has it.
            Some(Ok(None)) | None => {}
        }
        match self.creds_store.as_ref().filter(|store| !store.is_empty()) {
            Some(store) => Lookup::Helper(store.clone()),
            None => Lookup::Nothing,
        }
    }
}

/// An entry by its exact key, else by the host in a key that is a URL.
fn find_host<'a, T>(entries: &'a HashMap<String, T>, host: &str) -> Option<&'a T> {
    let names = [reference::credentials_key(host), host, reference::registry_host(host)];
    if let Some(entry) = names.iter().find_map(|name| entries.get(*name)) {
        return Some(entry);
    }
    let host_of = |key: &'a str| {
        let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
        key.split_once('/').map_or(key, |(host, _)| host)
    };
    let mut keys: Vec<_> = entries.keys().collect();
    keys.sort(); // The same key on every run.
    keys.into_iter()
        .find(|key| {
            let key = host_of(key);
            key.eq_ignore_ascii_case(host)
                || (host == "docker.io" && matches!(key, "index.docker.io" | "registry-1.docker.io"))
        })
        .and_then(|key| entries.get(key))
}

struct Undecodable;

impl Entry {
    fn credentials(&self) -> Result<Option<Credentials>, Undecodable> {
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = given(&self.registrytoken) {
            return Ok(Some(Credentials::RegistryToken(token.into())));
        }
        let (username, password) = match given(&self.auth) {
            Some(auth) => decode_auth(&auth)?,
            None => (given(&self.username).unwrap_or_default(), given(&self.password).unwrap_or_default()),
        };
        if let Some(token) = given(&self.identitytoken) {
            return Ok(Some(Credentials::IdentityToken { username, token: token.into() }));
        }
        if username.is_empty() && password.is_empty() {
            return Ok(None);
        }
        Ok(Some(Credentials::Basic { username, password: password.into() }))
    }
}

fn decode_auth(auth: &str) -> Result<(String, String), Undecodable> {
    const LENIENT: GeneralPurpose = GeneralPurpose::new(
        &alphabet::STANDARD,
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    let decoded = LENIENT.decode(auth.trim()).map_err(|_| Undecodable)?;
    let decoded = String::from_utf8(decoded).map_err(|_| Undecodable)?;
    let (username, password) = decoded.split_once(':').ok_or(Undecodable)?;
    // Docker pads with NULs and cuts them off again.
    Ok((username.to_owned(), password.trim_end_matches('\0').to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(config: &str, host: &str) -> Lookup {
        serde_json::from_str::<Config>(config).unwrap().lookup(host)
    }

    fn basic(username: &str, password: &str) -> Lookup {
        Lookup::Credentials(Credentials::Basic {
            username: username.to_owned(),
            password: password.to_owned().into(),
        })
    }

    #[test]
    fn entries_are_found_by_host_however_docker_wrote_the_key() {
        let auth = "dXNlcjpwYXNzOndvcmQ="; // user:pass:word
        for (key, host) in [
            ("localhost:5000", "localhost:5000"),
            ("https://localhost:5000", "localhost:5000"),
            ("http://localhost:5000/v2/", "localhost:5000"),
            ("https://index.docker.io/v1/", "docker.io"),
            ("docker.io", "docker.io"),
            ("registry-1.docker.io", "docker.io"),
            ("index.docker.io", "docker.io"),
        ] {
            let config = format!(r#"{{"auths":{{"{key}":{{"auth":"{auth}"}}}}}}"#);
            assert_eq!(lookup(&config, host), basic("user", "pass:word"), "{key}");
            assert_eq!(lookup(&config, "elsewhere.example"), Lookup::Nothing, "{key}");
        }
    }

    #[test]
    fn a_hosts_helper_comes_before_its_entry_and_the_store_after_it() {
        let config = r#"{
            "auths": {"a.example": {"username": "u", "password": "p"}, "b.example": {}},
            "credsStore": "store", "credHelpers": {"c.example": "own"}, "HttpHeaders": {"x": "y"}}"#;
        assert_eq!(lookup(config, "a.example"), basic("u", "p"));
        assert_eq!(lookup(config, "b.example"), Lookup::Helper("store".to_owned()));
        assert_eq!(lookup(config, "c.example"), Lookup::Helper("own".to_owned()));
        assert_eq!(lookup(r#"{"auths":{"b.example":{}}}"#, "b.example"), Lookup::Nothing);
    }

    #[test]
    fn tokens_and_broken_entries_are_told_apart() {
        let identity = r#"{"auths":{"x.io":{"auth":"PHRva2VuPjo=","identitytoken":"id"}}}"#;
        assert_eq!(
            lookup(identity, "x.io"),
            Lookup::Credentials(Credentials::IdentityToken {
                username: "<token>".to_owned(),
                token: "id".to_owned().into()
            })
        );
        let registry = r#"{"auths":{"x.io":{"registrytoken":"t"}}}"#;
        assert_eq!(
            lookup(registry, "x.io"),
            Lookup::Credentials(Credentials::RegistryToken("t".to_owned().into()))
        );
        assert_eq!(lookup(r#"{"auths":{"x.io":{"auth":"!"}}}"#, "x.io"), Lookup::Unusable);
    }
}
