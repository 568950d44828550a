"""The experiment `links`: its peers against the network itself, its report from rows that are made up, and real links.

The last tests need root, `ip` and `tc`, and are left out without them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.network import baselines
from repurpose_opt.network.owners import Placement
from repurpose_opt.network.trace import trace
from repurpose_opt.runtime.manifest import Manifest
from repurpose_opt.runtime.plan import Plan
from repurpose_opt_benchmarks import (
    links,
    links_jobs,
    links_model,
    links_namespaces,
    links_network,
    links_report,
    links_summary,
)
from repurpose_opt_benchmarks.links_dense import ALL_GATHER, HAND_WRITTEN
from repurpose_opt_benchmarks.links_peers import OUR_DIRECT, PLANNED
from repurpose_opt_benchmarks.links_process import LINK
from repurpose_opt_benchmarks.networks_tasks import perceptron

WIDTHS, P, SAMPLES = (12, 8, 4, 3), 2, 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> links_network.Prepared:
    """A folder as `prepare` makes it, of a small network for two workers; `values` and `codes` are direct as well."""
    made = links_network.Prepared(tmp_path_factory.mktemp("links"))
    model = perceptron(WIDTHS, 0).eval()
    inputs = torch.rand(SAMPLES, WIDTHS[0], generator=torch.Generator().manual_seed(0))
    network, placement = trace(model, inputs[:1]), Placement(P, np.arange(12) * P // 12, (0,), np.full(P, 0.5), None)
    direct, sums = baselines.direct_plan(network, placement), links_network.sums_plan(network, placement)
    for name, plan in {links_network.DIRECT: direct, links_network.SUMS: sums}.items():
        plan.save(made.plan(name))
    for name in links_network.OURS:
        direct.save(made.plan(name))
    figures = {"accuracy": 0.97, "numbers": 1, "volume_fraction": 0.1}
    about: dict[str, Any] = {
        "data": "d",
        "test_images": 6,
        "widths": WIDTHS,
        "odd_widths": WIDTHS,
        "steps": {"training": 1, "fine_tuning": 1},
    }
    plans = dict.fromkeys((links_network.DIRECT, links_network.SUMS, *links_network.OURS), figures)
    asked = {"all_of_mnist": False, "quick": True}
    (made.folder / links_network.ABOUT).write_text(json.dumps({**asked, **about, "plans": plans}))
    np.save(made.folder / "inputs.npy", inputs.numpy().T.copy())
    np.save(made.folder / "labels.npy", model(inputs).argmax(1).numpy())
    return made


def test_partial_sums_are_sent_where_they_are_fewer(prepared: links_network.Prepared):
    """For each pair, the fewer of the values there and the neurons here; the answer stays the same."""
    direct, sums = (Plan.load(prepared.plan(name)) for name in (links_network.DIRECT, links_network.SUMS))
    inputs = torch.rand(5, WIDTHS[0])
    torch.testing.assert_close(sums.model(inputs), direct.model(inputs))
    for layer in sums.layers:
        expected = np.zeros((P, P))
        for source, target in product(range(P), repeat=2):
            held, computed = sum(layer.input_owner == source), sum(layer.owner == target)
            if source != target and computed:
                expected[source, target] = min(held, computed)
        np.testing.assert_array_equal(layer.traffic() / 4, expected, err_msg=layer.name)
    assert sums.volume == baselines.partial_sums(direct).bytes_per_sample < direct.volume


def test_plans_of_another_size_are_not_taken(prepared: links_network.Prepared, tmp_path: Path):
    assert links_network.prepare(prepared.folder, None, is_quick=True).about == prepared.about
    for mnist_directory, is_quick in ((None, False), (tmp_path, True)):
        with pytest.raises(InvalidArgument, match="work"):
            links_network.prepare(prepared.folder, mnist_directory, is_quick)


def test_counters_are_read_for_each_pair(tmp_path: Path):
    for other, (sent, packets) in {0: (700, 3), 2: (50, 1)}.items():
        folder = tmp_path / f"v{other}" / "statistics"
        folder.mkdir(parents=True)
        (folder / "tx_bytes").write_text(f"{sent}\n")
        (folder / "tx_packets").write_text(f"{packets}\n")
    found = links_namespaces.counters(3, 1, tmp_path)
    assert set(found) == {0, 2}
    assert found[0] - links_namespaces.Counter(200, 1) == links_namespaces.Counter(500, 2)
    assert found[2] == links_namespaces.Counter(50, 1)


def times_row(peer: str, seconds: float, manifest: Manifest | None = None, **figures: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": "times", "link": "100 MB/s", "batch_size": 1000, "round": 0, "peer": peer}
    row |= {"seconds": [seconds] * 4, "difference": 1e-6}
    if manifest is not None:
        predicted = 4 * 1000 * np.sum([layer.traffic() for layer in manifest.layers], axis=0)
        counted = predicted / 4 + 660  # a batch: 10 packets and what they carry
        row |= {"blocked": [0.01] * 4, "bare": [0.02] * 4, "compute_in_order": [0.001, 0.002]}
        row |= {"bytes_handed": predicted.tolist(), "bytes_predicted": predicted.tolist()}
        packets = [[20, 20], [20, 20]]
        row["counted"] = {"batches": 2, "bytes": (2 * counted).tolist(), "packets": packets}
    return row | figures


@pytest.fixture
def rows(prepared: links_network.Prepared) -> list[dict[str, Any]]:
    manifest = Plan.load(prepared.plan(links_network.DIRECT)).manifest()
    small: dict[str, Any] = {"all_pairs": [1e-3] * 4, "next": {"4": [1e-3] * 4, "1000000": [0.011] * 4}}
    found = [times_row(LINK, 0.0, **small), times_row(ALL_GATHER, 0.6)]
    found += [times_row("DTensor, columns", 0.9), times_row("DTensor, row, column, row", 0.5)]
    found += [times_row(peer, 0.1, manifest) for peer, (_, wire) in PLANNED.items() if wire is None]
    memory = {"weight_bytes": [1], "buffer_bytes": [2], "resident_joined": [3], "resident_most": [4]}
    head = {"kind": "alone", "link": "loopback", "batch_size": 9, "round": 0}
    found += [{**head, "peer": row["peer"], "accuracy": 0.97, "start_seconds": 2.0, **memory} for row in found[1:]]
    odd = {**head, "kind": "odd"}
    found.append({**odd, "peer": "odd sizes: direct", "difference": 1e-6, "answer_shape": [3, 5]})
    found.append({**odd, "peer": "odd sizes: DTensor, columns", "error": "worker 1 ended with code -6: why"})
    return found


def test_bars_and_report(rows: list[dict[str, Any]], prepared: links_network.Prepared, tmp_path: Path):
    found = links_summary.summary(rows, prepared)
    bars = {bar["what"]: bar for bar in found["bars"]}
    what = "100 MB/s, 1000 samples: direct, all-gather, time over that of values 3 % (by round 6.00 … 6.00)"
    assert bars[what]["measured"] == pytest.approx(6)
    # The faster of DTensor's layouts is its peer.
    what = "100 MB/s, 1000 samples: DTensor, row, column, row, time over that of codes 1 % (by round 5.00 … 5.00)"
    assert bars[what]["reached"]
    assert bars["bytes handed to the library: the most off the predicted"]["measured"] == 0
    counted = "values 3 %, 100 MB/s: bytes that the kernel counted for a pair, without headers, off the predicted"
    assert bars[counted]["measured"] == pytest.approx(0)
    environment = {"cores": 2, "system": "s", "machine": "m", "commit": "c", "uncommitted_changes": False}
    environment |= dict.fromkeys(("python", "numpy", "scipy", "torch"), "1")
    setting = {"command": "x", "environment": environment, "congestion_control": "cubic", "no_namespaces": None}
    report = {**found, **setting, "is_official": True}
    text = links_report.markdown(report, "about")
    assert "| direct, all-gather | 97.00% | – | 600.0 (600.0 – 600.0) | 1.00 |" in text
    assert "`worker 1 ended with code -6: why`" in text
    links_report.plot(report, tmp_path / "links.png")
    assert (tmp_path / "links.png").stat().st_size > 0


def test_a_byte_more_than_predicted_is_seen(rows: list[dict[str, Any]], prepared: links_network.Prepared):
    row = next(row for row in rows if row["peer"] == "codes 2 %")
    row["bytes_handed"][0][1] += 4
    row["counted"]["bytes"][1][0] *= 1.1
    bars = {bar["what"]: bar for bar in links_summary.summary(rows, prepared)["bars"]}
    assert not bars["bytes handed to the library: the most off the predicted"]["reached"]
    what = "codes 2 %, 100 MB/s: bytes that the kernel counted for a pair, without headers, off the predicted"
    assert bars[what]["measured"] > 0.05


def test_simulated_communication_by_hand(rows: list[dict[str, Any]], prepared: links_network.Prepared):
    """No time to compute: three exchanges one after the other, each as long as its largest message takes."""
    manifest = Plan.load(prepared.plan(links_network.DIRECT)).manifest()
    own = [row for row in rows if row["kind"] == "times"]
    direct = [row | {"compute_in_order": [1e-12, 1e-12]} for row in own if row["peer"] == OUR_DIRECT]
    link = [row for row in own if row["peer"] == LINK]
    platform = links_model.calibrated("100 MB/s", link, direct, manifest)
    rate = 100e6 * 1448 / 1514
    expected = sum(1e-3 + 1000 * layer.traffic().max() / rate for layer in manifest.layers)
    found = links_model.predicted_communication(manifest, platform, 1000, None)
    assert found == pytest.approx(expected, rel=1e-3)


def test_only_what_is_missing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A peer that fails becomes a row; those after it are measured, and nothing is measured twice."""
    log, runs = tmp_path / "rows.jsonl", []

    def run(job: links_jobs.Job, names: Any) -> None:
        runs.append(job.peers)
        for peer in job.peers:
            if peer == "bad":
                raise RepurposeError("no")
            with log.open("a") as lines:
                lines.write(json.dumps({**job.head, "peer": peer}) + "\n")

    monkeypatch.setattr(links, "run", run)
    job = links_jobs.Job("times", "loopback", 0, 2, 4, ("a", "bad", "b"), 1, 1, "", str(log), 9.0, 9.0)
    log.write_text(json.dumps({**job.head, "peer": "a"}) + "\n" + '{"kind": "ti')
    for _ in range(2):
        links.measure(job, log)
    assert runs == [("bad", "b"), ("b",)]
    assert [row["peer"] for row in links.rows_in(log)] == ["a", "bad", "b"]
    assert links.rows_in(log)[1]["error"] == "no"


HOLD = """
import sys, time
from repurpose_opt_benchmarks.links_namespaces import namespaces
with namespaces(2, 1e6) as names:
    print(*names, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_left_is_removed(has_namespaces: None):
    """Names are of a run, so that the next one is not disturbed either."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        names = process.stdout.readline().split()
        with links_namespaces.namespaces(2, 1e6) as others:
            assert set(names) | set(others) <= listed()
        assert set(names) <= listed()
        process.kill()
    assert len(names) == 2
    assert set(names) <= listed()
    assert links_namespaces.reason_without() is None
    assert not set(names) & listed()


@pytest.fixture
def has_namespaces() -> None:
    reason = links_namespaces.reason_without()
    if reason is not None:
        pytest.skip(reason)


def listed() -> set[str]:
    """Names of the namespaces that there are."""
    lines = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[0] for line in lines}


def run_job(prepared: links_network.Prepared, log: Path, link: str, *peers: str) -> None:
    job = links_jobs.Job("times", link, 0, P, SAMPLES, peers, 3, 1, str(prepared.folder), str(log), 100.0, 30.0)
    with links_jobs.links_of(link, P) as names:
        links_jobs.run(job, names)


def test_bytes_that_the_kernel_counts(has_namespaces: None, prepared: links_network.Prepared, tmp_path: Path):
    """Two workers on a shaped link, for real: per pair, what the plan says, but for headers; no namespace is left."""
    log = tmp_path / "rows.jsonl"
    run_job(prepared, log, "100 MB/s", OUR_DIRECT, LINK, *HAND_WRITTEN)
    row, link, *others = links.rows_in(log)
    assert [other["peer"] for other in others] == list(HAND_WRITTEN)
    predicted = np.array(row["bytes_predicted"])
    np.testing.assert_array_equal(row["bytes_handed"], predicted)
    assert predicted[0, 1] == 3 * SAMPLES * 4 * (6 + 4)
    assert predicted[1, 0] == 3 * SAMPLES * 4 * (6 + 4 + 2)
    for timed in (row, *others):
        assert len(timed["seconds"]) == 3
        assert timed["difference"] < 1e-5
    assert min(row["seconds"] + link["all_pairs"]) > 0
    content = np.array(row["counted"]["bytes"]) - links_summary.HEADER_BYTES * np.array(row["counted"]["packets"])
    # What gloo adds: less than 200 bytes for each of the messages and a barrier.
    for pair, messages in {(0, 1): 3 * 2, (1, 0): 3 * 3}.items():
        assert predicted[pair] <= content[pair] <= predicted[pair] + 200 * (2 * messages + 4)
    assert not any(name.startswith(f"{links_namespaces.PREFIX}{os.getpid()}n") for name in listed())
