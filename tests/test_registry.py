"""Strategies by name: what a text means, and that whatever else it says is a sentence."""

import sys
from fractions import Fraction
from pathlib import Path

import pytest
from made_runs import make_run

from squeeze import H2O, InputError, SlidingWindow, Squeeze, SqueezeConfig, StreamingLLM
from squeeze.allocations import ALLOCATIONS
from squeeze.evictors import EVICTORS, make_evictor
from squeeze.runs import inventory
from squeeze.runs.folder import cache_settings, run_folder
from squeeze.text import file_name

FILE = """
from dataclasses import dataclass
from fractions import Fraction

from squeeze import Allocation, Budgets, Evictor, SlidingWindow, conserve


@dataclass(frozen=True)
class Window(SlidingWindow):
    size: int = 16
    shape: str = "flat"
    decay: float = 0.5

    def __post_init__(self):
        if self.size < 1:
            raise ValueError("size must be 1 or more")


@dataclass(frozen=True)
class Wanting(SlidingWindow):
    size: int


class Half(Evictor):
    def keep(self, length, budget, scores):
        return None


class Untold(SlidingWindow):
    def __init__(self, size):
        self.size = size


class Loose(SlidingWindow):
    fixed_slots = False


class Nothing(SlidingWindow):
    minimum_budget = 0


class NoSize(Allocation):
    def allocate(self, facts):
        return Budgets(list(facts.caps))


@dataclass(frozen=True)
class Thirds(Allocation):
    ini_size: Fraction
    class3: Fraction = Fraction(1, 9)
    needs = "similarities"

    def allocate(self, facts):
        return conserve([self.ini_size * reach for reach in facts.reach], facts)


@dataclass(frozen=True)
class Forgets(Thirds):
    def __post_init__(self):
        pass


function = print
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    Path("registry_file.py").write_text(FILE)
    Path("registry_broken.py").write_text("import squeeze\n\nsqueeze.nonsense\n")
    Path("registry_torn.py").write_text("def f(:\n")
    sys.modules.pop("registry_file", None)


def test_names_are_those_of_the_classes():
    for registry, made in ((EVICTORS, (SlidingWindow(), StreamingLLM(), H2O())), (ALLOCATIONS, ())):
        for name in registry.names:
            found = registry.find(name)
            assert found.kind.name == found.text == name and f"{found.kind.__module__}:" in registry.built_in[name]
        assert [str(one) for one in made] == list(registry.names)[: len(made)]


def test_parameters_stand_in_the_text():
    assert make_evictor("streaming", 7) == StreamingLLM(7) == make_evictor("streaming(sinks=7)", 4)
    found = EVICTORS.find("registry_file:Window( decay=1, size = 16 ,shape='a b')")
    assert found.text == "registry_file:Window(shape='a b', decay=1)"
    window = make_evictor(found.text, 4)
    assert (window.size, window.shape, window.decay, str(window)) == (16, "a b", 1, found.text)
    assert EVICTORS.record(found.text, window) == {
        "algorithm_parameters": {"size": 16, "shape": "a b", "decay": 1},
    }
    assert EVICTORS.record("streaming", StreamingLLM(7)) == {}
    assert str(StreamingLLM(7)) == "streaming", "a number that --start_size says"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", f"algorithm must be one of {', '.join(EVICTORS.names)}, got nonsense "),
        ("h20", "got h20: did you mean h2o?"),
        ("windw", "did you mean sliding_window"),
        ("nowhere:Class", "nowhere:Class cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("registry_broken:Class", "module squeeze has no attribute nonsense (registry_broken.py line 3)"),
        ("registry_torn:Class", "cannot be imported: SyntaxError"),
        ("registry_file:Windw", "registry_file has no Windw: did you mean Window?"),
        ("registry_file:function", "function is no evictor: it must be a class that inherits squeeze.Evictor"),
        ("registry_file:Thirds", "Thirds is no evictor"),
        ("registry_file:Half", "registry_file:Half lacks slot"),
        ("registry_file:Untold", "registry_file:Untold is no dataclass: write @dataclass(frozen=True)"),
        ("registry_file:Wanting", "Wanting needs size: write registry_file:Wanting(size=...)"),
        ("registry_file:Nothing", "minimum_budget of registry_file:Nothing must be a whole number of tokens, 1 or"),
        ("registry_file:Window(sise=3)", "Window has no parameter sise: did you mean size?"),
        ("registry_file:Window(a=3)", "Window has no parameter a: it has size, shape, decay"),
        ("registry_file:Window(size='a')", "Window: size must be int, got 'a'"),
        ("registry_file:Window(size=True)", "Window: size must be int, got True"),
        ("registry_file:Window(size=0)", "Window refuses its parameters: ValueError: size must be 1 or more (regis"),
        ("streaming(sinks=-1)", "start_size must be a whole number of tokens, 0 or more, got -1"),
        ("a b:Class", "must be written package.module:Class, got a b:Class"),
        *((f"h2o{text}", "must be a name, or a name with parameters") for text in (
            "(", "(3)", "(a=b)", "(a=1, a=2)", "(**{})", "(a=1)(b=2)", "(a=1) or 2", "(a={1})", "(a=1e999)", "(a=b())",
            "(a='" + 2000 * "x" + "')", "(a=" + 900 * "(", "\0(", "(\0)",
        )),
    ],
)  # fmt: skip
def test_what_is_no_evictor_is_a_sentence(text, said):
    with pytest.raises(InputError) as error:
        make_evictor(SqueezeConfig(text, 0.2, 0.1).algorithm, 4)
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    if ":" in text and not text.startswith("a b"):
        with pytest.raises(InputError, match=r"^algorithm registry_|^algorithm nowhere|^minimum_budget"):
            make_evictor(text, 4)


@pytest.mark.parametrize(
    ("sizes", "text", "said"),
    [
        ({"ini_size": 0.2}, "registry_file:NoSize", "NoSize has no parameter ini_size, by which its runs are named"),
        ({"ini_size": 0.2}, "squeeze(class3=0.1)", "allocation squeeze: class3 comes from --KV_class3"),
        ({}, "registry_file:Thirds", "ini_size is missing: the allocation registry_file:Thirds needs it"),
        ({"budgets": [9]}, "uniform", "budgets replaces the allocation uniform"),
        ({"ini_size": 0.2, "kv_class3": 0.1}, "uniform", "KV_class3 is not for the allocation uniform"),
        ({"ini_size": 0.2, "calibration": object()}, "uniform", "calibration is not for the allocation uniform"),
        ({"ini_size": 0.2, "prefill_chunk": 4}, "registry_file:Thirds", "make KV_class3 equal to ini_size (0.2)"),
        ({"ini_size": 2}, "registry_file:Thirds", "ini_size must be in (0, 1], got 2"),
        ({"ini_size": 0.2}, "registry_file:Window", "Window is no allocation"),
    ],
)
def test_what_is_no_allocation_is_a_sentence(sizes, text, said):
    with pytest.raises(InputError) as error:
        SqueezeConfig("streaming", allocation=text, **sizes)
    assert said in str(error.value)


def test_sinks_are_start_size():
    asked = SqueezeConfig("streaming(sinks=8)", 0.2, 0.1)
    assert asked == SqueezeConfig("streaming", 0.2, 0.1, start_size=8)
    assert cache_settings(asked)["start_size"] == 8 and "algorithm_parameters" not in cache_settings(asked)
    with pytest.raises(InputError, match=r"streaming\(sinks=8\) contradicts start_size 6"):
        SqueezeConfig("streaming(sinks=8)", 0.2, 0.1, start_size=6)


def test_an_allocation_may_take_class3_or_do_without():
    without = SqueezeConfig("h2o", 0.2, allocation="registry_file:Thirds")
    given = SqueezeConfig("h2o", 0.2, 0.1, "registry_file:Thirds")
    assert [one.sizes["KV_class3"] for one in (without, given)] == [1 / 9, 0.1]
    assert run_folder("Long", "M", given, "llama") == Path("pred_Long/M/h2o/registry_file_Thirds/0.2/10")


def test_sizes_as_flags_give_them_are_fractions():
    given = SqueezeConfig("h2o", "0.2", "0.15", "registry_file:Thirds")
    assert given.allocator.class3 == Fraction(3, 20) and given.sizes == {"ini_size": 0.2, "KV_class3": 0.15}
    assert run_folder("Long", "M", given, "llama") == Path("pred_Long/M/h2o/registry_file_Thirds/0.2/15")
    with pytest.raises(InputError, match=r"KV_class3 must be in \(0, ini_size = 0.2\], got 0.3$"):
        SqueezeConfig("h2o", "0.2", "0.3", "registry_file:Thirds")
    with pytest.raises(InputError, match=r"KV_class3 must be a number in .*, got None"):
        Squeeze(0.2, None)
    with pytest.raises(InputError, match=r"registry_file:Forgets: its __post_init__ must call super"):
        SqueezeConfig("h2o", "0.2", allocation="registry_file:Forgets")


def test_prefill_in_chunks_needs_slots_that_stay():
    with pytest.raises(InputError, match="cannot be used with registry_file:Loose, which gives slots by"):
        SqueezeConfig("registry_file:Loose", 0.2, 0.2, prefill_chunk=4)


def test_runs_of_classes_that_are_not_there_are_read():
    sizes = {"ini_size": 0.4, "KV_class3": 0.2, "algorithm_parameters": {}}
    make_run(Path("runs/a"), algorithm="nowhere:Ev(a=1)", allocation="nowhere:Al", allocation_parameters={}, **sizes)
    make_run(Path("runs/b"), algorithm="nowhere:Ev(a=1)", ini_size=0.4, KV_class3=0.2)
    found = inventory.find([Path("runs")])
    [entry] = found.entries
    told = inventory.describe(entry.settings, entry.summary)
    assert (told["algorithm"], told["allocation"], told["classes"]) == ("nowhere:Ev(a=1)", "nowhere:Al", "1/2/5")
    [problem] = found.problems
    assert "runs/b/run.json: settings: algorithm is none of sliding_window, streaming, h2o" in problem


def test_a_file_name_is_one_everywhere():
    for text in ("h2o", "squeeze-log", "sliding_window", "0.3"):
        assert file_name(text) == text
    assert file_name("my.file:Ev(a='b/c', d=[1, 2])") == "my.file_Ev_a=_b_c_d=_1_2"
    assert file_name("../..") == "_" and file_name("\u202e:") == "_"
    long = [file_name(100 * "x" + end) for end in ("a", "b")]
    assert len(set(long)) == 2 and max(map(len, long)) <= 100
