"""Feature networks: their public files' names and shapes, on small random weights; against other implementations."""

import hashlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.encoders import save_randomized, write_full_clip
from helpers.feature_weights import (
    ScriptedInception,
    inception_state,
    lpips_states,
    random_images,
    write_scripted_inception,
    write_weights,
)
from PIL import Image
from transformers import CLIPModel, CLIPTokenizerFast, Dinov2Config, Dinov2Model

from gesso.data.encoders import hub
from gesso.errors import RunError, UsageError
from gesso.evaluation.networks import clip_dino, downloads, inception, lpips
from gesso.evaluation.networks.downloads import WeightFile


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            downloads.INCEPTION_FILES, "torch-fidelity", write_weights(inception_state(), folder, "inception.pth")
        )
        return inception.load_inception(folder)


# Of pictures (2, 3, 40, 56), by torch-fidelity 0.3.0 with the same state: features[:, :4], then logits_unbiased[:, :4].
FIDELITY = [
    [[0.00389, 0.0, 11.82767, 3.4243], [0.00493, 0.0, 12.32452, 3.70724]],
    [[-6.1936, 9.31662, -5.00108, 6.77665], [-6.45973, 9.68669, -5.43286, 7.1485]],
]


def test_inception_is_torch_fidelitys(network):
    features = network(random_images(40, 56))
    logits = features @ network.fc.weight.T
    assert features.shape == (2, 2048) and sum(p.numel() for p in network.parameters()) == 23_833_744
    torch.testing.assert_close(features[:, :4], torch.tensor(FIDELITY[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:, :4], torch.tensor(FIDELITY[1]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.probabilities(features), logits.softmax(dim=1))


@pytest.mark.parametrize("n", [1, 5, 8, 299, 400])
def test_resizing_takes_output_i_at_i_times_the_ratio(n):
    x = torch.rand(1, 1, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    resized, row = inception.resize_tf1(x, 299)[0, 0, :, 0], x[0, 0, :, 0].numpy()
    at = np.arange(299) * n / 299
    # Linear between the pixels, which stand at whole numbers; the last one reaches to the edge.
    assert np.allclose(resized.numpy(), np.interp(at, np.arange(n), row), atol=1e-12)


# Input of the first layer of pytorch-fid for an image of a formula: by channel at (0, 0), (150, 7), (298, 298) and
# (33, 201); then mean and mean square.
PYTORCH_FID = [
    [-1.0, -0.08061, 0.98431, 0.5883],
    [-0.58431, 0.21378, -0.60784, -0.50445],
    [-0.16863, 0.62947, -0.19216, -0.08876],
]
MOMENTS = [-0.005627529958515675, 0.1473143115099102]


def test_pytorch_fid_preprocessing(network, tmp_path, monkeypatch):
    y, x, c = np.mgrid[:40, :56, :3]
    image = torch.from_numpy(np.uint8((37 * x + 101 * y + 53 * c + 7 * x * y) % 256)).permute(2, 0, 1)[None]
    monkeypatch.setitem(
        downloads.INCEPTION_FILES, "pytorch-fid", write_weights(inception_state(), tmp_path, "inception.pth")
    )
    pytorch_fid = inception.load_inception(tmp_path, implementation="pytorch-fid")
    prepared = pytorch_fid.preprocess(image)
    at = prepared[0, :, [0, 150, 298, 33], [0, 7, 298, 201]]
    torch.testing.assert_close(at, torch.tensor(PYTORCH_FID), rtol=0, atol=2e-5)
    assert [float(prepared.mean()), float(prepared.square().mean())] == pytest.approx(MOMENTS, rel=1e-5)
    # The same network behind it, under another name; torch-fidelity's is TensorFlow 1's.
    assert all(
        torch.equal(a, b) for a, b in zip(pytorch_fid.state_dict().values(), network.state_dict().values(), strict=True)
    )
    assert (network.name, pytorch_fid.name) == ("inception-v3-2015-12-05", "inception-v3-2015-12-05 (pytorch-fid)")
    assert (
        network.preprocess is inception.preprocess_torch_fidelity
        and (network(image) - pytorch_fid(image)).abs().max() > 0.05
    )


def test_inception_reads_uint8_rgb_alone(network):
    for wrong in (random_images(8, 8).float(), random_images(8, 8)[:, :1], random_images(8, 8)[0]):
        with pytest.raises(UsageError, match="uint8 RGB"):
            network(wrong)


def test_nvidias_script_is_called_as_it_wants_to_be(tmp_path, monkeypatch):
    monkeypatch.setitem(downloads.INCEPTION_FILES, "nvidia", write_scripted_inception(tmp_path))
    network = inception.load_inception(tmp_path, implementation="nvidia")
    plain, x = ScriptedInception(), random_images(16, 24, 5)
    plain.load_state_dict(network.script.state_dict())
    torch.testing.assert_close(network(x), plain(x, return_features=True))
    torch.testing.assert_close(network.probabilities(network(x)), plain(x, no_output_bias=True))
    assert (plain(x, no_output_bias=True) - plain(x)).abs().max() > 1e-6
    assert network(x).shape == (5, 2048) and "nvidia" in network.name
    with pytest.raises(UsageError, match="uint8 RGB"):
        network(x.float())
    (tmp_path / "detector.pt").write_bytes(b"no script")
    with pytest.raises(RunError, match="is not the public file"):
        inception.load_inception(tmp_path, implementation="nvidia")


def test_a_weight_file_is_checked(tmp_path, monkeypatch):
    state = inception_state()
    file = write_weights(state, tmp_path, "a.pth")
    with pytest.raises(UsageError, match=r"needs b\.pth, but it is missing: download https://example\.org/b\.pth\nto "):
        downloads.load_tensors(file._replace(name="b.pth", url="https://example.org/b.pth"), tmp_path)
    with pytest.raises(RunError, match="is not the public file"):
        downloads.load_tensors(file._replace(sha256="00000000"), tmp_path)
    state.pop("Mixed_6a.branch3x3.bn.bias")
    monkeypatch.setitem(downloads.INCEPTION_FILES, "torch-fidelity", write_weights(state, tmp_path, "c.pth"))
    with pytest.raises(RunError, match=r"missing \['Mixed_6a\.branch3x3\.bias'"):
        inception.load_inception(tmp_path)
    (tmp_path / "d.pth").write_bytes(b"no weights")
    digest = hashlib.sha256(b"no weights").hexdigest()
    with pytest.raises(RunError, match="cannot be read"):
        downloads.load_tensors(WeightFile("d.pth", "", digest), tmp_path)


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_lpips_is_the_sum_of_distances_of_unit_features(name, tmp_path):
    trunk, heads = lpips_states(name)
    files = write_weights(trunk, tmp_path, "trunk.pth"), write_weights(heads, tmp_path, "heads.pth")
    net = lpips.load_lpips(name, tmp_path, weight_files=files)
    a, b = random_images(48, 40, 4).split(2)
    # The published networks: positions of the convolutions, their stride and padding, and the pools before them.
    layers = {
        "alex": {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)},
        "vgg": dict.fromkeys((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (1, 1)),
    }[name]
    pools = {"alex": {3: 3, 6: 3}, "vgg": dict.fromkeys((5, 10, 17, 24), 2)}[name]
    compared = {"alex": (0, 3, 6, 8, 10), "vgg": (2, 7, 14, 21, 28)}[name]

    def features(images):
        x = images.double() / 127.5 - 1
        x = torch.stack(
            [(x[:, c] - m) / s for c, (m, s) in enumerate(zip(lpips.SHIFT, lpips.SCALE, strict=True))], dim=1
        )
        actual = []
        for i, (stride, padding) in layers.items():
            x = F.max_pool2d(x, pools[i], 2) if i in pools else x
            weight, bias = trunk[f"features.{i}.weight"].double(), trunk[f"features.{i}.bias"].double()
            x = F.conv2d(x, weight, bias, stride, padding).clamp(min=0)
            if i in compared:
                actual.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return actual

    expected = torch.zeros(2, dtype=torch.float64)
    for i, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        head = heads[f"lin{i}.model.1.weight"][0, :, 0, 0].double()
        expected += torch.einsum("bchw,c->bhw", (x - y) ** 2, head).mean(dim=(1, 2))
    torch.testing.assert_close(net(a, b).double(), expected, rtol=1e-4, atol=1e-6)
    assert net(a, a).eq(0).all() and torch.allclose(net(a, b), net(b, a)) and float(net(a, b).min()) > 0.01


def test_lpips_refuses_what_it_cannot_compare(tmp_path):
    net = lpips.LPIPS(lpips.ALEXNET_LAYERS, "alex")
    with pytest.raises(UsageError, match="of one size"):
        net(random_images(40, 40), random_images(40, 48))
    with pytest.raises(UsageError, match="of 32x32 or more"):
        net(random_images(16, 16), random_images(16, 16))


def test_lpips_public_files_are_those_of_version_0_1():
    """Known by the whole digest; the others by what their publishers put into the names."""
    assert len(downloads.LPIPS_ALEX.sha256) == len(downloads.LPIPS_VGG.sha256) == 64
    assert all(
        f.sha256 in f.name for f in (downloads.INCEPTION_FILES["pytorch-fid"], downloads.ALEXNET, downloads.VGG16)
    )


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56)
    return save_randomized(Dinov2Model(Dinov2Config(**shape)), tmp_path_factory.mktemp("dino"))


def pil(images: torch.Tensor, size: int, pixels) -> torch.Tensor:
    """Resized by Pillow, channel by channel in floating point, then normalized."""
    channels = [Image.fromarray(c.numpy().astype(np.float32)) for c in images.flatten(0, 1)]
    resized = [np.asarray(c.resize((size, size), Image.Resampling.BICUBIC)) for c in channels]
    x = torch.from_numpy(np.stack(resized)).unflatten(0, images.shape[:2]) / 255
    return (x - torch.tensor(pixels[0])[:, None, None]) / torch.tensor(pixels[1])[:, None, None]


def slow_hub_positions(table: torch.Tensor, m: int, n: int) -> torch.Tensor:
    """Resize a position table (m^2, D) to (n^2, D) as the hub's model does.

    Pixel i of the new grid is taken at (i + 1/2) m / (n + .1) - 1/2, by Keys' kernel with a = -3/4, edges repeated.
    """

    def weights_at(i: int) -> torch.Tensor:
        at, row = (i + 0.5) * m / (n + 0.1) - 0.5, torch.zeros(m)
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            d, a = abs(at - j), -0.75
            w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            row[min(max(j, 0), m - 1)] += w
        return row

    matrix = torch.stack([weights_at(i) for i in range(n)])
    return torch.einsum("ia,jb,abd->ijd", matrix, matrix, table.reshape(m, m, -1)).reshape(n * n, -1)


def test_positions_of_dinov2_are_the_hubs():
    table = torch.randn(1, 1 + 37**2, 3, generator=torch.Generator().manual_seed(0))
    actual = clip_dino.resize_pos_embed(table, 16)
    torch.testing.assert_close(actual[0, 1:], slow_hub_positions(table[0, 1:], 37, 16), rtol=1e-4, atol=1e-4)
    assert torch.equal(actual[:, 0], table[:, 0]) and clip_dino.resize_pos_embed(table, 37) is table
    plain = F.interpolate(table[:, 1:].reshape(1, 37, 37, 3).permute(0, 3, 1, 2), (16, 16), mode="bicubic")
    assert (actual[0, 1:] - plain.permute(0, 2, 3, 1).reshape(256, 3)).abs().max() > 0.1


def test_dinov2_gives_the_class_token(dinov2):
    net, images = clip_dino.DINOv2(str(dinov2)), random_images(300, 260)
    with hub.quiet_logging("transformers"):
        library = Dinov2Model.from_pretrained(dinov2).eval().requires_grad_(False)
    # Positions as slow_hub_positions has them, in the place of the library's own.
    table = library.embeddings.position_embeddings
    table = torch.cat([table[:, :1], slow_hub_positions(table[0, 1:], 4, 16)[None]], dim=1)
    library.embeddings.position_embeddings = torch.nn.Parameter(table, False)
    expected = library(pixel_values=pil(images, 224, clip_dino.IMAGENET_MEAN_STD)).pooler_output
    assert net.num_features == 16 and net(images).shape == (2, 16) and float(expected.std()) > 0.1
    torch.testing.assert_close(net(images), expected, rtol=1e-3, atol=1e-3)


def test_clip_score_is_the_librarys(tmp_path):
    folder = write_full_clip(tmp_path)
    net, images, captions = clip_dino.CLIPScore(str(folder)), random_images(20, 20, 3), ["a cat", "the dog", "a cat"]
    with hub.quiet_logging("transformers"):
        library = CLIPModel.from_pretrained(folder).eval().requires_grad_(False)
    recorded = CLIPTokenizerFast.from_pretrained(folder)(captions, padding=True, return_tensors="pt")
    out = library(pixel_values=pil(images, 8, clip_dino.CLIP_MEAN_STD), **recorded)
    cosines = (out.image_embeds * out.text_embeds).sum(dim=1)
    actual = net(images, captions)
    torch.testing.assert_close(actual, 100 * cosines.clamp(min=0), rtol=1e-3, atol=1e-3)
    assert float(cosines.abs().min()) > 0.01
    # A caption has the same score beside longer ones, and in another batch.
    torch.testing.assert_close(net(images[:1], captions[:1]), actual[:1], rtol=1e-5, atol=1e-5)


def test_clip_images_are_the_librarys(tmp_path):
    folder = write_full_clip(tmp_path)
    net, images = clip_dino.CLIPImageFeatures(str(folder)), random_images(20, 20, 3)
    with hub.quiet_logging("transformers"):
        library = CLIPModel.from_pretrained(folder).eval().requires_grad_(False)
    pooled = library.vision_model(pixel_values=pil(images, 8, clip_dino.CLIP_MEAN_STD)).pooler_output
    expected = library.visual_projection(pooled)
    assert net.num_features == 10 and float((expected.norm(dim=1) - 1).abs().min()) > 0.01
    torch.testing.assert_close(net(images), expected, rtol=1e-3, atol=1e-3)


def test_another_model_is_refused(dinov2, tmp_path):
    with pytest.raises(UsageError, match="the model has type dinov2; it must be clip"):
        clip_dino.CLIPScore(str(dinov2))
    with pytest.raises(UsageError, match="DINOv2 nowhere: there is no such folder"):
        clip_dino.DINOv2("nowhere")
    with pytest.raises(UsageError, match="uint8 RGB"):
        clip_dino.DINOv2(str(dinov2))(random_images(30, 30)[:, :1])


def test_features_do_not_depend_on_the_batch(network, dinov2):
    images = random_images(64, 64, 5)
    for net in (network, clip_dino.DINOv2(str(dinov2))):
        single = torch.cat([net(images[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(net(images), single, rtol=1e-4, atol=1e-4)
