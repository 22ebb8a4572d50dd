"""Train the classifier of FashionFeatures and write gesso/evaluation/networks/fashion.safetensors.

    python tools/train_fashion_features.py data/fashion-mnist       # minutes on one CPU core

The network is trained on the 10,000 test images, and its accuracy is measured on the 60,000 training images. Record the
printed sha256 in gesso/evaluation/networks/toy_networks.py. Another torch version or CPU rounds differently and gives
another file of the same accuracy, which needs another `name`.
"""

import argparse
from pathlib import Path

import classifier
import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from gesso.data.sources.idx import IdxSource
from gesso.evaluation.networks import toy_networks
from gesso.evaluation.networks.toy_networks import FashionFeatures

OUT = Path(toy_networks.__file__).with_name(toy_networks.FASHION_FILE)
EPOCHS = 30


def load_images(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 28, 28) uint8 and labels (N,) of the split "train" or "t10k"."""
    source = IdxSource(str(folder / f"{split}-images-idx3-ubyte.gz"))
    return torch.from_numpy(source.pixels.copy())[:, None], torch.from_numpy(source.labels)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, shift by up to 2 pixels, scale by 0.85 to 1.15, add noise of std 0 to 16."""
    b, _, h, w = images.shape
    padded = F.pad(images, (2, 2, 2, 2))[:, 0]  # the background is 0
    dy, dx = torch.randint(0, 5, (2, b, 1, 1), generator=generator)
    x = padded[torch.arange(b)[:, None, None], torch.arange(h)[:, None] + dy, torch.arange(w) + dx].float()
    mirrored = torch.rand(b, 1, 1, generator=generator) < 0.5
    x = torch.where(mirrored, x.flip(2), x) * (0.85 + 0.3 * torch.rand(b, 1, 1, generator=generator))
    x = x + torch.randn(x.shape, generator=generator) * 16 * torch.rand(b, 1, 1, generator=generator)
    return x.round().clamp(0, 255).to(torch.uint8)[:, None]


def train(images: Tensor, labels: Tensor) -> FashionFeatures:
    """Return the trained network in evaluation mode."""

    def loss(network: FashionFeatures, indices: Tensor, generator: torch.Generator) -> Tensor:
        features = network(augment(images[indices], generator))
        logits = network.head(F.dropout(features, 0.2))
        return F.cross_entropy(logits, labels[indices], label_smoothing=0.05)

    return classifier.train_classifier(FashionFeatures, loss, len(images), EPOCHS)


@torch.no_grad()
def accuracy(network: FashionFeatures, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified correctly."""
    predicted = torch.cat([network.classify(batch)[1].argmax(dim=1) for batch in images.split(1000)])
    return float((predicted == labels).double().mean())


def main() -> None:
    """Train, measure and write the network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the four files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, labels = load_images(args.data, "t10k")
    network = train(images, labels)
    held_out_accuracy = accuracy(network, *load_images(args.data, "train"))
    print(f"accuracy {held_out_accuracy:.2%} of the 60,000 training images")
    print(f"accuracy {accuracy(network, images, labels):.2%} of the 10,000 test images, which it was trained on")
    metadata = {
        "name": FashionFeatures.name,
        "accuracy_of_training_images": held_out_accuracy,
        "trained_on": "the 10,000 test images of Fashion-MNIST",
        "seed": classifier.SEED,
        "epochs": EPOCHS,
        "versions": {"torch": torch.__version__, "numpy": numpy.__version__},
    }
    print(classifier.save_weights(network, metadata, args.out, torch.float16))


if __name__ == "__main__":
    main()
