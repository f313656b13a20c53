"""Butterflies drawn by a formula: the demo model's data, without end and without a licence.

Every picture is mirror-symmetric about its middle column, exactly, so a generated picture can
be told right from wrong: its two halves must agree. What a picture is, shape and colours, is
random; a class fixes the hue of the wings alone.
"""

from __future__ import annotations

import numpy as np

SIZE = 32
HUES = {"orange": 0.06, "green": 0.33, "blue": 0.58, "violet": 0.80}
HUE_SPREAD = 0.05
# Centre x and y, radii along and across, angle.
FORE_WING = ((0.38, 0.48), (-0.38, -0.24), (0.40, 0.50), (0.22, 0.34), (-0.9, -0.4))
HIND_WING = ((0.28, 0.38), (0.28, 0.42), (0.30, 0.42), (0.20, 0.30), (0.4, 1.0))
FILL = 0.92  # below 1 the butterfly fills more of the picture
CHANNELS = 3


def draw(rng: np.random.Generator, classes: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Draw one butterfly for each class.

    Args:
        rng: Where everything random comes from.
        classes: Integer array ``(N,)``, indices into the names of ``HUES``.
        size: Edge of the square pictures in pixels, even.

    Returns:
        Float32 array ``(N, 3, size, size)`` in [-1, 1].
    """
    count = len(classes)
    x, y = half_grid(size)
    look = appearance(rng, np.asarray(classes))
    picture = np.broadcast_to(look["ground"][:, :, None, None], (count, CHANNELS, *x.shape))
    for wing in ("hind", "fore"):
        inside = ellipse(x, y, look[wing], size)
        core = ellipse(x, y, shrunk(look[wing], look["rim"]), size)
        picture = paint(picture, inside, look[wing + "_edge"])
        picture = paint(picture, core, look[wing + "_colour"])
        spot = spot_of(look[wing], look[wing + "_spot"])
        picture = paint(picture, core * ellipse(x, y, spot, size), look[wing + "_ring"])
        pupil = core * ellipse(x, y, shrunk(spot, look["pupil"]), size)
        picture = paint(picture, pupil, look[wing + "_pupil"])
    picture = paint(picture, antenna(x, y, look["antenna"], size), look["dark"])
    picture = paint(picture, ellipse(x, y, look["body"], size), look["dark"])
    whole = np.concatenate([picture[..., ::-1], picture], axis=-1)
    return (2.0 * whole - 1.0).astype(np.float32)


def half_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the right half's pixel centres, each ``(size, size / 2)``."""
    if size < 2 or size % 2:
        raise ValueError(f"size must be even and at least 2, got {size}")
    centres = FILL * ((np.arange(size) + 0.5) / size * 2.0 - 1.0)
    return np.broadcast_arrays(centres[None, size // 2 :], centres[:, None])


def appearance(rng: np.random.Generator, classes: np.ndarray) -> dict[str, np.ndarray]:
    """Choose shapes and colours of the butterflies, one row for each."""
    count = len(classes)

    def between(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, count)

    def columns(*values: np.ndarray) -> np.ndarray:
        return np.stack(values, axis=1)

    hue = np.array(list(HUES.values()))[classes] + between(-HUE_SPREAD, HUE_SPREAD)
    look: dict[str, np.ndarray] = {
        "fore": columns(*(between(*ends) for ends in FORE_WING)),
        "hind": columns(*(between(*ends) for ends in HIND_WING)),
        "body": columns(
            np.zeros(count), between(-0.02, 0.06), between(0.06, 0.1), between(0.4, 0.5), hue * 0
        ),
        "antenna": columns(between(0.2, 0.4), between(0.35, 0.5)),
        "rim": between(0.03, 0.12),
        "pupil": between(0.06, 0.11),
        "ground": hsv(between(0, 1), between(0.0, 0.12), between(0.9, 1.0)),
        "dark": hsv(between(0, 1), between(0.0, 0.5), between(0.05, 0.2)),
    }
    for wing in ("fore", "hind"):
        shade = hue + between(-0.04, 0.04)
        look[wing + "_colour"] = hsv(shade, between(0.6, 1.0), between(0.6, 1.0))
        look[wing + "_edge"] = hsv(shade, between(0.5, 1.0), between(0.1, 0.4))
        # Along and across the wing as a share of its radii, and the radius.
        look[wing + "_spot"] = columns(between(0.0, 0.5), between(-0.25, 0.25), between(0.13, 0.21))
        # Spots have any colour: nothing but the other wing tells which.
        look[wing + "_ring"] = hsv(between(0, 1), between(0.3, 1.0), between(0.7, 1.0))
        look[wing + "_pupil"] = hsv(between(0, 1), between(0.5, 1.0), between(0.0, 1.0))
    return look


def ellipse(x: np.ndarray, y: np.ndarray, shape: np.ndarray, size: int) -> np.ndarray:
    """Return how far each pixel lies in an ellipse, 0 to 1, with an edge one pixel wide.

    Args:
        x: Pixel centres, ``(height, width)``.
        y: The same for the other axis, positive downwards.
        shape: ``(N, 5)``: centre x and y, the two radii, angle in radians.
        size: Edge of the picture in pixels.

    Returns:
        Array ``(N, height, width)``.
    """
    centre_x, centre_y, along, across, angle = shape.T[:, :, None, None]
    right, down = x - centre_x, y - centre_y
    cosine, sine = np.cos(angle), np.sin(angle)
    u = (right * cosine + down * sine) / along
    v = (down * cosine - right * sine) / across
    distance = (1.0 - np.hypot(u, v)) * np.minimum(along, across)
    return (distance * size / 2.0 + 0.5).clip(0.0, 1.0)


def antenna(x: np.ndarray, y: np.ndarray, shape: np.ndarray, size: int) -> np.ndarray:
    """Return how far each pixel lies on an antenna: a parabola from the head outwards."""
    reach, height = shape.T[:, :, None, None]
    head = -0.4
    wanted = reach * ((head - y) / height).clip(0.0, 1.0) ** 2
    near = 1.0 - np.abs(x - wanted) * size / 2.0 / 1.2
    return near.clip(0.0, 1.0) * ((y < head) & (y > head - height))


def shrunk(shape: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Return ellipses with both radii less by an amount, ``(N,)``."""
    smaller = shape.copy()
    smaller[:, 2:4] = np.maximum(shape[:, 2:4] - by[:, None], 0.02)
    return smaller


def spot_of(wing: np.ndarray, spot: np.ndarray) -> np.ndarray:
    """Return the round spot that lies at a place of a wing."""
    along, across, radius = spot.T
    u, v, angle = along * wing[:, 2], across * wing[:, 3], wing[:, 4]
    x = wing[:, 0] + u * np.cos(angle) - v * np.sin(angle)
    y = wing[:, 1] + u * np.sin(angle) + v * np.cos(angle)
    return np.stack([x, y, radius, radius, angle], axis=1)


def paint(picture: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Lay a colour ``(N, 3)`` over pictures where the mask ``(N, H, W)`` is."""
    mask = mask[:, None]
    return picture * (1.0 - mask) + colour[:, :, None, None] * mask


def hsv(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return RGB ``(N, 3)`` in [0, 1] of colours whose hue goes round once from 0 to 1."""
    turn = (hue[:, None] + np.array([1.0, 2.0 / 3.0, 1.0 / 3.0])) % 1.0
    pure = (np.abs(turn * 6.0 - 3.0) - 1.0).clip(0.0, 1.0)
    return value[:, None] * (1.0 - saturation[:, None] * (1.0 - pure))


def as_images(pictures: np.ndarray) -> np.ndarray:
    """Turn ``(N, 3, H, W)`` in [-1, 1] into ``(N, H, W, 3)`` in [0, 1]."""
    return ((np.asarray(pictures) + 1.0) * 0.5).clip(0.0, 1.0).transpose(0, 2, 3, 1)


def sample_data(seed: int, count: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures of classes that take turns, and the classes.

    Args:
        seed: Seed of everything random.
        count: Number of pictures.
        size: Edge in pixels.

    Returns:
        A pair ``(pictures, classes)``, see ``draw``.
    """
    rng = np.random.default_rng(seed)
    classes = np.arange(count) % len(HUES)
    parts = [draw(rng, classes[start : start + 256], size) for start in range(0, count, 256)]
    return np.concatenate(parts), classes
