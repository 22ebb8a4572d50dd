"""Public Python API: `import gesso` exports what is defined here.

    import gesso

    run = gesso.train(gesso.recipe("digits", {"train.total_images": 40_000}), out="runs/x")
    images = run.sample(labels=[7], seeds=range(4), guidance=2.0, sigma_rel=0.1)  # uint8 (N, C, H, W)
    values = run.evaluate(["fd_digits"], num_images=1_000)

Settings are the ones of the command line (`gesso config RECIPE` lists them). Every function raises gesso.GessoError, or
a class derived from it, for wrong arguments, with a message that says how to fix them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from gesso import conditioning, config, ema, hub, models, recipes, sampling, snapshot
from gesso.config import InputSpec, RunConfig
from gesso.config.addresses import confirm_addresses
from gesso.data.normalization import Normalizer
from gesso.diffusion.denoiser import Denoiser
from gesso.evaluation import runner
from gesso.training.run_folder import start_training
from gesso.training.trackers import Tracker

Settings = Mapping[str, Any]
"""Settings by name, such as {"sample.steps": 32}; values as in Python or as typed on the command line."""
Progress = Callable[[int, int], None]
"""Callback with the number of finished and of all items."""


class Run:
    """A finished or running training in a run folder.

    Args:
        folder: The run folder, which holds run.yaml and snapshots, or hub:OWNER/NAME.

    Attributes:
        folder: The run folder.
        config: Settings of the run, with what was recorded when training started.
        max_denoisers: Number of networks, one for each EMA length and time in use, that stay in memory (default 1).

    Raises:
        UsageError: There is no run in the folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = hub.fetch_run(folder)
        self.config: RunConfig = config.load_with_overrides(self.folder, [], ())
        self.max_denoisers = 1
        self._denoisers: dict[tuple[str, int | None, str], Denoiser] = {}  # the last used stands last
        self._decoders: dict[str, Normalizer] = {}

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def nimg(self) -> int:
        """Number of images that the last snapshot was trained on."""
        return snapshot.list_snapshots(self.folder)[-1].nimg

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; empty without classes."""
        return tuple(self.config.data.class_names or ())

    def with_settings(self, settings: Settings | None) -> RunConfig:
        """Return the settings of the run, changed by `settings`: sample.*, eval.*, data.source."""
        changeable = ("sample.", "eval.", "data.source")
        return config.load_with_overrides(self.folder, to_arguments(settings or {}), changeable)

    def denoiser(
        self, sigma_rel: float | None = None, nimg: int | None = None, settings: Settings | None = None
    ) -> Denoiser:
        """Return the denoiser D(x, s, cond) with EMA weights of any length, reconstructed from the snapshots.

        Args:
            sigma_rel: Relative EMA length; None takes sample.sigma_rel or sample.halflife.
            nimg: Number of images that the weights were trained on; None is the last snapshot.
            settings: Changes of sample.*.

        Returns:
            A module in evaluation mode on the device of the run; the same object for the same arguments.
        """
        return self._denoiser(self.with_settings(self._sampling_settings(settings, None, sigma_rel)), nimg)

    def sample(
        self,
        labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        seeds: Sequence[int] = range(16),
        guidance: float | None = None,
        sigma_rel: float | None = None,
        control: Mapping[str, str] | None = None,
        nimg: int | None = None,
        settings: Settings | None = None,
        progress: Progress | None = None,
        on_step: sampling.StepCallback | None = None,
    ) -> Tensor:
        """Sample one image per seed.

        An image depends on its seed, its condition and the sampling settings, not on the other images.

        Args:
            labels: Classes, by index (int) or name (str): one for each seed, or another number n of them, of which
                seed s takes labels[s mod n]; None takes all classes in this way.
            prompts: Captions in the same way, for runs with text.
            seeds: N seeds.
            guidance: Guidance scale; None takes sample.guidance.
            sigma_rel: Relative EMA length; None takes sample.sigma_rel or sample.halflife.
            control: Values of control variables, such as {"size": "512x512", "flip": "no"}.
            nimg: Number of images that the weights were trained on; None is the last snapshot.
            settings: Further changes of sample.*, such as {"sample.steps": 50}.
            progress: Called after each batch with the number of finished and of all images.
            on_step: Called after each sampling step of each batch with the index of the step and the denoised
                estimates, (n, C, H, W) uint8: the image as the network sees it at that noise level.

        Returns:
            Images (N, C, H, W) uint8 on the CPU.

        Raises:
            UsageError: A setting or condition is invalid for this run.
        """
        run = self.with_settings(self._sampling_settings(settings, guidance, sigma_rel))
        sampling.check_sampling(run, sampling.run_device(run))
        seeds = list(seeds)
        # As many conditions as seeds belong to the seeds one by one; others are chosen by the seed itself.
        label_keys = range(len(seeds)) if labels is not None and len(labels) == len(seeds) else seeds
        prompt_keys = range(len(seeds)) if prompts and len(prompts) == len(seeds) else seeds
        indices = conditioning.expand_labels(run, labels, label_keys)
        captions = conditioning.expand_prompts(run, tuple(prompts or ()), prompt_keys)
        rows = snapshot.load_control_rows(self.folder)
        cond, _ = sampling.build_cond(run, seeds, rows, indices, captions, dict(control or {}))
        guide, denoiser, images = sampling.load_guide(self.folder, run), self._denoiser(run, nimg), list[Tensor]()
        for batch in sampling.generate(denoiser, run, seeds, cond, guide, self._decoder(run), on_step):
            images.append(batch)
            if progress:
                progress(sum(map(len, images)), len(seeds))
        return torch.cat(images)

    def evaluate(
        self,
        metrics: Sequence[str],
        num_images: int | None = None,
        settings: Settings | None = None,
        progress: Progress | None = None,
        allow_addresses: bool = False,
    ) -> dict[str, float]:
        """Evaluate metrics of the run, as `gesso evaluate`; results are stored in the run folder too.

        Args:
            metrics: Names such as "fid", "fd_dinov2" or "loss" (eval.metrics).
            num_images: Number of samples; None takes eval.num_samples.
            settings: Further changes of sample.* and eval.*.
            progress: Called with the number of finished and of all samples.
            allow_addresses: True fetches from addresses (s3://, https://) that the run folder names.

        Returns:
            The values by name; one metric may give several.

        Raises:
            UsageError: The run or this machine lacks something that a metric needs.
        """
        changes = {"eval.metrics": ",".join(metrics), **({"eval.num_samples": num_images} if num_images else {})}
        run = self.with_settings({**changes, **(settings or {})})
        confirm_addresses(run, to_arguments(settings or {}), allow_addresses)
        context = runner.EvalContext(self.folder, run, sampling.run_device(run))
        evaluation = runner.evaluate_metrics(context, progress or (lambda done, total: None))
        assert evaluation is not None  # None on ranks above 0
        return {name: entry["best"] for name, entry in evaluation.metrics.items()}

    def report(self, out: str | Path | None = None) -> Path:
        """Write a self-contained HTML page on the run; return its path (default: report.html in the run folder)."""
        from gesso.report import write_report

        return Path(write_report([self.folder], Path(out) if out else None))

    def _denoiser(self, run: RunConfig, nimg: int | None) -> Denoiser:
        profile, device = ema.sampling_profile(run.sample), sampling.run_device(run)
        key = (str(profile), nimg or self.nimg, str(device))
        denoiser = self._denoisers.pop(key, None)
        if denoiser is None:
            weights, _, _, _ = snapshot.reconstruct_from_run(self.folder, [profile], nimg)
            while len(self._denoisers) >= self.max_denoisers:
                del self._denoisers[next(iter(self._denoisers))]  # before the memory of another is needed
            denoiser = snapshot.denoiser_from_weights(weights[0], run, device)
        self._denoisers[key] = denoiser
        return denoiser

    def _decoder(self, run: RunConfig) -> Normalizer:
        key = f"{run.sample.to_uint8} {sampling.run_device(run)}"  # other settings of a decoder cannot be changed
        if key not in self._decoders:
            self._decoders = {key: sampling.open_decoder(run)}
        return self._decoders[key]

    @staticmethod
    def _sampling_settings(settings: Settings | None, guidance: float | None, sigma_rel: float | None) -> Settings:
        given = {"sample.guidance": guidance, "sample.sigma_rel": sigma_rel}
        return {**(settings or {}), **{name: value for name, value in given.items() if value is not None}}


def load_run(folder: str | Path) -> Run:
    """Open a run folder, or download hub:OWNER/NAME to runs/OWNER--NAME and open it.

    Raises:
        UsageError: There is no run, or the download failed.
    """
    return Run(folder)


def recipe(name: str, settings: Settings | None = None) -> RunConfig:
    """Return the settings of a recipe, a run.yaml or a run folder, changed by `settings`.

    Args:
        name: As for `gesso train`: a recipe, folder:PATH, a Python file with a function recipe(), a run.yaml or a run
            folder.
        settings: Changes by name, such as {"train.total_images": 200_000}.

    Raises:
        UsageError: There is no such recipe, or a setting is invalid.
    """
    return recipes.resolve(name, to_arguments(settings or {}))[0]


def train(
    run: RunConfig | str,
    out: str | Path,
    resume: bool = False,
    log: Callable[[str], None] | None = None,
    trackers: Sequence[Tracker] = (),
    progress: Progress | None = None,
) -> Run:
    """Train a run, or resume it, and return it.

    Args:
        run: Settings, or the name of a recipe.
        out: The run folder, which must not hold a run unless `resume` is true.
        resume: Resume from the last checkpoint if there is one.
        log: Receives each line of information; None discards them.
        trackers: Objects with write(nimg, values), log_image(nimg, image) and close(), which receive what log.jsonl and
            the sample grids contain, as training proceeds.
        progress: Called after each step with the number of images seen and train.total_images.

    Raises:
        UsageError: Settings are invalid, or `out` holds a run and `resume` is false.
        DivergenceError: The loss is not finite.
    """
    settings = recipe(run) if isinstance(run, str) else run
    start_training(settings, Path(out), resume, Console(quiet=True), log or (lambda text: None), trackers, progress)
    return Run(out)


def model(name: str, inputs: InputSpec, **fields: Any) -> nn.Module:
    """Build a network, initialized from the global random state of torch.

    Args:
        name: Name of the network: one of gesso.config.NETS, such as "dit" or "edm2".
        inputs: Shapes of its inputs: channels, latent resolution, classes, text.
        **fields: Fields of its settings, such as hidden_size=384, depth=12, num_heads=6, patch_size=2.

    Returns:
        A module with the signature F(x, c_noise, progress, cond), see gesso.models.

    Raises:
        UsageError: There is no such network, or a field is invalid.
    """
    return models.build_network(config.build_net_config({"name": name, **fields}), inputs)


def to_arguments(settings: Settings) -> list[str]:
    """Return settings as typed on the command line: a.b=VALUE."""
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]
