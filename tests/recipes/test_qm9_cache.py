"""The file of molecules: built once, whole or not at all, and refused when it is stale or damaged."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from recipes.qm9 import cache
from recipes.qm9.assemble import assemble
from recipes.qm9.cache import cache_file, load_cache, main, prepare_cache
from recipes.qm9.source import CHECKSUMS, read_rows
from tests.support.qm9_package import ROWS, install, real_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path, monkeypatch):
    return install(monkeypatch, tmp_path / "site", real_rows())


def prepare(folder) -> str:
    """What is shown."""
    shown = io.StringIO()
    assert prepare_cache(folder, Console(file=shown, width=100)) == cache_file(folder)
    return shown.getvalue()


def assert_whole(folder):
    assert_same(load_cache(folder), assemble(read_rows(ROWS)))


def assert_same(molecules, expected):
    for name, array in expected.arrays().items():
        assert np.array_equal(molecules.arrays()[name], array), name


def test_it_is_built_once_and_needs_its_source_no_more(tmp_path, package, monkeypatch):
    assert "18/18" in prepare(tmp_path)
    assert_whole(tmp_path)
    built = cache_file(tmp_path).stat()
    monkeypatch.setitem(sys.modules, "qm9pack", None)
    monkeypatch.setitem(sys.modules, "rdkit", None)
    assert prepare(tmp_path) == ""
    assert cache_file(tmp_path).stat().st_mtime_ns == built.st_mtime_ns
    assert_whole(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["molecules.npz"]


def test_its_folder_is_the_one_for_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "lightning_cost" / "qm9" / "molecules.npz"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == Path.home() / ".cache" / "lightning_cost" / "qm9" / "molecules.npz"
    assert cache_file(str(tmp_path)) == tmp_path / "molecules.npz"


@pytest.mark.parametrize("what", ["schema", "source"])
def test_a_stale_file_is_refused_or_built_anew_with_a_note(tmp_path, package, monkeypatch, what):
    with monkeypatch.context() as older:
        if what == "schema":
            older.setattr(cache, "_SCHEMA", 0)
        else:
            # Its origin alone differs, as after a newer version of the package.
            older.setattr(cache, "_origin", lambda: ["schema 1", *("0" * 64 for _ in CHECKSUMS)])
        prepare(tmp_path)
    with pytest.raises(ValueError, match=r"\.npz is from another version .* python -m recipes\.qm9\.cache --cache-dir"):
        load_cache(tmp_path)
    assert "molecules.npz is from another version and is built anew" in prepare(tmp_path).replace("\n", "")
    assert_whole(tmp_path)


def test_it_is_asked_for_before_it_is_built(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Build it: python -m recipes\.qm9\.cache --cache-dir"):
        load_cache(tmp_path)


def test_a_damaged_file_never_gives_other_molecules(tmp_path, package):
    prepare(tmp_path)
    path = cache_file(tmp_path)
    whole = path.read_bytes()
    expected = assemble(read_rows(ROWS))
    damaged = [whole[:length] for length in (0, 3, len(whole) // 2, len(whole) - 1)]
    damaged += [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in range(0, len(whole), 41)]
    messages = []
    for content in damaged:
        path.write_bytes(content)
        try:
            assert_same(load_cache(tmp_path), expected)
        except ValueError as error:
            messages.append(str(error))
    # The others differ in fields of the archive that nobody reads, such as dates.
    assert len(messages) > 0.8 * len(damaged)
    for message in messages:
        assert message.startswith(f"{path} is damaged: ")
        assert message.endswith(f"Delete it, and it is built anew: rm {path}")
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="is damaged"):
        prepare(tmp_path)


BUILD = """
import os, sys
import recipes.qm9.cache as cache
from recipes.qm9.source import CHECKSUMS

folder, site, *checksums = sys.argv[1:]
sys.path.insert(0, site)
CHECKSUMS.update(zip(CHECKSUMS, checksums))

def wait(handle):
    # All is written, and not yet under its name.
    print(os.fstat(handle).st_size, flush=True)
    sys.stdin.read()

os.fsync = wait
cache.prepare_cache(folder, cache.Console(quiet=True))
"""


@pytest.mark.parametrize("older", [False, True])
def test_a_killed_build_leaves_what_was_there(tmp_path, package, monkeypatch, older):
    folder = tmp_path / "cache"
    path = cache_file(folder)
    if older:
        with monkeypatch.context() as before:
            before.setattr(cache, "_SCHEMA", 0)
            prepare(folder)
    before = path.read_bytes() if older else None
    with subprocess.Popen(
        [sys.executable, "-c", BUILD, folder, tmp_path / "site", *CHECKSUMS.values()],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as build:
        assert int(build.stdout.readline()) > 1000
        build.send_signal(signal.SIGKILL)
    assert build.returncode == -signal.SIGKILL
    assert (path.read_bytes() if path.exists() else None) == before
    prepare(folder)
    assert_whole(folder)


def test_a_build_that_fails_leaves_nothing(tmp_path, package, monkeypatch):
    def full(handle):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        prepare(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_command_builds_and_says_where(tmp_path, package, capsys):
    assert main(["--cache-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'molecules.npz'}: 18 molecules" in shown
    assert_whole(tmp_path)


def test_the_command_says_what_is_wrong(tmp_path, package, capsys):
    (package / "qm9_part1.csv").write_text("Index\n")
    assert main(["--cache-dir", str(tmp_path)]) == 1
    assert "is not the file of qm9pack 1.0.3" in capsys.readouterr().out
    assert not cache_file(tmp_path).exists()


@pytest.mark.parametrize("absent", ["qm9pack", "rdkit"])
def test_packages_are_asked_for_where_they_are_absent(tmp_path, monkeypatch, capsys, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    for module in ("assemble", "bonds"):
        monkeypatch.delitem(sys.modules, f"recipes.qm9.{module}", raising=False)
    assert main(["--cache-dir", str(tmp_path)]) == 1
    assert 'not installed: pip install "qm9pack==1.0.3" "rdkit' in capsys.readouterr().out
