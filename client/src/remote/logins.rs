//! What the coordinator logs in to registries with: what this process would log in with itself.
//!
//! It goes to the coordinator with the call, over a connection that nobody can read, for the registries that the call names.

use occy_pipeline::mirror::config::Config;
use occy_pipeline::open;
use occy_pipeline::reference::Reference;
use occy_pipeline::registry::{Credentials, Options};
use occy_pipeline::wire::convert;
use occy_proto::v1::RegistryCredentials;

use super::connect::Coordinator;
use crate::options::Global;
use crate::settings::{Misused, settings};

/// Whose credentials are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// Those of the command line and its variables, else docker's.
    All,
    /// Those of the command line and its variables: a coordinator that keeps no secrets refuses jobs with any, so that none
    /// are given that were not meant.
    Given,
}

/// For the registries among a call's ends.
pub(crate) async fn logins(
    global: &Global,
    coordinator: &Coordinator,
    source: &str,
    destination: Option<&str>,
    which: Which,
) -> anyhow::Result<Vec<RegistryCredentials>> {
    let settings = settings(global, source, destination)?;
    let ends = [(Some(source), &settings.source_registry), (destination, &settings.destination_registry)];
    let mut logins: Vec<RegistryCredentials> = Vec::new();
    for (uri, options) in ends {
        let reference = uri.and_then(|uri| uri.strip_prefix("registry://"));
        let name = reference.and_then(|text| text.split('?').next()).unwrap_or_default();
        let Ok(reference) = name.parse::<Reference>() else { continue };
        let host = reference.host();
        let Some(credentials) = credentials(options, host, coordinator, which).await? else { continue };
        add(&mut logins, host, credentials)?;
    }
    Ok(logins)
}

/// For the registries of a mirror, as which the command line and its variables say.
pub(crate) async fn logins_of_mirror(
    global: &Global,
    coordinator: &Coordinator,
    config: &Config,
) -> anyhow::Result<Vec<RegistryCredentials>> {
    let settings = settings(global, "registry://", Some("registry://"))?;
    let ends = [
        (config.source_hosts(), &settings.source_registry),
        (config.target_hosts(), &settings.destination_registry),
    ];
    let mut logins = Vec::new();
    for (hosts, options) in ends {
        for host in hosts {
            if let Some(credentials) = credentials(options, &host, coordinator, Which::Given).await? {
                add(&mut logins, &host, credentials)?;
            }
        }
    }
    Ok(logins)
}

fn add(logins: &mut Vec<RegistryCredentials>, host: &str, credentials: Credentials) -> Result<(), Misused> {
    let one = RegistryCredentials { host: host.to_owned(), login: Some(convert::login(credentials)) };
    match logins.iter().find(|earlier| earlier.host == host) {
        None => logins.push(one),
        Some(earlier) if *earlier == one => {}
        Some(_) => {
            let problem = format!("a coordinator can log in to {host} as one user only, and two are given");
            return Err(Misused(problem));
        }
    }
    Ok(())
}

/// For the registry of a place whose names are listed, which may be a registry as a whole.
pub(crate) async fn logins_of_place(
    global: &Global,
    coordinator: &Coordinator,
    place: &str,
) -> anyhow::Result<Vec<RegistryCredentials>> {
    let Some(host) = open::registry_name(place) else {
        return logins(global, coordinator, place, None, Which::All).await;
    };
    let options = settings(global, place, None)?.source_registry;
    let credentials = credentials(&options, host.as_str(), coordinator, Which::All).await?;
    let host = host.as_str().to_owned();
    let one = |credentials| RegistryCredentials { host, login: Some(convert::login(credentials)) };
    Ok(credentials.map(one).into_iter().collect())
}

async fn credentials(
    options: &Options,
    host: &str,
    coordinator: &Coordinator,
    which: Which,
) -> Result<Option<Credentials>, Misused> {
    match (&options.credentials, which) {
        (Some(given), _) if coordinator.is_private => Ok(Some(given.clone())),
        (Some(_), _) => Err(Misused(format!(
            "a password is sent to a coordinator over TLS only, and {} is not https",
            coordinator.url
        ))),
        (None, Which::All) if coordinator.is_private => Ok(options.credentials_for(host).await),
        (None, _) => Ok(None),
    }
}
