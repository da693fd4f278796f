"""Sync-RoPE: rotary embedding whose channels follow rows T, H, W and T again.

`triton_kernel` is not imported from here: it needs triton, so import it where CUDA is.
"""

from __future__ import annotations

from ep_serve.rope.sync_rope import Border, apply_sync_rope, channel_rows, gather_cos_sin

__all__ = ["Border", "apply_sync_rope", "channel_rows", "gather_cos_sin"]
