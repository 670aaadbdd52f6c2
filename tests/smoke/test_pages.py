"""The page of samples in a real browser: it shows every token, obeys its keys, and runs nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.observability.sample_viewer import StepSamples, TokenTexts, render_page

BROWSER = shutil.which("chromium")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium in PATH")

QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", *QUIET, "--enable-logging=stderr")
VOCABULARY = (
    "The",
    " sum",
    "\n",
    "<script>document.title = 'broken'</script>",
    "</script><img src=x onerror=\"document.title = 'broken'\">",
    "a\u2028b\u202e",
    "&lt;'\"",
    "\ufffd",
    "<|end|>",
)
SHOWN = (*VOCABULARY[:2], "↵\n", *VOCABULARY[3:5], "a\\u2028b\\u202e", VOCABULARY[6], "e4 bd", VOCABULARY[8])
TEXTS = TokenTexts(VOCABULARY.__getitem__, lambda i: "ä½" if i == 7 else "-", frozenset({8}))


def make_sample(uid: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    ids = list(range(len(VOCABULARY)))
    old = [-0.5] * len(ids)
    return {
        "uid": uid,
        "prompt": f"Add the numbers of {uid}: <b>1 + 1</b>",
        "ground_truth": "2",
        "prediction": VOCABULARY[4],
        "reward": 2 * accuracy - 1,
        "accuracy": accuracy,
        "advantage": 1.0 if accuracy else -1.0,
        "finish_reason": "stop",
        "weight_version": 0,
        "response_ids": ids,
        "rollout_logprobs": old,
        "old_logprobs": old,
        "new_logprobs": [-0.5 + 0.1 * i for i in ids],
        "influence_weights": [1 + i / 50 for i in ids],
    } | changes


def make_page() -> str:
    groups = [make_sample(f"train/{i}", accuracy, weight_version=39) for i in range(3) for accuracy in (0.0, 1.0)]
    cut_off = make_sample("train/9", 0.0, finish_reason="length", influence_weights=[1.0] * len(VOCABULARY))
    steps = [StepSamples(1, "accuracy 0.5", [cut_off]), StepSamples(40, "accuracy 0.9", groups)]
    return render_page("a <run>", "fipo_7b", steps, TEXTS, num_groups=8)


def browse(page: str, tmp_path: Path, *options: str) -> tuple[str, list[str]]:
    """The page's elements as they are after its scripts ran, and what the browser's console says."""
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    profile = tmp_path / "profile"
    assert BROWSER is not None
    finished = subprocess.run(
        [BROWSER, *OPTIONS, f"--user-data-dir={profile}", *(options or ("--dump-dom",)), file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return finished.stdout, [line for line in finished.stderr.splitlines() if "CONSOLE" in line]


def drive(page: str, script: str) -> str:
    """The page with another script that its policy allows, which writes an object into the page's last element."""
    script = f"const found = (() => {{ {script} }})(); document.body.dataset.found = JSON.stringify(found);"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    return page.replace("</body>", f"<script>{script}</script></body>")


def found(dom: str) -> Any:
    written = re.search(r'data-found="([^"]*)"', dom)
    assert written is not None, dom[-2000:]
    return json.loads(unescape(written[1]))


def test_every_token_is_shown_as_text_and_the_console_is_silent(tmp_path: Path) -> None:
    script = """
      const texts = [...document.querySelectorAll("details")].map(
        (d) => [...d.querySelectorAll(".tokens > span")].map((s) => s.textContent));
      const colors = [...document.querySelectorAll(".tokens > span")].slice(0, 9).map((s) => s.style.backgroundColor);
      return { texts, colors, title: document.title, images: document.images.length, scripts: document.scripts.length,
        prompt: document.querySelector("main pre").textContent, step: document.querySelector("#step").value };
    """
    dom, console = browse(drive(make_page(), script), tmp_path)
    assert console == []
    page = found(dom)
    assert page["texts"] == [list(SHOWN)] * 2
    assert page["colors"][0] == ""  # weight 1 is neutral
    assert len(set(page["colors"])) == 9
    assert (page["title"], page["images"], page["scripts"]) == ("a <run>", 0, 3)  # data, its own, the test's
    assert page["prompt"] == "Add the numbers of train/0: <b>1 + 1</b>"
    assert page["step"] == "1"  # the last of two


def test_keys_move_filter_and_recolour(tmp_path: Path) -> None:
    script = """
      const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      const group = () => document.querySelector(".facts b").textContent;
      const found = {};
      press("j"); found.next = group();
      press("k"); press("k"); found.first = group();
      press("f"); found.right = document.querySelectorAll("details").length;
      press("f"); press("f"); found.truncated = document.querySelector("main").textContent;
      press("f"); press("4");
      found.color = document.querySelector("#quantity [aria-checked=true]").textContent;
      press("ArrowRight"); press("ArrowRight");
      found.tip = document.querySelector("#tip").textContent;
      const theme = document.documentElement.dataset.theme;
      press("t"); found.turned = document.documentElement.dataset.theme !== theme;
      press("["); found.earlier = group(); found.hidden = document.querySelector("#tip").hidden;
      press("1"); found.legend = document.querySelector("#ticks").textContent;
      return found;
    """
    dom, console = browse(drive(make_page(), script), tmp_path)
    assert console == []
    page = found(dom)
    tip = page.pop("tip")
    assert page == {
        "next": "train/1",
        "first": "train/0",
        "right": 1,
        "truncated": "No response of this step passes the filter.",
        "color": "log-ratio",
        "turned": True,
        "earlier": "train/9",
        "hidden": True,
        "legend": "1",  # all weights are 1
    }
    for text in ('" sum"', "token 2 of 9, id 1", "influence weight1.02", "log-ratio0.1", "surprise0.5"):
        assert text in tip


def test_what_stale_samples_differ_by_is_no_mismatch(tmp_path: Path) -> None:
    """Engine log-probs of the fresh sample differ by 0.001, which gives the scale; those of the stale one by 1."""
    size = len(VOCABULARY)
    samples = [
        make_sample("train/0", 1.0, weight_version=4, rollout_logprobs=[-0.501] * size),
        make_sample("train/0", 0.0, weight_version=2, rollout_logprobs=[-1.5] * size),
    ]
    script = """
      document.dispatchEvent(new KeyboardEvent("keydown", { key: "3", bubbles: true }));
      const colors = [...document.querySelectorAll(".tokens")].map(
        (tokens) => [...tokens.children].filter((s) => s.style.backgroundColor !== "").length);
      const tips = [...document.querySelectorAll(".tokens")].map((tokens) => {
        tokens.children[0].click();
        return document.querySelector("#tip").textContent;
      });
      return { colors, tips, legend: document.querySelector("#ticks").textContent,
        marks: [...document.querySelectorAll("summary")].map((s) => s.textContent.includes("sampled 2 steps before")) };
    """
    page = render_page("run", "fipo_7b", [StepSamples(5, "", samples)], TEXTS, num_groups=8)
    dom, console = browse(drive(page, script), tmp_path)
    assert console == []
    shown = found(dom)
    assert shown["colors"] == [size, 0]
    assert shown["legend"] == "0\u2265 0.001"
    assert shown["marks"] == [False, True]
    fresh, stale = shown["tips"]
    assert "mismatch0.001" in fresh
    assert "staleness" not in fresh
    assert "mismatch" not in stale
    assert "staleness1" in stale


def test_a_script_that_is_not_the_pages_own_is_refused(tmp_path: Path) -> None:
    dom, console = browse(make_page().replace("show({});", "show({}); "), tmp_path)
    assert len(console) == 1
    assert "Content Security Policy" in console[0]
    assert 'class="tokens"' not in dom


def test_it_can_be_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    _, console = browse(make_page(), tmp_path, "--window-size=1400,900", f"--screenshot={picture}")
    assert console == []
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 30_000  # not one colour
