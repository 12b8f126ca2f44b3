"""QM9 from the network to the command line, on the first molecules of the real data."""

import contextlib
import csv
import importlib.util
import io
import itertools
import math
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchjd.aggregation import CAGrad, FairGrad, NashMTL, UPGrad

from lightning_cost import SymmetryTeleportCallback
from recipes.qm9 import cache, demo
from recipes.qm9.__main__ import main
from recipes.qm9.data import QM9DataModule
from recipes.qm9.model import QM9Model
from recipes.qm9.parity import ParityPlot, parity_figure
from recipes.qm9.targets import BENCHMARK, TARGETS

if importlib.util.find_spec("qm9pack") is None or importlib.util.find_spec("rdkit") is None:
    pytest.skip("needs the extra qm9", allow_module_level=True)

CONFIGS = Path(__file__).parents[2] / "recipes" / "qm9"
METHODS = {"ls": type(None), "cagrad": CAGrad, "nash_mtl": NashMTL, "fairgrad": FairGrad, "upgrad": UPGrad}
PRESETS = {"small", "gpu_short"}
SIZES = {"num_molecules": 180, "num_val": 30, "num_test": 30}
NARROW = {"width": 8, "edge_hidden": 4}


@pytest.fixture(scope="module")
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


@pytest.fixture(autouse=True)
def _use_cache(cache_home, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.chdir(tmp_path)


def make_data(**arguments):
    return QM9DataModule(**{"batch_size": 24, **SIZES, **arguments})


def make_trainer(*callbacks, **arguments):
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return L.Trainer(
        **{**defaults, "enable_model_summary": False, "enable_checkpointing": checkpoints, **arguments},
        callbacks=list(callbacks),
    )


def truths(data, split, unit_factors=True):
    """Targets of a split in the units reported, (N, T), and predictions of nothing."""
    loader = {"val": data.val_dataloader, "test": data.test_dataloader, "train": data.train_dataloader}[split]()
    values = torch.cat([batch["targets"] for batch in loader])
    factors = torch.tensor([TARGETS[name].report_factor for name in data.targets])
    return values * factors if unit_factors else values


# --------------------------------------------------------------------------------------------------------------- model


def test_losses_are_those_of_standardized_targets():
    data = make_data(targets=["mu", "homo"])
    torch.manual_seed(0)
    model = QM9Model(["mu", "homo"], **NARROW)
    make_trainer(max_steps=1, limit_val_batches=0).fit(model, data)
    trained = truths(data, "train", unit_factors=False)
    assert len(trained) == 120
    torch.testing.assert_close(model.target_mean, trained.mean(0))
    torch.testing.assert_close(model.target_std, trained.std(0))
    batch = next(iter(data.val_dataloader()))
    standardized = (batch["targets"] - trained.mean(0)) / trained.std(0)
    losses, predictions = model.task_losses(batch, 0), model(batch)
    for column, name in enumerate(["mu", "homo"]):
        torch.testing.assert_close(losses[name], (predictions[name] - standardized[:, column]).square().mean())


def test_errors_are_reported_in_the_units_of_the_papers(tmp_path):
    data = make_data(targets=["zpve", "mu", "homo"])
    torch.manual_seed(0)
    model = QM9Model(["zpve", "mu", "homo"], **NARROW, single_task_maes={"zpve": 10.0, "mu": 0.5, "homo": 200.0})
    trainer = make_trainer(ParityPlot(tmp_path), max_epochs=1)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}

    with torch.no_grad():
        raw = torch.cat([model.predict_step(batch) for batch in data.test_dataloader()]).numpy()
    errors = np.abs(raw - truths(data, "test", unit_factors=False).numpy()).mean(0) * [1000, 1, 1000]
    found = [logged[f"test/{name}_mae"] for name in data.targets]
    np.testing.assert_allclose(found, errors, rtol=1e-4)
    np.testing.assert_allclose(logged["test/delta_m"], 100 * (errors / [10, 0.5, 200] - 1).mean(), rtol=1e-4)

    written = np.load(tmp_path / "predictions.npz")
    for name, error in zip(data.targets, errors, strict=True):
        np.testing.assert_allclose(np.abs(written[f"{name}_predicted"] - written[f"{name}_true"]).mean(), error, 1e-4)
    assert (tmp_path / "parity.png").stat().st_size > 10_000


def test_the_published_values_are_those_of_the_tables():
    published = [0.0671, 0.1814, 60.576, 53.915, 0.5027, 4.539, 58.838, 64.244, 63.852, 66.223, 0.07212]
    assert [TARGETS[name].single_task_mae for name in BENCHMARK] == published
    units = {name: TARGETS[name].report_unit for name in BENCHMARK}
    assert [name for name, unit in units.items() if unit == "meV"] == [BENCHMARK[i] for i in (2, 3, 5, 6, 7, 8, 9)]


def test_a_checkpoint_predicts_without_the_data_module():
    data, checkpoint = make_data(targets=["mu", "homo"]), ModelCheckpoint("folder", save_last=True)
    model = QM9Model(["mu", "homo"], **NARROW)
    make_trainer(checkpoint, max_epochs=1).fit(model, data)
    restored = QM9Model.load_from_checkpoint(checkpoint.last_model_path)
    batch = next(iter(data.val_dataloader()))
    torch.testing.assert_close(restored.predict_step(batch), model.predict_step(batch), rtol=0, atol=0)
    # Other molecules have other statistics, which are not those that the network was trained for.
    others = make_data(targets=["mu", "homo"], seed=5)
    make_trainer().test(restored, others, verbose=False)
    torch.testing.assert_close(restored.target_mean, model.target_mean, rtol=0, atol=0)
    assert not torch.equal(others.target_mean, model.target_mean)


def test_the_data_must_have_the_targets_of_the_model():
    with pytest.raises(ValueError, match=r"predicts \('mu',\), but the data module has targets=\('homo',\)"):
        make_trainer(max_epochs=1).fit(QM9Model(["mu"], **NARROW), make_data(targets=["homo"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["mu", "color"]}, "targets=.*'color'"),
        ({"targets": ["gap"]}, "none for 'gap'"),
        ({"targets": ["mu"], "single_task_maes": {"homo": 1.0}}, "none for 'mu'"),
        ({"targets": ["mu"], "single_task_maes": {"mu": 0.0}}, r"single_task_maes\['mu'\]=0.0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"schedule": "steps"}, "schedule='steps'"),
        ({"width": 0}, "width=0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        QM9Model(**arguments)


def test_the_learning_rate_follows_the_validation_or_the_cosine():
    rates = {}
    for schedule in ("plateau", "cosine"):
        trainer = make_trainer(max_epochs=8)
        # Where nothing improves, the first validation is the best: one drop after five epochs of patience.
        model = QM9Model(["mu"], **NARROW, schedule=schedule, lr=1e3)
        trainer.fit(model, make_data(targets=["mu"]))
        rates[schedule] = trainer.optimizers[0].param_groups[0]["lr"]
    assert rates == {"plateau": pytest.approx(700.0), "cosine": pytest.approx(0.0, abs=1e-6)}


# ------------------------------------------------------------------------------------------------------------ training


class Always:
    def __call__(self, gradients):
        return True


def test_a_teleport_resolves_conflict_on_real_molecules():
    """All eleven tasks, after some training; the network is narrow, all else is as in the benchmark."""
    L.seed_everything(0, verbose=False)
    model = QM9Model(width=16, edge_hidden=8, lr=3e-3, schedule="cosine")
    tolerance = 0.02
    callback = SymmetryTeleportCallback(start_epoch=2, tolerance=tolerance)
    make_trainer(callback, max_epochs=8, limit_val_batches=0).fit(model, make_data())
    accepted = [report for report in callback.reports if report.accepted]
    assert len(accepted) >= 5
    for report in accepted:
        for name, before in report.losses_before.items():
            assert abs(report.losses_after[name] - before) <= tolerance * before + 1e-7
        assert min(report.cosines_after.values()) > min(report.cosines_before.values())
    assert any(min(report.cosines_after.values()) >= 0 for report in accepted)


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path):
    def train(*callbacks, **arguments):
        L.seed_everything(0, verbose=False)
        model = QM9Model(["mu", "homo", "Cv"], **NARROW, mtl_method=UPGrad())
        teleport = SymmetryTeleportCallback(trigger=Always(), start_epoch=0)
        trainer = make_trainer(teleport, *callbacks, max_epochs=2, **arguments)
        return model, teleport, trainer

    data = {"targets": ["mu", "homo", "Cv"]}
    model, teleport, trainer = train()
    trainer.fit(model, make_data(**data))
    # In the middle of the second epoch, which has five batches.
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=1)
    stopped, _, trainer = train(checkpoint, max_steps=7)
    trainer.fit(stopped, make_data(**data))
    resumed, _, trainer = train()
    trainer.fit(resumed, make_data(**data), ckpt_path=checkpoint.best_model_path)
    assert trainer.global_step == 10
    assert any(report.accepted for report in teleport.reports)
    for (name, one), other in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)


# -------------------------------------------------------------------------------------------------------------- parity


def test_parity_needs_the_same_names():
    with pytest.raises(ValueError, match="names must agree"):
        parity_figure({"mu": np.zeros(3)}, {"homo": np.zeros(3)})


def test_every_target_has_a_panel_and_its_error():
    generator = np.random.default_rng(0)
    true = {name: generator.normal(size=50) for name in BENCHMARK}
    figure = parity_figure({name: values + 0.25 for name, values in true.items()}, true)
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in panels] == [f"{n}: MAE 0.25 {TARGETS[n].report_unit}" for n in BENCHMARK]


def test_parity_is_of_all_molecules_or_none(monkeypatch):
    trainer = make_trainer(devices=2, strategy="ddp")
    with pytest.raises(MisconfigurationException, match="there are 2"):
        ParityPlot().setup(trainer, QM9Model(["mu"], **NARROW), "test")


# -------------------------------------------------------------------------------------------------------- command line

SHORT = (
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=2",
    "--trainer.enable_progress_bar=false",
    "--model.width=8",
    "--model.edge_hidden=4",
    "--data.batch_size=24",
    *(f"--data.{name}={value}" for name, value in SIZES.items()),
)


def test_there_is_a_configuration_for_every_method_with_and_without_cost():
    wanted = {f"{name}{suffix}" for name in METHODS for suffix in ("", "_cost")}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == wanted | PRESETS


@pytest.mark.parametrize("suffix", ["", "_cost"])
@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_trains(name, suffix):
    cli = main(["fit", "--config", str(CONFIGS / f"{name}{suffix}.yaml"), *SHORT])
    assert cli.trainer.global_step == 4
    assert type(cli.model.mtl_method) is METHODS[name]
    callbacks = [callback for callback in cli.trainer.callbacks if isinstance(callback, SymmetryTeleportCallback)]
    assert len(callbacks) == bool(suffix)
    assert all(report.accepted for callback in callbacks for report in callback.reports[:1])
    assert math.isfinite(cli.trainer.callback_metrics["val/delta_m"])


def test_a_preset_is_laid_over_a_configuration_and_its_checkpoint_tested(tmp_path):
    layers = ["--config", str(CONFIGS / "fairgrad.yaml"), "--config", str(CONFIGS / "small.yaml")]
    cli = main(["fit", *layers, *SHORT, "--model.targets=[mu, homo]"])
    assert (cli.model.lr, cli.model.schedule) == (0.002, "plateau")
    folder = Path(cli.trainer.log_dir)
    (best,) = (path for path in folder.glob("checkpoints/*.ckpt") if path.stem != "last")
    main(["test", *layers, *SHORT, "--model.targets=[mu, homo]", "--ckpt_path", str(best)])
    (figure,) = tmp_path.rglob("parity.png")
    assert figure.parent.parent == folder.parent.resolve()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_protocol_is_that_of_the_benchmark(path):
    settings = yaml.safe_load(path.read_text())
    if path.stem in PRESETS:
        pytest.skip("a preset is another protocol")
    trainer, model = settings["trainer"], settings["model"]
    assert (trainer["max_epochs"], settings["data"]["batch_size"]) == (300, 120)
    assert (model["lr"], model["schedule"], model["width"]) == (1e-3, "plateau", 64)
    (checkpoint,) = (c["init_args"] for c in trainer["callbacks"] if c["class_path"].endswith("ModelCheckpoint"))
    assert checkpoint == {"monitor": "val/delta_m", "save_last": True}


# ---------------------------------------------------------------------------------------------------------------- demo


def test_the_demo_compares_and_draws(tmp_path):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert demo.main(["--quick", "--epochs", "2", "--jobs", "1", "--output", str(tmp_path / "out")]) == 0
    (summary,) = (tmp_path / "out").glob("*_summary.csv")
    with summary.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = [(row["method"], row["callback"]) for row in rows]
    assert found == [("LS", ""), ("LS", "COST"), ("FairGrad", ""), ("FairGrad", "COST")]
    assert len(list((tmp_path / "out").rglob("parity.png"))) == 4
    for line in printed.getvalue().splitlines():
        if ".png  " in line:
            assert Path(line.split(".png  ")[0] + ".png").stat().st_size > 0
