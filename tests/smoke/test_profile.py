"""A profiled run of two stages: its times add up, its spans lie in each other, and its page is drawn in a browser."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.observability.metrics import read_metrics
from fipo_megatron.observability.profile_report import profile_page, profile_tables
from tests.script_process import run_script
from tests.smoke.test_pages import BROWSER, browse, drive, found
from tests.smoke.train_process import ODD_REWARD, PROFILE_TOOL, SMALL_PROFILE, UNTRAINED, TrainProcess
from tests.unit.observability.test_profile_report import MFU, make_profile

pytestmark = pytest.mark.multiproc

STAGES = "parallel={tensor: 1, pipeline: 2}"


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's folder, and what the tool printed."""
    root = tmp_path_factory.mktemp("profile")
    arguments = ["configs/quickstart_cpu.yaml", *SMALL_PROFILE, UNTRAINED, *ODD_REWARD, "rollout.engine=hf", STAGES]
    arguments += [
        f"warm_start.cache_dir={root / 'cache'}",
        "--steps",
        "1",
        "--trace",
        "--pairs",
        "2",
        "--out",
        str(root / "run"),
    ]
    printed = run_script(PROFILE_TOOL, arguments, root / "output.log", timeout_s=240)
    return root / "run", printed


def read_timeline(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Spans by process: name, ts and dur in microseconds, in order of their starts."""
    events = json.loads((run / "profile" / "timeline.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            spans[names[event["pid"]]].append(event)
    return spans


def test_phases_sum_to_the_step_and_recording_costs_nothing(profiled: tuple[Path, str]) -> None:
    run, printed = profiled
    numbers = json.loads((run / "profile" / "profile.json").read_text())
    assert numbers["attributed_frac"] >= 0.97
    assert numbers["overhead_frac"] < 0.01
    (step,) = numbers["steps"]
    assert step["step"] == 2
    assert sum(step["phases"].values()) + step["unattributed_s"] == pytest.approx(step["seconds"])
    lines = read_metrics(run / "metrics.jsonl")
    assert step["seconds"] == pytest.approx(lines[2]["time/step_s"], abs=0.01)
    for line in lines:  # the same timers, in every step of an ordinary run, too
        phases = {key: value for key, value in line.items() if key.startswith("time/") and key.endswith("_s")}
        whole = phases.pop("time/step_s")
        assert 0.97 * whole <= sum(phases.values()) <= whole * 1.001
    assert numbers["paired_overhead"]["num_pairs"] == 2
    assert "unattributed" in printed
    assert f"report: {run / 'profile' / 'report.html'}" in printed


def test_spans_lie_in_each_other(profiled: tuple[Path, str]) -> None:
    run, _ = profiled
    timeline = read_timeline(run)
    ranks = ["rank 0, stage 0, share 0", "rank 1, stage 1, share 0"]
    assert timeline.keys() == {"driver, phases", "driver, calls of the policy", *ranks, "engine 0"}
    lines = read_metrics(run / "metrics.jsonl")
    for name in ranks:
        of_rank = timeline[name]

        def inside(outer: dict[str, Any], inner: str, spans: list[dict[str, Any]] = of_rank) -> int:
            end = outer["ts"] + outer["dur"]
            return sum(s["name"] == inner and outer["ts"] <= s["ts"] and s["ts"] + s["dur"] <= end for s in spans)

        updates = [span for span in of_rank if span["name"] == "update"]
        assert len(updates) == 2 * 4  # of two steps
        for update in updates:
            assert inside(update, "training pass") == inside(update, "plan") == 1
            assert inside(update, "forward") == inside(update, "backward") >= 1
            assert inside(update, "p2p") >= 2
            assert inside(update, "reduce gradients") == 1
            assert inside(update, "head") == (inside(update, "forward") if "stage 1" in name else 0)
        microbatches = sum(inside(update, "forward") for update in updates)
        assert microbatches == sum(line["cost/microbatches"] for line in lines[1:])
        calls = [span for span in timeline["driver, calls of the policy"] if span["name"] == "update"]
        for update, call in zip(updates, calls, strict=True):  # by one clock
            assert call["ts"] <= update["ts"] < update["ts"] + update["dur"] <= call["ts"] + call["dur"]
    engine = {span["name"] for span in timeline["engine 0"]}
    assert {"generate", "receive", "verify"} <= engine


def test_a_bubble_a_stage_and_memory_a_rank(profiled: tuple[Path, str]) -> None:
    numbers = json.loads((profiled[0] / "profile" / "profile.json").read_text())
    stages = {(stage["kind"], stage["stage"]): stage for stage in numbers["stages"]}
    assert stages.keys() == {(kind, stage) for kind in ("forward pass", "training pass") for stage in (0, 1)}
    for stage in stages.values():
        assert 0 < stage["bubble_frac"] < 1
        assert 0 < stage["busy_s"] < stage["elapsed_s"] < numbers["steps"][0]["seconds"]
    assert [rank["stage"] for rank in numbers["ranks"]] == [0, 1]
    for rank in numbers["ranks"]:
        assert {"logprobs", "update", "push_weights"} <= rank["peak_bytes"].keys()
        assert all(1 << 27 < peak < 1 << 33 for peak in rank["peak_bytes"].values())
    assert 1 << 27 < numbers["engines"]["engine 0"]["peak_bytes"] < 1 << 33
    assert 0 < numbers["mfu"][1]["frac"] < numbers["mfu"][0]["frac"] < 1


def test_a_trace_a_rank_has_our_ranges(profiled: tuple[Path, str]) -> None:
    for rank in (0, 1):
        with gzip.open(profiled[0] / "profile" / f"trace-rank{rank}.json.gz", "rt") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        assert names.count("update") == 4  # of the one step that is reported
        assert "aten::mm" in names or "aten::addmm" in names


def test_a_run_that_fails_ends_with_its_cause_and_leaves_nothing(tmp_path: Path) -> None:
    """Its policy moves further than is allowed in the first step."""
    overrides = [UNTRAINED, *ODD_REWARD, "rollout.engine=hf", "parallel.tensor=1", "optimizer.lr=0.5"]
    run = TrainProcess(
        tmp_path, [*overrides, "trainer.max_policy_kl=0.02", "--steps", "1"], PROFILE_TOOL, SMALL_PROFILE
    )
    finished = run.finish(120)  # which looks for processes
    assert finished.code == 1
    assert finished.last_line.startswith("error: "), finished.output
    assert "trainer.max_policy_kl" in finished.last_line
    assert "trainer.max_policy_kl" in (finished.folder / "error.log").read_text()
    assert not list((finished.folder / "profile").iterdir())


@pytest.mark.skipif(BROWSER is None, reason="no chromium in PATH")
def test_the_page_shows_rows_tables_and_what_the_mouse_is_on(tmp_path: Path) -> None:
    profile = make_profile()
    script = """
      const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect();
      const point = (x, y) => canvas.dispatchEvent(
        new MouseEvent("mousemove", { clientX: box.left + x, clientY: box.top + y }));
      const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      const tip = document.querySelector("#tip"), found = {};
      point(300, 27); found.phase = tip.textContent;
      press("0"); found.all = [view.start, view.end];
      press("+"); found.zoomed = view.end - view.start;
      point(20, 27); found.hidden = tip.hidden;
      document.querySelectorAll("#steps button")[1].click(); found.step = [view.start, view.end];
      found.tables = [...document.querySelectorAll("figcaption")].map((caption) => caption.textContent);
      found.steps = document.querySelectorAll("#steps button.reported").length;
      found.title = document.title;
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      found.colors = new Set(new Uint32Array(pixels.buffer)).size;
      return found;
    """
    page = drive(profile_page(profile, profile_tables(profile, [MFU])), script)
    dom, console = browse(page, tmp_path)
    assert console == []
    shown = found(dom)
    assert shown["phase"] == "train: 196.00 ms\ndriver, phases\nat 300.00 ms"
    assert shown["all"] == [0, 500_000]
    assert shown["zoomed"] == 300_000
    assert shown["hidden"]
    assert shown["step"] == [0, 100_000]
    assert len(shown["tables"]) == 8
    assert shown["steps"] == 1
    assert shown["title"] == "a <run>"
    assert shown["colors"] > 5


@pytest.mark.skipif(BROWSER is None, reason="no chromium in PATH")
def test_many_ranks_are_scrolled_and_the_wheel_zooms_with_a_key_alone(tmp_path: Path) -> None:
    profile = make_profile()
    ranks = [replace(profile.ranks[rank % 2], rank=rank, data=rank) for rank in range(128)]
    script = """
      const found = {}, canvas = document.querySelector("canvas"), scroll = document.querySelector("#scroll");
      const box = () => canvas.getBoundingClientRect(), tip = document.querySelector("#tip");
      const wheel = (keys) => canvas.dispatchEvent(
        new WheelEvent("wheel", { deltaY: -100, clientX: box().left + 500, cancelable: true, ...keys }));
      const point = (y) => {
        canvas.dispatchEvent(new MouseEvent("mousemove", { clientX: box().left + 300, clientY: box().top + y }));
        return tip.textContent.split("\\n")[1];
      };
      const before = view.end - view.start;
      found.plain = [wheel({}), view.end - view.start === before];
      found.ctrl = [wheel({ ctrlKey: true }), view.end - view.start < before];
      found.meta = wheel({ metaKey: true });
      document.querySelectorAll("#steps button")[3].click();
      found.sizes = [box().height / window.innerHeight, canvas.height, scroll.scrollHeight];
      found.first = point(27);
      scroll.scrollTop = 1e6; draw();
      const pixels = () => new Set(new Uint32Array(
        canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size;
      const last = data.rows[data.rows.length - 2];
      found.last = point(last.top - scroll.scrollTop + 2);
      found.colors = pixels();
      found.header = document.querySelector("header p").textContent;
      return found;
    """
    page = drive(profile_page(replace(profile, ranks=ranks), []), script)
    dom, console = browse(page, tmp_path)
    assert console == []
    shown = found(dom)
    assert shown["plain"] == [True, True]  # neither kept from scrolling nor zoomed
    assert shown["ctrl"] == [False, True]
    assert shown["meta"] is False
    share, pixels, whole = shown["sizes"]
    assert share <= 0.7
    assert pixels < 1500
    assert whole > 128 * 3 * 13  # three lanes a rank
    assert (shown["first"], shown["last"]) == ("driver, phases", "rank 127, stage 0, share 127")
    assert shown["colors"] > 5
    assert "Ctrl or Cmd + wheel" in shown["header"]


@pytest.mark.skipif(BROWSER is None, reason="no chromium in PATH")
def test_the_report_of_a_run_opens_without_a_word_in_the_console(profiled: tuple[Path, str], tmp_path: Path) -> None:
    page = (profiled[0] / "profile" / "report.html").read_text()
    dom, console = browse(page, tmp_path)
    assert console == []
    for text in ("rank 1, stage 1, share 0", "training pass, stage 1", "unattributed", "engine 0"):
        assert text in dom
