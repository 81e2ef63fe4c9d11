//! What a member of an export is, told by its name: the export's own `manifest.json` comes last, when the layers are gone.
//!
//! Podman calls a layer `<diff_id>.tar`, Docker 25 and later `blobs/sha256/<diff_id>`. Before that Docker called it
//! `<id>/layer.tar`, by an id of its own from the time before diff_ids. That id is a hash over the layers below and, but for
//! the top layer, over nothing else that is not known beforehand (moby, `image/v1/imagev1.go`, `CreateID`), so it is computed
//! here; the top layer is the one whose `json` names the id of the layer below as its parent. Both are hints: whatever
//! a member is called, its bytes have to hash to the diff_id.

use std::collections::HashMap;

use serde::Deserialize;

use crate::digest::Digest;

/// The JSON of a layer's image configuration before version 1.9 of Docker, of which all but two fields are always empty.
const EMPTY_CONTAINER: &str = r#"{"Hostname":"","Domainname":"","User":"","AttachStdin":false,"AttachStdout":false,"AttachStderr":false,"Tty":false,"OpenStdin":false,"StdinOnce":false,"Env":null,"Cmd":null,"Image":"","Volumes":null,"WorkingDir":"","Entrypoint":null,"OnBuild":null,"Labels":null}"#;

/// What the members of an image's export are called.
#[derive(Clone, Debug)]
pub(super) struct Names {
    config: Option<Digest>,
    /// By the hex of its diff_id, the first layer that has it: what stands twice in an image is sent once.
    by_diff_id: HashMap<String, usize>,
    /// By the id that Docker used before it had diff_ids.
    by_id: HashMap<String, usize>,
    /// The id of the layer below the top.
    below_top: Option<String>,
    top: Option<usize>,
}

/// What a member is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The image's config.
    Config,
    /// A layer, if its bytes are what its name says.
    Layer(usize),
    /// A layer; which one, its bytes tell.
    SomeLayer,
    /// The description of the layer with this id.
    Description(String),
    /// Nothing that is needed.
    Other,
}

/// The part of a layer's description that tells its place.
#[derive(Debug, Deserialize)]
struct Description {
    parent: Option<String>,
}

impl Names {
    /// The members' names of an image with that Id and these diff_ids.
    pub(super) fn new(config: Option<Digest>, diff_ids: &[Digest]) -> Self {
        let mut names =
            Self { config, by_diff_id: HashMap::new(), by_id: HashMap::new(), below_top: None, top: None };
        let mut chain: Option<Digest> = None;
        for (index, diff_id) in diff_ids.iter().enumerate() {
            let index = *names.by_diff_id.entry(diff_id.hex().to_owned()).or_insert(index);
            names.top = Some(index);
            chain = Some(match chain {
                None => diff_id.clone(),
                Some(below) => Digest::sha256(format!("{below} {diff_id}")),
            });
            // One more than there is a use for: the top layer has another id.
            if let Some(chain) = &chain
                && names.by_id.len() + 1 < diff_ids.len()
            {
                let id = layer_id(chain, names.below_top.as_deref());
                names.by_id.insert(id.clone(), index);
                names.below_top = Some(id);
            }
        }
        names
    }

    /// What the member at `path` is.
    pub(super) fn role(&self, path: &str) -> Role {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let layer = |hex: &str| self.by_diff_id.get(hex).map(|&index| Role::Layer(index));
        let is_config = |hex: &str| self.config.as_ref().is_some_and(|config| config.hex() == hex);
        match (directory, name) {
            ("blobs/sha256", hex) if is_config(hex) => Role::Config,
            ("blobs/sha256", hex) => layer(hex).unwrap_or(Role::Other),
            ("", name) if name.strip_suffix(".json").is_some_and(is_config) => Role::Config,
            (id, "layer.tar") => self.by_id.get(id).map_or(Role::SomeLayer, |&index| Role::Layer(index)),
            (id, "json") if !id.is_empty() => Role::Description(id.to_owned()),
            (_, name) => match name.strip_suffix(".tar") {
                Some(hex) => layer(hex).unwrap_or(Role::SomeLayer),
                None => Role::Other,
            },
        }
    }

    /// Takes note of a layer's description, which stands before the layer.
    pub(super) fn describe(&mut self, id: &str, json: &[u8]) {
        let Ok(description) = serde_json::from_slice::<Description>(json) else { return };
        if let Some(top) = self.top
            && !self.by_id.contains_key(id)
            && description.parent.filter(|parent| !parent.is_empty()) == self.below_top
        {
            self.by_id.insert(id.to_owned(), top);
        }
    }

    /// The layer with this diff_id.
    pub(super) fn layer(&self, diff_id: &Digest) -> Option<usize> {
        self.by_diff_id.get(diff_id.hex()).copied()
    }
}

/// The id that Docker gave to the layer with this chain id, over the layer with the id `parent`.
fn layer_id(chain: &Digest, parent: Option<&str>) -> String {
    let parent = parent.map(|parent| format!(r#","parent":"sha256:{parent}""#)).unwrap_or_default();
    let json = format!(
        r#"{{"container_config":{EMPTY_CONTAINER},"created":"1970-01-01T00:00:00Z","layer_id":"{chain}"{parent}}}"#
    );
    Digest::sha256(json).hex().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(hex: &str) -> Digest {
        Digest::from_sha256_hex(hex).unwrap()
    }

    /// Of `tests/images/hello.tar`, which Docker 20.10 saved.
    const DIFF_IDS: [&str; 4] = [
        "5bc425219c8c8ae73e6d08062a80538a4715178ae91bc33051cc044a5d16748d",
        "a3b994ecd8d6ca3e02c2f6bd6562e84e48e5b11f397ede35e28d8b8b491fed83",
        "4bf2c4d1cedef926bad6e4e64989809b2ada609df98a68085f4a1e1cc258f8b4",
        "f84b6124fd940a9324ebcd0d688acda9497a8c3f18ed1d28013a7c116705753e",
    ];
    const IDS: [&str; 4] = [
        "4b7419cf9cd1e25072b7c30201a16e46d24b765eaddfd3e80a9ef8c9cf4f9ced",
        "ba7323ac313b26da873a2a6f209392d4d817d68fdba2970c4ca6c480beead071",
        "181e7bd4a5ce359c693c09382ea15e07cc32734d2bef6b3bf3ba4533f35386cb",
        "61cec0638cd909acc4aa2db4c975c5bb527144fd6dd238547b27b26c507026e9",
    ];
    const CONFIG: &str = "0e5079c2db5d2ee4e8c82be19eb92567539c0776c2121ea34f9a791557f9ad8e";

    fn names() -> Names {
        Names::new(Some(digest(CONFIG)), &DIFF_IDS.map(digest))
    }

    #[test]
    fn the_ids_of_dockers_own_store_are_foretold_but_for_the_top_layers() {
        let mut names = names();
        for (index, id) in IDS[..3].iter().enumerate() {
            assert_eq!(names.role(&format!("{id}/layer.tar")), Role::Layer(index));
        }
        let top = format!("{}/layer.tar", IDS[3]);
        assert_eq!(names.role(&top), Role::SomeLayer);
        names.describe(IDS[3], format!(r#"{{"id":"{}","parent":"{}"}}"#, IDS[3], IDS[1]).as_bytes());
        assert_eq!(names.role(&top), Role::SomeLayer, "it stands over another layer");
        names.describe(IDS[3], format!(r#"{{"id":"{}","parent":"{}"}}"#, IDS[3], IDS[2]).as_bytes());
        assert_eq!(names.role(&top), Role::Layer(3));
    }

    #[test]
    fn the_only_layer_has_no_parent() {
        let mut names = Names::new(None, &[digest(DIFF_IDS[0])]);
        names.describe("abc", br#"{"id":"abc"}"#);
        assert_eq!(names.role("abc/layer.tar"), Role::Layer(0));
    }

    #[test]
    fn newer_exports_name_layers_by_their_diff_ids() {
        let names = names();
        assert_eq!(names.role(&format!("{}.tar", DIFF_IDS[2])), Role::Layer(2));
        assert_eq!(names.role(&format!("blobs/sha256/{}", DIFF_IDS[1])), Role::Layer(1));
        assert_eq!(names.role(&format!("blobs/sha256/{CONFIG}")), Role::Config);
        assert_eq!(names.role(&format!("{CONFIG}.json")), Role::Config);
        for other in ["manifest.json", "repositories", "index.json", "oci-layout", "x/VERSION", "json"] {
            assert_eq!(names.role(other), Role::Other, "{other}");
        }
        assert_eq!(names.role(&format!("blobs/sha256/{}", IDS[0])), Role::Other);
        assert_eq!(names.role("something.tar"), Role::SomeLayer);
    }

    #[test]
    fn a_layer_that_stands_twice_is_known_by_its_first_place() {
        let twice = [DIFF_IDS[0], DIFF_IDS[1], DIFF_IDS[0]].map(digest);
        let names = Names::new(None, &twice);
        assert_eq!(names.layer(&twice[2]), Some(0));
        assert_eq!(names.top, Some(0));
    }
}
