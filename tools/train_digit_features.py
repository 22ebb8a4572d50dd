"""Make gesso/evaluation/networks/digits.safetensors: the classifier behind DigitFeatures.

python tools/train_digit_features.py        half a minute on one CPU core; held-out accuracy 99.7 %

First on 80 % of scikit-learn's digits, to measure accuracy on the other 20 %; then on all, for the file.
Prints the sha256 to record in gesso/evaluation/networks/toy_networks.py. Another torch or CPU rounds otherwise and gives
another file of the same accuracy, which needs another `name`: numbers from two files do not compare.
"""

import argparse
from pathlib import Path

import classifier
import numpy
import sklearn
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from gesso.evaluation.networks import toy_networks
from gesso.evaluation.networks.toy_networks import DigitFeatures

OUT = Path(toy_networks.__file__).with_name(toy_networks.DIGITS_FILE)
SEED, EPOCHS = classifier.SEED, 80
HELD_OUT = 0.2


def digits() -> tuple[Tensor, Tensor]:
    """uint8 (1797, 1, 8, 8), 0 to 255, and int64 (1797,)."""
    values, labels = load_digits(return_X_y=True)
    pixels = numpy.round(values * 255 / 16).astype(numpy.uint8).reshape(-1, 1, 8, 8)
    return torch.from_numpy(pixels), torch.from_numpy(labels.astype(numpy.int64))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by at most one pixel, scale the ink by 0.85 to 1.15, add noise of std 0 to 16. uint8 (B, 1, 8, 8)."""
    b = len(images)
    padded = F.pad(images, (1, 1, 1, 1))[:, 0]  # background is 0
    dy, dx = torch.randint(0, 3, (2, b, 1, 1), generator=generator)
    # Every second image stays where it is: the digits are centred, and so are those to be judged.
    still = torch.rand(b, 1, 1, generator=generator) < 0.5
    dy, dx = torch.where(still, 1, dy), torch.where(still, 1, dx)
    grid = torch.arange(8)
    x = padded[torch.arange(b)[:, None, None], grid[:, None] + dy, grid + dx].float()
    x = x * (0.85 + 0.3 * torch.rand(b, 1, 1, generator=generator))
    x = x + torch.randn(x.shape, generator=generator) * 16 * torch.rand(b, 1, 1, generator=generator)
    return x.round().clamp(0, 255).to(torch.uint8)[:, None]


def train(images: Tensor, labels: Tensor) -> DigitFeatures:
    """Train from the seed; returns the network in evaluation mode."""

    def loss(network: DigitFeatures, some: Tensor, generator: torch.Generator) -> Tensor:
        hidden = network(augment(images[some], generator))
        logits = network.head(F.dropout(hidden, 0.2))
        # Smoothed labels bound the logits, and with them the features.
        return F.cross_entropy(logits, labels[some], label_smoothing=0.05)

    return classifier.fitted(DigitFeatures, loss, len(images), EPOCHS)


@torch.no_grad()
def accuracy(network: DigitFeatures, images: Tensor, labels: Tensor) -> float:
    return float((network.classify(images)[1].argmax(dim=1) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, labels = digits()
    stored, held = train_test_split(numpy.arange(len(labels)), test_size=HELD_OUT, random_state=SEED, stratify=labels)
    held_out = accuracy(train(images[stored], labels[stored]), images[held], labels[held])
    print(f"held-out accuracy {held_out:.4%} of {len(held)} digits, trained on {len(stored)}", flush=True)
    network = train(images, labels)
    trained = accuracy(network, images, labels)
    print(f"accuracy of the shipped network {trained:.4%} of the {len(labels)} digits it was trained on")
    about = {
        "name": DigitFeatures.name,
        "held_out_accuracy": held_out,
        "train_accuracy": trained,
        "split": f"sklearn train_test_split, test_size={HELD_OUT}, stratified, random_state={SEED}; file trained on all",
        "seed": SEED,
        "epochs": EPOCHS,
        "versions": {"torch": torch.__version__, "scikit-learn": sklearn.__version__, "numpy": numpy.__version__},
    }
    print(classifier.written(network, about, out, torch.float32))


if __name__ == "__main__":
    main()
