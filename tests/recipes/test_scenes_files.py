"""Generated data sets: files as NYUv2, CityScapes and CelebA have them, the same ones for the same seed."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CelebA

from recipes.cityscapes import CITYSCAPES
from recipes.nyuv2 import NYUV2
from recipes.scenes import write_celeba, write_cityscapes, write_nyuv2
from recipes.scenes.__main__ import main
from recipes.scenes.faces import ATTRIBUTES, BOUNDS, LANDMARKS, draw_attributes, paint_face
from recipes.scenes.rooms import CLASSES as ROOM_CLASSES
from recipes.scenes.streets import CLASSES as STREET_CLASSES

SIZE = {"height": 24, "width": 32}


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(folder, split, index):
    names = [path.name for path in (folder / split).iterdir()]
    return {name: np.load(folder / split / name / f"{index}.npy") for name in names}


# ------------------------------------------------------------------------------------------------------------- scenes


@pytest.mark.parametrize(
    ("write", "names"),
    [(write_nyuv2, {"image", "label", "depth", "normal"}), (write_cityscapes, {"image", "label_7", "depth"})],
)
def test_the_tree_and_its_arrays(write, names, tmp_path):
    folder = write(tmp_path / "new" / "data", 3, 2, **SIZE)
    numbers = {"train": 3, "val": 2}
    expected = {f"{split}/{name}/{i}.npy" for split, number in numbers.items() for name in names for i in range(number)}
    assert set(files_of(folder)) == expected | {"scenes.json"}
    seen = []
    for split, number in numbers.items():
        for arrays in (load(folder, split, index) for index in range(number)):
            image, depth = arrays["image"], arrays["depth"]
            label = arrays["label" if "label" in names else "label_7"]
            assert (image.dtype, image.shape) == (np.float32, (24, 32, 3))
            assert (label.dtype, label.shape) == (np.int64, (24, 32))
            assert (depth.dtype, depth.shape) == (np.float32, (24, 32, 1))
            assert 0 <= image.min() < image.max() <= 1
            assert image * 255 == pytest.approx(np.rint(image * 255), abs=1e-4)
            assert -1 in label
            assert 0 in depth
            seen.append(image.tobytes())
    assert len(set(seen)) == 5


def test_unknown_pixels_of_rooms(tmp_path):
    folder = write_nyuv2(tmp_path, 6, 1, height=48, width=64)
    for arrays in (load(folder, "train", index) for index in range(6)):
        label, depth, normal = arrays["label"], arrays["depth"][..., 0], arrays["normal"]
        assert (normal.dtype, normal.shape) == (np.float32, (48, 64, 3))
        known = depth > 0
        assert 0.7 < known.mean() < 0.98
        assert depth[known].min() > 0.2
        assert depth.max() < 10
        assert np.linalg.norm(normal[known], axis=-1) == pytest.approx(1, abs=1e-5)
        assert (normal[~known] == 0).all()
        assert set(np.unique(label)) <= set(range(-1, 13))
        # Unknown for reasons of their own, but along the border both are.
        border = np.ones_like(known)
        border[1:-1, 1:-1] = False
        assert not known[border].any()
        assert (label[border] == -1).all()
        assert ((label == -1) & known).any()
        assert ((label >= 0) & ~known).any()


def test_unknown_pixels_of_streets(tmp_path):
    folder = write_cityscapes(tmp_path, 6, 1, height=48, width=96)
    for arrays in (load(folder, "train", index) for index in range(6)):
        label, inverse = arrays["label_7"], arrays["depth"][..., 0]
        assert set(np.unique(label)) <= set(range(-1, 7))
        assert 0.05 < inverse.max() <= 0.4922
        assert inverse.min() == 0
        assert (inverse[label == STREET_CLASSES.index("sky")] == 0).all()
        assert (inverse[:, 0] == 0).all()
        hood = label[-2, 1:-1] == -1
        assert hood[40:56].all()
        assert (inverse[-2, 1:-1][hood] == 0).all()
        # What is known is mostly known to both.
        assert ((inverse > 0) & (label >= 0)).mean() > 0.5


@pytest.mark.parametrize("write", [write_nyuv2, write_cityscapes])
def test_an_example_depends_on_seed_split_and_number_alone(write, tmp_path):
    few = files_of(write(tmp_path / "few", 1, 1, **SIZE, seed=1))
    many = files_of(write(tmp_path / "many", 2, 3, **SIZE, seed=1))
    other = files_of(write(tmp_path / "other", 1, 1, **SIZE, seed=2))
    for name in few.keys() - {"scenes.json"}:
        assert few[name] == many[name]
        assert few[name] != other[name]
    assert few["train/image/0.npy"] != few["val/image/0.npy"]


def test_nothing_global_is_disturbed(tmp_path):
    torch.set_num_threads(2)
    before, in_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    write_nyuv2(tmp_path / "rooms", 1, 1, **SIZE)
    write_celeba(tmp_path / "faces", 1, 1, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == in_numpy).all()  # noqa: NPY002
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_the_command_line_writes_the_same_in_two_processes(tmp_path, capsys):
    expected = files_of(write_nyuv2(tmp_path / "one", 3, 2, **SIZE, seed=3))
    line = "--layout nyuv2 --num-train 3 --num-val 2 --height 24 --width 32 --seed 3 --jobs 2 --output"
    assert main([*line.split(), str(tmp_path / "two")]) == 0
    assert files_of(tmp_path / "two") == expected
    assert str(tmp_path / "two") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layout celeba", "needs --num-test"),
        ("--layout celeba --num-test 2 --height 32", "--height does not apply"),
        ("--layout nyuv2 --num-test 2", "--num-test does not apply"),
        ("--layout cityscapes --torchvision-layout", "--torchvision-layout does not apply"),
        ("--layout nyuv2 --width 8", "at least 16"),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*options.split(), "--num-train", "1", "--num-val", "1", "--output", str(tmp_path)])
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ folders

WRITERS = {"rooms": partial(write_nyuv2, **SIZE), "faces": partial(write_celeba, num_test=1)}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_was_cut_short_is_finished(kind, tmp_path):
    write = partial(WRITERS[kind], tmp_path, num_train=2, num_val=1)
    write()
    complete = files_of(tmp_path)
    lost = [name for name in complete if name.endswith(("depth/1.npy", "000002.jpg", "list_attr_celeba.txt"))]
    assert lost
    for name in lost:
        (tmp_path / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*0.npy")}
    write()
    assert files_of(tmp_path) == complete
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*0.npy")}


def test_other_data_are_not_mixed_in(tmp_path, capsys):
    write_nyuv2(tmp_path / "rooms", 1, 1, **SIZE)
    assert json.loads((tmp_path / "rooms" / "scenes.json").read_text())["layout"] == "nyuv2"
    with pytest.raises(FileExistsError, match="seed=0 there, 5 now"):
        write_nyuv2(tmp_path / "rooms", 1, 1, **SIZE, seed=5)
    with pytest.raises(FileExistsError, match="layout='nyuv2' there, 'cityscapes' now"):
        write_cityscapes(tmp_path / "rooms", 1, 1, **SIZE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for folder in ("mine", "mine/thesis.tex"):
        with pytest.raises(FileExistsError, match="must be empty"):
            write_celeba(tmp_path / folder, 1, 1, 1)
    line = ["--layout", "nyuv2", "--num-train", "1", "--num-val", "1", "--output", str(tmp_path / "mine")]
    assert main(line) == 1
    assert "must be empty" in capsys.readouterr().out
    assert list((tmp_path / "mine").iterdir()) == [tmp_path / "mine" / "thesis.tex"]


@pytest.mark.parametrize(
    ("argument", "value"), [("num_train", 0), ("num_val", -1), ("height", 15), ("width", 0), ("seed", -1), ("jobs", 0)]
)
def test_arguments_out_of_range(argument, value, tmp_path):
    with pytest.raises(ValueError, match=f"{argument}={value} must be at least"):
        write_nyuv2(**{"folder": tmp_path / "data", "num_train": 1, "num_val": 1, argument: value})
    assert not (tmp_path / "data").exists()


# -------------------------------------------------------------------------------------------------------------- faces


PLAIN = dict.fromkeys(ATTRIBUTES, False)


class WithoutChecksums(CelebA):
    """torchvision compares the text files with checksums of the real ones."""

    file_list = ()


def face(seed, index):
    return draw_attributes(np.random.default_rng((2, seed, index)))


def test_torchvision_reads_its_layout(tmp_path):
    write_celeba(tmp_path, 4, 3, 2, seed=1, torchvision_layout=True)
    faces = iter([face(1, index) for index in range(9)])
    for split, size in {"train": 4, "valid": 3, "test": 2}.items():
        data = WithoutChecksums(tmp_path, split, target_type=["attr", "landmarks", "identity", "bbox"])
        assert len(data) == size
        # With an empty name at the end, as for the real file.
        assert tuple(data.attr_names) == (*ATTRIBUTES, "")
        for image, (attributes, landmarks, _, bounds) in (data[index] for index in range(size)):
            has = next(faces)
            assert (image.size, image.mode) == ((178, 218), "RGB")
            assert attributes.tolist() == [int(has[name]) for name in ATTRIBUTES]
            assert tuple(landmarks.tolist()) == LANDMARKS
            assert tuple(bounds.tolist()) == BOUNDS
    left, top, width, height = BOUNDS
    assert all(left < x < left + width for x in LANDMARKS[::2])
    assert all(top < y < top + height for y in LANDMARKS[1::2])


def test_landmarks_are_where_they_are_drawn():
    has = PLAIN | {"Young": True}
    image = np.asarray(paint_face(has, np.random.default_rng(0))).astype(int)
    *pupils, nose, left, right = np.reshape(LANDMARKS, (5, 2)).tolist()
    assert all(image[y, x].max() < 40 for x, y in pupils)
    assert image[nose[1], nose[0]].max() < image[nose[1] - 12, nose[0]].max() - 30
    for side, (x, y) in ((-1, left), (1, right)):
        assert image[y, x - 4 * side].max() < image[y, x + 4 * side].max() - 30


def test_the_layout_of_the_authors(tmp_path):
    write_celeba(tmp_path, 4, 3, 2, seed=1)
    images = sorted((tmp_path / "Img" / "img_align_celeba").iterdir())
    names = [f"{number:06d}.jpg" for number in range(1, 10)]
    assert [path.name for path in images] == names
    assert all(Image.open(path).format == "JPEG" for path in images)
    count, header, *rows = Path(tmp_path, "Anno", "list_attr_celeba.txt").read_text().splitlines()
    assert int(count) == 9
    assert tuple(header.split()) == ATTRIBUTES
    assert len(ATTRIBUTES) == 40
    for index, row in enumerate(rows):
        _, *values = row.split()
        assert row == names[index] + "".join(f" {value:>2}" for value in values)
        assert values == ["1" if face(1, index)[attribute] else "-1" for attribute in ATTRIBUTES]
    partition = Path(tmp_path, "Eval", "list_eval_partition.txt").read_text().split()
    assert dict(zip(partition[::2], partition[1::2], strict=True)) == dict(zip(names, "000011122", strict=True))


@pytest.mark.parametrize("name", [name for name in ATTRIBUTES if name != "No_Beard"])
def test_every_attribute_is_drawn(name):
    without, with_it = (np.asarray(paint_face(PLAIN | {name: has}, np.random.default_rng(0))) for has in (False, True))
    changed = np.abs(with_it.astype(int) - without).max(-1) > 20
    assert changed.sum() > 60
    # In one place of the picture, rather than all over it.
    assert changed.mean() < 0.5


def test_attributes_go_together():
    rng = np.random.default_rng(0)
    drawn = [draw_attributes(rng) for _ in range(600)]
    shares = {name: np.mean([has[name] for has in drawn]) for name in ATTRIBUTES}
    assert all(0.03 < share < 0.9 for share in shares.values()), shares
    for has in drawn:
        assert tuple(has) == ATTRIBUTES
        assert sum(has[name] for name in ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair", "Bald")) <= 1
        assert has["No_Beard"] == (not any(has[name] for name in ("5_o_Clock_Shadow", "Goatee", "Sideburns")))
        assert not (has["Straight_Hair"] and has["Wavy_Hair"])
        assert not (has["Chubby"] and has["Oval_Face"])


def test_classes_are_those_of_the_benchmarks():
    assert NYUV2.classes == ROOM_CLASSES
    assert CITYSCAPES.classes == STREET_CLASSES
