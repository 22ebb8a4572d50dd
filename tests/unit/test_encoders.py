"""Frozen encoders compared with the classes of the libraries, on small random models saved as published ones are.

Legend: N captions, T tokens, D channels of a token, C latent channels.
"""

import json
import logging
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from helpers.encoders import (
    LETTERS,
    MAX_TOKENS,
    VAE_SETTINGS,
    save_randomized,
    write_clip,
    write_clip_tokenizer,
    write_full_clip,
    write_t5,
    write_t5_tokenizer,
    write_vae,
)
from helpers.hub_server import running_hub, use_hub
from helpers.run_factory import QUIET_CONSOLE, small_run, with_settings, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5TokenizerFast,
)

from gesso import sample_files, sampling, snapshot
from gesso.config import SemanticConfig
from gesso.data import factory
from gesso.data.encoders import hub as pretrained
from gesso.data.encoders import text, vae
from gesso.errors import RunError, UsageError
from gesso.training.run_folder import open_dataset_for_run, start_training

CAPTIONS = ["red cat", "a", "", "The SEVEN", " \n", "a red cat, the seven; asleep on a mat", "a", "ünknown ✓", "x" * 40]

WRITERS = {
    "clip": write_clip,
    "clip with projection": lambda folder: write_clip(folder, CLIPTextModelWithProjection),
    "whole clip": write_full_clip,
    "t5": write_t5,
    "whole t5": lambda folder: write_t5(folder, T5ForConditionalGeneration),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {name: write(root / name) for name, write in WRITERS.items()}


def encoder(path: Path | str, tokens: int = MAX_TOKENS, **options: object) -> text.TextEncoder:
    return text.build_text_encoder(SemanticConfig(kind="text", encoder=str(path), max_tokens=tokens, **options))


def error_message(path: Path | str, tokens: int = MAX_TOKENS, **options: object) -> str:
    text._load_encoder.cache_clear()
    with pytest.raises(UsageError) as error:
        encoder(path, tokens, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Text: the library's own classes, one caption at a time, without any padding.


def encode_with_library(name: str, folder: Path, caption: str, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens (n, D) and pooled (P,) of one caption, computed by the library."""
    if "t5" in name:
        ids = T5TokenizerFast.from_pretrained(folder)(caption, truncation=True, max_length=T, return_tensors="pt")
        with pretrained.quiet_logging("transformers"):
            model = T5EncoderModel.from_pretrained(folder).eval()
        states = model(input_ids=ids["input_ids"]).last_hidden_state[0]
        return states, states.mean(0)
    ids = CLIPTokenizerFast.from_pretrained(folder)(caption, truncation=True, max_length=T, return_tensors="pt")
    projected = name == "clip with projection"
    with pretrained.quiet_logging("transformers"):
        model = (CLIPTextModelWithProjection if projected else CLIPTextModel).from_pretrained(folder).eval()
    out = model(**ids)
    return out.last_hidden_state[0], (out.text_embeds if projected else out.pooler_output)[0]


@pytest.mark.parametrize("T", [MAX_TOKENS, 5])
@pytest.mark.parametrize("name", WRITERS)
def test_tokens_are_the_librarys(name, T, folders):
    text_encoder = encoder(folders[name], T)
    tokens, lengths, pooled = text_encoder(CAPTIONS)
    assert tokens.shape == (len(CAPTIONS), T, text_encoder.embed_dim) and pooled.shape == (
        len(CAPTIONS),
        text_encoder.pooled_dim,
    )
    assert tokens.dtype == pooled.dtype == torch.float32 and lengths.dtype == torch.int64
    assert not any(field.requires_grad or field.is_inference() for field in (tokens, pooled))
    for caption, row, n, full in zip(CAPTIONS, tokens, lengths.tolist(), pooled, strict=True):
        if not caption.strip():
            assert n == 0 and not row.any() and not full.any()  # no text
            continue
        with torch.no_grad():
            wanted, wanted_pooled = encode_with_library(name, folders[name], caption, T)
        assert n == len(wanted) > 1 and not row[n:].any()
        torch.testing.assert_close(row[:n], wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(full, wanted_pooled, rtol=1e-5, atol=1e-5)
    some = pooled[lengths > 0]
    assert (some[0] - some[1]).abs().max() > 0.05  # and the captions differ


def test_widths(folders):
    has = {name: (e.embed_dim, e.pooled_dim) for name in WRITERS if (e := encoder(folders[name]))}
    assert has == {
        "clip": (16, 16), "clip with projection": (16, 10), "whole clip": (16, 16), "t5": (14, 14),
        "whole t5": (14, 14),
    }  # fmt: skip
    for name, (width, pooled_width) in has.items():
        recorded = SemanticConfig(kind="text", encoder=str(folders[name]), max_tokens=8)
        assert text.text_dims(recorded) == {"embed_dim": width, "pooled_dim": pooled_width}
        assert text.text_dims(recorded.model_copy(update={"kind": "label"})) == {}
    assert text.text_dims(SemanticConfig(kind="text")) == {"embed_dim": 64, "pooled_dim": 64}
    assert text.text_dims(SemanticConfig(kind="text", embed_dim=7)) == {"embed_dim": 7, "pooled_dim": 7}


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_tokens_do_not_depend_on_the_other_captions(name, folders):
    """Tokens are bit-equal at another place, in another pass, alone, and among captions of other lengths."""
    text_encoder, shapes = encoder(folders[name]), set()
    hook = text_encoder.loaded.model.register_forward_pre_hook(
        lambda model, _, recorded: shapes.add(tuple(recorded["input_ids"].shape)), with_kwargs=True
    )
    captions = [f"{a} {b}" for a in ("a", "red", "the seven, ,") for b in [*LETTERS[:10], "", "cat", "asleep on a mat"]]
    assert len(captions) > 2 * text.ENCODER_BATCH_SIZE
    full, backwards = text_encoder(captions), text_encoder(captions[::-1])
    for field, other in zip(full, backwards, strict=True):
        assert field.equal(other.flip(0))
    for i in range(0, len(captions), 5):
        for field, alone in zip(full, text_encoder([captions[i]]), strict=True):
            assert alone[0].equal(field[i])
    twice = text_encoder([captions[3], captions[7], captions[3]])
    assert all(field[0].equal(field[2]) for field in twice) and text_encoder([]).tokens.shape == (
        0,
        MAX_TOKENS,
        text_encoder.embed_dim,
    )
    hook.remove()
    assert shapes == {(text.ENCODER_BATCH_SIZE, MAX_TOKENS)}  # on which the last bits of larger models depend


@pytest.mark.parametrize("name", ["clip with projection", "t5"])
def test_tokens_do_not_depend_on_how_many_there_may_be(name, folders):
    """Padding has no influence. Another T is another shape of the pass: equal to 1e-5, not to the bit."""
    captions = ["red cat", "a", "the"]
    long, short = encoder(folders[name], MAX_TOKENS)(captions), encoder(folders[name], 6)(captions)
    assert long.lengths.equal(short.lengths) and int(long.lengths.max()) <= 6
    torch.testing.assert_close(long.tokens[:, :6], short.tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(long.pooled, short.pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, output", [
    ("clip", "only the first 5 of 8 tokens are used, truncated at 'eep'"),  # red cat a s l | e e p
    ("t5", "only the first 6 of 11 tokens are used, truncated at 'sleep'"),  # _red _ c a t _a | s l e e p
])  # fmt: skip
def test_truncation_is_reported(name, output, folders, caplog):
    """CLIP needs two of 7 tokens for marks, and T5 one."""
    captions = ["a", "red cat asleep", "", "red cat asleep"]
    logging.getLogger("transformers").addHandler(caplog.handler)
    encoder(folders[name], 7).truncation_notes([CAPTIONS[-1]])
    assert encoder(folders[name], 7).truncation_notes(captions) == 2 * [f"'red cat asleep': {output}"]
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.messages == []  # the library would warn that the model cannot take so many
    assert (
        encoder(folders[name], MAX_TOKENS).truncation_notes(["red cat", ""])
        == encoder(folders[name]).truncation_notes([])
        == []
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["clip", "t5"]),
    captions=st.lists(st.text(max_size=12), max_size=4),
    T=st.integers(3, MAX_TOKENS),
)
def test_cut_lists_what_does_not_fit_whatever_the_caption(name, captions, T, folders):
    text_encoder = encoder(folders[name], T)
    lines = text_encoder.truncation_notes(captions)
    n = [len(text_encoder.loaded.tokenizer(caption)["input_ids"]) for caption in captions]
    assert len(lines) == sum(length > T for length in n)
    lengths = text_encoder(captions).lengths.tolist()
    assert lengths == [min(length, T) if c.strip() else 0 for c, length in zip(captions, n, strict=True)]


def test_words_have_the_same_interface():
    text_encoder = encoder("words", 4, embed_dim=8)
    tokens, lengths, pooled = text_encoder(["a red cat", "", "a"])
    assert lengths.tolist() == [3, 0, 1] and tokens.shape == (3, 4, 8)
    torch.testing.assert_close(pooled, torch.stack([tokens[0, :3].mean(0), torch.zeros(8), tokens[2, 0]]))
    assert text_encoder.identity() == {"encoder": "words", "max_tokens": 4, "embed_dim": 8}
    assert text_encoder([]).tokens.shape == (0, 4, 8) and text_encoder([]).lengths.dtype == torch.int64


def test_a_model_is_opened_once(folders, monkeypatch):
    text._load_encoder.cache_clear()
    first = encoder(folders["clip"], 5)
    monkeypatch.setattr(pretrained, "load_model", None)
    second = encoder(folders["clip"], 8)
    assert second.loaded.model is first.loaded.model and (first.max_tokens, second.max_tokens) == (5, 8)
    assert not first.loaded.model.training and not any(p.requires_grad for p in first.loaded.model.parameters())


def test_what_an_encoder_is(folders, tmp_path):
    """The identity follows settings, weights and tokenizer, not the name of the folder."""

    def recorded(folder: Path) -> dict:
        text._load_encoder.cache_clear()
        return {k: v for k, v in encoder(folder).identity().items() if k != "encoder"}

    original = recorded(folders["clip"])
    copy = Path(shutil.copytree(folders["clip"], tmp_path / "copy"))
    assert recorded(copy) == original and encoder(copy).identity()["encoder"] == str(copy)
    about = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(about | {"transformers_version": "9", "_name_or_path": "x"}))
    assert recorded(copy) == original
    (copy / "config.json").write_text(json.dumps(about | {"hidden_act": "gelu"}))
    assert {k for k, v in recorded(copy).items() if v != original[k]} == {"config"}
    shutil.copy(folders["clip"] / "config.json", copy)
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    (copy / "merges.txt").write_text("#version: 0.2\n")
    assert {k for k, v in recorded(copy).items() if v != original[k]} == {"weights", "tokenizer"}


def test_half_precision_weights_run_in_float32(folders, tmp_path):
    """The weights are rounded, the arithmetic is not."""
    half, full = tmp_path / "half", tmp_path / "whole"
    with pretrained.quiet_logging("transformers"):
        model = CLIPTextModel.from_pretrained(folders["clip"]).half()
        model.save_pretrained(half)
        model.float().save_pretrained(full)
    for folder in (half, full):
        write_clip_tokenizer(folder)
    assert {value.dtype for value in load_file(half / "model.safetensors").values()} == {torch.float16}
    encoder_output = encoder(half)(["red cat"]).tokens
    assert encoder_output.equal(encoder(full)(["red cat"]).tokens) and not encoder_output.equal(
        encoder(folders["clip"])(["red cat"]).tokens
    )


# Text: where the files are.


def pipeline(folder: Path, folders: dict[str, Path]) -> Path:
    """Write a pipeline as diffusers does: two text encoders, with their tokenizers in separate folders."""
    for model, tokenizer, source in (
        ("text_encoder", "tokenizer", folders["clip with projection"]),
        ("text_encoder_2", "tokenizer_2", folders["t5"]),
    ):
        (folder / model).mkdir(parents=True)
        (folder / tokenizer).mkdir()
        for path in source.iterdir():
            inner = model if path.name in ("config.json", "model.safetensors", "generation_config.json") else tokenizer
            shutil.copy(path, folder / inner)
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_pipelines_folder(folders, tmp_path):
    full = pipeline(tmp_path / "pipeline", folders)
    for where, name in ((full, "clip with projection"), (full / "text_encoder", "clip with projection"),
                        (full / "text_encoder_2", "t5")):  # fmt: skip
        for encoder_output, same in zip(encoder(where)(CAPTIONS), encoder(folders[name])(CAPTIONS), strict=True):
            assert encoder_output.equal(same)


def test_a_tokenizer_that_is_only_a_sentencepiece_model(folders, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder = tmp_path / "t5"
    shutil.copytree(folders["t5"], folder, ignore=shutil.ignore_patterns("tokenizer*"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 9), model_prefix=str(folder / "spiece"), vocab_size=50,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}))
    _, lengths, _ = encoder(folder)(["red cat"])
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model")).encode("red cat")
    assert lengths.tolist() == [len(pieces) + 1]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub(tmp_path, monkeypatch) as handler:
        yield handler


def test_hub_ids_fetch_what_is_needed_and_no_more(folders, hub, tmp_path, monkeypatch):
    text._load_encoder.cache_clear()
    full = pipeline(hub.root / "some" / "pipeline", folders)
    write_vae(full / "vae", 4)
    single = Path(shutil.copytree(folders["clip"], hub.root / "some" / "clip"))
    for folder, stem in ((full / "text_encoder", "model"), (full / "vae", vae.WEIGHTS_STEM), (single, "model")):
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
        shutil.copy(folder / f"{stem}.safetensors", folder / f"{stem}.fp16.safetensors")
    (full / "v1-5-pruned.safetensors").write_bytes(b"everything in one")
    for name, where in (("clip with projection", "some/pipeline"), ("clip", "some/clip")):
        assert encoder(where)(CAPTIONS).tokens.equal(encoder(folders[name])(CAPTIONS).tokens)
    assert vae.VAE("some/pipeline").identity()["weights"] == vae.VAE(str(full / "vae")).identity()["weights"]
    assert set(hub.fetched) == {
        "model_index.json", "config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json",
        "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json", "vae/config.json", f"vae/{vae.WEIGHTS_STEM}.safetensors",
    }  # fmt: skip
    count = len(hub.fetched)
    text._load_encoder.cache_clear()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        use_hub(monkeypatch, closed.getsockname()[1])
        assert encoder("some/clip")(["a"]).lengths.tolist() == [3]  # from the cache, without a network
        output = error_message("some/other")
    assert len(hub.fetched) == count
    assert output.startswith(
        "semantic.encoder=some/other: there is no such folder, and the download from the hub failed ("
    )
    assert "Connect" in output


def test_a_hub_id_that_does_not_exist(hub):
    hub.root.mkdir()
    assert "the download from the hub failed (404" in error_message("nobody/nothing")
    with pytest.raises(
        UsageError, match="the VAE nobody/nothing: there is no such folder, and the download from the hub failed"
    ):
        vae.VAE("nobody/nothing")


# Text: what is refused.


def damaged(folders: dict[str, Path], folder: Path, name: str = "clip") -> Path:
    return Path(shutil.copytree(folders[name], folder))


def test_encoders_that_cannot_be_opened(folders, tmp_path):
    for missing in ("/no/such/folder", "wrods", "a/b/c", "./x", ""):
        output = error_message(missing)
        assert (
            "there is no such folder, and it is not a hub id such as OWNER/NAME" in output or "no config.json" in output
        )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "as it has no config.json" in error_message(empty)
    bert = save_randomized(BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                     intermediate_size=8)), tmp_path / "bert")  # fmt: skip
    assert (
        "is a model of type bert; supported types are clip, clip_text_model, t5, or set semantic.encoder=words"
        in error_message(bert)
    )
    (empty / "config.json").write_text("[1")
    assert "config.json cannot be read" in error_message(empty)
    (empty / "config.json").write_text("[1]")
    assert "config.json cannot be read" in error_message(empty)
    (empty / "config.json").write_text("{}")
    assert "is a model of type None" in error_message(empty)


def test_pickled_weights_are_not_read(folders, tmp_path):
    folder = damaged(folders, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    output = error_message(folder)
    assert "no model.safetensors in" in output and "pickles (.bin, .ckpt) are not read" in output


def test_weights_that_do_not_fit(folders, tmp_path):
    lacking = damaged(folders, tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    names = sorted(weights)[:2]
    save_file({k: v for k, v in weights.items() if k not in names}, lacking / "model.safetensors", {"format": "pt"})
    output = error_message(lacking)
    assert "its weights have no tensor" in output and "and 1 more are missing" in output
    cut = damaged(folders, tmp_path / "cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "cannot be opened" in error_message(cut)
    other = damaged(folders, tmp_path / "other")
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(about | {"intermediate_size": 20}))
    assert "cannot be opened" in error_message(other) or "its weights have no tensor" in error_message(other)


@pytest.mark.parametrize("name, files", [("clip", "tokenizer.json, or vocab.json and merges.txt"),
                                         ("t5", "tokenizer.json, or spiece.model")])  # fmt: skip
def test_tokenizers_that_cannot_be_used(name, files, folders, tmp_path):
    folder = damaged(folders, tmp_path / "x", name)
    for path in (*folder.glob("tokenizer*"), *folder.glob("vocab.json")):
        path.unlink()
    assert f"no tokenizer ({files}) next to the model" in error_message(
        folder
    )  # the library would make one of three entries
    (folder / "tokenizer.json").write_text("{")
    assert "cannot be opened" in error_message(folder)
    (folder / "tokenizer.json").unlink()
    (write_clip_tokenizer if name == "clip" else write_t5_tokenizer)(folder)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"vocab_size": 40}))
    weights = load_file(folder / "model.safetensors")
    for key, value in weights.items():
        if value.shape[0] == about["vocab_size"]:
            weights[key] = value[:40].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "but the model has 40: use the tokenizer of the model" in error_message(folder)


def test_settings_that_do_not_fit_the_encoder(folders):
    clip, projected, t5 = (str(folders[name]) for name in ("clip", "clip with projection", "t5"))
    assert f"semantic.max_tokens=13, but semantic.encoder={clip} takes at most 12 tokens" in error_message(clip, 13)
    assert "semantic.max_tokens=2 is too small" in error_message(clip, 2)
    assert "adds 1 special tokens to a caption: set it higher" in error_message(t5, 1)
    assert encoder(t5, 500)(["a"]).tokens.shape == (1, 500, 14)  # T5's positions are relative
    assert f"semantic.embed_dim=64, but semantic.encoder={clip} has 16: set semantic.embed_dim=null" in error_message(
        clip, embed_dim=64
    )
    assert "semantic.pooled_dim=16, but" in error_message(projected, embed_dim=16, pooled_dim=16)
    assert encoder(projected, embed_dim=16, pooled_dim=10).pooled_dim == 10
    assert "semantic.pooled_dim=9, but semantic.encoder=words has 64" in error_message("words", pooled_dim=9)


@pytest.mark.parametrize("package, extra", [("transformers", "text"), ("diffusers", "vae")])
def test_without_the_library(package, extra, folders, tmp_path, monkeypatch):
    def load_error() -> str:
        if package == "transformers":
            return error_message(folders["clip"])
        with pytest.raises(UsageError) as error:
            vae.VAE(str(tmp_path))
        return str(error.value)

    monkeypatch.setitem(sys.modules, package, None)
    assert load_error() == f"this needs {package}: pip install 'gesso-diffusion[{extra}]'"
    if package == "transformers":
        broken = types.ModuleType(package)
        broken.__getattr__ = lambda name: (_ for _ in ()).throw(
            RuntimeError("operator torchvision::nms\ndoes not exist")
        )
        monkeypatch.setitem(sys.modules, package, broken)
        assert load_error() == (
            "transformers is installed but cannot be imported (operator torchvision::nms does not exist); "
            "run gesso doctor"
        )
    assert "torchvision" not in sys.modules


# Text: training and sampling.


@pytest.mark.parametrize(
    "recipe, name", [("digits-mmdit", "clip with projection"), ("digits-unet", "t5"), ("digits", "clip")]
)
def test_trains_resumes_bit_equal_and_samples(recipe, name, folders, tmp_path):
    """mmDiT and the U-Net see pooled text, here of another width than the tokens."""
    recorded = {"semantic.kind": "text", "semantic.encoder": folders[name], "semantic.max_tokens": 8}
    short = {"train.total_images": 16, "train.batch_size": 8, "train.snapshot_every": 16, "train.checkpoint_every": 8}
    run = small_run(recipe, **recorded | short)
    assert run.semantic.embed_dim is run.semantic.pooled_dim is None and run.input_spec.text_dim == 0
    out, again = tmp_path / "run", tmp_path / "again"
    run = start_training(run, out, False, QUIET_CONSOLE, print)
    text_encoder = encoder(folders[name])
    assert (run.semantic.embed_dim, run.semantic.pooled_dim) == (text_encoder.embed_dim, text_encoder.pooled_dim)
    assert run.input_spec.text_dim == text_encoder.embed_dim
    assert run.input_spec.pooled_dim == (0 if recipe == "digits" else text_encoder.pooled_dim)
    shutil.copytree(out, again)
    shutil.rmtree(again / "state" / max(p.name for p in (again / "state").iterdir()))
    shutil.rmtree(again / "snapshots")
    text._load_encoder.cache_clear()  # as in another process
    start_training(run, again, True, QUIET_CONSOLE, print)
    last = snapshot.list_snapshots(out)[-1].path
    assert last.read_bytes() == (again / "snapshots" / last.name).read_bytes()
    requested = sample_files.SampleArgs(prompts=("the seven", "a zero in somebody's handwriting", ""), seeds="0-2")
    lines = sample_files.sample_to_folder(out, snapshot.read(last)[1], requested, tmp_path / "made")
    assert "in somebody's handwriting\": only" in lines[0] and lines[1].startswith("wrote 3 images")


def test_prompts_become_the_encoders_tokens(folders, tmp_path):
    run = write_run(tmp_path, "digits-mmdit", **{"semantic.kind": "text", "semantic.encoder": folders["clip"],
                                               "semantic.max_tokens": 8, "semantic.padding": "masked"})  # fmt: skip
    prompts = ["the seven", "", "a"]
    cond, _ = sampling.build_cond(run, [0, 1, 2], None, prompts=prompts)
    tokens, lengths, pooled = encoder(folders["clip"], 8)(prompts)
    assert cond.text.equal(tokens) and cond.pooled.equal(pooled)
    assert cond.text_mask.sum(1).tolist() == [int(lengths[0]), 8, int(lengths[2])]  # no text: all zeros, all seen
    withheld = cond.without(semantic=True)
    assert not withheld.text_or_zero().any() and cond.text[1].equal(withheld.text_or_zero()[1])
    assert cond.pooled[1].equal(withheld.pooled_or_zero()[1])


def test_an_encoder_is_opened_before_any_image_is_read(folders, monkeypatch):
    monkeypatch.setattr(factory, "open_source", None)
    run = small_run(**{"semantic.kind": "text", "semantic.encoder": folders["clip"], "semantic.max_tokens": 77})
    with pytest.raises(UsageError, match="takes at most 12 tokens"):
        open_dataset_for_run(run, QUIET_CONSOLE)


def test_an_encoder_of_another_width_than_recorded_is_refused_when_sampling(folders, tmp_path):
    where = damaged(folders, tmp_path / "encoder")
    run = write_run(tmp_path / "run", **{"semantic.kind": "text", "semantic.encoder": where, "semantic.max_tokens": 8})
    shutil.rmtree(where)
    damaged(folders, where, "t5")
    text._load_encoder.cache_clear()
    for recorded, output in (
        (run, r"semantic\.embed_dim=16, but"),
        (with_settings(run, **{"semantic.embed_dim": 14}), "pooled_dim=16, but"),
    ):
        with pytest.raises(UsageError, match=output):
            sampling.build_cond(recorded, [0], None, prompts=["a"])


# VAE.


@pytest.fixture(scope="module")
def vaes(tmp_path_factory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("vaes")
    return {channels: write_vae(root / str(channels), channels) for channels in VAE_SETTINGS}


def pixels(n: int = 2, H: int = 16, W: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("channels, convention", [(4, "dit"), (4, "edm2"), (16, "dit")])
def test_latents_and_images_are_the_librarys(channels, convention, vaes):
    small_vae = vae.VAE(str(vaes[channels]), convention=convention)
    assert (small_vae.latent_channels, small_vae.downsample_factor, small_vae.convention) == (channels, 8, convention)
    reference = AutoencoderKL.from_pretrained(vaes[channels], low_cpu_mem_usage=False).eval()
    x = pixels().double()
    x = x / 255 if convention == "edm2" else x / 255 * 2 - 1
    mean, std = small_vae.encode(pixels())
    assert mean.shape == std.shape == (2, channels, 2, 3) and mean.dtype == std.dtype == torch.float32
    assert not mean.requires_grad and not mean.is_inference()
    with torch.no_grad():
        latents = reference.encode(x.float()).latent_dist
        torch.testing.assert_close(mean, latents.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std, latents.var.sqrt(), rtol=1e-4, atol=1e-5)
        z = vae.posterior_sample(mean, std, torch.full_like(mean, 0.5))
        torch.testing.assert_close(z, latents.mean + latents.std / 2)
        decoded = reference.decode(z).sample.double()
    decoded = decoded if convention == "edm2" else (decoded + 1) / 2
    image, wanted = small_vae.decode(z), (decoded * 255).clamp(0, 255)
    assert image.dtype == torch.uint8 and image.shape == pixels().shape
    # Rounded under dit; cut down under edm2, whose published code is clamp(0, 1).mul(255).to(uint8).
    low, high = (-1e-3, 1 + 1e-3) if convention == "edm2" else (-0.5 - 1e-3, 0.5 + 1e-3)
    assert (wanted - image.double()).min() >= low and (wanted - image.double()).max() <= high
    assert ((wanted - image.double()) > 0.6).any() == (convention == "edm2")
    assert len(image.unique()) > 20 and std.min() > 0 and mean.std() > 0.1


def test_constants_of_the_conventions(vaes, tmp_path):
    """x0 = (z - mean) * sd / std: diffusers' scaling for dit at sd = 1, EDM2's mean 0 and std 0.5 at sd = 0.5."""
    z = torch.randn(1, 16, 2, 2, dtype=torch.float64)

    def x0(z, constants, sd):
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in constants)
        return (z - mean) * sd / std

    sd3 = vae.VAE(str(vaes[16])).channel_stats()
    torch.testing.assert_close(x0(z, sd3, 1), (z - 0.0609) * 1.5305, rtol=1e-12, atol=1e-12)
    sd1 = vae.VAE(str(vaes[4])).channel_stats()
    torch.testing.assert_close(x0(z[:, :4], sd1, 1), z[:, :4] * 0.18215, rtol=1e-12, atol=1e-12)
    sdxl = vae.VAE(str(write_vae(tmp_path / "sdxl", 4, scaling_factor=0.13025))).channel_stats()
    torch.testing.assert_close(x0(z[:, :4], sdxl, 1), z[:, :4] * 0.13025, rtol=1e-12, atol=1e-12)
    local = dict(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0, 4.0, 5.0, 8.0], scaling_factor=0.5)
    means, stds = vae.VAE(str(write_vae(tmp_path / "own", 4, **local))).channel_stats()
    assert (means, stds) == ((1.0, 2.0, 3.0, 4.0), (4.0, 8.0, 10.0, 16.0))
    edm2 = vae.VAE(str(vaes[4]), convention="edm2").channel_stats()
    assert edm2 == ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28))
    at = torch.tensor(edm2[0], dtype=torch.float64) + torch.tensor(edm2[1], dtype=torch.float64)
    torch.testing.assert_close(
        x0(at[None, :, None, None], edm2, 0.5), torch.full((1, 4, 1, 1), 0.5, dtype=torch.float64)
    )


def test_a_vae_in_bfloat16(vaes):
    mean, std = vae.VAE(str(vaes[4])).encode(pixels())
    small_vae = vae.VAE(str(vaes[4]), dtype=torch.bfloat16)
    for half, full in zip(small_vae.encode(pixels()), (mean, std), strict=True):
        assert half.dtype == torch.float32 and not half.equal(full)
        torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)
    assert small_vae.decode(mean).dtype == torch.uint8 and small_vae.identity()["dtype"] == "bfloat16"


def test_what_a_vae_is(vaes, tmp_path):
    def recorded(folder: Path, **options: object) -> dict:
        return {k: v for k, v in vae.VAE(str(folder), **options).identity().items() if k != "vae"}

    original = recorded(vaes[4])
    assert (original["convention"], original["dtype"], original["channels"], original["downsample_factor"]) == (
        "dit",
        "float32",
        4,
        8,
    )
    inner = tmp_path / "pipeline" / "vae"
    shutil.copytree(vaes[4], inner)
    assert recorded(inner.parent) == original  # found in a pipeline
    assert vae.VAE(str(inner.parent)).identity()["vae"] == str(inner.parent)
    changed_options = recorded(vaes[4], convention="edm2", dtype=torch.bfloat16)
    assert {k for k, v in changed_options.items() if v != original[k]} == {"convention", "dtype"}
    about = json.loads((inner / "config.json").read_text())
    (inner / "config.json").write_text(json.dumps(about | {"_diffusers_version": "9"}))
    assert recorded(inner) == original
    (inner / "config.json").write_text(json.dumps(about | {"scaling_factor": 0.5}))
    weights = load_file(inner / f"{vae.WEIGHTS_STEM}.safetensors")
    weights["decoder.conv_in.bias"][0] += 1
    save_file(weights, inner / f"{vae.WEIGHTS_STEM}.safetensors", {"format": "pt"})
    assert {k for k, v in recorded(inner).items() if v != original[k]} == {"config", "weights"}


def test_vaes_that_are_refused(folders, vaes, tmp_path):
    def load_error(where: object, **options: object) -> str:
        with pytest.raises(UsageError) as error:
            vae.VAE(str(where), **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no such folder" in load_error("/no/such/vae")
    assert "unknown convention 'sd'; choose one of: dit, edm2" in load_error(vaes[4], convention="sd")
    assert "16 latent channels, but the convention edm2 has 4: use dit" in load_error(vaes[16], convention="edm2")
    assert "a model of type clip_text_model instead of AutoencoderKL" in load_error(folders["clip"])
    other = tmp_path / "vq"
    VQModel(block_out_channels=(4,), norm_num_groups=2).save_pretrained(other)
    assert "a model of type VQModel instead of AutoencoderKL" in load_error(other)
    grey = write_vae(tmp_path / "grey", 4, in_channels=1)
    assert "it maps 1 channels to 3, but RGB has 3" in load_error(grey)
    pickled = Path(shutil.copytree(vaes[4], tmp_path / "pickled"))
    weights = load_file(pickled / f"{vae.WEIGHTS_STEM}.safetensors")
    torch.save(weights, pickled / f"{vae.WEIGHTS_STEM}.bin")
    (pickled / f"{vae.WEIGHTS_STEM}.safetensors").unlink()
    assert f"no {vae.WEIGHTS_STEM}.safetensors in" in load_error(pickled) and "are not read" in load_error(pickled)
    del weights["decoder.conv_in.bias"]
    save_file(weights, pickled / f"{vae.WEIGHTS_STEM}.safetensors", {"format": "pt"})
    assert "its weights have no tensor decoder.conv_in.bias" in load_error(pickled)
    (pickled / f"{vae.WEIGHTS_STEM}.safetensors").write_bytes(b"")
    assert "cannot be opened" in load_error(pickled)


def test_images_of_another_size_are_refused(vaes):
    small_vae = vae.VAE(str(vaes[4]))
    with pytest.raises(UsageError, match="images of 16x20 pixels, but their size must be a multiple of 8"):
        small_vae.encode(pixels(1, 16, 20))


def test_numbers_that_overflow_are_an_error(vaes, tmp_path):
    folder = Path(shutil.copytree(vaes[4], tmp_path / "large"))
    weights = load_file(folder / f"{vae.WEIGHTS_STEM}.safetensors")
    weights["encoder.conv_in.bias"] += 1e6
    weights["decoder.conv_in.bias"] += 1e6
    save_file(weights, folder / f"{vae.WEIGHTS_STEM}.safetensors", {"format": "pt"})
    full, half = vae.VAE(str(folder)), vae.VAE(str(folder), dtype=torch.float16)
    mean, _ = full.encode(pixels())
    for call in (lambda: half.encode(pixels()), lambda: half.decode(mean)):
        with pytest.raises(RunError, match="not finite in float16"):
            call()


OPENED = """
import sys, torch
from gesso.data.encoders import text
from gesso.config import SemanticConfig
text.build_text_encoder(SemanticConfig(kind="text", encoder=sys.argv[1], max_tokens=8))
with torch.device("meta"):
    assert torch.linspace(0, 1, 3).device.type == "meta"
"""


def test_opening_an_encoder_leaves_torch_as_it_was(folders):
    """transformers replaces torch.linspace for a while; torch must not keep the replacement."""
    subprocess.run([sys.executable, "-c", OPENED, str(folders["clip"])], check=True)
