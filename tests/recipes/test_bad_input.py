"""Bad input to the recipes' command lines and files: each kind gets an error that names it, and says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.celeba.__main__ import main as celeba
from recipes.common.cli import exit_after
from recipes.common.command import output_folder
from recipes.common.loader import BatchSampler
from recipes.common.training import Recorder
from recipes.digits.__main__ import main as digits
from recipes.digits.data import make_pairs
from recipes.digits.demo import main as demo
from recipes.nyuv2.__main__ import main as nyuv2
from recipes.qm9.__main__ import main as qm9

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LS = ["--config", str(ROOT / "recipes/digits/ls.yaml")]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_epochs=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, and with files that are none."""
    folder = tmp_path_factory.mktemp("bad")
    cli = digits(["fit", *LS, *QUIET, f"--trainer.logger.save_dir={folder}"])
    cli.trainer.save_checkpoint(folder / "digits.ckpt")
    (folder / "broken.ckpt").write_bytes((folder / "digits.ckpt").read_bytes()[:1000])
    torch.save({"weights": torch.ones(1)}, folder / "weights.ckpt")
    torch.save(torch.load(folder / "digits.ckpt", weights_only=True) | {"recipe": "QM9Model"}, folder / "qm9.ckpt")
    (folder / "file").write_text("text")
    return folder


ROWS: dict[str, tuple[Callable[[Path], Any], Any, str]] = {
    "a checkpoint that is not there": (
        lambda folder: digits(["validate", *LS, f"--ckpt_path={folder}/none.ckpt"]),
        FileNotFoundError,
        "`--ckpt_path` .*none.ckpt does not exist",
    ),
    "a damaged checkpoint": (
        lambda folder: digits(["validate", *LS, f"--ckpt_path={folder}/broken.ckpt"]),
        ValueError,
        "`--ckpt_path` .*broken.ckpt cannot be read as a checkpoint",
    ),
    "a text as a checkpoint": (
        lambda folder: digits(["fit", *LS, f"--ckpt_path={folder}/file"]),
        ValueError,
        "`--ckpt_path` .*file cannot be read as a checkpoint",
    ),
    "weights as a checkpoint": (
        lambda folder: digits(["test", *LS, f"--ckpt_path={folder}/weights.ckpt"]),
        ValueError,
        "weights.ckpt is no checkpoint of Lightning",
    ),
    "a checkpoint of another recipe": (
        lambda folder: digits(["validate", *LS, f"--ckpt_path={folder}/qm9.ckpt"]),
        ValueError,
        "qm9.ckpt is a checkpoint of QM9Model, but this recipe trains DigitsModel",
    ),
    "a checkpoint in another recipe": (
        lambda folder: qm9(["validate", f"--config={ROOT}/recipes/qm9/ls.yaml", f"--ckpt_path={folder}/digits.ckpt"]),
        ValueError,
        "digits.ckpt is a checkpoint of DigitsModel, but this recipe trains QM9Model",
    ),
    "an option that contradicts the checkpoint": (
        lambda folder: digits(["validate", *LS, f"--ckpt_path={folder}/digits.ckpt", "--model.width=8"]),
        ValueError,
        "`--model.width=8` contradicts `--ckpt_path` .*digits.ckpt, whose model has width=16",
    ),
    "a root that is not there (NYUv2)": (
        lambda folder: nyuv2(
            [
                "fit",
                f"--config={ROOT}/recipes/nyuv2/ls.yaml",
                f"--data.root={folder}/none",
                *QUIET,
                "--trainer.logger=false",
            ]
        ),
        (FileNotFoundError, ValueError),
        "none",
    ),
    "a root that is not there (CelebA)": (
        lambda folder: celeba(
            [
                "fit",
                f"--config={ROOT}/recipes/celeba/ls.yaml",
                f"--data.root={folder}/none",
                *QUIET,
                "--trainer.logger=false",
            ]
        ),
        (FileNotFoundError, ValueError),
        "none",
    ),
    "an unknown task": (lambda folder: make_pairs("train", 2, tasks=["lef"]), ValueError, "lef"),
    "no task": (lambda folder: make_pairs("train", 2, tasks=[]), ValueError, "task"),
    "a batch size of 0": (lambda folder: BatchSampler(4, 0), ValueError, "batch_size=0 must be at least 1"),
    "a negative seed": (lambda folder: BatchSampler(4, 2, -1), ValueError, "shuffle_seed=-1 must be at least 0"),
    "more per batch than there is": (lambda folder: BatchSampler(4, 8, 0), ValueError, "batch_size=8 leaves no batch"),
    "a recorder that never looks": (lambda folder: Recorder(0), ValueError, "every=0 must be at least 1"),
    "a loader of another shuffle": (
        lambda folder: BatchSampler(4, 2, 1).load_state_dict({**BatchSampler(4, 2, 0).state_dict(), "served": 1}),
        ValueError,
        "middle of an epoch of other batches.*shuffle_seed",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ROWS.values(), ids=ROWS)
def test_bad_input_is_named(call: Callable[[Path], Any], error: Any, message: str, folder: Path) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        call(folder)


def test_the_options_of_a_checkpoint_may_be_given_again(folder: Path) -> None:
    digits(["validate", *LS, *QUIET, f"--ckpt_path={folder}/digits.ckpt", "--model.width=16"])


def test_only_fit_writes_a_log(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for subcommand in ("validate", "test"):
        digits([subcommand, *LS, *QUIET, f"--ckpt_path={folder}/digits.ckpt"])
    assert not list(tmp_path.iterdir())


def test_cost_on_top_of_a_configuration_has_a_folder_of_its_own(tmp_path: Path) -> None:
    layer = ["--config", str(ROOT / "recipes/methods/with_cost.yaml")]
    cli = digits(["fit", *LS, *layer, *QUIET, f"--trainer.logger.save_dir={tmp_path}"])
    assert cli.trainer.logger.name == "digits/ls_cost"


def test_an_output_that_is_a_file_is_refused_before_any_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    with pytest.raises(SystemExit):
        demo(["--output", str(folder / "file" / "below")])
    assert "argument --output:" in capsys.readouterr().err
    assert time.monotonic() - began < 5
    assert output_folder(str(folder / "new")) == folder / "new"


def test_the_cause_of_an_error_stands_alone(folder: Path) -> None:
    command = [sys.executable, "-m", "recipes.digits", "validate", *LS, f"--ckpt_path={folder}/none.ckpt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    assert finished.stderr.strip().splitlines()[-2].startswith("FileNotFoundError: `--ckpt_path`")


def test_an_error_that_nobody_expects_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise KeyError(101)

    with pytest.raises(KeyError):
        exit_after(fails)
    monkeypatch.setenv("RECIPES_TRACEBACK", "1")
    with pytest.raises(ValueError, match="wrong"):
        exit_after(lambda: (_ for _ in ()).throw(ValueError("wrong")))


@pytest.mark.filterwarnings("error:.*loftq_config")
def test_the_configuration_of_the_paper_gives_no_warning_of_its_adapter(tmp_path: Path) -> None:
    paper = ["--config", str(ROOT / "recipes/digits/paper.yaml")]
    digits(["fit", *paper, *QUIET, f"--trainer.logger.save_dir={tmp_path}"])
