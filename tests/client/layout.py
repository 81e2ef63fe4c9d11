"""An image layout in a directory, and what a coordinator asks of it in LendLayout: as the .proto says it, and with nothing of ours.

Nothing here waits: whoever reads the answers hands them to `take`, and `requests` yields what is to be sent meanwhile.
"""

import hashlib
import json
import os
import queue
import uuid

from occy.v1 import pipeline_pb2 as v1

WINDOW = 1024 * 1024
PIECE = 256 * 1024
LEAST = 4096


def cost(size):
    return max(size, LEAST)


class Layout:
    def __init__(self, path, corrupt=False, unasked=False):
        self.path, self.corrupt, self.unasked = path, corrupt, unasked
        self.queue = queue.Queue()
        self.reading, self.writing, self.asked = {}, {}, set()

    def requests(self, start):
        yield v1.LendLayoutRequest(start=start)
        if self.unasked:
            yield v1.LendLayoutRequest(answer=v1.LendAnswer(ask=4711, done=v1.LendDone()))
        while (request := self.queue.get()) is not None:
            yield request

    def close(self):
        self.queue.put(None)

    def take(self, response):
        """Whether the answer was about the layout."""
        kind = response.WhichOneof("part")
        value = getattr(response, kind)
        if kind == "ask":
            assert value.id not in self.asked, "no two asks have the same id"
            self.asked.add(value.id)
            try:
                getattr(self, value.WhichOneof("what"))(value.id, getattr(value, value.WhichOneof("what")))
            except FileNotFoundError as missing:
                failure = v1.LendFailure(message=f"{missing.filename} is missing", fault=v1.LEND_FAULT_MISSING)
                self.answer(value.id, failure=failure)
        elif kind == "piece":
            self.piece(value)
        elif kind == "end":
            self.end(value)
        elif kind == "credit":
            if value.ask in self.reading:
                self.reading[value.ask][1] += value.bytes
                self.pump(value.ask)
        elif kind == "cancel":
            if self.reading.pop(value, None) or self.writing.pop(value, None):
                self.answer(value, done=v1.LendDone())
        else:
            return False
        return True

    def answer(self, ask, **answer):
        self.queue.put(v1.LendLayoutRequest(answer=v1.LendAnswer(ask=ask, **answer)))

    def blob(self, digest):
        return os.path.join(self.path, "blobs", *digest.split(":"))

    def index(self):
        with open(os.path.join(self.path, "index.json"), "rb") as file:
            return json.load(file)

    # The source.

    def send(self, ask, path, digest, media_type=""):
        size = os.path.getsize(path)
        self.reading[ask] = [open(path, "rb"), WINDOW, v1.LendEnd(ask=ask, digest=digest, size=size, media_type=media_type)]
        self.pump(ask)

    def pump(self, ask):
        file, credit, end = self.reading[ask]
        while credit >= LEAST:
            data = file.read(min(PIECE, credit))
            if not data:
                del self.reading[ask]
                self.queue.put(v1.LendLayoutRequest(end=end))
                return
            credit -= cost(len(data))
            if self.corrupt and end.size > PIECE:
                data, self.corrupt = bytes([data[0] ^ 1]) + data[1:], False
            self.queue.put(v1.LendLayoutRequest(piece=v1.LendPiece(ask=ask, data=data)))
        self.reading[ask][1] = credit

    def read_index(self, ask, _):
        path = os.path.join(self.path, "index.json")
        with open(path, "rb") as file:
            digest = "sha256:" + hashlib.sha256(file.read()).hexdigest()
        self.send(ask, path, digest)

    def read_blob(self, ask, wanted):
        self.send(ask, self.blob(wanted.digest), wanted.digest)

    # The destination.

    def open(self, ask, _):
        os.makedirs(os.path.join(self.path, "blobs"), exist_ok=True)
        self.answer(ask, opened=v1.LendOpened(names_many=True))

    def has_blob(self, ask, wanted):
        path = self.blob(wanted.digest)
        self.answer(ask, found=os.path.exists(path) and os.path.getsize(path) == wanted.size)

    def write_blob(self, ask, wanted):
        path = os.path.join(self.path, f"partial-{uuid.uuid4()}")
        self.writing[ask] = [open(path, "wb"), hashlib.new(wanted.algorithm), path, WINDOW]

    def piece(self, piece):
        writing = self.writing.get(piece.ask)
        if writing is None:
            return
        assert 0 < len(piece.data) <= PIECE
        writing[3] -= cost(len(piece.data))
        assert writing[3] >= 0, "more than there was credit for"
        writing[0].write(piece.data)
        writing[1].update(piece.data)
        writing[3] += cost(len(piece.data))
        credit = v1.LendCredit(ask=piece.ask, bytes=cost(len(piece.data)))
        self.queue.put(v1.LendLayoutRequest(credit=credit))

    def end(self, end):
        file, hashed, path, _ = self.writing.pop(end.ask)
        size = file.tell()
        file.close()
        assert (end.digest.split(":")[1], end.size) == (hashed.hexdigest(), size), "not the digest of what came"
        os.makedirs(os.path.dirname(self.blob(end.digest)), exist_ok=True)
        os.rename(path, self.blob(end.digest))
        self.answer(end.ask, done=v1.LendDone())

    def find_named(self, ask, wanted):
        try:
            entries = self.index()["manifests"]
        except FileNotFoundError:
            entries = []
        for entry in entries:
            if entry.get("annotations", {}).get(wanted.annotation) == wanted.name:
                self.send(ask, self.blob(entry["digest"]), entry["digest"], entry["mediaType"])
                return
        self.answer(ask, found=False)

    def name(self, ask, name):
        entry = json.loads(name.entry)
        assert os.path.exists(self.blob(entry["digest"])), "it names what is not there"
        with open(os.path.join(self.path, "oci-layout"), "w") as file:
            file.write('{"imageLayoutVersion":"1.0.0"}')
        try:
            index = self.index()
        except FileNotFoundError:
            index = {"schemaVersion": 2, "manifests": []}
        keys = ["org.opencontainers.image.ref.name"] + ([] if name.by_tag else ["io.containerd.image.name"])
        called = lambda entry: [entry.get("annotations", {}).get(key) for key in keys]
        index["manifests"] = [other for other in index["manifests"] if called(other) != called(entry)] + [entry]
        with open(os.path.join(self.path, "index.json"), "w") as file:
            json.dump(index, file)
        self.answer(ask, done=v1.LendDone())
