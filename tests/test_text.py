"""Text from outside in every output: one printable line in the terminal, and never markup, a formula or an escape."""

import csv
import html
import io
import json
import os
import re
import sys
from xml.etree import ElementTree

import pandas as pd
import pytest
from made_runs import make_bench, make_fidelity, make_run
from PIL import Image

from squeeze import InputError
from squeeze.cli.run import run_command
from squeeze.cli.tables import table
from squeeze.compatibility import UntestedVersion
from squeeze.report import command as report
from squeeze.report import results
from squeeze.report.figures import new_panel, render
from squeeze.text import fitted, printable

CONTROLS = "".join(map(chr, (*range(1, 32), 127, *range(128, 160))))
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
NAMES = {
    "controls": CONTROLS,
    "escape": "\x1b[31mred\x1b]0;title\x07",
    "lines": "a\nb\r\nc\u2028d\u2029e\x85f",
    "bidi": f"a{BIDI}b",
    "no characters": "\ufffe\uffff\U0001fffe\ufeff",
    "formula": r"$\frac$ $x^2$ $ \$",
    "markup": "<script>&amp;]]>&#27;<!-- \"' {{ 7 * 7 }} {% x %}",
    "table": "a|b\\|c`d`*e*",
    "sheet": '=HYPERLINK("http://x")',
    "hidden": "_x",
    "long": "n" * 5000,
    "words": "名前 نام\u200cها 👩\u200d💻 é",
}
#: Each is the name of a run's model, allocation, algorithm and so on.
RUNS = {
    "terminal": NAMES["escape"] + NAMES["lines"] + "a\u202eb\ufffe",
    "controls": NAMES["controls"],
    **{kind: NAMES[kind] for kind in ("formula", "markup", "sheet", "long")},
}
FORBIDDEN = re.compile(f"[\0{CONTROLS}{BIDI}\u2028\u2029\ufffe\uffff\ud800-\udfff]")


def test_printable():
    """Every character there is: kept as it is, or written in ASCII; always of UTF-8 and of XML."""
    for start in range(0, 0x110000, 4096):
        text = "".join(map(chr, range(start, start + 4096)))
        said = printable(text)
        assert not FORBIDDEN.search(said)
        ElementTree.fromstring(f"<a>{html.escape(said)}</a>".encode())
        assert all(one in said for one in text if one.isprintable())
    assert printable("\x1b\n\t\u202e\ud800") == r"\x1b\n\t\u202e\ud800"
    for text in (NAMES["words"], NAMES["markup"], "plain", r"C:\temp", ""):
        assert printable(text) == text


def test_shorten():
    assert fitted("a\nb", 4) == r"a\nb"
    for most in (1, 2, 5, 6):
        assert len(fitted("0123456789", most)) == most
    assert fitted("0123456789", 5) == "01…89"


def test_a_cell_of_a_table_stays_a_cell():
    made = table(("a", "b"), [{"a": "x|y\\|z", "b": "1\n| 2"}, {"a": "\x1b[31m", "b": "3"}])
    assert len(made.splitlines()) == 4
    assert len({len(line) for line in made.splitlines()}) == 1
    for line in made.splitlines():
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3


def test_spreadsheets_see_no_formula():
    texts = [
        "=1+1",
        "+1+1",
        "@SUM(A1)",
        "-cmd",
        "＝1",
        " =1",
        "\t=1",
        "\r=1",
        "-",
        "-1.5",
        "+2",
        "1e5",
        "a=1",
        "",
        "a\nb",
    ]
    frame = pd.DataFrame({"text": texts, "number": [-float(index) for index in range(len(texts))]})
    rows = list(csv.DictReader(io.StringIO(results.to_csv(frame))))
    assert [row["text"] for row in rows] == [
        *("'=1+1", "'+1+1", "'@SUM(A1)", "'-cmd", "'＝1", "' =1", r"\t=1", r"\r=1"),
        *("-", "-1.5", "+2", "1e5", "a=1", "", r"a\nb"),
    ]
    assert [float(row["number"]) for row in rows] == list(frame["number"])
    plain = pd.DataFrame({"a": ["x", "-"], "b": [-1, 2], "c": [float("nan"), -0.25], "d": [None, True]})
    assert results.to_csv(plain) == plain.to_csv(index=False, lineterminator="\n")


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """The files and the output of a report on runs with every name, each as model, dtype, device and so on."""
    root = tmp_path_factory.mktemp("runs")
    for number, (kind, name) in enumerate(RUNS.items()):
        folder = root / os.fsdecode(os.fsencode(f"{number}-{name[:40].replace('/', '')}") + b"\xff") / "r"
        squeezed = {"ini_size": 0.2, "KV_class3": 0.1, "allocation": "squeeze", "algorithm": "h2o", "dtype": name}
        make_run(folder, model=NAMES["table"] if kind == "sheet" else name, **squeezed)
        manifest = json.loads((folder / "run.json").read_text())
        start = manifest["datasets"]["samsum"]["starts"][0]
        start |= {"command": name, "device": name, "versions": {"torch": name}}
        (folder / "run.json").write_text(json.dumps(manifest))
    make_run(root / "full", model=NAMES["words"])
    make_run(root / "words", model=NAMES["words"], ini_size=0.2, KV_class3=0.2)
    make_run(root / "hidden", model=NAMES["hidden"], ini_size=0.2, KV_class3=0.2)
    make_fidelity(root / "kl", 0.1, model=NAMES["formula"] + NAMES["controls"], ini_size=0.2, KV_class3=0.1)
    bench = make_bench(root / "bench.json", caches=(NAMES["formula"], NAMES["hidden"] + NAMES["escape"]))
    said = json.loads(bench.read_text())
    for record in said["runs"]:
        record["spec"] |= {"engine": NAMES["markup"], "dtype": NAMES["controls"], "device": NAMES["lines"]}
    bench.write_text(json.dumps(said | {"machine": NAMES["escape"]}))
    out, stdout = root.parent / "nasty $\\frac$ <b>", io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert report.main([str(root), "--out", str(out)]) == 0
    return {path.name: path for path in out.iterdir()}, stdout.getvalue()


def test_what_a_report_prints(nasty):
    _, printed = nasty
    assert not FORBIDDEN.search(printed.replace("\n", ""))
    assert r"\x1b[31mred\x1b]0;title\x07" in printed
    assert NAMES["words"] in printed
    lines = printed.splitlines()
    assert len([line for line in lines if line.startswith("| ")]) >= 2 + len(RUNS)
    assert all(re.match(r"\| .* \|$|samsum: |left out: |.*bench\.json: |.*index\.html$", line) for line in lines)


def test_the_figures_of_a_report(nasty):
    files, _ = nasty
    figures = [path for name, path in files.items() if name.endswith(".svg")]
    assert len(figures) > 2 * len(RUNS)
    texts = []
    for path in figures:
        tree = ElementTree.parse(path)
        texts += [" ".join(one.itertext()) for one in tree.iter("{http://www.w3.org/2000/svg}text")]
        with Image.open(path.with_suffix(".png")) as image:
            image.verify()
    shown = " ".join(texts)
    assert not FORBIDDEN.search(shown)
    for part in (
        printable(RUNS["terminal"])[:40],
        NAMES["formula"],
        "<script>&amp;]]>&#27;<!--",
        "_x",
        NAMES["words"],
    ):
        assert "".join(part.split()) in "".join(shown.split())  # long titles are broken into lines


def test_the_page_and_the_data_of_a_report(nasty):
    files, _ = nasty
    page = files["index.html"].read_text(encoding="utf-8")
    body = page[page.index("<body>") :]
    assert not FORBIDDEN.search(body.replace("\n", ""))
    assert "<script>&amp;]]>" not in body
    assert html.escape(NAMES["markup"]).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in body
    for name in ("runs.csv", "score.csv", "layers.csv", "kl.csv", "bench.csv"):
        rows = list(csv.reader(io.StringIO(files[name].read_text(encoding="utf-8"), newline="")))
        assert len({len(row) for row in rows}) == 1
        for cell in (cell for row in rows for cell in row):
            assert not FORBIDDEN.search(cell)
            assert not re.match(r"[=+@]|-[^\d]", cell)


def test_a_figure_by_itself():
    """A title that two dollars would make a formula, with words longer than the figure is wide."""
    figure, _ = new_panel("$\\frac$ " + "w" * 300 + "\nsecond", "x\x1b", "$y$")
    svg = render(figure, "svg", "made\x00by\ud800 $").decode()
    lines = [text.text for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert lines.count("second") == 1
    assert {r"x\x1b", "$y$"} < {*lines}
    assert "".join(line for line in lines if "w" in line).replace(" ", "") == "$\\frac$" + "w" * 300
    assert max(map(len, lines)) < 60
    assert r"made\x00by\ud800 $" in svg


def fail(error):
    def main(argv):
        raise error

    return main


def test_an_error_is_one_line(capsys):
    assert run_command(fail(InputError("the folder a\nb\x1b[31m\u202e\ud800 is not there"))) == 2
    assert capsys.readouterr().err == "error: the folder a\\nb\\x1b[31m\\u202e\\ud800 is not there\n"


def test_which_import_errors_are_sentences(capsys):
    def missing(argv):
        import no_such_package.part  # noqa: F401

    assert run_command(missing) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: the package no_such_package is not installed, .*test_text\.py line \d+ .*\n", said)
    assert run_command(fail(UntestedVersion("transformers 4.34.0 is installed"))) == 2
    assert capsys.readouterr().err == "error: transformers 4.34.0 is installed\n"

    def misspelt_name(argv):
        from json import dumqs  # noqa: F401

    def misspelt_module(argv):
        import json.dumqs  # noqa: F401

    def misspelt_here(argv):
        import squeeze.no_such_part  # noqa: F401

    for main in (misspelt_name, misspelt_module, misspelt_here, fail(ImportError("libcuda.so: cannot open"))):
        with pytest.raises(ImportError):
            run_command(main)


def test_a_terminal_that_knows_less(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert run_command(lambda argv: print("94.1–95.2 é")) == 0
    sys.stdout.flush()
    assert written.getvalue() == b"94.1\\u201395.2 \\xe9\n"
