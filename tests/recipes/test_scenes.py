"""Generated scenes: geometry worked by hand, and truth that agrees with itself."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes.scenes import RoomLabel, StreetLabel
from recipes.scenes.examples import Split, make_room, make_street
from recipes.scenes.geometry import Camera, Solids, cast, is_lit
from recipes.scenes.render import render
from recipes.scenes.rooms import FOCAL, draw_room
from recipes.scenes.scene import Light, Material, Part, Scene
from recipes.scenes.streets import draw_street
from recipes.scenes.textures import Pattern, accent_share

# ------------------------------------------------------------------------------------------------------------ geometry

STILL = Camera((0.0, 0.0, 0.0), yaw=0.0, pitch=0.0, focal=1.0, height=5, width=5)
GREY = Material(3, (0.5, 0.5, 0.5))


def seen(camera, *parts):
    return render(Scene(camera, parts, [Light((0.0, 1.0, 0.0), (0.5, 0.5, 0.5))], (0.5, 0.5, 0.5)))


def turned(degrees):
    """A cube of side 2 at distance 4, turned by less than 45 degrees."""
    yaw = math.radians(degrees)
    return Part(GREY, (0, 0, -4), (1, 1, 1), yaw), 4 - 1 / math.cos(yaw), [math.sin(yaw), 0, math.cos(yaw)]


@pytest.mark.parametrize(
    ("part", "depth", "normal"),
    [
        (Part(GREY, (0, 0, -4), (1, 1, 1), round=True), 3, [0, 0, 1]),
        (Part(GREY, (0, 0, -4), (2, 1, 0.5), round=True), 3.5, [0, 0, 1]),
        (Part(GREY, (0, 0, -4), (2, 1, 0.5), math.pi / 2, round=True), 2, [0, 0, 1]),
        # 0.6 below its middle, a sphere of radius 1 lies 0.2 further back, and looks up.
        (Part(GREY, (0, -0.6, -4), (1, 1, 1), round=True), 3.2, [0, 0.6, 0.8]),
        # Twice as tall it is half as steep there.
        (Part(GREY, (0, -1.2, -4), (1, 2, 1), round=True), 3.2, [0, 0.3 / 0.73**0.5, 0.8 / 0.73**0.5]),
        turned(0),
        turned(30),
        turned(-20),
        (Part(GREY, (0, 0, 0), (1, 2, 3), hollow=True), 3, [0, 0, 1]),
    ],
)
def test_what_is_straight_ahead(part, depth, normal):
    frame = seen(STILL, part)
    assert frame.depth[2, 2].item() == pytest.approx(depth, abs=1e-5)
    assert frame.normal[2, 2].tolist() == pytest.approx(normal, abs=1e-5)
    assert frame.label[2, 2] == 3


@pytest.mark.parametrize(
    ("yaw", "pitch", "centre"), [(90, 0, (-4, 0, 0)), (-90, 0, (4, 0, 0)), (0, 90, (0, 4, 0)), (180, 0, (0, 0, 4))]
)
def test_a_camera_looks_where_it_is_turned(yaw, pitch, centre):
    camera = replace(STILL, yaw=math.radians(yaw), pitch=math.radians(pitch))
    frame = seen(camera, Part(GREY, centre, (1, 1, 1), round=True))
    assert frame.depth[2, 2].item() == pytest.approx(3, abs=1e-5)
    assert frame.normal[2, 2].tolist() == pytest.approx([0, 0, 1], abs=1e-5)


def test_the_sides_of_a_room():
    six = tuple(Material(side, (0.5, 0.5, 0.5)) for side in range(6))
    camera = replace(STILL, focal=0.25, pitch=-0.1)
    frame = seen(camera, Part(six, (0, 0, 0), (1, 1, 1), hollow=True))
    # Through a wide lens: left and right wall, floor and ceiling in the outermost pixels, the far wall in the middle.
    sides = {(2, 0): (0, [1, 0, 0]), (2, 4): (1, [-1, 0, 0]), (4, 2): (2, [0, 1, 0]), (0, 2): (3, [0, -1, 0])}
    for place, (label, world) in (sides | {(2, 2): (4, [0, 0, 1])}).items():
        assert frame.label[place] == label
        in_camera = camera.axes() @ torch.tensor(world, dtype=torch.float32)
        assert frame.normal[place].tolist() == pytest.approx(in_camera.tolist(), abs=1e-6)
    # Looking down, a floor's normal leans away from the viewer's back: up, and a little towards the camera.
    assert frame.normal[4, 2].tolist() == pytest.approx([0, math.cos(0.1), math.sin(0.1)], abs=1e-6)


def crowd(count, seed):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 3, generator=generator) * 8 - 4
    half = torch.rand(count, 3, generator=generator) * 0.8 + 0.2
    yaw = torch.rand(count, generator=generator) * 6
    is_round = torch.arange(count) % 2 == 0
    return Solids(centre, half, yaw, is_round, torch.zeros(count, dtype=torch.bool))


def is_inside(points, solids):
    """By definition: (P,) points that lie in any solid."""
    x, y, z = (points[:, None] - solids.centre).unbind(-1)
    cos, sin = solids.yaw.cos(), solids.yaw.sin()
    unit = torch.stack([cos * x - sin * z, y, sin * x + cos * z], -1) / solids.half
    return torch.where(solids.round, unit.norm(dim=-1) <= 1, unit.abs().amax(-1) <= 1).any(1)


def test_the_first_hit_is_where_a_walk_along_the_ray_gets_in():
    solids = crowd(30, seed=1)
    rays = Camera((0.0, 0.0, 7.0), 0.0, 0.0, focal=0.9, height=12, width=12).rays().flatten(1)
    origin = torch.tensor([0.0, 0.0, 7.0])
    hits = cast(origin, rays, solids)
    steps = torch.arange(0, 12, 0.004)
    walked = torch.stack([is_inside(origin + steps[:, None] * ray, solids) for ray in rays.T])
    met = walked.any(1)
    assert 40 < met.sum() < len(met) - 10
    # A step may jump over what it only grazes.
    assert (met == (hits.solid >= 0)).float().mean() > 0.98
    both = met & (hits.solid >= 0)
    first = steps[walked.float().argmax(1)]
    late = (first - hits.distance)[both]
    assert ((late > -1e-3) & (late < 0.005)).float().mean() > 0.98
    assert ((hits.normal * rays.T).sum(1)[both] < 0).all()
    assert hits.normal[both].norm(dim=1) == pytest.approx(1, abs=1e-5)


def test_shadows_are_where_a_walk_to_the_light_is_blocked():
    solids = crowd(30, seed=2)
    points = torch.rand(150, 3, generator=torch.Generator().manual_seed(3)) * 10 - 5
    points = points[~is_inside(points, solids)]
    light = torch.tensor([5.0, 6.0, -5.0])
    lit = is_lit(points, light, solids)
    ways = torch.linspace(0, 1, 2000)[:, None]
    free = torch.stack([~is_inside(point + ways * (light - point), solids).any() for point in points])
    assert 10 < free.sum() < len(free) - 10
    assert (lit == free).float().mean() > 0.97
    hollow = replace(solids, round=torch.zeros(30, dtype=torch.bool), hollow=torch.ones(30, dtype=torch.bool))
    assert is_lit(points, light, hollow).all()
    assert is_lit(points[:0], light, solids).shape == (0,)


@pytest.mark.parametrize("draw", [draw_room, draw_street])
def test_leaving_out_what_is_out_of_sight_changes_nothing(draw, monkeypatch):
    scene = draw(np.random.default_rng(4), 60, 60)
    frame = render(scene)
    monkeypatch.setattr(Solids, "in_cone", lambda solids, apex, directions: torch.arange(len(solids.yaw)))
    slow = render(scene)
    assert torch.equal(frame.label, slow.label)
    for name in ("depth", "normal", "image"):
        assert torch.allclose(getattr(frame, name), getattr(slow, name), atol=1e-5)


def test_patterns():
    across = torch.tensor([0.1, 0.6, 1.1, -0.1])
    surface, cell = torch.stack([across, torch.full((4,), 0.5)]), torch.ones(4)

    def share(pattern, salt=0):
        return accent_share(torch.full((4,), pattern), surface, cell, torch.full((4,), salt))

    assert share(Pattern.PLAIN).tolist() == [0, 0, 0, 0]
    assert share(Pattern.STRIPES).tolist() == [1, 0, 1, 0]
    assert share(Pattern.CHECKS).tolist() == [0, 0, 1, 1]
    for pattern in (Pattern.PLANKS, Pattern.CLOUDS, Pattern.SPINES):
        assert ((share(pattern) >= 0) & (share(pattern) <= 1)).all()
        assert not torch.equal(share(pattern), share(pattern, salt=5))


# -------------------------------------------------------------------------------------------------- truth of the scenes


def points_of(depth, focal):
    """Camera coordinates (H, W, 3) of pixels, by the pinhole model."""
    height, width = depth.shape
    across = (np.arange(width) + 0.5 - width / 2) / (focal * width)
    up = (height / 2 - 0.5 - np.arange(height)[:, None]) / (focal * width)
    return np.stack([across * depth, up * depth, -depth], -1)


def neighbours(array):
    """Left, right, below and above of all pixels but the outermost."""
    inner = slice(1, -1)
    return array[inner, :-2], array[inner, 2:], array[2:, inner], array[:-2, inner]


def test_depth_and_normals_agree():
    room = make_room(0, Split.TRAIN, 3, 72, 96)
    depth, normal = room["depth"][..., 0], room["normal"]
    flat = depth[1:-1, 1:-1] > 0
    for near in neighbours(normal):
        flat &= (near == normal[1:-1, 1:-1]).all(-1)
    # On a plane inverse depth is linear in the pixels; over a step between parallel planes it is not.
    with np.errstate(divide="ignore", invalid="ignore"):
        left, right, below, above = neighbours(1 / depth)
    for one, other in ((left, right), (below, above)):
        flat &= np.abs((one + other) / 2 - 1 / np.maximum(depth[1:-1, 1:-1], 0.1)) < 1e-5
    assert flat.mean() > 0.6
    left, right, below, above = neighbours(points_of(depth, FOCAL))
    by_depth = np.cross(right - left, above - below)[flat]
    by_depth /= np.linalg.norm(by_depth, axis=-1, keepdims=True)
    assert np.abs(by_depth - normal[1:-1, 1:-1][flat]).max() < 0.01


def test_depth_is_in_metres():
    scene = draw_room(np.random.default_rng(5), 48, 64)
    camera = replace(scene.camera, focal=FOCAL, pitch=-0.05)
    frame = render(replace(scene, camera=camera))
    world = torch.from_numpy(points_of(frame.depth.numpy(), FOCAL)).float() @ camera.axes() + torch.tensor(
        camera.position
    )
    floor, ceiling = world[frame.label == RoomLabel.FLOOR], world[frame.label == RoomLabel.CEILING]
    assert min(len(floor), len(ceiling)) > 50
    assert floor[:, 1].abs().max() < 1e-4
    assert (ceiling[:, 1] - 2 * scene.parts[0].half[1]).abs().max() < 1e-4


def test_a_mirrored_room_has_a_mirrored_picture_and_normals_of_the_other_sign_in_x():
    def mirror(part):
        swapped = part.material
        if isinstance(swapped, tuple):
            swapped = (swapped[1], swapped[0], *swapped[2:])
        return replace(part, centre=(-part.centre[0], *part.centre[1:]), yaw=-part.yaw, material=swapped)

    scene = draw_room(np.random.default_rng(6), 48, 64)
    camera = replace(
        scene.camera, position=(-scene.camera.position[0], *scene.camera.position[1:]), yaw=-scene.camera.yaw
    )
    frame, mirrored = render(scene), render(replace(scene, camera=camera, parts=[mirror(part) for part in scene.parts]))
    same = (frame.label == mirrored.label.flip(1)) & ((frame.depth - mirrored.depth.flip(1)).abs() < 1e-3)
    assert same.float().mean() > 0.99
    difference = frame.normal * torch.tensor([-1.0, 1.0, 1.0]) - mirrored.normal.flip(1)
    assert (difference[same].abs().amax(-1) < 1e-3).float().mean() > 0.99


@pytest.mark.parametrize(
    ("make", "label", "classes"), [(make_room, "label", RoomLabel), (make_street, "label_7", StreetLabel)]
)
def test_every_class_can_be_seen(make, label, classes):
    found = np.concatenate([make(0, Split.TRAIN, index, 32, 48)[label].ravel() for index in range(16)])
    assert set(found.tolist()) == {-1, *classes}
    assert np.bincount(found[found >= 0]).max() < 0.6 * len(found)
