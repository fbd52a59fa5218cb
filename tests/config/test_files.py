"""Files appear whole or not at all, and nothing is left of those that fail."""

import os

import pytest

from vishwamai_mp.config.files import leftovers, write_whole, written_whole


def test_content_and_replacement(tmp_path):
    path = tmp_path / "notes.txt"
    write_whole(path, "Grüße")
    write_whole(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "weights.bin"
    write_whole(path, "old")

    def write() -> None:
        with written_whole(path) as aside:
            aside.write_text("half of the n")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_deleted_file_is_a_changed_mind(tmp_path):
    path = tmp_path / "trace.json.gz"
    with written_whole(path, ending=".json.gz") as aside:
        assert aside.name.endswith(".partial.json.gz")
        aside.write_text("too large")
        aside.unlink()
    assert not list(tmp_path.iterdir())


def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    """What happens in between is invisible without a power cut: the calls are watched."""
    calls = []
    synced, renamed = os.fsync, os.replace

    def fsync(descriptor):
        calls.append(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}')).split('.')[0]}")
        synced(descriptor)

    def replace(source, target):
        calls.append("rename")
        renamed(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_whole(tmp_path / "file.txt", "x")
    assert calls == ["fsync file", "rename", f"fsync {tmp_path.name}"]


def test_what_a_killed_writer_left_is_found_by_name(tmp_path):
    for name in (
        "a.json.0123abcd.partial",
        "b.json.0123abcd.partial",
        "c.0123abcd.partial.gz",
        "mine.partial",
        "a.json",
    ):
        (tmp_path / name).touch()
    assert {path.name for path in leftovers(tmp_path)} == {
        "a.json.0123abcd.partial",
        "b.json.0123abcd.partial",
        "c.0123abcd.partial.gz",
    }
    assert [path.name for path in leftovers(tmp_path, "a.json")] == ["a.json.0123abcd.partial"]
