"""A client of the service that shares nothing with it but the .proto files: grpcio, and code that its tools generate.

    client.py ADDRESS METHOD REQUEST [OPTION]...

METHOD is an rpc of PipelineService or ScheduleService, or `Health`, or `Services`. REQUEST is its request in JSON; for WriteImage and ProcessImage
the spec, which elements follow if --elements names some; for LendLayout its start, and --layout what is lent. What comes back is printed as JSON, a line a message, and an error as a
last line. The elements of an image are checked for all that the .proto promises of them, and printed as one line.
"""

import argparse
import hashlib
import json
import sys
import time

import grpc
from google.protobuf import json_format
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from layout import Layout
from occy.v1 import image_pb2, pipeline_pb2, pipeline_pb2_grpc, schedule_pb2, schedule_pb2_grpc

MESSAGE_MAX = 1024 * 1024

parser = argparse.ArgumentParser()
parser.add_argument("address")
parser.add_argument("method")
parser.add_argument("request", type=json.loads)
parser.add_argument("--timeout", type=float, help="the deadline, in seconds")
parser.add_argument("--save", help="write the elements that come into this file")
parser.add_argument("--elements", help="send the elements in this file")
parser.add_argument("--layout", help="the directory that is lent")
parser.add_argument("--unasked", action="store_true", help="answer what was not asked")
parser.add_argument("--without-end", action="store_true", help="send all of them but the last")
parser.add_argument("--corrupt", action="store_true", help="send another first byte of the first layer")
parser.add_argument("--stop-after", type=int, help="go away after so many messages")
parser.add_argument("--pause", type=float, default=0, help="wait so many seconds before each message is read")
parser.add_argument("--wait-first", action="store_true", help="send everything before the first message is read")
parser.add_argument("--credentials", type=json.loads, default={}, help="a list in an object, sent beside the spec")
parser.add_argument("--token", help="send it with the call")
parser.add_argument("--metadata", action="append", default=[], metavar="NAME:VALUE", help="a header")
parser.add_argument("--ca", help="speak TLS, and trust this authority")
parser.add_argument("--certificate")
parser.add_argument("--key")
options = parser.parse_args()


def show(value):
    print(json.dumps(value), flush=True)


def message(value):
    return json_format.MessageToDict(
        value, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def channel():
    limits = [("grpc.max_receive_message_length", MESSAGE_MAX), ("grpc.max_send_message_length", MESSAGE_MAX)]
    if not options.ca:
        return grpc.insecure_channel(options.address, limits)
    read = lambda path: open(path, "rb").read() if path else None
    credentials = grpc.ssl_channel_credentials(read(options.ca), read(options.key), read(options.certificate))
    return grpc.secure_channel(options.address, credentials, limits)


def error(failed):
    shown = {"code": failed.code().name, "message": failed.details(), "details": {}}
    status = rpc_status.from_call(failed)
    for detail in status.details if status else []:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, error_details_pb2.BadRequest):
            if detail.Is(kind.DESCRIPTOR):
                value = kind()
                detail.Unpack(value)
                shown["details"][kind.DESCRIPTOR.name] = message(value)
    show({"error": shown})


def saved():
    with open(options.elements, "rb") as file:
        while size := file.read(4):
            element = image_pb2.ImageElement()
            element.ParseFromString(file.read(int.from_bytes(size, "big")))
            yield element


def requests(kind):
    yield json_format.ParseDict({"spec": options.request, **options.credentials}, kind())
    if not options.elements:
        return
    corrupt = options.corrupt
    for element in saved():
        if options.without_end and element.HasField("end"):
            return
        if corrupt and element.HasField("layer_chunk"):
            data = element.layer_chunk.data
            element.layer_chunk.data = bytes([data[0] ^ 1]) + data[1:]
            corrupt = False
        yield kind(element=element)


class Image:
    """The elements of one image, in the order in which they must come."""

    ORDER = [
        "start", "manifest", "config_file", "draft_config_file", "source_layer", "layer", "final_config_file",
        "filter_output", "end",
    ]

    def __init__(self):
        self.stage, self.kinds = 0, []
        self.documents, self.whole, self.described = {}, set(), []
        self.layers, self.open, self.found = [], None, []
        self.file = open(options.save, "wb") if options.save else None

    def take(self, element):
        if self.file:
            data = element.SerializeToString()
            self.file.write(len(data).to_bytes(4, "big") + data)
        kind = element.WhichOneof("element")
        value = getattr(element, kind)
        stage = self.ORDER.index("layer" if kind.startswith("layer_") else kind)
        assert stage >= self.stage, f"{kind} comes too late"
        assert (kind == "start") == (not self.kinds), f"{kind} is where the start should be"
        assert self.open is None or kind.startswith("layer_"), f"{kind} within a layer"
        self.stage = stage
        self.kinds.append(kind)
        if kind == "start":
            self.start = message(value)
        elif kind in ("manifest", "config_file", "draft_config_file", "final_config_file"):
            assert kind not in self.whole and len(value.data) <= 256 * 1024
            self.documents[kind] = self.documents.get(kind, b"") + value.data
            if value.last:
                self.whole.add(kind)
        elif kind == "source_layer":
            assert value.index == len(self.described), "layers are described by index"
            self.described.append(message(value))
        elif kind == "layer_start":
            if self.open is None or value.index != self.open["index"]:
                assert self.open is None and value.index == len(self.layers), "layers come by index"
            same_as = value.same_as if value.HasField("same_as") else None
            self.open = {"index": value.index, "same_as": same_as, "hash": hashlib.sha256(), "size": 0}
        elif kind == "layer_chunk":
            assert 0 < len(value.data) <= 256 * 1024 and self.open["same_as"] is None
            self.open["hash"].update(value.data)
            self.open["size"] += len(value.data)
        elif kind == "layer_end":
            assert value.index == self.open["index"]
            end = message(value)
            if self.open["same_as"] is None:
                assert value.digest == "sha256:" + self.open["hash"].hexdigest(), "not the digest of what came"
                assert value.size == self.open["size"]
            else:
                earlier = self.layers[self.open["same_as"]]
                assert (value.digest, value.size) == (earlier["digest"], int(earlier["size"]))
            described = self.described[value.index]
            assert not end["kept"] or (value.digest, value.size) == (described["digest"], int(described["size"]))
            self.layers.append({**end, "same_as": self.open["same_as"]})
            self.open = None
        elif kind == "filter_output":
            self.found.append(message(value))
        elif kind == "end":
            assert value.layer_count == len(self.layers) == len(self.described) == self.start["layer_count"]
            assert self.whole == set(self.documents), "a document has no end"

    def show(self):
        if self.file:
            self.file.close()
        digest = lambda data: "sha256:" + hashlib.sha256(data).hexdigest()
        show({
            "start": self.start,
            "documents": {name: digest(data) for name, data in self.documents.items()},
            "layers": self.layers,
            "found": self.found,
            "complete": self.kinds[-1] == "end",
        })


def main(connection):
    metadata = [tuple(pair.split(":", 1)) for pair in options.metadata]
    if options.token:
        metadata.append(("authorization", f"Bearer {options.token}"))
    settings = {"timeout": options.timeout, "metadata": metadata}
    if options.method == "Health":
        stub = health_pb2_grpc.HealthStub(connection)
        show(message(stub.Check(health_pb2.HealthCheckRequest(**options.request), **settings)))
        return
    if options.method == "Services":
        stub = reflection_pb2_grpc.ServerReflectionStub(connection)
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="occy.v1.PipelineService"),
        ]
        listed, described = stub.ServerReflectionInfo(iter(asked), **settings)
        show({
            "services": [service.name for service in listed.list_services_response.service],
            "described": len(described.file_descriptor_response.file_descriptor_proto) > 0,
        })
        return
    pipeline = (pipeline_pb2, pipeline_pb2_grpc.PipelineServiceStub)
    schedules = (schedule_pb2, schedule_pb2_grpc.ScheduleServiceStub)
    messages, service = pipeline if hasattr(pipeline_pb2, options.method + "Request") else schedules
    call = getattr(service(connection), options.method)
    layout = None
    if options.method in ("WriteImage", "ProcessImage"):
        kind = getattr(pipeline_pb2, options.method + "Request")
        sent = list(requests(kind)) if options.wait_first else requests(kind)
        answers = call(iter(sent), **settings)
    elif options.method == "LendLayout":
        layout = Layout(options.layout, options.corrupt, options.unasked)
        start = json_format.ParseDict(options.request, pipeline_pb2.LendStart())
        answers = call(layout.requests(start), **settings)
    else:
        kind = getattr(messages, options.method + "Request")
        answers = call(json_format.ParseDict(options.request, kind()), **settings)
    if not hasattr(answers, "cancel"):
        show(message(answers))
        return
    image = Image()
    try:
        for number, answer in enumerate(answers, 1):
            assert answer.ByteSize() <= MESSAGE_MAX
            if layout and layout.take(answer):
                continue
            if "element" in answer.DESCRIPTOR.fields_by_name and answer.HasField("element"):
                image.take(answer.element)
            else:
                show(message(answer))
            if number == options.stop_after:
                answers.cancel()
                return
            time.sleep(options.pause)
    finally:
        if layout:
            layout.close()
        if image.kinds:
            image.show()


with channel() as connection:
    try:
        main(connection)
    except grpc.RpcError as failed:
        error(failed)
sys.stdout.flush()
