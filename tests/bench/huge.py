#!/usr/bin/env python3
"""Writes a docker-save tar with one layer of 10 GB, in a stream: huge.py FILE [MEGABYTES].

The same bytes every time. About half of them compress. One file of the layer is over 8 GiB, and so is
the layer: neither size fits the octal field of a tar header, so both stand in PAX records.
"""

import hashlib
import io
import json
import os
import sys
import tarfile

MIB = 1 << 20


def blocks() -> list[bytes]:
    """Blocks of 1 MiB, by turns incompressible and like a log file."""
    out = []
    for i in range(24):
        noise = hashlib.shake_128(b"noise %d" % i).digest(MIB)
        lines = b"".join(
            b"2026-01-%02d host%d app[%d]: request %08x took %d ms\n"
            % (1 + j % 28, i, 100 + j % 7, int.from_bytes(noise[4 * j : 4 * j + 4], "big"), noise[j])
            for j in range(17000)
        )
        out.append(noise)
        out.append(lines[:MIB].ljust(MIB, b"."))
    return out


class Generated(io.RawIOBase):
    """A file of `size` bytes: the blocks in turn, each begun with its own number, so that none repeats."""

    def __init__(self, size: int, seed: int, pool: list[bytes]) -> None:
        self.left, self.seed, self.pool = size, seed, pool
        self.number, self.rest = 0, b""

    def read(self, n: int = -1) -> bytes:
        n = self.left if n < 0 else min(n, self.left)
        parts, got = [], 0
        while got < n:
            if not self.rest:
                head = b"%d %d\n" % (self.seed, self.number)
                self.rest = head + self.pool[(self.number + self.seed) % len(self.pool)][len(head) :]
                self.number += 1
            part = self.rest[: n - got]
            self.rest = self.rest[len(part) :]
            parts.append(part)
            got += len(part)
        self.left -= n
        return b"".join(parts)


class Sink:
    """Counts, hashes and passes on."""

    def __init__(self, out=None) -> None:
        self.out, self.size, self.hash = out, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.hash.update(data)
        if self.out:
            self.out.write(data)
        return len(data)


def member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 1767225600
    return info


def padded(size: int) -> int:
    return -(-size // 512) * 512


def main() -> None:
    path = sys.argv[1]
    total = int(sys.argv[2]) * 1_000_000 if len(sys.argv) > 2 else 10_000_000_000
    tarfile.RECORDSIZE = 512  # an archive ends after two blocks of zeros, as Go writes it
    pool = blocks()
    small = [("etc/huge.conf", 100), ("srv/data/part-1", total // 20), ("srv/data/part-2", total // 20)]
    files = [("srv/data/main", total * 9 // 10), *small]
    layer_size = 1024
    for name, size in files:
        layer_size += len(member(name, size).tobuf(tarfile.PAX_FORMAT)) + padded(size)

    with open(path + ".part", "wb", buffering=MIB) as out:
        save = tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=MIB)

        # The layer is written by a second tar writer on the first one's stream, and hashed on the way.
        header = member("layer/layer.tar", layer_size).tobuf(tarfile.PAX_FORMAT)
        save.fileobj.write(header)
        layer = Sink(save.fileobj)
        inner = tarfile.open(fileobj=layer, mode="w|", format=tarfile.PAX_FORMAT, bufsize=MIB)
        for seed, (name, size) in enumerate(files):
            inner.addfile(member(name, size), Generated(size, seed, pool))
        inner.close()
        assert layer.size == layer_size, (layer.size, layer_size)
        save.fileobj.write(b"\0" * (padded(layer_size) - layer_size))
        save.offset += len(header) + padded(layer_size)

        config = json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "created": "2026-01-01T00:00:00Z",
                "config": {"Cmd": ["/srv/data/main"]},
                "rootfs": {"type": "layers", "diff_ids": ["sha256:" + layer.hash.hexdigest()]},
                "history": [{"created": "2026-01-01T00:00:00Z", "created_by": "tests/bench/huge.py"}],
            }
        ).encode()
        name = hashlib.sha256(config).hexdigest() + ".json"
        save.addfile(member(name, len(config)), io.BytesIO(config))
        manifest = json.dumps(
            [{"Config": name, "RepoTags": ["huge:latest"], "Layers": ["layer/layer.tar"]}]
        ).encode()
        save.addfile(member("manifest.json", len(manifest)), io.BytesIO(manifest))
        save.close()
    os.rename(path + ".part", path)


main()
