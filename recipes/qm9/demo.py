"""The demo on QM9: `make qm9`, or `python -m recipes.qm9.demo`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from recipes.study import Study
from recipes.study.demo import Demo

__all__ = ["DEMO", "main"]


def _name_parity_plots(study: Study, console: Console) -> Iterator[tuple[str, Path]]:
    for spec in study.specs:
        if spec.task is None and spec.seed == study.seeds[0]:
            yield f"predicted against true values: {spec.variant}", study.folder(spec) / "parity.png"


DEMO = Demo(
    module="recipes.qm9.demo",
    description="LS and FairGrad with and without COST on 10,000 molecules of QM9",
    name="qm9",
    problems={"qm9:small": "qm9:small,tasks=[mu, homo],num_molecules=180,num_val=30,num_test=30,look_every=1"},
    quick="180 molecules",
    methods=("LS", "FairGrad"),
    conclude=_name_parity_plots,
)


def main(args: Sequence[str] | None = None) -> int:
    """Build the cache, compare methods with and without COST, and draw their predictions; see `Demo.run`."""
    return DEMO.run(args)


if __name__ == "__main__":
    raise SystemExit(main())
