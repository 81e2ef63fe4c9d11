"""A coordinator of a version before all others: it knows no rpc. The first line says where it listens; it ends with its input."""

import sys
from concurrent import futures

import grpc

server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
server.start()
sys.stdin.read()
