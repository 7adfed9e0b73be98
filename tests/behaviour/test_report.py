"""The page about a run or a lineage: from real files, through the command line, and in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from scaletrain import cli
from scaletrain.config import decode
from scaletrain.continual import metrics
from scaletrain.continual.gate import GateConfig, judge
from scaletrain.continual.store import Store
from scaletrain.recipes import pretrain
from scaletrain.train.metrics import Jsonl, StepRecord, read_jsonl
from tests import ranks, tiny
from tests.unit.report.dom import Node, cells, parse

HOSTILE = "</td><script>alert(1)</script><img src=http://198.51.100.7/x.png>"
RESULTS = {"text": {"text": 0.9125}, "numbers": {"text": 0.6, "numbers": 0.95}, "network": {"text": 0.8875, "network": 0.925}}


def page_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> Node:
    """What ``scaletrain report FOLDER`` writes."""
    assert cli.main(["report", str(folder)]) == 0
    said = json.loads(capsys.readouterr().out)
    text = Path(said["report"]).read_text()
    assert said["bytes"] == len(text.encode())
    return parse(text)


def section(page: Node, title: str) -> Node:
    (found,) = [node for node in page.all("section") if node.one("h2").text == title]
    return found


def facts(page: Node) -> dict[str, str]:
    names = [[node.text for node in entry.all("dt") + entry.all("dd")[:1]] for entry in section(page, "Overview").all("div")]
    return dict(names)  # type: ignore[arg-type]


# --- runs


def write_run(folder: Path, steps: int, losses: Mapping[int, float] | None = None, *, config: str = "steps: 40\n") -> Path:
    """A run's folder, written as a run writes it; ``losses``: those of some steps that are not 4 / step."""
    writer = Jsonl(folder / "metrics.jsonl", 0)
    writer.event(0, "start", {"ranks": 2, "device": "cpu"})
    writer.evaluation(0, {"loss": 5.0, "accuracy": 0.0})
    for step in range(1, steps + 1):
        loss = (losses or {}).get(step, 4.0 / step)
        writer.step(
            StepRecord(
                step=step,
                samples=8 * step,
                loss=loss,
                terms={"mlm": loss},
                learning_rate=1e-3,
                gradient_norm=1.0,
                real_tokens=100,
                real_tokens_per_second=1000.0,
                padding_share=0.25,
                step_s=0.1,
                data_wait_s=0.0,
                eta_s=12.0,
                mfu=None,
                memory_bytes=10**9,
                rounds=1,
                filler_share=0.0,
            )
        )
    writer.evaluation(steps, {"loss": 1.0, "accuracy": 0.5})
    writer.close()
    (folder / "config.yaml").write_text(config)
    return folder


def test_a_real_run_has_its_figures_on_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pretraining run on one rank: losses, evaluations, settings and its end, as they stand in its files."""
    tree = tiny.settings(
        tiny.corpus(tmp_path), tmp_path / "run", steps=6, engine={"name": "local"}, evaluation={"every_steps": 3}
    )
    ranks.run(train, 1, {"tree": tree})
    page = page_of(tmp_path / "run", capsys)
    lines = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    evaluated = [line["scores"]["loss"] for line in lines if line["kind"] == "eval"]
    assert page.one("p", "status").text == "\N{CHECK MARK} done after step 6"
    loss, *_ = section(page, "Learning").all("figure")
    rows = cells(loss.one("table"))
    assert [float(row[1]) for row in rows[2:]] == pytest.approx(losses, rel=1e-3)
    assert [float(row[2]) for row in rows[1:] if row[2]] == pytest.approx(evaluated, rel=1e-3)
    assert facts(page)["steps"] == "6" and facts(page)["ranks"] == "1"
    assert section(page, "Settings").one("pre").text == (tmp_path / "run" / "config.yaml").read_text()


def train(tree: dict[str, Any]) -> None:
    pretrain.main(decode(pretrain.Config, tree))


def test_a_run_that_is_still_going_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No exit.json, and a last line that is being written."""
    folder = write_run(tmp_path / "run", 20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 21, "lo')
    page = page_of(folder, capsys)
    assert page.one("p", "status").text.startswith("? no end recorded It is still going, or it was killed. Last record ")
    assert (facts(page)["steps"], facts(page)["time left"]) == ("20", "12 s")


def test_a_run_that_has_failed_says_why_and_where_its_loss_was_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", 20, {19: float("inf"), 20: float("nan")})
    (folder / "exit.json").write_text(json.dumps({"code": 72, "step": 20, "reason": "step 21: loss nan"}))
    page = page_of(folder, capsys)
    assert page.one("p", "status").text == (
        "\N{MULTIPLICATION X} failed, exit code 72 after step 20: The loss or the gradient is not finite. step 21: loss nan"
    )
    loss, *_ = section(page, "Learning").all("figure")
    assert [gap.get("x1") for gap in loss.all("line", "gap")] == ["95.00%", "100.00%"]


def test_a_long_run_has_a_small_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every 25th of half a million steps; the one extreme among them is still told."""
    folder = write_run(tmp_path / "run", 1)
    line = next(line for line in read_jsonl(folder / "metrics.jsonl") if line["kind"] == "step")
    steps = [{**line, "step": 25 * k, "loss": 99.5 if k == 12_345 else 2.0} for k in range(1, 20_001)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    page = page_of(folder, capsys)
    assert (folder / "report.html").stat().st_size < 500_000
    loss, *_ = section(page, "Learning").all("figure")
    assert "highest 99.5" in next(svg.get("aria-label") for svg in loss.all("svg") if svg.get("role") == "img")
    assert facts(page)["steps"] == "500,000"


def test_lines_that_no_run_would_write_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", 3)
    strange = [
        "[]",
        "null",
        '{"kind": "step", "step": 2, "loss": 9, "real_tokens": 7}',
        '{"kind": "step", "step": "4", "loss": 9}',
        '{"kind": "step", "step": 4, "loss": "9", "terms": [], "real_tokens": true, "gradient_norm": 1' + 400 * "0" + "}",
        '{"kind": "eval", "step": 4, "scores": {"accuracy": null}}',
        '{"kind": "event", "step": 4, "name": 7, "facts": {}}',
        '{"kind": "step", "step": Infinity}',
        "\udcff",
    ]
    with (folder / "metrics.jsonl").open("a", errors="surrogateescape") as file:
        file.writelines(f"{line}\n" for line in strange)
    page = page_of(folder, capsys)
    assert (facts(page)["steps"], facts(page)["training loss"], facts(page)["tokens"]) == ("4", "not finite", "300")


def test_a_run_without_metrics_or_with_files_that_cannot_be_read_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("exit.json", "{"), ("config.yaml", "a: ["), ("report.json", "{}")):
        (tmp_path / name).write_text(text)
    careful = [node.text for node in section(page_of(tmp_path, capsys), "Overview").all("p")]
    assert [text.split(".")[0] for text in careful] == [
        "Careful: There is no metrics",
        "Careful: The settings cannot be read",
        "Careful: How it ended cannot be read from exit",
        "Careful: The final test cannot be read from report",
    ]


# --- lineages


def write_lineage(folder: Path, *, until: str = "network", rename: Mapping[str, str] | None = None) -> Path:
    """A lineage in the store's own format: text is published, numbers refused for what it does to text, network published on
    top of text. ``rename``: other names for tasks in what is written of them."""
    called = rename or {}
    store = Store(folder)
    before: dict[str, dict[str, bool]] = {}
    published = None
    with store.hold():
        for number, (task, row) in enumerate(RESULTS.items(), start=1):
            version, name = f"{number:04d}-{task}", called.get(task, task)
            store.append("begun", task=name, version=version, base=published, digest="0" * 64)
            stage = store.work_folder(version)
            stage.mkdir(parents=True)
            write_run(stage, 10)
            if task == until:
                return folder
            store.append("trained", version=version, step=10, steps=10, validation=0.9)
            (store.partial_version(version) / "evaluation.json").write_text("{}")
            store.commit_version(version)
            tasks = [called.get(each, each) for each in row]
            store.append("evaluated", version=version, tasks=tasks, row=list(row.values()), remembered=0)
            outcomes = {
                each: {str(k): k < round(400 * score) for k in range(400)}
                for each, score in zip(tasks, row.values(), strict=True)
            }
            verdict = judge(GateConfig(max_drop=0.1), before, outcomes)
            uses = dict.fromkeys(tasks, number)
            store.append("judged", version=version, against=published, verdict=verdict.to_json(), uses=uses)
            if verdict.decision == "accept":
                before, published = outcomes, version
                store.publish(version, task=name)
            else:
                store.append("refused", task=name, version=version)
    return folder


@pytest.fixture
def lineage(tmp_path: Path) -> Path:
    return write_lineage(tmp_path / "lineage", until="")


def test_the_heat_map_is_the_ledger(lineage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row by row, to the last digit; what was not evaluated has no number."""
    heat = section(page_of(lineage, capsys), "Results").one("table", "heat")
    columns = [head.text for head in heat.one("thead").all("th")][1:]
    evaluated = [entry for entry in Store(lineage).entries() if entry["event"] == "evaluated"]
    rows = heat.one("tbody").all("tr")
    assert [row.one("th").text for row in rows] == ["0001-text", "0002-numbers (refused)", "0003-network"]
    for row, entry in zip(rows, evaluated, strict=True):
        numbers = [[float(number.get("value")) for number in cell.all("data")] for cell in row.all("td")]
        known = dict(zip(entry["tasks"], entry["row"], strict=True))
        assert dict(zip(columns, numbers, strict=True)) == {task: [known[task]] if task in known else [] for task in columns}


def test_the_summary_figures_are_of_the_stages_that_led_to_what_is_published(
    lineage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refused stage between them is none."""
    results = section(page_of(lineage, capsys), "Results")
    (table,) = results.all("table", "metrics")
    expected = metrics.summary([[0.9125], [0.8875, 0.925]])
    assert [(row[0], row[2]) for row in cells(table)[1:]] == [
        (name.replace("_", " "), metrics.FORMULAS[name]) for name in expected
    ]
    shown = [float(row[1].replace("\N{MINUS SIGN}", "-")) for row in cells(table)[1:]]
    assert shown == pytest.approx(list(expected.values()), abs=6e-5)
    assert "Summary figures of the stages up to 0003-network" in [node.text for node in results.all("p")]


def test_a_candidate_that_was_refused_has_its_figures_beside_those_of_the_published_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = section(page_of(write_lineage(tmp_path / "lineage"), capsys), "Results")
    assert [node.text for node in results.all("p", "caption")][1:] == [
        "Summary figures of the stages up to 0001-text",
        "Summary figures of the stages up to 0002-numbers",
    ]
    _, candidate = results.all("table", "metrics")
    assert dict(tuple(row[:2]) for row in cells(candidate)[1:])["forgetting"] == "0.3125"  # type: ignore[misc]


def test_a_task_that_was_tried_again_counts_with_its_last_attempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_lineage(tmp_path / "lineage")
    store = Store(folder)
    with store.hold():
        store.append("refused", task="network", version="0003-network", reason="abandoned")
        store.append("begun", task="numbers", version="0004-numbers", base="0001-text", digest="0" * 64)
        store.append("evaluated", version="0004-numbers", tasks=["text", "numbers"], row=[0.9, 0.9], remembered=0)
    _, tables = section(page_of(folder, capsys), "Results").all("table", "metrics")
    assert dict(tuple(row[:2]) for row in cells(tables)[1:]) == {  # type: ignore[misc]
        "average accuracy": "0.9000",
        "average incremental accuracy": "0.9062",
        "forgetting": "0.0125",
        "backward transfer": "\N{MINUS SIGN}0.0125",
    }


def test_what_the_gate_said_and_why(lineage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = section(page_of(lineage, capsys), "The gate")
    verdicts = {node.one("h3").text: node for node in gate.all("article")}
    assert [name.split()[::2] for name in verdicts] == [
        ["0003-network", "accept"],
        ["0002-numbers", "refuse"],
        ["0001-text", "accept"],
    ]
    refused = verdicts["0002-numbers \N{MULTIPLICATION X} refuse"]
    assert [node.text for node in refused.all("p")] == ["Broken: text.", "Compared with 0001-text."]
    (entry,) = [e for e in Store(lineage).entries() if e["event"] == "judged" and e["version"] == "0002-numbers"]
    said = entry["verdict"]["tasks"][0]
    assert cells(refused.one("table"))[1][:8] == [
        "text",
        "400",
        "125",
        "0",
        f"{said['drop']:.3f}",
        "0.100",
        "0.600",
        "\N{EN DASH}",
    ]
    assert cells(refused.one("table"))[1][8] == "1" and "e\N{MINUS SIGN}" in cells(refused.one("table"))[1][9]
    assert cells(refused.one("table"))[1][10:] == ["2", f"\N{MULTIPLICATION X} broken {said['reason']}"]


def states(page: Node) -> dict[str, str]:
    return {row[0]: row[3] for row in cells(section(page, "Versions").one("table"))[1:]}


def test_versions_that_were_published_refused_and_rolled_back(lineage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published, refused, before = "\N{CHECK MARK} published", "\N{MULTIPLICATION X} refused", "\N{BULLET} published before"
    assert states(page_of(lineage, capsys)) == {"0001-text": before, "0002-numbers": refused, "0003-network": published}
    store = Store(lineage)
    with store.hold():
        store.rollback()
    page = page_of(lineage, capsys)
    back = "\N{MULTIPLICATION X} rolled back"
    assert states(page) == {"0001-text": published, "0002-numbers": refused, "0003-network": back}
    assert facts(page)["published"] == "0001-text"
    with store.hold():
        store.rollback("0003-network")
    assert states(page_of(lineage, capsys)) == {"0001-text": back, "0002-numbers": refused, "0003-network": published}


def test_an_attempt_that_was_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_lineage(tmp_path / "lineage", until="numbers")
    store = Store(folder)
    with store.hold():
        store.append("refused", task="numbers", version="0002-numbers", reason="abandoned")
    assert states(page_of(folder, capsys))["0002-numbers"] == "\N{MULTIPLICATION X} abandoned"


def test_a_lineage_whose_stage_is_under_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a ledger whose last line is being written."""
    folder = write_lineage(tmp_path / "lineage")
    with (folder / "ledger.jsonl").open("a") as file:
        file.write('{"n": 99, "event": "trai')
    page = page_of(folder, capsys)
    status = page.one("p", "status").text
    assert status.startswith("? no end recorded It is still going, or it was killed.")
    assert status.endswith("0003-network is begun and not concluded. Published is 0001-text.")
    assert [fold.all("summary")[0].text for fold in section(page, "Training").all("details", "fold")] == [
        "0001-text, 10 steps",
        "0002-numbers, 10 steps",
        "0003-network, 10 steps",
    ]


def test_a_ledger_that_was_altered_is_shown_and_not_trusted(lineage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = lineage / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace("0.9125", "0.9925").replace('"pairs": 400', '"pairs": "many"'))
    page = page_of(lineage, capsys)
    (careful,) = section(page, "Overview").all("p")
    assert careful.text.startswith("Careful: The ledger was altered, and what this page says of it is not to be trusted.")
    assert cells(section(page, "Results").one("table", "heat"))[1][1] == "0.993"


def test_a_pointer_that_is_not_where_the_ledger_says_is_told(lineage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (lineage / "published").unlink()
    (careful,) = section(page_of(lineage, capsys), "Overview").all("p")
    assert careful.text.startswith("Careful: The pointer to the published version says None, the ledger 0003-network")


# --- the verb


def test_a_folder_that_is_neither_is_wrong_input_and_what_lies_below_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path)]) == 65
    assert capsys.readouterr().err == (
        f"error: run: got '{tmp_path}'; neither a run (metrics.jsonl or exit.json) nor a lineage (ledger.jsonl) lies there. "
        "Give the folder that the verb calls output\n"
    )
    write_run(tmp_path / "one", 1)
    assert cli.main(["report", str(tmp_path)]) == 65
    assert capsys.readouterr().err.endswith(f"Give one of {tmp_path / 'one'}\n")


def test_the_page_goes_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = write_run(tmp_path / "run", 2), tmp_path / "new" / "page.html"
    assert cli.main(["report", str(folder), f"output={output}"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(output)
    assert output.exists() and not (folder / "report.html").exists()


def test_a_page_that_cannot_be_written_is_a_storage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", 2)
    assert cli.main(["report", str(folder), f"output={folder / 'metrics.jsonl' / 'page.html'}"]) == 74
    assert "the page cannot be written there" in capsys.readouterr().err


# --- in a browser


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs a browser: chromium is not installed")
    return found


def browse(chromium: str, page: Path, folder: Path) -> tuple[Node, list[str]]:
    """The document that the browser makes of a page, and every address that the page (not the browser itself) has asked for."""
    log = folder / "net.json"
    command = [chromium, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    command += ["--disable-component-update", "--disable-quic", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    ended = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return parse(ended.stdout), list(requests(json.loads(log.read_text())))


def requests(log: dict[str, Any]) -> Iterator[str]:
    """From Chromium's network log; requests of the browser's own have no origin as their initiator."""
    started = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    for event in log["events"]:
        facts = event.get("params", {})
        if event["type"] == started and "url" in facts and facts.get("initiator") != "not an origin":
            yield facts["url"]


def addresses(page: Node) -> Sequence[str]:
    return [node.get(name) for node in page.walk() for name in ("src", "href", "xlink:href", "action", "data") if node.get(name)]


def test_requests_would_be_seen(chromium: str, tmp_path: Path) -> None:
    """The test of the test below: a page that asks for something is found out."""
    (tmp_path / "page.html").write_text("<!DOCTYPE html><html><head></head><body><p>x</p></body></html>")
    assert browse(chromium, tmp_path / "page.html", tmp_path / "quiet")[1] == []
    leaky = '<!DOCTYPE html><html><head><link rel="stylesheet" href="http://198.51.100.7/x.css"></head><body></body></html>'
    (tmp_path / "leaky.html").write_text(leaky)
    assert browse(chromium, tmp_path / "leaky.html", tmp_path / "loud")[1] == ["http://198.51.100.7/x.css"]


@pytest.mark.parametrize("kind", ["run", "lineage"])
def test_in_a_browser_the_page_shows_its_numbers_and_asks_for_nothing(
    chromium: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """With names and reasons that try to break out of it."""
    folder = tmp_path / "x"
    if kind == "run":
        write_run(folder, 30, config=f'output: "{HOSTILE}"\n')
        (folder / "exit.json").write_text(json.dumps({"code": 65, "step": 30, "reason": HOSTILE}))
    else:
        write_lineage(folder, until="", rename={"text": HOSTILE})
    written = page_of(folder, capsys)
    shown, asked = browse(chromium, folder / "report.html", tmp_path)
    assert asked == []
    assert shown.all("script") + shown.all("img") == []
    assert all(address.startswith(("#", "data:")) for address in addresses(shown))
    assert HOSTILE in shown.one("body").text
    assert shown.one("body").text.strip() == written.one("body").text
    assert [cells(table) for table in shown.all("table")] == [cells(table) for table in written.all("table")]
    assert [path.get("d") for path in shown.all("path")] == [path.get("d") for path in written.all("path")] != []
