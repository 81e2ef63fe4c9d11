"""Checks what deploy/ says against what is true: the programs' options and metrics, the schemas of Kubernetes, systemd and promtool.

Usage: check.py PROGRAMS   (a directory with occy-server, occy-worker and occyctl)

Each function named check_* is one check. deploy/compose.yaml is run by ./compose, and not looked at here but for its words.
"""

import base64
import contextlib
import copy
import importlib
import itertools
import json
import os
import pathlib
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request

import grpc
import grpc_tools
import kubernetes_validate
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
# The oldest that the manifests are for, and the newest whose schemas there are.
KUBERNETES = ("1.31", "1.37")
# What has no schema there.
OPERATOR_KINDS = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
# Seconds that a process may take to end when its drain is over.
END = 10


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def not_run(what):
    print(f"NOT RUN: {what}", flush=True)


@contextlib.contextmanager
def process(*words, says):
    """A process: what it says on its first line behind `says`, and where its log is."""
    with tempfile.NamedTemporaryFile() as log:
        child = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=log, text=True)
        log = pathlib.Path(log.name)
        try:
            line = child.stdout.readline()
            assert line.startswith(says), f"{words[0]} says {line!r}: {log.read_text()}"
            yield line.removeprefix(says).strip(), log
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(20)
            finally:
                child.kill()


def metrics_port(log):
    found = re.search(r"Prometheus finds metrics at /metrics.*address=\S*:(\d+)", re.sub(r"\x1b\[[0-9;]*m", "", log.read_text()))
    assert found, "no port for metrics in the log"
    return found[1]


def scrape(log):
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port(log)}/metrics") as answer:
        return [line for line in answer.read().decode().splitlines() if not line.startswith("#")]


def values(log):
    """What a process says now, of all that has no labels."""
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in scrape(log)) if "{" not in name}


def exported(log):
    """The names of all samples that a process exports, with the labels that they have."""
    samples = {}
    for line in scrape(log):
        name, labels = re.match(r"(\w+)(?:\{(.*?)\})? ", line).groups()
        samples.setdefault(name, set()).update(re.findall(r'(\w+)="', labels or ""))
    return samples


def documents():
    for path in sorted((DEPLOY / "kubernetes").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield path, document


def rendered(*components):
    """The example as kustomize makes it, with secrets that make-secrets has made, and with these components besides. None without kustomize."""
    kubectl = shutil.which("kubectl")
    # Debian 12's own is too old: it has version 2 of kustomize.
    if not kubectl or "Kustomize Version: v5" not in run(kubectl, "version", "--client"):
        return None
    with tempfile.TemporaryDirectory() as directory:
        tree = pathlib.Path(directory) / "kubernetes"
        shutil.copytree(DEPLOY / "kubernetes", tree, ignore=shutil.ignore_patterns("secrets"))
        run(DEPLOY / "make-secrets", tree / "example/secrets")
        example = tree / "example/kustomization.yaml"
        text = example.read_text()
        for component in components:
            assert f"# - ../{component}" in text
            text = text.replace(f"# - ../{component}", f"- ../{component}")
        if "replicas" in components:
            text = text.replace("  # - name: engine-secrets\n  #   files", "  - name: engine-secrets\n    files")
        example.write_text(text)
        return list(yaml.safe_load_all(run(kubectl, "kustomize", example.parent)))


def validate(document):
    kind = document["kind"]
    if kind in OPERATOR_KINDS:
        assert document["apiVersion"] == "monitoring.coreos.com/v1", document
        return
    for version in KUBERNETES:
        kubernetes_validate.validate(document, version, strict=True)


def check_units(programs):
    """systemd understands the units, and finds little that they leave open. Each has the time that its drain takes."""
    with tempfile.TemporaryDirectory() as directory:
        paths = []
        for unit in sorted((DEPLOY / "systemd").glob("*.service")):
            text = unit.read_text()
            drain = int(re.search(r"OCCYSTRAP_DRAIN_TIMEOUT=(\d+)", text)[1])
            assert int(re.search(r"TimeoutStopSec=(\d+)", text)[1]) >= drain + END, unit
            # The programs are not where they would be installed.
            path = pathlib.Path(directory) / unit.name.replace("@.", "@one.")
            path.write_text(text.replace("ExecStart=/usr/bin/", f"ExecStart={programs}/"))
            paths.append(path)
        assert len(paths) == 2
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", *paths], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr.strip(), done.stderr
        for path in paths:
            run("systemd-analyze", "security", "--offline=true", "--threshold=20", path)


def check_variables(programs):
    """Every option that a file sets, by flag or variable, is one of a program."""
    help_of = {name: run(programs / name, "--help") for name in ("occy-server", "occy-worker", "occyctl")}
    known = set(re.findall(r"\[env: (OCCYSTRAP_\w+)=?\]", "".join(help_of.values())))
    # Of compose.yaml: which image, and the ports of the machine.
    known |= {"OCCYSTRAP_IMAGE", "OCCYSTRAP_PORT", "OCCYSTRAP_METRICS_PORT"}
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and "secrets" not in path.parts]
    used = {(path, name) for path in files for name in re.findall(r"\bOCCYSTRAP_\w+\b", path.read_text())}
    assert len(used) > 20
    unknown = {(str(path), name) for path, name in used if name not in known}
    assert not unknown, unknown
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in ("coordinator", "worker"):
        program, *flags = compose["services"][service]["command"]
        for flag in flags:
            assert flag.partition("=")[0] in help_of[program], flag
        drain = next(int(flag.partition("=")[2]) for flag in flags if flag.startswith("--drain-timeout="))
        grace = int(compose["services"][service]["stop_grace_period"].removesuffix("s"))
        assert grace >= drain + END, service


def check_kubernetes(_programs):
    """The manifests are what Kubernetes takes, as they lie here and as kustomize makes them: alone, with a mesh, with several coordinators."""
    bare = [document for _, document in documents() if "kustomize" not in document.get("apiVersion", "") and "kind" in document]
    assert len(bare) > 12
    for document in bare:
        validate(document)
    # The validator can say no.
    wrong = copy.deepcopy(next(document for document in bare if document["kind"] == "StatefulSet"))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    try:
        validate(wrong)
        raise AssertionError("a field that is unknown was not found")
    except kubernetes_validate.ValidationError:
        pass
    for components in ([], ["mesh"], ["replicas"]):
        all_of_it = rendered(*components)
        if all_of_it is None:
            not_run("deploy/kubernetes as kustomize makes it (no kubectl with kustomize 5)")
            continue
        for document in all_of_it:
            validate(document)
        agree(all_of_it, "mesh" in components, "replicas" in components)
        if "replicas" in components:
            agree_with_engine(all_of_it)


def agree(manifests, mesh, replicas):
    """What the manifests say of each other is so."""
    by = {(document["kind"], document["metadata"]["name"]): document for document in manifests}
    kinds = {kind for kind, _ in by}
    expected = {"HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy", "Secret", *OPERATOR_KINDS}
    assert expected <= kinds, expected - kinds
    pods = [by["StatefulSet", "occystrap-coordinator"], by["Deployment", "occystrap-worker"]]
    labels = [pod["spec"]["template"]["metadata"]["labels"] for pod in pods]
    for pod in pods:
        spec = pod["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        (settings,) = (by["ConfigMap", source["configMapRef"]["name"]]["data"] for source in container["envFrom"])
        assert spec["terminationGracePeriodSeconds"] >= int(settings["OCCYSTRAP_DRAIN_TIMEOUT"]) + END, pod
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) >= {settings["OCCYSTRAP_TEMP_DIR"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        claims = {claim["metadata"]["name"] for claim in pod["spec"].get("volumeClaimTemplates", [])}
        assert set(mounts) == set(volumes) | claims, (mounts, volumes)
        secret = {mounts[name]: by["Secret", volume["secret"]["secretName"]]["data"] for name, volume in volumes.items() if "secret" in volume}
        named = {value for value in settings.values() if re.match(r"/(secrets|engine)/", value)}
        assert named or mesh
        for name in named:
            directory, _, file = name.rpartition("/")
            assert file in secret[directory], (name, set(secret[directory]))
        probes = [probe for name, probe in container.items() if name.endswith("Probe")]
        assert len(probes) >= 2
        ports = {port["name"] for port in container["ports"]}
        for probe in probes:
            assert ("grpc" in probe) == (mesh and pod["kind"] == "StatefulSet"), probe
            assert "grpc" in probe or probe["httpGet"]["port"] in ports, probe
        for url in settings.get("OCCYSTRAP_COORDINATOR", "").split(",") if "OCCYSTRAP_COORDINATOR" in settings else []:
            scheme, one, service, port = re.match(r"(https?)://(?:([\w-]+)\.)?([\w-]+)(?:\.occystrap)?:(\d+)$", url).groups()
            assert scheme == ("http" if mesh else "https")
            assert int(port) in [port["port"] for port in by["Service", service]["spec"]["ports"]]
            assert (one is not None) == replicas, url
    coordinators = by["StatefulSet", "occystrap-coordinator"]["spec"]
    if replicas:
        # Each is reached by its name, and nobody else is.
        assert by["Service", coordinators["serviceName"]]["spec"]["clusterIP"] == "None"
        names = {f"occystrap-coordinator-{number}.{coordinators['serviceName']}.occystrap" for number in range(coordinators["replicas"])}
        urls = by["ConfigMap", pods[1]["spec"]["template"]["spec"]["containers"][0]["envFrom"][0]["configMapRef"]["name"]]["data"]
        assert {re.search(r"//(.*):", url)[1] for url in urls["OCCYSTRAP_COORDINATOR"].split(",")} == names
        shown = certified(given_secret(by, pods[0], "coordinator.pem"))
        # A wildcard stands for one label, and is believed above two others at least.
        assert all(name in shown or "*." + name.partition(".")[2] in shown and name.count(".") >= 2 for name in names), (names, shown)
        labels.append(by["StatefulSet", "nats"]["spec"]["template"]["metadata"]["labels"])
    for kind, name in [*itertools.product(["ServiceMonitor", "PodMonitor", "PodDisruptionBudget"], ["occystrap-coordinator", "occystrap-worker"])]:
        if (kind, name) in by:
            selector = by[kind, name]["spec"]["selector"]["matchLabels"]
            of_whom = [by["Service", "occystrap-coordinator"]["metadata"]["labels"]] if kind == "ServiceMonitor" else labels
            assert any(selector.items() <= has.items() for has in of_whom), (kind, name)
    for document in manifests:
        if document["kind"] == "NetworkPolicy":
            selector = document["spec"]["podSelector"].get("matchLabels", {})
            assert any(selector.items() <= has.items() for has in labels), document
    scaled = by["HorizontalPodAutoscaler", "occystrap-worker"]["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) in by


def given_secret(by, pod, file):
    """A file of the Secret that a pod has under /secrets."""
    volumes = {volume["name"]: volume for volume in pod["spec"]["template"]["spec"]["volumes"]}
    return by["Secret", volumes["secrets"]["secret"]["secretName"]]["data"][file]


def certified(pem):
    """The names in a certificate of a Secret."""
    text = run("openssl", "x509", "-noout", "-ext", "subjectAltName", input=base64.b64decode(pem).decode())
    return set(re.findall(r"DNS:([\w.*-]+)", text))


def agree_with_engine(manifests):
    """NATS takes its configuration, and its nodes are the ones that coordinators and each other look for, by names that are in certificates."""
    by = {(document["kind"], document["metadata"]["name"]): document for document in manifests}
    nats = by["StatefulSet", "nats"]["spec"]
    nodes = {f"nats-{number}.{nats['serviceName']}" for number in range(nats["replicas"])}
    (pod,) = by["StatefulSet", "occystrap-coordinator"]["spec"]["template"]["spec"]["containers"]
    settings = by["ConfigMap", pod["envFrom"][0]["configMapRef"]["name"]]["data"]
    assert {server.partition(":")[0] for server in settings["OCCYSTRAP_ENGINE"].removeprefix("jetstream://").split(",")} == nodes
    assert int(settings["OCCYSTRAP_ENGINE_REPLICAS"]) == len(nodes)
    volumes = {volume["name"]: volume for volume in nats["template"]["spec"]["volumes"]}
    config = by["ConfigMap", volumes["settings"]["configMap"]["name"]]["data"]["nats.conf"]
    assert set(re.findall(r"nats-route://([\w.-]+):", config)) == nodes
    files = by["Secret", volumes["secrets"]["secret"]["secretName"]]["data"]
    with tempfile.TemporaryDirectory() as directory:
        for name, data in files.items():
            (pathlib.Path(directory) / name).write_bytes(base64.b64decode(data))
        path = pathlib.Path(directory) / "nats.conf"
        path.write_text(config.replace("/secrets/", f"{directory}/").replace("/data", f"{directory}/data"))
        run(pathlib.Path(sys.executable).parent / "nats-server", "-t", "--config", path, env={**os.environ, "NODE": "nats-0"})
        assert nodes <= certified(files["engine.pem"])


def check_metrics(programs):
    """Every metric and label that the dashboard, the alerts and the autoscaler use is exported, and Kubernetes' probes are answered."""
    with tempfile.TemporaryDirectory() as directory:
        server = [programs / "occy-server", "--state-dir", f"{directory}/state", "--listen", "127.0.0.1:0", "--embedded-workers", "1"]
        server += ["--metrics-listen", "127.0.0.1:0", "--allow-path", ROOT / "tests/images", "--allow-path", directory]
        # A registry that is not there, whose rate is limited all the same.
        server += ["--allow-network", "127.0.0.0/8", "--retries", "0", "--registry-budget", "127.0.0.1:9 rate=100"]
        with process(*server, says="listening on ") as (address, server_log):
            worker = [programs / "occy-worker", "--coordinator", f"http://{address}", "--metrics-listen", "127.0.0.1:0"]
            with process(*worker, says="registered as ") as (_, worker_log):
                # One job, after which all that can be counted is.
                job = [programs / "occyctl", "job", "submit", f"tar://{ROOT}/tests/images/hello.tar", f"tar://{directory}/out.tar"]
                run(*job, "-f", "normalize-timestamps", "--watch", "--coordinator", f"http://{address}")
                nowhere = [programs / "occyctl", "info", "registry://127.0.0.1:9/app:1", "--coordinator", f"http://{address}"]
                assert subprocess.run(nowhere, capture_output=True).returncode == 1
                with grpc.insecure_channel(address) as channel:
                    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""), timeout=10)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                by_worker, samples = exported(worker_log), exported(server_log)
    assert by_worker and set(by_worker) <= set(samples)
    # Of the scrape.
    labels = {"namespace", "le"}.union(*samples.values())
    dashboard = json.loads((DEPLOY / "grafana/occystrap.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    alerts = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    expressions += [rule["expr"] for rule in rules]
    scaler = next(document for _, document in documents() if document.get("kind") == "HorizontalPodAutoscaler")
    scaled_by = [metric["external"]["metric"]["name"] for metric in scaler["spec"]["metrics"]]
    adapter = yaml.safe_load((DEPLOY / "kubernetes/autoscaling/prometheus-adapter.yaml").read_text())
    served = [re.match(r"\w+", rule["seriesQuery"])[0] for rule in adapter["rules"]["external"]]
    assert sorted(scaled_by) == sorted(served), (scaled_by, served)
    expressions += scaled_by
    assert len(expressions) > 30
    used = {name for expression in expressions for name in re.findall(r"occystrap_\w+", expression)}
    assert used <= set(samples), used - set(samples)
    for expression in expressions:
        for name, matched in re.findall(r"(occystrap_\w+)\{(.*?)\}", expression):
            for label in re.findall(r"(\w+)=", matched):
                assert label == "namespace" or label in samples[name], expression
        for grouped in re.findall(r"by \((.*?)\)", expression):
            assert set(re.split(r", *", grouped)) <= labels, expression
    shown = {name for name in used if any(name in panel_expression for panel_expression in expressions[:-len(scaled_by)])}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in samples}
    unused = ours - {re.sub(r"_bucket$", "", name) for name in shown}
    assert not unused, f"the dashboard shows nothing of {unused}"


def generated(directory):
    """The API's messages for workers, and its stubs."""
    include = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    protos = sorted((ROOT / "proto/occy/v1").glob("*.proto"))
    words = ["-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", f"-I{include}", f"--python_out={directory}"]
    run(sys.executable, *words, f"--grpc_python_out={directory}", *protos)
    sys.path.insert(0, str(directory))
    return importlib.import_module("occy.v1.worker_pb2"), importlib.import_module("occy.v1.worker_pb2_grpc")


def eventually(what, says):
    for _ in range(600):
        if says():
            return
        time.sleep(0.05)
    raise AssertionError(f"in vain: {what}")


def check_upgrade(programs):
    """As README.md has it: a worker of another encoder copies, gets nothing else, and what waits beside it is done by a new one."""
    with tempfile.TemporaryDirectory() as directory:
        messages, stubs = generated(directory)
        server = [programs / "occy-server", "--state-dir", f"{directory}/state", "--listen", "127.0.0.1:0", "--embedded-workers", "0"]
        server += ["--metrics-listen", "127.0.0.1:0", "--allow-path", ROOT / "tests/images", "--allow-path", directory]
        with process(*server, says="listening on ") as (address, log), grpc.insecure_channel(address) as channel:
            capabilities = [{"name": name} for name in ("normalize-timestamps", "exclude", "search", "inspect")]
            register = {"name": "old", "version": "0.0.1", "encoder_version": "another", "outputs": ["tar", "registry"], "slots": 64}
            sent, tasks = queue.Queue(), queue.Queue()
            sent.put(messages.ConnectRequest(register=messages.Register(filters=capabilities, codecs=[1, 2, 3], **register)))
            answers = stubs.WorkerServiceStub(channel).Connect(iter(sent.get, None))
            assert next(answers).WhichOneof("message") == "welcome"

            def listen():
                with contextlib.suppress(grpc.RpcError):
                    for answer in answers:
                        tasks.put(answer)

            threading.Thread(target=listen, daemon=True).start()
            occyctl = [programs / "occyctl", "job", "--coordinator", f"http://{address}"]
            source = f"tar://{ROOT}/tests/images/hello.tar"

            def submit(name, *options):
                return run(*occyctl, "submit", source, f"tar://{directory}/{name}.tar", *options).strip()

            edited = submit("edited", "-f", "normalize-timestamps")
            eventually("its layer waits", lambda: values(log)["occystrap_layers_waiting"] > 0)
            copied = submit("copied")
            task = tasks.get(timeout=30).task
            assert (task.job_id, list(task.filters)) == (copied, []), task
            now = values(log)
            # What OccystrapLayersWaitUnserved is about.
            assert now["occystrap_queue_age_seconds"] > 0 and now["occystrap_worker_slots_free"] > 0, now
            with process(programs / "occy-worker", "--coordinator", f"http://{address}", says="registered as "):
                run(*occyctl, "watch", edited)
                # The old one goes, without a word: others take what it had.
                sent.put(None)
                answers.cancel()
                run(*occyctl, "watch", copied)


def check_alerts(_programs):
    """promtool understands the rules, and each fires when it should and not when it should not."""
    run("promtool", "check", "rules", DEPLOY / "prometheus/alerts.yaml")
    run("promtool", "test", "rules", "alerts.test.yaml", cwd=DEPLOY / "prometheus")
    alerts = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())
    operator = yaml.safe_load((DEPLOY / "kubernetes/monitoring/rules.yaml").read_text())
    assert operator["spec"]["groups"] == alerts["groups"], "kubernetes/monitoring/rules.yaml differs from prometheus/alerts.yaml"
    guide = (DEPLOY / "README.md").read_text()
    for rule in alerts["groups"][0]["rules"]:
        assert rule["alert"] in guide, f"README.md says nothing of {rule['alert']}"


def main():
    programs = pathlib.Path(sys.argv[1]).resolve()
    failed = 0
    checks = [(name, check) for name, check in globals().items() if name.startswith("check_")]
    for name, check in checks:
        try:
            check(programs)
            print(f"{name.removeprefix('check_')}: as it should be", flush=True)
        except Exception:  # Each is told, whatever it is.
            failed += 1
            print(f"{name}: FAILED", flush=True)
            traceback.print_exc()
    print(f"{len(checks) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


# Whatever this session of the shell has set is not for the programs under test.
for name in [name for name in os.environ if name.startswith("OCCYSTRAP_")]:
    del os.environ[name]
main()
