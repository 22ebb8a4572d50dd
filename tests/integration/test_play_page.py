"""The page of the playground in headless Chromium, which needs the extra `play`.

gradio needs an older pillow than constraints.txt has: `make play` runs this file in an environment of its own.
"""

import base64
import io

import numpy as np
import pytest
from helpers.browser import CHROMIUM, Browser, wait_for
from helpers.run_factory import write_run
from PIL import Image

import gesso
from gesso.play import player
from gesso.play.page import Playground, build_page, serve

pytest.importorskip("gradio", reason="gradio is not installed: make play runs these tests")
pytestmark = pytest.mark.filterwarnings("default")  # of gradio and its web server


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
    first = picture(browser)
    choose(browser, "run", "shapes")
    prompt = playground.runs["shapes"].config.data.example_captions[0]
    expected = expected_picture(playground, "shapes", prompts=[prompt])
    assert np.array_equal(changed_picture(browser, first), expected)
    assert browser.evaluate('document.querySelector("#prompt textarea").value') == prompt
    assert browser.evaluate('document.querySelector("#label")') is None


def test_the_animation_is_shown(browser):
    browser.evaluate('document.querySelector("#animate").click()')
    source = wait_for(lambda: browser.evaluate('document.querySelector("#animation img")?.src || ""'), "the animation")
    assert source.endswith(".gif")


def test_no_request_leaves_the_machine_and_nothing_overflows(browser, address):
    assert [url for url in browser.requests if not url.startswith((address, "data:", "blob:"))] == []
    for width in (1280, 400):
        browser.resize(width, 900)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
