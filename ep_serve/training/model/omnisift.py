"""OmniSIFT's selector in training: it chooses as it does in serving, and its scores learn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ep_serve.sieve import Pool
from ep_serve.sieve.omnisift import OmniSiftPlan, OmniSiftSieve


def sift(sieve: OmniSiftSieve, pool: Pool, plan: OmniSiftPlan) -> tuple[Tensor, Tensor]:
    """Choose, with a gradient for the sound (straight-through estimator, arXiv 2602.04804).

    Which picture survives is decided by similarity and has nothing to learn. Forward, every token
    is multiplied by 1. Backward, the factor of a sound that was judged by a picture counts as its
    score, the sigmoid of its logit. `OmniSiftSieve.reduce` makes the same choice without giving
    its scores away.

    Args:
        sieve: The selector.
        pool: AV tokens of one prompt.
        plan: For that pool.

    Returns:
        indices (K,) int64 of the survivors, ascending, and factors (n,) float32.
    """
    device = pool.hidden.device
    kept = [torch.from_numpy(plan.fixed).to(device)]
    factor = torch.ones(pool.size, device=device)
    for group in plan.pairs.groups:
        video = sieve.prune(pool.hidden.detach(), group, plan.rho_video)
        sound = torch.from_numpy(group.sound).to(device)
        keep = int(group.sound_kept(np.array([plan.rho_audio]), plan.rho_video)[0])
        if keep < sound.shape[1]:
            logits = sieve.audio_logits(pool.hidden[sound], pool.hidden[video])
            score = logits.sigmoid()
            factor[sound] = 1 + (score - score.detach())
            best = logits.sort(dim=1, descending=True, stable=True).indices[:, :keep]
            sound = sound.gather(1, best)
        kept += [video.flatten(), sound.flatten()]
    return torch.cat(kept).sort().values, factor
