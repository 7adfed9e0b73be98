"""Colours that can be told apart: by people who see few of them, in light and in dark."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest

import scaletrain.report
from scaletrain.report.blocks import DEEP_FROM
from scaletrain.report.chart import COLOURS

STYLE = Path(scaletrain.report.__file__).with_name("style.css").read_text()
Vector = tuple[float, float, float]

# Machado, Oliveira and Fernandes 2009, "A physiologically-based model for simulation of color vision deficiency", severity 1.
SIGHTS = {
    "normal": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
# Ottosson 2020, "A perceptual color space for image processing".
LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
OF_LAB = ((1.0, 0.3963377774, 0.2158037573), (1.0, -0.1055613458, -0.0638541728), (1.0, -0.0894841775, -1.2914855480))
OF_LMS = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)


def times(matrix: tuple[Vector, Vector, Vector], vector: Vector) -> Vector:
    a, b, c = (math.fsum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix)
    return a, b, c


def linear(colour: str) -> Vector:
    """``#rrggbb`` as linear light, 0 to 1."""
    r, g, b = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return tuple(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b))  # type: ignore[return-value]


def clipped(colour: Vector) -> Vector:
    return tuple(min(max(c, 0.0), 1.0) for c in colour)  # type: ignore[return-value]


def oklab(colour: Vector) -> Vector:
    return times(LAB, tuple(c ** (1 / 3) for c in times(LMS, colour)))  # type: ignore[arg-type]


def mixed(one: Vector, other: Vector, share: float) -> Vector:
    """CSS ``color-mix(in oklab, one share, other)``."""
    lab = tuple(share * a + (1 - share) * b for a, b in zip(oklab(one), oklab(other), strict=True))
    return clipped(times(OF_LMS, tuple(c**3 for c in times(OF_LAB, lab))))  # type: ignore[arg-type]


def contrast(one: Vector, other: Vector) -> float:
    """WCAG 2: from 1 to 21."""
    light, dark = sorted((0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2] for c in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def theme(name: str) -> dict[str, Vector]:
    """The colours of ``light`` or ``dark``."""
    first, second = re.findall(r":root \{([^}]*)\}", STYLE)[:2]
    return {key: linear(value) for key, value in re.findall(r"--([\w-]+): (#[0-9a-f]{6})", first if name == "light" else second)}


THEMES = pytest.mark.parametrize("colours", [theme("light"), theme("dark")], ids=["light", "dark"])


@THEMES
@pytest.mark.parametrize("sight", SIGHTS)
def test_no_two_curves_look_alike(colours: dict[str, Vector], sight: str) -> None:
    """A distance of 0.02 in OKLab is about what a trained eye just sees, side by side."""
    seen = [oklab(clipped(times(SIGHTS[sight], colours[f"c{k}"]))) for k in range(COLOURS)]
    assert min(math.dist(one, other) for one, other in itertools.combinations(seen, 2)) > 0.08


@THEMES
def test_curves_stand_out_from_the_paper_and_text_can_be_read(colours: dict[str, Vector]) -> None:
    paper = colours["paper"]
    assert min(contrast(colours[f"c{k}"], paper) for k in range(COLOURS)) > 3
    assert min(contrast(colours[name], paper) for name in ("ink", "soft", "good", "bad", "open")) > 4.5


@THEMES
def test_the_number_in_every_cell_of_a_heat_map_can_be_read(colours: dict[str, Vector]) -> None:
    grounds = {share / 100: mixed(colours["heat"], colours["sheet"], share / 100) for share in range(101)}
    pens = {share: colours["on-deep" if share >= DEEP_FROM else "on-pale"] for share in grounds}
    assert min(contrast(ground, pens[share]) for share, ground in grounds.items()) > 4.5


def test_both_themes_define_every_colour() -> None:
    assert theme("light").keys() == theme("dark").keys()
    assert set(re.findall(r"var\(--([\w-]+)", STYLE)) - theme("light").keys() == {"own", "dashes", "shade"}
