import pytest

from farshore import rpc
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc


@pytest.fixture
def serve_engine():
    """serve_engine(servicer, threads=…) -> the servicer, which has its ``address`` then."""
    servers = []

    def serve(servicer, *, threads):
        server, servicer.address = rpc.serve(
            lambda server: pb_grpc.add_EngineServicer_to_server(servicer, server),
            service=pb.DESCRIPTOR.services_by_name["Engine"].full_name,
            listen="127.0.0.1:0",
            threads=threads,
            token=None,
        )
        servers.append(server)
        return servicer

    yield serve
    for server in servers:
        server.stop(0).wait()
