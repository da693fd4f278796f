"""OmniSIFT's selection with gradients for its selector."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ep_serve.sieve import Pool
from ep_serve.sieve.omnisift import OmniSiftPlan, OmniSiftSieve


def select_with_gradient(
    sieve: OmniSiftSieve, pool: Pool, plan: OmniSiftPlan
) -> tuple[Tensor, Tensor]:
    """Select tokens, with a gradient for the audio scores (straight-through, arXiv 2602.04804).

    Video tokens are selected by similarity, which has no weights. Forward, every token is
    multiplied by 1; backward, the factor of a scored audio token is its score, the sigmoid of its
    logit. `OmniSiftSieve.reduce` makes the same selection without returning scores.

    Args:
        sieve: The selector.
        pool: AV tokens of one prompt.
        plan: The sieve's plan of that pool.

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
