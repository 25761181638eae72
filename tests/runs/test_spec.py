"""A run's description: the same whether flags, a sweep's keys or a program made it, and whole after any journey."""

import hashlib
import pickle
import shlex
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squeeze import InputError
from squeeze.cli.arguments import check_text
from squeeze.numbers import MOST, MOST_SEED
from squeeze.runs.flags import eval_parser, named_run, pred_parser, read_flags
from squeeze.runs.spec import CACHE, FLAGS, SQUEEZED, RunSpec
from squeeze.sweep.grid import AXES, KEYS, LISTS, expand, read_grid


def is_text(text):
    """Whether a command line may hold it, and its flag have it for a value."""
    try:
        check_text("it", text)
    except InputError:
        return False
    return text != "--" and bool(text.strip())


texts = st.text(min_size=1, max_size=20).filter(is_text)
paths = texts.filter(lambda text: not text.startswith("~"))
counts = st.integers(1, MOST)
VALUES = {
    **dict.fromkeys(("model", "model_path", "data_dir", "requests", "haystack"), paths),
    **dict.fromkeys(("ini_size", "KV_class3", "algorithm", "allocation", "pred", "datasets", "device"), texts),
    **dict.fromkeys(("device_map", "dtype", "attn", "per", "lengths", "depths", "compress"), texts),
    "model_arch": st.sampled_from(("Mistral", "llama", "no_change", "LLAMA", "gpt2")),
    **dict.fromkeys(("sample_num", "batch_size", "prefill_chunk"), counts),
    "start_size": st.integers(0, MOST),
    "seed": st.integers(0, MOST_SEED),
    "temperature": st.just(0.0) | st.floats(1e-30, 1e30),
    "top_p": st.floats(1e-30, 1),
    **dict.fromkeys(
        ("enable_squeeze", "compile", "cuda_graph", "chat", "fidelity", "allow_pickle", "overwrite"), st.booleans()
    ),
}


def as_text(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_a_description_is_the_same_from_texts_and_from_the_command_line_that_is_recorded(values):
    spec = RunSpec(**values)
    read = RunSpec.read({name: as_text(value) for name, value in values.items()})
    assert read == spec
    assert read.command.startswith("python pred.py")
    typed = read_flags(shlex.split(read.command)[2:])
    assert typed == spec
    assert typed.command == read.command
    assert typed.flags == spec.flags
    sent = pickle.loads(pickle.dumps(read))
    assert sent == spec and sent.command == read.command and hash(sent) == hash(spec)


def test_every_value_of_the_property_is_a_flags():
    assert set(VALUES) == set(FLAGS)


def test_every_field_is_a_flag_and_what_no_flag_says_is_its_default():
    parsed = vars(pred_parser().parse_args([]))
    assert list(parsed) == list(FLAGS) == list(RunSpec().flags) == [one.name for one in fields(RunSpec)][:-1]
    assert parsed == RunSpec().flags
    options = {option for action in pred_parser()._actions for option in action.option_strings}
    assert options == {"-h", "--help", "--start_token", *(f"--{name}" for name in FLAGS)}
    assert list(vars(eval_parser().parse_args([]))) == ["compare", *CACHE, "compress", "pred", "datasets", "folder"]


def test_a_description_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        RunSpec().model = "A"


@pytest.mark.parametrize("name", FLAGS)
def test_every_field_is_a_key_of_a_sweep_or_refused_there(tmp_path, name):
    text = {
        "datasets": "samsum",
        "KV_class3": "0.1",
        "model": "B",
        "ini_size": "0.4",
        "seed": "7",
        "compress": "context",
    }.get(name)
    text = text or ("true" if FLAGS[name].read is None else "5" if name.endswith(("num", "size", "chunk")) else "1")
    path = tmp_path / "grid.yaml"
    path.write_text("{model: A, ini_size: 0.2, KV_class3: 0.05}")
    if name in ("enable_squeeze", "overwrite"):
        with pytest.raises(InputError, match=f"{name} is not for sweeps, which decide on it by themselves"):
            read_grid(path, [f"{name}={text}"])
        return
    runs = read_grid(path, [f"{name}={text}"]).runs
    squeezed = [run for run in runs if run.enable_squeeze]
    value = FLAGS[name].value(text)
    assert [getattr(run, name) == value for run in squeezed].count(True) > 0
    full = [run for run in runs if not run.enable_squeeze]
    assert len(full) == (name != "fidelity")
    for run in full:
        assert getattr(run, name) == (FLAGS[name].default if name in SQUEEZED else value)
    with pytest.raises(InputError, match="must be one value") if name not in (*AXES, *LISTS) else nullcontext():
        read_grid(path, [f"{name}=[{text}, {'false' if value is True else '3'}]"])


def test_the_axes_stand_in_the_order_in_which_errors_name_them():
    assert AXES == ("model", "seed", "fidelity", "algorithm", "allocation", "per", "ini_size", "KV_class3")
    assert list(KEYS) == [name for name in FLAGS if name not in ("enable_squeeze", "overwrite")]


def test_a_point_whose_value_is_none_is_a_sentence_in_its_place():
    found = expand({"model": ["A"], "ini_size": ["0.2"], "seed": ["3", "-1"], "batch_size": ["2"]}, "x.yaml")
    assert [run if isinstance(run, InputError) else run.seed for run in found.runs[:2]] == [3, 3]
    assert [str(run) for run in found.runs[2:]] == ["--seed must be 0 or more, got -1"] * 2


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"start_size": "-1"}, "--start_size/--start_token must be 0 or more, got -1"),
        ({"batch_size": "two"}, "--batch_size must be a whole number, got two"),
        ({"top_p": "0"}, "--top_p must be in (0, 1], got 0"),
        ({"model": " "}, "--model must be a path, and is blank"),
        ({"device": "--"}, "--device: -- is no value"),
    ],
)
def test_texts_that_are_no_values_get_the_command_lines_sentence(texts, said):
    with pytest.raises(InputError) as error:
        RunSpec.read(texts)
    assert str(error.value) == said
    [(name, text)] = texts.items()
    if text != "--":
        with pytest.raises(InputError) as typed:
            read_flags([f"--{name}={text}"])
        assert str(typed.value) == said


def test_sizes_alone_name_a_squeezed_run():
    def named(*argv):
        return named_run(eval_parser().parse_args(["--model", "M", *argv]), "pred", "datasets")

    assert named("--ini_size", "0.2").enable_squeeze and named("--KV_class3", "0.2").enable_squeeze
    assert not named().enable_squeeze and named("--enable_squeeze").enable_squeeze
    assert named("--pred", "e", "--datasets", "qasper") == RunSpec(model="M", pred="e", datasets="qasper")
    with pytest.raises(InputError, match="--algorithm must be one of"):
        named("--algorithm", "lru")


def test_the_record_makes_no_other_run():
    spec = RunSpec(model="A", command="python pred.py --model A")
    assert spec == replace(spec, command="by hand") and "command" not in spec.flags


#: SHA-256 of what the commands say of themselves. Whoever changes a flag's words on purpose changes it as well.
HELP = {
    pred_parser: "97a5456c7c7a3427d436ee911b642ed7ed492bfca88c8875e3b4b94d9154e9f5",
    eval_parser: "290b646b29fde151394b862451a9f899a86fcbe3ac090498014c352793326a87",
}


@pytest.mark.parametrize("parser", HELP)
def test_help_is_what_it_was(parser):
    """By its parts, since versions of Python lay them out in different ways."""
    made = parser()
    said = [made.description, made.epilog]
    said += [f"{' '.join(action.option_strings)} {action.dest} {action.help}" for action in made._actions]
    assert hashlib.sha256("\n".join(said).encode()).hexdigest() == HELP[parser]
