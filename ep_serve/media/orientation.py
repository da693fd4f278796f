"""Turning frames the way a player shows them."""

from __future__ import annotations

from typing import Any

import numpy as np
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from numpy.typing import NDArray

Matrix = tuple[int, int, int, int]


def display_matrix(frame: VideoFrame) -> Matrix | None:
    """The 2x2 part (a, b, c, d) of a frame's display matrix, or None.

    A point (x, y) of the stored picture is shown at (a x + c y, b x + d y), y pointing down
    (ISO/IEC 14496-12, track header box).
    """
    side_data: Any = frame.side_data
    if Type.DISPLAYMATRIX not in side_data:
        return None
    values = np.frombuffer(bytes(side_data[Type.DISPLAYMATRIX]), np.int32)
    return int(values[0]), int(values[1]), int(values[3]), int(values[4])


def upright(picture: NDArray[np.uint8], matrix: Matrix | None) -> NDArray[np.uint8]:
    """Turn and mirror a picture (H, W, 3) as `matrix` says, to the nearest quarter turn."""
    if matrix is None:
        return picture
    a, b, c, d = matrix
    if abs(a) + abs(d) < abs(b) + abs(c):
        picture = picture.transpose(1, 0, 2)
        a, d = c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
