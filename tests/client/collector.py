"""A collector of spans, by OTLP over gRPC. The first line says where it listens; each span is a line of JSON after it.

Where it listens can be said: `0.0.0.0:4317`. It then runs until it is stopped.
"""

import json
import sys
from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service


def value(any_value):
    return getattr(any_value, any_value.WhichOneof("value"))


class Collector(service.TraceServiceServicer):
    def Export(self, request, context):
        for resource_spans in request.resource_spans:
            resource = {pair.key: value(pair.value) for pair in resource_spans.resource.attributes}
            for scope_spans in resource_spans.scope_spans:
                for span in scope_spans.spans:
                    attributes = {pair.key: value(pair.value) for pair in span.attributes}
                    line = {
                        "service": resource.get("service.name"),
                        "name": span.name,
                        "trace": span.trace_id.hex(),
                        "span": span.span_id.hex(),
                        "parent": span.parent_span_id.hex(),
                        "attributes": attributes,
                    }
                    print(json.dumps(line), flush=True)
        return messages.ExportTraceServiceResponse()


server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
service.add_TraceServiceServicer_to_server(Collector(), server)
address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:0"
print(f"{address.rpartition(':')[0]}:{server.add_insecure_port(address)}", flush=True)
server.start()
if len(sys.argv) > 1:
    server.wait_for_termination()
# Whoever started us closes our input, at the latest when it ends.
sys.stdin.read()
