"""What tools/train_digit_features.py and tools/train_shape_features.py share: training from a seed, and the file."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from gesso import atomic_io

SEED, BATCH, LR, WEIGHT_DECAY = 0, 64, 2e-3, 0.05


def fitted(
    make: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Tensor, torch.Generator], Tensor],
    count: int,
    epochs: int,
) -> nn.Module:
    """A network trained from SEED by AdamW, with a warm-up of 100 steps and a cosine to 0, in evaluation mode.

    loss: of the network on the images of some indices (B,) among `count`; what it draws comes from the generator.
    """
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    network = make()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    steps = epochs * (count // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        for some in order.split(BATCH)[: count // BATCH]:
            optimizer.zero_grad()
            loss(network, some, generator).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def written(network: nn.Module, about: dict[str, Any], out: Path, dtype: torch.dtype) -> str:
    """Write the weights; returns a line on the file with its sha256."""
    # One key only: safetensors writes several in an order that changes from run to run, and so the checksum.
    weights = {key: value.detach().to(dtype).contiguous() for key, value in network.state_dict().items()}
    with atomic_io.atomic_file(out) as temporary:
        safetensors.torch.save_file(weights, temporary, metadata={"gesso": json.dumps(about, sort_keys=True)})
    content = out.read_bytes()
    return f"{out}: {len(content) / 1000:.1f} kB\nsha256 {hashlib.sha256(content).hexdigest()}"
