"""The report of a benchmark: what it says, and how it behaves in a real browser."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_rows import many, row
from numpy.typing import NDArray

from repurpose_opt import LayerProblem
from repurpose_opt.bench import statistics
from repurpose_opt.bench.report import write_report
from repurpose_opt.bench.report.charts import profile_chart
from repurpose_opt.bench.row import Failure, Row
from repurpose_opt.errors import SolverNotInstalled

pytest.importorskip("jinja2", reason="the report needs jinja2")
pytest.importorskip("matplotlib", reason="the report needs matplotlib")

HOSTILE = "<script>alert(1)</script>|`x`*$^$"
RUN: dict[str, Any] = {
    "schema": 1,
    "sessions": [
        {"started": "2026-01-02T03:04:05+00:00", "command": "repurpose-opt bench run tiny", "commit": "abc"},
        {"started": "2026-01-02T04:04:05+00:00", "command": "again", "commit": "abc", "uncommitted_changes": True},
    ],
    "testsets": [{"name": "tiny", "title": "Tiny", "description": "Small.", "settings": {"memory_limit": 2**32}}],
    "environment": {"cores": 2, "machine": "x86_64", "system": "Linux", "numpy": "2.3"},
    "solvers": {"flow/auto": {"summary": "Exact & fast", "versions": {"ortools": "9.14"}}},
}


def problem_and_owner(testset: str, instance: str) -> tuple[LayerProblem, NDArray[np.int64]] | None:
    """A layer for every instance but two."""
    if instance in ("instance-1", "instance-18"):
        return None
    problem = LayerProblem.create(np.random.default_rng(0).normal(size=(12, 8)), 3)
    return problem, np.arange(12) % 3


def pages(folder: Path, rows: list[Row], **options: Any) -> tuple[str, str]:
    """report.html and report.md of some rows."""
    write_report(folder, rows, RUN, **options)
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


class Ids(HTMLParser):
    """Identifiers and links to them of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name == "href" and str(value).startswith("#"):
                self.links.append(str(value)[1:])


def cells(markdown: str, first: str) -> list[str]:
    """The cells of the line of a Markdown table that begins with a name."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Twelve solvers on instances of all formulations, with failures, refusals, and a problem that cannot be built."""
    found = many(11, 18, 2, np.random.default_rng(0))
    named = [r for r in found if r.solver == "solver-0/auto"]
    unsupported = [replace(r, solver="flow+alternate+mip-lns/group-omp+swaps", seconds=0.2) for r in named]
    lost = dict.fromkeys(("objective", "bound", "nmse", "volume", "busiest", "failure"))
    kept = [r if r.formulation == "lossless" else replace(r, termination="unsupported", **lost) for r in unsupported]
    built = dict.fromkeys(("m", "n", "P", "nonzeros", "direct_volume", "seconds", "peak_bytes"))
    unbuilt = row(
        instance="instance-18",
        solver="solver-0/auto",
        failure=Failure.INSTANCE,
        fingerprint="",
        formulation="",
        **built,
    )
    refused = replace(found[0], refused=("optimal without a bound within the tolerance",))
    return [unbuilt, refused, *found[1:], *kept]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, rows, RUN, problem_and_owner=problem_and_owner)
    return folder / "report.html"


def test_the_first_table_says_which_solver_to_use(tmp_path: Path) -> None:
    """Two solvers whose figures are easily worked out by hand."""
    exact = [row(solver="exact", seed=s, objective=8.0, bound=8.0, termination="optimal", seconds=0.9) for s in (0, 1)]
    quick = [row(solver="quick", seed=s, objective=8.02, bound=None, seconds=0.01) for s in (0, 1)]
    poor = [row(solver="poor", seed=s, objective=16.0, bound=None, seconds=0.001) for s in (0, 1)]
    html, markdown = pages(tmp_path, [*poor, *quick, *exact])
    answer = cells(markdown, "volume, small (m ≤ 64)")
    assert answer[1:] == ["exact", "1", "0 %", "0 %", "100 %", "0.90", "quick, 0.010 s"]
    assert cells(markdown, "poor")[1] == "50.0 %"
    assert html.index("Which solver should I use?") < html.index("All solvers")
    assert markdown.index("Which solver should I use?") < markdown.index("All solvers")


def test_a_heuristic_is_not_called_optimal_and_unknown_stays_empty(tmp_path: Path) -> None:
    """Nobody has a bound: no gap to it, and none proved."""
    html, markdown = pages(tmp_path, [row(bound=None, peak_bytes=None)])
    answer = cells(markdown, "volume, small (m ≤ 64)")
    assert answer[4:6] == ["–", "0 %"]
    assert ">optimal<" not in html
    assert not re.search(r"\b(nan|inf|None)\b", markdown)


def test_names_are_escaped(tmp_path: Path) -> None:
    names = dict.fromkeys(("testset", "instance", "kind", "formulation"), HOSTILE)
    broken = row(**names, solver=HOSTILE, failure=Failure.CRASH, message=HOSTILE)
    fine = row(**names, solver=f"{HOSTILE}2", refused=(HOSTILE,))
    html, markdown = pages(tmp_path, [broken, fine], problem_and_owner=problem_and_owner)
    assert Ids(html).tags.count("script") == 1
    assert "alert(1)" in html
    assert "<script" not in markdown
    for table in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, report: Path, rows: list[Row]) -> None:
    written = write_report(tmp_path, rows, RUN, problem_and_owner=problem_and_owner)
    assert {path.name for path in written} == {path.name for path in report.parent.iterdir()}
    assert {path.suffix for path in written} == {".html", ".md", ".png"}
    for path in written:
        assert path.read_bytes() == (report.parent / path.name).read_bytes(), path.name


def test_the_markdown_shows_the_pictures_beside_it(report: Path) -> None:
    shown = re.findall(r"!\[(.+)\]\((.+)\)", report.with_name("report.md").read_text())
    assert {name for _, name in shown} == {path.name for path in report.parent.glob("*.png")}
    assert len(shown) == 3


def test_it_says_how_it_was_measured(report: Path) -> None:
    html, markdown = report.read_text(), report.with_name("report.md").read_text()
    for text in (html, markdown):
        for said in ("shifted by 0.1 s", "repurpose-opt bench run tiny", "with uncommitted changes", "ortools 9.14"):
            assert said in text
        assert "memory limit 4 GiB" in text
    assert "Exact &amp; fast" in html


def test_profiles_rise_to_one(rows: list[Row]) -> None:
    """At ratio 1 a curve has the share of solves that are the best; past the last tick every solve is accounted for."""
    of_one = [r for r in rows if r.formulation == "lossless"]
    found = statistics.profile(statistics.judged(of_one), "objective")
    series = {solver: place for place, solver in enumerate(found.ratios)}
    chart = profile_chart("lossless", found, series)
    least = {r.instance: min(o.objective for o in of_one if o.instance == r.instance and o.objective) for r in of_one}
    assert len(chart.curves) == 12
    for curve in chart.curves:
        mine = [r for r in of_one if r.solver == curve.solver]
        best = sum(r.objective == least[r.instance] for r in mine)
        answered = sum(r.objective is not None for r in mine)
        at_one = max(y for x, y in zip(curve.x, curve.y, strict=True) if x == 0)
        before_edge = max(y for x, y in zip(curve.x, curve.y, strict=True) if chart.x.edge and x <= chart.x.edge)
        assert at_one == pytest.approx(best / len(mine))
        assert before_edge == pytest.approx(answered / len(mine))
        assert curve.y[-1] == pytest.approx(1)
        assert list(curve.x) == sorted(curve.x)
        assert list(curve.y) == sorted(curve.y)


def test_without_rows(tmp_path: Path) -> None:
    html, markdown = pages(tmp_path, [])
    assert "No solve was recorded" in html
    assert "No solve was recorded" in markdown


def test_failures_only(tmp_path: Path) -> None:
    """Every failure once, an unsupported solver, a problem that could not be built, and no answer at all."""
    failures = [
        row(seed=s, failure=f, message=f"{f} on line {s}", seconds=None, peak_bytes=None) for s, f in enumerate(Failure)
    ]
    unbuilt = row(instance="second", fingerprint="", formulation="", m=None, n=None, P=None, nonzeros=None)
    unbuilt = replace(unbuilt, failure=Failure.INSTANCE, termination="error", objective=None, bound=None, volume=None)
    other = row(solver="other", termination="unsupported")
    html, markdown = pages(tmp_path, [*failures, unbuilt, other], problem_and_owner=problem_and_owner)
    assert "none has an answer" in markdown
    for failure in Failure:
        assert f"{failure} on line" in html
        assert f"1\u00a0{failure}" in markdown or failure is Failure.INSTANCE
    assert "Not supported by other." in markdown


def test_alike_failures_are_listed_together_and_many_are_counted(tmp_path: Path) -> None:
    """Messages that differ by numbers only are one line; of 100 different ones the rest is counted."""
    alike = [row(seed=s, failure=Failure.CRASH, message=f"signal 11 after {s} steps") for s in range(50)]
    words = [chr(97 + i % 26) * (1 + i // 26) for i in range(100)]
    different = [row(seed=50 + i, failure=Failure.EXCEPTION, message=word) for i, word in enumerate(words)]
    _, markdown = pages(tmp_path, [*different, *alike])
    line = next(line for line in markdown.splitlines() if "signal 11" in line)
    assert "| 50 |" in line
    assert len(re.findall(r"\| exception \|", markdown)) == 59
    assert "41 more groups of alike ones (41 solves)" in markdown


def test_pictures_are_limited_and_it_says_so(tmp_path: Path, rows: list[Row]) -> None:
    asked: list[str] = []

    def counted(testset: str, instance: str) -> tuple[LayerProblem, NDArray[np.int64]] | None:
        asked.append(instance)
        return problem_and_owner(testset, instance)

    some = [r for r in rows if r.solver == "solver-0/auto"]
    html, _ = pages(tmp_path, some, problem_and_owner=counted, most_pictures=4)
    assert html.count('class="matrix"') == 8
    assert asked == ["instance-18", *(f"instance-{i}" for i in range(5))]
    assert "only the first 4 instances" in html


def test_sixty_instances_are_less_than_900_kb(tmp_path: Path) -> None:
    """Dense noise, which no picture compresses."""
    dense = np.random.default_rng(0).normal(size=(400, 300))
    problem, owner = LayerProblem.create(dense, 4), np.arange(400) % 4
    found = many(12, 60, 1, np.random.default_rng(1))
    html, _ = pages(tmp_path, found, problem_and_owner=lambda testset, instance: (problem, owner))
    assert html.count('class="matrix"') == 120
    assert len(html.encode()) < 900_000


def test_the_picture_after_has_each_worker_s_neurons_together() -> None:
    """A block matrix whose rows are shuffled: placed by its blocks, all weights lie in the local blocks."""
    image = pytest.importorskip("PIL.Image", reason="pictures are read back with Pillow")
    import io

    from repurpose_opt.bench.report.pictures import before_and_after

    owner = np.array([1, 0, 2, 0, 1, 2])
    weight = (owner[:, None] == np.repeat(np.arange(3), 2)).astype(float)
    before, after = before_and_after(LayerProblem.create(weight, 3, input_owner=np.repeat(np.arange(3), 2)), owner)
    pixels = [np.asarray(image.open(io.BytesIO(picture.png))) > 0 for picture in (before, after)]
    assert (pixels[0] == (weight > 0)).all()
    assert (pixels[1] == np.kron(np.eye(3), np.ones((2, 2))).astype(bool)).all()
    assert after.row_borders == after.column_borders == (1 / 3, 2 / 3)
    assert len(after.local) == 3


def test_instances_with_alike_names_have_anchors_of_their_own(tmp_path: Path) -> None:
    html, _ = pages(tmp_path, [row(instance=name) for name in ("a b", "a-b", "A_b", "ä")])
    found = Ids(html)
    assert len(found.ids) == len(set(found.ids))
    assert set(found.links) <= set(found.ids)
    assert sum(name.startswith("instance-") for name in found.ids) == 4


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        if name == package:
            raise ModuleNotFoundError(name=name)
        return sys.modules.get(name)

    monkeypatch.setattr("repurpose_opt.registry.import_module", missing)
    with pytest.raises(SolverNotInstalled, match=rf"report needs {package}: pip install {package}"):
        write_report(tmp_path, [], RUN)


# In a browser.

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api", reason="the browser is driven by playwright, which is not installed"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The report at 1280 × 800; whatever it complains of or asks the network for fails the test."""
    complaints: list[str] = []
    opened = browser.new_page(viewport={"width": 1280, "height": 800})
    opened.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
    requests: list[str] = []
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(report.as_uri())
    yield opened
    opened.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]


def test_the_answer_is_on_the_first_screen(page: Any) -> None:
    box = page.locator("#answer table").bounding_box()
    assert box["y"] + box["height"] <= 800
    assert page.locator("#answer tbody tr").count() >= 3
    assert page.evaluate("window.scrollY") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_does_not_scroll_sideways(page: Any, scheme: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    first = page.locator("#answer tbody tr").first.bounding_box()
    assert first["y"] + first["height"] <= 844
    assert first["x"] + first["width"] <= 390


def test_dark_is_dark(page: Any) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colors = page.evaluate(
            "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
        )
        ink, paper = (np.mean([float(part) for part in re.findall(r"[\d.]+", color)[:3]]) for color in colors)
        brightness[scheme] = ink < paper
    assert brightness == {"light": True, "dark": False}


def test_every_picture_has_words(page: Any) -> None:
    images = page.eval_on_selector_all("img", "all => all.map(one => one.alt)")
    drawings = page.eval_on_selector_all("svg[role=img]", "all => all.map(one => one.ariaLabel)")
    assert all(images)
    assert all(drawings)
    assert len(drawings) == 3 * 4 + 17 * 2
    assert page.locator("svg:not([role=img]):not([aria-hidden=true])").count() == 0
    widths = page.eval_on_selector_all(".matrix", "all => all.map(one => one.getBoundingClientRect().width)")
    assert min(widths) > 100


def column(table: Any, index: int) -> list[str]:
    return table.locator(f"tbody tr > :nth-child({index + 1})").all_text_contents()


def sort_key(text: str) -> float:
    """The number that a cell shows, by its unit."""
    units = {"%": 0.01, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    figure, _, unit = text.removeprefix("< ").removeprefix("> ").replace(",", "").partition(" ")
    return float(figure) * units.get(unit, 1)


def test_headers_sort(page: Any) -> None:
    """Every column of numbers of two tables, against Python's sort of what the cells show; empty cells come last."""
    for section in ("#solvers", "#instances"):
        table = page.locator(f"{section} table").first
        headers = table.locator("thead th")
        for index in range(headers.count()):
            if "n" not in (headers.nth(index).get_attribute("class") or "").split():
                continue
            shown = [text for text in column(table, index) if text != "–"]
            empty = table.locator("tbody tr").count() - len(shown)
            for direction in ("ascending", "descending"):
                headers.nth(index).locator("button").evaluate("one => one.click()")  # fifty by the mouse would be slow
                expected = sorted((sort_key(text) for text in shown), reverse=direction == "descending")
                after = column(table, index)
                assert [sort_key(text) for text in after[: len(shown)]] == expected
                assert after[len(shown) :] == ["–"] * empty
                assert headers.nth(index).get_attribute("aria-sort") == direction
            others = headers.evaluate_all("all => all.filter(one => one.ariaSort !== 'none').length")
            assert others == 1


def test_words_sort(page: Any) -> None:
    """Names in the order of the numbers in them."""
    table = page.locator("#instances table").first
    names = [f"instance-{i}" for i in range(19)]
    for expected in (names, names[::-1], names):
        table.locator("thead button").first.click()
        assert column(table, 0) == expected


def test_an_instance_is_a_click_away(page: Any) -> None:
    page.emulate_media(reduced_motion="reduce")
    page.locator("#instances a", has_text=re.compile(r"^instance-2$")).click()
    section = page.locator("#instance-tiny-instance-2")
    assert page.url.endswith("#instance-tiny-instance-2")
    assert 0 <= section.bounding_box()["y"] < 100
    assert section.locator("table tbody tr").count() >= 11
    assert section.locator(".matrix").count() == 2


def test_a_chosen_solver_stands_out(page: Any) -> None:
    charts = page.locator(".charts").first
    button = charts.locator(".legend button").nth(1)
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    series = button.get_attribute("data-series")
    assert charts.locator(f".curve[data-series='{series}']:not(.faint)").count() >= 2
    assert charts.locator(f".curve:not(.faint):not([data-series='{series}'])").count() == 0
    button.click()
    assert charts.locator(".curve.faint").count() == 0


def test_tables_can_be_read_aloud(page: Any) -> None:
    """Captions, scopes, and a button in every header that sorts."""
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("table.sortable thead th:not(:has(button))").count() == 0
    assert page.locator("h1").count() == 1
    found = Ids(page.content())
    assert len(found.ids) == len(set(found.ids))
    assert set(found.links) <= set(found.ids)
