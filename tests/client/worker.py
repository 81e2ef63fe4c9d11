"""A worker that shares nothing with the product but the .proto files: grpcio, and code that its tools generate.

    worker.py ADDRESS [OPTION]...

It has the filter `shout`, which writes the content of regular files in capitals, and no other. What happens is printed as JSON, a
line an event.
"""

import argparse
import gzip
import hashlib
import http.client
import io
import json
import queue
import struct
import tarfile
import threading

import grpc
from google.protobuf import json_format

from occy.v1 import blob_pb2, blob_pb2_grpc, image_pb2, pipeline_pb2, worker_pb2, worker_pb2_grpc

parser = argparse.ArgumentParser()
parser.add_argument("address")
parser.add_argument("--lie", choices=["written", "claimed", "unwritten", "size", "diff-id", "kept"], help="what is not true")
parser.add_argument("--hold", action="store_true", help="do nothing with tasks, and print their attempts")
parser.add_argument("--halves", action="store_true", help="write in two streams, the second of which goes on with the first")
parser.add_argument("--filter-version", default="", help="which version of shout it is")
parser.add_argument("--session", metavar="URL", help="say of each task that its upload is there, and has two bytes")
options = parser.parse_args()

CHUNK = 200_000
# What our own workers would have hashed of it, in their own form: the words that SHA-256 begins with, no block, and "aa" behind.
WORDS = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
HASH_OF_AA = struct.pack("<BQ8IQB", 1, 2, *WORDS, 0, 2) + b"aa" + bytes(61)
sent = queue.Queue()


def show(**event):
    print(json.dumps(event), flush=True)


def message(value):
    return json_format.MessageToDict(value, preserving_proto_field_name=True)


def said():
    codecs = [image_pb2.COMPRESSION_GZIP, image_pb2.COMPRESSION_ZSTD]
    shout = pipeline_pb2.FilterCapability(name="shout", about="write files in capitals", version=options.filter_version)
    yield worker_pb2.ConnectRequest(register=worker_pb2.Register(
        name="snake", version="1", filters=[shout], outputs=["registry", "tar"], codecs=codecs, slots=2
    ))
    while True:
        try:
            request = sent.get(timeout=0.3)
            yield request
            show(said=request.WhichOneof("message"))
        except queue.Empty:
            yield worker_pb2.ConnectRequest(heartbeat=worker_pb2.Heartbeat())


def digest_of(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def ask(at, method, path, body=None, headers={}):
    connection = http.client.HTTPConnection(at.host)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status < 300, (method, path, answer.status, content)
    return answer, content


def read(blobs, task):
    source = task.source
    if source.WhichOneof("content") == "registry":
        return ask(source.registry, "GET", f"/v2/{source.registry.repository}/blobs/{source.digest}")[1]
    whole = b"".join(part.data for part in blobs.ReadBlob(blob_pb2.ReadBlobRequest(attempt=task.attempt)))
    middle = len(whole) // 2
    again = blobs.ReadBlob(blob_pb2.ReadBlobRequest(attempt=task.attempt, offset=middle))
    assert b"".join(part.data for part in again) == whole[middle:], "other bytes from an offset"
    return whole


def parts(task, kind, data, start=0, stop=None, commit=None):
    begin = blob_pb2.WriteBlobStart(attempt=task.attempt, kind=kind, offset=start)
    if task.destination.form == worker_pb2.TASK_FORM_STORED:
        begin.compression = image_pb2.COMPRESSION_GZIP
    yield blob_pb2.WriteBlobRequest(start=begin)
    stop = len(data) if stop is None else stop
    for at in range(start, stop, CHUNK):
        yield blob_pb2.WriteBlobRequest(data=data[at:min(at + CHUNK, stop)])
    if commit:
        yield blob_pb2.WriteBlobRequest(commit=blob_pb2.WriteBlobCommit(digest=commit, size=len(data)))


def write_blob(blobs, task, kind, data, digest):
    start = 0
    if options.halves:
        try:
            blobs.WriteBlob(parts(task, kind, data, stop=len(data) // 2))
            raise AssertionError("a blob without a commit")
        except grpc.RpcError as failed:
            assert failed.code() == grpc.StatusCode.ABORTED, failed
        status = blobs.BlobStatus(blob_pb2.BlobStatusRequest(attempt=task.attempt, kind=kind))
        assert (status.committed_size, status.complete) == (len(data) // 2, False), status
        start = status.committed_size
        try:
            blobs.WriteBlob(parts(task, kind, data, start=start + 1, commit=digest))
            raise AssertionError("a blob with a hole")
        except grpc.RpcError as failed:
            assert failed.code() == grpc.StatusCode.OUT_OF_RANGE, failed
    answer = blobs.WriteBlob(parts(task, kind, data, start=start, commit=digest))
    assert answer.committed_size == len(data)


def write(blobs, task, data, digest):
    if task.destination.WhichOneof("content") == "coordinator":
        write_blob(blobs, task, blob_pb2.BLOB_KIND_LAYER, data, digest)
        return
    at = task.destination.registry
    answer, _ = ask(at, "POST", f"/v2/{at.repository}/blobs/uploads/")
    url = answer.headers["Location"].split("://")[-1].split("/", 1)[1]
    octets = {"Content-Type": "application/octet-stream"}
    ask(at, "PUT", f"/{url}{'&' if '?' in url else '?'}digest={digest}", data, octets)


def shout(tar):
    out = io.BytesIO()
    names = []
    with tarfile.open(fileobj=io.BytesIO(tar)) as layer, tarfile.open(fileobj=out, mode="w") as shouted:
        for member in layer:
            content = layer.extractfile(member)
            shouted.addfile(member, io.BytesIO(content.read().upper()) if content else None)
            names.append(member.name)
    return out.getvalue(), names


def copied(blobs, task):
    write(blobs, task, read(blobs, task), task.source.digest)
    return worker_pb2.TaskDone(original=True)


def done(blobs, task):
    if not task.filters:
        return copied(blobs, task)
    assert [text.split(":")[0] for text in task.filters] == ["shout"], task.filters
    stored = read(blobs, task)
    tar, names = shout(gzip.decompress(stored) if stored[:2] == b"\x1f\x8b" else stored)
    is_stored = task.destination.form == worker_pb2.TASK_FORM_STORED
    data = gzip.compress(tar, mtime=0) if is_stored else tar
    digest, other = digest_of(data), digest_of(b"another")
    result = worker_pb2.TaskDone(digest=digest, size=len(data), diff_id=digest_of(tar), changed=True)
    result.compression = image_pb2.COMPRESSION_GZIP if is_stored else image_pb2.COMPRESSION_NONE
    if options.lie == "kept":
        return worker_pb2.TaskDone(original=True, diff_id=digest_of(tar))
    if options.lie != "unwritten":
        write(blobs, task, data, other if options.lie == "written" else digest)
    if options.lie in ("claimed", "unwritten"):
        result.digest = other
    if options.lie == "size":
        result.size += 1
    if options.lie == "diff-id":
        result.diff_id = other
    report = json.dumps([{"filter": "other", "text": "".join(f"{name}!\n" for name in names)}]).encode()
    write_blob(blobs, task, blob_pb2.BLOB_KIND_REPORTS, report, digest_of(report))
    return result


def work(blobs, task):
    result = worker_pb2.TaskResult(attempt=task.attempt)
    try:
        result.done.CopyFrom(done(blobs, task))
    except grpc.RpcError as failed:
        show(refused={"code": failed.code().name, "message": failed.details()})
        result.error.CopyFrom(worker_pb2.TaskError(fault=worker_pb2.TASK_FAULT_WORKER, message=failed.details()))
    except Exception as failed:
        show(failed=repr(failed))
        result.error.CopyFrom(worker_pb2.TaskError(fault=worker_pb2.TASK_FAULT_WORKER, message=repr(failed)))
    show(result=message(result))
    sent.put(worker_pb2.ConnectRequest(result=result))


def main():
    limits = [("grpc.max_receive_message_length", 1024 * 1024), ("grpc.max_send_message_length", 1024 * 1024)]
    with grpc.insecure_channel(options.address, limits) as connection, grpc.insecure_channel(
        options.address, limits + [("grpc.use_local_subchannel_pool", 1)]
    ) as bytes_connection:
        blobs = blob_pb2_grpc.BlobServiceStub(bytes_connection)
        for told in worker_pb2_grpc.WorkerServiceStub(connection).Connect(said()):
            kind = told.WhichOneof("message")
            show(**{kind: message(getattr(told, kind))})
            if kind == "task" and options.session:
                upload = worker_pb2.UploadState(
                    session_url=options.session, offset=2, digest=told.task.source.digest, hash_state=HASH_OF_AA
                )
                progress = worker_pb2.TaskProgress(attempt=told.task.attempt, upload=upload)
                sent.put(worker_pb2.ConnectRequest(heartbeat=worker_pb2.Heartbeat(tasks=[progress])))
            if kind == "task" and not options.hold:
                threading.Thread(target=work, args=(blobs, told.task), daemon=True).start()


main()
