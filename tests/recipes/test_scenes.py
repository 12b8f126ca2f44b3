"""Generated scenes: geometry worked by hand, and truth that agrees with itself."""

import math

import numpy as np
import pytest

from recipes.scenes.render import Camera, Look, Solid, assemble, photograph, render
from recipes.scenes.rooms import CLASSES as ROOM_CLASSES
from recipes.scenes.rooms import FOCAL, draw_room, make_room
from recipes.scenes.streets import CLASSES as STREET_CLASSES
from recipes.scenes.streets import make_street

# ------------------------------------------------------------------------------------------------------------ geometry

STILL = Camera(np.zeros(3), yaw=0.0, pitch=0.0, focal=1.0)
BOX, BALL = Look(3, ((0.5, 0.5, 0.5),)), Look(3, ((0.5, 0.5, 0.5),), round=True)


def solid(look, center, half, turn=0.0):
    return Solid(look, np.full(3, 0.5), np.array(center, float), np.array(half, float), turn)


def seen(camera, *solids, size=(5, 5)):
    return render(solids, camera, np.random.default_rng(0), size, haze=1e9)


def turned(degrees):
    """A cube of side 2 at distance 4, turned by less than 45 degrees."""
    turn = math.radians(degrees)
    return solid(BOX, (0, 0, -4), (1, 1, 1), turn), 4 - 1 / math.cos(turn), [math.sin(turn), 0, math.cos(turn)]


@pytest.mark.parametrize(
    ("thing", "depth", "normal"),
    [
        (solid(BALL, (0, 0, -4), (1, 1, 1)), 3, [0, 0, 1]),
        (solid(BALL, (0, 0, -4), (2, 1, 0.5)), 3.5, [0, 0, 1]),
        (solid(BALL, (0, 0, -4), (2, 1, 0.5), math.pi / 2), 2, [0, 0, 1]),
        # 0.6 below its middle, a sphere of radius 1 lies 0.2 further back, and looks up.
        (solid(BALL, (0, -0.6, -4), (1, 1, 1)), 3.2, [0, 0.6, 0.8]),
        # Twice as tall it is half as steep there.
        (solid(BALL, (0, -1.2, -4), (1, 2, 1)), 3.2, [0, 0.3 / 0.73**0.5, 0.8 / 0.73**0.5]),
        turned(0),
        turned(30),
        turned(-20),
    ],
)
def test_what_is_straight_ahead(thing, depth, normal):
    frame = seen(STILL, thing)
    assert frame.depth[2, 2] == pytest.approx(depth, abs=1e-5)
    assert frame.normal[2, 2] == pytest.approx(normal, abs=1e-5)
    assert frame.label[2, 2] == 3


@pytest.mark.parametrize(
    ("yaw", "pitch", "center"), [(90, 0, (-4, 0, 0)), (-90, 0, (4, 0, 0)), (0, 90, (0, 4, 0)), (180, 0, (0, 0, 4))]
)
def test_a_camera_looks_where_it_is_turned(yaw, pitch, center):
    camera = STILL._replace(yaw=math.radians(yaw), pitch=math.radians(pitch))
    frame = seen(camera, solid(BALL, center, (1, 1, 1)))
    assert frame.depth[2, 2] == pytest.approx(3, abs=1e-5)
    assert frame.normal[2, 2] == pytest.approx([0, 0, 1], abs=1e-5)


def test_normals_are_in_the_axes_of_the_camera():
    camera = STILL._replace(position=np.array([0.0, 1.0, 0.0]), pitch=-0.1)
    frame = seen(camera, solid(BOX, (0, -1, -50), (100, 1, 100)))
    # Looking down, a floor's normal leans toward the camera: up, and a little back.
    assert frame.normal[4, 2] == pytest.approx([0, math.cos(0.1), math.sin(0.1)], abs=1e-6)


def crowd(count, seed):
    rng = np.random.default_rng(seed)
    looks = [BALL, BOX] * (count // 2)
    return [solid(look, rng.uniform(-4, 4, 3), rng.uniform(0.2, 1, 3), rng.uniform(0, 6)) for look in looks]


def is_inside(points, solids):
    """By definition: (P,) points that lie in any solid."""
    inside = np.zeros(len(points), bool)
    for one in solids:
        x, y, z = (points - one.center).T
        cos, sin = math.cos(one.turn), math.sin(one.turn)
        unit = np.stack([cos * x - sin * z, y, sin * x + cos * z]) / one.half[:, None]
        inside |= np.linalg.norm(unit, axis=0, ord=2 if one.look.round else np.inf) <= 1
    return inside


def test_the_first_hit_is_where_a_walk_along_the_ray_gets_in():
    solids = crowd(30, seed=1)
    origin, focal, side = np.array([0.0, 0.0, 7.0]), 0.9, 12
    frame = seen(Camera(origin, 0.0, 0.0, focal), *solids, size=(side, side))
    rays = points_of(np.ones((side, side)), focal).reshape(-1, 3)
    steps = np.arange(0, 12, 0.004)
    walked = np.stack([is_inside(origin + steps[:, None] * ray, solids) for ray in rays])
    met, hit = walked.any(1), frame.label.ravel() == 3
    assert 40 < met.sum() < len(met) - 10
    # A step may jump over what it only grazes.
    assert (met == hit).mean() > 0.98
    both = met & hit
    late = (steps[walked.argmax(1)] - frame.depth.ravel())[both]
    assert ((late > -1e-3) & (late < 0.005)).mean() > 0.98
    normals = frame.normal.reshape(-1, 3)[both]
    assert ((normals * rays[both]).sum(1) < 0).all()
    assert np.linalg.norm(normals, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.isinf(frame.depth.ravel()[~hit]).all()


def test_patterns():
    """Rectangles around the middle of a wall's cells; stripes in cells of infinite height."""
    across = np.array([[0.1, 0.45, 0.9, -0.1], [0.1] * 4, [1] * 4])
    up = across[[1, 0, 2]]

    def is_accent(cell, points):
        look = Look(0, ((0, 0, 0),), (1, 1, 1), cell)
        return solid(look, (0, 0, 0), (1, 1, 1)).surface(points)[1][0].tolist() == [1, 0.5, 1, 1]

    assert is_accent((1, 1), across)
    assert is_accent((1, 1), up)
    assert is_accent((1, math.inf), across)
    assert not is_accent((1, math.inf), up)
    assert not is_accent(None, across)


def test_a_piece_keeps_its_parts_together():
    parts = [("box", 0, 0, 1, 2, 1, 2), ("box", 0, 1, 1, 0.5, 0.5, 0.5)]
    for seed in range(5):
        low, high = assemble(np.random.default_rng(seed), {"box": BOX}, parts, (3, -2, math.pi / 2))
        # On its place, its back to the left, and one on top of the other.
        assert low.center[0] - low.half[2] == pytest.approx(3)
        assert low.center[[1, 2]] == pytest.approx([low.half[1], -2])
        assert high.center[1] - high.half[1] == pytest.approx(2 * low.half[1])
        assert (low.color == high.color).all()


def test_a_photograph_has_8_bits():
    image = photograph(np.full((8, 8, 3), 0.999), np.random.default_rng(0))
    assert image.dtype == np.float32
    assert 0 <= image.min() < image.max() <= 1
    assert image * 255 == pytest.approx(np.rint(image * 255), abs=1e-4)


# -------------------------------------------------------------------------------------------------- truth of the scenes


def points_of(depth, focal):
    """Camera coordinates (H, W, 3) of pixels, by the pinhole model."""
    height, width = depth.shape
    across = (np.arange(width) + 0.5 - width / 2) / (focal * width)
    up = (height / 2 - 0.5 - np.arange(height)[:, None]) / (focal * width)
    return np.stack([across * depth, up * depth, -depth], -1)


def neighbors(array):
    """Left, right, below and above of all pixels but the outermost."""
    inner = slice(1, -1)
    return array[inner, :-2], array[inner, 2:], array[2:, inner], array[:-2, inner]


def test_depth_and_normals_agree():
    room = make_room(np.random.default_rng(3), 72, 96)
    depth, normal = room["depth"][..., 0].astype(np.float64), room["normal"]
    flat = depth[1:-1, 1:-1] > 0
    for near in neighbors(normal):
        flat &= (near == normal[1:-1, 1:-1]).all(-1)
    # On a plane inverse depth is linear in the pixels; over a step between parallel planes it is not.
    with np.errstate(divide="ignore", invalid="ignore"):
        left, right, below, above = neighbors(1 / depth)
    for one, other in ((left, right), (below, above)):
        flat &= np.abs((one + other) / 2 - 1 / np.maximum(depth[1:-1, 1:-1], 0.1)) < 1e-5
    assert flat.mean() > 0.6
    left, right, below, above = neighbors(points_of(depth, FOCAL))
    by_depth = np.cross(right - left, above - below)[flat]
    by_depth /= np.linalg.norm(by_depth, axis=-1, keepdims=True)
    assert np.abs(by_depth - normal[1:-1, 1:-1][flat]).max() < 0.01


def test_depth_is_in_meters():
    solids, camera = draw_room(np.random.default_rng(5))
    camera = camera._replace(yaw=0.0, pitch=0.0)
    frame = seen(camera, *solids, size=(48, 64))
    heights = points_of(frame.depth, FOCAL)[..., 1] + camera.position[1]
    floor, ceiling = (heights[frame.label == ROOM_CLASSES.index(name)] for name in ("floor", "ceiling"))
    assert min(len(floor), len(ceiling)) > 50
    assert floor == pytest.approx(0, abs=1e-6)
    (height,) = {one.center[1] - one.half[1] for one in solids if one.look.label == ROOM_CLASSES.index("ceiling")}
    assert ceiling == pytest.approx(height, abs=1e-6)
    assert 2.3 <= height <= 2.8


def test_a_mirrored_room_has_a_mirrored_picture_and_normals_of_the_other_sign_in_x():
    solids, camera = draw_room(np.random.default_rng(6))
    flip = np.array([-1.0, 1.0, 1.0])
    mirrored = [Solid(one.look, one.color, flip * one.center, one.half, -one.turn) for one in solids]
    frame = seen(camera, *solids, size=(48, 64))
    other = seen(camera._replace(position=flip * camera.position, yaw=-camera.yaw), *mirrored, size=(48, 64))
    same = (frame.label == other.label[:, ::-1]) & (np.abs(frame.depth - other.depth[:, ::-1]) < 1e-3)
    assert same.mean() > 0.99
    assert (np.abs(flip * frame.normal - other.normal[:, ::-1])[same].max(-1) < 1e-3).mean() > 0.99


@pytest.mark.parametrize(
    ("make", "label", "classes"), [(make_room, "label", ROOM_CLASSES), (make_street, "label_7", STREET_CLASSES)]
)
def test_every_class_can_be_seen(make, label, classes):
    found = np.concatenate([make(np.random.default_rng(seed), 32, 48)[label].ravel() for seed in range(16)])
    assert set(found.tolist()) == {-1, *range(len(classes))}
    assert np.bincount(found[found >= 0]).max() < 0.6 * len(found)


@pytest.mark.parametrize(("make", "label"), [(make_room, "label"), (make_street, "label_7")])
def test_classes_differ_in_color(make, label):
    """The classes explain a good part of the variance of the colors, so that there is something to learn."""
    examples = [make(np.random.default_rng(seed), 32, 48) for seed in range(16)]
    labels, images = (np.concatenate([example[name] for example in examples]) for name in (label, "image"))
    means = np.stack([images[labels == index].mean(0) for index in range(labels.max() + 1)])
    of_all = images[labels >= 0].mean(0)
    explained = ((means[labels[labels >= 0]] - of_all) ** 2).sum() / ((images[labels >= 0] - of_all) ** 2).sum()
    assert explained > 0.4
