"""What the head of a Ray cluster answers to a client's first question. Ray's own client repeats it for minutes."""

from __future__ import annotations

import grpc
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc


def ask(address: str, token: str | None) -> grpc.StatusCode:
    """The status of the answer: OK, or UNAUTHENTICATED where the token is refused."""
    shown = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            head.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=10, metadata=shown)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK
