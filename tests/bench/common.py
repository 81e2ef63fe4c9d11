"""What benchmarks share: a registry of their own, one measured run of a command, and who says what.

Not here: what is measured (run, mirror, workers, jobs), and how real images are made (make-image).
"""

import gzip
import hashlib
import http.client
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", pathlib.Path(__file__).resolve().parents[2] / "target"))
MANIFEST_TYPES = ", ".join(
    [
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ]
)


def say(text):
    print(text, file=sys.stderr, flush=True)


def free_port():
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Registry:
    """One docker-registry process on a free loopback port, its storage in a directory of its own."""

    def __init__(self, directory, log_access=False):
        self.directory = pathlib.Path(directory)
        self.log_access = log_access
        self.process = None
        self.port = free_port()
        self.host = f"127.0.0.1:{self.port}"

    def start(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / "config.yml"
        config.write_text(
            "version: 0.1\n"
            f"log: {{level: error, accesslog: {{disabled: {'false' if self.log_access else 'true'}}}}}\n"
            "storage:\n"
            f"  filesystem: {{rootdirectory: {self.directory}/storage}}\n"
            "  cache: {blobdescriptor: inmemory}\n"
            f"http: {{addr: '{self.host}'}}\n"
        )
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                ["docker-registry", "serve", str(config)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        for _ in range(200):
            if self.process.poll() is not None:
                sys.exit(f"bench: docker-registry stopped at once, see {self.directory}/log")
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return
            except OSError:
                time.sleep(0.05)
        sys.exit("bench: docker-registry does not answer")

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def wiped(self):
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)
        self.start()

    def restarted(self):
        self.stop()
        self.start()

    def cpu(self):
        return cpu_of(self.process.pid)

    def blobs_asked_for(self):
        """Requests for blobs in its log so far."""
        return len(re.findall(r'"GET /v2/[^ "]*/blobs/', (self.directory / "log").read_text(errors="replace")))

    def layers(self, repository, tag="latest"):
        """What a client would be served: the layers of the manifest."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", f"/v2/{repository}/manifests/{tag}", headers={"Accept": MANIFEST_TYPES})
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"no manifest at the destination ({answer.status})")
        return json.loads(body)["layers"]


class Fleet:
    """A coordinator without workers of its own, and some that connect to it."""

    def __init__(self, directory, beside, workers=2, options=()):
        self.directory = pathlib.Path(directory)
        self.workers, self.options = workers, options
        self.programs = [
            os.environ.get(variable, str(beside / name))
            for variable, name in (("OCCY_SERVER", "occy-server"), ("OCCY_WORKER", "occy-worker"))
        ]
        self.processes = []

    def start(self):
        self.directory.mkdir()
        server, worker = self.programs
        everything = ["--allow-network", "127.0.0.0/8", "--temp-dir", str(self.directory), "--log", "warn"]
        state = ["--state-dir", str(self.directory / "state"), "--listen", "127.0.0.1:0", "--embedded-workers", "0"]
        self.url = "http://" + self.begin([server, *state, *everything]).removeprefix("listening on ")
        for _ in range(self.workers):
            self.begin([worker, "--coordinator", self.url, *everything, *self.options])

    def begin(self, command):
        """Starts a process, and gives what it says first."""
        with open(self.directory / "log", "ab") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, text=True)
        self.processes.append(process)
        return process.stdout.readline().strip() or sys.exit(f"bench: {command[0]} does not start, see {self.directory}/log")

    def cpu(self):
        return sum(cpu_of(process.pid) for process in self.processes)

    def peak(self):
        """Bytes of the largest process, since it was started."""
        status = [pathlib.Path(f"/proc/{process.pid}/status").read_text() for process in self.processes]
        return max(int(re.search(r"VmHWM:\s+(\d+)", text)[1]) for text in status) * 1024

    def stop(self):
        for process in reversed(self.processes):
            process.terminate()
            process.wait()
        self.processes = []


def send(port, method, path, body=b"", kind="application/octet-stream"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body=body, headers={"Content-Type": kind})
    answer = connection.getresponse()
    answer.read()
    if answer.status >= 300:
        sys.exit(f"bench: {method} {path}: {answer.status}")
    return answer.headers.get("Location", "")


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def push(port, repository, layers, size):
    """Stores an image of so many layers of so many random bytes in the registry at `port`, with the tag 1."""

    def blob(data, kind):
        location = send(port, "POST", f"/v2/{repository}/blobs/uploads/")
        path = location[location.index("/v2/") :]
        send(port, "PUT", f"{path}&digest={digest(data)}", data)
        return {"mediaType": kind, "digest": digest(data), "size": len(data)}

    described, diff_ids = [], []
    for index in range(layers):
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            member = tarfile.TarInfo(f"layer-{index}")
            member.size = size
            archive.addfile(member, io.BytesIO(os.urandom(size)))
        diff_ids.append(digest(tar.getvalue()))
        packed = gzip.compress(tar.getvalue(), 1, mtime=0)
        described.append(blob(packed, "application/vnd.oci.image.layer.v1.tar+gzip"))
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": kind,
        "config": blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": described,
    }
    send(port, "PUT", f"/v2/{repository}/manifests/1", json.dumps(manifest).encode(), kind)


def cpu_of(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(command, env, scratch, timeout):
    """Runs it: wall seconds, CPU seconds, peak bytes of its largest process, standard output."""
    # A child's own count begins with the memory of the process that started it: GNU time is small,
    # this interpreter is not.
    gnu_time = shutil.which("time")
    report = scratch / "time"
    wrapped = [gnu_time, "-q", "-f", "%M", "-o", str(report), *command] if gnu_time else command
    with open(scratch / "stdout", "wb") as out, open(scratch / "stderr", "wb") as err:
        before = time.monotonic()
        child = subprocess.Popen(
            wrapped, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=env, cwd=scratch, start_new_session=True
        )

        def overdue(*_):
            os.killpg(child.pid, signal.SIGKILL)

        signal.signal(signal.SIGALRM, overdue)
        signal.alarm(timeout)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - before
        signal.alarm(0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        lines = (scratch / "stderr").read_text(errors="replace").strip().splitlines()
        why = lines[-1][:200] if lines else "nothing on standard error"
        if child.returncode == -signal.SIGKILL:
            why = f"stopped after {timeout} s"
        raise RuntimeError(f"exit {child.returncode}: {why}")
    peak = int(report.read_text()) if gnu_time else usage.ru_maxrss
    return {
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "user": usage.ru_utime,
        "system": usage.ru_stime,
        "peak": peak * 1024,
    }
