"""The gRPC service of a directory, for the processes of :class:`RemoteDirectory`. Registered by the
controller."""

import grpc

from farshore.ids import WorkerId
from farshore.kvstore.directory import codec
from farshore.kvstore.directory.base import Directory
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc


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
