"""The page of the playground in headless Chromium, which needs the extra `play`.

gradio needs an older pillow than constraints.txt has: `make play` runs this file in an environment of its own.
"""

import base64
import gc
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import warnings

import numpy as np
import pytest
from helpers.browser import CHROMIUM, Browser, wait_for
from helpers.run_factory import write_run
from PIL import Image

import gesso
from gesso.play import player
from gesso.play.page import NO_RUN, Playground, build_page, serve

pytest.importorskip("gradio", reason="gradio is not installed: make play runs these tests")
pytestmark = pytest.mark.filterwarnings("default")  # of gradio and its web server


@pytest.fixture(scope="module", autouse=True)
def _collect_resources_of_gradio():
    """Collect the event loops and sockets that gradio leaves open, which later warn, here."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(scope="module")
def playground(tmp_path_factory) -> Playground:
    folder = tmp_path_factory.mktemp("runs")
    control = {"control.variables": "flip,size", "dropout.control": 0.1, "dropout.both": 0.1}
    write_run(folder / "digits", "digits", **control)
    write_run(folder / "digits-dit", "digits-dit")
    write_run(folder / "shapes", "shapes")
    return Playground([gesso.load_run(folder / name) for name in ("digits", "digits-dit", "shapes")])


@pytest.fixture(scope="module")
def address(playground):
    page, url = serve(playground, "127.0.0.1", None)
    assert url.startswith("http://127.0.0.1:") and page.share_url is None
    yield url
    page.close()


@pytest.fixture(scope="module")
def browser(address, tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def test_the_page_has_the_settings_of_its_runs(playground):
    def shown(name: str) -> set[str]:
        components = build_page(Playground([playground.runs[name]])).config["components"]
        return {c["props"]["elem_id"] for c in components if c["props"].get("elem_id") and c["props"]["visible"]}

    both = {"seed", "guidance", "sigma_rel", "steps", "sampler", "with_frames", "picture0", "command", "frame"}
    assert shown("digits") >= both | {"label", "control_guidance", "control_flip", "control_size"}
    assert shown("shapes") >= both | {"prompt"}
    assert not shown("digits") & {"prompt", "run"} and not shown("shapes") & {"label", "control_guidance"}


def picture(browser: Browser, side: int = 0) -> np.ndarray | None:
    """Return the pixels of a picture of the page; None while there is none."""
    script = f"""(async () => {{
        const image = document.querySelector("#picture{side} img");
        if (!image || !image.src) return null;
        const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
        return btoa(Array.from(bytes, b => String.fromCharCode(b)).join(""));
    }})()"""
    data = browser.evaluate(script)
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) if data else None


def set_value(browser: Browser, element: str, value: object) -> None:
    """Enter a value into an input, as typing and moving a slider do."""
    browser.evaluate(f"""(() => {{
        const input = document.querySelector("#{element} input[type=range], #{element} input, #{element} textarea");
        const kind = input.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
        Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(input, {str(value)!r});
        input.dispatchEvent(new Event("input", {{bubbles: true}}));
        input.dispatchEvent(new Event("change", {{bubbles: true}}));
    }})()""")


def command(browser: Browser) -> str:
    return browser.evaluate('document.querySelector("#command .cm-content")?.innerText || ""')


def changed_picture(browser: Browser, old: np.ndarray, side: int = 0) -> np.ndarray:
    def new() -> list[np.ndarray]:
        current = picture(browser, side)
        return [] if current is None or np.array_equal(current, old) else [current]

    return wait_for(new, "another picture")[0]


def expected_picture(playground: Playground, name: str, **sample_arguments) -> np.ndarray:
    return np.array(player.picture(playground.runs[name].sample(seeds=range(4), **sample_arguments)).convert("RGB"))


def test_sliders_change_the_picture(browser, playground, address):
    browser.open(address)
    first = changed_picture(browser, np.zeros(0))
    assert np.array_equal(first, expected_picture(playground, "digits"))
    wait_for(lambda: picture(browser, 1) is not None, "the second picture")
    assert np.array_equal(picture(browser, 1), expected_picture(playground, "digits-dit"))

    set_value(browser, "guidance", 4)
    second = changed_picture(browser, first)
    assert np.array_equal(second, expected_picture(playground, "digits", guidance=4.0))
    wait_for(lambda: command(browser).count("sample.guidance=4") == 2, "the command")

    set_value(browser, "sigma_rel", 0.1)
    third = changed_picture(browser, second)
    assert np.array_equal(third, expected_picture(playground, "digits", guidance=4.0, sigma_rel=0.1))

    set_value(browser, "frame", 1)
    frame = changed_picture(browser, third)
    set_value(browser, "frame", playground.first.config.sample.steps)
    assert np.array_equal(changed_picture(browser, frame), third)


def click(browser: Browser, selector: str) -> None:
    browser.evaluate(f"document.querySelector({selector!r}).click()")


def choose(browser: Browser, element: str, option: str) -> None:
    """Choose an option of a dropdown."""
    browser.evaluate(f'document.querySelector("#{element} input").focus()')
    script = f"""[...document.querySelectorAll("ul li")]
        .find(item => item.innerText.trim().endsWith({option!r}))
        ?.dispatchEvent(new MouseEvent("mousedown", {{bubbles: true}}))"""
    wait_for(lambda: browser.evaluate(f"({script}) !== undefined"), f"option {option}")


def test_another_run_has_its_settings(browser, playground, address):
    browser.open(address)
    wait_for(lambda: picture(browser, 1) is not None, "the pictures")
    choose(browser, "run", "shapes")
    prompt = playground.runs["shapes"].config.data.example_captions[0]
    expected = expected_picture(playground, "shapes", prompts=[prompt])
    wait_for(lambda: np.array_equal(picture(browser), expected), "the picture of the other run")
    assert browser.evaluate('document.querySelector("#prompt textarea, #prompt input").value') == prompt
    assert browser.evaluate('document.querySelector("#label")') is None


def test_every_kind_of_field_samples_again(browser, playground, address):
    browser.open(address)
    wait_for(lambda: picture(browser, 1) is not None, "the pictures")

    def samples_after(action, **sample_arguments) -> None:
        expected = expected_picture(playground, "digits", **sample_arguments)
        assert not np.array_equal(picture(browser), expected)
        action()
        wait_for(lambda: np.array_equal(picture(browser), expected), f"the picture of {sample_arguments}")

    samples_after(lambda: choose(browser, "label", "3"), labels=[3])
    samples_after(lambda: click(browser, '#control_flip input[value="yes"]'), labels=[3], control={"flip": "yes"})
    samples_after(
        lambda: choose(browser, "sampler", "heun"),
        labels=[3], control={"flip": "yes"}, settings={"sample.sampler": "heun"},
    )  # fmt: skip
    click(browser, "#with_frames input")
    wait_for(lambda: browser.evaluate('document.querySelector("#frame") === null'), "the page without frames")
    choose(browser, "other_run", NO_RUN)
    wait_for(lambda: command(browser).count("gesso sample") == 1, "the page with one run")
    assert browser.evaluate('document.querySelector("#picture1")') is None
    browser.evaluate('document.querySelector("#control_size input").focus()')
    browser.call("Input.insertText", text="large")
    wait_for(
        lambda: "write HEIGHTxWIDTH" in browser.evaluate('document.querySelector("#notes0").innerText'), "an error"
    )


def test_the_animation_is_shown(browser, address):
    browser.open(address)
    wait_for(lambda: picture(browser, 1) is not None, "the pictures")
    browser.evaluate('document.querySelector("#animate").click()')
    source = wait_for(lambda: browser.evaluate('document.querySelector("#animation img")?.src || ""'), "the animation")
    assert source.endswith(".gif")


def test_no_request_leaves_the_machine_and_nothing_overflows(browser, address):
    assert [url for url in browser.requests if not url.startswith((address, "data:", "blob:"))] == []
    for width in (1280, 400):
        browser.resize(width, 900)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_the_command_serves_on_loopback_until_it_is_interrupted(playground, tmp_path):
    # Output into a file: a pipe would be buffered until the end.
    with open(tmp_path / "output", "w") as output:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "gesso", "play", str(playground.first.folder)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    url = wait_for(
        lambda: re.search(r"playground: (http://127\.0\.0\.1:\d+/)", (tmp_path / "output").read_text()), "the address"
    )[1]
    with urllib.request.urlopen(url) as page:
        assert "gesso playground" in page.read().decode()
    listening = subprocess.run(["ss", "-ltn"], capture_output=True, text=True).stdout if shutil.which("ss") else ""
    port = url.rsplit(":", 1)[1].strip("/")
    assert not re.search(rf"(0\.0\.0\.0|\*|\[::\]):{port}\b", listening)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    assert "Traceback" not in (tmp_path / "output").read_text()


def test_a_port_in_use_is_an_error(playground, address):
    with pytest.raises(gesso.UsageError, match=r"cannot serve on 127\.0\.0\.1, port \d+"):
        serve(playground, "127.0.0.1", int(address.rsplit(":", 1)[1].strip("/")))
