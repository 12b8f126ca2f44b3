"""Studies on the image benchmarks: the problems train, and ask for their folder."""

from dataclasses import replace

import pytest
from rich.console import Console

from recipes.common.training import train_and_test
from recipes.scenes.writers import write_celeba, write_cityscapes, write_nyuv2
from recipes.study.problem import find_problem
from recipes.study.runner import run_missing
from recipes.study.spec import RunSpec, Variant
from recipes.study.store import Store

pytestmark = pytest.mark.slow

SMALL = {
    "cityscapes": "network=segnet,widths=[2, 4, 4, 4, 4],batch_size=2,num_workers=0,accelerator=cpu",
    "nyuv2": "network=segnet,widths=[2, 4, 4, 4, 4],batch_size=2,num_workers=0,accelerator=cpu",
    "celeba": "width=1,image_size=8,batch_size=8,accelerator=cpu",
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        "cityscapes": write_cityscapes(folder / "cityscapes", 4, 2, height=32, width=32),
        "nyuv2": write_nyuv2(folder / "nyuv2", 4, 2, height=32, width=32),
        "celeba": write_celeba(folder / "celeba", 16, 8, 8, seed=0),
    }


@pytest.mark.parametrize("recipe", SMALL)
def test_a_problem_trains_and_logs_the_metrics_that_it_names(recipe, roots, tmp_path):
    problem = replace(find_problem(f"{recipe}:full,root={roots[recipe]},{SMALL[recipe]}"), epochs=1, evaluations=1)
    measured = train_and_test(
        lambda: problem.make_model(problem.tasks, None),
        problem.make_data(problem.tasks, 0),
        seed=0,
        epochs=1,
        look_every=None,
        accelerator=problem.accelerator,
        callbacks=problem.make_callbacks(tmp_path),
    )
    assert set(problem.higher_is_better) <= set(measured.test)
    assert list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("recipe", SMALL)
def test_a_problem_has_the_protocol_of_the_benchmark(recipe):
    problem = find_problem(f"{recipe}:full")
    assert problem.accelerator == "auto"
    assert (problem.epochs, problem.batch_size, problem.lr) == {
        "cityscapes": (200, 8, 1e-4),
        "nyuv2": (200, 2, 1e-4),
        "celeba": (15, 256, 3e-4),
    }[recipe]


@pytest.mark.parametrize("recipe", SMALL)
def test_a_problem_without_its_folder_is_an_error(recipe, tmp_path):
    spec = RunSpec(f"{recipe}:full", Variant("LS"), seed=0, epochs=1)
    with pytest.raises(ValueError, match="--set root=DIR"):
        run_missing([spec], Store(tmp_path), 1, Console())
