//! A client in another language than ours and Python, generated from the .proto files alone, to which every rpc answers.

use std::path::Path;
use std::process::Command;

use occy_tests::certificates::text;
use occy_tests::coordinator::Coordinator;
use occy_tests::image::json_of;
use occy_tests::judge;
use occy_tests::occyctl::locally;
use occy_tests::registry::Registry;
use occy_tests::tools::tool;
use serde_json::json;

use crate::{scratch, small};

#[test]
fn a_client_in_ruby_calls_every_rpc() {
    let (from, to) = (Registry::start(), Registry::start());
    let image = small();
    let source = from.push(&image, "app", "1");
    let coordinator = Coordinator::start(&["--embedded-workers", "2"]);
    let directory = scratch();
    let layout = text(&directory.path().join("layout"));
    locally(["copy", &source, &format!("oci-layout://{layout}")]).ok();
    let generated = tempfile::tempdir().expect("a temporary directory");
    let out = generated.path().to_str().expect("a path in UTF-8");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (ruby_out, grpc_out) = (format!("--ruby_out={out}"), format!("--grpc_out={out}"));
    let protos =
        ["image", "pipeline", "schedule", "worker", "blob"].map(|name| format!("occy/v1/{name}.proto"));
    let include = root.join("../proto");
    let include = include.to_str().expect("a path in UTF-8");
    let arguments =
        ["-I", include, &ruby_out, &grpc_out].into_iter().chain(protos.iter().map(String::as_str));
    tool("grpc_tools_ruby_protoc", arguments);

    let output = Command::new("ruby")
        .arg("-I")
        .arg(generated.path())
        .arg(root.join("client/client.rb"))
        .args([coordinator.address(), &source, &format!("registry://{}/ruby", to.host()), &layout])
        .output()
        .expect("ruby runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = json_of(&output.stdout);
    for (what, expected) in [
        ("health", json!("SERVING")),
        ("filters", json!(["normalize-timestamps", "exclude", "search", "inspect"])),
        ("inspected", json!(true)),
        ("checked", json!("result")),
        ("findings", json!(0)),
        ("read", json!(image.layer_digests())),
        ("written", json!(image.digest())),
        ("result", json!("result")),
        ("lent", json!(image.digest())),
        ("once", json!(true)),
        ("without_gaps", json!(true)),
        ("state", json!("JOB_STATE_SUCCEEDED")),
        ("listed", json!(true)),
        ("cancelled", json!("JOB_STATE_SUCCEEDED")),
        ("scheduled", json!("every 365d")),
        ("due", json!(365 * 24 * 3600)),
        ("paused", json!(null)),
        ("resumed", json!(true)),
        ("run", json!("JOB_STATE_SUCCEEDED")),
        ("last_run", json!(true)),
        ("schedules", json!(["yearly"])),
        ("deleted", json!("NOT_FOUND")),
        ("read_blob", json!("NOT_FOUND")),
        ("write_blob", json!("NOT_FOUND")),
        ("blob_status", json!("NOT_FOUND")),
        ("worker", json!("ruby")),
    ] {
        assert_eq!(said[what], expected, "{what} of {said:#}");
    }
    assert!(said["hits"].as_u64() > Some(0), "{said:#}");
    assert_ne!(said["processed"], said["read"], "filtered");
    for tag in ["written", "lent", "job"] {
        judge::skopeo_reads(&format!("docker://{}/ruby:{tag}", to.host()));
    }
}
