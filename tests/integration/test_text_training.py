"""Text end to end: captions into tokens, every network that takes them, every padding, resuming, prompts."""

import dataclasses
import shutil

import pytest
import torch
from helpers.images import write_image_folders
from helpers.network_cases import randomize_constants_
from helpers.run_factory import QUIET_CONSOLE, small_run, with_settings, write_run
from rich.console import Console

from gesso import sample_files, sampling, snapshot
from gesso.conditioning import Cond
from gesso.config import DataConfig
from gesso.data.batching import Batcher
from gesso.data.encoders.text import WordVectors
from gesso.data.factory import open_dataset
from gesso.ema import PowerProfile
from gesso.errors import UsageError
from gesso.training.loop import Trainer
from gesso.training.run_folder import open_dataset_for_run, start_training

SHORT = {"train.total_images": 16, "train.batch_size": 8, "train.snapshot_every": 16, "train.checkpoint_every": 8}
NETWORKS = ["digits", "digits-dit-att", "digits-pixart", "digits-mmdit", "digits-mp-mmdit++", "digits-unet"]
PADDINGS = ["zero", "masked", "replicate", "noisy"]
TEXT = {"semantic.kind": "text", "semantic.max_tokens": 6, "semantic.embed_dim": 12, "semantic.padding_noise": 0.5}


def text_run(recipe: str, padding: str, **overrides: object):
    return small_run(recipe, **TEXT | {"semantic.padding": padding} | overrides)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("recipe", NETWORKS)
def test_trains_resumes_bit_equal_and_samples(recipe, padding, tmp_path):
    out, again = tmp_path / "run", tmp_path / "again"
    run = text_run(recipe, padding, **SHORT)
    start_training(run, out, False, QUIET_CONSOLE, print)
    shutil.copytree(out, again)
    shutil.rmtree(again / "state" / max(p.name for p in (again / "state").iterdir()))
    shutil.rmtree(again / "snapshots")
    start_training(run, again, True, QUIET_CONSOLE, print)
    assert "nimg000000000008" in {p.name for p in (again / "state").iterdir()}
    last = snapshot.list_snapshots(out)[-1].path
    assert last.name.startswith("nimg000000000016")
    assert last.read_bytes() == (again / "snapshots" / last.name).read_bytes()
    run = snapshot.read(last)[1]
    requested = sample_files.SampleArgs(prompts=("the digit seven", "a zero in somebody's handwriting"), seeds="0-1")
    lines = sample_files.sample_to_folder(out, run, requested, tmp_path / "made")
    assert lines[0].startswith("wrote 2 images") and (tmp_path / "made" / "seed000001.png").is_file()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Denoisers of random weights by network and padding, made when asked for."""
    created = {}

    def get(recipe: str, padding: str):
        if (recipe, padding) not in created:
            folder = tmp_path_factory.mktemp("text")
            run = write_run(folder, recipe, **TEXT | {"semantic.padding": padding})
            created[recipe, padding] = (
                snapshot.denoiser_from_weights(snapshot.reconstruct_from_run(folder, [PowerProfile(0.05)])[0][0], run),
                run,
            )
        return created[recipe, padding]

    return get


def call(denoiser, cond: Cond) -> torch.Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(x, torch.tensor(0.5), cond)


@pytest.mark.parametrize("recipe", NETWORKS)
def test_an_empty_prompt_is_withheld_text_under_every_padding(recipe, trained):
    """And no padding knows another "no text": the same weights give the same image."""
    weights = trained(recipe, "zero")[0].state_dict()
    outputs = []
    for padding in PADDINGS:
        denoiser, run = trained(recipe, padding)
        denoiser.load_state_dict(weights)
        empty, _ = sampling.build_cond(run, [3, 4], None, prompts=["", " ..."])
        words, _ = sampling.build_cond(run, [3, 4], None, prompts=["a", "the digit seven"])
        outputs.append(call(denoiser, empty))
        assert call(denoiser, words.without(semantic=True)).equal(outputs[-1])
        assert call(denoiser, empty.without(semantic=True)).equal(outputs[-1])
        assert (call(denoiser, words) - outputs[-1]).abs().amax((1, 2, 3)).min() > 1e-3
    for output in outputs[1:]:  # a mask of all may take another attention kernel than none
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", NETWORKS)
def test_paddings_differ_where_there_is_padding(recipe, trained):
    weights = trained(recipe, "zero")[0].state_dict()
    short, full = [], []
    for padding in PADDINGS:
        denoiser, run = trained(recipe, padding)
        denoiser.load_state_dict(weights)
        for stored, prompts in ((short, ["the seven"] * 2), (full, ["a b c d e f"] * 2)):
            stored.append(call(denoiser, sampling.build_cond(run, [3, 4], None, prompts=prompts)[0]))
    for i in range(4):
        torch.testing.assert_close(full[i], full[0], rtol=1e-4, atol=1e-4)  # T = length: no padding, m = 1, no noise
        for j in range(i):
            # Three whole copies leave a softmax over the text tokens alone, cross-attention, as it was without them.
            if (j, i) == (1, 2) and recipe in ("digits-dit-att", "digits-pixart", "digits-unet"):
                torch.testing.assert_close(short[i], short[j], rtol=1e-4, atol=1e-4)
            else:
                assert (short[i] - short[j]).abs().max() > 1e-4, (PADDINGS[i], PADDINGS[j])


@pytest.mark.parametrize("recipe", NETWORKS)
def test_withheld_text_does_not_reach_the_network(recipe):
    trainer = Trainer(*open_dataset_for_run(text_run(recipe, "masked", **{"dropout.both": 0.5}), QUIET_CONSOLE))
    randomize_constants_(trainer.denoiser.net)
    x0, cond = trainer.batcher(torch.arange(8))
    stored = cond.has_semantic
    assert 0 < int(stored.sum()) < 8
    changed = dataclasses.replace(
        cond,
        text=torch.where(stored[:, None, None], cond.text, 3.0),
        text_mask=torch.where(stored[:, None], cond.text_mask, ~cond.text_mask),
        pooled=torch.where(stored[:, None], cond.pooled, 3.0),
    )
    s = torch.full((8,), 0.5)
    with torch.no_grad():
        assert trainer.denoiser(x0, s, cond).equal(trainer.denoiser(x0, s, changed))
        all_selected = torch.ones_like(stored)
        recorded = [trainer.denoiser(x0, s, dataclasses.replace(c, has_semantic=all_selected)) for c in (cond, changed)]
        assert (recorded[0] - recorded[1]).abs().amax((1, 2, 3))[~stored].min() > 1e-5


def batcher_for(run):
    run, loaded = open_dataset_for_run(run, QUIET_CONSOLE)
    return Batcher(loaded, run, 0.5, torch.device("cpu")), loaded


def test_batches_hold_the_captions_of_their_images():
    batches, loaded = batcher_for(text_run("digits", "zero"))
    counter = torch.arange(40)
    _, cond = batches(counter)
    tokens, lengths, _ = WordVectors(batches.run.semantic)(
        [loaded.captions[i] for i in batches.sample_order(counter).tolist()]
    )
    assert cond.text.equal(tokens) and cond.label is None
    torch.testing.assert_close(cond.pooled, tokens.sum(1) / lengths[:, None])
    assert set(lengths.tolist()) == {1, 3, 6}  # "somebody's" is two words


def test_noise_in_training_is_keyed_to_the_sample_and_the_seed():
    longer = {"semantic.max_tokens": 8}  # than any caption
    batches, _ = batcher_for(text_run("digits", "noisy", **longer))
    n = len(batches.dataset)
    counter = torch.tensor([5, 900, 5 + n, 17])
    full = batches(counter)[1].text
    for i in range(4):
        assert batches(counter[i : i + 1])[1].text[0].equal(full[i])
    other_seed, _ = batcher_for(text_run("digits", "noisy", **longer | {"train.seed": 1}))
    same_image = {int(k): i for i, k in enumerate(other_seed.sample_order(torch.arange(n)))}
    k = torch.tensor([same_image[int(batches.sample_order(counter[:1]))]])
    captions = [batches.dataset.captions[int(b.sample_order(c))] for b, c in ((batches, counter[:1]), (other_seed, k))]
    assert captions[0] == captions[1] and not other_seed(k)[1].text[0].equal(full[0])


def test_noise_in_sampling_is_keyed_to_the_seed():
    run = with_settings(text_run("digits", "noisy"), **{"data.num_classes": 10})
    prompts = ["the seven"] * 5
    full, _ = sampling.build_cond(run, range(5), None, prompts=prompts)
    single, _ = sampling.build_cond(run, [3], None, prompts=prompts[:1])
    assert single.text[0].equal(full.text[3]) and not full.text[2].equal(full.text[3])
    reseeded, _ = sampling.build_cond(with_settings(run, **{"train.seed": 9}), [3], None, prompts=prompts[:1])
    assert reseeded.text.equal(single.text)


# What the user is told.


def test_training_reports_truncated_captions(capsys):
    open_dataset_for_run(small_run(**TEXT | {"semantic.max_tokens": 3}), Console(width=300))
    out = capsys.readouterr().out
    assert out.count("captions are longer than semantic.max_tokens=3") == 1
    assert "only the first 3 of 6 words are used, truncated at 'somebody'" in out
    open_dataset_for_run(small_run(**TEXT), Console(width=300))
    assert "longer than" not in capsys.readouterr().out
    open_dataset_for_run(small_run(**{"semantic.max_tokens": 3}), Console(width=300))  # classes
    assert "longer than" not in capsys.readouterr().out


def test_truncated_caption_count():
    loaded = open_dataset(DataConfig(resolution=8, channels=1))
    cut = WordVectors(small_run(**TEXT | {"semantic.max_tokens": 3}).semantic).truncation_notes(loaded.captions)
    assert len(cut) == sum("handwriting" in caption for caption in loaded.captions)


def test_captions_of_a_folder(tmp_path):
    """The text file beside an image, or the name of its class."""
    write_image_folders(tmp_path, {"red cat": 2, "dog": 1})
    (tmp_path / "red cat" / "1.txt").write_text("A cat, ünder a table.\n", encoding="utf-8")
    settings = {"data.source": tmp_path, "data.channels": 3, "eval.toy_metrics": "none"}
    batches, loaded = batcher_for(small_run(**TEXT | settings))
    assert loaded.captions == ("dog", "red cat", "A cat, ünder a table.")
    assert (
        batches.encoded_text(loaded.get(torch.arange(3), torch.arange(3))).lengths.tolist() == [1, 2, 5]
        and batches.run.data.example_captions == loaded.captions
    )


def test_a_folder_without_captions(tmp_path):
    write_image_folders(tmp_path, {".": 4})
    settings = {"data.source": tmp_path, "data.channels": 3, "eval.toy_metrics": "none"}
    with pytest.raises(UsageError, match=r"has no captions; put image\.txt next to each image"):
        open_dataset_for_run(small_run(**TEXT | settings), QUIET_CONSOLE)


def test_text_guidance_without_classes(tmp_path):
    """A flat folder with captions has something to guide towards."""
    write_image_folders(tmp_path, {".": 3})
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    settings = {"data.source": tmp_path, "data.channels": 3, "eval.toy_metrics": "none", "sample.guidance": 2}
    run, _ = open_dataset_for_run(small_run(**TEXT | settings), QUIET_CONSOLE)
    assert run.sample.guidance == 2 and run.data.num_classes == 0
