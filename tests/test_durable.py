"""Files that are there whole or not at all."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from hiedit import methods
from hiedit.catalogue import load_method
from hiedit.durable import replacing, write_text


def test_a_file_takes_its_place_in_one_step(tmp_path):
    path = tmp_path / "new" / "file.json"
    with replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "one" and [p.name for p in path.parent.iterdir()] == ["file.json"]
    assert write_text(path, "zwei – ∞") == path and path.read_bytes() == "zwei – ∞".encode()


def test_an_error_leaves_what_was_there(tmp_path):
    path = write_text(tmp_path / "file", "old")
    with pytest.raises(RuntimeError, match="stop"), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("stop")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_it_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("fsync"))
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda *way: (done.append("replace"), rename(*way)))
    write_text(tmp_path / "file", "text")
    assert done[:2] == ["fsync", "replace"]
    assert len(done) == (3 if os.name == "posix" else 2)  # and the directory


@pytest.mark.skipif(os.name != "posix", reason="permissions are of POSIX")
def test_others_may_read_what_the_umask_lets_them(tmp_path):
    with replacing(tmp_path / "tensors") as temporary:
        save_file({"a": torch.zeros(1)}, temporary)  # which only its owner may read
    write_text(tmp_path / "text", "")
    plain = tmp_path / "plain"
    plain.touch()
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes == {stat.S_IMODE(plain.stat().st_mode)}


def test_a_trained_editor_is_never_beside_the_settings_of_another(tmp_path, monkeypatch):
    """A crash between its two files leaves a directory that is no editor, not a wrong one."""
    one, other = load_method("hiedit"), load_method("rledit")
    methods.write_editor(tmp_path, one, ["a"], {"t": torch.zeros(2)})
    assert methods.trained_modules(tmp_path) == ["a"]

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "write_text", dies)
    with pytest.raises(KeyboardInterrupt):
        methods.write_editor(tmp_path, other, ["b"], {"t": torch.ones(2)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["editor.safetensors"]
    with pytest.raises(ValueError, match="editor"):
        methods.trained_modules(tmp_path)
