//! From the words of a request to its source and its output: the one place that knows every scheme.

use std::sync::Arc;

use crate::compression::Compression;
use crate::engine;
use crate::error::Error;
use crate::layout::Choice;
use crate::output::bundle::{BundleOptions, BundleOutput};
use crate::output::content::ContentOutput;
use crate::output::dir::{DirOptions, DirOutput};
use crate::output::docker::DockerOutput;
use crate::output::manifest::ManifestFormat;
use crate::output::oci_layout::{LayoutOptions, LayoutOutput};
use crate::output::registry::RegistryOutput;
use crate::output::tar::TarOutput;
use crate::output::{ImageOutput, OUTPUTS};
use crate::platform::PlatformChoice;
use crate::reference::{Reference, RegistryName, split_credentials};
use crate::registry::{self, Access, Client, Repository};
use crate::source::dir::{DirImage, DirSource};
use crate::source::docker::DockerSource;
use crate::source::for_platform::ForPlatform;
use crate::source::oci_layout::{self, LayoutSource};
use crate::source::registry::{self as source_of_registries, RegistrySource};
use crate::source::saved_tar::SavedTarSource;
use crate::source::stored::Store;
use crate::source::{ImageSource, SOURCES};
use crate::spool::SpoolDir;
use crate::tar::Limits;
use crate::uri::{Uri, UriError};

/// What a request says beside its source and destination. Options in a URI win over these.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which image of an index.
    pub platform: PlatformChoice,
    /// Layers at once.
    pub parallel: usize,
    /// What a registry's layers are compressed with.
    pub compression: Option<Compression>,
    /// The format of a registry's manifest.
    pub format: ManifestFormat,
    /// How the source's registry is spoken to.
    pub source_registry: registry::Options,
    /// How the destination's registry is spoken to.
    pub destination_registry: registry::Options,
    /// Where the container engine is.
    pub engine: engine::Options,
    /// Replace what is at a destination that is a directory.
    pub force: bool,
    /// Read what a destination has already, to see that it is whole.
    pub verify: bool,
    /// Copy foreign layers as others, to a destination that keeps blobs.
    pub foreign_layers: bool,
    /// Ask a destination's registry for every blob before the image becomes visible: for who has its layers stored by others.
    pub confirm: bool,
    /// Where temporary files go.
    pub spools: SpoolDir,
}

/// A source or an output, and the layers at once that its URI asks for.
#[derive(Debug)]
pub struct Opened<T> {
    /// The source or output.
    pub end: T,
    /// `?max_workers=`.
    pub max_workers: Option<usize>,
}

/// The source that `text` names.
pub fn source(text: &str, settings: &Settings) -> Result<Opened<Box<dyn ImageSource>>, Error> {
    let uri = Uri::parse(text)?;
    let Some(kind) = SOURCES.iter().find(|kind| kind.scheme == uri.scheme) else {
        let expected = SOURCES.iter().map(|kind| kind.syntax).collect::<Vec<_>>().join(", ");
        return Err(UriError::UnknownScheme { role: "source", scheme: uri.scheme, expected }.into());
    };
    uri.only(kind.options)?;
    let end: Box<dyn ImageSource> = match kind.scheme {
        "registry" => {
            let platform = platform(&uri, settings);
            let client = Client::new(settings.source_registry.clone())?;
            Box::new(RegistrySource::new(&client, reference(&uri)?, platform))
        }
        "docker" => {
            let engine = settings.engine.at(uri.option("socket"));
            ForPlatform::hold(
                DockerSource::new(engine, &uri.rest, settings.spools.clone())?,
                &settings.platform,
            )
        }
        "tar" => {
            let image = uri.option("image").map(str::to_owned);
            let source = SavedTarSource::new(&uri.rest, image, settings.spools.clone());
            ForPlatform::hold(source, &settings.platform)
        }
        "dir" => {
            let tag = uri.option("tag");
            let image = uri.option("image").map(|image| DirImage::new(image, tag));
            if let (None, Some(tag)) = (&image, tag) {
                return Err(uri.bad("tag", tag, "needs image= beside it").into());
            }
            ForPlatform::hold(DirSource::new(&uri.rest, image), &settings.platform)
        }
        "oci-layout" => Box::new(source_layout(&uri, settings)?),
        scheme => unreachable!("{scheme}:// is in the table of sources"),
    };
    Ok(Opened { end, max_workers: max_workers(&uri)? })
}

/// The output that `text` names.
pub fn output(text: &str, settings: &Settings) -> Result<Opened<Arc<dyn ImageOutput>>, Error> {
    let uri = Uri::parse(text)?;
    let Some(kind) = OUTPUTS.iter().find(|kind| kind.scheme == uri.scheme) else {
        let expected = OUTPUTS.iter().map(|kind| kind.syntax).collect::<Vec<_>>().join(", ");
        return Err(UriError::UnknownScheme { role: "destination", scheme: uri.scheme, expected }.into());
    };
    uri.only(kind.options)?;
    let end: Arc<dyn ImageOutput> = match kind.scheme {
        "registry" => {
            let client = Client::new(settings.destination_registry.clone())?;
            let compression = uri.parsed("compression")?.or(settings.compression);
            let format = uri.parsed("format")?.unwrap_or(settings.format);
            let output = RegistryOutput::new(&client, reference(&uri)?, compression, format);
            let output = output.with_foreign_layers(settings.foreign_layers);
            Arc::new(output.with_confirmation(settings.confirm))
        }
        "docker" => {
            let engine = settings.engine.at(uri.option("socket"));
            Arc::new(DockerOutput::new(engine, &uri.rest, settings.spools.clone())?)
        }
        "dir" => {
            let options = DirOptions {
                unique_names: uri.flag("unique_names")?,
                expand: uri.flag("expand")?,
                limits: Limits::default(),
                force: settings.force || uri.flag("force")?,
                verify: settings.verify || uri.flag("verify")?,
            };
            Arc::new(DirOutput::new(&uri.rest, options))
        }
        "oci" => {
            let options = BundleOptions {
                rootless: uri.flag("rootless")?,
                force: settings.force || uri.flag("force")?,
                limits: Limits::default(),
            };
            Arc::new(BundleOutput::new(&uri.rest, options, settings.spools.clone()))
        }
        "tar" => Arc::new(TarOutput::new(&uri.rest, settings.spools.clone())),
        "oci-layout" => Arc::new(output_layout(&uri, settings)?),
        scheme => unreachable!("{scheme}:// is in the table of outputs"),
    };
    Ok(Opened { end, max_workers: max_workers(&uri)? })
}

/// What is named where a name alone is enough: everything but the scheme of a registry has to be written.
pub fn in_full(text: &str) -> String {
    if text.contains("://") { text.to_owned() } else { format!("registry://{text}") }
}

/// Where names are listed.
#[derive(Clone, Debug)]
pub enum Place {
    /// A registry as a whole.
    Registry(Client, RegistryName),
    /// A repository of one.
    Repository(Repository),
    /// An image layout.
    Layout(Box<LayoutSource>),
}

/// The registry that `text` names as a whole, where a place is to be named. None for a repository, and for what is no registry.
pub fn registry_name(text: &str) -> Option<RegistryName> {
    let uri = Uri::parse(&in_full(text)).ok().filter(|uri| uri.scheme == "registry")?;
    let rest = uri.rest.trim_end_matches('/');
    names_registry(rest).then(|| rest.parse().ok()).flatten()
}

/// The registry, repository or layout that `text` names; one image of a repository is none.
pub fn place(text: &str, settings: &Settings) -> Result<Place, Error> {
    let uri = Uri::parse(&in_full(text))?;
    match uri.scheme.as_str() {
        "registry" => {
            uri.only(&[])?;
            let client = Client::new(settings.source_registry.clone())?;
            let rest = uri.rest.trim_end_matches('/');
            if names_registry(rest) {
                return Ok(Place::Registry(client, rest.parse()?));
            }
            let name = rest.rsplit('/').next().unwrap_or(rest);
            if split_credentials(rest).is_none() && name.contains([':', '@']) {
                return Err(UriError::OneImage(rest.to_owned()).into());
            }
            Ok(Place::Repository(client.repository(&rest.parse()?, Access::Pull)))
        }
        "oci-layout" => {
            uri.only(&[])?;
            let (choice, platform) = (Choice::default(), settings.platform.clone());
            let layout = LayoutSource::new(&uri.rest, choice, platform, settings.spools.clone());
            Ok(Place::Layout(Box::new(layout)))
        }
        _ => Err(unknown(uri, "place")),
    }
}

/// The repository of the image that `text` names, and which one it is.
pub fn image(text: &str, settings: &Settings, access: Access) -> Result<(Repository, Reference), Error> {
    let uri = Uri::parse(&in_full(text))?;
    if uri.scheme != "registry" {
        let expected = source_of_registries::KIND.syntax.to_owned();
        return Err(UriError::UnknownScheme { role: "registry", scheme: uri.scheme, expected }.into());
    }
    uri.only(&[])?;
    let reference = reference(&uri)?;
    let client = Client::new(settings.destination_registry.clone())?;
    Ok((client.repository(&reference, access), reference))
}

/// The manifests and blobs that `text` names, whatever they are.
pub fn store(text: &str, settings: &Settings) -> Result<Arc<dyn Store>, Error> {
    let uri = Uri::parse(&in_full(text))?;
    match uri.scheme.as_str() {
        "registry" => {
            uri.only(&[])?;
            let client = Client::new(settings.source_registry.clone())?;
            Ok(Arc::new(RegistrySource::new(&client, reference(&uri)?, settings.platform.clone())))
        }
        "oci-layout" => {
            uri.only(&["tag", "digest"])?;
            Ok(Arc::new(source_layout(&uri, settings)?))
        }
        _ => Err(unknown(uri, "source of whole images")),
    }
}

/// Where `text` says that manifests and blobs go, whatever they are.
pub fn content_output(text: &str, settings: &Settings) -> Result<Arc<dyn ContentOutput>, Error> {
    let uri = Uri::parse(&in_full(text))?;
    match uri.scheme.as_str() {
        "registry" => {
            uri.only(&[])?;
            let client = Client::new(settings.destination_registry.clone())?;
            let output = RegistryOutput::new(&client, reference(&uri)?, None, ManifestFormat::Keep);
            Ok(Arc::new(output.with_foreign_layers(settings.foreign_layers)))
        }
        "oci-layout" => {
            uri.only(&["tag", "tar"])?;
            Ok(Arc::new(output_layout(&uri, settings)?))
        }
        _ => Err(unknown(uri, "destination of whole images")),
    }
}

/// The layout that `text` names as a source; None where it names something else. Its options are looked at where it is opened.
pub fn lent_source(text: &str, settings: &Settings) -> Result<Option<LayoutSource>, Error> {
    let uri = Uri::parse(text)?;
    (uri.scheme == oci_layout::KIND.scheme).then(|| source_layout(&uri, settings)).transpose()
}

/// The layout that `text` names as a destination likewise.
pub fn lent_output(text: &str, settings: &Settings) -> Result<Option<LayoutOutput>, Error> {
    let uri = Uri::parse(text)?;
    (uri.scheme == oci_layout::KIND.scheme).then(|| output_layout(&uri, settings)).transpose()
}

fn source_layout(uri: &Uri, settings: &Settings) -> Result<LayoutSource, Error> {
    let choice = Choice { tag: uri.option("tag").map(str::to_owned), digest: uri.parsed("digest")? };
    let platform = platform(uri, settings);
    Ok(LayoutSource::new(&uri.rest, choice, platform, settings.spools.clone()))
}

fn output_layout(uri: &Uri, settings: &Settings) -> Result<LayoutOutput, Error> {
    let options = LayoutOptions {
        tag: uri.option("tag").map(str::to_owned),
        tar: uri.flag("tar")?,
        compression: uri.parsed("compression")?.or(settings.compression),
        format: uri.parsed("format")?.unwrap_or(settings.format),
        verify: settings.verify || uri.flag("verify")?,
        foreign_layers: settings.foreign_layers,
    };
    Ok(LayoutOutput::new(&uri.rest, options, settings.spools.clone()))
}

fn unknown(uri: Uri, role: &'static str) -> Error {
    let expected = [source_of_registries::KIND, oci_layout::KIND].map(|kind| kind.syntax).join(", ");
    UriError::UnknownScheme { role, scheme: uri.scheme, expected }.into()
}

/// Whether a name is a registry's, where that is as good as an image's: without a path, it looks like a host, or has a port.
pub(crate) fn names_registry(rest: &str) -> bool {
    let (name, port) = match rest.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (rest, None),
    };
    let has_port = port.is_some_and(|port| port.parse::<u16>().is_ok());
    !rest.contains('/') && !rest.contains('@') && (has_port || port.is_none() && looks_like_host(name))
}

fn looks_like_host(name: &str) -> bool {
    name == "localhost" || name.contains('.') || name.starts_with('[')
}

/// The image of a `registry://`.
///
/// Docker's rules take `localhost:5000` for an image on docker.io with a tag. Nobody has one that is called like a host.
fn reference(uri: &Uri) -> Result<Reference, Error> {
    let name = uri.rest.split_once([':', '@']).map_or(&*uri.rest, |(name, _)| name);
    if !uri.rest.contains('/') && looks_like_host(name) {
        return Err(UriError::NoImage(uri.rest.clone()).into());
    }
    Ok(uri.rest.parse()?)
}

/// Which image of an index: what the URI says wins.
fn platform(uri: &Uri, settings: &Settings) -> PlatformChoice {
    let option =
        |key, otherwise: &Option<String>| uri.option(key).map(str::to_owned).or_else(|| otherwise.clone());
    PlatformChoice {
        os: option("os", &settings.platform.os),
        architecture: option("arch", &settings.platform.architecture),
        variant: option("variant", &settings.platform.variant),
        required: settings.platform.required
            || ["os", "arch", "variant"].iter().any(|key| uri.option(key).is_some()),
    }
}

fn max_workers(uri: &Uri) -> Result<Option<usize>, UriError> {
    match uri.parsed::<usize>("max_workers")? {
        Some(0 | 257..) => Err(UriError::BadValue {
            key: "max_workers".to_owned(),
            value: uri.option("max_workers").unwrap_or_default().to_owned(),
            reason: "expected a number from 1 to 256".to_owned(),
        }),
        workers => Ok(workers),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            platform: PlatformChoice::default(),
            parallel: 4,
            compression: None,
            format: ManifestFormat::Keep,
            source_registry: registry::Options::default(),
            destination_registry: registry::Options::default(),
            engine: engine::Options::default(),
            force: false,
            verify: false,
            foreign_layers: false,
            confirm: false,
            spools: SpoolDir::new("/tmp", 0),
        }
    }

    #[test]
    fn every_scheme_of_the_tables_opens() {
        for kind in SOURCES {
            let text = format!("{}://localhost/name", kind.scheme);
            assert!(source(&text, &settings()).is_ok(), "{text}");
        }
        for kind in OUTPUTS {
            let text = format!("{}://localhost/name:tag", kind.scheme);
            assert!(output(&text, &settings()).is_ok(), "{text}");
        }
    }

    #[test]
    fn what_is_unknown_is_named_in_the_error() {
        let error =
            |text: &str| source(text, &settings()).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error("docker-archive://x").contains("docker-archive"));
        assert!(error("tar://x?arch=arm64").contains("\"arch\""));
        assert!(error("registry://localhost/x?max_workers=0").contains("max_workers=0"));
        for host in ["localhost:5000", "localhost", "registry.example:5000", "10.0.0.1:5000", "[::1]:5000"] {
            assert!(
                error(&format!("registry://{host}")).contains(&format!("registry://{host}/IMAGE")),
                "{host}"
            );
        }
        for host in
            ["localhost:5000", "localhost", "registry.example", "10.0.0.1:5000", "[::1]:5000", "host:5000/"]
        {
            assert!(matches!(place(host, &settings()), Ok(Place::Registry(..))), "{host}");
        }
        for repository in ["busybox", "localhost/a", "registry://[::1]:5000/a/b", "docker.io/library/busybox"]
        {
            assert!(matches!(place(repository, &settings()), Ok(Place::Repository(_))), "{repository}");
        }
        for image in ["busybox:latest", "localhost:5000/a:1", "a@sha256:0"] {
            let error = place(image, &settings()).unwrap_err().to_string();
            assert!(error.contains("one image"), "{error}");
        }
        let error = place("alice:s3cr3t@localhost:5000/app", &settings()).unwrap_err().to_string();
        assert!(!error.contains("s3cr3t"), "{error}");
        for image in ["busybox", "busybox:1.36", "host:5000"] {
            assert!(source(&format!("registry://{image}"), &settings()).is_ok(), "{image}");
        }
    }
}
