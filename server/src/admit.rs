//! What a client's request may name, and what becomes of it: the one place where a spec is trusted with anything.
//!
//! A client is a stranger. It may name registries, which are reached at public addresses and in allowed networks only, and with
//! no credentials of the coordinator's unless its operator grants them. Paths are the coordinator's own, so they are refused
//! unless they lie under an allowed directory; every other kind of source or destination is refused. Files that filters append
//! to are the client's: nothing here writes them.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use occy_pipeline::codec::Pool;
use occy_pipeline::compression::Format;
use occy_pipeline::engine;
use occy_pipeline::error::Error;
use occy_pipeline::filter::search::Search;
use occy_pipeline::filter::{ENCODER_VERSION, FILTERS, Filter, FilterChain, OutputFormat};
use occy_pipeline::manifest::Annotations;
use occy_pipeline::mirror::config::Config;
use occy_pipeline::mirror::{self, Have, MirrorProgress};
use occy_pipeline::open::{self, Settings};
use occy_pipeline::output::{LayerForm, OUTPUTS};
use occy_pipeline::platform::{Platform, PlatformChoice};
use occy_pipeline::process::Outcome;
use occy_pipeline::reference::Reference;
use occy_pipeline::registry;
use occy_pipeline::tar::Limits;
use occy_pipeline::task::LayerPlan;
use occy_pipeline::uri::Uri;
use occy_pipeline::whole::Wanted;
use occy_pipeline::wire::{WireError, convert};
use occy_proto::v1::{self, FilterOutput, MirrorSpec, PipelineSpec};

use crate::client::{Client, Clients};
use crate::credentials::Logins;
use crate::error::ServiceError;
use crate::fleet::{Fleet, Origin};
use crate::other;
use crate::schedule::{Capabilities, Standing, Tenant};

/// Bytes of a source, a destination or a filter.
const TEXT_MAX: usize = 4096;
/// Filters of one spec.
const FILTERS_MAX: usize = 64;
/// Bytes of all its filters, which have to be compiled: by the coordinator, and by workers for every layer.
const FILTERS_TEXT_MAX: usize = 16 * 1024;
/// Platforms of an index that one copy may name.
const PLATFORMS_MAX: usize = 64;
/// Bytes of the file that says what is mirrored.
const CONFIG_MAX: usize = 128 * 1024;
/// Layers of one image, or blobs of one mirror, at once.
const PARALLEL_MAX: u32 = 256;
/// On either side of 0.
const PRIORITY_MAX: i32 = 100;
/// Schemes whose rest is a path of this machine.
const PATHS: [&str; 4] = ["tar", "dir", "oci", "oci-layout"];

/// That a worker runs layers of clients that have credentials of their own.
pub const CREDENTIALS: &str = "credentials";

/// What the operator allows.
#[derive(Debug)]
pub struct Gate {
    /// Directories under which clients may name paths, as the file system calls them.
    pub roots: Vec<PathBuf>,
    /// How every registry is spoken to.
    pub registry: registry::Options,
    /// What each client may have.
    pub clients: Clients,
    /// No layer may be larger uncompressed.
    pub max_layer_size: u64,
    /// Layers of one image at once, where a spec does not say it.
    pub parallel: usize,
    /// The workers, who may have filters that the coordinator has not.
    pub fleet: Fleet,
}

/// Which ends a spec has to name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// Source and destination.
    BothNamed,
    /// The source alone: the destination is the caller, or nothing.
    SourceNamed,
    /// The source alone, which may be a registry as a whole.
    PlaceNamed,
    /// The destination alone: the source is the caller.
    DestinationNamed,
    /// Either, both or none: what is empty is the caller.
    Any,
    /// Those that the caller does not lend.
    NotLent {
        /// Whether it lends the source.
        source: bool,
        /// Whether it lends the destination.
        destination: bool,
    },
}

/// A spec that was looked at and found allowed.
#[derive(Clone, Debug)]
pub struct Work {
    /// Whose it is.
    pub client: Arc<Client>,
    /// Empty: the caller.
    pub source: String,
    /// Empty: the caller.
    pub destination: String,
    /// What is done with every layer.
    pub plan: Arc<LayerPlan>,
    /// What source and destination are opened with.
    pub settings: Settings,
    /// What the caller gets, where it is the destination.
    pub form: v1::LayerForm,
    /// What is wanted besides the image itself.
    pub wanted: Wanted,
    /// How what filters find is printed.
    pub findings: OutputFormat,
    /// Whether the caller, where it is the destination, says which layers it wants.
    pub caller_chooses: bool,
    /// Among the client's own.
    priority: i32,
    /// The search that is the last filter of the plan's, where the spec has one.
    search: Option<v1::SearchSpec>,
}

/// A mirror that was looked at and found allowed.
#[derive(Debug)]
pub struct MirrorWork {
    /// Whose it is, and whose limits hold for as long as it is there.
    pub client: Arc<Client>,
    /// What is mirrored where.
    pub config: Config,
    /// How its registries are spoken to.
    pub ends: mirror::Ends,
    /// Whether the client has brought credentials.
    has_logins: bool,
}

impl MirrorWork {
    /// What a worker must offer for its layers, if any pass filters.
    pub fn needs(&self) -> Option<Capabilities> {
        let form = LayerForm::Stored { compression: None };
        let filters = self.config.mirrors.iter().map(|mirror| &mirror.filters);
        let filtered = filters.filter(|filters| !filters.is_empty());
        let mut needs: BTreeSet<String> =
            filtered.flat_map(|filters| layer_needs(filters, "registry", form)).collect();
        if needs.is_empty() {
            return None;
        }
        needs.extend(self.has_logins.then(|| CREDENTIALS.to_owned()));
        Some(Arc::new(needs))
    }

    /// Whether it may delete tags.
    pub fn deletes(&self) -> bool {
        self.config.mirrors.iter().any(|mirror| mirror.deletion.is_some())
    }
}

impl Gate {
    /// Looks at a mirror of a tenant's, who may have brought credentials. All its ends are registries: where they may be is seen when
    /// they are connected to, as with every other spec.
    pub async fn admit_mirror(
        &self,
        spec: &MirrorSpec,
        tenant: &Tenant,
        logins: &Logins,
    ) -> Result<MirrorWork, ServiceError> {
        let fail = |field, problem| ServiceError::Field { field, problem };
        if spec.config.len() > CONFIG_MAX {
            return Err(fail("config", format!("has more than {CONFIG_MAX} bytes")));
        }
        let parallel = self.parallel(spec.parallel)?;
        let text = spec.config.clone();
        let config = match tokio::task::spawn_blocking(move || Config::parse(&text)).await {
            Ok(config) => config.map_err(|error| fail("config", error.to_string()))?,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        let filters = config.mirrors.iter().flat_map(|mirror| mirror.filters.specs());
        if filters.map(|filter| filter.len()).sum::<usize>() > FILTERS_TEXT_MAX {
            return Err(fail("config", format!("has more than {FILTERS_TEXT_MAX} bytes of filters")));
        }
        let registries = registry::Client::new(self.registry.clone()).map_err(Error::from)?;
        let registries = registries.with_logins(logins.by_host());
        let client = self.clients.get(tenant);
        let ends = mirror::Ends {
            source: mirror::Origin::Registries(registries.clone()),
            target: registries,
            have: Have::default(),
            spools: client.spools.clone(),
            parallel,
            executor: None,
            max_layer_size: self.max_layer_size,
            locks: None,
            progress: MirrorProgress::default(),
        };
        Ok(MirrorWork { client, config, ends, has_logins: !logins.is_empty() })
    }

    /// How much a spec has done at once.
    fn parallel(&self, wanted: u32) -> Result<usize, ServiceError> {
        match wanted {
            0 => Ok(self.parallel),
            wanted if wanted > PARALLEL_MAX => {
                let problem = format!("expected at most {PARALLEL_MAX}");
                Err(ServiceError::Field { field: "parallel", problem })
            }
            wanted => Ok(wanted as usize),
        }
    }

    /// Looks at a spec of a tenant's, who may have brought credentials.
    pub async fn admit(
        self: &Arc<Self>,
        spec: &PipelineSpec,
        ends: Ends,
        tenant: &Tenant,
        logins: &Logins,
    ) -> Result<Work, ServiceError> {
        let offers = |gate: &Self, filter: &str| gate.fleet.offers(&filter_need(filter));
        self.look_aside(spec, ends, tenant, logins, offers).await
    }

    /// Looks once more at the spec of a job that was accepted: what is allowed may have changed since. The worker that has its
    /// filters may not be there yet, so that the job waits for it.
    pub async fn admit_again(
        self: &Arc<Self>,
        spec: &PipelineSpec,
        tenant: &Tenant,
        logins: &Logins,
    ) -> Result<Work, ServiceError> {
        self.look_aside(spec, Ends::BothNamed, tenant, logins, |_, _| true).await
    }

    /// Looks where that keeps nobody waiting: patterns take their time to compile, and paths are asked of a disk.
    async fn look_aside(
        self: &Arc<Self>,
        spec: &PipelineSpec,
        ends: Ends,
        tenant: &Tenant,
        logins: &Logins,
        is_known: impl Fn(&Self, &str) -> bool + Send + 'static,
    ) -> Result<Work, ServiceError> {
        let (gate, spec) = (Arc::clone(self), spec.clone());
        let (tenant, logins) = (Arc::clone(tenant), logins.clone());
        let look = move || gate.look_at(&spec, ends, &tenant, &logins, |filter| is_known(&gate, filter));
        match tokio::task::spawn_blocking(look).await {
            Ok(work) => work,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    fn look_at(
        &self,
        spec: &PipelineSpec,
        ends: Ends,
        tenant: &Tenant,
        logins: &Logins,
        is_known: impl Fn(&str) -> bool,
    ) -> Result<Work, ServiceError> {
        let (source, destination) = match ends {
            Ends::BothNamed => (Some(true), Some(true)),
            Ends::SourceNamed | Ends::PlaceNamed => (Some(true), Some(false)),
            Ends::DestinationNamed => (Some(false), Some(true)),
            Ends::Any => (None, None),
            Ends::NotLent { source, destination } => (Some(!source), Some(!destination)),
        };
        self.check_end("source", &spec.source, source)?;
        self.check_end("destination", &spec.destination, destination)?;
        if spec.filters.len() > FILTERS_MAX || spec.filters.iter().any(|filter| filter.len() > TEXT_MAX) {
            let problem = format!("more than {FILTERS_MAX} filters, or one of more than {TEXT_MAX} bytes");
            return Err(ServiceError::Field { field: "filters", problem });
        }
        let search_text = spec.search.as_ref().map_or(0, |search| search.pattern.len());
        if spec.filters.iter().map(String::len).sum::<usize>() + search_text > FILTERS_TEXT_MAX {
            let problem = format!("more than {FILTERS_TEXT_MAX} bytes together, with the search");
            return Err(ServiceError::Field { field: "filters", problem });
        }
        let chain = other::chain(&spec.filters, is_known).map_err(Error::from)?;
        let chain = match &spec.search {
            None => chain,
            Some(search) => with_search(&chain, search)?,
        };
        let compression = match spec.compression.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|error: occy_pipeline::compression::InvalidCompression| {
                ServiceError::Field { field: "compression", problem: error.to_string() }
            })?),
        };
        let parallel = self.parallel(spec.parallel)?;
        if spec.mirror.is_some() {
            let problem = "is what SubmitMirror sets, and nobody else".to_owned();
            return Err(ServiceError::Field { field: "mirror", problem });
        }
        if spec.priority.unsigned_abs() > PRIORITY_MAX.unsigned_abs() {
            let problem = format!("expected -{PRIORITY_MAX} to {PRIORITY_MAX}");
            return Err(ServiceError::Field { field: "priority", problem });
        }
        let known =
            |field| ServiceError::Field { field, problem: "has a value that is not known".to_owned() };
        let format = v1::Family::try_from(spec.manifest_family).map_err(|_| known("manifest_family"))?;
        let format = convert::manifest_format(format);
        let client = self.clients.get(tenant);
        let findings = match v1::FindingsFormat::try_from(spec.findings) {
            Ok(v1::FindingsFormat::Text | v1::FindingsFormat::Unspecified) => OutputFormat::Text,
            Ok(v1::FindingsFormat::Json) => OutputFormat::Json,
            Err(_) => return Err(known("findings")),
        };
        let wanted = wanted(spec, ends)?;
        let platform = spec.platform.clone().unwrap_or_default();
        let named = |text: String| Some(text).filter(|text| !text.is_empty());
        let settings = Settings {
            platform: PlatformChoice {
                os: named(platform.os),
                architecture: named(platform.architecture),
                variant: named(platform.variant),
                required: platform.required,
            },
            parallel,
            compression,
            format,
            source_registry: match ends {
                Ends::PlaceNamed => self.place(&spec.source, logins),
                _ => self.registry(&spec.source, logins),
            },
            destination_registry: self.registry(&spec.destination, logins),
            // docker:// is not for strangers, so nobody asks for these.
            engine: engine::Options::default(),
            force: false,
            verify: false,
            foreign_layers: spec.foreign_layers,
            confirm: true,
            spools: client.spools.clone(),
        };
        let max_layer_size = match spec.max_layer_size {
            0 => self.max_layer_size,
            size => size.min(self.max_layer_size),
        };
        Ok(Work {
            source: spec.source.clone(),
            destination: spec.destination.clone(),
            plan: self.plan(chain, spec.verify_diff_ids, max_layer_size, &client),
            settings,
            wanted,
            findings,
            caller_chooses: spec.caller_chooses,
            priority: spec.priority,
            search: spec.search.clone(),
            form: match v1::LayerForm::try_from(spec.layer_form) {
                Ok(v1::LayerForm::Tar) => v1::LayerForm::Tar,
                Ok(v1::LayerForm::None) if ends == Ends::Any => v1::LayerForm::None,
                Ok(v1::LayerForm::None) => {
                    let problem = "can be none in ProcessImage only".to_owned();
                    return Err(ServiceError::Field { field: "layer_form", problem });
                }
                Ok(v1::LayerForm::Stored | v1::LayerForm::Unspecified) => v1::LayerForm::Stored,
                Err(_) => return Err(known("layer_form")),
            },
            client,
        })
    }

    /// What is done with every layer of a client's that passes these filters.
    fn plan(
        &self,
        chain: FilterChain,
        verify_diff_ids: bool,
        max_layer_size: u64,
        client: &Client,
    ) -> Arc<LayerPlan> {
        Arc::new(LayerPlan {
            chain,
            annotations: Annotations::default(),
            pool: Pool::shared().clone(),
            spools: client.spools.clone(),
            max_layer_size,
            limits: Limits::default(),
            verify_diff_ids,
        })
    }

    /// How the registry of a source or destination is spoken to. Each is opened for itself, so that its credentials go nowhere else.
    fn registry(&self, end: &str, logins: &Logins) -> registry::Options {
        let uri = Uri::parse(end).ok().filter(|uri| uri.scheme == "registry");
        let reference = uri.and_then(|uri| uri.rest.parse::<Reference>().ok());
        let credentials = reference.and_then(|reference| logins.for_host(reference.host()));
        registry::Options { credentials, ..self.registry.clone() }
    }

    /// The same, of one that may be named as a whole.
    fn place(&self, place: &str, logins: &Logins) -> registry::Options {
        match open::registry_name(place) {
            Some(host) => {
                registry::Options { credentials: logins.for_host(host.as_str()), ..self.registry.clone() }
            }
            None => self.registry(place, logins),
        }
    }

    fn check_end(&self, field: &'static str, text: &str, named: Option<bool>) -> Result<(), ServiceError> {
        let fail = |problem: &str| Err(ServiceError::Field { field, problem: problem.to_owned() });
        match named {
            Some(true) if text.is_empty() => return fail("is not set"),
            Some(false) if !text.is_empty() => return fail("is the caller here, and must not be set"),
            _ if text.is_empty() => return Ok(()),
            _ if text.len() > TEXT_MAX => return fail("has more than 4096 bytes"),
            _ => {}
        }
        let uri = Uri::parse(text).map_err(Error::from)?;
        match uri.scheme.as_str() {
            "registry" => Ok(()),
            scheme if PATHS.contains(&scheme) && self.allows_path(Path::new(&uri.rest)) => Ok(()),
            scheme if PATHS.contains(&scheme) => Err(ServiceError::Forbidden {
                what: format!("the path {:?}", uri.rest),
                hint: "its operator can allow a directory with --allow-path; occyctl reads and writes the files of its own machine",
            }),
            // Sockets of daemons, standard input, and whatever comes to be: not for strangers.
            scheme => Err(ServiceError::Forbidden {
                what: format!("{scheme}://"),
                hint: "it is for the machine that it is on; run occyctl there",
            }),
        }
    }

    /// Whether a path lies under an allowed directory, once every symbolic link on its way is followed.
    fn allows_path(&self, path: &Path) -> bool {
        let is_plain = path.is_absolute()
            && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        if !is_plain {
            return false;
        }
        // What does not exist yet lies where its nearest parent that exists does.
        for ancestor in path.ancestors() {
            match ancestor.canonicalize() {
                Ok(real) => return self.roots.iter().any(|root| real.starts_with(root)),
                // A link that leads nowhere could lead anywhere later.
                Err(_) if ancestor.symlink_metadata().is_ok() => return false,
                Err(_) => {}
            }
        }
        false
    }

    /// Whether clients may name sources or destinations of this scheme.
    pub fn allows_scheme(&self, scheme: &str) -> bool {
        scheme == "registry" || (PATHS.contains(&scheme) && !self.roots.is_empty())
    }
}

impl Work {
    /// What workers are told of all its layers, as a call's.
    pub fn origin(&self) -> Origin {
        Origin {
            job: String::new(),
            search: self.search.clone(),
            foreign_layers: self.settings.foreign_layers,
        }
    }

    /// What filters found in an image, in pieces of at most so many bytes together.
    pub fn found(
        &self,
        outcome: &Outcome,
        limit: usize,
    ) -> Result<impl Iterator<Item = FilterOutput> + use<>, WireError> {
        convert::filter_outputs(outcome, &self.plan.chain, self.findings, limit)
    }

    /// Where it stands among others.
    pub fn standing(&self) -> Standing {
        Standing { tenant: Arc::clone(&self.client.tenant), priority: self.priority }
    }

    /// What a worker must offer for its layers, which go to an output of that form.
    pub fn needs(&self, form: LayerForm) -> Capabilities {
        let scheme = self.destination.split_once("://").map_or("", |(scheme, _)| scheme);
        let mut needs = layer_needs(&self.plan.chain, scheme, form);
        let registries = [&self.settings.source_registry, &self.settings.destination_registry];
        if registries.iter().any(|registry| registry.credentials.is_some()) {
            needs.insert(CREDENTIALS.to_owned());
        }
        Arc::new(needs)
    }
}

/// What a worker must offer for layers that pass these filters into an output of that form; with a scheme if that is not the caller.
fn layer_needs(chain: &FilterChain, scheme: &str, form: LayerForm) -> BTreeSet<String> {
    let mut needs: BTreeSet<_> = chain.specs().iter().map(|spec| filter_need(other::name(spec))).collect();
    needs.extend((!scheme.is_empty()).then(|| output_need(scheme)));
    let compression = match form {
        LayerForm::Stored { compression } => compression,
        LayerForm::Tar | LayerForm::Nothing => None,
    };
    match (form, compression) {
        (_, Some(compression)) => needs.extend([codec_need(compression.format())]),
        // An edited layer gets what it had, and what that is is not known yet.
        (LayerForm::Stored { .. }, None) if chain.edits() => {
            needs.extend([Format::Gzip, Format::Zstd].map(codec_need));
        }
        _ => {}
    }
    if other::are_ours(chain) && (!chain.is_empty() || compression.is_some()) {
        needs.insert(encoder_need(&ENCODER_VERSION.to_string()));
    }
    needs
}

fn with_search(chain: &FilterChain, search: &v1::SearchSpec) -> Result<FilterChain, ServiceError> {
    let v1::SearchSpec { pattern, regex, script_friendly } = search;
    if pattern.len() > TEXT_MAX {
        let problem = format!("has a pattern of more than {TEXT_MAX} bytes");
        return Err(ServiceError::Field { field: "search", problem });
    }
    let search = Search::new(pattern, *regex, *script_friendly)
        .map_err(|problem| ServiceError::Field { field: "search", problem })?;
    let own: Arc<dyn Filter> = Arc::new(search);
    Ok(FilterChain::new(chain.filters().iter().cloned().chain([own]).collect()))
}

/// What a spec wants besides the image itself.
fn wanted(spec: &PipelineSpec, ends: Ends) -> Result<Wanted, ServiceError> {
    let fail = |field, problem: &str| ServiceError::Field { field, problem: problem.to_owned() };
    let unknown = |field| fail(field, "has a value that is not known");
    let signatures = v1::SignaturePolicy::try_from(spec.signatures).map_err(|_| unknown("signatures"))?;
    let attestations = v1::AttestationPolicy::try_from(spec.attestations);
    let attestations = attestations.map_err(|_| unknown("attestations"))?;
    let wanted = Wanted {
        all: spec.all,
        attestations: convert::attestations(attestations),
        signatures: match signatures {
            v1::SignaturePolicy::Unspecified => None,
            policy => Some(convert::signatures(policy)),
        },
        provenance: spec.provenance,
    };
    let asked =
        [("signatures", wanted.signatures.is_some()), ("provenance", wanted.provenance), ("all", wanted.all)];
    let asked = asked.into_iter().find_map(|(field, is_asked)| is_asked.then_some(field));
    let is_whole = matches!(ends, Ends::NotLent { .. });
    match asked {
        Some(field) if !is_whole && (spec.source.is_empty() || spec.destination.is_empty()) => {
            Err(fail(field, "is for images whose source and destination are named, or lent"))
        }
        _ if wanted.all && !spec.compression.is_empty() => Err(fail("compression", "is not for an index")),
        _ if wanted.all && spec.manifest_family() != v1::Family::Unspecified => {
            Err(fail("manifest_family", "is not for an index"))
        }
        _ if !wanted.all && attestations != v1::AttestationPolicy::Unspecified => {
            Err(fail("attestations", "is for an index: set `all` too"))
        }
        _ => Ok(wanted),
    }
}

/// The platforms of a request that names each of them in full.
pub fn platforms(platforms: Vec<v1::Platform>) -> Result<Vec<Platform>, ServiceError> {
    if platforms.len() > PLATFORMS_MAX {
        let problem = format!("more than {PLATFORMS_MAX} platforms");
        return Err(ServiceError::Field { field: "platforms", problem });
    }
    platforms.into_iter().map(|named| platform("platforms", named)).collect()
}

/// A platform that is named in full.
pub fn platform(field: &'static str, platform: v1::Platform) -> Result<Platform, ServiceError> {
    let v1::Platform { os, architecture, variant, required: _ } = platform;
    if os.is_empty() || architecture.is_empty() {
        let problem = "expected an operating system and an architecture".to_owned();
        return Err(ServiceError::Field { field, problem });
    }
    Ok(Platform { os, architecture, variant: Some(variant).filter(|variant| !variant.is_empty()) })
}

/// That a worker has this filter.
pub fn filter_need(name: &str) -> String {
    format!("filter:{name}")
}

/// The filter that a worker has to have by that, if that is what it says.
pub fn filter_of(need: &str) -> Option<&str> {
    need.strip_prefix("filter:")
}

/// That a worker has this version of this filter.
pub fn version_need(name: &str, version: &str) -> String {
    format!("version:{name}:{version}")
}

/// That a worker works for destinations of this scheme.
pub fn output_need(scheme: &str) -> String {
    format!("output:{scheme}")
}

/// That a worker compresses so.
pub fn codec_need(format: Format) -> String {
    format!("codec:{format}")
}

/// That a worker makes the same bytes of the same layer as all others of this version.
pub fn encoder_need(version: &str) -> String {
    format!("encoder:{version}")
}

/// What a worker of this program offers.
pub fn offered() -> Capabilities {
    let filters = FILTERS.iter().map(|filter| filter_need(filter.name));
    let outputs = OUTPUTS.iter().map(|output| output_need(output.scheme));
    let codecs = [Format::Gzip, Format::Zstd].map(codec_need);
    let others = [encoder_need(&ENCODER_VERSION.to_string()), CREDENTIALS.to_owned()];
    Arc::new(filters.chain(outputs).chain(codecs).chain(others).collect::<BTreeSet<_>>())
}

#[cfg(test)]
mod tests {
    use occy_pipeline::spool::SpoolDir;

    use super::*;
    use crate::client::ClientLimits;
    use crate::fleet::Patience;

    fn gate(root: Option<&Path>) -> Gate {
        Gate {
            roots: root.into_iter().map(|root| root.canonicalize().unwrap()).collect(),
            registry: registry::Options::default(),
            clients: Clients::new(SpoolDir::new("/tmp", 1 << 20), ClientLimits { calls: 1, spool: 1 << 20 }),
            max_layer_size: 1 << 20,
            parallel: 2,
            fleet: Fleet::embedded(1, &offered(), &[], Patience::default()),
        }
    }

    fn admit(gate: &Gate, spec: &PipelineSpec, ends: Ends) -> Result<Work, ServiceError> {
        let offers = |filter: &str| gate.fleet.offers(&filter_need(filter));
        gate.look_at(spec, ends, &"".into(), &Logins::default(), offers)
    }

    fn spec(source: &str, destination: &str) -> PipelineSpec {
        PipelineSpec {
            source: source.to_owned(),
            destination: destination.to_owned(),
            ..PipelineSpec::default()
        }
    }

    fn is_forbidden(gate: &Gate, end: &str) -> bool {
        let source = admit(gate, &spec(end, "registry://x.io/a"), Ends::BothNamed);
        let destination = admit(gate, &spec("registry://x.io/a", end), Ends::BothNamed);
        let forbidden = |result| matches!(result, Err(ServiceError::Forbidden { .. }));
        assert_eq!(forbidden(source), forbidden(destination), "{end}");
        forbidden(admit(gate, &spec(end, "registry://x.io/a"), Ends::BothNamed))
    }

    #[test]
    fn paths_are_refused_unless_they_lie_under_an_allowed_directory() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(directory.path().join("secret"), "").unwrap();
        std::os::unix::fs::symlink(directory.path(), root.join("out")).unwrap();
        std::os::unix::fs::symlink("/nowhere/at/all", root.join("dangling")).unwrap();
        let (none, some) = (gate(None), gate(Some(&root)));
        let inside = format!("tar://{}/image.tar", root.display());
        assert!(is_forbidden(&none, &inside));
        assert!(!is_forbidden(&some, &inside));
        assert!(!is_forbidden(&some, &format!("dir://{}/not/yet", root.display())));
        for path in ["../secret", "out/secret", "out/new", "dangling", "dangling/x"] {
            assert!(is_forbidden(&some, &format!("tar://{}/{path}", root.display())), "{path}");
        }
        for end in ["tar://-", "tar://relative.tar", "tar:///etc/passwd", "docker://x", "oci:///x", "dir://."]
        {
            assert!(is_forbidden(&some, end), "{end}");
        }
    }

    #[test]
    fn a_spec_names_the_ends_that_it_has_to() {
        let gate = gate(None);
        let (named, none) = ("registry://x.io/a", "");
        for (source, destination, ends, good) in [
            (named, named, Ends::BothNamed, true),
            (named, none, Ends::BothNamed, false),
            (named, none, Ends::SourceNamed, true),
            (named, named, Ends::SourceNamed, false),
            (none, named, Ends::DestinationNamed, true),
            (none, none, Ends::DestinationNamed, false),
            (none, none, Ends::Any, true),
        ] {
            let result = admit(&gate, &spec(source, destination), ends);
            assert_eq!(result.is_ok(), good, "{source} {destination} {ends:?}");
        }
    }

    #[test]
    fn filters_are_few_and_short() {
        let with = |count: usize, bytes: usize| PipelineSpec {
            filters: vec![format!("exclude:pattern={}", "x".repeat(bytes)); count],
            ..spec("registry://x.io/a", "registry://x.io/b")
        };
        let admits = |spec: &PipelineSpec| admit(&gate(None), spec, Ends::BothNamed).is_ok();
        assert!(admits(&with(64, 200)) && admits(&with(3, 4000)));
        for too_much in [with(65, 1), with(1, 4096), with(5, 4000)] {
            assert!(!admits(&too_much));
        }
        let search = v1::SearchSpec { pattern: "x".repeat(4000), ..v1::SearchSpec::default() };
        assert!(!admits(&PipelineSpec { search: Some(search), ..with(4, 3500) }));
    }

    #[test]
    fn every_chain_of_our_filters_is_offered() {
        let filters =
            ["exclude:pattern=x", "normalize-timestamps", "search:pattern=x", "inspect:file=/etc/passwd"];
        let spec = PipelineSpec {
            filters: filters.map(str::to_owned).to_vec(),
            ..spec("registry://x.io/a", "registry://x.io/b")
        };
        let work = admit(&gate(None), &spec, Ends::BothNamed).unwrap();
        let needs = work.needs(LayerForm::Stored { compression: None });
        assert_eq!(needs.len(), 4 + 1 + 2 + 1, "{needs:?}");
        assert!(needs.is_subset(&offered()));
    }
}
