"""The module of QM9: losses, units, statistics, precision, teleports and resume."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchjd.aggregation import UPGrad

from lightning_cost import SymmetryTeleportCallback
from recipes.qm9.model import QM9Model
from recipes.qm9.parity import ParityPlot, parity_figure
from recipes.qm9.targets import BENCHMARK, TARGETS
from tests.support.qm9_runs import NARROW, cache_home, folder, make_data, make_trainer, needs_the_extra

__all__ = ["cache_home", "folder"]  # Fixtures.

pytestmark = [pytest.mark.slow, needs_the_extra, pytest.mark.usefixtures("folder")]


def truths(loader):
    """Targets of a split, (N, T), in the units of the data."""
    return torch.cat([batch["targets"] for batch in loader])


# --------------------------------------------------------------------------------------------------------------- model


def test_losses_are_those_of_standardized_targets():
    data = make_data(targets=["mu", "homo"])
    torch.manual_seed(0)
    model = QM9Model(["mu", "homo"], **NARROW)
    make_trainer(max_steps=1, limit_val_batches=0).fit(model, data)
    trained = truths(data.train_dataloader())
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
    errors = np.abs(raw - truths(data.test_dataloader()).numpy()).mean(0) * [1000, 1, 1000]
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
    for targets in (["homo", "mu"], ["alpha", "lumo"]):
        with pytest.raises(ValueError, match=r"predicts \('mu', 'homo'\), but the data module has"):
            make_trainer().test(restored, make_data(targets=targets), verbose=False)


def test_the_data_must_have_the_targets_of_the_model():
    with pytest.raises(ValueError, match=r"predicts \('mu',\), but the data module has targets=\('homo',\)"):
        make_trainer(max_epochs=1).fit(QM9Model(["mu"], **NARROW), make_data(targets=["homo"]))


def test_targets_may_be_spelled_as_a_tuple(folder):
    trainer = make_trainer(max_epochs=1, limit_train_batches=1, logger=CSVLogger(folder))
    trainer.fit(QM9Model(("mu", "homo"), **NARROW), make_data(targets=["mu", "homo"]))
    assert trainer.global_step == 1


def test_statistics_must_come_from_somewhere():
    data = make_data(targets=["mu"])
    data.prepare_data()
    data.setup("fit")
    with pytest.raises(ValueError, match="Give the Trainer a `QM9DataModule`"):
        make_trainer(max_epochs=1).fit(QM9Model(["mu"], **NARROW), data.train_dataloader())


def test_a_training_that_diverges_says_so():
    model = QM9Model(["mu", "homo"], **NARROW)
    trainer = make_trainer()
    trainer.validate(model, make_data(targets=["mu", "homo"]), verbose=False)
    with torch.no_grad():
        model.heads["homo"].bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="val/homo_mae is inf: the training has diverged"):
        trainer.validate(model, make_data(targets=["mu", "homo"]), verbose=False)


def test_half_precision_leaves_predictions_alone():
    data = make_data(targets=["zpve"])
    model = QM9Model(["zpve"], **NARROW)
    make_trainer(max_epochs=1).fit(model, data)
    batch = next(iter(data.val_dataloader()))
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            model.backbone(*(batch[name] for name in ("elements", "bonds", "positions", "mask"))).dtype
            is torch.bfloat16
        )
        assert model.predict_step(batch).dtype is torch.float32
    make_trainer(max_epochs=1, precision="bf16-mixed").fit(model, data)
    with pytest.raises(MisconfigurationException, match="precision='bf16-true'"):
        make_trainer(max_epochs=1, precision="bf16-true").fit(QM9Model(["zpve"], **NARROW), data)


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
        # Where nothing improves, the first validation is the best: one drop after five epochs of patience. With other
        # initial weights, something may improve by chance even at this learning rate.
        torch.manual_seed(0)
        model = QM9Model(["mu"], **NARROW, schedule=schedule, lr=1e3)
        trainer.fit(model, make_data(targets=["mu"]))
        rates[schedule] = trainer.optimizers[0].param_groups[0]["lr"]
    assert rates == {"plateau": pytest.approx(700.0), "cosine": pytest.approx(0.0, abs=1e-6)}


# ------------------------------------------------------------------------------------------------------------ training


class Always:
    def __call__(self, gradients):
        return True


def test_a_teleport_resolves_conflict_on_real_molecules():
    """All eleven tasks, in the second quarter of a short training on, in a narrow network."""
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


def test_parity_is_of_all_molecules_or_none():
    trainer = make_trainer(devices=2, strategy="ddp")
    with pytest.raises(MisconfigurationException, match="there are 2"):
        ParityPlot().setup(trainer, QM9Model(["mu"], **NARROW), "test")
