"""The page in a browser: no console errors, dark and light, nothing wider than a phone."""

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest
from report.samples import planned
from synthetic import synthetic_calibration

from rq_gguf.report.colours import DARK, LIGHT
from rq_gguf.report.gather import gather, subject_of_plan
from rq_gguf.report.page import page

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")

# Runs when everything is there: points at a cell, then writes down what can be measured.
PROBE = """
<script>
const shown = [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().width > 0);
const map = shown.find(s => s.closest("figure").id == "load"), box = map.getBoundingClientRect();
const [x, y, w, h] = map.dataset.grid.split(" ").map(Number), scale = box.width / map.viewBox.baseVal.width;
map.dispatchEvent(new PointerEvent("pointermove", {clientX: box.x + (x + 2.5 * w) * scale, clientY: box.y + (y + 1.5 * h) * scale}));
const texts = shown.flatMap(s => [...s.querySelectorAll("text")]);
const inside = t => { const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
  return a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1; };
parent.document.body.insertAdjacentHTML("beforeend", "<pre>" + [
  "width " + innerWidth, "scroll " + document.documentElement.scrollWidth, "figures " + shown.length,
  "paper " + getComputedStyle(document.documentElement).getPropertyValue("--paper"), "tip " + tip.textContent,
  "smallest " + Math.min(...texts.map(t => t.getBoundingClientRect().height)).toFixed(1),
  "cut " + texts.filter(t => !inside(t)).map(t => t.textContent).join("|"),
].join("\\n") + "</pre>");
console.log("probe done");
</script>
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = synthetic_calibration(6, 32, types=("q2_k", "q3_k", "q4_k", "q6_k", "q8_0"))
    r = gather(subject_of_plan("c.gguf", c, planned(c, "q6_k", 2, c.types)), vram=2_000_000)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(r).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    return path


def opened(page: Path, width: int, *flags: str) -> dict[str, str]:
    """What the probe measured; fails on anything that the console says besides. No window gets as narrow as a phone: a frame does."""
    profile, path = page.parent / "profile", page.with_name("frame.html")
    frame = f'<iframe style="width:{width}px;height:1000px;border:0" srcdoc="{escape(page.read_text(encoding="utf-8"))}"></iframe>'
    path.write_text(f'<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><body>{frame}</body>', encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--enable-logging=stderr"]
    command += ["--v=0", "--window-size=1300,1200", *flags, "--dump-dom", path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = re.findall(r"CONSOLE[^\n]*\] (.*)", result.stderr)
    assert len(said) == 1 and said[0].startswith('"probe done"'), said
    lines = result.stdout.rsplit("<pre>", 1)[1].split("</pre>")[0].splitlines()
    return {name: value for name, _, value in (line.partition(" ") for line in lines)}


@pytest.mark.parametrize("width", [1200, 400])
def test_page_opens(written: Path, width: int) -> None:
    found = opened(written, width)
    assert found["figures"] == "7" and found["width"] == str(width)
    assert int(found["scroll"]) <= width, "something is wider than the window"
    assert found["cut"] == "" and float(found["smallest"]) >= 10
    assert re.fullmatch(r"layer 1, expert 2: \d+\.\d\d x the mean load, \d+\.\d % of selections", found["tip"])
    assert found["paper"] == LIGHT["paper"]


def test_dark(written: Path) -> None:
    assert opened(written, 1200, "--force-dark-mode", "--blink-settings=preferredColorScheme=0")["paper"] == DARK["paper"]
