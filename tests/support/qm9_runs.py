"""What the tests of the QM9 recipe run on: the first molecules of the real data."""

import importlib.util
import itertools

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from recipes.qm9 import cache
from recipes.qm9.data import QM9DataModule

SIZES = {"num_molecules": 180, "num_val": 30, "num_test": 30}
NARROW = {"width": 8, "edge_hidden": 4}

needs_the_extra = pytest.mark.skipif(
    importlib.util.find_spec("qm9pack") is None or importlib.util.find_spec("rdkit") is None,
    reason="needs the extra qm9",
)


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory):
    """A user's folder for caches, with a file of the first molecules alone."""
    from recipes.qm9.assemble import assemble
    from recipes.qm9.source import find_files, read_rows

    home = tmp_path_factory.mktemp("cache")
    molecules = assemble(itertools.islice(read_rows(find_files()[0]), 200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setattr(cache, "_build", lambda console: molecules)
        cache.prepare_cache()
    return home


@pytest.fixture
def folder(cache_home, monkeypatch, tmp_path):
    """The current folder, in which runs write."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_data(**arguments):
    return QM9DataModule(**{"batch_size": 24, **SIZES, **arguments})


def make_trainer(*callbacks, **arguments):
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return L.Trainer(
        **{**defaults, "enable_model_summary": False, "enable_checkpointing": checkpoints, **arguments},
        callbacks=list(callbacks),
    )
