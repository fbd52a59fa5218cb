"""A checkpoint cannot run code in the process that loads it."""

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from tests.checkpoint import jobs
from tests.workers import WorkerPool
from vishwamai_mp.checkpoint import read_manifest, restricted_reading
from vishwamai_mp.config import UserError


class Attack:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def original(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guarded")
    workers.run(jobs.train_and_save, 1, root, jobs.config("bf16"), 1)
    return root / "step_00000001"


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def refused(folder: Path) -> str:
    with pytest.raises(UserError, match=r"refused|refers to") as caught:
        restricted_reading.check(folder, read_manifest(folder))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_checkpoint_of_ours_passes(original: Path) -> None:
    restricted_reading.check(original, read_manifest(original))


def test_code_in_the_metadata_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "owned")))
    assert f"it asks for {os.mkdir.__module__}.mkdir" in refused(checkpoint)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"state_dict_metadata": {}})])
def test_other_metadata_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(content)
    refused(checkpoint)


def test_code_in_the_common_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    torch.save(Attack(tmp_path / "owned"), checkpoint / "common.pt")
    assert "common.pt refused: more than plain data" in refused(checkpoint)
    assert not (tmp_path / "owned").exists()


def put_object(checkpoint: Path, value: object) -> None:
    """Let an object be all that the checkpoint holds."""
    metadata = restricted_reading.read_metadata(checkpoint)
    buffer = io.BytesIO()
    torch.save(value, buffer)
    info = next(iter(metadata.storage_data.values()))
    (checkpoint / info.relative_path).write_bytes(buffer.getvalue())
    key = MetadataIndex("decoder.layers.0._extra_state/shard_0_1")
    info.offset, info.length = 0, len(buffer.getvalue())
    metadata.storage_data = {key: info}
    metadata.state_dict_metadata[key.fqn] = BytesStorageMetadata()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def test_code_in_an_object_among_the_tensors_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    put_object(checkpoint, [Attack(tmp_path / "owned")])
    assert "_extra_state/shard_0_1 refused: more than plain data" in refused(checkpoint)
    assert not (tmp_path / "owned").exists()


def test_a_pickle_for_transformer_engine_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Bytes to torch, which its layers would unpickle; an empty one, as other programs store, holds nothing."""
    pickled = pickle.dumps({"recipe": Attack(tmp_path / "owned")})
    put_object(checkpoint, torch.frombuffer(bytearray(pickled), dtype=torch.uint8))
    assert "_extra_state/shard_0_1 refused: Transformer Engine's pickled state" in refused(checkpoint)
    put_object(checkpoint, torch.empty(0, dtype=torch.uint8))
    restricted_reading.check(checkpoint, read_manifest(checkpoint))


def test_files_outside_the_folder_are_not_read(checkpoint: Path) -> None:
    metadata = restricted_reading.read_metadata(checkpoint)
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "'../../secret', which is not in the manifest" in refused(checkpoint)
