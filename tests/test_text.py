"""Text end to end: captions into tokens, every network that takes them, every padding, resuming, prompts."""

import dataclasses
import shutil

import pytest
import torch
from conftest import awake, folder_of_images
from rich.console import Console
from written import QUIET, changed, small, written

from gesso import conditions, generate, snapshot
from gesso.cond import Cond
from gesso.config import Data
from gesso.data.batches import Batches
from gesso.data.dataset import open_dataset
from gesso.data.text import Words
from gesso.ema import Power
from gesso.errors import UsageError
from gesso.train.loop import Trainer
from gesso.train.start import opened, start

SHORT = {"train.total_images": 16, "train.batch_size": 8, "train.snapshot_images": 16, "train.state_images": 8}
NETWORKS = ["digits", "digits-dit-att", "digits-pixart", "digits-mmdit", "digits-mp-mmdit++", "digits-unet"]
PADDINGS = ["zero", "masked", "replicate", "noisy"]
TEXT = {"semantic.kind": "text", "semantic.tokens": 6, "semantic.width": 12, "semantic.noise": 0.5}


def text_run(recipe: str, padding: str, **more: object):
    return small(recipe, **TEXT | {"semantic.padding": padding} | more)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("recipe", NETWORKS)
def test_trains_resumes_bit_equal_and_samples(recipe, padding, tmp_path):
    out, again = tmp_path / "run", tmp_path / "again"
    run = text_run(recipe, padding, **SHORT)
    start(run, out, False, QUIET, print)
    shutil.copytree(out, again)
    shutil.rmtree(again / "state" / max(p.name for p in (again / "state").iterdir()))
    shutil.rmtree(again / "snapshots")
    start(run, again, True, QUIET, print)
    assert "nimg000000000008" in {p.name for p in (again / "state").iterdir()}
    last = snapshot.stored(out)[-1].path
    assert last.name.startswith("nimg000000000016")
    assert last.read_bytes() == (again / "snapshots" / last.name).read_bytes()
    run = snapshot.read(last)[1]
    asked = generate.Asked(prompts=("the digit seven", "a zero in somebody's handwriting"), seeds="0-1")
    lines = generate.draw(out, run, asked, tmp_path / "made")
    assert lines[0].startswith("wrote 2 images") and (tmp_path / "made" / "seed000001.png").is_file()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Denoisers of random weights by network and padding, made when asked for."""
    made = {}

    def get(recipe: str, padding: str):
        if (recipe, padding) not in made:
            folder = tmp_path_factory.mktemp("text")
            run = written(folder, recipe, **TEXT | {"semantic.padding": padding})
            made[recipe, padding] = snapshot.denoiser(snapshot.synthesize(folder, [Power(0.05)])[0][0], run), run
        return made[recipe, padding]

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
        empty, _ = conditions.build(run, [3, 4], None, prompts=["", " ..."])
        words, _ = conditions.build(run, [3, 4], None, prompts=["a", "the digit seven"])
        outputs.append(call(denoiser, empty))
        assert call(denoiser, words.without(semantic=True)).equal(outputs[-1])
        assert call(denoiser, empty.without(semantic=True)).equal(outputs[-1])
        assert (call(denoiser, words) - outputs[-1]).abs().amax((1, 2, 3)).min() > 1e-3
    for other in outputs[1:]:  # a mask of all may take another attention kernel than none
        torch.testing.assert_close(other, outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", NETWORKS)
def test_paddings_differ_where_there_is_padding(recipe, trained):
    weights = trained(recipe, "zero")[0].state_dict()
    short, full = [], []
    for padding in PADDINGS:
        denoiser, run = trained(recipe, padding)
        denoiser.load_state_dict(weights)
        for kept, prompts in ((short, ["the seven"] * 2), (full, ["a b c d e f"] * 2)):
            kept.append(call(denoiser, conditions.build(run, [3, 4], None, prompts=prompts)[0]))
    for i in range(4):
        torch.testing.assert_close(full[i], full[0], rtol=1e-4, atol=1e-4)  # T = length: no padding, m = 1, no noise
        for j in range(i):
            # Three whole copies leave a softmax over the text tokens alone, cross-attention, as it was without them.
            if (j, i) == (1, 2) and recipe in ("digits-dit-att", "digits-pixart", "digits-unet"):
                torch.testing.assert_close(short[i], short[j], rtol=1e-4, atol=1e-4)
            else:
                assert (short[i] - short[j]).abs().max() > 1e-4, (PADDINGS[i], PADDINGS[j])


@pytest.mark.parametrize("recipe", NETWORKS)
def test_nothing_withheld_reaches_the_network(recipe):
    trainer = Trainer(*opened(text_run(recipe, "masked", **{"dropout.both": 0.5}), QUIET))
    awake(trainer.denoiser.net)
    x0, cond = trainer.batches(torch.arange(8))
    kept = cond.has_semantic
    assert 0 < int(kept.sum()) < 8
    other = dataclasses.replace(
        cond,
        text=torch.where(kept[:, None, None], cond.text, 3.0),
        text_mask=torch.where(kept[:, None], cond.text_mask, ~cond.text_mask),
        pooled=torch.where(kept[:, None], cond.pooled, 3.0),
    )
    s = torch.full((8,), 0.5)
    with torch.no_grad():
        assert trainer.denoiser(x0, s, cond).equal(trainer.denoiser(x0, s, other))
        all_kept = torch.ones_like(kept)
        told = [trainer.denoiser(x0, s, dataclasses.replace(c, has_semantic=all_kept)) for c in (cond, other)]
        assert (told[0] - told[1]).abs().amax((1, 2, 3))[~kept].min() > 1e-5


def batches_of(run):
    run, loaded = opened(run, QUIET)
    return Batches(loaded, run, 0.5, torch.device("cpu")), loaded


def test_batches_hold_the_captions_of_their_images():
    batches, loaded = batches_of(text_run("digits", "zero"))
    counter = torch.arange(40)
    _, cond = batches(counter)
    tokens, lengths, _ = Words(batches.run.semantic)([loaded.captions[i] for i in batches.order(counter).tolist()])
    assert cond.text.equal(tokens) and cond.label is None
    torch.testing.assert_close(cond.pooled, tokens.sum(1) / lengths[:, None])
    assert set(lengths.tolist()) == {1, 3, 6}  # "somebody's" is two words


def test_noise_in_training_is_keyed_to_the_sample_and_the_seed():
    longer = {"semantic.tokens": 8}  # than any caption
    batches, _ = batches_of(text_run("digits", "noisy", **longer))
    n = len(batches.dataset)
    counter = torch.tensor([5, 900, 5 + n, 17])
    whole = batches(counter)[1].text
    for i in range(4):
        assert batches(counter[i : i + 1])[1].text[0].equal(whole[i])
    other, _ = batches_of(text_run("digits", "noisy", **longer | {"train.seed": 1}))
    same_image = {int(k): i for i, k in enumerate(other.order(torch.arange(n)))}
    k = torch.tensor([same_image[int(batches.order(counter[:1]))]])
    captions = [batches.dataset.captions[int(b.order(c))] for b, c in ((batches, counter[:1]), (other, k))]
    assert captions[0] == captions[1] and not other(k)[1].text[0].equal(whole[0])


def test_noise_in_sampling_is_keyed_to_the_seed():
    run = changed(text_run("digits", "noisy"), **{"data.num_classes": 10})
    prompts = ["the seven"] * 5
    whole, _ = conditions.build(run, range(5), None, prompts=prompts)
    alone, _ = conditions.build(run, [3], None, prompts=prompts[:1])
    assert alone.text[0].equal(whole.text[3]) and not whole.text[2].equal(whole.text[3])
    reseeded, _ = conditions.build(changed(run, **{"train.seed": 9}), [3], None, prompts=prompts[:1])
    assert reseeded.text.equal(alone.text)


# What the user is told.


def test_training_says_which_captions_are_cut(capsys):
    opened(small(**TEXT | {"semantic.tokens": 3}), Console(width=300))
    out = capsys.readouterr().out
    assert out.count("captions are longer than semantic.tokens=3") == 1
    assert "cut from 'somebody' on" in out and "of 6 words the first 3 are seen" in out
    opened(small(**TEXT), Console(width=300))
    assert "longer than" not in capsys.readouterr().out
    opened(small(**{"semantic.tokens": 3}), Console(width=300))  # classes
    assert "longer than" not in capsys.readouterr().out


def test_the_count_of_cut_captions():
    loaded = open_dataset(Data(resolution=8, channels=1))
    cut = Words(small(**TEXT | {"semantic.tokens": 3}).semantic).cut(loaded.captions)
    assert len(cut) == sum("handwriting" in caption for caption in loaded.captions)


def test_captions_of_a_folder(tmp_path):
    """The text file beside an image, or the name of its class."""
    folder_of_images(tmp_path, {"red cat": 2, "dog": 1})
    (tmp_path / "red cat" / "1.txt").write_text("A cat, ünder a table.\n", encoding="utf-8")
    settings = {"data.source": tmp_path, "data.channels": 3, "eval.features": "none"}
    batches, loaded = batches_of(small(**TEXT | settings))
    assert loaded.captions == ("dog", "red cat", "A cat, ünder a table.")
    assert (
        batches.texts(loaded.take(torch.arange(3), torch.arange(3))).lengths.tolist() == [1, 2, 5]
        and batches.run.data.examples == loaded.captions
    )


def test_a_folder_without_captions(tmp_path):
    folder_of_images(tmp_path, {".": 4})
    settings = {"data.source": tmp_path, "data.channels": 3, "eval.features": "none"}
    with pytest.raises(UsageError, match=r"has no captions; put image\.txt beside each image"):
        opened(small(**TEXT | settings), QUIET)


def test_guidance_of_words_without_classes_is_kept(tmp_path):
    """A flat folder with captions has something to guide towards."""
    folder_of_images(tmp_path, {".": 3})
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    settings = {"data.source": tmp_path, "data.channels": 3, "eval.features": "none", "sample.guidance": 2}
    run, _ = opened(small(**TEXT | settings), QUIET)
    assert run.sample.guidance == 2 and run.data.num_classes == 0
