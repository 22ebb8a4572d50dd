"""Evaluation of a run over many samples: in parts, by any number of ranks, resumed after any interruption."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from helpers.encoders import write_full_clip
from helpers.feature_weights import inception_state, lpips_states, write_weights
from helpers.run_factory import small_run, write_run

from gesso import atomic_io, config, ema, sampling, snapshot
from gesso.config import EvalConfig
from gesso.data import crops
from gesso.data.factory import open_dataset
from gesso.data.sources import decode, open_source
from gesso.errors import UsageError
from gesso.evaluation import results, run_sampler, runner, tasks, validation
from gesso.evaluation.feature_stats import FeatureStats, Moments
from gesso.evaluation.image_sets import ImageSet, open_image_set
from gesso.evaluation.metrics import METRICS, TOY_METRICS, per_image, precision_recall, select_metrics
from gesso.evaluation.metrics.base import Metric, MetricInputs
from gesso.evaluation.metrics.frechet import frechet_distance
from gesso.evaluation.networks import NETWORKS, clip_dino, downloads, lpips, toy_networks
from gesso.evaluation.networks.base import SampleConditions
from gesso.evaluation.networks.toy_networks import load_digit_features
from gesso.evaluation.tasks import EvalContext

CPU = torch.device("cpu")
VALIDATION_OFF = {"monitor.validate_every": "null"}
SILENT = lambda done, total: None  # noqa: E731


@pytest.fixture(autouse=True)
def small_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tasks, "PART_SIZE", 30)
    monkeypatch.setattr(tasks, "POLL_INTERVAL_S", 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("measured") / "run"
    write_run(path)
    return path


def recorded_run(folder, *settings: str) -> config.RunConfig:
    return config.load_with_overrides(
        folder, ["sample.steps=2", "eval.num_samples=75", *settings], ("sample.", "eval.")
    )


def unfinished(folder) -> list:
    """Return the folders of parts of unfinished evaluations; locks stay."""
    return [path for path in (folder / "evaluation").iterdir() if path.suffix != ".lock"]


def sample_directly(folder, run: config.RunConfig, seeds: range) -> torch.Tensor:
    """Return the samples themselves, generated in one pass, in RGB."""
    tensors, *_ = snapshot.reconstruct_from_run(folder, [ema.sampling_profile(run.sample)])
    cond, _ = sampling.build_cond(run, seeds, snapshot.load_control_rows(folder), run_sampler.sample_labels(run, seeds))
    created = torch.cat(list(sampling.generate(snapshot.denoiser_from_weights(tensors[0], run), run, seeds, cond)))
    return created.expand(-1, 3, -1, -1)


def frechet(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    return frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())


def test_a_run_is_measured(folder):
    run = recorded_run(folder, "eval.metrics=[fd_digits]", "eval.num_repeats=2", "eval.labels=random")
    result = runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT)
    network = toy_networks.load_digit_features()
    real = torch.cat(list(open_image_set("digits", 8).batches(500)))
    expected = [
        frechet(network(sample_directly(folder, run, seeds)), network(real)) for seeds in (range(75), range(75, 150))
    ]
    assert result.metrics["fd_digits"]["values"] == pytest.approx(expected, rel=1e-6)
    assert result.metrics["fd_digits"]["best"] == pytest.approx(min(expected), rel=1e-6)
    lines = results.format_evaluation(result)
    assert f"best of 2: {min(expected):.4f}" in lines[0] and "75 samples, reference 1,797 images of digits" in lines[1]
    (recorded,) = results.read_evaluations(folder).values()
    assert recorded == result and recorded.protocol["reference_images"] == 1797
    assert result.throughput.keys() == {"images_per_second"} and 0 < result.throughput["images_per_second"] < 1e6
    assert unfinished(folder) == []


def test_what_was_spent():
    """100 images in 4 s at a mean of 300 W are 25 a second and 1200 J, which is 333 mWh or 3.33 an image."""
    timing = tasks.Timing(60, 1.0, (250.0,)).add(tasks.Timing(40, 3.0, (350.0,)))
    assert timing.throughput() == {"images_per_second": 25, "milliwatt_hours": pytest.approx(10 / 3)}
    assert tasks.Timing().throughput() == {} and tasks.power_draw(CPU) == ()


def test_labels_are_drawn_by_seed(folder):
    run = recorded_run(folder, "eval.labels=random")
    labels = torch.tensor(run_sampler.sample_labels(run, range(5000)))
    counts = labels.bincount(minlength=10)
    assert len(counts) == 10 and counts.min() > 400 and counts.max() < 600 and not labels.equal(torch.arange(5000) % 10)
    assert run_sampler.sample_labels(run, range(100, 200)) == labels[100:200].tolist()
    assert run_sampler.sample_labels(recorded_run(folder), range(30)) == [i % 10 for i in range(30)]


def test_parts_are_shared_and_survive(folder, monkeypatch):
    run = recorded_run(folder, "eval.metrics=[fd_digits]", "sample.batch_size=11")
    full = runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT).metrics
    # Two ranks, one after the other: the last one to begin is the first rank, which waits for the other's parts.
    assert runner.evaluate_metrics(EvalContext(folder, run, CPU, 1, 2), SILENT) is None
    (place,) = unfinished(folder)
    assert [path.name for path in place.glob("*.safetensors")] == ["digits-0-000001.safetensors"]
    assert runner.evaluate_metrics(EvalContext(folder, run, CPU, 0, 2), SILENT).metrics == full
    # Interrupted after the first part; then only missing samples are generated.
    created, first_seeds = sampling.generate, []

    def stopping(denoiser, run, seeds, *rest):
        first_seeds.append(seeds[0])
        if len(first_seeds) == 2:
            raise KeyboardInterrupt
        return created(denoiser, run, seeds, *rest)

    monkeypatch.setattr(sampling, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT)
    assert runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT).metrics == full
    assert first_seeds == [0, 30, 30, 60]


def test_work_of_an_interrupted_command_is_resumed(folder, monkeypatch):
    """A locked part is skipped, and computed at the end if the process that locked it has ended without it."""
    run = recorded_run(folder, "eval.metrics=[fd_digits]", "sample.batch_size=13")
    full = runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT).metrics
    claimed, taken = atomic_io.try_lock, []

    @contextlib.contextmanager
    def once(path):
        with claimed(path) as mine:
            taken.append(path.name)
            yield mine and (path.name != "digits-0-000001.safetensors" or taken.count(path.name) > 1)

    monkeypatch.setattr(atomic_io, "try_lock", once)
    assert runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT).metrics == full
    assert taken.count("digits-0-000001.safetensors") == 2 and taken.count("digits-0-000000.safetensors") == 1


def test_a_reference_is_read_by_all_ranks_and_once(folder, monkeypatch):
    """The first rank leaves parts to the others. A third evaluation reads nothing, on whatever machine."""
    run = recorded_run(folder, "eval.metrics=fd_digits")
    full = runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT).metrics
    read = []
    batches = ImageSet.batches

    def reading(self, size, first=0, stop=None):
        read.append((first, stop))
        return batches(self, size, first, stop)

    monkeypatch.setattr(ImageSet, "batches", reading)
    assert runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT).metrics == full and not read
    monkeypatch.setattr(runner, "REFERENCE_PART_SIZE", 500)  # 1,797 pictures: four parts
    for cache in ("other", "third"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / cache))
        read.clear()
        runner.evaluate_metrics(EvalContext(folder, run, CPU, 1, 2), SILENT)
        assert read == [(500, 1000), (1500, 1797)]
        if cache == "third":  # the other rank's machine has no cache, and it was killed before
            sorted((folder / "evaluation").glob("*/reference-digits-0-*.safetensors"))[-1].unlink()
        actual = runner.evaluate_metrics(EvalContext(folder, run, CPU, 0, 2), SILENT).metrics
        assert read[2:] == [(0, 500), (1000, 1500)] + [(1500, 1797)] * (cache == "third")
        assert actual["fd_digits"]["mean"] == pytest.approx(full["fd_digits"]["mean"], rel=1e-9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "fourth"))
    monkeypatch.setattr(runner, "REFERENCE_PART_SIZE", 898)  # the last part is one picture
    actual = runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT).metrics
    assert actual["fd_digits"]["mean"] == pytest.approx(full["fd_digits"]["mean"], rel=1e-9)
    assert unfinished(folder) == []


def test_loss_on_other_images_and_on_none(folder, tmp_path):
    with pytest.raises(
        UsageError, match=r"eval.metrics=loss needs images that were not trained on: .*eval.validation_source=DIR"
    ):
        runner.evaluate_metrics(EvalContext(folder, recorded_run(folder, "eval.metrics=loss"), CPU), SILENT)
    output = ("eval.metrics=loss", "eval.validation_source=digits", "eval.validation_pairs=75")
    actual = [
        runner.evaluate_metrics(EvalContext(folder, recorded_run(folder, *output), CPU), SILENT) for _ in range(2)
    ]
    assert actual[0].metrics == actual[1].metrics and actual[0].throughput == {}
    tensors, *_ = snapshot.reconstruct_from_run(folder, [ema.sampling_profile(recorded_run(folder).sample)])
    run = recorded_run(folder, *output)
    dataset = open_dataset(run.data, run.latent, 0)
    validated = validation.ValidationLoss(run, dataset, torch.arange(len(dataset)), CPU, 75)
    losses = validated.losses(snapshot.denoiser_from_weights(tensors[0], run), [validated.load_batch(torch.arange(75))])
    assert actual[0].metrics["loss"]["mean"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert runner.evaluate_metrics(EvalContext(folder, run, CPU, 1, 2), SILENT) is None
    assert runner.evaluate_metrics(EvalContext(folder, run, CPU, 0, 2), SILENT).metrics == actual[0].metrics
    with pytest.raises(UsageError, match=r"eval.validation_source=/none: there is no such folder"):
        runner.evaluate_metrics(
            EvalContext(folder, recorded_run(folder, "eval.metrics=loss", "eval.validation_source=/none"), CPU), SILENT
        )


def test_another_number_of_steps_is_another_measurement(folder):
    known = len(results.read_evaluations(folder))
    for steps in (2, 3):
        run = recorded_run(folder, "eval.metrics=[fd_digits]", "eval.num_samples=31", f"sample.steps={steps}")
        runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT)
    assert len(results.read_evaluations(folder)) == known + 2


def test_clip_score_of_a_run_with_words(tmp_path):
    folder, clip = tmp_path / "run", write_full_clip(tmp_path / "clip")
    write_run(folder, **{"semantic.kind": "text", "data.source": "digits-mixed-resolution"})
    run = recorded_run(folder, "eval.metrics=[clip]", f"eval.clip={clip}", "eval.num_samples=40")
    result = runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT)
    prompts = run_sampler.load_prompts(run)
    tensors, *_ = snapshot.reconstruct_from_run(folder, [ema.sampling_profile(run.sample)])
    texts = [prompts[i].caption for i in range(40)]
    cond, _ = sampling.build_cond(run, range(40), snapshot.load_control_rows(folder), None, texts)
    created = torch.cat(list(sampling.generate(snapshot.denoiser_from_weights(tensors[0], run), run, range(40), cond)))
    expected = float(clip_dino.CLIPScore(str(clip))(created.expand(-1, 3, -1, -1), texts).mean())
    assert result.metrics["clip"]["mean"] == pytest.approx(expected, rel=1e-4)
    assert "40 samples; clip" in results.format_evaluation(result)[1]
    assert len(set(texts)) > 3


@pytest.mark.parametrize("recipe", ["shapes", "shapes-class"])
def test_shapes_are_read_back(recipe, tmp_path):
    folder, n = tmp_path / "run", 40
    write_run(folder, recipe)
    run = recorded_run(folder, "eval.metrics=shape_accuracy", f"eval.num_samples={n}", "eval.toy_metrics=none")
    scores = runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT).metrics
    prompts, rows = run_sampler.load_prompts(run), snapshot.load_control_rows(folder)
    captions = [prompts[i].caption for i in range(n)] if prompts else None
    labels = run_sampler.sample_labels(run, range(n))
    cond, _ = sampling.build_cond(run, range(n), rows, labels, captions)
    tensors, *_ = snapshot.reconstruct_from_run(folder, [ema.sampling_profile(run.sample)])
    created = torch.cat(list(sampling.generate(snapshot.denoiser_from_weights(tensors[0], run), run, range(n), cond)))
    if captions:
        expected = shape_rates(created, None, captions)
    else:
        expected = shape_rates(created, labels, None)
    assert {name: actual["mean"] for name, actual in scores.items()} == pytest.approx(expected)


def test_rates_are_those_of_real_pictures():
    """Real shapes match their captions, and do not match the captions of others."""
    source = open_source("shapes:60")
    created = torch.stack([torch.from_numpy(shown(source, i)) for i in range(60)])
    captions = list(source.captions())
    right, wrong = (shape_rates(created, None, texts) for texts in (captions, captions[1:] + captions[:1]))
    assert right["all"] > 0.95 and right["relation"] > 0.95 and wrong["pair"] < 0.5


def shape_rates(images, labels, captions):
    matches = toy_networks.ShapeMatch().extract_features(images, SampleConditions(labels, captions))
    return per_image.match_rates(
        matches, toy_networks.CLASS_CHECKS if captions is None else toy_networks.CAPTION_CHECKS
    )


def shown(source, i):
    image = decode.decode_image(source.item(i).image, 3)[0]
    return crops.crop_resize(image, crops.center_view(image.height, image.width), 64, 64)


def test_agreement_of_digits(folder):
    run = recorded_run(folder, "eval.metrics=class_accuracy,fd_digits")
    scores = runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT).metrics
    _, logits = load_digit_features().classify(sample_directly(folder, run, range(75))[:, :1])
    expected = (logits.argmax(dim=1) == torch.arange(75) % 10).double().mean()
    assert scores["class_accuracy"]["mean"] == pytest.approx(float(expected))


def test_diversity_under_other_sizes(tmp_path, monkeypatch):
    """LPIPS is the mean over seeds of all pairs among five sizes; lpips_hr leaves out sizes below the resolution."""
    assert METRICS["lpips"].sizes == (64, 128, 256, 512, 1024)
    folder, sizes = tmp_path / "run", (8, 16, 32, 64, 1024)
    monkeypatch.setitem(METRICS, "lpips", replace(METRICS["lpips"], sizes=sizes))
    write_run(folder, "shapes-class", **{"control.variables": "size", "control.schedule": "uniform"})
    trunk, heads = lpips_states("alex")
    files = write_weights(trunk, tmp_path, "trunk.pth"), write_weights(heads, tmp_path, "heads.pth")
    network = lpips.load_lpips("alex", tmp_path, weight_files=files)
    monkeypatch.setattr(lpips, "load_lpips", lambda *where: network)
    run = recorded_run(folder, "eval.metrics=lpips", "eval.diversity_prompts=3", "sample.steps=2", "sample.guidance=1")
    scores = runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT).metrics
    tensors, *_ = snapshot.reconstruct_from_run(folder, [ema.sampling_profile(run.sample)])
    denoiser, rows = snapshot.denoiser_from_weights(tensors[0], run), snapshot.load_control_rows(folder)
    every, sharp = [], []
    for seed in range(3):
        cond = [sampling.build_cond(run, [seed], rows, [seed % 6], None, {"size": f"{s}x{s}"})[0] for s in sizes]
        created = [next(iter(sampling.generate(denoiser, run, [seed], c))) for c in cond]
        distance = {(i, j): float(network(created[i], created[j])) for j in range(5) for i in range(j)}
        every.append(sum(distance.values()) / 10)
        sharp.append(sum(v for (i, _), v in distance.items() if i >= 2) / 3)
    assert sizes[2] == run.data.resolution and min(every) > 1e-4 and every != pytest.approx(sharp)
    assert scores["lpips"]["values"] == pytest.approx([sum(every) / 3], rel=1e-3)
    assert scores["lpips_hr"]["values"] == pytest.approx([sum(sharp) / 3], rel=1e-3)


@pytest.mark.parametrize("sizes", [(8, 16, 32), (8, 64), (64, 128)])
def test_sizes_below_the_resolution_are_left_out(sizes):
    """At 64 pixels no size is below 64; lpips_hr is absent where no pair is left."""
    metric = replace(METRICS["lpips"], sizes=sizes)

    class ShapesSampler:
        run = config.RunConfig(net=config.DiTConfig(), data=config.DataConfig(resolution=64))

        def generate_batches(self, seeds, control):
            yield torch.full((2, 3, 4, 4), int(control["size"].split("x")[0])), None

    distance = lambda a, b: (a - b).abs().float().mean((1, 2, 3))  # noqa: E731
    rows = run_sampler.diversity_distances(ShapesSampler(), metric, distance, [0, 1], ["lpips"])["lpips"]["rows"]
    every = {(8, 16, 32): 16.0, (8, 64): 56.0, (64, 128): 64.0}[sizes]
    assert rows.tolist() == [[every, 64.0, 0, 0] if sizes == (64, 128) else [every, 0, 0]] * 2


def test_detail_energy_is_what_halving_takes_away():
    """A checkerboard is all detail, an even image none. The score is the ratio of rms, largest size over smallest."""
    even, board = torch.full((8, 8), 0.5), (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    images = torch.stack([even, board, 3 * board])[:, None].float()
    assert run_sampler.detail_energy(images).tolist() == pytest.approx([0, 1, 9])
    mean = torch.tensor([5.0, 1.0, 9.0])
    stats = SimpleNamespace(moments=SimpleNamespace(mean=mean))
    assert per_image.size_diversity("digits_feature_distance", MetricInputs(stats, None)) == {
        "digits_feature_distance": 5.0,
        "size_detail": 3.0,
    }
    with_hr = SimpleNamespace(moments=SimpleNamespace(mean=torch.tensor([5.0, 4.0, 1.0, 1.0])))
    expected = {"lpips": 5.0, "lpips_hr": 4.0, "size_detail": 1.0}
    assert per_image.size_diversity("lpips", MetricInputs(with_hr, None)) == expected


def test_scores_are_repeated_one_by_one(folder):
    """Only metrics of eval.repeated are computed on other seeds; each has the best in its direction."""
    cfg = "eval.metrics=fd_digits,class_accuracy"
    every = runner.evaluate_metrics(EvalContext(folder, recorded_run(folder, cfg, "eval.num_repeats=3"), CPU), SILENT)
    run = recorded_run(folder, cfg, "eval.num_repeats=3", "eval.repeated=fd_digits")
    result = runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT)
    assert [len(every.metrics[name]["values"]) for name in ("fd_digits", "class_accuracy")] == [3, 3]
    assert result.metrics["fd_digits"] == every.metrics["fd_digits"]
    once = result.metrics["class_accuracy"]
    assert once["values"] == every.metrics["class_accuracy"]["values"][:1] and once["best"] == once["values"][0]
    assert result.protocol["repeated"] == ["fd_digits"] and "repeated" not in every.protocol
    for name, choose in (("fd_digits", min), ("class_accuracy", max)):
        assert every.metrics[name]["best"] == choose(every.metrics[name]["values"])


def test_best_value_follows_the_metric_direction():
    """Distances, losses and conditional diversity have their minimum as best; the other metrics their maximum."""
    values = [2.0, 3.0, 1.0]
    lower = {"fid", "kid", "fd_dinov2", "kd_dinov2", "fd_clip", "lpips", "digits_feature_distance", "loss"}
    assert lower <= {name for name, metric in METRICS.items() if metric.lower_is_better}
    higher = {"is", "pr", "pr_dinov2", "clip", "class_accuracy", "shape_accuracy"}
    assert higher == {name for name, metric in METRICS.items() if not metric.lower_is_better}
    assert results.summarize(METRICS["loss"], {"loss_0_10": values})["loss_0_10"]["best"] == 1.0
    assert results.summarize(METRICS["pr"], {"recall": values})["recall"]["best"] == 3.0
    # A spread is that of the repetition that was best.
    spread = results.summarize(METRICS["is"], {"is": values, "is_std": [0.1, 0.3, 0.2]})["is_std"]
    assert spread["best"] == 0.3 and spread["values"] == [0.1, 0.3, 0.2]


def test_precision_and_recall_are_over_all_samples(monkeypatch):
    """ADM's evaluator uses 10k reference images and all samples; density and coverage use 10k of each."""
    monkeypatch.setattr(precision_recall, "MAX_NEIGHBOUR_SAMPLES", 40)
    g = torch.Generator().manual_seed(0)
    real, created = torch.randn(60, 2, generator=g), 1.2 * torch.randn(150, 2, generator=g)
    x, y = (FeatureStats(Moments(), rows) for rows in (created, real))
    actual = precision_recall.compute("pr", MetricInputs(x, None, y, torch.nn.Linear(1, 1)))
    reference, every = precision_recall.shuffle(real)[:40].double(), created.double()
    radius = {
        name: torch.cdist(x, x).kthvalue(4, dim=1).values for name, x in (("real", reference), ("made", every))
    }  # 4: the sample itself is nearest
    distance = torch.cdist(every, reference)
    assert actual["precision"] == pytest.approx(float((distance <= radius["real"]).any(1).double().mean()))
    assert actual["recall"] == pytest.approx(float((radius["made"] >= distance.T).any(1).double().mean()))
    few = precision_recall.precision_recall(reference, precision_recall.shuffle(created)[:40], 5)
    assert (actual["density"], actual["coverage"]) == (few.density, few.coverage)


def test_kernel_distance_of_few_samples_is_refused_before_any_is_drawn(folder, monkeypatch):
    monkeypatch.setattr(sampling, "generate", None)
    monkeypatch.setitem(NETWORKS, "inception", NETWORKS["digits"])
    with pytest.raises(UsageError, match=r"subsets of 1,000 images, but one set has 75.*eval\.kid_subset .* to 75"):
        runner.evaluate_metrics(EvalContext(folder, recorded_run(folder, "eval.metrics=kid"), CPU), SILENT)


def test_captions_that_a_protocol_draws_for_again_are_noted(folder):
    prompts = [run_sampler.Prompt("a cat", 0)] * 60
    run = recorded_run(folder, "eval.protocol=berrada-coco")
    (note,) = runner._repeated_caption_note(run, prompts)
    assert "75 samples of 60 captions" in note and "eval.num_samples=60" in note
    for evaluated_run, captions in ((run, prompts * 2), (recorded_run(folder), prompts), (run, None)):
        assert runner._repeated_caption_note(evaluated_run, captions) == []


def test_digits_with_two_size_conditions(tmp_path):
    """The value is the mean feature distance of samples conditioned on 4x4 and 8x8, 0 where the size has no weight."""
    actual = {}
    for schedule in ("uniform", "zero"):
        folder = tmp_path / schedule
        write_run(
            folder,
            "digits",
            **{"data.source": "digits-mixed-resolution", "control.variables": "size", "control.schedule": schedule},
        )
        run = recorded_run(folder, "eval.metrics=digits_feature_distance", "eval.diversity_prompts=7", "sample.steps=2")
        result = runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT)
        actual[schedule] = result.metrics["digits_feature_distance"]["values"]
        assert result.protocol["networks"] == {"digits_distance": "digits-cnn-v1"}
        detail = result.metrics["size_detail"]["values"]
        assert (detail == [1.0]) == (schedule == "zero")  # without the condition, samples are the same
    tensors, *_ = snapshot.reconstruct_from_run(tmp_path / "uniform", [ema.sampling_profile(run.sample)])
    run = recorded_run(tmp_path / "uniform", "sample.steps=2")
    denoiser, rows, network = (
        snapshot.denoiser_from_weights(tensors[0], run),
        snapshot.load_control_rows(tmp_path / "uniform"),
        load_digit_features(),
    )
    seeds, created = list(range(7)), []
    for size in ("4x4", "8x8"):
        cond, _ = sampling.build_cond(run, seeds, rows, seeds, None, {"size": size})
        created.append(network(torch.cat(list(sampling.generate(denoiser, run, seeds, cond)))))
    assert actual["zero"] == [0] and actual["uniform"][0] > 1e-3
    assert actual["uniform"] == pytest.approx([float((created[0] - created[1]).norm(dim=1).mean())], rel=1e-4)


def test_scores_at_an_earlier_time(tmp_path):
    """Weights at eval.nimg are evaluated, and their number of images is recorded."""
    folder = tmp_path / "run"
    run = write_run(folder)
    for stored_one in snapshot.list_snapshots(folder):
        weights = {name: tensor * 1.5 for name, tensor in snapshot.read(stored_one.path)[0].items()}
        path = snapshot.snapshot_path(folder / "snapshots", 320, stored_one.profile)
        snapshot.write(path, weights, 320, stored_one.profile, run)
    last, early = (
        runner.evaluate_metrics(EvalContext(folder, recorded_run(folder, "eval.metrics=fd_digits", *at), CPU), SILENT)
        for at in ((), ("eval.nimg=320",))
    )
    assert (early.protocol["nimg"], last.protocol["nimg"]) == (320, 640)
    assert early.metrics["fd_digits"]["values"] != last.metrics["fd_digits"]["values"]


def test_every_metric_is_complete():
    for name, metric in METRICS.items():
        assert metric.name == name and metric.labels and (metric.network in NETWORKS or name == "loss")
        assert "training_images" in metric.needs or select_metrics([name]) == [metric]
    assert {name for names in TOY_METRICS.values() for name in names} <= METRICS.keys()
    assert set(TOY_METRICS) == set(get_args(EvalConfig.model_fields["toy_metrics"].annotation))
    with pytest.raises(UsageError, match=r"computed by eval\.toy_metrics=digits"):
        select_metrics(["frechet_distance"])


def test_a_new_metric_is_one_entry(folder, monkeypatch):
    def brightness(name, inputs):
        return {name: float(inputs.samples.features.mean())}

    monkeypatch.setitem(METRICS, "mean_feature", Metric("mean_feature", "digits", brightness, {"mean_feature": "mean"}))
    run = recorded_run(folder, "eval.metrics=mean_feature", "eval.num_repeats=2", "eval.num_samples=12")
    result = runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT)
    assert len(result.metrics["mean_feature"]["values"]) == 2 and result.protocol["reference"] is None


def test_several_scores_of_one_drawing(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(
        downloads.INCEPTION_FILES, "torch-fidelity", write_weights(inception_state(), tmp_path, "inception.pth")
    )
    settings = ("eval.metrics=[fid,is,fd_digits]", f"eval.weights_dir={tmp_path}", "eval.num_samples=12")
    reference = tmp_path / "real"
    reference.mkdir()
    for i, one in enumerate(open_image_set("digits", 8).batches(10).__next__()):
        sampling.save_png(sampling.to_pil(one), reference / f"{i}.png")
    run = recorded_run(folder, *settings, f"eval.reference={reference}")
    result = runner.evaluate_metrics(EvalContext(folder, run, CPU), SILENT)
    assert set(result.metrics) == {"fid", "is", "is_std", "fd_digits"}
    assert "do not determine a covariance" in result.notes[-1]


def test_missing_requirements_are_reported_before_sampling(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "generate", None)
    for settings, output in (
        (("eval.metrics=[fad]",), "no metric 'fad'; did you mean fid"),
        (("eval.metrics=[clip]",), "needs a run with text"),
        (("eval.metrics=lpips",), "has no control variable size"),
        (("eval.metrics=[fid]", f"eval.weights_dir={tmp_path}"), r"needs pt_inception-2015-12-05-6726825d\.pth"),
        (("eval.metrics=[fd_digits]", f"eval.reference={tmp_path}"), str(tmp_path)),
        (("eval.metrics=[fd_digits]", "sample.aspect=2:1"), "need square images"),
    ):
        with pytest.raises(UsageError, match=output):
            runner.evaluate_metrics(EvalContext(folder, recorded_run(folder, *settings), CPU), SILENT)


def test_the_command(folder, gesso):
    code, output, _ = gesso("evaluate", folder, "eval.metrics=[fd_digits]", "eval.num_samples=32", "sample.steps=2")
    assert code == 0 and "fd_digits" in output and "metrics.json" in output


def test_scores_of_several_averages(tmp_path, monkeypatch):
    """Each of eval.halflives is a separate measurement, equal to that with sample.halflife."""
    write_run(tmp_path / "run", "digits", **{"ema.halflives": "[1000]"})
    output = ("eval.metrics=fd_digits", "eval.num_samples=40", "sample.steps=2")
    lines = runner.evaluate_run(
        tmp_path / "run", recorded_run(tmp_path / "run", *output, "eval.halflives=[1000]"), SILENT
    )
    assert [line for line in lines if line.startswith("EMA")] == ["EMA: sigma_rel 0.05", "EMA: half-life 1,000"]
    both = results.read_evaluations(tmp_path / "run").values()
    by = {result.protocol["halflife"]: result.metrics["fd_digits"]["values"] for result in both}
    assert set(by) == {None, 1000} and by[None] != by[1000]
    for halflife in (None, 1000):
        run_at_length = recorded_run(tmp_path / "run", *output, *([f"sample.halflife={halflife}"] if halflife else []))
        actual = runner.evaluate_metrics(EvalContext(tmp_path / "run", run_at_length, CPU), SILENT)
        assert actual.metrics["fd_digits"]["values"] == by[halflife]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("has_weights", [False, True])
def test_default_metrics_are_those_that_need_nothing_else(held_out, has_weights, tmp_path):
    if has_weights:
        (tmp_path / downloads.INCEPTION_FILES["torch-fidelity"].name).touch()
    run = small_run(
        **{
            "eval.toy_metrics": "none",
            "eval.weights_dir": tmp_path,
            "data.num_validation": 8 * held_out,
            **VALIDATION_OFF,
        }
    )
    changed, note = runner.default_metrics(run)
    assert changed.eval.metrics == ("loss",) * held_out + ("kid",) * has_weights
    assert ("data.num_validation=N in training" in note) == (not held_out)
    assert ("eval.metrics=kid, which downloads Inception" in note) == (not has_weights)
    if has_weights:
        assert changed.eval.num_samples == changed.eval.kid_subset == runner.DEFAULT_NUM_SAMPLES


def test_default_metrics_are_said_before_the_work_and_computed(tmp_path, monkeypatch):
    run = write_run(
        tmp_path,
        **{"eval.toy_metrics": "none", "data.num_validation": 8, "eval.validation_pairs": 16, **VALIDATION_OFF},
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    events: list[str] = []
    lines = runner.evaluate_run(tmp_path, run, lambda done, total: events.append("work"), events.append)
    assert events[0].startswith("no eval.metrics are set, so this makes: loss, sheets") and "work" in events
    assert any(line.startswith("loss") for line in lines), lines
    assert {path.name for path in (tmp_path / "sheets").iterdir()} == {"by_class.png", "nearest.png"}
