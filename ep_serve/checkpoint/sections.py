"""How Sync-RoPE splits the half-dimensions of an attention head."""

from __future__ import annotations

from ep_serve.checkpoint.errors import CheckpointError

Sections = tuple[int, int, int, int]


def scaled_sections(head_dim: int) -> Sections:
    """Channels driven by the rows T, H, W and T again, for one attention head.

    The official EchoingPixels code uses 18, 18, 18, 10 for a head of 128. Other heads get 18/64 of
    `head_dim // 2` for each of the first three, rounded to the nearest integer (half to even), and
    what is left for the fourth. The sum is always `head_dim // 2`, and no section is negative.

    Raises:
        CheckpointError: `head_dim` is odd or less than 2.
    """
    if head_dim < 2 or head_dim % 2:
        raise CheckpointError(f"head_dim must be even and at least 2, but it is {head_dim}")
    half = head_dim // 2
    # Rounding up would overdraw a head of 4: never take more than a third.
    row = min(round(half * 18 / 64), half // 3)
    return row, row, row, half - 3 * row
