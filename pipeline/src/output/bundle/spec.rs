//! The image's config as a runtime's (image-spec, `conversion.md`). What an image does not say is as `runc spec` has it.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::user::{User, UserError};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What annotations of the specification's own begin with.
const ANNOTATION: &str = "org.opencontainers.image";

/// `config.json` of the bundle whose tree is at `rootfs`.
pub(super) fn runtime_config(image: &Value, rootfs: &Path, rootless: bool) -> Result<Value, UserError> {
    let config = &image["config"];
    let mut user = User::find(config["User"].as_str().unwrap_or_default(), rootfs)?;
    if rootless && (user.uid, user.gid) != (0, 0) {
        tracing::warn!(
            "the image runs as {}:{}, and a rootless bundle maps only 0: its container runs as 0:0",
            user.uid,
            user.gid
        );
        user = User { home: user.home, ..User::default() };
    }
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    Ok(json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": true,
            "user": user_object(&user),
            "args": arguments(config),
            "env": environment(config, &user),
            "cwd": working_directory(config),
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": super::ROOTFS, "readonly": false},
        "hostname": "occystrap",
        "mounts": mounts(config, rootless),
        "annotations": annotations(image),
        "linux": linux(rootless),
    }))
}

fn user_object(user: &User) -> Value {
    let mut object = json!({"uid": user.uid, "gid": user.gid});
    if !user.additional_gids.is_empty() {
        object["additionalGids"] = user.additional_gids.clone().into();
    }
    object
}

fn strings(value: &Value) -> impl Iterator<Item = &str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// The keys of an object whose values mean nothing, in an order of their own.
fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
    keys.sort_unstable();
    keys
}

fn arguments(config: &Value) -> Vec<&str> {
    let arguments: Vec<&str> = strings(&config["Entrypoint"]).chain(strings(&config["Cmd"])).collect();
    if arguments.is_empty() { vec!["sh"] } else { arguments }
}

fn environment(config: &Value, user: &User) -> Vec<String> {
    let mut environment: Vec<String> = strings(&config["Env"]).map(str::to_owned).collect();
    let home = user.home.as_deref().unwrap_or("/");
    for (name, value) in [("PATH", PATH), ("TERM", "xterm"), ("HOME", home)] {
        let is_set = |entry: &String| entry.split('=').next() == Some(name);
        if !environment.iter().any(is_set) {
            environment.push(format!("{name}={value}"));
        }
    }
    environment
}

fn working_directory(config: &Value) -> String {
    match config["WorkingDir"].as_str().unwrap_or_default() {
        directory if directory.starts_with('/') => directory.to_owned(),
        directory => format!("/{directory}"),
    }
}

/// Implicit annotations, which the image's labels override.
fn annotations(image: &Value) -> Value {
    let config = &image["config"];
    let mut annotations = Map::new();
    let mut add = |name: &str, value: Option<&str>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            annotations.insert(format!("{ANNOTATION}.{name}"), value.into());
        }
    };
    for name in ["os", "architecture", "variant", "author", "created"] {
        add(name, image[name].as_str());
    }
    add("os.version", image["os.version"].as_str());
    let features: Vec<&str> = strings(&image["os.features"]).collect();
    add("os.features", Some(&features.join(",")));
    add("stopSignal", config["StopSignal"].as_str());
    add("exposedPorts", Some(&keys(&config["ExposedPorts"]).join(",")));
    for (name, value) in config["Labels"].as_object().into_iter().flatten() {
        annotations.insert(name.clone(), value.clone());
    }
    Value::Object(annotations)
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": kind, "source": source, "options": options})
}

fn mounts(config: &Value, rootless: bool) -> Vec<Value> {
    let mut devpts = vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"];
    if !rootless {
        // The group `tty`, which a rootless container cannot have.
        devpts.push("gid=5");
    }
    let sys = match rootless {
        // A new one can be mounted only by who owns the network namespace.
        true => mount("/sys", "none", "/sys", &["rbind", "nosuid", "noexec", "nodev", "ro"]),
        false => mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    };
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &[]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &devpts),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        sys,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ];
    let volumes = keys(&config["Volumes"]).into_iter().filter(|volume| volume.starts_with('/'));
    mounts
        .extend(volumes.map(|volume| mount(volume, "tmpfs", "none", &["rw", "nosuid", "nodev", "relatime"])));
    mounts
}

fn linux(rootless: bool) -> Value {
    let own = if rootless { "user" } else { "network" };
    let namespaces = ["pid", own, "ipc", "uts", "mount"].map(|kind| json!({"type": kind}));
    let mut linux = json!({
        "namespaces": namespaces,
        "maskedPaths": [
            "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
            "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
        ],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    });
    if rootless {
        let map = |id: u32| json!([{"containerID": 0, "hostID": id, "size": 1}]);
        linux["uidMappings"] = map(rustix::process::geteuid().as_raw());
        linux["gidMappings"] = map(rustix::process::getegid().as_raw());
    } else {
        linux["resources"] = json!({"devices": [{"allow": false, "access": "rwm"}]});
    }
    linux
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convert(image: &Value) -> Value {
        let dir = tempfile::tempdir().unwrap();
        runtime_config(image, dir.path(), false).unwrap()
    }

    #[test]
    fn what_the_image_says_is_what_the_container_does() {
        let spec = convert(&json!({
            "os": "linux", "architecture": "arm64", "variant": "v8", "created": "2024-01-02T03:04:05Z", "author": "me",
            "config": {
                "Entrypoint": ["/bin/app", "--serve"], "Cmd": ["now"], "Env": ["A=1", "PATH=/bin"], "WorkingDir": "/srv",
                "User": "12:34", "ExposedPorts": {"80/tcp": {}, "53/udp": {}}, "StopSignal": "SIGINT",
                "Volumes": {"/data": {}, "/cache": {}},
                "Labels": {"org.opencontainers.image.author": "you", "x": "y"},
            },
        }));
        let process = &spec["process"];
        assert_eq!(process["args"], json!(["/bin/app", "--serve", "now"]));
        assert_eq!(process["env"], json!(["A=1", "PATH=/bin", "TERM=xterm", "HOME=/"]));
        assert_eq!((&process["cwd"], &process["user"]), (&json!("/srv"), &json!({"uid": 12, "gid": 34})));
        let annotation = |name: &str| spec["annotations"][format!("{ANNOTATION}.{name}")].clone();
        assert_eq!(annotation("os"), "linux");
        assert_eq!(annotation("variant"), "v8");
        assert_eq!(annotation("exposedPorts"), "53/udp,80/tcp");
        assert_eq!(annotation("stopSignal"), "SIGINT");
        assert_eq!(annotation("author"), "you", "labels come first");
        assert_eq!(spec["annotations"]["x"], "y");
        let mounts = spec["mounts"].as_array().unwrap();
        let volumes: Vec<_> = mounts[mounts.len() - 2..].iter().map(|mount| &mount["destination"]).collect();
        assert_eq!(volumes, ["/cache", "/data"]);
    }

    #[test]
    fn what_the_image_does_not_say_has_defaults() {
        for config in [json!({}), json!({"config": null}), json!({"config": {"Cmd": null, "Env": null}})] {
            let spec = convert(&config);
            assert_eq!(spec["process"]["args"], json!(["sh"]));
            assert_eq!(spec["process"]["env"][0], format!("PATH={PATH}"));
            assert_eq!(spec["process"]["cwd"], "/");
            assert_eq!(spec["process"]["user"], json!({"uid": 0, "gid": 0}));
        }
    }
}
