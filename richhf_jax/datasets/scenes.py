"""Procedural scenes with known flaws: everything follows from (config, filename).

`sample_scene` draws the contents of a picture, `render` draws the picture and returns the truth about it, and
`truth` gives an evaluation the truth alone. Lengths are shares of the side, so that a scene is the same at
every resolution.
"""

import colorsys
import dataclasses
import functools
import hashlib
import itertools
import math

import numpy as np
from PIL import Image

from richhf_jax.datasets import artifacts, drawing, prompts

MIN_SIZE, MAX_SIZE = 64, 512
BACKGROUNDS = ("plain", "gradient", "stripes", "checks")
# Radii as shares of the side (at 64 pixels: 7.5 to 8.5, and 12 to 14). None: the phrase says no size.
RADII = {"small": (0.117, 0.133), "large": (0.187, 0.218), None: (0.125, 0.2)}
MAX_TILT = 0.2  # radians, to either side
ARTIFACT_COUNTS = (0, 1, 2)
ARTIFACT_COUNT_WEIGHTS = (0.45, 0.42, 0.13)
# Range of the backgrounds' saturations: muted, so that every object stands out.
SATURATIONS = (0.08, 0.38)
STATIC_RADII = (0.11, 0.15)
# A pixel belongs to a region if at least this much of it (of 255) is covered.
COVERED = 96


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """Settings of a data set's scenes.

    Attributes:
      image_size: side of the square picture, 64 to 512 pixels.
      seed: scenes of different seeds are different.
      clean: True for pictures without flaws that show exactly what the prompt says.
      artifact_strength: 1 for flaws that are plain to see, less for subtle ones.
      scale: factor of the objects' sizes.
      grain: standard deviation of the noise on the picture, in grey levels of 255.
    """

    image_size: int = 64
    seed: int = 0
    clean: bool = False
    artifact_strength: float = 1.0
    scale: float = 1.0
    grain: float = 0.0

    def __post_init__(self):
        if not MIN_SIZE <= self.image_size <= MAX_SIZE:
            raise ValueError(f"image_size must be {MIN_SIZE} to {MAX_SIZE}, got {self.image_size}")


# Name of the TFDS builder configuration -> its scenes.
CONFIGS = {
    "default": SceneConfig(),
    "subtle": SceneConfig(artifact_strength=0.45, scale=0.8, grain=12.0),
    **{f"default_{size}": SceneConfig(image_size=size) for size in (128, 256, 512)},
}
CAPTIONS_CONFIGS = {
    "default": SceneConfig(clean=True),
    **{f"default_{size}": SceneConfig(image_size=size, clean=True) for size in (128, 256, 512)},
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object in the picture; `radius`, `x` and `y` are shares of the side, `angle` is in radians."""

    phrase_index: int
    shape: str
    colour: str
    misaligned: bool
    radius: float
    x: float
    y: float
    angle: float


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An artifact on the object `thing_index`, or static at (x, y); lengths are shares of the side."""

    kind: str
    thing_index: int | None
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0


@dataclasses.dataclass(frozen=True)
class Background:
    """A pattern of two muted colours: an HSV colour, and one darker by `contrast`; `angle` is in radians."""

    kind: str
    hue: float
    saturation: float
    value: float
    contrast: float
    angle: float

    @property
    def colours(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Two RGB colours, 0 to 255."""

        def rgb(value: float) -> tuple[float, ...]:
            return tuple(255 * c for c in colorsys.hsv_to_rgb(self.hue, self.saturation, value))

        return rgb(self.value), rgb(self.value - self.contrast)


@dataclasses.dataclass(frozen=True)
class Scene:
    """The contents of a picture, and what its prompt says."""

    description: prompts.Description
    misalignments: tuple[prompts.Misalignment, ...]
    things: tuple[Thing, ...]
    artifacts: tuple[Artifact, ...]
    background: Background


@dataclasses.dataclass(frozen=True)
class ObjectTruth:
    """An object in the picture; `mask`, bool [height, width], has its visible pixels."""

    mask: np.ndarray
    misaligned: bool
    phrase: str
    shape: str
    colour: str


@dataclasses.dataclass(frozen=True)
class SceneTruth:
    """The truth about a picture. Masks are bool [height, width].

    Attributes:
      scene: what was drawn.
      objects: the objects in the picture, without the missing ones.
      artifact_regions: one region per artifact of the scene, in the scene's order.
    """

    scene: Scene
    objects: tuple[ObjectTruth, ...]
    artifact_regions: tuple[np.ndarray, ...]

    @property
    def artifact_region(self) -> np.ndarray:
        """Union of the artifacts' regions."""
        return functools.reduce(np.logical_or, self.artifact_regions, np.zeros_like(self.objects[0].mask))

    @property
    def misaligned_region(self) -> np.ndarray:
        """Union of the misaligned objects, as drawn."""
        masks = [o.mask for o in self.objects if o.misaligned]
        return functools.reduce(np.logical_or, masks, np.zeros_like(self.objects[0].mask))

    @property
    def object_mask(self) -> np.ndarray:
        """Union of all objects."""
        return functools.reduce(np.logical_or, [o.mask for o in self.objects])

    @property
    def missing_object(self) -> bool:
        """True if the picture lacks an object that the prompt names."""
        return any(m.kind == "missing" for m in self.scene.misalignments)


def filename(split: str, index: int) -> str:
    """Returns '<split>/<uid>.png'; the uid is a bijection of the index (Knuth's multiplicative hash)."""
    return f"{split}/{index * 2654435761 % 2**32:08x}.png"


def make_rng(config: SceneConfig, name: str, purpose: str) -> np.random.Generator:
    """Makes a picture's random numbers for one purpose; equal arguments give equal numbers everywhere."""
    key = f"{config.seed}/{'clean' if config.clean else 'flawed'}/{name}/{purpose}"
    return np.random.default_rng(np.frombuffer(hashlib.sha256(key.encode()).digest(), "<u4"))


def sample_scene(config: SceneConfig, name: str) -> Scene:
    """Draws the scene of the picture `name` ('<split>/<uid>.png')."""
    rng = make_rng(config, name, "scene")
    description = prompts.sample_description(rng, name.partition("/")[0])
    misalignments: tuple[prompts.Misalignment, ...] = ()
    drawn: list[prompts.Phrase | None] = list(description.phrases)
    if not config.clean:
        misalignments, drawn = prompts.sample_misalignments(rng, description)
    things = _place(rng, drawn, {m.phrase_index for m in misalignments}, config.scale)
    return Scene(
        description=description,
        misalignments=misalignments,
        things=things,
        artifacts=() if config.clean else _sample_artifacts(rng, things, config),
        background=Background(
            kind=prompts.choice(rng, BACKGROUNDS),
            hue=rng.uniform(),
            saturation=rng.uniform(*SATURATIONS),
            value=rng.uniform(0.6, 0.82),
            contrast=rng.uniform(0.1, 0.2),
            angle=rng.uniform(0, 2 * math.pi),
        ),
    )


def _place(
    rng: np.random.Generator, drawn: list[prompts.Phrase | None], misaligned: set[int], scale: float
) -> tuple[Thing, ...]:
    """Places the objects at random where they overlap little or not at all."""
    groups = []
    for index, phrase in enumerate(drawn):
        if phrase is not None:
            radius = rng.uniform(*RADII[phrase.size]) * scale
            groups.extend([(index, phrase, radius)] * phrase.count)
    groups = [groups[i] for i in rng.permutation(len(groups))]
    pairs = list(itertools.combinations(range(len(groups)), 2))
    for attempt in itertools.count():
        centres = [(rng.uniform(r, 1 - r), rng.uniform(r, 1 - r)) for _, _, r in groups]
        # Crowded pictures end up with objects a little closer than the sum of their radii.
        slack = 1 - attempt / 1000
        if all(math.dist(centres[i], centres[j]) >= slack * (groups[i][2] + groups[j][2]) for i, j in pairs):
            break
    return tuple(
        Thing(i, p.shape, p.colour, i in misaligned, r, *centre, rng.uniform(-MAX_TILT, MAX_TILT))
        for (i, p, r), centre in zip(groups, centres, strict=True)
    )


def _sample_artifacts(
    rng: np.random.Generator, things: tuple[Thing, ...], config: SceneConfig
) -> tuple[Artifact, ...]:
    """Draws artifacts for different objects; static goes beside the objects' centres."""
    count = prompts.choice(rng, ARTIFACT_COUNTS, ARTIFACT_COUNT_WEIGHTS)
    free = list(rng.permutation(len(things)))
    result = []
    for _ in range(count):
        kind = prompts.choice(rng, artifacts.KINDS) if free else artifacts.STATIC
        if kind == artifacts.STATIC:
            radius = rng.uniform(*STATIC_RADII) * config.scale
            while True:
                x, y = rng.uniform(radius * 0.8, 1 - radius * 0.8, 2)
                # Static may touch an object but not hide it.
                if all(math.dist((t.x, t.y), (x, y)) > 0.8 * t.radius + 0.4 * radius for t in things):
                    break
            result.append(Artifact(kind, None, x, y, radius))
        else:
            result.append(Artifact(kind, int(free.pop())))
    return tuple(result)


def render(config: SceneConfig, name: str) -> tuple[np.ndarray, SceneTruth]:
    """Draws the picture `name`.

    Returns:
      uint8 [image_size, image_size, 3] and the truth about it.
    """
    scene = sample_scene(config, name)
    rng = make_rng(config, name, "render")
    oversampling = 3 if config.image_size <= 128 else 2
    side = config.image_size * oversampling
    canvas = drawing.background(
        scene.background.kind, *scene.background.colours, scene.background.angle, side
    )

    def shrink(mask):
        return np.asarray(Image.fromarray(mask).reduce(oversampling)) >= COVERED

    by_thing = {a.thing_index: a for a in scene.artifacts}
    masks, regions = [], {}
    for index, thing in enumerate(scene.things):
        layers = drawing.shape_masks(thing.shape, thing.x, thing.y, thing.radius, thing.angle, side)
        if artifact := by_thing.get(index):
            before = shrink(layers[0])
            warp = artifacts.OBJECT_ARTIFACTS[artifact.kind]
            layers = warp(layers, thing, config.artifact_strength, rng)
            regions[artifact] = artifacts.region(artifact.kind, thing, before, shrink(layers[0]))
        drawing.paint(canvas, layers, thing.colour)
        masks.append(shrink(layers[0]))
    for artifact in scene.artifacts:
        if artifact.kind == artifacts.STATIC:
            place = artifact.x, artifact.y, artifact.radius
            mask = artifacts.paint_static(canvas, *place, config.artifact_strength, rng)
            regions[artifact] = shrink(np.asarray(mask))
    image = np.asarray(canvas.reduce(oversampling))
    if config.grain:
        noisy = image + config.grain * rng.standard_normal(image.shape[:2])[..., None]
        image = noisy.round().clip(0, 255).astype(np.uint8)
    visible = _visible(masks)
    objects = tuple(
        ObjectTruth(mask, t.misaligned, str(scene.description.phrases[t.phrase_index]), t.shape, t.colour)
        for mask, t in zip(visible, scene.things, strict=True)
    )
    return image, SceneTruth(scene, objects, tuple(regions[a] for a in scene.artifacts))


def _visible(masks: list[np.ndarray]) -> list[np.ndarray]:
    """Removes from each mask what later ones cover."""
    covered = np.zeros_like(masks[0])
    visible = []
    for mask in reversed(masks):
        visible.append(mask & ~covered)
        covered |= mask
    return visible[::-1]


def truth(name: str, config: SceneConfig) -> SceneTruth:
    """Returns the truth about the picture `name` ('<split>/<uid>.png') of a data set built with `config`."""
    return render(config, name)[1]
