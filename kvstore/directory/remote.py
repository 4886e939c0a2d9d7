"""The directory over gRPC: its client, used by workers, and its service, registered by the controller.

See ``base`` for the contract.
"""

from collections.abc import Collection

import grpc

from farshore import rpc
from farshore.ids import WorkerId
from farshore.kvstore.directory import codec
from farshore.kvstore.directory.base import Directory, Listing, WorkerRecord
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc

DEADLINE_S = 1.0


class RemoteDirectory:
    """A :class:`~farshore.kvstore.directory.base.Directory` at HOST:PORT ``address``."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=rpc.OPTIONS)
        self._stub = pb_grpc.DirectoryStub(self._channel)

    def renew(self, record: WorkerRecord) -> None:
        self._call(self._stub.Renew, codec.record_to_pb(record))

    def withdraw(self, worker: WorkerId) -> None:
        self._call(self._stub.Withdraw, pb.WithdrawRequest(worker_id=worker))

    def close(self, workers: Collection[WorkerId]) -> None:
        self._call(self._stub.Close, pb.CloseRequest(worker_ids=sorted(workers)))

    def listing(self) -> Listing:
        return codec.listing_from_pb(self._call(self._stub.List, pb.ListRequest()))

    def disconnect(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def _call(self, method: grpc.UnaryUnaryMultiCallable, request: object) -> pb.Listing:
        try:
            return method(request, timeout=DEADLINE_S)
        except grpc.RpcError as failure:
            raise rpc.error_of(failure, peer="the directory") from failure


class DirectoryService(pb_grpc.DirectoryServicer):
    """Passes calls on to a directory."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def Renew(self, request: pb.WorkerRecord, context: grpc.ServicerContext) -> pb.DirectoryReply:
        self._directory.renew(codec.record_from_pb(request))
        return pb.DirectoryReply()

    def Withdraw(self, request: pb.WithdrawRequest, context: grpc.ServicerContext) -> pb.DirectoryReply:
        self._directory.withdraw(WorkerId(request.worker_id))
        return pb.DirectoryReply()

    def Close(self, request: pb.CloseRequest, context: grpc.ServicerContext) -> pb.DirectoryReply:
        self._directory.close([WorkerId(worker) for worker in request.worker_ids])
        return pb.DirectoryReply()

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.Listing:
        return codec.listing_to_pb(self._directory.listing())
