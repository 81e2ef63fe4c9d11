//! The command line: every command and option, with the words that `--help`, the man page and the completions are made of.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use occy_pipeline::compression::Compression;
use occy_pipeline::copy::SignaturePolicy;
use occy_pipeline::index;
use occy_pipeline::output::manifest::ManifestFormat;
use occy_pipeline::platform::Platform;
use occy_pipeline::size;
use occy_pipeline::whole::Wanted;

const EXAMPLES: &str = "\
Examples:
  Save an image for `docker load`, with every timestamp set to zero:
    occyctl process registry://docker.io/library/busybox:latest tar://busybox.tar -f normalize-timestamps

  Copy between registries; nothing is recompressed, and what is there already is not moved:
    occyctl process registry://docker.io/library/busybox:1.36 registry://localhost:5000/busybox:1.36

  Copy an image for every platform into a layout, and from there to a registry without a network:
    occyctl process registry://docker.io/library/busybox:1.36 oci-layout://mirror --all
    occyctl process 'oci-layout://mirror?tag=1.36' registry://localhost:5000/busybox:1.36 --all

  Filter an image for every platform, as one index:
    occyctl process registry://localhost:5000/app:1 registry://localhost:5000/clean:1 --all -f 'exclude:pattern=**/*.pyc'

  Push a saved tar as zstd, without git's files, and write down what each layer became:
    occyctl process tar://app.tar registry://localhost:5000/app:1 --compression zstd \\
        -f 'exclude:pattern=**/.git/**' -f inspect:file=layers.jsonl

  Push an image out of Docker, and load one into Podman:
    occyctl process docker://app:1 registry://localhost:5000/app:1
    occyctl process registry://docker.io/library/busybox:latest \
        docker://busybox:latest?socket=/run/podman/podman.sock

  Let a coordinator do the work, for a file of this machine, or as a job that goes on when this machine is switched off:
    occyctl process tar://app.tar registry://localhost:5000/app:1 -f normalize-timestamps --coordinator http://localhost:7700
    occyctl job submit registry://docker.io/library/busybox:1.36 registry://localhost:5000/busybox:1.36 --watch \
        --coordinator http://localhost:7700

  Copy an image as it is, for all its platforms and with its signatures; what is in a registry, and away with it:
    occyctl copy docker.io/library/busybox:1.36 localhost:5000/busybox:1.36 --referrers
    occyctl ls localhost:5000
    occyctl tags localhost:5000/busybox --sort version
    occyctl digest localhost:5000/busybox:1.36
    occyctl delete localhost:5000/busybox:1.36

  Keep what a file names at other registries, and see before what that takes:
    occyctl mirror -c mirror.yaml --dry-run
    occyctl mirror -c mirror.yaml

  Find files, look at an image, check every byte of it:
    occyctl search registry://localhost:5000/app:1 '*.conf'
    occyctl info tar://app.tar
    occyctl check registry://localhost:5000/app:1

Sources:
  registry://HOST/IMAGE[:TAG|@DIGEST]   an image in a registry
      ?os=&arch=&variant=               which one of an index, as --os, --architecture, --variant
      ?max_workers=N                    as --parallel
  docker://IMAGE[:TAG|@DIGEST]          an image in Docker or Podman: the Engine at $DOCKER_HOST, or at the first socket of
                                        theirs that is there; `info` too reads all of what the Engine exports
      ?socket=PATH                      the socket of the Engine
      ?max_workers=N                    as --parallel
  tar://PATH                            a saved tar, plain or compressed; tar://- is standard input; an OCI
                                        archive (`podman save --format oci-archive`) is read by oci-layout://
      ?image=NAME:TAG                   which one, where it holds several
  dir://PATH                            a directory that dir:// wrote, or the Python occystrap; or an unpacked saved tar
      ?image=NAME&tag=TAG               which one, where images share it
  oci-layout://PATH                     an OCI image layout, a directory or a tar of one
      ?tag=TAG                          which one, where it holds several; NAME:TAG too
      ?digest=DIGEST                    the one whose manifest has this digest
      ?os=&arch=&variant=               which one of an index, as --os, --architecture, --variant

`copy`, `ls`, `tags`, `digest` and `delete` take HOST/IMAGE[:TAG|@DIGEST] for registry://HOST/IMAGE[:TAG|@DIGEST] too.

In all of these, %3F is a literal ?, and %25 a literal %. What stands behind the ? wins over the option of the same meaning.

Destinations:
  registry://HOST/IMAGE[:TAG]           an image in a registry
      ?compression=gzip|zstd[:LEVEL]    as --compression
      ?format=keep|docker|oci           as --format
      ?max_workers=N                    as --parallel
  docker://IMAGE:TAG                    an image in Docker or Podman, found likewise
      ?socket=PATH                      the socket of the Engine
      ?max_workers=N                    as --parallel
  tar://PATH                            a saved tar for `docker load`; tar://- is standard output
  oci-layout://PATH                     an OCI image layout, a directory that images may share
      ?tag=TAG                          what it is called there [default: its own tag]
      ?tar=true                         one tar, as always where PATH ends with .tar
      ?compression=, ?format=           as for a registry
  dir://PATH                            a directory: manifest.json, the config, each layer as a plain tar
      ?unique_names=true                shared by images: layers are stored once and not fetched again; catalog.json
      ?expand=true                      also unpacked into one tree of files: PATH/manifest; where images share PATH, beside
                                        the manifest that catalog.json names, and called as that is without .json
      ?force=true&verify=true           as --force, as --verify
  oci://PATH                            a runtime bundle for `runc run`: config.json and rootfs
      ?rootless=true                    for the user who makes it, without any right of root
      ?force=true                       as --force

Filters, in the order in which they are given (-f NAME[:KEY=VALUE[,KEY=VALUE]...]):
  normalize-timestamps[:ts=SECONDS,mode=set|clamp]        set every time to SECONDS (0), or only later ones
  exclude:pattern=GLOB[,GLOB]...                          remove files; a directory goes with all that is in it. Whiteouts
                                                          stay, also where they are named: what they hide would come back
  search:pattern=GLOB[,regex=true,script-friendly=true]   print the files that match, and pass everything on
  inspect:file=PATH                                       append a JSON line about the layers as they stand there; print it,
                                                          if PATH is -

A * in a GLOB matches / too: 'etc/*.conf' matches etc/a/b.conf.

Coordinator, whose workers filter and compress where --coordinator names one (a running `occy-server`):
  registry://...   is read and written by the coordinator, as it is set up, logged in as this process would be (a job: as the
                   options say): no byte of it passes here
  all others       are on this machine, and their images are streamed to the coordinator and back
  oci-layout://... is lent to it by `copy`, `verify`, and `process` with --all, --signatures or --provenance: it asks for what it needs,
                   and stores there what it made. `copy` and `verify` of two layouts are done here
  An image that is only looked at (info, check) and is on this machine is looked at here. `job` runs without anybody waiting.

Exit status:
  0    done
  1    failed: the destination is as it was before
  2    the command line is wrong
  3    `check` found something wrong with the image, or `verify` that it is not what its provenance says
  4    the destination was written, but results could not be printed, or appended to the file of `inspect`
  5    `mirror` did a part: each image that failed or was refused is told of, and its target is as it was before
  6    `verify` could not compare all: the image was made by another version of what rewrites or compresses layers
  130  interrupted (143 by SIGTERM, 129 by SIGHUP): the destination is as it was before";

const MIRROR: &str = r#"What is mirrored where is a file in YAML:

  mirrors:
    - sources: [docker.io/library/busybox]            # HOST/REPOSITORY; HOST/PATTERN or HOST: those of its catalog
      targets: ["localhost:5000/{repository}", "localhost:5001/mirror/{name}"]
      tags:                                           # all, where it is left out
        - names: [latest]
        - semver: [">=1.30, <2"]                      # one of these ranges
          exclude: ["*-rc*"]                          # globs; also: globs, regexes, exclude_regexes
          newest: 3                                   # the highest versions
      platforms: [linux/amd64, linux/arm64]           # all, where it is left out; `sparse: true` keeps the index as it is
      referrers: true                                 # with signatures and SBOMs
      filters: ["exclude:pattern=*.pyc"]              # that every image passes on its way, written as for `process -f`
      provenance: true                                # beside each such image a statement of how it was made, for `verify`
      backup: "before-{tag}-{digest}"                 # the tag of what a tag named before it was given to another manifest
      immutable: ["v*"]                               # tags that stay what they are
      deletion: {max: 5}                              # delete what the source lost, if that is no more
  schedule: {cron: "0 3 * * *", jitter: 10m}          # or {interval: 6h}: when a coordinator makes it, see `mirror schedule put`

`occyctl mirror schema` prints its JSON schema. Each blob is fetched once, however many images and targets need it, goes up once to
each registry that lacks it, and is mounted in its other repositories. What is the same is not looked into: a tag costs one HEAD at
the source and one at each target, beside the lists of tags (with `platforms` or `referrers`, and without `filters`, also the
manifests; never a blob).
Nothing is kept between runs.

Where no way leads from source to target, --to saves what is wanted in a directory or tar, and --from, with the same file, makes a
mirror of it there. `mirror digests HOST` lists what a target has: what --have FILE names is not saved, and is mounted there.

With --coordinator a mirror is a job: the coordinator asks the registries and moves the bytes, and goes on when this process is gone
(`job watch`, `job cancel`); its report is printed here, with the same exit status. What is killed begins anew, and moves no blob twice.

A file's `schedule` is for `mirror schedule put`, which gives the file to a coordinator; here the mirror is made once, now.

One image's failure is none of the others', and nothing is deleted while something cannot be listed. --dry-run prints what would
be done, and what it takes; nothing is written then.

Examples:
  occyctl mirror -c mirror.yaml --dry-run
  occyctl mirror -c mirror.yaml --output-format json
  occyctl mirror -c mirror.yaml --coordinator http://localhost:7700 --idempotency-key nightly-2026-11-26
  occyctl mirror schedule put nightly -c mirror.yaml --coordinator http://localhost:7700
  occyctl mirror schema > mirror.schema.json
  occyctl mirror digests localhost:5000 > have
  occyctl mirror -c mirror.yaml --to oci-layout:///media/usb/images.tar --have have
  occyctl mirror -c mirror.yaml --from oci-layout:///media/usb/images.tar --have have
  occyctl mirror import-regsync regsync.yml > mirror.yaml
  occyctl mirror import-skopeo sync.yml --to localhost:5000/repo > mirror.yaml

Exit status is 0 when all targets are as their sources, 5 when some are not, 1 when none is, and 2 when the file is wrong."#;

const SCHEDULE: &str = r#"In the file, beside `mirrors`, stands one of

  schedule: {cron: "0 3 * * *"}                           # minute, hour, day of the month, month, day of the week, by UTC
  schedule: {cron: "30 2 * * MON-FRI", timezone: Europe/Berlin, jitter: 10m}
  schedule: {interval: 6h}                                # counted from when the coordinator got the file

Each time makes one job, as `mirror --coordinator` does, however many coordinators there are; `job list`, `job watch` and `job cancel` know
it. A time that is due while the run before goes on is skipped, and told of here. What was due while no coordinator was there is made up
for once. With `jitter` each time begins up to so much later. Passwords of the options and their variables go along, are kept sealed as long
as the schedule is there, and are replaced by every `put`.

Examples:
  occyctl mirror schedule put nightly -c mirror.yaml --coordinator http://localhost:7700
  occyctl mirror schedule list
  occyctl mirror schedule get nightly --output-format json
  occyctl mirror schedule run nightly --watch
  occyctl mirror schedule delete nightly"#;

/// Copies, filters, searches and checks container images.
///
/// Images are streamed: memory does not grow with their size. An output appears whole or not at all. Results go to standard
/// output, everything else to standard error.
#[derive(Debug, Parser)]
#[command(name = "occyctl", version, after_long_help = EXAMPLES, max_term_width = 120)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) global: Global,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Read an image, pass it through filters, write it.
    #[command(after_long_help = EXAMPLES)]
    Process(Process),
    /// List the files of an image's layers that match a pattern.
    #[command(after_long_help = "\
Examples:
  occyctl search registry://localhost:5000/app:1 '*.conf'
  occyctl search tar://app.tar '^/?etc/.*\\.d/' --regex --script-friendly")]
    Search(Search),
    /// Show what an image is made of.
    #[command(after_long_help = "\
Examples:
  occyctl info registry://docker.io/library/busybox:latest --architecture arm64
  occyctl info tar://app.tar --output-format json")]
    Info(Info),
    /// Recompute every digest, diff_id and size of an image, and list what is wrong with it.
    #[command(after_long_help = "\
Examples:
  occyctl check registry://localhost:5000/app:1
  occyctl check registry://localhost:5000/app:1 --fast

Exit status is 3 when something is wrong with the image.")]
    Check(Check),
    /// Make an image again as its provenance says, and compare every digest.
    #[command(after_long_help = "\
`occyctl process --provenance`, or a mirror with `provenance: true`, puts an in-toto statement beside an image, as a referrer: its
source's digest, the filters, the versions of what rewrites and compresses layers, and each layer's digests before and after. `verify`
finds it, reads the source by that digest, passes it through the same filters, and compares what it makes with the statement and with
the image's manifest, which names every byte of it by digest. Nothing is stored. The image's own layers are not read, for `check` does that; but where another version has
compressed them, they are, and what is in them is compared.

The source's registry is the statement's word: where it is not the image's own, it is reached at public addresses only, or where
--allow-network or --source says, and without a password of the command line but --source-password. The image's registry gets that of
--destination-password. The statement is not signed, and whoever may write beside the image can put one there: read what it says the
image was made of. Where there are several, each has to be right.

With --coordinator it is done there, and the source's registry is one that its operator allows; it gets a login only with --source.

Examples:
  occyctl process registry://localhost:5000/app:1 registry://localhost:5000/clean:1 -f normalize-timestamps --provenance
  occyctl verify localhost:5000/clean:1
  occyctl verify localhost:5000/clean:1 --source localhost:5001/mirror/app

Exit status is 0 when the image was made again bit for bit, 3 when it is not what a statement says, 6 when another version has made it and
not all can be compared, and 1 when it has no provenance, or its source is not there.")]
    Verify(Verify),
    /// Copy an image, an index or an artifact as it is, bit for bit.
    #[command(after_long_help = "\
An index is copied whole, with the images of all its platforms; whatever has a manifest is copied, whatever its media types are:
Helm charts, SBOMs, signatures. No blob that the destination has is moved, nor one that it can mount from another repository of the
same registry. The tag is the last thing that is written.

Examples:
  occyctl copy docker.io/library/busybox:1.36 localhost:5000/busybox:1.36
  occyctl copy localhost:5000/app:1 localhost:5000/mirror/app:1 --referrers
  occyctl copy docker.io/library/busybox:1.36 oci-layout://busybox --platform linux/amd64 --platform linux/arm64
  occyctl copy docker.io/library/busybox:1.36 localhost:5000/busybox:1.36 --platform linux/amd64 --sparse")]
    Copy(Copy),
    /// Keep many images of many repositories at other registries, as a file says.
    #[command(args_conflicts_with_subcommands = true, after_long_help = MIRROR)]
    Mirror(Mirror),
    /// List the repositories of a registry, the tags of a repository, or the images of a layout.
    #[command(
        visible_alias = "list",
        after_long_help = "\
Examples:
  occyctl ls localhost:5000
  occyctl ls localhost:5000/app
  occyctl ls oci-layout://mirror"
    )]
    Ls(Ls),
    /// List the tags of a repository.
    #[command(after_long_help = "\
Examples:
  occyctl tags docker.io/library/busybox --sort version
  occyctl tags localhost:5000/app --output-format json")]
    Tags(Tags),
    /// Print the digest of the manifest that a name means.
    #[command(after_long_help = "\
Examples:
  occyctl digest docker.io/library/busybox:1.36
  occyctl digest docker.io/library/busybox:1.36 --platform linux/arm64")]
    Digest(DigestOf),
    /// Delete an image from a registry.
    #[command(after_long_help = "\
A tag is deleted alone where the registry can do that. Many registries delete manifests only, and with one all tags that name it:
then nothing is deleted if there are others, unless --yes says that they are meant too. Blobs stay until the registry collects them.

Examples:
  occyctl delete localhost:5000/app:1
  occyctl delete localhost:5000/app@sha256:9f2c... --yes")]
    Delete(Delete),
    /// Have a coordinator work through images on its own: submit jobs, and see what becomes of them.
    #[command(subcommand)]
    Job(Job),
    /// List the workers of a coordinator.
    #[command(after_long_help = "\
Example:
  occyctl workers --coordinator http://localhost:7700")]
    Workers,
    /// Print a completion script for a shell.
    #[command(after_long_help = "\
Examples:
  occyctl completions bash > /etc/bash_completion.d/occyctl
  occyctl completions zsh > \"${fpath[1]}/_occyctl\"")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    #[command(after_long_help = "\
Example:
  occyctl man > /usr/local/share/man/man1/occyctl.1")]
    Man,
}

/// What is done with an image, by this process or by a coordinator.
#[derive(Debug, Args)]
pub(crate) struct Work {
    /// Where the image comes from.
    pub(crate) source: String,
    /// Where it goes.
    pub(crate) destination: String,
    /// A filter; repeat it for several, which work in the order given.
    #[arg(short = 'f', long = "filter", value_name = "FILTER")]
    pub(crate) filters: Vec<String>,
    /// Compress every layer that a registry gets with gzip[:1-9] or zstd[:1-19], unless it has that format already. By
    /// default a layer keeps the compression that it has, and what has none gets gzip.
    #[arg(long, value_name = "FORMAT[:LEVEL]", env = "OCCYSTRAP_COMPRESSION")]
    pub(crate) compression: Option<Compression>,
    /// The manifest that a registry gets: keep (the source's format), docker (schema2) or oci.
    #[arg(long, value_name = "FORMAT", env = "OCCYSTRAP_FORMAT")]
    pub(crate) format: Option<ManifestFormat>,
    /// Decompress and check also layers that could be copied as they are.
    #[arg(long, env = "OCCYSTRAP_VERIFY_DIFF_IDS")]
    pub(crate) verify_diff_ids: bool,
    /// Copy the bytes of foreign (non-distributable) layers too, from the source's registry or from where their manifest
    /// says. By default a registry or layout gets no more than that they are there.
    #[arg(long, env = "OCCYSTRAP_FOREIGN_LAYERS")]
    pub(crate) foreign_layers: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Process {
    #[command(flatten)]
    pub(crate) work: Work,
    /// Replace a destination that is a directory and not empty. It is lost only when the new one is complete.
    #[arg(long, env = "OCCYSTRAP_FORCE")]
    pub(crate) force: bool,
    /// Read the layers that a shared directory has already, and fetch those again that are damaged.
    #[arg(long, env = "OCCYSTRAP_VERIFY")]
    pub(crate) verify: bool,
    #[command(flatten)]
    pub(crate) whole: Whole,
}

/// What is wanted besides the image itself.
#[derive(Debug, Args)]
pub(crate) struct Whole {
    /// Work on an index as a whole: without filters it is copied bit for bit, with the images of all its platforms and their
    /// attestations; with filters every image passes them, and the index is made anew of what they become, in its order and with
    /// its annotations.
    #[arg(long, env = "OCCYSTRAP_ALL", conflicts_with_all = ["compression", "format"])]
    all: bool,
    /// What becomes of the attestation of an image that filters of --all change [default: drop].
    #[arg(long, value_enum, value_name = "WHAT", requires = "all")]
    attestations: Option<Attestations>,
    /// What becomes of signatures when the image changes [default: with --all refuse, otherwise drop]. Unless they are dropped, the
    /// source is asked for them, with three or four requests for each manifest that has changed.
    #[arg(long, value_enum, value_name = "WHAT")]
    signatures: Option<Signatures>,
    /// Put a statement of how it was made beside the image, for `verify`: an in-toto statement as a referrer; with --all, beside the index
    /// and each image that changed.
    #[arg(long)]
    provenance: bool,
}

impl Whole {
    pub(crate) fn wanted(&self) -> Wanted {
        Wanted {
            all: self.all,
            attestations: match self.attestations {
                None | Some(Attestations::Drop) => index::Attestations::Drop,
                Some(Attestations::Retarget) => index::Attestations::Retarget,
            },
            signatures: self.signatures.map(Into::into),
            provenance: self.provenance,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Search {
    /// Where the image comes from.
    pub(crate) source: String,
    /// A glob, which a path or its last component has to match.
    pub(crate) pattern: String,
    /// The pattern is a regular expression, searched for in the path.
    #[arg(long)]
    pub(crate) regex: bool,
    /// One line a file: IMAGE:TAG:LAYER:PATH.
    #[arg(long)]
    pub(crate) script_friendly: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Info {
    /// Where the image comes from.
    pub(crate) source: String,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Where the image comes from.
    pub(crate) source: String,
    /// Only look whether manifest and config agree and every blob is there in its size; read no layer.
    #[arg(long)]
    pub(crate) fast: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// The image or index: HOST/IMAGE[:TAG|@DIGEST] or oci-layout://PATH[?tag=TAG].
    pub(crate) image: String,
    /// Where its source is, if not where the provenance says: HOST/IMAGE or oci-layout://PATH. Which one it is the provenance says.
    #[arg(long, value_name = "PLACE")]
    pub(crate) source: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Copy {
    /// Where the image comes from: HOST/IMAGE[:TAG|@DIGEST] or oci-layout://PATH[?tag=TAG].
    pub(crate) source: String,
    /// Where it goes: HOST/IMAGE[:TAG] or oci-layout://PATH[?tag=TAG].
    pub(crate) destination: String,
    /// Of an index, copy the image for this platform alone, with its attestations, in a new index of those that are named; repeat
    /// it for several.
    #[arg(long = "platform", value_name = "OS/ARCH[/VARIANT]")]
    pub(crate) platforms: Vec<Platform>,
    /// Keep manifests, and with them their digests, as they are, although not all that they name is copied: of an index the images
    /// for other platforms than were named, and whatever the source does not have. Not every registry takes them.
    #[arg(long)]
    pub(crate) sparse: bool,
    /// Copy also what names the manifests as its subject (signatures, SBOMs, attestations), and the tags that cosign names after
    /// their digests.
    #[arg(long)]
    pub(crate) referrers: bool,
    /// Fail rather than write a manifest with another digest than the source's.
    #[arg(long)]
    pub(crate) preserve_digests: bool,
    /// What becomes of the signatures of an index of which some platforms are copied [default: refuse].
    #[arg(long, value_enum, value_name = "WHAT", requires = "platforms", conflicts_with = "sparse")]
    pub(crate) signatures: Option<Signatures>,
    /// Copy the bytes of foreign (non-distributable) layers too.
    #[arg(long, env = "OCCYSTRAP_FOREIGN_LAYERS")]
    pub(crate) foreign_layers: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Mirror {
    #[command(subcommand)]
    pub(crate) command: Option<MirrorCommand>,
    /// What is mirrored where.
    #[arg(short, long, value_name = "FILE", required = true)]
    pub(crate) config: Option<PathBuf>,
    /// Print what would be done, and its price; write nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Save what is wanted in a directory, or in a tar, instead: to be carried to where its targets are.
    #[arg(long, value_name = "oci-layout://PATH", conflicts_with = "from")]
    pub(crate) to: Option<String>,
    /// Take what is wanted out of a directory or tar that --to has made, instead of its registries.
    #[arg(long, value_name = "oci-layout://PATH")]
    pub(crate) from: Option<String>,
    /// What the target registries have, as `mirror digests` prints it: with --to it is left out, with --from it is mounted.
    #[arg(long, value_name = "FILE")]
    pub(crate) have: Option<PathBuf>,
    /// With --coordinator, a name for this submission: another one with the same name, file and options is the same job.
    #[arg(long, value_name = "KEY")]
    pub(crate) idempotency_key: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum MirrorCommand {
    /// Print the digests of all blobs that repositories have, and where they are: for --have.
    Digests {
        /// HOST, HOST/PATTERN or HOST/REPOSITORY.
        #[arg(required = true)]
        places: Vec<String>,
    },
    /// Print a file of regsync as one of ours; what cannot be carried over is told of.
    ImportRegsync {
        /// The file of regsync.
        file: PathBuf,
    },
    /// Print a file of `skopeo sync --src yaml` as one of ours; what cannot be carried over is told of.
    ImportSkopeo {
        /// The file of skopeo.
        file: PathBuf,
        /// Where its images go, which skopeo is told beside the file: HOST[/PATH].
        #[arg(long, value_name = "HOST[/PATH]")]
        to: String,
    },
    /// Print the JSON schema of the file.
    Schema,
    /// Have a coordinator make mirrors by itself, at the times that their files say.
    #[command(subcommand, after_long_help = SCHEDULE)]
    Schedule(Schedule),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Schedule {
    /// Give a coordinator a file whose `schedule` says when its mirror is made; or another file for the schedule of that name.
    #[command(after_long_help = SCHEDULE)]
    Put(PutSchedule),
    /// Show a schedule: what is due next, what came of its last run, and its file.
    Get(ScheduleName),
    /// List schedules: when each is due, the job of its last run and where that is, and how often a time was skipped.
    List,
    /// Delete a schedule and its credentials. A run that goes on is a job, and goes on.
    Delete(ScheduleName),
    /// Let nothing be due any more, until it is resumed.
    Pause(ScheduleName),
    /// Let be due again what is to come.
    Resume(ScheduleName),
    /// Make the mirror once now, unless a run goes on, and print the job.
    Run(RunSchedule),
}

#[derive(Debug, Args)]
pub(crate) struct PutSchedule {
    /// Its name: letters, digits, `-`, `_` and `.`.
    pub(crate) name: String,
    /// What is mirrored where, and when.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) config: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct ScheduleName {
    /// Its name.
    pub(crate) name: String,
    /// Whose it is, as an administrator sees it in `list` [default: your own].
    #[arg(long, value_name = "TENANT")]
    pub(crate) tenant: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RunSchedule {
    #[command(flatten)]
    pub(crate) schedule: ScheduleName,
    /// Follow the job to its end, and print its report.
    #[arg(long)]
    pub(crate) watch: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// A registry HOST[:PORT], a repository HOST/IMAGE, or oci-layout://PATH.
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Tags {
    /// The repository: HOST/IMAGE, or oci-layout://PATH.
    pub(crate) repository: String,
    /// The order.
    #[arg(long, value_enum, value_name = "ORDER", default_value_t = Order::Registry)]
    pub(crate) sort: Order,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Order {
    /// As the registry has it, page by page as it comes.
    Registry,
    /// By characters.
    Name,
    /// As people count: 1.9 before 1.10, 2.0-rc1 before 2.0.
    Version,
}

#[derive(Debug, Args)]
pub(crate) struct DigestOf {
    /// The image: HOST/IMAGE[:TAG] or oci-layout://PATH[?tag=TAG].
    pub(crate) image: String,
    /// Of an index, the digest of the image for this platform, and not of the index.
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub(crate) platform: Option<Platform>,
}

#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// The image: HOST/IMAGE:TAG or HOST/IMAGE@DIGEST.
    pub(crate) image: String,
    /// Delete it also where other tags that name the same manifest go with it.
    #[arg(short, long)]
    pub(crate) yes: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Job {
    /// Submit a job: it then runs to its end, whatever becomes of this machine and of the coordinator's process.
    #[command(after_long_help = "\
Paths are the coordinator's own, where its operator allows them.

Examples:
  occyctl job submit registry://docker.io/library/busybox:1.36 registry://localhost:5000/busybox:1.36
  occyctl job submit registry://localhost:5000/app:1 registry://localhost:5000/clean:1 -f exclude:pattern=*.log --watch")]
    Submit(SubmitJob),
    /// Show a job: its state, its layers, and what came of it.
    Get(JobId),
    /// List jobs, the newest first.
    List(ListJobs),
    /// Follow a job to its end, and print what its filters found. Ctrl-C stops the watching alone.
    #[command(after_long_help = "\
A coordinator that is started again meanwhile is asked for what was missed. With --output-format json, each event is a line.

Exit status is that of `process`: 0 when the image is at its destination, 1 when the job failed or was cancelled.")]
    Watch(WatchJob),
    /// Cancel a job; its destination stays as it is.
    Cancel(JobId),
}

#[derive(Debug, Args)]
pub(crate) struct SubmitJob {
    #[command(flatten)]
    pub(crate) work: Work,
    #[command(flatten)]
    pub(crate) whole: Whole,
    /// A name for this submission: another one with the same name and the same options is the same job.
    #[arg(long, value_name = "KEY")]
    pub(crate) idempotency_key: Option<String>,
    /// Among your own jobs, those of the greatest priority have their turn first: -100 to 100. Those of others are not held up by it.
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-100..=100))]
    pub(crate) priority: i32,
    /// Follow the job to its end.
    #[arg(long)]
    pub(crate) watch: bool,
}

#[derive(Debug, Args)]
pub(crate) struct JobId {
    /// The job, as `job submit` and `job list` call it.
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct ListJobs {
    /// Only jobs in this state; repeat it for several.
    #[arg(long = "state", value_enum, value_name = "STATE")]
    pub(crate) states: Vec<JobState>,
    /// Jobs at most.
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(crate) limit: usize,
}

#[derive(Debug, Args)]
pub(crate) struct WatchJob {
    /// The job, as `job submit` and `job list` call it.
    pub(crate) id: String,
    /// Begin behind the event with this number.
    #[arg(long, value_name = "SEQUENCE", default_value_t = 0)]
    pub(crate) after: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum JobState {
    /// Accepted, and not begun.
    Queued,
    /// Its layers are on their way.
    Running,
    /// All layers are there; the image is made visible.
    Finalizing,
    /// The image is at its destination.
    Succeeded,
    /// It is not.
    Failed,
    /// Somebody cancelled it.
    Cancelled,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Attestations {
    /// It is left out: what it says is true of the image as it was.
    Drop,
    /// It stays as it is, now as an attestation of the new image; its statements still name the old one.
    Retarget,
}

/// What becomes of the signatures of a manifest that changes: those that name it as their subject (notation's, sigstore's), and
/// those under cosign's tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Signatures {
    /// What is signed is not changed: that is an error, and the destination stays as it is.
    Refuse,
    /// They stay where they are, and nobody asks for them.
    Drop,
    /// They go along as they are, as the original's. From the new manifest leads a referrer that names the original.
    Keep,
}

impl From<Signatures> for SignaturePolicy {
    fn from(wanted: Signatures) -> Self {
        match wanted {
            Signatures::Refuse => Self::Refuse,
            Signatures::Drop => Self::Drop,
            Signatures::Keep => Self::Keep,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people.
    Text,
    /// For programs: a JSON document for each result.
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressStyle {
    /// Bars on a terminal, lines elsewhere.
    Auto,
    /// A bar for each layer.
    Bars,
    /// A line every 10 seconds.
    Plain,
    /// Nothing.
    None,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// The operating system to choose from an index [default: linux].
    #[arg(long, global = true, env = "OCCYSTRAP_OS")]
    pub(crate) os: Option<String>,
    /// The architecture to choose from an index, in Go's names: amd64, arm64... [default: this machine's].
    #[arg(long, visible_alias = "arch", global = true, env = "OCCYSTRAP_ARCHITECTURE")]
    pub(crate) architecture: Option<String>,
    /// The variant of the architecture to choose from an index, for example v7.
    #[arg(long, global = true, env = "OCCYSTRAP_VARIANT")]
    pub(crate) variant: Option<String>,
    /// Layers that are worked on at once.
    #[arg(short = 'j', long, value_name = "N", default_value_t = 4, value_parser = parallel, global = true, env = "OCCYSTRAP_PARALLEL")]
    pub(crate) parallel: usize,
    /// The user of both registries; otherwise docker's config.json is asked, and then podman's auth.json.
    #[arg(long, global = true, env = "OCCYSTRAP_USERNAME")]
    pub(crate) username: Option<String>,
    /// The password or token that goes with it. The variable keeps it out of the process list.
    #[arg(long, global = true, env = "OCCYSTRAP_PASSWORD", hide_env_values = true)]
    pub(crate) password: Option<String>,
    /// The user of the source's registry alone.
    #[arg(long, global = true, env = "OCCYSTRAP_SOURCE_USERNAME")]
    pub(crate) source_username: Option<String>,
    /// Its password.
    #[arg(long, global = true, env = "OCCYSTRAP_SOURCE_PASSWORD", hide_env_values = true)]
    pub(crate) source_password: Option<String>,
    /// The user of the destination's registry alone.
    #[arg(long, global = true, env = "OCCYSTRAP_DESTINATION_USERNAME")]
    pub(crate) destination_username: Option<String>,
    /// Its password.
    #[arg(long, global = true, env = "OCCYSTRAP_DESTINATION_PASSWORD", hide_env_values = true)]
    pub(crate) destination_password: Option<String>,
    /// Docker's config.json, or the directory that it is in [default: $DOCKER_CONFIG, then ~/.docker; then podman's auth.json:
    /// $REGISTRY_AUTH_FILE, or in $XDG_RUNTIME_DIR/containers or ~/.config/containers].
    #[arg(long, value_name = "PATH", global = true, env = "OCCYSTRAP_DOCKER_CONFIG")]
    pub(crate) docker_config: Option<PathBuf>,
    /// A registry that is spoken to without a trusted certificate, or without TLS at all. Plain HTTP on this host needs no word;
    /// an untrusted certificate does, there too.
    #[arg(
        long,
        value_name = "HOST[:PORT]",
        value_delimiter = ',',
        value_parser = host,
        global = true,
        env = "OCCYSTRAP_INSECURE"
    )]
    pub(crate) insecure: Vec<String>,
    /// Trust the certificate authorities in this PEM file too.
    #[arg(long, value_name = "FILE", value_delimiter = ',', global = true, env = "OCCYSTRAP_CA_CERT")]
    pub(crate) ca_cert: Vec<PathBuf>,
    /// Show registries the client certificate in this PEM file.
    #[arg(long, value_name = "FILE", requires = "client_key", global = true, env = "OCCYSTRAP_CLIENT_CERT")]
    pub(crate) client_cert: Option<PathBuf>,
    /// The private key of the client certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "client_cert", global = true, env = "OCCYSTRAP_CLIENT_KEY")]
    pub(crate) client_key: Option<PathBuf>,
    /// Let a registry send us to token servers and storage in this private network or on this host.
    #[arg(
        long,
        value_name = "CIDR|HOST",
        value_delimiter = ',',
        global = true,
        env = "OCCYSTRAP_ALLOW_NETWORK"
    )]
    pub(crate) allow_network: Vec<String>,
    /// How often a request that failed for a passing reason is sent again.
    #[arg(long, value_name = "N", default_value_t = Self::RETRIES, global = true, env = "OCCYSTRAP_RETRIES")]
    pub(crate) retries: u32,
    /// Where temporary files go. They have no names, and are gone when the process is [default: $TMPDIR, then /tmp].
    #[arg(long, value_name = "DIR", global = true, env = "OCCYSTRAP_TEMP_DIR")]
    pub(crate) temp_dir: Option<PathBuf>,
    /// All temporary files together may take this many bytes. K, M, G and T, or KiB..., are powers of 1024; KB, MB, GB and TB of
    /// 1000.
    #[arg(long, value_name = "SIZE", default_value = "256G", value_parser = size::parse, global = true, env = "OCCYSTRAP_SPOOL_LIMIT")]
    pub(crate) spool_limit: u64,
    /// A layer that is larger uncompressed is refused.
    #[arg(long, value_name = "SIZE", default_value = "1T", value_parser = size::parse, global = true, env = "OCCYSTRAP_MAX_LAYER_SIZE")]
    pub(crate) max_layer_size: u64,
    /// Have this coordinator do the work: http://HOST:PORT, or https://HOST:PORT.
    #[arg(long, value_name = "URL", global = true, env = "OCCYSTRAP_COORDINATOR")]
    pub(crate) coordinator: Option<String>,
    /// Trust a coordinator whose certificate comes from an authority in this PEM file [default: the system's authorities].
    #[arg(long, value_name = "FILE", global = true, env = "OCCYSTRAP_TLS_CA")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Show the coordinator the client certificate in this PEM file.
    #[arg(long, value_name = "FILE", requires = "tls_key", global = true, env = "OCCYSTRAP_TLS_CERT")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The private key of that certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert", global = true, env = "OCCYSTRAP_TLS_KEY")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Send the coordinator the token in this file. It is sent over TLS, or to this machine, and nowhere else.
    #[arg(long, value_name = "FILE", global = true, env = "OCCYSTRAP_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// How results are printed.
    #[arg(long, value_enum, default_value_t = OutputFormat::Text, global = true, env = "OCCYSTRAP_OUTPUT_FORMAT")]
    pub(crate) output_format: OutputFormat,
    /// How progress is shown, on standard error.
    #[arg(long, value_enum, default_value_t = ProgressStyle::Auto, global = true, env = "OCCYSTRAP_PROGRESS")]
    pub(crate) progress: ProgressStyle,
    /// Say nothing but errors.
    #[arg(short, long, conflicts_with = "verbose", global = true, env = "OCCYSTRAP_QUIET")]
    pub(crate) quiet: bool,
    /// Say more: -v what is retried and skipped, -vv each request, -vvv all there is.
    #[arg(short, long, action = clap::ArgAction::Count, global = true, env = "OCCYSTRAP_VERBOSE")]
    pub(crate) verbose: u8,
}

impl Global {
    /// How often a request is sent again where nobody says it.
    pub(crate) const RETRIES: u32 = 4;
}

fn parallel(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=256) => Ok(count),
        _ => Err("expected a number from 1 to 256".to_owned()),
    }
}

/// A host with or without a port. There is no word for all hosts.
fn host(text: &str) -> Result<String, String> {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte);
    if !text.is_empty() && text.bytes().all(is_good) {
        Ok(text.to_owned())
    } else {
        Err("expected HOST or HOST:PORT".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn every_global_option_has_its_variable() {
        use clap::CommandFactory;
        for argument in Cli::command().get_arguments().filter(|argument| argument.is_global_set()) {
            let name = argument.get_id().as_str();
            let variable = format!("OCCYSTRAP_{}", name.to_uppercase());
            assert_eq!(argument.get_env().and_then(|env| env.to_str()), Some(variable.as_str()), "{name}");
        }
    }
}
