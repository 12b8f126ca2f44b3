"""The order of the batches: seeded, independent of torch's generator, and the same after an interruption."""

from itertools import chain

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from recipes.common.loader import BatchLoader, BatchSampler


def epoch_of(sampler: BatchSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return [index.tolist() for index in sampler]


def flat(lists):
    return list(chain.from_iterable(lists))


def test_an_epoch_is_a_permutation_without_its_incomplete_batch():
    batches = epoch_of(BatchSampler(23, 5, shuffle_seed=0), 0)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5]
    assert len(set(flat(batches))) == 20
    assert set(flat(batches)) <= set(range(23))


def test_without_a_seed_the_order_is_stored_and_nothing_is_dropped():
    assert epoch_of(BatchSampler(7, 3), 4) == [[0, 1, 2], [3, 4, 5], [6]]


def test_seed_and_epoch_alone_decide_the_order():
    orders = [epoch_of(BatchSampler(50, 5, shuffle_seed=seed), epoch) for seed in range(3) for epoch in range(3)]
    assert len({str(order) for order in orders}) == len(orders)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert epoch_of(BatchSampler(50, 5, shuffle_seed=2), 1) == orders[7]
    assert torch.equal(torch.get_rng_state(), state)


def test_passes_over_the_same_epoch_are_equal():
    sampler = BatchSampler(50, 5, shuffle_seed=0)
    next(iter(sampler))
    assert [index.tolist() for index in sampler] == [index.tolist() for index in sampler]


@pytest.mark.parametrize("seed", [None, 0])
def test_processes_share_the_examples(seed):
    shards = [epoch_of(BatchSampler(24, 4, seed, rank, 3), 1) for rank in range(3)]
    assert sorted(flat(flat(shards))) == list(range(24))


def test_processes_train_on_equally_many_batches():
    assert {len(epoch_of(BatchSampler(25, 4, 0, rank, 3), 0)) for rank in range(3)} == {2}
    assert [len(BatchSampler(25, 4, None, rank, 3)) for rank in range(3)] == [3, 2, 2]


@pytest.mark.parametrize("served", [0, 1, 3, 4])
def test_a_restored_sampler_goes_on_where_the_saved_one_was(served):
    saved = BatchSampler(20, 5, shuffle_seed=3)
    saved.set_epoch(6)
    iterator = iter(saved)
    for _ in range(served):
        next(iterator)
    state = saved.state_dict()
    rest = [index.tolist() for index in iterator]

    restored = BatchSampler(20, 5, shuffle_seed=3)
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    restored.set_epoch(6)
    assert [index.tolist() for index in restored] == rest
    assert [index.tolist() for index in restored] == epoch_of(saved, 6)
    assert epoch_of(restored, 7) == epoch_of(saved, 7)


@pytest.mark.parametrize("others", [(20, 4, 3), (24, 5, 3), (20, 5, 2), (40, 5, 3, 0, 2)])
def test_the_middle_of_an_epoch_of_other_batches_is_refused_and_its_end_is_not(others):
    saved = BatchSampler(20, 5, shuffle_seed=3)
    saved.set_epoch(6)
    iterator = iter(saved)
    for served in range(5):
        restored, state = BatchSampler(*others), saved.state_dict()
        if 0 < served < 4:
            with pytest.raises(ValueError, match="the middle of an epoch of other batches"):
                restored.load_state_dict(state)
        else:
            restored.load_state_dict(state)
            restored.set_epoch(6)
            assert len(list(restored)) == (0 if served else len(restored))
            assert epoch_of(restored, 7) == epoch_of(BatchSampler(*others), 7)
        next(iterator, None)


def test_the_loader_fetches_the_batches_of_the_sampler():
    tensors = {"a": torch.arange(6), "b": torch.arange(6).unsqueeze(1) * 10}
    loader = BatchLoader(lambda index: {name: tensor[index] for name, tensor in tensors.items()}, BatchSampler(6, 2, 0))
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    for batch in batches:
        assert torch.equal(batch["b"].squeeze(1), batch["a"] * 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0), "batch_size=0 must be at least 1"),
        ((10, 2, -1), "shuffle_seed=-1 must be at least 0"),
        ((10, 11, 0), "batch_size=11 leaves no batch"),
        ((10, 6, 0, 0, 2), "process 0 of 2 has 5 of 10"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchSampler(*arguments)


class Recorder(L.LightningModule):
    """Remembers the batches it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["index"].tolist())
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("limit", "step"), [(1.0, 1), (1.0, 5), (1.0, 8), (1.0, 10), (3, 2), (3, 3), (3, 7), (3, 9)])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(tmp_path, limit, step):
    def fit(checkpoint=None):
        samplers = BatchSampler(22, 4, shuffle_seed=1), BatchSampler(22, 4)
        loaders = [BatchLoader(lambda index: {"index": index}, sampler) for sampler in samplers]
        model = Recorder()
        callback = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=False)
        trainer = L.Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[] if checkpoint else [callback],
            enable_checkpointing=not checkpoint,
            limit_train_batches=limit,
        )
        trainer.fit(model, *loaders, ckpt_path=checkpoint)
        return model.seen

    whole = fit()
    assert len(whole) == 4 * (5 if limit == 1.0 else 3)
    assert len({str(batch) for batch in whole}) == len(whole)
    assert fit(str(tmp_path / f"step={step}.ckpt")) == whole[step:]
