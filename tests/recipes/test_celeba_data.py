"""CelebA's files in either layout become the batches that they say, or an error that names what is wrong with them."""

import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from recipes.celeba.attributes import ATTRIBUTES
from recipes.celeba.data import CelebADataModule
from recipes.scenes.faces import ATTRIBUTES as SCENES_ATTRIBUTES
from recipes.scenes.writers import write_celeba

SIZES = {"train": 12, "val": 5, "test": 3}
SIZE = 16
IMAGES, ATTRIBUTE_FILE = Path("Img/img_align_celeba"), Path("Anno/list_attr_celeba.txt")
PARTITION_FILE = Path("Eval/list_eval_partition.txt")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_celeba(tmp_path_factory.mktemp("original"), *SIZES.values(), seed=0)


@pytest.fixture
def faces(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "faces"))


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def prepare(cache_dir):
    def prepare(root, **arguments):
        data = CelebADataModule(
            root, **{"batch_size": 4, "image_size": SIZE, "num_workers": 2, "cache_dir": cache_dir, **arguments}
        )
        data.prepare_data()
        data.setup("fit")
        return data

    return prepare


def loaders(data):
    return {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}


def joined(loader):
    batches = list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("image", "attributes")}


def expected(root, split):
    """What the public code of the benchmark makes of the files, by other means."""
    lines = (root / ATTRIBUTE_FILE).read_text().splitlines()[2:]
    first = sum(list(SIZES.values())[: list(SIZES).index(split)])
    transform = transforms.Compose([transforms.Resize((SIZE, SIZE)), transforms.ToTensor()])
    images, attributes = [], []
    for line in lines[first : first + SIZES[split]]:
        name, *values = line.split()
        images.append(transform(Image.open(root / IMAGES / name).convert("RGB")))
        attributes.append([max(int(value), 0) for value in values])
    return {"image": torch.stack(images), "attributes": torch.tensor(attributes).float()}


@pytest.mark.parametrize("split", ["val", "test"])
def test_batches_are_those_of_the_benchmark(prepare, faces, split):
    found, wanted = joined(loaders(prepare(faces))[split]), expected(faces, split)
    assert torch.equal(found["attributes"], wanted["attributes"])
    assert torch.equal(found["image"], wanted["image"])
    assert found["image"].dtype == torch.float32
    assert found["image"].min() >= 0
    assert 0.5 < found["image"].max() <= 1


def test_training_batches_are_a_permutation_that_the_seed_decides(prepare, faces):
    wanted = expected(faces, "train")
    orders = []
    for seed in (0, 1, 0):
        found = joined(prepare(faces, shuffle_seed=seed).train_dataloader())
        distances = (found["image"].unsqueeze(1) - wanted["image"]).abs().amax(dim=(2, 3, 4))
        rows = distances.argmin(dim=1)
        assert torch.equal(found["attributes"], wanted["attributes"][rows])
        orders.append(rows.tolist())
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(SIZES["train"]))


def test_the_layout_does_not_matter(prepare, faces, tmp_path, cache_dir):
    other = write_celeba(tmp_path / "other", *SIZES.values(), seed=0, torchvision_layout=True)
    assert (other / "celeba" / "img_align_celeba").is_dir()
    for mine, theirs in zip(loaders(prepare(faces)).values(), loaders(prepare(other)).values(), strict=True):
        for name, values in joined(mine).items():
            assert torch.equal(values, joined(theirs)[name])
    # The same images elsewhere need no second file.
    assert len(list(cache_dir.iterdir())) == 1


def test_attributes_have_their_names_in_order(original):
    assert len(set(ATTRIBUTES)) == 40
    assert (original / ATTRIBUTE_FILE).read_text().splitlines()[1].split() == list(ATTRIBUTES)
    assert SCENES_ATTRIBUTES == ATTRIBUTES


def test_processes_share_a_split(prepare, faces):
    data = prepare(faces)
    shares = []
    for rank in range(2):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shares.append(joined(data.val_dataloader())["image"])
    data.trainer = None
    whole = joined(data.val_dataloader())["image"]
    assert torch.equal(shares[0], whole[::2])
    assert torch.equal(shares[1], whole[1::2])


def test_an_interrupted_epoch_goes_on_where_it_was(prepare, faces):
    whole = list(prepare(faces).train_dataloader())
    interrupted, resumed = prepare(faces).train_dataloader(), prepare(faces).train_dataloader()
    for _ in islice(interrupted, 2):
        pass
    resumed.load_state_dict(interrupted.state_dict())
    rest = list(resumed)
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(mine["image"], theirs["image"]) for mine, theirs in zip(rest, whole[2:], strict=True))


def damage(path):
    """Other bytes, of which there are as many as before."""
    path.write_bytes(b"x" * path.stat().st_size)


def test_images_are_read_once_unless_all_are_to_be_checked(prepare, faces):
    before = joined(prepare(faces).val_dataloader())
    damage(faces / IMAGES / "000014.jpg")
    assert torch.equal(joined(prepare(faces).val_dataloader())["image"], before["image"])
    with pytest.raises(ValueError, match=r"000014\.jpg cannot be read as a JPEG image: it is another file"):
        prepare(faces, check="full")
    shutil.copy(faces / IMAGES / "000001.jpg", faces / IMAGES / "000014.jpg")
    after = joined(prepare(faces, check="full").val_dataloader())
    assert [bool((x == y).all()) for x, y in zip(before["image"], after["image"], strict=True)].count(False) == 1


def test_other_images_and_sizes_are_told_apart(prepare, faces, tmp_path, cache_dir):
    other = Path(shutil.copytree(faces, tmp_path / "other"))
    shutil.copy(faces / IMAGES / "000001.jpg", other / IMAGES / "000014.jpg")
    mine, theirs, small = (
        joined(prepare(root, image_size=size).val_dataloader())["image"]
        for root, size in ((faces, SIZE), (other, SIZE), (faces, 8))
    )
    assert [torch.equal(x, y) for x, y in zip(mine, theirs, strict=True)] == [True, False, True, True, True]
    assert small.shape[2:] == (8, 8)
    assert torch.equal(joined(prepare(faces).val_dataloader())["image"], mine)
    assert len(list(cache_dir.iterdir())) == 3


def test_the_users_folder_for_caches_is_the_default(prepare, faces, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    prepare(faces, cache_dir=None)
    assert len(list((tmp_path / "home" / "lightning_cost" / "celeba").glob("*.npy"))) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [(lambda data: data[: len(data) // 2], "image file is truncated"), (lambda _: b"GIF89a", "it is another file")],
)
def test_unreadable_images_are_named_before_training_and_nothing_stays_behind(
    prepare, faces, cache_dir, content, reason
):
    damaged = sorted((faces / IMAGES).iterdir())[2:9]
    for path in damaged:
        path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{damaged[0].name} cannot be read as a JPEG image: {reason}") as error:
        prepare(faces)
    assert "and 2 more\n7 of 20 images" in str(error.value)
    assert not list(cache_dir.iterdir())


def test_gray_images_have_three_equal_colors(prepare, faces):
    path = faces / IMAGES / "000013.jpg"
    Image.open(path).convert("L").save(path)
    image = joined(prepare(faces).val_dataloader())["image"][0]
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("ruin", [lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda p: np.save(p, [1.0])])
def test_a_damaged_cache_is_named(prepare, faces, cache_dir, ruin):
    prepare(faces)
    (path,) = cache_dir.iterdir()
    ruin(path)
    with pytest.raises(ValueError, match=f"{path} is damaged.*rm {path}"):
        prepare(faces)
    prepare(faces, check="full")


def test_what_was_not_prepared_is_not_set_up(faces, cache_dir):
    with pytest.raises(FileNotFoundError, match="prepare_data"):
        CelebADataModule(faces, cache_dir=cache_dir).setup("fit")


def test_a_full_disk_is_noticed_first(prepare, faces, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="cache_dir"):
        prepare(faces)


def edit(path, number, line):
    """Put another line in the place of one; nothing to delete it."""

    def change(root):
        lines = (root / path).read_text().splitlines()
        lines[number - 1 : number] = [] if line is None else [line(lines[number - 1])]
        (root / path).write_text("\n".join(lines) + "\n")

    return change


def to(text):
    return lambda line: text


def move_partition_to_training(root):
    text = (root / PARTITION_FILE).read_text()
    (root / PARTITION_FILE).write_text(text.replace(" 1\n", " 0\n"))


A, P = ATTRIBUTE_FILE, PARTITION_FILE
FAULTS = {
    "no root": (shutil.rmtree, FileNotFoundError, "faces' is not a folder"),
    "no images": (lambda root: shutil.rmtree(root / "Img"), FileNotFoundError, f"lacks [^;]*{IMAGES}; .*unpacked"),
    "no attributes": (lambda root: (root / A).unlink(), FileNotFoundError, f"lacks [^;]*{A};"),
    "no partition": (lambda root: (root / P).unlink(), FileNotFoundError, f"lacks [^;]*{P};"),
    "missing image": (lambda root: (root / IMAGES / "000003.jpg").unlink(), FileNotFoundError, "000003.jpg is missing"),
    "empty image": (lambda root: (root / IMAGES / "000003.jpg").write_bytes(b""), ValueError, "000003.jpg is empty"),
    "no count": (edit(A, 1, to("many")), ValueError, f"{A}, line 1: expected the number of images, got 'many'"),
    "no text": (lambda root: (root / A).write_text(""), ValueError, f"{A}, line 1: expected the number"),
    "another count": (edit(A, 1, to("21")), ValueError, f"{A}, line 1: expected 20, .* got 21"),
    "cut short": (edit(A, 22, None), ValueError, f"{A}, line 1: expected 19, .* got 20"),
    "unknown name": (
        edit(A, 2, lambda line: line.replace("Bald", "Hairless")),
        ValueError,
        f"{A}, line 2: .* got 'Hairless' as number 5 instead of 'Bald'",
    ),
    "other order": (
        edit(A, 2, lambda line: " ".join(reversed(line.split()))),
        ValueError,
        f"{A}, line 2: .* got 'Young' as number 1",
    ),
    "fewer names": (edit(A, 2, lambda line: " ".join(line.split()[:-1])), ValueError, f"{A}, line 2: .* got 39 names"),
    "fewer values": (
        edit(A, 7, lambda line: " ".join(line.split()[:-1])),
        ValueError,
        f"{A}, line 7: expected an image and 40 attributes, got 39",
    ),
    "blank line": (edit(A, 7, to("")), ValueError, f"{A}, line 7: expected an image"),
    "no sign": (
        edit(A, 8, lambda line: " ".join([*line.split()[:-1], "0"])),
        ValueError,
        f"{A}, line 8: expected 1 or -1 for Young of 000006.jpg, got '0'",
    ),
    "twice": (
        edit(A, 9, lambda line: line.replace("000007", "000004")),
        ValueError,
        f"{A}, line 9: expected each image once, but 000004.jpg is in line 6 already",
    ),
    "binary": (lambda root: (root / A).write_bytes(b"\xff\xfe\x00"), ValueError, f"{A} is not a text file"),
    "unknown split": (edit(P, 4, to("000004.jpg 3")), ValueError, f"{P}, line 4: .* got '000004.jpg 3'"),
    "no split": (edit(P, 4, to("000004.jpg")), ValueError, f"{P}, line 4: expected an image and its split"),
    "unequal": (edit(P, 4, None), ValueError, f"{A} lists 20 images and .*{P} 19"),
    "other image": (edit(P, 4, to("x.jpg 0")), ValueError, f"{P}, line 4: expected 000004.jpg, .*line 6 .* got x.jpg"),
    "empty split": (move_partition_to_training, ValueError, f"{P} has no image of split 1 \\(val\\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_are_named_before_anything_is_read(prepare, faces, cache_dir, fault):
    change, kind, message = FAULTS[fault]
    change(faces)
    with pytest.raises(kind, match=message):
        prepare(faces)
    assert not cache_dir.exists()


def test_it_must_be_clear_which_copy_is_meant(prepare, faces):
    (faces / "celeba").mkdir()
    (faces / IMAGES).rename(faces / "celeba" / "img_align_celeba")
    for path in (A, P):
        shutil.copy(faces / path, faces / "celeba")
    prepare(faces)
    (faces / IMAGES).mkdir()
    with pytest.raises(ValueError, match="twice, in the authors' layout and torchvision's layout"):
        prepare(faces)


def test_harmless_differences_are_none(prepare, faces):
    before = joined(prepare(faces).val_dataloader())
    for path in (A, P):
        (faces / path).write_bytes((faces / path).read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    (faces / IMAGES / "another.jpg").write_text("no image")
    after = joined(prepare(faces, check="full").val_dataloader())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_checkpoints_get_no_paths(faces, cache_dir):
    arguments = CelebADataModule(faces, cache_dir=cache_dir).hparams
    assert (arguments.root, arguments.cache_dir) == (str(faces), str(cache_dir))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("batch_size", 0),
        ("image_size", 7),
        ("num_workers", 0),
        ("shuffle_seed", -1),
        ("check", "some"),
    ],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value!r}"):
        CelebADataModule("faces", **{argument: value})
