"""The directory over gRPC: its client, used by workers, and its service, registered by the controller.

See ``base`` for the contract.
"""

from collections.abc import Collection, Sequence
from typing import Any

import grpc

from farshore import rpc
from farshore.cluster_token import ClusterToken
from farshore.errors import DeadlineExceeded, FarshoreError, TransportError
from farshore.ids import WorkerId
from farshore.kvstore.directory import codec
from farshore.kvstore.directory.base import Announcement, Directory, Listing, WorkerRecord, look_up_keys
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc

DEADLINE_S = 1.0


class RemoteDirectory:
    """A :class:`~farshore.kvstore.directory.base.Directory` at HOST:PORT ``address``."""

    def __init__(self, address: str, *, token: ClusterToken | None = None) -> None:
        self._channel = rpc.channel(address, token)
        self._stub = pb_grpc.DirectoryStub(self._channel)

    def renew(self, record: WorkerRecord) -> None:
        self._call(self._stub.Renew, codec.record_to_pb(record))

    def withdraw(self, worker: WorkerId) -> None:
        self._call(self._stub.Withdraw, pb.WithdrawRequest(worker_id=worker))

    def close(self, workers: Collection[WorkerId], *, draining: Collection[WorkerId] = ()) -> None:
        self._call(self._stub.Close, pb.CloseRequest(worker_ids=sorted(workers), draining=sorted(draining)))

    def listing(self) -> Listing:
        return codec.listing_from_pb(self._call(self._stub.List, pb.ListRequest()))

    def announce(self, worker: WorkerId, blocks: Announcement) -> int:
        return self._call(self._stub.Announce, codec.announcement_to_pb(worker, blocks)).known

    def find_prefix(self, hashes: Sequence[bytes]) -> list[frozenset[WorkerId]]:
        reply = self._call(self._stub.FindPrefix, pb.FindPrefixRequest(hashes=look_up_keys(hashes)))
        return [frozenset(WorkerId(worker) for worker in block.worker_ids) for block in reply.blocks]

    def disconnect(self) -> None:
        self._channel.close()

    def _call(self, method: grpc.UnaryUnaryMultiCallable, request: object) -> Any:
        try:
            return method(request, timeout=DEADLINE_S)
        except grpc.RpcError as failure:
            error = rpc.error_of(failure, peer="the directory")
            if isinstance(error, DeadlineExceeded):
                # Of this call alone: the controller is away, paused or busy.
                error = TransportError(f"the directory does not answer within {DEADLINE_S:g} s")
            raise error from failure


class DirectoryService(pb_grpc.DirectoryServicer):
    """Passes calls on to a directory."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def Renew(self, request: pb.WorkerRecord, context: grpc.ServicerContext) -> pb.DirectoryReply:
        try:
            self._directory.renew(codec.record_from_pb(request))
        except FarshoreError as error:
            rpc.abort(context, error)
        return pb.DirectoryReply()

    def Withdraw(self, request: pb.WithdrawRequest, context: grpc.ServicerContext) -> pb.DirectoryReply:
        self._directory.withdraw(WorkerId(request.worker_id))
        return pb.DirectoryReply()

    def Close(self, request: pb.CloseRequest, context: grpc.ServicerContext) -> pb.DirectoryReply:
        closed, draining = (
            [WorkerId(worker) for worker in workers] for workers in (request.worker_ids, request.draining)
        )
        self._directory.close(closed, draining=draining)
        return pb.DirectoryReply()

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.Listing:
        return codec.listing_to_pb(self._directory.listing())

    def Announce(
        self, request: pb.BlockAnnouncement, context: grpc.ServicerContext
    ) -> pb.BlockAnnouncementReply:
        blocks = codec.announcement_from_pb(request)
        try:
            return pb.BlockAnnouncementReply(
                known=self._directory.announce(WorkerId(request.worker_id), blocks)
            )
        except FarshoreError as error:
            rpc.abort(context, error)

    def FindPrefix(self, request: pb.FindPrefixRequest, context: grpc.ServicerContext) -> pb.FindPrefixReply:
        try:
            found = self._directory.find_prefix(request.hashes)
        except FarshoreError as error:
            rpc.abort(context, error)
        return pb.FindPrefixReply(blocks=[pb.BlockHolders(worker_ids=sorted(workers)) for workers in found])
