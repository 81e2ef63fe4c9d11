//! The images of all schedules, and what has to come of each through each chain of filters: what the local tool makes of it where
//! nothing goes wrong.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use occy_tests::image::{Family, Image};
use occy_tests::layer::{Layer, noise, tar};
use occy_tests::occyctl::locally;
use occy_tests::registry::Registry;
use occy_tests::saved;
use occy_tests::tools::{Packing, write};
use tempfile::TempDir;

use super::plan::{Job, Source};
use crate::{layers, tar_uri};

/// How many images there are.
pub(super) const IMAGES: usize = 4;

/// Options of `process`: filters, and a compression.
pub(super) const CHAINS: [&[&str]; 5] = [
    &[],
    &["-f", "normalize-timestamps:ts=1000"],
    &["-f", "exclude:pattern=*.conf", "-f", "normalize-timestamps"],
    &["-f", "search:pattern=*.conf"],
    &["-f", "normalize-timestamps", "--compression", "zstd"],
];

/// The images, with layers in common; the last one is of OCI's kind, and has one that zstd has packed.
pub(super) fn images() -> &'static [Image; IMAGES] {
    static MADE: OnceLock<[Image; IMAGES]> = OnceLock::new();
    MADE.get_or_init(|| {
        let [large, middle, little] =
            [(1, 1_200_000), (2, 500_000), (3, 150_000)].map(|(seed, size)| Layer::noise(seed, size));
        let of = |own: &[&Layer]| own.iter().copied().cloned().chain(layers()).collect::<Vec<_>>();
        let zstd = Layer::noise(4, 300_000).packed(Packing::Zstd);
        [
            Image::docker(of(&[&large, &middle])),
            Image::docker(of(&[&large, &little])),
            Image::docker(of(&[&middle, &little, &middle])),
            Image::new(Family::Oci, of(&[&zstd, &little])),
        ]
    })
}

/// What a tag has before any job.
pub(super) fn old() -> &'static Image {
    static MADE: OnceLock<Image> = OnceLock::new();
    MADE.get_or_init(|| {
        Image::docker(vec![Layer::of(&[occy_tests::layer::Member::file("old", noise(9, 1000))])])
    })
}

/// What the local tool makes of the images, and the files that hold them.
pub(super) struct Expected {
    from: Registry,
    to: Registry,
    directory: TempDir,
    digests: Mutex<Vec<(Wanted, String)>>,
}

/// From where, which image, through which chain.
type Wanted = (bool, usize, usize);

impl Expected {
    /// One for all schedules of a test.
    pub(super) fn new() -> Self {
        let directory = crate::scratch();
        let from = Registry::start();
        for (number, image) in images().iter().enumerate() {
            from.push(image, "app", &number.to_string());
            let members = saved::docker_v25(&[(image, &["app:1"])]);
            write(directory.path().join(format!("{number}.tar")), tar(&members));
        }
        Self { from, to: Registry::start(), directory, digests: Mutex::default() }
    }

    /// Where those files are.
    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The file that holds an image.
    pub(super) fn file(&self, image: usize) -> PathBuf {
        self.directory.path().join(format!("{image}.tar"))
    }

    /// The digest of the manifest that has to come of an image.
    pub(super) fn digest(&self, job: &Job) -> String {
        let Job { source, image, chain, .. } = *job;
        let wanted = (source == Source::File, image, chain);
        // Under the lock, so that it is found out once.
        let mut digests = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, digest)) = digests.iter().find(|(known, _)| *known == wanted) {
            return digest.clone();
        }
        let uri = match source {
            Source::Registry => self.from.uri(&format!("app:{image}")),
            Source::File => tar_uri(&self.file(image)),
        };
        let tag = format!("{}-{image}-{chain}", wanted.0);
        let arguments = ["process", &uri, &self.to.uri(&format!("expected:{tag}"))];
        locally([&arguments, CHAINS[chain]].concat()).ok();
        // Read back whole, with every digest and every diff_id computed anew.
        let digest = self.to.pull("expected", &tag).digest;
        digests.push((wanted, digest.clone()));
        digest
    }
}
