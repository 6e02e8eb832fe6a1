"""Names beside the points of a picture, none of which can be taken for that of another point."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

from metazo.io.extras import needs

with needs("report"):
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]
Place = tuple[float, float]


def clipped(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def name_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a name beside each point within the axes, where it covers no other name or point and no other point is about as
    near; in a crowded place, further off with a line.
    """
    size = 8.5
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    scale = 72 / axes.figure.dpi  # points of type in a pixel
    pixels = axes.transData.transform([(memory, value) for memory, value, _ in points])
    places = [(float(x), float(y)) for x, y in pixels * scale]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    left, low, right, high = (edge * scale for edge in axes.get_window_extent().extents)
    middle, lines = (low + high) / 2, []
    # From the edge of the figure to its middle, so that the lines of a stack do not cross.
    outermost = sorted(zip(points, places), key=lambda pair: (-pair[0][0], -abs(pair[1][1] - middle)))
    for (memory, value, column), (x, y) in outermost:
        width, height = 0.58 * size * len(clipped(column)), 1.15 * size
        near = [(dx, dy) for dy in (5, -5, 0) for dx in (7, -7 - width)]
        inward = 1 if y < middle else -1
        far = [(dx, sign * dy) for dy in range(12, 120, 4) for sign in (inward, -inward) for dx in (14, -14 - width)]
        boxes = [(x + dx, y + dy - height / 2, x + dx + width, y + dy + height / 2) for dx, dy in (*near, *far)]
        inside = [box for box in boxes if left < box[0] and low < box[1] and box[2] < right and box[3] < high]
        free = [box for box in inside if not any(map(partial(overlap, box), taken))]
        alone = [box for box in free if belongs(box, (x, y), places) or abs(box[1] + height / 2 - y) > 9]
        apart = (box for box in alone if not any(cross(((x, y), end(box, x)), line) for line in lines))
        box = next(apart, (alone or free or inside or boxes)[0])
        taken.append(box)
        dx, dy = box[0] - x, box[1] - y + height / 2
        line = None
        if abs(dy) > 9 or not belongs(box, (x, y), places):
            line = {"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
            lines.append(((x, y), end(box, x)))
        axes.annotate(
            clipped(column), (memory, value), (dx if dx > 0 else dx + width, dy), textcoords="offset points", fontsize=size,
            va="center", ha="left" if dx > 0 else "right", arrowprops=line, annotation_clip=False, zorder=4,
        )  # fmt: skip


def end(box: Box, x: float) -> Place:
    """The end of a name at which its line begins."""
    return box[0] if box[0] > x else box[2], (box[1] + box[3]) / 2


def cross(one: tuple[Place, Place], other: tuple[Place, Place]) -> bool:
    """Whether two lines cross."""

    def side(line: tuple[Place, Place], p: Place) -> float:
        (ax, ay), (bx, by) = line
        return (bx - ax) * (p[1] - ay) - (by - ay) * (p[0] - ax)

    return side(one, other[0]) * side(one, other[1]) < 0 and side(other, one[0]) * side(other, one[1]) < 0


def belongs(box: Box, own: Place, places: Iterable[Place]) -> bool:
    """Whether a box is clearly nearer to its own place than to any other."""
    left, low, right, high = box

    def gap(place: Place) -> float:
        x, y = place
        return math.hypot(max(left - x, x - right, 0), max(low - y, y - high, 0))

    return all(gap(place) > gap(own) + 4 for place in places if place != own)


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes (left, low, right, high) overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
