"""Train the classifier of ShapeFeatures and write gesso/evaluation/networks/shapes.safetensors.

    python tools/train_shape_features.py        # five minutes on one CPU core; 92.3 % of held-out images fully correct

The network predicts which kinds of shapes in which colours an image of `shapes` contains, at 32x32. It is trained on
images 0 to 19,999 and measured on 2,000 more. Record the printed sha256 in gesso/evaluation/networks/toy_networks.py.
Another torch version or CPU rounds differently and gives another file of the same accuracy, which needs another `name`:
metrics of two files are not comparable.
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
NUM_TRAIN, NUM_HELD_OUT = 20_000, 2_000


def load_images() -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 32, 32) uint8 and targets (N, K) float32, 1 for every kind and colour in the image."""
    num_images = NUM_TRAIN + NUM_HELD_OUT
    images = open_dataset(
        DataConfig(source=f"shapes:{num_images}", resolution=ShapeFeatures.resolution, channels=3)
    ).pixels
    pairs = [(kind, colour) for kind in shapes_dataset.KINDS for colour in shapes_dataset.COLOURS]
    targets = torch.zeros(num_images, len(pairs))
    for i, scene in enumerate(shapes_dataset.sample_scenes(range(num_images))):
        for shape in scene.shapes:
            targets[i, pairs.index((shape.kind, shape.colour))] = 1
    return images, targets


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, add noise of std 0 to 16; (B, 3, 32, 32) uint8."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    x = torch.where(mirrored, images.flip(3), images).float()
    x = x + torch.randn(x.shape, generator=generator) * 16 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return x.round().clamp(0, 255).to(torch.uint8)


def train(images: Tensor, targets: Tensor) -> ShapeFeatures:
    """Return the trained network in evaluation mode."""

    def loss(network: ShapeFeatures, indices: Tensor, generator: torch.Generator) -> Tensor:
        features = network(augment(images[indices], generator))
        logits = network.head(F.dropout(features, 0.1))
        # Smoothed targets bound the logits, and with them the features.
        smoothed = targets[indices] * 0.98 + 0.01
        return F.binary_cross_entropy_with_logits(logits, smoothed, reduction="sum") / len(indices)

    return classifier.train_classifier(ShapeFeatures, loss, len(images), EPOCHS)


@torch.no_grad()
def accuracy(network: ShapeFeatures, images: Tensor, targets: Tensor) -> float:
    """Return the share of images with all targets predicted correctly."""
    predicted = torch.cat([network.head(network(batch)) for batch in images.split(500)]) > 0
    return float((predicted == (targets > 0)).all(dim=1).double().mean())


def main() -> None:
    """Train, measure and write the network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, targets = load_images()
    network = train(images[:NUM_TRAIN], targets[:NUM_TRAIN])
    held_out_accuracy = accuracy(network, images[NUM_TRAIN:], targets[NUM_TRAIN:])
    train_accuracy = accuracy(network, images[:NUM_TRAIN], targets[:NUM_TRAIN])
    print(
        f"images with all targets correct: {held_out_accuracy:.2%} of {NUM_HELD_OUT} held out, "
        f"{train_accuracy:.2%} of training images"
    )
    metadata = {
        "name": ShapeFeatures.name,
        "held_out_accuracy": held_out_accuracy,
        "trained_on": f"shapes 0 to {NUM_TRAIN - 1} at 32x32",
        "seed": SEED,
        "epochs": EPOCHS,
        "versions": {"torch": torch.__version__, "numpy": numpy.__version__},
    }
    print(classifier.save_weights(network, metadata, out, torch.float16))


if __name__ == "__main__":
    main()
