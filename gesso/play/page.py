"""The page of the playground in gradio. `Playground` answers its events and needs no gradio."""

import atexit
import html
import importlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from PIL import Image
from torch import Tensor

from gesso import config
from gesso.api import Run
from gesso.config.sample import SampleConfig
from gesso.errors import GessoError, UsageError, install_command
from gesso.play import player
from gesso.play.player import Controls, PlaySettings
from gesso.untrusted import printable

NO_RUN = "(none)"
"""Choice of the second run for a page with one picture."""
SAMPLERS: tuple[str, ...] = get_args(SampleConfig.model_fields["sampler"].annotation)
NUM_SIDES = 2
MAX_SEED = 2**62
CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
.picture img { image-rendering: pixelated; }
.picture .icon-button-wrapper { opacity: 0; }
.picture:hover .icon-button-wrapper, .picture:focus-within .icon-button-wrapper { opacity: 1; }
@media (max-width: 700px) {
  #output { display: contents; }
  #output > * { min-width: 100% !important; }
  #pictures { order: -1; position: sticky; top: 0; z-index: 10; background: var(--body-background-fill); }
}
.notes { font-size: 0.85em; line-height: 1.4; overflow-wrap: anywhere; }
.notes .problem { color: #c2410c; }
footer { display: none !important; }
"""


class FormValues(NamedTuple):
    """Values of the form, in the order of its components; control has one text for each of `Playground.control`."""

    run: str
    other_run: str
    label: str
    prompt: str
    seed: int
    num_images: int
    guidance: float
    control_guidance: float
    sigma_rel: float
    steps: int
    sampler: str
    with_frames: bool
    control: tuple[str, ...]


class Shown(NamedTuple):
    """Contents of the page.

    pictures: picture of each side; None shows nothing.
    notes: HTML below each picture.
    commands: one command for each run.
    frames: frames of each side, (N, C, H, W) uint8 each.
    """

    pictures: list[Image.Image | None]
    notes: list[str]
    commands: str
    frames: list[list[Tensor]]

    @property
    def num_frames(self) -> int:
        """Number of frames of the longer side."""
        return max(map(len, self.frames), default=0)

    def pictures_at(self, step: int) -> list[Image.Image | None]:
        """Return the picture of each side after a step, counted from 1."""
        return [player.picture(side[min(step, len(side)) - 1]) if side else None for side in self.frames]


class Playground:
    """Runs by name, and the answers to the events of the page.

    Args:
        runs: The runs. Each keeps several networks in memory.
        program: First words of the commands that the page shows, such as "gesso --code my_recipe.py".
    """

    def __init__(self, runs: Sequence[Run], program: str = "gesso"):
        self.program = program
        self.runs: dict[str, Run] = {}
        for run in runs:
            run.max_denoisers = player.MAX_DENOISERS
            name = printable(run.folder.name)
            self.runs[name if name not in self.runs else str(run.folder)] = run
        self.control = list(dict.fromkeys(name for run in runs for name in run.config.control.variables))

    @property
    def first(self) -> Run:
        """The run that is shown at first."""
        return next(iter(self.runs.values()))

    def controls(self, name: str) -> Controls:
        """Return the settings that a run has."""
        return player.controls_of(self.runs[name].config)

    def defaults(self, name: str) -> FormValues:
        """Return the recorded settings of a run as values of the form."""
        run, names = self.runs[name].config, list(self.runs)
        is_small = max(run.sample_size) <= 64
        return FormValues(
            run=name,
            other_run=names[1] if len(names) > 1 and name == names[0] else NO_RUN,
            label="",
            prompt=(run.data.example_captions or ("",))[0] if run.semantic.kind == "text" else "",
            seed=0,
            num_images=4 if is_small else 1,
            guidance=run.sample.guidance,
            control_guidance=run.sample.control_guidance,
            sigma_rel=run.sample.sigma_rel,
            steps=run.sample.steps,
            sampler=run.sample.sampler,
            with_frames=not run.latent.vae,  # a VAE decodes every frame
            control=("",) * len(self.control),
        )

    def settings_for(self, name: str, values: FormValues) -> PlaySettings:
        """Return the settings of a run. Those that it or the first run does not have are its recorded ones."""
        shown, controls = self.controls(values.run), self.controls(name)
        control = dict(zip(self.control, values.control, strict=True))
        return PlaySettings(
            label=values.label or None if controls.labels and shown.labels else None,
            prompt=values.prompt if controls.has_prompt and shown.has_prompt else "",
            seed=min(max(0, int(values.seed or 0)), MAX_SEED),
            num_images=max(1, int(values.num_images or 1)),
            guidance=round(values.guidance, 4) if controls.has_guidance and shown.has_guidance else None,
            control_guidance=(
                round(values.control_guidance, 4)
                if controls.has_control_guidance and shown.has_control_guidance
                else None
            ),
            control={key: control[key] for key in controls.control if key in shown.control and control[key]},
            sigma_rel=None if self._is_recorded_length(name, values) else round(values.sigma_rel, 4),
            steps=int(values.steps),
            sampler=values.sampler,
        )

    def _is_recorded_length(self, name: str, values: FormValues) -> bool:
        """Return True if the slider is where it was for a run of which a half-life is recorded."""
        sample = self.runs[name].config.sample
        return sample.halflife is not None and values.sigma_rel == sample.sigma_rel

    def show(self, values: FormValues) -> Shown:
        """Return the pictures of one or two runs, from equal noise, with their notes and commands."""
        names = [values.run] + ([values.other_run] if values.other_run in self.runs else [])
        pictures, notes, commands, frames = list[Image.Image | None](), list[str](), list[str](), list[list[Tensor]]()
        for name in names:
            try:
                settings = self.settings_for(name, values)
                result = player.play(self.runs[name], settings, values.with_frames, self.program)
            except GessoError as error:
                pictures.append(None)
                frames.append([])
                notes.append(
                    f'<div class="notes"><div class="problem">{html.escape(printable(str(error)))}</div></div>'
                )
                continue
            pictures.append(player.picture(result.images))
            frames.append(result.frames)
            commands.append(result.command)
            lines = "".join(f"<div>{html.escape(printable(line))}</div>" for line in result.notes)
            notes.append(f'<div class="notes"><b>{html.escape(name)}</b>{lines}</div>')
        missing = NUM_SIDES - len(names)
        return Shown(
            pictures + [None] * missing,
            notes + [""] * missing,
            printable("\n".join(commands)),
            frames + [[]] * missing,
        )


def write_animation(shown: Shown, folder: Path) -> Path:
    """Write the frames of all sides, next to each other, as a GIF in a folder of its own, and return its path.

    Raises:
        UsageError: There are no frames.
    """
    sides = [side for side in shown.frames if side]
    if not sides:
        raise UsageError("no frames: switch on 'record the denoising'")
    path = Path(tempfile.mkdtemp(dir=folder)) / "denoising.gif"
    path.write_bytes(player.encode_gif(sides))
    return path


def build_page(playground: Playground) -> Any:
    """Return the page as gradio.Blocks.

    Raises:
        UsageError: gradio is not installed.
    """
    gr = import_gradio()
    start = playground.defaults(next(iter(playground.runs)))
    with gr.Blocks(title="gesso playground", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                inputs = _form(gr, playground, start)
            with gr.Column(scale=3, min_width=300, elem_id="output"):
                with gr.Row(elem_id="pictures"):
                    pictures, notes, second = _sides(gr, start.other_run != NO_RUN)
                frame = gr.Slider(1, start.steps, start.steps, step=1, label="Denoising: step", elem_id="frame")
                command = gr.Code(
                    label="Equivalent command", language="shell", interactive=False, lines=1, wrap_lines=True,
                    elem_id="command",
                )  # fmt: skip
                animate = gr.Button("Make a GIF of the denoising", size="sm", elem_id="animate")
                animation = gr.Image(
                    label="Denoising", visible=False, type="filepath", buttons=["download"], elem_id="animation"
                )
        state = gr.State(None)
        events = _Events(gr, playground)
        outputs = [state, *pictures, *notes, second, command, frame]
        # One sampling at a time; of changes while it runs, only the last is sampled.
        sampling = {
            "trigger_mode": "always_last", "concurrency_id": "sampling", "concurrency_limit": 1,
            "show_progress": "minimal", "show_progress_on": notes,
        }  # fmt: skip
        for component in inputs[1:]:
            # Typing into a textbox changes it, but is no input to gradio.
            event = component.change if isinstance(component, gr.Textbox) else component.input
            event(events.render, inputs, outputs, **sampling)
        switched = inputs[0].input(events.switch_run, inputs[0], inputs[1:])
        switched.then(events.render, inputs, outputs, **sampling)
        frame.input(events.show_frame, [state, frame], pictures, trigger_mode="always_last", show_progress="hidden")
        animate.click(events.animate, state, animation)
        page.load(events.render, inputs, outputs, **sampling)
    return page


class _Events:
    """Answers to the events of the page as updates of gradio's components."""

    def __init__(self, gr: Any, playground: Playground):
        self.gr, self.playground = gr, playground
        self.folder = Path(tempfile.mkdtemp(prefix="gesso-play-"))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)

    def render(self, *values: Any) -> list[Any]:
        """Return the state, pictures, notes, commands and the slider of frames for the values of the form."""
        count = len(FormValues._fields) - 1
        shown = self.playground.show(FormValues._make([*values[:count], tuple(values[count:])]))
        second = self.gr.update(visible=bool(shown.notes[1]))
        last = max(shown.num_frames, 2)
        slider = self.gr.update(maximum=last, value=last, visible=shown.num_frames > 1)
        return [shown, *shown.pictures, *shown.notes, second, shown.commands, slider]

    def switch_run(self, name: str) -> list[Any]:
        """Return the form after its first component with the settings of another run."""
        update, start, controls = self.gr.update, self.playground.defaults(name), self.playground.controls(name)
        return [
            self.gr.skip(),
            update(**_label_options(controls), visible=bool(controls.labels)),
            update(value=start.prompt, visible=controls.has_prompt),
            self.gr.skip(),
            self.gr.skip(),
            update(**_range(start.guidance, 0, 8), visible=controls.has_guidance),
            update(**_range(start.control_guidance, 0, 4), visible=controls.has_control_guidance),
            update(**_range(start.sigma_rel, 0.01, 0.28)),
            update(**_range(start.steps, 1, 64)),
            start.sampler,
            start.with_frames,
            *(update(visible=key in controls.control) for key in self.playground.control),
        ]

    def show_frame(self, shown: Shown | None, step: int) -> list[Any]:
        """Return the pictures after a step."""
        return list(shown.pictures_at(int(step))) if shown else [self.gr.skip()] * NUM_SIDES

    def animate(self, shown: Shown | None) -> Any:
        """Return the animation."""
        try:
            path = write_animation(shown or Shown([], [], "", []), self.folder)
        except UsageError as error:
            raise self.gr.Error(str(error)) from None
        return self.gr.update(value=str(path), visible=True)


def _form(gr: Any, playground: Playground, start: FormValues) -> list[Any]:
    """Create the components of the form; return them in the order of FormValues."""
    names, controls = list(playground.runs), playground.controls(start.run)
    many = len(names) > 1
    with gr.Row():
        run = gr.Dropdown(names, value=start.run, label="Run", visible=many, elem_id="run")
        other = gr.Dropdown(
            [NO_RUN, *names], value=start.other_run, label="Second run", visible=many, elem_id="other_run"
        )
    label = gr.Dropdown(**_label_options(controls), label="Class", visible=bool(controls.labels), elem_id="label")
    prompt = gr.Textbox(
        start.prompt, label="Prompt", visible=controls.has_prompt, elem_id="prompt",
        placeholder="empty: captions of the training images", max_lines=2,
    )  # fmt: skip
    with gr.Row():
        seed = gr.Number(start.seed, label="Seed", precision=0, minimum=0, min_width=100, elem_id="seed")
        count = gr.Slider(1, player.MAX_IMAGES, start.num_images, step=1, label="Images", min_width=150)
    guidance = gr.Slider(**_range(start.guidance, 0, 8), step=0.05, label="Guidance", visible=controls.has_guidance,
                         elem_id="guidance")  # fmt: skip
    control_guidance = gr.Slider(
        **_range(start.control_guidance, 0, 4), step=0.025, label="Control guidance",
        visible=controls.has_control_guidance, elem_id="control_guidance",
    )  # fmt: skip
    sigma_rel = gr.Slider(
        **_range(start.sigma_rel, 0.01, 0.28), step=0.005, label="EMA length (sigma_rel)", elem_id="sigma_rel"
    )
    with gr.Row():
        steps = gr.Slider(**_range(start.steps, 1, 64), step=1, label="Steps", min_width=150, elem_id="steps")
        sampler = gr.Dropdown(list(SAMPLERS), value=start.sampler, label="Sampler", min_width=120, elem_id="sampler")
    control = [_control_field(gr, name, name in controls.control) for name in playground.control]
    frames = gr.Checkbox(start.with_frames, label="Record the denoising", elem_id="with_frames")
    return [run, other, label, prompt, seed, count, guidance, control_guidance, sigma_rel, steps, sampler, frames,
            *control]  # fmt: skip


def _control_field(gr: Any, name: str, visible: bool) -> Any:
    """Create the field of a control variable, whose empty value is the default."""
    label, elem_id = f"Condition: {name}", f"control_{name}"
    if name == "flip":
        choices = [("default", ""), ("no", "no"), ("yes", "yes")]
        return gr.Radio(choices, value="", label=label, visible=visible, elem_id=elem_id)
    hint = f"{config.CONTROL_VARIABLES[name].input_format}; empty: default"
    return gr.Textbox(label=label, visible=visible, elem_id=elem_id, placeholder=hint, max_lines=1)


def _label_options(controls: Controls) -> dict[str, Any]:
    choices = [(printable(name), label or "") for name, label in controls.labels]
    return {"choices": choices, "value": ""} if choices else {"choices": [("", "")], "value": ""}


def _range(value: float, low: float, high: float) -> dict[str, float]:
    """Return the range of a slider, which contains the value."""
    return {"minimum": min(low, value), "maximum": max(high, value), "value": value}


def _sides(gr: Any, has_two: bool) -> tuple[list[Any], list[Any], Any]:
    """Create the pictures with their notes; return them and the column of the second side."""
    pictures, notes = [], []
    for side in range(NUM_SIDES):
        with gr.Column(min_width=120, visible=side == 0 or has_two) as column:
            pictures.append(
                gr.Image(
                    show_label=False, format="png", type="pil", interactive=False, buttons=["download"],
                    elem_id=f"picture{side}", elem_classes="picture",
                )
            )  # fmt: skip
            notes.append(gr.HTML(elem_id=f"notes{side}"))
    return pictures, notes, column


def import_gradio() -> Any:
    """Import gradio without its analytics. Raises UsageError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        return importlib.import_module("gradio")
    except ImportError:
        raise UsageError(f"the playground needs gradio: {install_command('play')}") from None


def serve(playground: Playground, host: str, port: int | None) -> tuple[Any, str]:
    """Serve the page in the background; return it, to close it, and its address.

    Args:
        playground: The runs.
        host: Address to bind to.
        port: Port; None takes the first free one from 7860.

    Raises:
        UsageError: gradio is not installed, or the address cannot be bound.
    """
    page, gr = build_page(playground), import_gradio()
    # Fonts of the system: no request leaves this machine.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
            footer_links=[], ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, theme=theme, css=CSS,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"cannot serve on {host}, port {port or 'from 7860'}: {error}") from None
    return page, url
