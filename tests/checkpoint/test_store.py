"""The folder: search, names, deletion, and killed processes' leftovers. No process group, no torch."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from vishwamai_mp.checkpoint import Manifest, check_files, find_checkpoint, read_manifest, store
from vishwamai_mp.checkpoint.manifest import FileRecord, TensorRecord, record_of, share_of
from vishwamai_mp.config import UserError
from vishwamai_mp.config.files import write_through


def write(root: Path, step: int, content: bytes = b"weights" * 100) -> Path:
    """A checkpoint of one file."""
    folder = store.begin(root, step)
    (folder / "data.distcp").write_bytes(content)
    manifest = Manifest(
        step=step,
        model={"hidden_size": 8},
        layout={},
        precision="fp32",
        versions={},
        tensors={"weight": TensorRecord([3, 4], "bfloat16")},
        objects=[],
        files={"data.distcp": record_of(folder / "data.distcp")},
    )
    write_through(folder / "manifest.json", manifest.to_json().encode())
    return store.publish(folder, step)


def test_a_manifest_survives_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    manifest = read_manifest(path)
    assert Manifest(**{**asdict(manifest), "tensors": manifest.tensors, "files": manifest.files}) == manifest
    assert manifest.files["data.distcp"] == FileRecord(700, record_of(path / "data.distcp").crc32)
    assert (manifest.parameters, manifest.tensors["weight"].size, manifest.has_optimizer) == (12, 24, False)


@pytest.mark.parametrize(
    ("damage", "why", "cheap"),
    [
        (lambda path: (path / "data.distcp").write_bytes(b"short"), "data.distcp has 5 bytes of 700", True),
        (lambda path: (path / "data.distcp").unlink(), "data.distcp is missing", True),
        (lambda path: (path / "manifest.json").unlink(), "no checkpoint here (manifest.json is missing)", True),
        (lambda path: (path / "manifest.json").write_text("{"), "cannot be read", True),
        (lambda path: (path / "data.distcp").write_bytes(b"x" * 700), "data.distcp is damaged", False),
    ],
)
def test_a_broken_checkpoint_is_skipped_with_its_reason(tmp_path: Path, damage, why: str, cheap: bool) -> None:
    write(tmp_path, 10)
    damage(write(tmp_path, 20))
    found = find_checkpoint(tmp_path)
    assert (found.path, found.step) == (tmp_path / "step_00000010", 10)
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith("step_00000020 skipped: ")
    assert why in found.skipped[0]
    assert (find_checkpoint(tmp_path, checksums=False).step == 10) == cheap


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "absent") == store.Found(None)
    with pytest.raises(UserError, match=r"neither a checkpoint nor a folder that has one$"):
        store.locate(tmp_path)
    with pytest.raises(UserError, match="a folder that has one; there is nothing of that name"):
        store.locate(tmp_path / "absent")
    (tmp_path / "first/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="it holds runs, name one of them: first"):
        store.locate(tmp_path)


def test_newest_goes_by_number_not_by_name(tmp_path: Path) -> None:
    write(tmp_path, 123_456_789)
    write(tmp_path, 99_999_999)
    assert find_checkpoint(tmp_path).step == 123_456_789


def test_leftovers_of_killed_processes_are_not_checkpoints_and_go_at_the_next_save(tmp_path: Path) -> None:
    write(tmp_path, 1)
    store.begin(tmp_path, 2)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000001.0123abcd.deleted")
    (tmp_path / "latest.0123abcd.partial").write_text("")
    (tmp_path / "notes.partial").write_text("the user's")
    assert find_checkpoint(tmp_path).path is None
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "notes.partial", "step_00000003"]


def test_an_existing_checkpoint_of_the_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 7, b"old")
    write(tmp_path, 7, b"new")
    assert (tmp_path / "step_00000007/data.distcp").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000007"]


def test_retention_spares_the_latest_the_milestones_and_the_broken(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
    (tmp_path / "step_00000050/data.distcp").unlink()
    (tmp_path / "latest").write_text("step_00000010\n")
    store.retain(tmp_path, keep_last=1, keep_every=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step_00000010",
        "step_00000020",
        "step_00000040",
        "step_00000050",
    ]


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    raw = json.loads((path / "manifest.json").read_text())
    raw["files"]["../secret"] = {"size": 1, "crc32": 1}
    (path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"'\.\./secret', which is not a file of the checkpoint's folder"):
        read_manifest(path)


def test_ranks_share_the_checking_evenly() -> None:
    files = {f"{i}": FileRecord(size, 0) for i, size in enumerate([900, 500, 400, 300, 300, 10])}
    shares = [share_of(files, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    assert [sum(record.size for record in share.values()) for share in shares] == [900, 800, 710]
    assert check_files(Path("absent"), shares[0], checksums=True) == ["0 is missing"]
