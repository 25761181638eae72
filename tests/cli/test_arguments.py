"""Numbers, texts and paths of every command line: read exactly, or refused in one sentence within a moment."""

import importlib
import shlex
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squeeze import InputError, calibrate
from squeeze.bench import command as bench
from squeeze.benchmarks.longbench import download
from squeeze.cli.arguments import Parser, as_path, path_text, real, user_path, whole
from squeeze.cli.run import run_command
from squeeze.config import SqueezeConfig
from squeeze.helm import environment as helm_env
from squeeze.helm import requests as helm_requests
from squeeze.helm import score as helm_score
from squeeze.models.sources import resolve, run_name
from squeeze.numbers import MOST, MOST_DIGITS, parse_fraction
from squeeze.report import command as report
from squeeze.runs.flags import pred_parser
from squeeze.sweep import command as sweep

evaluate = importlib.import_module("eval")


def ascii_start(value):
    """A test's name."""
    try:
        return ascii(value)[:20]
    except ValueError:
        return "digits"


#: No fraction: hostile, or in digits and signs that other programs read in another way.
NO_FRACTIONS = (
    *("", " ", "1/0", "0x1", "١/٣", "٠.٢", "1_0", "0_.2", "nan", "inf", "-inf", "½", "1e", "e1", ".", "0.2x", "0,2"),
    *("1e-100000000", "1e100000000", "-1e-9999999999", "0." + "1" * 5000, "1" * 5000, "1/" + "3" * 5000, "1e-101"),
    *("9" * (MOST_DIGITS + 1), "0." + "3" * (MOST_DIGITS + 1), "１", "--", "0.2\n0.3"),
)


@pytest.mark.parametrize("text", NO_FRACTIONS, ids=ascii_start)
def test_no_fraction_is_a_sentence_at_once(text):
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"ini_size must be a number in \(0, 1\]") as error:
        parse_fraction("ini_size", text)
    assert time.perf_counter() - start < 1
    assert len(str(error.value)) < 250


@given(st.integers(0, 10**40), st.integers(0, 40), st.integers(-50, 50))
def test_fractions_are_exact(number, places, exponent):
    digits = str(number).rjust(places + 1, "0")
    text = f"{digits[: len(digits) - places]}.{digits[len(digits) - places :]}e{exponent}"
    expected = Fraction(number) * Fraction(10) ** (exponent - places)
    if max(expected.numerator, expected.denominator) <= 10**MOST_DIGITS:
        assert parse_fraction("x", text) == expected


@given(st.floats(1e-80, 1))
def test_a_number_counts_by_its_shortest_text(value):
    assert parse_fraction("x", value) == Fraction(repr(value))


@pytest.mark.parametrize("value", [10**5000, Fraction(1, 10**5000), True, [1], 1e-300, float("nan")], ids=ascii_start)
def test_other_objects_are_no_sizes(value):
    with pytest.raises(InputError, match="ini_size must be a number"):
        SqueezeConfig(ini_size=value, kv_class3="0.1")


@pytest.mark.parametrize("name", ["start_size", "prefill_chunk"])
@pytest.mark.parametrize("value", [-1, 2**31, 2**63, 10**5000, True, 2.0, "4"], ids=ascii_start)
def test_counts_of_tokens_are_bounded(name, value):
    sizes = {"ini_size": "0.2", "kv_class3": "0.2"}
    with pytest.raises(InputError, match=f"{name} must be a whole number of tokens"):
        SqueezeConfig(**sizes, **{name: value})
    assert getattr(SqueezeConfig(**sizes, **{name: MOST}), name) == MOST


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "--n must be 1 or more, got 0"),
        ("-5", "--n must be 1 or more, got -5"),
        ("10", "--n must be at most 9, got 10"),
        ("9" * 5000, "--n must be at most 9, got 999"),
        ("-" + "9" * 5000, "--n must be 1 or more, got -999"),
        ("1.0", "--n must be a whole number, got 1.0"),
        ("1_0", "--n must be a whole number, got 1_0"),
        ("٣", "--n must be a whole number, got ٣"),
        ("", "--n must be a whole number, got "),
    ],
    ids=ascii_start,
)
def test_whole_numbers(text, words):
    parser = Parser()
    parser.add_argument("--n", type=whole(1, 9))
    assert parser.parse_args(["--n", " 9 "]).n == 9
    with pytest.raises(InputError) as error:
        parser.parse_args([f"--n={text}"])
    assert words in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    "text", ["nan", "inf", "1e400", "1e31", "-1", "1e-400", "1e-31", "0x1p3", "1_0", "٣", "", "1e"]
)
def test_real_numbers(text):
    parser = Parser()
    parser.add_argument("--t", type=real("a number, 0 or more"))
    assert [parser.parse_args([f"--t={one}"]).t for one in ("0", "0.0e5", ".5", "1e-30")] == [0, 0, 0.5, 1e-30]
    with pytest.raises(InputError, match="--t must be a number, 0 or more"):
        parser.parse_args([f"--t={text}"])


LARGE = "9223372036854775808"


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (pred_parser().parse_args, f"--start_size {LARGE}"),
        (pred_parser().parse_args, "--seed 18446744073709551616"),
        (pred_parser().parse_args, f"--batch_size {LARGE}"),
        (pred_parser().parse_args, f"--sample_num {LARGE}"),
        (pred_parser().parse_args, f"--prefill_chunk {LARGE}"),
        (pred_parser().parse_args, "--temperature 1e-400"),
        (pred_parser().parse_args, "--top_p 1e-400"),
        (bench.main, f"--prompt_length {LARGE}"),
        (bench.main, f"--new_tokens {LARGE}"),
        (bench.main, f"--rounds {LARGE}"),
        (bench.main, f"--batch_size 1 {LARGE}"),
        (bench.main, "--memory_gb nan"),
        (bench.main, "--memory_gb 0"),
        (sweep.sweep, "x.yaml --engine ray --num_cpus nan"),
        (sweep.sweep, "x.yaml --engine ray --num_gpus -1"),
        (sweep.sweep, f"x.yaml --engine ray --max_retries {LARGE}"),
        (calibrate.calibrate, "--ini_size 1e-100000000"),
        (helm_requests.main, f"--scenario xsum --model M --sample_num {LARGE}"),
        (helm_requests.main, "--scenario xsum --model M --temperature 1e400"),
        (helm_score.main, f"--sample_num {LARGE}"),
        (helm_env.main, "--model SmolLM2-135M --ini_size 1e-100000000 --KV_class3 0.1"),
        (evaluate.main, "--model M --ini_size 1e-100000000 --KV_class3 0.1"),
    ],
)
def test_every_command_bounds_its_numbers(main, flags):
    start = time.perf_counter()
    with pytest.raises(InputError, match="must be"):
        main(shlex.split(flags))
    assert time.perf_counter() - start < 5


PATHS = {
    "a" * 5000: "is too long: aaa",
    "b/" * 3000: "is too long: b/b",
    "x/" + "é" * 128: "is too long",
    "": "is blank",
    "  ": "is blank",
    "~nouser/x": "there is no home folder of ~nouser",
}


@pytest.mark.parametrize("main", [pred_parser().parse_args, bench.main, calibrate.calibrate, helm_env.main])
@pytest.mark.parametrize("text", PATHS, ids=ascii_start)
def test_what_no_file_can_be_called(main, text):
    with pytest.raises(InputError) as error:
        main([f"--model={text}"])
    assert str(error.value).startswith("--model must be a path") and PATHS[text] in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (evaluate.main, ["{}"]),
        (evaluate.main, ["--compare", "a", "{}"]),
        (sweep.sweep, ["{}"]),
        (report.report, ["{}"]),
        (report.report, ["pred_Long", "--out", "{}"]),
        (helm_score.main, ["{}"]),
        (helm_requests.main, ["--scenario", "xsum", "--model", "M", "--out", "{}"]),
    ],
)
def test_every_command_checks_its_paths(main, argv):
    for text, words in PATHS.items():
        with pytest.raises(InputError) as error:
            main([one.format(text) for one in argv])
        assert words in str(error.value)


@pytest.mark.parametrize(
    "text", ["a\nb", "a\rb", "a\0b", "a\x1b[31mb", "a\x85b", "a\u2028b", "a\u2029b", "caf\udce9", "--"]
)
def test_what_is_no_text_is_refused_by_every_command(text):
    for main in (evaluate.main, sweep.sweep, report.report, bench.main, calibrate.calibrate, helm_requests.main):
        with pytest.raises(InputError) as error:
            main([f"--model={text}"])
        shown = str(error.value)
        assert "control character" in shown or "UTF-8" in shown or "--model: -- is no value" in shown
        assert shown.isprintable()
    for main in (helm_env.main, helm_score.main, download.main, pred_parser().parse_args):
        with pytest.raises(InputError):
            main([f"--model={text}"])


def test_paths_stay_as_they_are_written():
    assert path_text("~/a/../b") == "~/a/../b"
    assert str(as_path("a/./b")) == "a/b"
    assert user_path("~/a").is_absolute()
    assert path_text("é" * 127) == "é" * 127


def test_run_folders_have_names(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "a\nb").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert run_name("..") == tmp_path.name and run_name(".") == "model" and run_name("org/name/") == "name"
    for text in ("/", "//", "nowhere/..", "/..", "nowhere/../.."):
        with pytest.raises(InputError, match=r"is no model: runs are called by the last part of its path"):
            run_name(text)
    monkeypatch.chdir(tmp_path / "a\nb")
    with pytest.raises(InputError, match=r"the model's name has a line break or another control character: 'a\\nb'"):
        run_name(".")
    for text in PATHS:
        with pytest.raises(InputError, match="the model must be a path"):
            resolve(text)


def test_flags_and_the_rest_come_in_any_order():
    parser = report.parser()
    for argv in ("a --out o b", "--out o a b", "a b --out o", "--out=o a -- b"):
        args = parser.parse_args(argv.split())
        assert ([str(one) for one in args.runs], str(args.out)) == (["a", "b"], "o")
    args = sweep.read_arguments(["x.yaml", "--dry_run", "model=A", "--engine", "local", "seed=1"])
    assert (str(args.grid), args.changes, args.dry_run) == ("x.yaml", ["model=A", "seed=1"], True)
    with pytest.raises(InputError, match="unrecognized arguments: --mode"):
        parser.parse_args(["a", "--mode"])
    with pytest.raises(InputError, match="RUNS"):
        parser.parse_args(["--out", "o"])


def test_what_the_system_says_is_a_sentence(capsys):
    def main(argv):
        Path("/nowhere/x").read_text()

    assert run_command(main) == 2
    assert capsys.readouterr().err == "error: /nowhere/x: No such file or directory\n"


def test_output_that_nobody_reads_is_no_error(tmp_path):
    code = "import sys; from squeeze.cli.run import run_command\n"
    code += "sys.exit(run_command(lambda argv: [print('x' * 999) for _ in range(999)]))"
    done = subprocess.run(
        f"{sys.executable} -c {shlex.quote(code)} 2>err | head -1 >out; echo ${{PIPESTATUS[0]}}; cat err",
        shell=True, cwd=tmp_path, capture_output=True, text=True, executable="/bin/bash",
        env={"PYTHONPATH": str(evaluate.__file__.rsplit("/", 1)[0]), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout == "141\n"
