"""QM9: 130,831 small molecules and properties computed from first principles."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor

from recipes.common.loader import BatchLoader, BatchSampler
from recipes.qm9.cache import load_cache, prepare_cache
from recipes.qm9.geometric import load_processed
from recipes.qm9.molecules import MoleculeTensors
from recipes.qm9.targets import BENCHMARK, TARGETS, chosen_targets

__all__ = ["QM9DataModule"]

Split = Literal["test", "val", "train"]


class QM9DataModule(L.LightningDataModule):
    """Molecules of QM9 with some of their targets; see `MoleculeTensors.batch` for the contents of a batch.

    The molecules are split in a random order: the first `num_test` are for testing, the next `num_val` for validation,
    and the rest, up to `num_molecules`, for training.

    Args:
        root: Folder that `torch_geometric.datasets.QM9` has processed; torch_geometric must be installed. None: the
            package qm9pack, whose molecules are assembled once and kept in a file.
        targets: Names of `TARGETS`.
        batch_size: Molecules per batch and process. An incomplete last training batch is dropped.
        num_molecules: Number of molecules to use; None: all.
        num_val: Number of molecules to validate on.
        num_test: Number of molecules to test on.
        seed: Seed of the split.
        shuffle_seed: Seed of the order of the training batches. Nothing else decides the order, so runs with the same
            seed see the same batches.
        cache_dir: Folder of the file; None: `lightning_cost/qm9` in the user's folder for caches.

    Attributes:
        target_mean: Mean of each target over the training molecules, (T,) in the units of `TARGETS`; set by `setup`.
        target_std: The unbiased standard deviation, (T,).

    Raises:
        ValueError: If an argument is out of range or names an unknown target.
    """

    target_mean: Tensor
    target_std: Tensor

    def __init__(
        self,
        root: str | Path | None = None,
        targets: Sequence[str] = BENCHMARK,
        batch_size: int = 120,
        num_molecules: int | None = None,
        num_val: int = 10_000,
        num_test: int = 10_000,
        seed: int = 0,
        shuffle_seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        # Checkpoints keep the arguments, but PyTorch loads no paths from them.
        root, cache_dir = (folder if folder is None else os.fspath(folder) for folder in (root, cache_dir))
        targets = list(targets)
        self.save_hyperparameters()
        for name, minimum in {"batch_size": 1, "num_val": 1, "num_test": 1, "seed": 0, "shuffle_seed": 0}.items():
            if self.hparams[name] < minimum:
                raise ValueError(f"{name}={self.hparams[name]} must be at least {minimum}.")
        chosen_targets(targets)
        self.root, self.cache_dir = root, cache_dir
        self.targets, self.batch_size, self.seed, self.shuffle_seed = tuple(targets), batch_size, seed, shuffle_seed
        self.num_molecules, self.num_val, self.num_test = num_molecules, num_val, num_test
        if num_molecules is not None:
            self._check_sizes(num_molecules)
        self._rows: dict[Split, Tensor] = {}

    def prepare_data(self) -> None:
        """Build the file of molecules unless it exists; see `prepare_cache` for the errors."""
        if self.root is None:
            prepare_cache(self.cache_dir)

    def setup(self, stage: str) -> None:
        """Load and split the molecules once, the same for every stage.

        Raises:
            FileNotFoundError: If there is no file of molecules, or no processed data set in `root`.
            ModuleNotFoundError: If `root` is given and torch_geometric is not installed.
            ValueError: If there are too few molecules, or a target is constant.
        """
        if self._rows:
            return
        molecules = load_cache(self.cache_dir) if self.root is None else load_processed(self.root)
        num = len(molecules) if self.num_molecules is None else self.num_molecules
        if num > len(molecules):
            raise ValueError(f"num_molecules={num} is more than the {len(molecules)} that there are.")
        self._check_sizes(num)
        order = torch.from_numpy(np.random.default_rng(self.seed).permutation(len(molecules))[:num])
        test, val, train = order.split([self.num_test, self.num_val, num - self.num_test - self.num_val])
        columns = [list(TARGETS).index(name) for name in self.targets]
        self._molecules = MoleculeTensors(molecules, columns)
        # Sums of a hundred thousand energies need double precision.
        trained = self._molecules.targets[train].double()
        self.target_mean, self.target_std = trained.mean(0).float(), trained.std(0).float()
        for name, std in zip(self.targets, self.target_std.tolist(), strict=True):
            if not std > 0:
                raise ValueError(
                    f"The target {name!r} is the same for all {len(train)} training molecules, so there is nothing to"
                    " learn. Use more molecules, or leave it out of targets."
                )
        self._rows = {"test": test, "val": val, "train": train}

    def train_dataloader(self) -> BatchLoader:
        """Shuffled training batches."""
        return self._loader("train", self.shuffle_seed)

    def val_dataloader(self) -> BatchLoader:
        """Validation batches."""
        return self._loader("val", None)

    def test_dataloader(self) -> BatchLoader:
        """Test batches."""
        return self._loader("test", None)

    def _loader(self, split: Split, shuffle_seed: int | None) -> BatchLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        molecules, rows = self._molecules, self._rows[split]
        sampler = BatchSampler(len(rows), self.batch_size, shuffle_seed, rank, world_size)
        return BatchLoader(lambda places: molecules.batch(rows[places]), sampler)

    def _check_sizes(self, num_molecules: int) -> None:
        left = num_molecules - self.num_test - self.num_val
        # One molecule has no standard deviation.
        if left < max(2, self.batch_size):
            raise ValueError(
                f"num_test={self.num_test} and num_val={self.num_val} leave {left} of {num_molecules} molecules for"
                f" training, but one batch needs batch_size={self.batch_size}, and at least 2. Lower these numbers, or"
                " raise num_molecules."
            )
