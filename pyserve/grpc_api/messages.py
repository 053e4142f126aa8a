"""gRPC's messages and services: TorchServe's and the Open Inference Protocol's.

They come from protos/services.binpb, which is compiled from protos/*.proto, so that any protobuf from 4.25 on will do.
They live in a pool of their own: whatever else this process imports may bring files of the same names.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from pyserve.launch import ROOT_DIR

PROTOS = ROOT_DIR / "pyserve" / "protos"
DESCRIPTORS = PROTOS / "services.binpb"

INFERENCE = "org.pytorch.serve.grpc.inference"
MANAGEMENT = "org.pytorch.serve.grpc.management"
OPEN_INFERENCE = "inference"
# TorchServe serves the Open Inference Protocol under a package of its own; on the wire it is the same.
OPEN_INFERENCE_TORCHSERVE = "org.pytorch.serve.grpc.openinference"


def _twin(file: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.FileDescriptorProto:
    """The Open Inference Protocol in TorchServe's package."""
    twin = descriptor_pb2.FileDescriptorProto()
    twin.CopyFrom(file)
    twin.name = f"torchserve/{file.name}"
    twin.package = OPEN_INFERENCE_TORCHSERVE

    def rename(message: Any) -> None:
        for field in message.field:
            if field.type_name.startswith(f".{OPEN_INFERENCE}."):
                field.type_name = f".{OPEN_INFERENCE_TORCHSERVE}{field.type_name.removeprefix(f'.{OPEN_INFERENCE}')}"
        for nested in message.nested_type:
            rename(nested)

    for message in twin.message_type:
        rename(message)
    for service in twin.service:
        for method in service.method:
            for side in ("input_type", "output_type"):
                name = getattr(method, side).removeprefix(f".{OPEN_INFERENCE}.")
                setattr(method, side, f".{OPEN_INFERENCE_TORCHSERVE}.{name}")
    return twin


def _load() -> Any:
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    for file in files.file:
        pool.Add(file)
        if file.package == OPEN_INFERENCE:
            pool.Add(_twin(file))
    return pool


POOL: Any = _load()


def message(name: str) -> Any:
    """The class of the message with this full name."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


def method_path(service: str, method: str) -> str:
    """As in the ``:path`` of a call."""
    return f"/{service}/{method}"
