"""Fine-tune a real EchoingPixels checkpoint on a JSONL file of conversations.

Towers are frozen; refiner, score head and, optionally, the decoder are trained. Weights,
activations and optimizer have the checkpoint's precision, and activations are recomputed in the
backward pass.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ep_serve.checkpoint import names
from ep_serve.checkpoint.directory import new_directory
from ep_serve.checkpoint.tensors import NewTensor, read_tensors, write_tensors
from ep_serve.preprocess.features import VIDEO_PIXELS, Bounds
from ep_serve.training.data.conversations import ExampleBuilder, FrozenTowers, read_conversations
from ep_serve.training.loop.run import Run
from ep_serve.training.model.batch import collate
from ep_serve.training.model.thinker import Thinker
from ep_serve.training.model.weights import load_thinker

KEEP_RATIOS = (1.0, 0.2, 0.1, 0.05)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings of a fine-tuning.

    Attributes:
        checkpoint: An EchoingPixels checkpoint, see `ep-serve checkpoint init`.
        conversations: The JSONL file.
        media: The folder its paths start from.
        work: Folder of the training curve and state.
        steps: Optimizer steps.
        batch: Conversations a step.
        rate: Peak learning rate.
        keep_ratios: One of them is drawn for each conversation.
        decoder: Whether the decoder is trained.
        close_bypass: See `Thinker`.
        fps: Frames sampled from each second of a clip.
        video_pixels: Least and most pixels of a frame.
        seed: Of the order of the conversations and of the keep ratios.
    """

    checkpoint: Path
    conversations: Path
    media: Path
    work: Path
    steps: int
    batch: int = 4
    rate: float = 1e-5
    keep_ratios: Sequence[float] = KEEP_RATIOS
    decoder: bool = True
    close_bypass: bool = False
    fps: float = 2.0
    video_pixels: Bounds = VIDEO_PIXELS
    seed: int = 0


def finetune(plan: Plan) -> Thinker:
    """Fine-tune; resumes from the state in `plan.work`.

    Raises:
        CheckpointError: The checkpoint, or a line of the conversations, cannot be used.
    """
    conversations = read_conversations(plan.conversations, plan.media)
    dtype = DTYPES[read_tensors(plan.checkpoint)[names.EMBEDDING].dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    towers = FrozenTowers(plan.checkpoint, dtype).to(device)
    builder = ExampleBuilder(plan.checkpoint, towers, fps=plan.fps, video_pixels=plan.video_pixels)
    thinker = load_thinker(
        plan.checkpoint, dtype, close_bypass=plan.close_bypass, checkpoint_activations=True
    ).to(device)
    if not plan.decoder:
        for part in (thinker.model.layers, thinker.model.norm, thinker.model.embed_tokens):
            part.requires_grad_(False)
        thinker.lm_head.requires_grad_(False)
    run = Run(plan.work, thinker, plan.steps, plan.rate, log_every=1)
    for step in run.steps():
        rng = np.random.default_rng([plan.seed, step])
        chosen = rng.choice(len(conversations), plan.batch, replace=len(conversations) < plan.batch)
        examples = [builder.build(conversations[i]) for i in chosen]
        batch = collate(examples, rng.choice(plan.keep_ratios, plan.batch).tolist()).to(device)
        output = thinker(batch)
        loss = F.cross_entropy(output.logits.float(), batch.targets)
        run.update(loss, {"loss": loss.item()})
    return thinker


def write_checkpoint(source: Path, thinker: Thinker, target: Path) -> None:
    """Write a copy of checkpoint `source` with the trained weights.

    Raises:
        CheckpointError: `target` exists and is not empty.
    """
    stored = read_tensors(source)
    trained: dict[str, Tensor] = {
        names.THINKER + name: value.detach().cpu() for name, value in thinker.state_dict().items()
    }
    weights = {
        name: NewTensor.of(trained[name], tensor.dtype) if name in trained else tensor
        for name, tensor in stored.items()
    }
    with new_directory(target) as new:
        for file in sorted(source.iterdir()):
            if file.is_file() and ".safetensors" not in file.name:
                shutil.copyfile(file, new / file.name)
        write_tensors(new, weights)
