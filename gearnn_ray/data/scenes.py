"""Generated street scenes, a data set without a download: sky, ground, houses, greenery, cars, people, painted back to front.

Three pairs of classes have the same colour and differ only in texture, with periods of two to four pixels: road (grain) and
pavement (setts), brick (courses) and timber (boards), tree (leaves) and hedge (hatching). Which class of a pair is painted is
mostly random, so a network must see the texture, which compression, scaling and darkness remove. An image is a pure function of
seed, split, index and size, with the same bits on every machine: it uses PCG64's uniform doubles, comparisons and exactly rounded
arithmetic (+ - * / % and square roots), but no sums over arrays or transcendental functions, whose last bits differ.
"""

import functools
import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import IGNORED, Dataset
from gearnn_ray.data.objects import Objects, boxes_of, rle_of

CLASS_NAMES = ("sky", "road", "pavement", "brick", "timber", "tree", "hedge", "car", "person")
SKY, ROAD, PAVEMENT, BRICK, TIMBER, TREE, HEDGE, CAR, PERSON = range(len(CLASS_NAMES))
TWINS = ((ROAD, PAVEMENT), (BRICK, TIMBER), (TREE, HEDGE))  # these differ only in texture
THINGS = (CAR, PERSON)  # classes of objects with a box and a mask of their own: class ids 0 and 1 of a detector
VERSION = 1  # part of every digest: raise it with any change to a pixel, a label or an object
SPLITS = ("train", "val")
MAX_COUNT, MIN_SIDE, MAX_SIDE, MAX_SEED = 100_000, 48, 2048, 2**63 - 1
MAX_FRAMES = 256
PAN = 2  # pixels to the right between two frames of a scene

Plane = NDArray[np.float64]  # [H, W]
Mask = NDArray[np.bool_]  # [H, W]
Colour = NDArray[np.float64]  # [3] RGB in 8-bit levels, or one for every pixel [H, W, 3]


@dataclass(frozen=True)
class ScenesSplit:
    """A `gearnn_ray.data.dataset.Split` of generated scenes, painted at each access. Every scene is a clip of its own, of
    `frames` images: it is painted wider than they are, and the camera pans over it. count: of the images. The targets of
    detection are the cars and people, with classes from `THINGS`; one of which less than a third is visible, or fewer than 12
    pixels, is marked as a crowd.
    """

    name: str
    count: int
    height: int
    width: int
    seed: int
    task: str = "segmentation"
    frames: int = 1

    def __len__(self) -> int:
        return self.count

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"{self.name}-{i:05d}" for i in range(self.count))

    @property
    def clips(self) -> tuple[str, ...]:
        return tuple(f"{self.name}-{i // self.frames * self.frames:05d}" for i in range(self.count))

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the generator's version and parameters, which decide every pixel."""
        what = {"generator": "scenes", "version": VERSION, "split": self.name, "count": self.count}
        what |= {"height": self.height, "width": self.width, "seed": self.seed}
        what |= {} if self.task == "segmentation" else {"task": self.task}
        what |= {} if self.frames == 1 else {"frames": self.frames}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB image [H, W, 3]."""
        return self._scene(index).image[:, self._seen(index)].copy()

    def target(self, index: int) -> NDArray[np.uint8] | Objects:
        """Class ids [H, W], where lamp posts are `IGNORED`; or the objects."""
        scene, seen = self._scene(index), self._seen(index)
        if self.task == "segmentation":
            return scene.label[:, seen].copy()
        return scene.objects if self.frames == 1 else _window(scene.objects, seen)

    def _scene(self, index: int) -> "Scene":
        if not 0 <= index < self.count:
            raise IndexError(f"there is no scene {index} among the {self.count} of {self.name}")
        wide = self.width + PAN * (self.frames - 1)
        return _rendered(self.seed, SPLITS.index(self.name), index // self.frames, self.height, wide)

    def _seen(self, index: int) -> slice:
        """The columns of its scene that an image shows."""
        left = PAN * (index % self.frames)
        return slice(left, left + self.width)


def open_scenes(
    train: int = 192,
    val: int = 32,
    height: int = 96,
    width: int = 128,
    seed: int = 0,
    frames: int = 1,
    task: str = "segmentation",
) -> Dataset:
    """The generated set: `train` and `val` images of `height` × `width` pixels, `frames` of each scene. With the same size, seed
    and frames, a larger set begins with the images of a smaller one, and the images are the same for both tasks. Raises
    `UserError` for a number out of range.
    """
    for what, value, low, high in (
        ("train", train, 1, MAX_COUNT),
        ("val", val, 1, MAX_COUNT),
        ("height", height, MIN_SIDE, MAX_SIDE),
        ("width", width, MIN_SIDE, MAX_SIDE),
        ("seed", seed, 0, MAX_SEED),
        ("frames", frames, 1, MAX_FRAMES),
    ):
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"{what} of the scenes is {value!r}: expected a whole number from {low} to {high}.")
    return Dataset(
        name="scenes",
        class_names=CLASS_NAMES if task == "segmentation" else tuple(CLASS_NAMES[what] for what in THINGS),
        train=ScenesSplit("train", train, height, width, seed, task, frames),
        val=ScenesSplit("val", val, height, width, seed, task, frames),
    )


@dataclass(frozen=True, eq=False)
class Scene:
    """One scene: the RGB image uint8 [H, W, 3], its class ids uint8 [H, W] (255 = ignored), and its objects."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    objects: Objects


def render(seed: int, split: int, index: int, height: int, width: int) -> Scene:
    """Paint one scene."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, split, index])))
    painter = _Painter(rng, height, width)
    painter.sky()
    painter.ground()
    painter.far_end()
    for side in (-1, 1):
        painter.houses(side)
    painter.standing()
    return Scene(painter.exposed(), painter.label, painter.objects())


@functools.lru_cache(maxsize=4)
def _rendered(seed: int, split: int, index: int, height: int, width: int) -> Scene:
    """`render`, which frames of one scene share."""
    return render(seed, split, index, height, width)


def _window(objects: Objects, columns: slice) -> Objects:
    """The objects of which something is seen in these columns of the image."""
    masks = objects.masks()
    seen = masks[:, :, columns]
    there = seen.any((1, 2))
    pixels = seen[there].sum((1, 2))
    hidden = pixels < np.maximum(12, masks[there].sum((1, 2)) / 3)
    kept = seen[there]
    return Objects(
        boxes_of(kept), objects.labels[there], pixels.astype(np.float32), objects.crowd[there] | hidden, kept.shape[1:],
        tuple(map(rle_of, kept)),
    )  # fmt: skip


def _stripes(across: Plane, period: float) -> Plane:
    """Dark lines one pixel wide, mean 0, rms about 1."""
    dark = 1 / period
    lines: Plane = np.where(across % period < 1, dark - 1, dark) / math.sqrt(dark * (1 - dark))
    return lines


class _Painter:
    """Paints one scene. Lengths are in pixels; `unit` is one pixel at an image height of 96."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.unit = height / 96
        self.rgb = np.zeros((height, width, 3))
        self.label = np.zeros((height, width), np.uint8)
        self.thing = np.zeros((height, width), np.int32)  # number of the car or person, from 1
        self.things: list[tuple[int, int]] = []  # class, and pixels when it was painted, before others hid some of them
        self.y, self.x = np.mgrid[0:height, 0:width].astype(np.float64)
        self.horizon = height * self.between(0.40, 0.52)
        self.vanish = width * self.between(0.32, 0.68)
        # nearness of the house front at each column: 1 at the image's edge, 0 at the vanishing point
        past = self.x - self.vanish
        self.reach = np.maximum(-past / self.vanish, past / (width - self.vanish))
        # distance below the horizon at which house fronts meet the ground, at the left and right edge
        self.kerb = {side: height * self.between(0.14, 0.34) for side in (-1, 1)}
        grey = self.between(105, 140)
        self.grey = np.array([grey + self.between(-8, 8), grey, grey + self.between(-8, 8)])
        self.walls = [np.array([self.between(115, 160), self.between(100, 140), self.between(85, 135)]) for _ in range(2)]
        self.green = np.array([self.between(70, 105), self.between(105, 140), self.between(55, 85)])
        self.contrast = self.between(18, 22)  # rms of every texture, in 8-bit levels
        self.textures = self._textures()

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def chance(self, probability: float) -> bool:
        return float(self.rng.random()) < probability

    def one_of(self, options: tuple[int, ...]) -> int:
        return options[int(self.rng.random() * len(options))]

    def noise(self) -> Plane:
        """White noise, mean 0, rms 1."""
        white: Plane = (self.rng.random((self.height, self.width)) - 0.5) * math.sqrt(12)
        return white

    def grain(self) -> Plane:
        """White and coarser noise, mean 0, rms 1. JPEG leaves traces of the coarser one, which fine-tuning can use."""
        clumps = self.noise()[np.ix_(np.arange(self.height) // 2, np.arange(self.width) // 2)]
        mixed: Plane = 0.8 * self.noise() + 0.6 * clumps
        return mixed

    def _textures(self) -> dict[int, Plane]:
        """A plane per class, mean 0 and rms 1. JPEG quantises such short periods most coarsely; at half size they alias."""
        near = self.y > self.horizon + 0.45 * (self.height - self.horizon)
        # courses run to the vanishing point, but not finer than a camera would resolve
        course = (self.y - self.horizon) / np.maximum(self.reach, 0.7) + self.height
        return {
            ROAD: self.grain(),
            PAVEMENT: (self.x // np.where(near, 2, 1) + self.y) % 2 * 2 - 1,
            BRICK: _stripes(course, 2.6),
            TIMBER: _stripes(self.x, 2.6),
            TREE: self.grain(),
            HEDGE: 0.95 * _stripes(self.x + self.y, 3.0) + 0.3 * self.noise(),
        }

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> Plane:
        """A plane that is below 1 inside the ellipse."""
        across, up = (self.x - x) / rx, (self.y - y) / ry
        distance: Plane = across * across + up * up
        return distance

    def paint(self) -> Colour:
        """A wall colour of this street."""
        colour: Colour = self.walls[self.one_of((0, 1))] * self.between(0.95, 1.05)
        return colour

    def fill(self, mask: Mask, what: int, colour: Colour) -> None:
        """Paint the pixels of `mask` with a colour and the texture of a class, and label them."""
        painted = np.broadcast_to(colour, (*mask.shape, 3))[mask]
        if what in self.textures:
            painted = painted + (self.contrast * self.textures[what][mask])[:, None]
        self.rgb[mask] = painted
        self.label[mask] = what
        # a car or person is painted in several parts, one after the other
        self.thing[mask] = len(self.things) + 1 if what in THINGS else 0

    def sky(self) -> None:
        grey = self.between(145, 190)
        low = np.array([grey, grey, grey + self.between(0, 25)])
        high = low - np.array([self.between(0, 60), self.between(0, 30), 0])
        self.fill(self.y >= 0, SKY, low + (high - low) * (1 - self.y / self.horizon)[..., None])
        for _ in range(3):
            x, y = self.between(0, self.width), self.between(0, self.horizon) * 0.8
            cloud = self.ellipse(x, y, 26 * self.unit, 5 * self.unit)
            self.fill(cloud < 1, SKY, low + 18)

    def ground(self) -> None:
        """Alternating lanes of road and pavement that run to the vanishing point; a strip may cross them."""
        drop = self.y - self.horizon
        lane = np.zeros_like(self.y)
        kerbs = np.zeros(self.y.shape, np.bool_)
        for _ in range(self.one_of((1, 2, 2, 3))):
            edge = self.vanish + self.between(-2.0, 2.0) * drop
            lane += self.x > edge
            kerbs |= np.abs(self.x - edge) < 0.4 + 0.012 * drop
        if self.chance(0.6):
            top, thick = self.between(0.15, 0.7), self.between(0.15, 0.35)
            lane += np.abs(drop / (self.height - self.horizon) - top - thick / 2) < thick / 2
        if self.chance(0.5):
            lane += 1
        below = drop >= 0
        self.fill(below & (lane % 2 == 0), ROAD, self.grey)
        self.fill(below & (lane % 2 == 1), PAVEMENT, self.grey)
        self.rgb[below & kerbs] = self.grey + self.between(15, 45)

    def far_end(self) -> None:
        """The front at the far end of the street, facing the camera."""
        what = self.one_of((SKY, BRICK, TIMBER, TREE, HEDGE))
        if what == SKY:
            return
        colour = self.green if what in (TREE, HEDGE) else self.paint()
        top = self.horizon - self.between(10, 26) * self.unit
        foot = self.horizon + 0.3 * min(self.kerb.values())
        self.fill((self.reach < 0.34) & (self.y >= top) & (self.y < foot), what, colour)

    def houses(self, side: int) -> None:
        """A row of house fronts on one side of the street, then greenery along it."""
        here = (self.x - self.vanish) * side > 0
        foot = self.horizon + self.kerb[side] * self.reach
        light = self.between(0.85, 1.1)
        near, what = 1.01, self.one_of((BRICK, TIMBER))
        while near > 0.36:
            far = max(near - self.between(0.18, 0.36), 0.3)
            top = self.horizon - self.between(24, 62) * self.unit * self.reach
            front = here & (self.reach < near) & (self.reach >= far) & (self.y >= top) & (self.y < foot)
            self.fill(front, what, self.paint() * light)
            if self.chance(0.75):
                self.windows(front)
            near = far
            if self.chance(0.7):
                what = BRICK + TIMBER - what
        if self.chance(0.75):
            what = self.one_of((HEDGE, HEDGE, TREE))
            far, length = self.between(0.3, 0.6), self.between(0.3, 0.6)
            top = self.horizon - (self.between(2, 18) + self.noise()) * self.unit * self.reach
            row = here & (self.reach >= far) & (self.reach < far + length) & (self.y >= top)
            self.fill(row & (self.y < foot + 2 * self.reach), what, self.green * self.between(0.95, 1.05))

    def windows(self, front: Mask) -> None:
        width, storey = self.between(11, 16) * self.unit, self.between(15, 20) * self.unit
        up = (self.horizon - self.y) / np.maximum(self.reach, 0.3) + 0.3 * storey
        across = (self.x + self.between(0, width)) % width
        panes = front & (across < 0.36 * width) & (up % storey < 0.42 * storey)
        glass = self.between(65, 105)
        self.rgb[panes] = np.array([glass, glass + 6, glass + 14])

    def standing(self) -> None:
        """Trees, lamp posts, cars and people, the farthest first."""
        things = [self.tree] * self.one_of((2, 3)) + [self.car] * self.one_of((2, 3))
        things += [self.person] * self.one_of((2, 3, 4)) + [self.lamp] * self.one_of((0, 1))
        drops = [self.between(0.2, 0.72) * (self.height - self.horizon) + 2 * self.unit for _ in things]
        for drop, thing in sorted(zip(drops, things, strict=True), key=lambda pair: pair[0]):
            thing(drop)

    def beside(self, drop: float) -> tuple[float, float]:
        """A position (x, y) at the side of the street whose foot is `drop` below the horizon."""
        side = self.one_of((-1, 1))
        fronts = (self.vanish if side < 0 else self.width - self.vanish) / self.kerb[side]
        return self.vanish + side * drop * fronts * self.between(0.7, 1.0), self.horizon + drop

    def tree(self, drop: float) -> None:
        x, foot = self.beside(drop)
        what, green = self.one_of((TREE, TREE, HEDGE)), self.green * self.between(0.95, 1.05)
        radius, tall = drop * self.between(0.5, 0.85), drop * self.between(1.2, 2.2)
        trunk = (np.abs(self.x - x) < 0.07 * drop) & (self.y < foot) & (self.y > foot - tall)
        self.fill(trunk, what, np.array([80.0, 65.0, 50.0]))
        crown = self.ellipse(x, foot - tall, radius, radius * self.between(0.8, 1.3))
        self.fill(crown + 0.12 * self.noise() < 1, what, green)

    def lamp(self, drop: float) -> None:
        x, foot = self.beside(drop)
        post = (np.abs(self.x - x) < 0.04 * drop + 0.3) & (self.y < foot) & (self.y > foot - 2.4 * drop)
        head = self.ellipse(x, foot - 2.4 * drop, 0.2 * drop, 0.1 * drop) < 1
        self.fill(post | head, IGNORED, np.full(3, 60.0))

    def car(self, drop: float) -> None:
        side_on = self.chance(0.6)
        wide, tall = drop * (1.5 if side_on else 0.8), drop * self.between(0.6, 0.8)
        x, foot = self.between(0.05, 0.95) * self.width, self.horizon + drop
        across, up = (self.x - x) / wide, (foot - self.y) / tall
        self.rgb[self.ellipse(x, foot, 0.55 * wide, 0.15 * tall) < 1] *= 0.55
        body = np.array([self.between(60, 200) for _ in range(3)])
        cabin = np.abs(across) < (0.36 if side_on else 0.46) - 0.2 * np.maximum(up - 0.55, 0)
        self.fill((np.abs(across) < 0.5) & (up > 0.12) & (up < 0.58), CAR, body)
        self.fill(cabin & (up >= 0.58) & (up < 1), CAR, body * 0.9)
        self.rgb[cabin & (up >= 0.62) & (up < 0.92) & (np.abs(np.abs(across) - 0.16) < 0.13)] = 60.0
        for wheel in (-0.3, 0.3) if side_on else (-0.36, 0.36):
            rim = self.ellipse(x + wheel * wide, foot - 0.16 * tall, 0.17 * tall, 0.17 * tall)
            self.fill(rim < 1, CAR, np.full(3, 45.0))
        self.is_painted(CAR)

    def person(self, drop: float) -> None:
        x, foot = self.between(0.03, 0.97) * self.width, self.horizon + drop
        tall = drop * self.between(0.85, 1.05)
        across, up = (self.x - x) / tall, (foot - self.y) / tall
        clothes = [np.array([self.between(50, 200) for _ in range(3)]) for _ in range(2)]
        legs = (up >= 0) & (up < 0.48) & (np.abs(across) < 0.14) & (np.abs(across) > 0.05 - 0.1 * up)
        coat = (up >= 0.42) & (up < 0.82) & (np.abs(across) < 0.2 - 0.1 * np.abs(up - 0.6))
        head = self.ellipse(x, foot - 0.9 * tall, 0.085 * tall, 0.1 * tall) < 1
        self.fill(legs, PERSON, clothes[0] * 0.6)
        self.fill(coat, PERSON, clothes[1])
        self.fill(head, PERSON, np.array([185.0, 140.0, 115.0]))
        self.is_painted(PERSON)

    def is_painted(self, what: int) -> None:
        """The parts painted since the last car or person are one of its own."""
        self.things.append((what, int((self.thing == len(self.things) + 1).sum())))

    def objects(self) -> Objects:
        """The cars and people of which something is visible."""
        visible = np.bincount(self.thing.reshape(-1), minlength=len(self.things) + 1)[1:]
        seen = [number for number, pixels in enumerate(visible) if pixels]
        masks = [self.thing == number + 1 for number in seen]
        labels = np.array([THINGS.index(self.things[number][0]) for number in seen], np.int64)
        hidden = [visible[number] < max(12, self.things[number][1] / 3) for number in seen]
        areas, crowd = visible[seen].astype(np.float32), np.array(hidden, np.bool_)
        return Objects(boxes_of(masks), labels, areas, crowd, self.label.shape, tuple(map(rle_of, masks)))

    def exposed(self) -> NDArray[np.uint8]:
        """The image in this scene's light, with a little camera noise."""
        slope = self.between(-0.12, 0.12)
        light = self.between(0.8, 1.1) * (1 + slope * (self.x / self.width - 0.5))
        tint = np.array([self.between(0.95, 1.05), 1.0, self.between(0.95, 1.05)])
        lit = self.rgb * light[..., None] * tint + 2 * self.noise()[..., None]
        picture: NDArray[np.uint8] = np.clip(lit + 0.5, 0, 255).astype(np.uint8)
        return picture
