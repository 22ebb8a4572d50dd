"""Caches: content against slow loops, resuming after any interruption, ranks, bad input, reading, command line.

Legend: N images, K views of each; C channels of pixels, c of latents.
"""

import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.encoders import write_vae
from helpers.images import portrait
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from gesso import atomic_io
from gesso import rng as keyed
from gesso.cli import app
from gesso.config import DataConfig, LatentConfig, SemanticConfig
from gesso.data import crops
from gesso.data.base import latent_channel_stats, pixel_channel_stats
from gesso.data.cache import encode, format, write
from gesso.data.cache.plan import FLAG_SETTINGS, CacheManifest, CachePlan, cache_command, parse_cache_args
from gesso.data.cache.read import CachedDataset
from gesso.data.encoders import face_blur, hub, text
from gesso.data.encoders.vae import VAE
from gesso.data.sources import open_source
from gesso.errors import RunError, StoppedError, UsageError


def plan(source, resolution=16, **settings) -> CachePlan:
    data = {"source": str(source), "resolution": resolution} | settings.pop("data", {})
    return CachePlan(data=DataConfig(**data), **settings)


def write_test_cache(out: Path, *arguments, **settings) -> CacheManifest:
    write.write_cache(plan(*arguments, **settings), out)
    return format.open_manifest(out)


def tree(out: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock"
    }


def rows(out: Path) -> dict[str, torch.Tensor]:
    """Return the rows of all files, one file after another."""
    parts = [load_file(out / "shards" / shard.name) for shard in format.open_manifest(out).files]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def refused(*arguments, kind=UsageError, **settings) -> str:
    with pytest.raises(kind) as error:
        write.write_cache(plan(*arguments[1:], **settings), arguments[0])
    assert "\n" not in str(error.value) or kind is RunError
    return str(error.value)


# What is written.


@pytest.mark.parametrize(
    "scale, flip, K, channels",
    [
        (None, False, 1, 3),
        (None, True, 2, 3),
        ((0.4, 0.6), True, 3, 3),
        ((0.9, 1.0), False, 2, 1),
        ((0.4, 1), True, 1, 1),
    ],
)
def test_views_against_one_picture_at_a_time(scale, flip, K, channels, photos, tmp_path):
    manifest = write_test_cache(
        tmp_path / "o",
        photos,
        data={"crop_scale": scale, "flip": flip, "channels": channels},
        views=K,
        images_per_shard=7,
        seed=4,
    )
    actual = rows(tmp_path / "o")
    paths = sorted(photos.glob("*/*.png"))
    assert [shard.rows for shard in manifest.files] == [7, 7, 2] and manifest.num_images == len(paths) == 16
    assert actual["pixels"].shape == (16, K, channels, 16, 16) and actual["index"].tolist() == list(range(16))
    low, high = scale or (1, 1)
    for i, path in enumerate(paths):
        picture = Image.open(path).convert("RGB" if channels == 3 else "L")
        width, height = picture.size
        first = None
        for v in range(K):
            u = keyed.uniform(4, torch.tensor([i]), f"view {v}", 4)[0].tolist()
            side = min(width, height) * (low + (high - low) * u[0]) ** 0.5
            top, left = (height - side) * (u[1] if scale else 0.5), (width - side) * (u[2] if scale else 0.5)
            first = u[3] < 0.5 if first is None else first
            mirrored = flip and (first if v % 2 == 0 else not first)
            crop = picture.resize((16, 16), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
            due = np.asarray(crop).reshape(16, 16, channels).transpose(2, 0, 1).astype(int)
            due = due[:, :, ::-1] if mirrored else due
            assert np.abs(actual["pixels"][i, v].numpy().astype(int) - due).max() <= 1
            box = torch.tensor([top / height, left / width, (top + side) / height, (left + side) / width])
            torch.testing.assert_close(actual["box"][i, v], box, atol=1e-6, rtol=0)
            assert bool(actual["flip"][i, v]) == mirrored
        torch.testing.assert_close(
            actual["tone"][i], crops.compute_pixel_stats(actual["pixels"][i]), atol=1e-3, rtol=1e-5
        )
        assert actual["size"][i].tolist() == [height, width] and int(actual["label"][i]) == (path.parent.name == "wide")
    if flip and K > 1:
        assert actual["flip"].float().mean(1).sub(0.5).abs().max() < 0.2
    mean, std = pixel_channel_stats(actual["pixels"].flatten(0, 1))
    torch.testing.assert_close(torch.tensor(manifest.mean, dtype=torch.float64), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.tensor(manifest.std, dtype=torch.float64), std, rtol=1e-10, atol=0)
    assert manifest.class_names == ("tall", "wide") and (manifest.num_faces, manifest.unreadable) == (0, ())


def test_the_first_views_are_the_same_for_any_number(photos, tmp_path):
    data = {"crop_scale": (0.4, 1), "flip": True}
    for K in (1, 2, 5):
        write_test_cache(tmp_path / str(K), photos, data=data, views=K)
    most = rows(tmp_path / "5")
    for K in (1, 2):
        few = rows(tmp_path / str(K))
        for name in ("pixels", "box", "flip", "tone"):
            assert few[name].equal(most[name][:, :K]), name
    assert 0 < most["flip"][:, 0].sum() < 16 and not most["pixels"][:, 0].equal(most["pixels"][:, 1])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("convention", ["dit", "edm2"])
def test_moments_are_the_vaes(dtype, convention, vae, photos, tmp_path):
    manifest = write_test_cache(
        tmp_path / "o", photos, data={"flip": True}, views=2, dtype=dtype, batch_size=5, images_per_shard=6,
        latent=LatentConfig(vae=str(vae), convention=convention),
    )  # fmt: skip
    write_test_cache(tmp_path / "p", photos, data={"flip": True}, views=2)
    pixels, moments = rows(tmp_path / "p")["pixels"].flatten(0, 1), rows(tmp_path / "o")["moments"]
    assert moments.dtype == getattr(torch, dtype) and moments.shape == (16, 2, 8, 2, 2)
    opened = VAE(str(vae), convention=convention)
    due = []
    for start in (0, 12, 24):  # ranges of 6 images of 2 views, passes of 5 views
        batch = pixels[start : start + 12]
        for part in batch.split(5):
            filled = torch.cat([part, torch.zeros(5 - len(part), 3, 16, 16, dtype=torch.uint8)])
            due.append(torch.cat(opened.encode(filled), dim=1)[: len(part)])
    due = torch.cat(due)
    assert moments.flatten(0, 1).equal(due.to(moments.dtype))
    single = torch.cat([torch.cat(opened.encode(one[None]), dim=1) for one in pixels])
    torch.testing.assert_close(due, single, rtol=1e-4, atol=1e-5)
    mean, std = latent_channel_stats(moments.flatten(0, 1))
    torch.testing.assert_close(torch.tensor(manifest.mean, dtype=torch.float64), mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.tensor(manifest.std, dtype=torch.float64), std, rtol=1e-10, atol=0)
    assert manifest.vae["weights"] == opened.identity()["weights"] and manifest.vae["convention"] == convention


@pytest.mark.parametrize("encoder", ["words", "clip"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tokens_are_the_encoders(encoder, dtype, clip, photos, tmp_path):
    captions = ["", "a red cat", "the seven", "a", "a " * 30, "é ✓", " \n", "red"]
    folder = captioned(tmp_path / "s", photos, captions)
    semantic = SemanticConfig(kind="text", encoder="words" if encoder == "words" else str(clip), max_tokens=8)
    write_test_cache(tmp_path / "o", folder, semantic=semantic, dtype=dtype, images_per_shard=3)
    cache = CachedDataset(tmp_path / "o")
    index = torch.tensor([4, 0, 7, 5, 3, 2, 1, 6])
    assert list(cache.captions) == [c.strip() for c in captions]
    due = text.build_text_encoder(semantic)([cache.captions[i] for i in index.tolist()])
    received = cache.get(index, index).encoded_text
    assert received.lengths.equal(due.lengths) and received.tokens.dtype == torch.float32
    stored = getattr(torch, dtype)
    assert received.tokens.equal(due.tokens.to(stored).float()) and received.pooled.equal(due.pooled.to(stored).float())
    remaining = rows(tmp_path / "o")
    assert remaining["tokens"].shape[0] == int(due.lengths.sum()) < 8 * 8, "only real tokens are stored"
    assert cache.manifest.text_encoder == text.build_text_encoder(semantic).identity()
    assert (cache.text_config.encoder, cache.text_config.max_tokens) == (semantic.encoder, semantic.max_tokens)
    assert cache.text_config.embed_dim == due.tokens.shape[2] and cache.text_config.pooled_dim == due.pooled.shape[1]


def captioned(folder: Path, photos: Path, captions: list[str | bytes]) -> Path:
    folder.mkdir()
    for i, (caption, path) in enumerate(zip(captions, sorted(photos.glob("*/*.png")), strict=False)):
        (folder / f"{i}.png").write_bytes(path.read_bytes())
        (folder / f"{i}.txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    return folder


def test_latents_of_a_zip_stay_as_they_are(latent_zip, tmp_path):
    path, moments = latent_zip
    latent = LatentConfig(vae="some/name", convention="edm2")
    manifest = write_test_cache(tmp_path / "o", path, 16, latent=latent, images_per_shard=5)
    actual = rows(tmp_path / "o")
    assert actual["moments"].dtype == torch.float32 and actual["moments"][:, 0].equal(moments)
    assert actual["label"].tolist() == [i % 3 for i in range(12)] and actual["size"].unique().tolist() == [16]
    assert (manifest.plan.latent.channels, manifest.plan.latent.downsample_factor, manifest.plan.dtype) == (
        4,
        8,
        "float32",
    )
    assert manifest.vae == {"vae": "some/name", "convention": "edm2", "channels": 4, "downsample_factor": 8}
    mean, std = CachedDataset(tmp_path / "o").channel_stats()
    torch.testing.assert_close((mean, std), latent_channel_stats(moments))
    assert format.verify_cache(tmp_path / "o") == []


def test_what_latents_cannot_do(latent_zip, tmp_path):
    path, latent, o = latent_zip[0], LatentConfig(vae="some/name", convention="edm2"), tmp_path / "o"
    for missing in (LatentConfig(), LatentConfig(vae="some/name")):
        assert "add --convention edm2 and the --vae that encoded them" in refused(o, path, latent=missing)
    for flag, more in (
        ("--flip", {"data": {"flip": True}}), ("--crop-scale", {"data": {"crop_scale": (0.4, 1)}}),
        ("--blur-faces", {"blur_faces": True}), ("--views", {"data": {"flip": True}, "views": 2}),
    ):  # fmt: skip
        output = refused(o, path, latent=latent, **more)
        assert f"remove {flag}" in output or (flag == "--views" and "--flip" in output)
    assert "of 2x2: --resolution 15 must be a multiple" in refused(o, path, 15, latent=latent)


def test_odd_latents_are_left_out(latent_zip, tmp_path):
    import io

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, zipfile.ZipFile(latent_zip[0]) as old:
        for i, name in enumerate(n for n in old.namelist() if n.endswith("npy")):
            raw = io.BytesIO()
            np.save(raw, np.ones((8, 2, 4), np.float32))
            archive.writestr(name, raw.getvalue() if i == 3 else b"short" if i == 0 else old.read(name))
    latent = LatentConfig(vae="some/name", convention="edm2")
    manifest = write_test_cache(tmp_path / "o", tmp_path / "a.zip", data={"max_unreadable": 0.2}, latent=latent)
    assert manifest.num_images == 10 and "shape (8, 2, 4)" in manifest.unreadable[1][1]


def test_faces_are_blurred_before_anything_else(tmp_path):
    (tmp_path / "s").mkdir()
    portrait().save(tmp_path / "s" / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "s" / "b.png")
    manifest = write_test_cache(tmp_path / "o", tmp_path / "s", 64, blur_faces=True)
    blurred, count = face_blur.blur_faces(portrait())
    assert manifest.num_faces == count == 1
    due = crops.crop_resize(blurred, crops.center_view(blurred.height, blurred.width), 64, 64)
    assert np.array_equal(rows(tmp_path / "o")["pixels"][0, 0].numpy(), due)


def test_buckets(photos, vae, tmp_path):
    """Wide images are 2:1, tall ones 8:5."""
    o = tmp_path / "o"
    manifest = write_test_cache(
        o, photos, 32, data={"crop_scale": (0.5, 1), "flip": True}, views=2, buckets=5, bucket_multiple=8,
        images_per_shard=9,
        latent=LatentConfig(vae=str(vae)), batch_size=3,
    )  # fmt: skip
    sizes = manifest.plan.bucket_sizes()
    assert sizes[2] == (32, 32) and all(a[::-1] == b for a, b in zip(sizes, reversed(sizes), strict=True))
    assert all(h % 8 == w % 8 == 0 and 16 <= h <= 64 and 16 <= w <= 64 for h, w in sizes)
    cache = CachedDataset(o, 3)
    assert cache.buckets == sizes and len(cache) == 16 and format.verify_cache(o) == []
    pixels_only = tmp_path / "p"
    write_test_cache(
        pixels_only, photos, 32, data={"crop_scale": (0.5, 1), "flip": True}, views=2, buckets=5, bucket_multiple=8
    )
    plain, opened = CachedDataset(pixels_only, 3), VAE(str(vae))
    for bucket in np.unique(cache.bucket_of).tolist():
        index = torch.from_numpy(np.flatnonzero(cache.bucket_of == bucket))
        samples, H, W = cache.get(index, index), *sizes[bucket]
        assert samples.x.shape[1:] == (8, H // 8, W // 8)
        for h, w in samples.original_sizes.tolist():
            distance = [abs(np.log(w / h) - np.log(s[1] / s[0])) for s in sizes]
            assert distance[bucket] == min(distance)
        shape = (samples.crop_boxes[:, 3] - samples.crop_boxes[:, 1]) * samples.original_sizes[:, 1]
        torch.testing.assert_close(
            shape / ((samples.crop_boxes[:, 2] - samples.crop_boxes[:, 0]) * samples.original_sizes[:, 0]),
            torch.full((len(index),), W / H),
        )
        same = torch.from_numpy(np.flatnonzero(plain.bucket_of == bucket))
        x = plain.get(same, index).x
        assert x.shape[1:] == (3, H, W)
        torch.testing.assert_close(samples.x.float(), torch.cat(opened.encode(x), dim=1), rtol=2e-3, atol=2e-3)
    assert len(set(cache.bucket_of.tolist())) == 2
    with pytest.raises(AssertionError, match="one bucket"):
        cache.get(torch.arange(16), torch.arange(16))


# Going on.

DRIVER = '''
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from gesso.data.cache.plan import CachePlan
from gesso.data.cache import write
plan, out, how = CachePlan.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]

def dying(step):
    # Killed right before that change of the disk.
    count = 0
    def wrap(function):
        def wrapped(*arguments, **more):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)
        return wrapped
    os.replace, os.fsync, os.unlink = wrap(os.replace), wrap(os.fsync), wrap(os.unlink)
    Path.unlink = wrap(Path.unlink)
    write.save_file = wrap(write.save_file)

def child(step, seconds):
    """Whether it was killed."""
    pid = os.fork()
    if pid == 0:
        if step is not None:
            dying(step)
        write.write_cache(plan, out)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert status == 0 or os.WIFSIGNALED(status), status
    return status != 0

def tree():
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}

kills, rng = 0, random.Random(0)
if how == "steps":
    child(None, None)
    whole = tree()
    shutil.rmtree(out)
    while child(kills + 1, None):
        assert not child(None, None) and tree() == whole, kills
        shutil.rmtree(out)
        kills += 1
else:
    while child(None, rng.uniform(0, 0.05 + 0.02 * kills)):
        kills += 1
print(kills)
'''


def run_with_kills(tree: dict, out: Path, how: str) -> int:
    """Return how often the process was killed."""
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(tree), str(out), how], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.split()[-1])


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def test_what_was_left_half_written_is_swept(tmp_path):
    """Temporary files of gesso and of safetensors are removed, and nothing else."""
    for name in (".a.safetensors.7.tmp", ".tmpLS5Nmd", "a.safetensors", ".lock", ".tmp", "b.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / ".b.tmp").mkdir()
    atomic_io.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", ".lock", ".tmp", "b.tmp"}


@pytest.mark.parametrize("how", ["steps", "times"])
def test_killed_at_any_instant_and_gone_on_with(how, photos, tmp_path):
    """Kill by SIGKILL, before each change of the disk, and at random times."""
    settings = dict(data={"crop_scale": (0.4, 1), "flip": True}, views=2, images_per_shard=2)
    folder = captioned(tmp_path / "s", photos, ["a"] * 4)
    if how == "times":
        folder, settings = photos, settings | {"buckets": 3, "bucket_multiple": 4, "images_per_shard": 3}
    write_test_cache(tmp_path / "whole", folder, **settings)
    requested = plan(folder, **settings)
    kills = run_with_kills(requested.model_dump(mode="json"), tmp_path / "o", how)
    assert kills > 25 or how == "times"  # a busy machine may be killed less often
    assert tree(tmp_path / "o") == tree(tmp_path / "whole")
    assert {p.name for p in (tmp_path / "o").iterdir()} == {".lock", "manifest.json", "shards"}
    assert format.verify_cache(tmp_path / "o") == []


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


RANKS = """
import json, os, sys
from pathlib import Path
from diffusers import AutoencoderKL
from torch import distributed
from gesso.data.cache.plan import CachePlan
from gesso.data.cache import write
for world, port in ((2, sys.argv[3]), (3, sys.argv[4])):
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
            plan, seen = CachePlan.model_validate(json.loads(sys.argv[1])), []
            out = Path(sys.argv[2]) / str(world)
            lines = write.write_cache(plan, out, progress=lambda done, total: seen.append(done))
            assert bool(lines) == bool(seen) == (rank == 0), "one rank speaks"
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
"""


def test_any_number_of_ranks_writes_the_same_bytes(vae, photos, tmp_path):
    semantic = SemanticConfig(kind="text", max_tokens=4)
    settings = dict(
        data={"crop_scale": (0.4, 1)},
        views=2,
        images_per_shard=3,
        batch_size=4,
        latent=LatentConfig(vae=str(vae)),
        semantic=semantic,
    )
    write_test_cache(tmp_path / "1", photos, **settings)
    requested = json.dumps(plan(photos, **settings).model_dump(mode="json"))
    ran = subprocess.run(
        [sys.executable, "-c", RANKS, requested, tmp_path, free_port(), free_port()],
        capture_output=True, text=True, env=ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "3")
    assert len(list((tmp_path / "3" / "shards").glob("shard-*.safetensors"))) == 6


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_stops_it_and_the_same_call_goes_on(number, vae, photos, tmp_path):
    settings = dict(data={"flip": True}, views=2, images_per_shard=5, batch_size=4, latent=LatentConfig(vae=str(vae)))
    write_test_cache(tmp_path / "whole", photos, **settings)
    caught, seen = [], []

    def progress(done, total):
        seen.append((done, total))
        if len(seen) == 8:
            caught.append(number)

    with pytest.raises(
        StoppedError, match=rf"stopped after 8 of 16 images\. Continue with\n  gesso cache {photos}"
    ) as stopped:
        write.write_cache(plan(photos, **settings), tmp_path / "o", progress=progress, received_signals=caught)
    assert stopped.value.exit_code == 128 + number and seen[-1] == (8, 16)
    with pytest.raises(UsageError, match=r"is incomplete; continue with\n  gesso cache"):
        CachedDataset(tmp_path / "o")
    caught.clear()
    write.write_cache(plan(photos, **settings), tmp_path / "o", progress=progress)
    assert seen[8:] == [(i, 16) for i in range(6, 17)], "the first range was done"
    assert tree(tmp_path / "o") == tree(tmp_path / "whole")


def test_a_signal_on_the_command_line(tmp_path):
    command_line = [
        sys.executable,
        "-m",
        "gesso",
        "cache",
        "digits",
        "o",
        "--resolution",
        "512",
        "--images-per-shard",
        "8",
    ]
    with subprocess.Popen(command_line, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as running:
        while not list(tmp_path.glob("o/shards/*.json")):
            assert running.poll() is None
        with (
            pytest.raises(UsageError, match="another process is writing"),
            atomic_io.lock_dir(tmp_path / "o", "writing"),
        ):
            pass
        running.send_signal(15)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 143 and "Traceback" not in err
    assert (
        "gesso: SIGTERM: " in err
        and "Continue with\n  gesso cache digits o --resolution 512 --images-per-shard 8\n" in err
    )


def test_another_plan_is_refused_and_says_what_differs(photos, tmp_path):
    o = tmp_path / "o"
    before = write_test_cache(o, photos, data={"flip": True}, views=2)
    for more, output in (
        ({"data": {"flip": True}, "views": 1}, "views: 2 stored, 1 now"),
        ({"data": {"flip": False}}, "data.flip: True stored, False now"),
        ({"data": {"flip": True}, "views": 2, "seed": 1}, "seed: 0 stored, 1 now"),
    ):
        with pytest.raises(UsageError, match="made with different settings") as error:
            write.write_cache(plan(photos, **more), o)
        assert output in str(error.value) and cache_command(before.plan, o) in str(error.value)
    write_test_cache(o, photos, data={"flip": True, "max_unreadable": 0.5}, views=2)  # decides nothing
    (o / "plan.json").write_text(
        json.dumps(write.CacheHeader(plan=before.plan, source_fingerprint="0", num_source_images=16).model_dump())
    )
    (o / "manifest.json").unlink()
    with pytest.raises(UsageError, match="source_fingerprint: '0' stored"):
        write.write_cache(plan(photos, data={"flip": True}, views=2), o)


def test_changed_images_are_another_source(photos, tmp_path):
    folder = captioned(tmp_path / "s", photos, ["a"] * 5)
    write_test_cache(tmp_path / "o", folder)
    (folder / "2.txt").write_text("b")
    with pytest.raises(UsageError, match="source_fingerprint: "):
        write_test_cache(tmp_path / "o", folder)


def test_replaced_images_are_another_source(tmp_path):
    """Names and sizes of the files agree. A cache that was written without the hash of their bytes is accepted."""
    folder = tmp_path / "s"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (i, 50, 99)).save(folder / f"{i}.bmp")
    manifest = write_test_cache(tmp_path / "o", folder)
    assert manifest.source_content
    Image.new("RGB", (16, 16), (200, 50, 99)).save(folder / "1.bmp")
    with pytest.raises(UsageError, match="source_content: "):
        write_test_cache(tmp_path / "o", folder)
    path = tmp_path / "o" / "manifest.json"
    path.write_text(path.read_text().replace(f'"{manifest.source_content}"', "null"))
    write_test_cache(tmp_path / "o", folder)


def test_deleted_shards_are_rewritten(photos, tmp_path):
    o = tmp_path / "o"
    write_test_cache(o, photos, images_per_shard=4)
    before = tree(o)
    times = {p: p.stat().st_mtime_ns for p in o.rglob("shard-*.safetensors")}
    doomed = o / "shards" / "shard-000002.safetensors"
    doomed.unlink()
    with pytest.raises(
        UsageError, match=r"shard-000002\.safetensors cannot be read .*run gesso cache --check .* to see how to repair"
    ):
        CachedDataset(o)
    write_test_cache(o, photos, images_per_shard=4)
    assert tree(o) == before
    assert [p.name for p, time in times.items() if p.stat().st_mtime_ns != time] == [doomed.name]


# The disk and the place.


FULL = """
import json, resource, sys
from pathlib import Path
from gesso.data.cache.plan import CachePlan
from gesso.data.cache import write
from gesso.errors import RunError
plan, out = CachePlan.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    write.write_cache(plan, out)
except RunError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(sorted(path.name for path in (out / "shards").iterdir()))
write.write_cache(plan, out)
"""


def test_a_full_disk(photos, tmp_path):
    write_test_cache(tmp_path / "whole", photos, images_per_shard=6)
    requested = json.dumps(plan(photos, images_per_shard=6).model_dump(mode="json"))
    ran = subprocess.run(
        [sys.executable, "-c", FULL, requested, tmp_path / "o", "3000"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert ran.returncode == 0, ran.stderr
    assert "no space left to write" in ran.stdout and "else with the same command" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "[]"
    assert tree(tmp_path / "o") == tree(tmp_path / "whole")


def test_a_disk_that_fills_up_on_the_way(photos, tmp_path, monkeypatch):
    write_test_cache(tmp_path / "whole", photos, images_per_shard=6)

    def full(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if int(tensors["index"][0]):
            os.truncate(path, 500)
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"no space left .*shard-000001"):
        patch.setattr(write, "save_file", full)
        write_test_cache(tmp_path / "o", photos, images_per_shard=6)
    assert {p.name for p in (tmp_path / "o" / "shards").iterdir()} == {
        "shard-000000.json",
        "shard-000000.safetensors",
    }
    write_test_cache(tmp_path / "o", photos, images_per_shard=6)
    assert tree(tmp_path / "o") == tree(tmp_path / "whole")


def test_places_that_will_not_do(photos, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.tex").touch()
    assert "contains other files (thesis.tex); choose another folder" in refused(tmp_path / "o", photos)
    assert "is inside the source" in refused(photos / "wide" / "cache", photos)
    assert not (photos / "wide" / "cache").exists()
    (tmp_path / "file").touch()
    assert "cannot write" in refused(tmp_path / "file", photos, kind=RunError)
    with atomic_io.lock_dir(tmp_path / "p"):
        assert "another process is writing" in refused(tmp_path / "p", photos)


# Bad input.


def write_broken_images(root: Path, photos: Path) -> Path:
    """Write 12 images, of which 5 cannot be read."""
    root.mkdir()
    full = sorted(photos.glob("*/*.png"))
    for i in range(12):
        (root / f"{i:02d}.png").write_bytes(full[i].read_bytes())
    (root / "01.png").write_bytes(b"")
    (root / "04.png").write_bytes(full[4].read_bytes()[:100])
    (root / "05.png").write_bytes(b"not an image")
    (root / "06.png").write_bytes(b"P6 60000 60000 255\n")
    return root


def test_unreadable_images_are_counted_and_listed(photos, tmp_path):
    folder, o = write_broken_images(tmp_path / "s", photos), tmp_path / "o"
    output = refused(o, folder, data={"max_unreadable": 0.1}, images_per_shard=4, kind=RunError)
    assert f"4 of 12 images in {folder} are unreadable, over the 10.0% of data.max_unreadable" in output
    assert not (o / "shards" / "shard-000002.json").exists(), "it gives up where the share is passed"
    assert "01.png (the file is empty)" in output and not (o / "manifest.json").exists()
    manifest = write_test_cache(o, folder, data={"max_unreadable": 0.4}, images_per_shard=4)
    assert [name for name, _ in manifest.unreadable] == ["01.png", "04.png", "05.png", "06.png"]
    assert "decompression bomb" in manifest.unreadable[3][1] and manifest.num_images == 8
    assert rows(o)["index"].tolist() == [0, 2, 3, 7, 8, 9, 10, 11]
    cache = CachedDataset(o)
    assert cache.unreadable == list(manifest.unreadable) and len(cache) == 8 and format.verify_cache(o) == []
    samples = cache.get(torch.arange(8), torch.arange(8))
    write_test_cache(tmp_path / "all", photos)
    stored = rows(tmp_path / "all")["pixels"][[0, 2, 3, 7, 8, 9, 10, 11], 0]
    assert samples.x.equal(stored) and samples.indices.tolist() == list(range(8))


def test_ranges_without_a_readable_image(photos, tmp_path):
    folder = write_broken_images(tmp_path / "s", photos)
    manifest = write_test_cache(tmp_path / "o", folder, data={"max_unreadable": 0.4}, images_per_shard=1)
    assert len(manifest.files) == 8 and len(list((tmp_path / "o" / "shards").glob("*.json"))) == 12
    assert len(CachedDataset(tmp_path / "o")) == 8 and format.verify_cache(tmp_path / "o") == []
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    assert "can be read" in refused(tmp_path / "p", folder, data={"max_unreadable": 1}, kind=RunError)


def test_odd_names_and_captions(photos, tmp_path):
    image = next(photos.glob("*/*.png")).read_bytes()
    folder = tmp_path / "s"
    odd = ["a b", "ünï✓", "'\"$(x)", "-flag", "line\nbreak", "[red]"]
    for i, name in enumerate(odd):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name} {i}.png").write_bytes(image)
        (folder / name / f"{name} {i}.txt").write_bytes(
            [b"caf\xe9", b"", "✓ é".encode(), b"\xff\xfe", b"x" * 70_000, b"a"][i]
        )
    (Path(os.fsdecode(bytes(folder) + b"/[red]/bad \xff.png"))).write_bytes(b"")
    manifest = write_test_cache(tmp_path / "o", folder, data={"max_unreadable": 0.5}, images_per_shard=2)
    cache, source = CachedDataset(tmp_path / "o"), open_source(str(folder))
    order = [i for i in range(7) if "bad" not in source.name(i)]
    assert list(cache.captions) == [source.captions()[i] for i in order] and cache.class_names == source.class_names
    assert sorted(cache.class_names) == sorted(odd) and "bad \\udcff.png" in manifest.unreadable[0][0]
    assert cache.captions[-1] == list(cache.captions)[5] and cache.captions[1:5:2] == list(cache.captions)[1:5:2]
    with pytest.raises(IndexError):
        cache.captions[6]
    assert format.verify_cache(tmp_path / "o") == []


def test_vaes_that_do_not_fit(vae, photos, tmp_path):
    o, vae_16 = tmp_path / "o", write_vae(tmp_path / "16", 16)
    grey = write_vae(tmp_path / "grey", 4, in_channels=1, out_channels=1)
    assert "needs multiples of 8 pixels, not 20x20" in refused(o, photos, 20, latent=LatentConfig(vae=str(vae)))
    assert "use dit" in refused(o, photos, latent=LatentConfig(vae=str(vae_16), convention="edm2"))
    assert "it maps 1 channels to 1, but RGB has 3" in refused(o, photos, latent=LatentConfig(vae=str(grey)))
    assert "latent.channels=3, but --vae" in refused(o, photos, latent=LatentConfig(vae=str(vae), channels=3))
    assert "there is no such folder" in refused(o, photos, latent=LatentConfig(vae="no-where"))
    assert "--text: " in refused(o, captioned(tmp_path / "s", photos, [""] * 3), semantic=SemanticConfig(kind="text"))
    assert not o.exists(), "nothing was started"
    manifest = write_test_cache(o, photos, latent=LatentConfig(vae=str(vae_16)))
    assert (
        manifest.files[0].shape == (16, 1, 32, 2, 2)
        and CachedDataset(o).implied_settings(None)["latent"]["channels"] == 16
    )


def test_numbers_that_do_not_fit_into_float16(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(
        VAE, "encode", lambda self, x: (torch.full((len(x), 4, 2, 2), 1e6), torch.ones(len(x), 4, 2, 2))
    )
    latent = LatentConfig(vae=str(write_vae(tmp_path / "v", 4)))
    assert "1e+06 exceed the range of float16: add --dtype float32" in refused(
        tmp_path / "o", photos, latent=latent, kind=RunError
    )
    write_test_cache(tmp_path / "p", photos, latent=latent, dtype="float32")


def edit_manifest(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_manifests_that_are_not_trusted(photos, tmp_path):
    o = tmp_path / "o"
    manifest = write_test_cache(o, photos)
    path = o / "manifest.json"
    good = path.read_text()
    recorded = json.loads(good)
    (shard,) = recorded["files"]
    for changes, output in (
        ({"format": "gesso cache 2"}, "has the format gesso cache 2, but this version of gesso reads gesso cache 1"),
        ({"format": None}, "has the format None"),
        (
            {"files": [shard | {"name": "../../secret.safetensors"}]},
            r"names the file '\.\./\.\./secret\S+, which is unsafe",
        ),
        ({"files": [shard | {"name": "/etc/passwd"}]}, "unsafe"),
        ({"files": [shard | {"name": "shard-000000.safetensors/../x"}]}, "unsafe"),
        ({"files": [shard | {"name": "shard-000000.safetensors\n"}]}, "unsafe"),
        ({"files": [shard | {"rows": -1}]}, "damaged: files.0.rows"),
        ({"files": [shard | {"rows": 2}]}, "num_images differs from the sum"),
        ({"files": [shard | {"shape": [16, 1, 3, 8, 8]}]}, "contradicts its plan"),
        ({"files": [shard | {"height": 10**9}]}, "contradicts its plan"),
        ({"num_images": 10**9, "files": [shard | {"rows": 10**9}]}, "contradicts its plan"),
        ({"files": "none"}, "damaged: files"),
        ({"mean": [float("inf")]}, "damaged: mean"),
        ({"more": 1}, "damaged: more"),
        ({"plan": {}}, "its plan is incomplete"),
        ({"plan": recorded["plan"] | {"semantic": {"kind": "text"}}}, "its plan is incomplete"),
        (
            {"plan": recorded["plan"] | {"semantic": {"kind": "text", "embed_dim": 4, "pooled_dim": 4}}},
            "its plan is incomplete",
        ),
        ({"plan": recorded["plan"] | {"views": 2, "data": {"flip": True, "resolution": 16}}}, "contradicts its plan"),
    ):
        path.write_text(good)
        edit_manifest(path, **changes)
        with pytest.raises(UsageError, match=output) as error:
            CachedDataset(o)
        assert "\n" not in str(error.value)
    for raw in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null", b'{"format": "gesso cache 1"}'):
        path.write_bytes(raw)
        with pytest.raises(UsageError, match=r"manifest\.json"):
            CachedDataset(o)
    path.unlink()
    with pytest.raises(UsageError, match="is not a cache: it has no manifest"):
        CachedDataset(o)
    assert manifest.num_images == 16


@pytest.mark.parametrize("name", ["manifest.json", "shards/shard-000000.safetensors"])
def test_random_damage_is_one_line(name, photos, tmp_path):
    """Damage in the header of a shard is one line; damage behind it has no effect on opening."""
    write_test_cache(tmp_path / "o", photos, semantic=SemanticConfig(kind="text", max_tokens=3))
    path, rng = tmp_path / "o" / name, np.random.default_rng(0)
    good = path.read_bytes()
    end, refused = len(good) if name.endswith("json") else 8 + int.from_bytes(good[:8], "little"), 0
    for _ in range(300):
        raw = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            raw[rng.integers(end)] = rng.choice(list(b'0123456789,:[]{}"\xff\x00az'))
        path.write_bytes(raw)
        try:
            CachedDataset(tmp_path / "o").get(torch.arange(2), torch.arange(2))
        except UsageError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 150


def write_modified_shard(path: Path, manifest: Path, **changes: torch.Tensor | None) -> None:
    """Write a file with other tensors, with its size and checksum in the manifest."""
    tensors = load_file(path) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path, {"format": "gesso cache 1"})
    recorded = json.loads(manifest.read_text())
    for shard in recorded["files"]:
        if shard["name"] == path.name:
            shard |= {"bytes": path.stat().st_size, "sha256": hub.sha256_files([path])}
    recorded["fingerprint"] = format.files_fingerprint([format.ShardFile(**shard) for shard in recorded["files"]])
    manifest.write_text(json.dumps(recorded))


def test_shards_that_are_not_what_they_should_be(photos, tmp_path):
    o = tmp_path / "o"
    write_test_cache(o, photos, images_per_shard=8, semantic=SemanticConfig(kind="text", max_tokens=3))
    path, manifest = o / "shards" / "shard-000001.safetensors", o / "manifest.json"
    good, recorded = path.read_bytes(), manifest.read_text()
    actual = {name: tensor.clone() for name, tensor in load_file(path).items()}
    half = actual["tokens"].clone()
    half[0, 0] = float("nan")
    for changes, output, opens in (
        ({"label": None}, "label is None, expected", False),
        ({"label": actual["label"].int()}, "label is", False),
        ({"box": actual["box"][:, :, :3].clone()}, "box is", False),
        ({"extra": torch.zeros(3)}, "extra is", False),
        ({"label": actual["label"] + 5}, "invalid values of label", True),
        ({"index": actual["index"].flip(0)}, "invalid values of index", True),
        ({"index": actual["index"] - 8}, "invalid values of index", True),
        ({"caption_end": actual["caption_end"] + 1}, "invalid values of caption_end", True),
        ({"token_end": actual["token_end"] * 2}, "invalid values of token_end", True),
        ({"size": actual["size"] * 0}, "invalid values of size", True),
        ({"tokens": half}, "invalid values of tokens", True),
    ):
        path.write_bytes(good)
        manifest.write_text(recorded)
        write_modified_shard(path, manifest, **changes)
        lines = format.verify_cache(o)
        assert len(lines) == 2 and output in lines[0] and path.name in lines[0], lines
        if not opens:
            with pytest.raises(UsageError, match="is damaged: "):
                CachedDataset(o)
    manifest.write_text(recorded)
    for raw, output in (
        (good[:-1], "bytes instead of"),
        (good[:40], "bytes instead of"),
        (bytes(len(good)), "SHA-256 is wrong"),
    ):
        path.write_bytes(raw)
        assert output in format.verify_cache(o)[0]
        with pytest.raises(UsageError, match=r"damaged|bytes instead of"):
            CachedDataset(o)
    path.write_bytes(good)
    assert format.verify_cache(o) == []


def test_check_names_bad_files_and_the_fix(photos, tmp_path):
    o, runner = tmp_path / "o", CliRunner()
    write_test_cache(o, photos, images_per_shard=4)
    before = tree(o)
    bad = [o / "shards" / f"shard-00000{r}.safetensors" for r in (0, 2, 3)]
    bad[0].write_bytes(bad[0].read_bytes()[:-3])
    flipped = bytearray(bad[1].read_bytes())
    flipped[-1] ^= 1
    bad[1].write_bytes(flipped)
    bad[2].unlink()
    result = runner.invoke(app, ["cache", "--check", str(o)])
    assert result.exit_code == 1
    for path, output in zip(
        bad, ("bytes instead of", "is damaged: its SHA-256 is wrong", "cannot be read"), strict=True
    ):
        assert any(line.startswith(str(path)) and output in line for line in result.stdout.splitlines())
    *_, remove, again = result.stdout.splitlines()
    assert remove.split()[2:] == list(map(str, bad)) and again.split()[:2] == ["gesso", "cache"]
    for path in bad:
        path.unlink(missing_ok=True)
    assert runner.invoke(app, again.split()[1:]).exit_code == 0
    assert tree(o) == before
    result = runner.invoke(app, ["cache", "--check", str(o)])
    assert result.exit_code == 0 and "is as it was written" in result.stdout


# Reading.


def test_a_sample_is_a_view_keyed_to_its_counter(photos, tmp_path):
    o = tmp_path / "o"
    write_test_cache(o, photos, data={"crop_scale": (0.4, 1), "flip": True}, views=3, images_per_shard=5)
    cache, actual = CachedDataset(o, 7), rows(o)
    counter = torch.arange(1000, 1200)
    index = cache.sample_order(7, 8)(counter)
    samples = cache.get(index, counter)
    u = keyed.uniform(7, counter, "view")[:, 0]
    chosen = []
    for b, i in enumerate(index.tolist()):
        v = min(int(u[b] * 3), 2)
        chosen.append(v)
        for name, value in (
            ("pixels", samples.x),
            ("box", samples.crop_boxes),
            ("flip", samples.flips),
            ("tone", samples.pixel_stats),
        ):
            assert value[b].equal(actual[name][i, v].to(value.dtype)), name
        assert samples.original_sizes[b].equal(actual["size"][i].long()) and int(samples.labels[b]) == int(
            actual["label"][i]
        )
    assert min(np.bincount(chosen)) > 40 and samples.indices.equal(index) and samples.encoded_text is None
    for some in (torch.arange(200)[::3], torch.tensor([199, 0, 0, 57])):
        again = cache.get(index[some], counter[some])
        for one, other in zip(again, samples, strict=True):
            assert one is None or one.equal(other[some])
    assert not CachedDataset(o, 8).get(index, counter).x.equal(samples.x)
    columns = samples.control_columns()
    assert columns["flip"].unique().tolist() == [0, 1000] and columns["height"].unique().tolist() == [48, 64]


def test_pictures_are_not_mirrored(vae, photos, tmp_path):
    for K in (1, 2):
        write_test_cache(tmp_path / str(K), photos, data={"flip": True}, views=K)
    write_test_cache(tmp_path / "plain", photos)
    write_test_cache(tmp_path / "latents", photos, data={"flip": True}, views=2, latent=LatentConfig(vae=str(vae)))
    write_test_cache(tmp_path / "plain latents", photos, latent=LatentConfig(vae=str(vae)))
    index = torch.tensor([3, 15, 0, 3])
    for one, other in (("1", "plain"), ("2", "plain"), ("latents", "plain latents")):
        assert (
            CachedDataset(tmp_path / one)
            .reference_images(index)
            .equal(CachedDataset(tmp_path / other).reference_images(index))
        ), one


def test_what_a_cache_tells(vae, photos, tmp_path):
    o = tmp_path / "o"
    manifest = write_test_cache(
        o, photos, data={"flip": True, "crop_scale": (0.5, 1)}, latent=LatentConfig(vae=str(vae), dtype="bfloat16")
    )
    cache = CachedDataset(o)
    recorded = cache.implied_settings(None)
    assert recorded["data"] == {
        "resolution": 16, "channels": 3, "flip": True, "crop_scale": (0.5, 1.0), "resize": "lanczos", "buckets": None,
    }  # fmt: skip
    assert recorded["latent"] == {"vae": str(vae), "convention": "dit", "channels": 4, "downsample_factor": 8}
    assert cache.text_config is None and DataConfig(**recorded["data"]) and LatentConfig(**recorded["latent"])
    assert len(cache) == 16 and cache.class_names == ("tall", "wide") and cache.captions[0] == "tall"
    assert cache.fingerprint() == manifest.fingerprint
    assert cache.has_latents and cache.is_cheap and len(cache.fingerprint()) == 16 and int(cache.fingerprint(), 16)
    assert cache.labels.tolist() == open_source(str(photos)).labels.tolist() and cache.buckets == [(16, 16)]
    write_test_cache(
        tmp_path / "p", photos, data={"flip": True, "crop_scale": (0.5, 1)}, seed=1, latent=LatentConfig(vae=str(vae))
    )
    assert CachedDataset(tmp_path / "p").fingerprint() != cache.fingerprint()


def test_x_is_mapped_not_read(photos, tmp_path):
    """A change of the file shows: nothing of x is held in memory."""
    o = tmp_path / "o"
    write_test_cache(o, photos)
    cache = CachedDataset(o)
    before = cache.get(torch.tensor([2]), torch.tensor([0])).x
    path = o / "shards" / "shard-000000.safetensors"
    place = path.read_bytes().index(before.numpy().tobytes())
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(bytes(before.numel()))
    assert not cache.get(torch.tensor([2]), torch.tensor([0])).x.any()


# Settings.


def parse_flags(source="photos", out="o", arguments=(), **flags) -> CachePlan:
    named = {flag: None for flag in FLAG_SETTINGS} | {
        f"--{name.replace('_', '-')}": value for name, value in flags.items()
    }
    return parse_cache_args(source, out, named, list(arguments))


def test_flags_are_short_for_settings():
    received = parse_flags(
        resolution=256, crop_scale=".4,.6", flip=True, views=3, vae="a/b", convention="edm2", text="c/d", max_tokens=77,
        dtype="float32", blur_faces=True, buckets=3, images_per_shard=100, batch_size=8,
        arguments=["data.max_unreadable=0.05", "latent.dtype=bfloat16", "seed=3"],
    )  # fmt: skip
    due = CachePlan(
        data=DataConfig(source="photos", resolution=256, crop_scale=(0.4, 0.6), flip=True, max_unreadable=0.05),
        latent=LatentConfig(vae="a/b", convention="edm2", dtype="bfloat16"),
        semantic=SemanticConfig(kind="text", encoder="c/d", max_tokens=77),
        views=3, dtype="float32", blur_faces=True, buckets=3, images_per_shard=100, batch_size=8, seed=3,
    )  # fmt: skip
    assert received == due
    import shlex

    words = shlex.split(cache_command(received, "a b"))
    flags, arguments, place = {}, [], 4
    assert words[:4] == ["gesso", "cache", "photos", "a b"]
    while place < len(words):
        name = words[place]
        if name in ("--flip", "--blur-faces"):
            flags[name] = True
        elif name.startswith("--"):
            flags[name] = words[place := place + 1]
        else:
            arguments.append(name)
        place += 1
    assert parse_cache_args("photos", "a b", flags, arguments) == due
    assert (
        parse_flags(text="words", resolution=8).semantic.kind == "text"
        and parse_flags(resolution=8).semantic.kind == "none"
    )


@pytest.mark.parametrize(
    "flags, arguments, message",
    [
        ({}, [], "the resolution is missing: add --resolution"),
        ({"resolution": 256, "channels": 1, "vae": "a"}, [], "--channels 1, but --vae needs RGB"),
        ({"resolution": 8, "views": 2}, [], "--views 2 without --crop-scale"),
        (
            {"resolution": 8, "views": 3, "flip": True},
            [],
            "--views 3 without --crop-scale: an image has only two different views",
        ),
        ({"resolution": 8, "max_tokens": 9}, [], "--max-tokens without --text has no effect"),
        ({"resolution": 8, "convention": "edm2"}, [], "--convention without --vae has no effect"),
        ({"resolution": 8, "dtype": "float32"}, [], "--dtype applies to latents and tokens"),
        (
            {"resolution": 8, "vae": "a", "dtype": "float64"},
            [],
            "dtype = \"float64\": allowed are 'float16' or 'float32'",
        ),
        ({"resolution": 8, "vae": "a", "convention": "sd"}, [], "allowed are 'dit' or 'edm2'"),
        ({"resolution": 8, "crop_scale": ".6,.4"}, [], "falls"),
        ({"resolution": 8, "crop_scale": "all"}, [], "data.crop_scale"),
        ({"resolution": 8, "buckets": 4}, [], "--buckets 4: choose an odd number"),
        (
            {"resolution": 256, "buckets": 7},
            [],
            "--buckets 7: at --resolution 256 there are only 5 sizes with multiples of 64",
        ),
        (
            {"resolution": 100, "buckets": 3},
            ["bucket_multiple=64"],
            "--resolution 100 is not a multiple of bucket_multiple=64",
        ),
        ({"resolution": 8}, ["data.resolution=9"], "--resolution and data.resolution are the same setting"),
        ({"resolution": 8}, ["vews=2"], "vews: no such setting of a cache; did you mean views"),
        ({"resolution": 8}, ["data.flp=true"], "data.flp = true: no such setting; did you mean data.flip"),
        ({"resolution": 8}, ["data.num_images=5"], "data.num_images is computed"),
        ({"resolution": 8}, ["semantic.kind=label"], "classes are always stored"),
        ({"resolution": 0}, [], "data.resolution = 0: should be greater than 0"),
    ],
)
def test_contradictions_are_refused_before_anything_is_opened(flags, arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        parse_flags(arguments=arguments, **flags)
    assert "\n" not in str(error.value)


def test_the_command_line(photos, tmp_path):
    runner, o = CliRunner(), str(tmp_path / "o")
    words = ["cache", str(photos), o, "--resolution", "16", "--flip", "--views", "2", "--text", "words", "seed=2"]
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    assert f"{o}: 16 images of 2 views each, pixels 3x16x16" in result.stdout and f"gesso inspect {o}" in result.stdout
    cache = CachedDataset(o)
    assert cache.plan.seed == 2 and cache.plan.views == 2 and cache.plan.semantic.kind == "text"
    before = {p: p.stat().st_mtime_ns for p in Path(o).rglob("*.json")}
    assert runner.invoke(app, words).exit_code == 0, "what is finished stays"
    assert before == {p: p.stat().st_mtime_ns for p in Path(o).rglob("*.json")}
    for wrong, message in (
        (["cache", str(photos)], "the output folder is missing"),
        (
            ["cache", str(photos), "data.flip=true", "--resolution", "8"],
            "the output folder is missing before data.flip=true",
        ),
        (["cache", "--check", o, "--flip"], "--check takes one folder"),
        (["cache", "--check", str(tmp_path)], "is not a cache"),
        (["cache", str(photos), o + "2", "--resolution", "16", "--device", "cuda:9"], "--device cuda:9 cannot be used"),
    ):
        with pytest.raises(UsageError, match=message):
            runner.invoke(app, wrong, catch_exceptions=False)


def test_views_have_no_draw_in_common():
    """Over images and views the draws are uniform and uncorrelated."""
    u = encode.view_uniforms(0, 2, 0, 4000).reshape(4000, -1)
    assert u.shape == (4000, 8) and np.abs(u.mean(0) - 0.5).max() < 0.03
    assert np.abs(np.corrcoef(u.T) - np.eye(8)).max() < 0.06


def test_a_flipped_bit_is_noticed_when_a_cache_is_opened(photos, tmp_path):
    write_test_cache(tmp_path / "o", photos, images_per_shard=8)
    CachedDataset(tmp_path / "o")
    for path in sorted((tmp_path / "o" / "shards").glob("*.safetensors")):
        good = path.read_bytes()
        path.write_bytes(good[:-5] + bytes([good[-5] ^ 0x10]) + good[-4:])
        with pytest.raises(UsageError, match=rf"{path} is damaged: its SHA-256 is wrong; run gesso cache --check"):
            CachedDataset(tmp_path / "o")
        path.write_bytes(good)


def test_checksums_of_a_sample_of_shards_are_verified(photos, tmp_path, monkeypatch):
    """The columns and at least one shard, chosen anew each time."""
    write_test_cache(tmp_path / "o", photos, images_per_shard=4)
    monkeypatch.setattr(format, "MAX_VERIFIED_BYTES", 1)
    verify, names = format._file_problem, []
    monkeypatch.setattr(format, "_file_problem", lambda folder, file: names.append(file.name) or verify(folder, file))
    for _ in range(40):
        CachedDataset(tmp_path / "o")
    assert names[::2] == ["columns.safetensors"] * 40 and len(set(names[1::2])) > 1 and len(names) == 80
