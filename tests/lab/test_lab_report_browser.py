"""The page of `pjax report` in headless Chromium: without a network, on a phone and on a desk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from run_helpers import TINY, recorded

import pjax
from pjax.lab import report, runs
from pjax.lab.inspection import Inspection
from pjax.problem import Formulation, layout, sizes
from pjax.trace import trace

_BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (_BROWSER and _DRIVER),
    reason="needs Chromium and chromedriver on PATH: apt-get install chromium chromium-driver",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is finished and one that is not, with a name that must not break anything."""
    root = tmp_path_factory.mktemp("runs")
    recorded(root, "finished", TINY)
    recorded(root, f"an & <b>unfinished< b> {'very' * 20}", TINY, finished=False)
    return root


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """The page, with the figures of a problem that need no solve."""
    output = folder / "report.html"
    params = {f"w{number}": jnp.ones((6, 6)) for number in range(12)}

    def loss(params: Any) -> Any:
        hidden = jnp.ones((4, 6))
        for weight in params.values():
            hidden = pjax.relu(hidden @ weight)
        return pjax.squared_error(hidden, jnp.zeros((4, 6)))

    found = layout(trace(loss, params)[0], Formulation())
    names = tuple(f"{node.index} {node.name}" for node in found.graph.nodes)
    steps = jnp.linspace(1, 2, 5)[:, None] ** -jnp.arange(1.0, len(names) + 1)
    look = Inspection(
        seed=0,
        step=3,
        batch_size=4,
        graph=found.graph,
        sizes=sizes(found),
        profile=pjax.Profile(names, steps, steps),
        params=params,
        displacement=params,
        gradient=params,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            report, "_inspect", lambda one, _: look if one.folder.name == "finished" else None
        )
        report.write(sorted(folder.iterdir()), output)
    return output


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = _BROWSER or ""
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(_DRIVER))
    yield driver
    driver.quit()


MEASURE = """
const wide = document.documentElement.clientWidth;
const box = one => one.getBoundingClientRect();
return {
    overflow: document.documentElement.scrollWidth - wide,
    outside: [...document.querySelectorAll("body *:not(svg *)")]
        .filter(one => !one.parentElement.closest(".scroll") && box(one).right > wide + 1)
        .map(one => one.outerHTML.slice(0, 80)),
    figures: [...document.querySelectorAll("figure svg")]
        .map(one => [box(one).width, box(one).height, one.getAttribute("aria-label")]),
    smallest: Math.min(...[...document.querySelectorAll("figure svg text")]
        .map(one => box(one).height).filter(height => height > 0)),
    text: document.body.innerText,
    ground: getComputedStyle(document.body).backgroundColor,
    tables: document.querySelectorAll("table").length,
};
"""


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_the_page_in_a_browser(width, height, page: Path, driver) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 600},
    )
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    driver.get_log("performance")
    driver.get(page.as_uri())
    found = driver.execute_script(MEASURE)
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    requests = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert page.as_uri() in requests  # the log works
    assert [url for url in requests if url != page.as_uri() and url[:5] != "data:"] == []

    assert found["overflow"] <= 0
    assert found["outside"] == []
    # Three figures of both runs together, four of a run's problem.
    assert len(found["figures"]) == 7
    for wide, high, label in found["figures"]:
        assert wide > 200
        assert high > 100
        assert label
    # A line of text, in pixels of the screen that the eye knows.
    assert found["smallest"] >= 7
    for words in (
        "Results on digits",
        "an & <b>unfinished< b>",
        "Not finished: measured up to batch 5 of 10. Go on with:",
        "pjax train --resume",
        "w11",
        "Written by pjax",
    ):
        assert words in found["text"]
    accuracy = runs.finished_result(page.parent / "finished").rows[0]["test_accuracy"]
    assert f"{accuracy:.2%}" in found["text"]

    # All that is folded fits too, and the other scheme is another one.
    driver.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    unfolded = driver.execute_script(MEASURE)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert unfolded["overflow"] <= 0
    assert unfolded["outside"] == []
    assert "orbax-checkpoint" in unfolded["text"]
    assert (found["ground"], unfolded["ground"]) == ("rgb(255, 255, 255)", "rgb(21, 23, 26)")


def test_the_checks_find_a_page_that_is_wrong(tmp_path: Path, driver) -> None:
    """The same measures on a page with a wide box, a script error and a request."""
    wrong = tmp_path / "wrong.html"
    wrong.write_text(
        '<!DOCTYPE html><html lang="en"><body style="margin:0"><p style="width:3000px">wide</p>'
        '<img src="http://127.0.0.1:9/x.png"><script>undefined.x</script></body></html>'
    )
    driver.get_log("performance")
    driver.get(wrong.as_uri())
    found = driver.execute_script(MEASURE)
    assert found["overflow"] > 0
    assert len(found["outside"]) == 1
    assert any("undefined" in entry["message"] for entry in driver.get_log("browser"))
    assert "http://127.0.0.1:9/x.png" in str(driver.get_log("performance"))
