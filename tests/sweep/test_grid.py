"""A sweep's file → the runs of its grid, exactly; what cannot be is named before anything runs."""

import shlex
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squeeze import InputError
from squeeze.numbers import parse_fraction
from squeeze.runs.flags import read_flags
from squeeze.sweep.grid import class3, expand, plain, read_grid


def grid(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return read_grid(path)


def lines(found):
    return [run.command.removeprefix("python pred.py ") for run in found.runs]


def words(run):
    """The recorded command line of a run, behind `python pred.py`."""
    return shlex.split(run.command)[2:]


def test_every_point_of_the_grid_is_a_command_line_of_pred(tmp_path):
    found = grid(
        tmp_path,
        """
        model: [A, B]
        datasets: [samsum, qasper]
        sample_num: 5
        start_size: 8
        chat: true
        algorithm: [streaming, h2o]
        ini_size: [0.2, 0.4]
        KV_class3: [0.6x, 0.05]
        """,
    )
    common = "--chat --datasets samsum,qasper --sample_num 5"
    runs = [words(run) for run in found.runs]
    assert len(runs) == 2 * (1 + 2 * 2 * (1 + 2)) and not found.left_out
    full = [run for run in runs if "--enable_squeeze" not in run]
    assert [run[run.index("--model") + 1] for run in full] == ["A", "B"]
    assert all(set(common.split()) <= set(run) for run in runs)
    assert all(("--start_size" in run) == ("--enable_squeeze" in run) for run in runs)
    sizes = {(run[run.index("--ini_size") + 1], run[run.index("--KV_class3") + 1]) for run in runs if run not in full}
    assert sizes == {
        ("0.2", "0.2"),
        ("0.2", "0.12"),
        ("0.2", "0.05"),
        ("0.4", "0.4"),
        ("0.4", "0.24"),
        ("0.4", "0.05"),
    }
    for run in found.runs:
        run.check()
        run.config()  # none of them is refused
        assert read_flags(words(run)) == run


def test_budgets_of_heads_are_an_axis_where_an_allocation_knows_heads(tmp_path):
    found = grid(
        tmp_path,
        """
        model: A
        algorithm: h2o
        ini_size: 0.2
        KV_class3: 0.6x
        allocation: [squeeze, calibrated]
        per: [layer, head, adakv]
        """,
    )
    runs = [(run.allocation, run.KV_class3, run.per) for run in found.runs if run.enable_squeeze]
    uniform = [(None, "0.2", "layer"), (None, "0.2", "adakv")]
    squeeze = [(None, "0.12", "layer"), (None, "0.12", "adakv")]
    assert runs == uniform + squeeze + [("calibrated", None, per) for per in ("layer", "head", "adakv")]
    only = grid(tmp_path, "model: A\nini_size: 0.2\nKV_class3: 0.6x\nper: head")
    assert only.left_out == ["the allocation squeeze knows only layers, and not per head"]
    assert [(run.KV_class3, run.per) for run in only.runs if run.enable_squeeze] == [("0.2", "layer")]


def test_baselines_are_there_once_whatever_the_grid_repeats(tmp_path):
    text = "{model: A, ini_size: [0.3, 0.30], KV_class3: [0.3, 1x, 0.5x, 0.150], allocation: [squeeze, paper]}"
    assert lines(grid(tmp_path, text)) == [
        "--model A",
        "--model A --enable_squeeze --ini_size 0.3 --KV_class3 0.3",
        "--model A --enable_squeeze --ini_size 0.3 --KV_class3 0.15",
        "--model A --enable_squeeze --ini_size 0.3 --KV_class3 0.15 --allocation paper",
    ]


def test_an_allocation_that_is_none_costs_no_other_run(tmp_path):
    found = grid(tmp_path, "{model: A, ini_size: 0.2, KV_class3: 0.1, allocation: [squeeze, nonsense]}")
    *_, wrong = found.runs
    assert [run.allocation for run in found.runs] == [None, None, None, "nonsense"]
    with pytest.raises(InputError, match=r"--allocation must be one of uniform, .* got nonsense"):
        wrong.check()


def test_fidelity_has_no_full_cache_of_its_own(tmp_path):
    found = grid(tmp_path, "{model: A, ini_size: 0.2, KV_class3: 0.1, fidelity: [false, true]}")
    assert len(found.runs) == 5
    assert all(run.enable_squeeze for run in found.runs if run.fidelity)
    assert sum(run.fidelity for run in found.runs) == 2


def test_a_point_that_cannot_be_is_listed_with_its_reason(tmp_path):
    found = grid(tmp_path, "{model: A, algorithm: [h2o, streaming], ini_size: [0.1, 0.4], KV_class3: [0.2, 2x]}")
    assert found.left_out == [
        "KV_class3 0.2 is more than ini_size 0.1",
        "KV_class3 2x is more than ini_size 0.1",
        "KV_class3 2x is more than ini_size 0.4",
    ]
    assert sum("--KV_class3 0.2" in line for line in lines(found)) == 2


def test_the_command_line_can_change_the_file(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("{model: A, ini_size: 0.2, KV_class3: [0.1], seed: 3}", encoding="utf-8")
    found = read_grid(path, ["model=[B, C]", "ini_size=0.5", "device=cuda:0", "seed="])
    assert lines(found)[:2] == [
        "--model B --device cuda:0",
        "--model B --enable_squeeze --ini_size 0.5 --KV_class3 0.5 --device cuda:0",
    ]
    assert len(found.runs) == 6
    with pytest.raises(InputError, match=r"modle is no change of .*: write key=value"):
        read_grid(path, ["modle"])
    with pytest.raises(InputError, match="there is no modle: did you mean model"):
        read_grid(path, ["modle=A"])
    with pytest.raises(InputError, match="seed is changed twice: write its values as one list"):
        read_grid(path, ["seed=1", "ini_size=0.1", "seed=2"])


@pytest.mark.parametrize(
    "text, said",
    [
        ("{model: A, ini_sizes: 0.2}", "there is no ini_sizes: did you mean ini_size?"),
        ("{model: A, kv_class3: 0.2}", "there is no kv_class3: did you mean KV_class3?"),
        ("{model: A, zzz: 0.2}", "there is no zzz: a key is one of pred.py's flags, model, "),
        ("{model: A, overwrite: true}", "overwrite is not for sweeps"),
        ("{model: A, enable_squeeze: true}", "enable_squeeze is not for sweeps"),
        ("{model: A}", "the grid is empty, ini_size has no value"),
        ("{ini_size: 0.2}", "the grid is empty, model has no value"),
        ("{model: [], ini_size: 0.2}", "the grid is empty, model has no value"),
        (
            "{model: A, ini_size: 0.2, batch_size: [1, 2]}",
            "batch_size must be one value; lists are for datasets, lengths, depths, model",
        ),
        ("{model: A, ini_size: {a: 1}}", "ini_size must be a value or a list of values"),
        ("{model: A, ini_size: [[0.1]]}", "ini_size must be a value or a list of values"),
        ("{model: A, ini_size: 0.2, chat: yes}", "chat must be true or false, got yes"),
        ("{model: A, ini_size: many}", "ini_size must be a number in (0, 1], got many"),
        ("{model: A, ini_size: nan}", "ini_size must be a number in (0, 1], got nan"),
        ("{model: A, ini_size: 0.2, KV_class3: x}", "KV_class3 must be a number"),
        ("[model, A]", "is no sweep: it has no keys"),
        ("", "is no sweep: it has no keys"),
        ("{model: [A", "is not YAML: "),
        (
            "model: A\nini_size: 0.2\nini_size: 0.4",
            "has ini_size twice, in lines 2 and 3: write its values as one list",
        ),
        ("{model: A, model: A, ini_size: 0.2}", "has model twice, in lines 1 and 1"),
        ("{model: A, 'ini_size': 0.2, ini_size: [0.4]}", "has ini_size twice"),
        ("a: &x {model: B}\n<<: *x\nini_size: 0.2", "there is no a"),
        ("{model: &x A, <<: {model: B}, ini_size: 0.2}", "there is no <<"),
        ("{model: A, ini_size: &x [0.1, *x]}", "ini_size must be a value or a list of values"),
        ("{model: !!python/object/apply:os.getcwd [], ini_size: 0.2}", "model must be a value or a list of values"),
        ("{model: A, ini_size: [!!float 0.2]}", "ini_size must be a value or a list of values"),
        ("{model: A, ini_size: 0.2, [seed]: 3}", "line 1: a key is not text"),
        ("{model: A, ini_size: 0.2, ? {a: b} : 3}", "line 1: a key is not text"),
        ("model: A\nini_size: 0.2\n---\nmodel: B", "is not YAML: expected a single document"),
        ("model: " + "[" * 5000, "its values lie in one another without an end"),
        ("{model: A, ini_size: 0.2, seed: null}", None),
        ("{model: ~, ini_size: 0.2}", "the grid is empty, model has no value"),
        ('{model: "a\\nb", ini_size: 0.2}', "model has a line break or another control character: 'a\\nb'"),
        ("{model: A, ini_size: 1e-100000000}", "ini_size must be a number in (0, 1]"),
        ("{model: A, ini_size: 0.2, KV_class3: 1e9999999x}", "KV_class3 must be a number in (0, 1]"),
        (
            "{model: A, ini_size: 1e-90, KV_class3: 1e-90x}",
            "KV_class3 must be a number in (0, 1] of at most 100 digits",
        ),
        ("{model: A, ini_size: [" + "0.5," * 40000 + "]}", None),
        (f"{{model: A, ini_size: 0.2, {'k' * 900}: 3}}", "there is no kkkk"),
        (
            "{model: A, seed: ["
            + ",".join(map(str, range(1000)))
            + "], ini_size: ["
            + ",".join(map(str, range(101)))
            + "]}",
            "the grid has 202,000 points, and 100,000 are the most: make several",
        ),
    ],
    ids=range(39),
)
def test_bad_files_are_a_sentence(tmp_path, text, said):
    if said is None:
        assert len(grid(tmp_path, text).runs) == 2
        return
    with pytest.raises(InputError) as error:
        grid(tmp_path, text)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_not_text_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml"):
        read_grid(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not YAML"):
        read_grid(tmp_path / "bytes.yaml")


def test_files_that_have_no_end_are_a_sentence(tmp_path):
    (tmp_path / "long.yaml").write_bytes(b"model: A\n" + b"# nothing\n" * 1_000_000)
    for path in (tmp_path / "long.yaml", Path("/dev/zero")):
        start = time.perf_counter()
        with pytest.raises(InputError, match="is no sweep: it has more than 1,000,000 bytes"):
            read_grid(path)
        assert time.perf_counter() - start < 2
    laughs = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))
    (tmp_path / "laughs.yaml").write_text(f"a0: &a0 [lol]\n{laughs}\nmodel: *a29")
    with pytest.raises(InputError, match="there is no a0"):
        read_grid(tmp_path / "laughs.yaml")
    with pytest.raises(InputError, match="cannot read"):
        read_grid(tmp_path)


def test_ten_thousand_sizes_are_read_in_a_moment(tmp_path):
    sizes = ", ".join(f"0.{number:05d}" for number in range(1, 10_001))
    start = time.process_time()
    found = grid(tmp_path, f"{{model: A, ini_size: [{sizes}], KV_class3: 0.5x}}")
    assert len(found.runs) == 20_001 and time.process_time() - start < 10
    assert [run.KV_class3 for run in found.runs[-2:]] == ["0.1", "0.05"]


def test_what_looks_like_a_flag_is_a_value(tmp_path):
    found = grid(tmp_path, "{model: -A, ini_size: 0.2}")
    assert words(found.runs[0]) == ["--model=-A"]
    assert read_flags(words(found.runs[0])).model == found.runs[0].model == "-A"


@given(st.fractions(0, 1, max_denominator=10**6))
def test_sizes_have_one_text(size):
    text = plain(size)
    assert Fraction(text) == size and parse_fraction("x", text) == size
    ends = not set(factors(size.denominator)) - {2, 5}
    assert ("/" not in text) if ends else text == f"{size.numerator}/{size.denominator}"


def factors(number):
    """The primes of a number."""
    prime = 2
    while number > 1:
        while number % prime == 0:
            yield prime
            number //= prime
        prime += 1 if prime * prime <= number else number - prime


decimals = st.decimals(Decimal("0.001"), 1, places=3)


@given(decimals, decimals)
def test_multiples_are_exact(multiple, ini_size):
    found = class3(f"{multiple}x", str(ini_size))
    assert Fraction(found) == Fraction(multiple) * Fraction(ini_size)
    assert "E" not in found


@given(st.lists(decimals, min_size=1, max_size=4), st.lists(decimals, max_size=4))
def test_a_grid_is_complete_and_says_what_it_leaves_out(ini_sizes, classes):
    values = {"model": ["A"], "ini_size": list(map(str, ini_sizes)), "KV_class3": list(map(str, classes))}
    found = expand(values, "here")
    pairs = {(Fraction(i), Fraction(c)) for i in ini_sizes for c in [*classes, i] if c <= i}
    runs = {(Fraction(run.ini_size), Fraction(run.KV_class3)) for run in found.runs[1:]}
    assert runs == pairs
    assert len(found.left_out) == len({(str(i), str(c)) for i in ini_sizes for c in classes if c > i})
