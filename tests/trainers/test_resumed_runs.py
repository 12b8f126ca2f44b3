"""A run that was interrupted and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchjd import Stateful, aggregation, scalarization
from torchjd.aggregation import MoDoWeighting, SDMGradWeighting, UPGrad

from lightning_cost import SymmetryTeleportCallback
from lightning_cost._training.method_state import state_of
from tests.support.nets import Net, PlainNet, assert_moved, assert_same_parameters, fit, make_batches, make_trainer
from tests.support.resumed_run import ADAM, BATCHES, EPOCHS, METHODS, REMEMBERING, RUNS, SaveAfter, run
from tests.support.teleporting import StatefulBatches, assert_same, final_state, never, teleporter, without_time

pytestmark = pytest.mark.slow

# At the end of an epoch, in the middle of one, and where with 2 accumulated batches a step was just made: the
# gradients of half a window are in no checkpoint of Lightning's.
PLACES = (BATCHES, BATCHES + 2, 2 * BATCHES + 4)

Baseline = Callable[[str, str], tuple[Any, ...]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    """Each run once, with a checkpoint at each place."""
    known: dict[tuple[str, str], tuple[Any, ...]] = {}

    def get(name: str, method: str) -> tuple[Any, ...]:
        if (name, method) not in known:
            saver = SaveAfter(tmp_path_factory.mktemp("checkpoints"), PLACES)
            known[name, method] = (*run(name, method, [saver]), saver)
        return known[name, method]

    return get


def assert_equal_runs(resumed: Any, expected: Any, saved_step: int) -> None:
    for part in (0, 1):
        assert resumed[part] is not expected[part]
    assert resumed[1].global_step == expected[1].global_step
    assert_same(final_state(*resumed[:2]), final_state(*expected[:2]))
    assert_same(without_time(resumed[2].reports), without_time(expected[2].reports, traced_from=saved_step))


@pytest.mark.parametrize("place", PLACES, ids="after batch {}".format)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RUNS)
def test_resume(name: str, method: str, place: int, uninterrupted: Baseline) -> None:
    expected = uninterrupted(name, method)
    path = expected[3].path(place)
    step = torch.load(path, weights_only=True)["global_step"]
    assert any(report.accepted for report in expected[2].reports if report.step < step)
    # The resumed run goes on counting the teleports of its epoch, whose number may be limited.
    assert any(report.accepted for report in expected[2].reports[-2:])
    assert_equal_runs(run(name, method, [], ckpt_path=path), expected, step)


@pytest.mark.parametrize(
    ("method", "name", "place"),
    [
        *((method, "level set", place) for method in REMEMBERING for place in (PLACES[0], PLACES[-1])),
        *((method, "accumulation", PLACES[-1]) for method in ("DWA", "FAMO")),
    ],
)
def test_resume_of_methods_that_remember(method: str, name: str, place: int, uninterrupted: Baseline) -> None:
    expected = uninterrupted(name, method)
    path = expected[3].path(place)
    step = torch.load(path, weights_only=True)["global_step"]
    assert any(report.accepted for report in expected[2].reports)
    resumed = run(name, method, [], ckpt_path=path)
    assert_equal_runs(resumed, expected, step)
    assert_same(*(state_of(result[0].mtl_method) for result in (resumed, expected)))


def test_every_stateful_method_of_torchjd_is_resumed_or_refused() -> None:
    """What of TorchJD is stateful is resumed here, or refused."""
    refused = {MoDoWeighting, SDMGradWeighting}
    resumed = {type(part) for create in REMEMBERING.values() for part in create().modules()}
    exported = {getattr(package, name) for package in (aggregation, scalarization) for name in package.__all__}
    stateful = {kind for kind in exported if issubclass(kind, Stateful)}
    assert len(stateful) >= 13
    assert stateful <= resumed | refused


KILLED = ("level set", "penalty, sharpness", "accumulation, momentum history")


def test_resume_of_a_process_that_was_killed_after_a_teleport(tmp_path: Path, uninterrupted: Baseline) -> None:
    place = BATCHES + 2
    program = [sys.executable, "-m", "tests.support.resumed_run", str(tmp_path), str(place), *KILLED]
    root = Path(__file__).parents[2]
    subprocess.run(program, check=True, cwd=root, timeout=120, capture_output=True)
    for name in KILLED:
        path = tmp_path / name / f"after-{place}.ckpt"
        step = torch.load(path, weights_only=True)["global_step"]
        assert_equal_runs(run(name, "UPGrad", [], ckpt_path=path), uninterrupted(name, "UPGrad"), step)


@pytest.mark.parametrize("method", METHODS)
def test_resume_in_an_accumulation_window_does_what_lightning_does(method: str, tmp_path: Path) -> None:
    """It goes on with the rest of the window alone, with and without the callback."""
    place, states = BATCHES + 1, []
    saver = SaveAfter(tmp_path, {place})
    run("accumulation", method, [saver], trigger=never)
    module, trainer, _ = run("accumulation", method, [], ckpt_path=saver.path(place), trigger=never)
    states.append(final_state(module, trainer))
    plain = Net(METHODS[method]() if METHODS[method] else None)
    plain.make_optimizer = ADAM
    trainer = make_trainer(max_epochs=EPOCHS, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        trainer.fit(plain, StatefulBatches(make_batches(BATCHES)), ckpt_path=saver.path(place))
    states.append(final_state(plain, trainer))
    assert_same(*states)
    _, trainer, callback = run("accumulation", method, [], ckpt_path=saver.path(place))
    assert trainer.global_step == EPOCHS * 3
    assert any(report.accepted for report in callback.reports)
    assert all(report.drift <= 0.02 for report in callback.reports)


def test_the_checkpoint_is_plain(uninterrupted: Baseline) -> None:
    _, _, callback, saver = uninterrupted("momentum history", "UPGrad")
    checkpoint = torch.load(saver.path(BATCHES), weights_only=True)
    assert set(checkpoint["state_dict"]) == set(PlainNet().state_dict())
    PlainNet().load_state_dict(checkpoint["state_dict"])
    restored = SymmetryTeleportCallback()
    restored.load_state_dict(checkpoint["callbacks"][callback.state_key])
    assert_same(without_time(restored.reports), without_time(callback.reports[:BATCHES], traced_from=BATCHES))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("make", [(Net, PlainNet), (PlainNet, Net)], ids=["without the mixin", "with the mixin"])
def test_a_run_goes_on_with_and_without_the_mixin(make: Any, tmp_path: Path) -> None:
    """With the mean of the losses and no teleport they are the same run."""
    first, second = make
    saver = SaveAfter(tmp_path, {BATCHES + 2})

    def trained(make: Any, ckpt_path: Any = None) -> dict[str, Any]:
        module = make()
        module.make_optimizer = ADAM
        callbacks = [teleporter(trigger=never)] if make is Net else []
        trainer = make_trainer(max_epochs=EPOCHS, callbacks=[*callbacks, saver])
        trainer.fit(module, StatefulBatches(make_batches(BATCHES)), ckpt_path=ckpt_path)
        return final_state(module, trainer)

    expected = trained(first)
    assert_same(trained(second, saver.path(BATCHES + 2)), expected)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_fit_without_the_callback_goes_on_after_one_that_failed_in_it(tmp_path: Path) -> None:
    """The module remembers nothing of a step that was interrupted, at whatever step the next fit starts."""
    saver = SaveAfter(tmp_path, {BATCHES})
    reference, epochs = Net(UPGrad()), 2
    trainer = make_trainer(max_epochs=epochs, callbacks=[saver])
    trainer.fit(reference, StatefulBatches(make_batches(BATCHES)))

    def broken(gradients: Any) -> bool:
        raise RuntimeError("fault")

    module = Net(UPGrad())
    with pytest.raises(RuntimeError, match="fault"):
        fit(module, make_batches(2), callbacks=[teleporter(trigger=broken)])
    trainer = make_trainer(max_epochs=epochs)
    trainer.fit(module, StatefulBatches(make_batches(BATCHES)), ckpt_path=saver.path(BATCHES))
    assert_same(dict(module.state_dict()), dict(reference.state_dict()))


def test_counts_of_an_epoch_belong_to_their_fit() -> None:
    module, callback = Net(UPGrad()), teleporter(max_per_epoch=2)
    for _ in range(2):
        fit(module, make_batches(4), callbacks=[callback])
    assert [report.step for report in callback.reports] == [0, 1, 0, 1]


def test_a_run_that_resumes_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    nets = [Net(UPGrad()) for _ in range(3)]
    for net in nets:
        net.make_optimizer = functools.partial(torch.optim.Adam, lr=0.01)
    whole, half, resumed = nets
    fit(whole, make_batches(4), max_epochs=4)
    fit(half, make_batches(4), max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, make_batches(4), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_moved(resumed)
    assert_same_parameters(resumed, whole)
