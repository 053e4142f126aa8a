"""What is served is what protos/*.proto say, and what clients of TorchServe and Triton expect on the wire."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc.service_pb2 as triton
from google.protobuf import descriptor_pb2

from pyserve.grpc_api import messages as grpc_messages
from pyserve.grpc_api.messages import OPEN_INFERENCE, OPEN_INFERENCE_TORCHSERVE, POOL, message

MESSAGES = [
    "ModelConfigRequest", "ModelConfigResponse", "RepositoryModelLoadRequest", "RepositoryModelLoadResponse",
    "RepositoryModelUnloadRequest", "RepositoryModelUnloadResponse",
    "ModelInferRequest", "ModelInferResponse", "ModelMetadataRequest", "ModelMetadataResponse", "ModelReadyRequest",
    "ModelReadyResponse", "ModelStatisticsRequest", "ModelStatisticsResponse", "ModelStreamInferResponse",
    "RepositoryIndexRequest", "RepositoryIndexResponse", "ServerLiveRequest", "ServerLiveResponse",
    "ServerMetadataRequest", "ServerMetadataResponse", "ServerReadyRequest", "ServerReadyResponse",
]  # fmt: skip


def test_the_descriptors_are_those_of_the_proto_files(tmp_path: Path) -> None:
    """If not: python -m grpc_tools.protoc -I . --include_imports --descriptor_set_out=services.binpb *.proto"""
    made = tmp_path / "services.binpb"
    files = ("inference.proto", "management.proto", "open_inference.proto")
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", "--include_imports", f"--descriptor_set_out={made}",
         *files], cwd=grpc_messages.PROTOS, check=True,
    )  # fmt: skip
    read = descriptor_pb2.FileDescriptorSet.FromString
    assert read(made.read_bytes()) == read(grpc_messages.DESCRIPTORS.read_bytes())


def fields(descriptor: Any, depth: int = 4) -> dict[int, Any]:
    """Number -> (name, type, repeated, fields of the message) of what both sides know."""
    return {
        field.number: (field.name, field.type, fields(field.message_type, depth - 1) if field.message_type else None)
        for field in (descriptor.fields if depth else ())
    }


@pytest.mark.parametrize("package", [OPEN_INFERENCE, OPEN_INFERENCE_TORCHSERVE])
@pytest.mark.parametrize("name", MESSAGES)
def test_messages_have_tritons_numbers(package: str, name: str) -> None:
    ours, theirs = fields(message(f"{package}.{name}").DESCRIPTOR), fields(getattr(triton, name).DESCRIPTOR)
    assert all(_is_part(ours[number], theirs[number]) for number in ours), (ours, theirs)


def _is_part(ours: Any, theirs: Any) -> bool:
    """Triton's statistics have members that ours leave out."""
    if ours[2] is None or theirs[2] is None:
        return bool(ours == theirs)
    return bool(ours[:2] == theirs[:2]) and all(_is_part(ours[2][each], theirs[2][each]) for each in ours[2])


@pytest.mark.parametrize("package", [OPEN_INFERENCE, OPEN_INFERENCE_TORCHSERVE])
def test_the_open_inference_service_stands_under_both_packages(package: str) -> None:
    service = POOL.FindServiceByName(f"{package}.GRPCInferenceService")
    assert {method.input_type.full_name.rpartition(".")[0] for method in service.methods} == {package}
    assert [method.name for method in service.methods] == [
        "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "ModelStreamInfer",
        "ModelStatistics", "ModelConfig", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "numbers"), [
    ("PredictionsRequest", {"model_name": 1, "model_version": 2, "input": 3, "sequence_id": 4}),
    ("PredictionResponse", {"prediction": 1, "sequence_id": 2, "status": 3}),
    ("TorchServeHealthResponse", {"health": 1}),
])  # fmt: skip
def test_messages_have_torchserves_numbers(name: str, numbers: dict[str, int]) -> None:
    descriptor = message(f"{grpc_messages.INFERENCE}.{name}").DESCRIPTOR
    assert {field.name: field.number for field in descriptor.fields} == numbers


@pytest.mark.parametrize(("name", "names"), [
    ("DescribeModelRequest", "model_name model_version customized"),
    ("ListModelsRequest", "limit next_page_token"),
    ("RegisterModelRequest", "batch_size handler initial_workers max_batch_delay model_name response_timeout runtime "
                             "synchronous url s3_sse_kms startup_timeout"),
    ("ScaleWorkerRequest", "model_name model_version max_worker min_worker number_gpu synchronous timeout"),
    ("SetDefaultRequest", "model_name model_version"),
    ("UnregisterModelRequest", "model_name model_version"),
    ("ManagementResponse", "msg"),
])  # fmt: skip
def test_messages_of_management_have_torchserves_numbers(name: str, names: str) -> None:
    descriptor = message(f"{grpc_messages.MANAGEMENT}.{name}").DESCRIPTOR
    assert [(field.number, field.name) for field in descriptor.fields] == list(enumerate(names.split(), 1))
