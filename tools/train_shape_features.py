"""Make gesso/evaluation/networks/shapes.safetensors: the classifier behind ShapeFeatures.

python tools/train_shape_features.py        five minutes on one CPU core; all shapes named in 92.3 % of held-out pictures

It learns which kinds in which colours are in a picture of `shapes`, at 32x32, from pictures 0 to 19,999; accuracy is
measured on 2,000 more. Prints the sha256 to record in gesso/evaluation/networks/toy_networks.py. Another torch or CPU rounds otherwise and
gives another file of the same accuracy, which needs another `name`: numbers from two files do not compare.
"""

import argparse
from pathlib import Path

import classifier
import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from gesso.config import DataConfig
from gesso.data import shapes_dataset
from gesso.data.factory import open_dataset
from gesso.evaluation.networks import toy_networks
from gesso.evaluation.networks.toy_networks import ShapeFeatures

OUT = Path(toy_networks.__file__).with_name(toy_networks.SHAPES_FILE)
SEED, EPOCHS = classifier.SEED, 24
TRAINED, HELD_OUT = 20_000, 2_000


def pictures() -> tuple[Tensor, Tensor]:
    """uint8 (N, 3, 32, 32), and float32 (N, K): whether there is a shape of this kind and colour."""
    count = TRAINED + HELD_OUT
    images = open_dataset(DataConfig(source=f"shapes:{count}", resolution=ShapeFeatures.resolution, channels=3)).pixels
    pairs = [(kind, colour) for kind in shapes_dataset.KINDS for colour in shapes_dataset.COLOURS]
    there = torch.zeros(count, len(pairs))
    for i, scene in enumerate(shapes_dataset.sample_scenes(range(count))):
        for shape in scene.shapes:
            there[i, pairs.index((shape.kind, shape.colour))] = 1
    return images, there


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half, add noise of std 0 to 16. uint8 (B, 3, 32, 32)."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    x = torch.where(mirrored, images.flip(3), images).float()
    x = x + torch.randn(x.shape, generator=generator) * 16 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return x.round().clamp(0, 255).to(torch.uint8)


def train(images: Tensor, there: Tensor) -> ShapeFeatures:
    """Train from the seed; returns the network in evaluation mode."""

    def loss(network: ShapeFeatures, some: Tensor, generator: torch.Generator) -> Tensor:
        hidden = network(augment(images[some], generator))
        logits = network.head(F.dropout(hidden, 0.1))
        # Smoothed targets bound the logits, and with them the features.
        return F.binary_cross_entropy_with_logits(logits, there[some] * 0.98 + 0.01, reduction="sum") / len(some)

    return classifier.fitted(ShapeFeatures, loss, len(images), EPOCHS)


@torch.no_grad()
def accuracy(network: ShapeFeatures, images: Tensor, there: Tensor) -> float:
    """Share of pictures whose shapes are all named, and none besides."""
    actual = torch.cat([network.head(network(some)) for some in images.split(500)]) > 0
    return float((actual == (there > 0)).all(dim=1).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, there = pictures()
    network = train(images[:TRAINED], there[:TRAINED])
    held_out = accuracy(network, images[TRAINED:], there[TRAINED:])
    print(
        f"all shapes of a picture named: {held_out:.2%} of {HELD_OUT} held out, {accuracy(network, images[:TRAINED], there[:TRAINED]):.2%} of those trained on"
    )
    about = {
        "name": ShapeFeatures.name, "held_out_accuracy": held_out, "trained_on": f"shapes 0 to {TRAINED - 1} at 32x32", "seed": SEED,
        "epochs": EPOCHS, "versions": {"torch": torch.__version__, "numpy": numpy.__version__},
    }  # fmt: skip
    print(classifier.written(network, about, out, torch.float16))


if __name__ == "__main__":
    main()
