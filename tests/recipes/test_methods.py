"""Every method of the paper's tables, from its configuration and from the registry."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torchjd.scalarization import Scalarizer

from lightning_cost import SymmetryTeleportCallback
from recipes.common.cli import _log_name
from recipes.digits import DigitsDataModule, DigitsModel
from recipes.digits.__main__ import DigitsCLI, main
from recipes.methods import METHODS, IMTLLossScales, PublicFairGrad, make_method

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
# Beside the registry: they are more than an `mtl_method`, or a variant of one.
EXTRA = {
    RECIPES / "methods" / f"{name}.yaml"
    for name in ("fairgrad_public", "imtl", "with_paper_cost", "with_deferred_cost")
}
WITH_COST = RECIPES / "methods" / "with_cost.yaml"

# For two tasks.
EXPECTED = {
    "LS": "None",
    "SI": "ScaleInvariant()",
    "RLW": "Random()",
    "DWA": "DWA(temperature=2.0)",
    "UW": "UW(shape=(2,))",
    "MGDA": "MGDA(epsilon=0.001, max_iters=100)",
    "GradDrop": "GradDrop(f=<function _identity>, leak=None)",
    "PCGrad": "PCGrad()",
    "CAGrad": "CAGrad(c=0.4, norm_eps=0.0001)",
    "IMTL-G": "IMTLG()",
    "Nash-MTL": "NashMTL(n_tasks=2, max_norm=1.0, update_weights_every=1, optim_niter=20)",
    "FAMO": "FAMO(shape=(2,), lr=0.025, weight_decay=0.001)",
    "FairGrad": "FairGrad(alpha=2.0, max_iters=None)",
    "UPGrad": "UPGrad(pref_vector=None, projector=QuadprogProjector(norm_eps=0.0001, reg_eps=0.0001))",
    "Aligned-MTL": "AlignedMTL(pref_vector=None, scale_mode='min')",
}


def described(method):
    text = repr(method)
    address = f" at {id(method.f):#x}" if hasattr(method, "f") else ""
    return text.replace(address, "")


def teleports(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, SymmetryTeleportCallback)]


# Two epochs of one batch each.
SHORT = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=0",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.num_train=64",
    "--data.num_val=1",
    "--data.num_test=1",
]


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Train from layers of configurations: by the subcommand `fit`, or faster with neither it nor the saved file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["digits"])

    def fit(*layers, options=(), subcommand=False):
        arguments = [*(f"--config={layer}" for layer in layers), *SHORT, *options]
        if subcommand:
            cli = main(["fit", *arguments])
            assert (tmp_path / "config.yaml").is_file()
        else:
            cli = DigitsCLI(
                DigitsModel,
                DigitsDataModule,
                args=arguments,
                run=False,
                save_config_callback=None,
                auto_configure_optimizers=False,
            )
            cli.trainer.fit(cli.model, cli.datamodule)
        assert cli.trainer.global_step == 2
        return cli

    return fit


BASE = RECIPES / "digits" / "ls.yaml"


def test_the_registry_names_every_configuration():
    assert list(METHODS) == list(EXPECTED)
    assert {*METHODS.values(), *EXTRA, WITH_COST} == set((RECIPES / "methods").glob("*.yaml"))


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_trains_and_gives_the_method_of_the_registry(fit, name):
    cli = fit(BASE, METHODS[name], subcommand=True)
    assert described(cli.model.mtl_method) == described(make_method(name, num_tasks=2)) == EXPECTED[name]
    assert teleports(cli.trainer) == []
    # The layer changes nothing else of the base.
    assert (cli.model.hparams.width, cli.model.loss_weights) == (16, {"left": 1.0, "right": 0.03})


@pytest.mark.parametrize("name", METHODS)
def test_another_layer_adds_the_callback(fit, name):
    cli = fit(BASE, METHODS[name], WITH_COST)
    assert described(cli.model.mtl_method) == EXPECTED[name]
    assert list(map(repr, teleports(cli.trainer))) == [repr(SymmetryTeleportCallback())]


def test_the_callback_joins_those_of_the_base(fit, tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback}]}\n")
    cli = fit(BASE, base, WITH_COST)
    assert any(isinstance(callback, LambdaCallback) for callback in cli.trainer.callbacks)
    assert len(teleports(cli.trainer)) == 1


@pytest.mark.parametrize("name", ["LS", "CAGrad", "FAMO"])
def test_a_layer_replaces_the_method_of_the_base(fit, name):
    cli = fit(RECIPES / "digits" / "fairgrad.yaml", METHODS[name])
    assert described(cli.model.mtl_method) == EXPECTED[name]


@pytest.mark.parametrize(("name", "argument"), [("UW", "shape"), ("FAMO", "shape"), ("Nash-MTL", "n_tasks")])
def test_the_command_line_gives_the_number_of_tasks(fit, name, argument):
    options = [
        "--model.tasks=[left, right, larger]",
        "--model.loss_weights=null",
        f"--model.mtl_method.init_args.{argument}=3",
    ]
    cli = fit(BASE, METHODS[name], options=options)
    assert repr(cli.model.mtl_method) == repr(make_method(name, num_tasks=3)) != EXPECTED[name]


def always(gradients):
    return True


@pytest.mark.parametrize("num_tasks", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_the_registry_trains_with_a_teleport_at_each_step(tmp_path, name, num_tasks):
    torch.manual_seed(0)
    tasks = ("left", "right", "ink")[:num_tasks]
    model = DigitsModel(tasks, width=8, mtl_method=make_method(name, num_tasks))
    before = {name: value.clone() for name, value in model.named_parameters() if not name.startswith("mtl_method")}
    callback = SymmetryTeleportCallback(trigger=always, start_epoch=0)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, DigitsDataModule(16, tasks=tasks, num_train=32, num_val=1, num_test=1))
    assert [report.step for report in callback.reports] == list(range(4))
    assert any(report.accepted for report in callback.reports)
    for parameter, value in model.named_parameters():
        assert value.isfinite().all()
        assert parameter.startswith("mtl_method") or not torch.equal(value, before[parameter])


@pytest.mark.parametrize("name", METHODS)
def test_every_call_makes_a_fresh_method(name):
    first, second = make_method(name, 2), make_method(name, 2)
    assert first is None or first is not second


def test_the_scalarizers_are_those_that_need_no_task_gradients():
    scalarizers = {name for name in METHODS if isinstance(make_method(name, 2), Scalarizer)}
    assert scalarizers == {"SI", "RLW", "DWA", "UW", "FAMO"}


def test_an_unknown_name_is_answered_with_all_names():
    with pytest.raises(ValueError, match="no method 'PCgrad'") as error:
        make_method("PCgrad", 2)
    assert all(name in str(error.value) for name in METHODS)


@pytest.mark.parametrize(("name", "extra"), [("CAGrad", "cagrad"), ("Nash-MTL", "nash_mtl"), ("FairGrad", "fairgrad")])
def test_a_missing_package_is_named(name, extra, monkeypatch):
    monkeypatch.setattr("torchjd._mixins.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"torchjd\[{extra}\]"):
        make_method(name, 2)


def test_fairgrad_of_the_public_code_by_hand():
    # With orthogonal gradients, FairGrad with alpha = 2 solves w_i |g_i|^2 = w_i^(-1/2), so w_i = |g_i|^(-4/3).
    matrix = torch.diag(torch.tensor([0.1, 0.02], dtype=torch.double))
    weights = torch.tensor([0.1, 0.02], dtype=torch.double) ** (-4 / 3)
    expected = 2 * weights @ matrix
    assert expected.norm() > 1
    torch.testing.assert_close(PublicFairGrad()(matrix), expected / expected.norm(), rtol=1e-3, atol=0)
    # Within the norm there is no clipping.
    torch.testing.assert_close(PublicFairGrad(max_norm=100.0)(matrix), expected, rtol=1e-3, atol=0)


def test_fairgrad_of_the_public_code_clips_the_shared_parameters_only(fit):
    cli = fit(BASE, RECIPES / "methods" / "fairgrad_public.yaml", subcommand=True)
    assert repr(cli.model.mtl_method) == "PublicFairGrad(alpha=2.0, max_norm=1.0)"
    shared = set(cli.model.backbone.parameters())
    assert torch.cat([p.grad.flatten() for p in shared]).norm() <= 1.0001
    with pytest.raises(ValueError, match="max_norm"):
        PublicFairGrad(max_norm=0.0)


def test_imtl_has_both_halves(fit):
    cli = fit(BASE, RECIPES / "methods" / "imtl.yaml", options=["--trainer.max_epochs=2"], subcommand=True)
    assert repr(cli.model.mtl_method) == "IMTLG()"
    # The optimizer has trained the scales, away from zero.
    assert (cli.model.loss_scales != 0).all()
    group = cli.trainer.optimizers[0].param_groups[0]["params"]
    assert any(parameter is cli.model.loss_scales for parameter in group)


def test_imtl_scales_the_losses_and_learns_the_scales_of_imtl_l():
    model = DigitsModel()
    data = DigitsDataModule(num_train=64, num_val=1, num_test=1, batch_size=64)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    unscaled = model.task_losses(batch, 0)
    IMTLLossScales(2).setup(L.Trainer(logger=False, accelerator="cpu"), model, "fit")
    with torch.no_grad():
        model.loss_scales.copy_(torch.tensor([0.5, -1.0]))
    scaled = model.task_losses(batch, 0)
    for index, (name, loss) in enumerate(unscaled.items()):
        torch.testing.assert_close(scaled[name], model.loss_scales[index].exp() * loss)
    torch.stack(list(scaled.values())).sum().backward()
    # d/ds (e^s L - s)
    expected = torch.stack([scaled[name] - 1 for name in scaled]).detach()
    torch.testing.assert_close(model.loss_scales.grad, expected)


def test_imtl_refuses_another_number_of_tasks(fit):
    with pytest.raises(ValueError, match="num_tasks=3 must be the number of tasks; got"):
        fit(BASE, RECIPES / "methods" / "imtl.yaml", options=["--trainer.callbacks.init_args.num_tasks=3"])


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([], "digits/ls"),
        (["cagrad"], "digits/cagrad"),
        (["cagrad", "with_cost"], "digits/cagrad_cost"),
        (["with_deferred_cost"], "digits/ls_deferred_cost"),
        (["nash_mtl", "with_paper_cost"], "digits/nash_mtl_paper_cost"),
    ],
)
def test_the_log_folder_follows_the_layers(layers, expected):
    paths = [BASE, *(RECIPES / "methods" / f"{layer}.yaml" for layer in layers)]
    assert _log_name("digits/ls", paths, any("cost" in layer for layer in layers)) == expected


def test_a_log_is_written_where_the_layers_say(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["digits"])
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.name=digits/ls"]
    layers = [f"--config={layer}" for layer in (BASE, METHODS["CAGrad"], WITH_COST)]
    cli = main(["fit", *layers, *SHORT, *logger])
    assert cli.trainer.logger.log_dir == str(tmp_path / "digits" / "cagrad_cost" / "version_0")


def test_the_layer_of_the_paper_has_its_settings(fit):
    cli = fit(BASE, METHODS["UPGrad"], RECIPES / "methods" / "with_paper_cost.yaml")
    assert list(map(repr, teleports(cli.trainer))) == [repr(SymmetryTeleportCallback.paper(start_epoch=50))]
    cli = fit(BASE, METHODS["UPGrad"], RECIPES / "methods" / "with_deferred_cost.yaml")
    assert list(map(repr, teleports(cli.trainer))) == [repr(SymmetryTeleportCallback(reevaluate=False))]
