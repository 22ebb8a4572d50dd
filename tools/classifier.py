"""Training and file format of the toy classifiers, shared by the train_*_features.py scripts."""

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

SEED, BATCH_SIZE, LR, WEIGHT_DECAY = 0, 64, 2e-3, 0.05


def train_classifier(
    make_network: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Tensor, torch.Generator], Tensor],
    num_images: int,
    epochs: int,
) -> nn.Module:
    """Train a network from SEED by AdamW, with 100 warm-up steps and cosine decay to 0; return it in evaluation mode.

    Args:
        make_network: Builds the network, after the seed is set.
        loss: Function of the network, indices (B,) of training images and the generator of random draws.
        num_images: Number of training images.
        epochs: Number of passes over the images.
    """
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    network = make_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    steps = epochs * (num_images // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    for _ in range(epochs):
        order = torch.randperm(num_images, generator=generator)
        for indices in order.split(BATCH_SIZE)[: num_images // BATCH_SIZE]:
            optimizer.zero_grad()
            loss(network, indices, generator).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def save_weights(network: nn.Module, metadata: dict[str, Any], out: Path, dtype: torch.dtype) -> str:
    """Write the weights as safetensors; return a line of text with the file size and its sha256."""
    # One metadata key only: safetensors writes several in an order that changes between runs, and with it the checksum.
    weights = {key: value.detach().to(dtype).contiguous() for key, value in network.state_dict().items()}
    with atomic_io.atomic_file(out) as temporary:
        safetensors.torch.save_file(weights, temporary, metadata={"gesso": json.dumps(metadata, sort_keys=True)})
    content = out.read_bytes()
    return f"{out}: {len(content) / 1000:.1f} kB\nsha256 {hashlib.sha256(content).hexdigest()}"
