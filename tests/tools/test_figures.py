"""Figures in pages come from the ledger, and say when they are stale."""

from pathlib import Path

import figures
import ledger
import pytest
from ledger import Record

from rmoe_megatron.errors import UserError


def record(ratio: float, code: str = "") -> Record:
    return Record(
        command=f"tools/measure.py {ratio}",
        commit="0123abcdef",
        date="2026-11-29",
        machine={"kind": "cpu-avx2", "processor": "a CPU", "cores": 2, "threads": 1},
        versions={"torch": "2.15.0", "megatron-core": "0.19.2"},
        figures={"ratio": ratio, "model": "toy"},
        code={"configs": code or ledger.fingerprint(ledger.ROOT / "configs")},
        note="",
    )


RECORDS = {"cpu-avx2/step-a": record(0.456), "cpu-avx2/step-b": record(0.789, code="0" * 16)}


def test_the_pages_are_as_the_records_have_them() -> None:
    """If this fails: ``python tools/figures.py write``, and look at what has become stale."""
    records = ledger.load()
    for page in figures.pages():
        assert figures.rendered(page.read_text(), records, page.name) == page.read_text(), page


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_pins", lambda: {"torch": "2.15.0"})


@pytest.mark.usefixtures("pinned")
def test_a_figure_in_a_sentence() -> None:
    page = "It took <!-- figures: cpu-avx2/step-a {ratio:.2f} of it{stale} -->9.99<!-- end of figures -->."
    expected = (
        "It took <!-- figures: cpu-avx2/step-a {ratio:.2f} of it{stale} -->0.46 of it<!-- end of figures -->."
    )
    assert figures.rendered(page, RECORDS, "page") == expected
    assert figures.rendered(expected, RECORDS, "page") == expected


@pytest.mark.usefixtures("pinned")
def test_a_stale_figure_says_so() -> None:
    page = "<!-- figures: cpu-avx2/step-b {ratio}{stale} --><!-- end of figures -->"
    text = figures.rendered(page, RECORDS, "page")
    assert "-->0.789 (measured 2026-11-29, torch 2.15.0; the code has changed since)<!--" in text


@pytest.mark.usefixtures("pinned")
def test_a_table_has_a_row_for_every_record() -> None:
    page = """<!-- figures: cpu-avx2/step-*
| command | ratio | measured |
|---|---|---|
| `{command}` | {ratio:.1f} | {measured} |
-->
old
<!-- end of figures -->"""
    assert (
        figures.rendered(page, RECORDS, "page").partition("-->\n")[2]
        == """| command | ratio | measured |
|---|---|---|
| `tools/measure.py 0.456` | 0.5 | 2026-11-29, torch 2.15.0 |
| `tools/measure.py 0.789` | 0.8 | 2026-11-29, torch 2.15.0; the code has changed since |
<!-- end of figures -->"""
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("cpu-avx2/step-a {ratio}", "do not say when they are stale"),
        ("cpu-avx2/stop-* {ratio}{stale}", r"no record of the ledger is called cpu-avx2/stop-\*"),
        ("cpu-avx2/step-a {ration}{stale}", "cannot be filled in"),
        ("cpu-avx2/step-a {model:.2f}{stale}", "cannot be filled in"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        figures.rendered(f"<!-- figures: {template} --><!-- end of figures -->", RECORDS, "page")


@pytest.mark.usefixtures("pinned")
def test_stale_records_are_listed_with_the_command_that_renews_them() -> None:
    assert figures.describe_stale(RECORDS) == [
        "cpu-avx2/step-b, measured 2026-11-29 at 0123abc: configs has changed",
        "  renewed by: tools/measure.py 0.789",
    ]


def test_add_writes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "RECORDS", tmp_path)
    monkeypatch.setattr(ledger, "machine", lambda _: record(0.5)["machine"])
    words = "add quickstart --command tools/quickstart.sh --depends-on configs --figures seconds=700 seen=0.7 model=toy"
    monkeypatch.setattr("sys.argv", ["figures.py", *words.split()])
    with pytest.raises(SystemExit, match="0"):
        figures.main()
    (written,) = ledger.load(tmp_path).values()
    assert written["figures"] == {"seconds": 700, "seen": 0.7, "model": "toy"}
    assert written["command"] == "tools/quickstart.sh"
    assert ledger.why_stale(written) == []
