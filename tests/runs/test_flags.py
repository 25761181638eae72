"""The command line: what is taken, what is refused, and in how many words."""

import subprocess
import sys
from fractions import Fraction

import pytest
from conftest import ROOT

from squeeze import InputError
from squeeze.cli.run import run_command
from squeeze.runs.flags import eval_parser, pred_parser, read_flags
from squeeze.runs.folder import cache_settings

SIZES = ["--enable_squeeze", "--ini_size", "0.2", "--KV_class3", "0.1"]

UNIFORM = ["--enable_squeeze", "--ini_size", "0.2", "--KV_class3", "0.2"]


def read(*flags):
    spec = read_flags(["--model", "Mistral", *flags])
    spec.check()
    return spec, spec.config()


def test_the_published_command():
    command = "--pred Long --enable_squeeze --model_arch Mistral --device cuda:0 --ini_size 0.21 --KV_class3 0.08"
    spec, config = read(*command.split(), "--start_size", "4", "--sample_num", "3")
    assert (spec.device, spec.model_arch, spec.sample_num) == ("cuda:0", "Mistral", 3)
    assert (config.ini_size, config.kv_class3) == (Fraction(21, 100), Fraction(8, 100))
    assert (config.algorithm, config.allocation, config.start_size) == (None, "squeeze", 4)
    assert spec.config("mistral").algorithm == "sliding_window"
    assert spec.config("llama").algorithm == "streaming"


def test_sizes_stay_exact():
    assert read("--enable_squeeze", "--ini_size", "0.03", "--KV_class3", "0.03")[1].ini_size == Fraction(3, 100)


def test_the_full_cache_has_no_configuration():
    assert read()[1] is None
    assert read("--enable_squeeze", "--model_arch", "no_change")[1] is None
    assert read()[0].config("llama") is None


def test_model_arch_is_spelled_in_any_way():
    for spelled, expected in {
        "Mistral": "Mistral",
        "mistral": "Mistral",
        "Llama": "llama",
        "NO_CHANGE": "no_change",
    }.items():
        assert read("--model_arch", spelled)[0].model_arch == expected


def test_start_token_is_start_size():
    assert read(*SIZES, "--start_token", "7")[1].start_size == 7


def test_chunks_are_a_setting_of_the_run_that_has_them():
    assert cache_settings(read(*UNIFORM, "--prefill_chunk", "64")[1])["prefill_chunk"] == 64
    assert "prefill_chunk" not in cache_settings(read(*UNIFORM)[1])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--enable_squeeze", "--ini_size", "1.5", "--KV_class3", "0.1"], "ini_size must be in (0, 1], got 1.5"),
        (["--enable_squeeze", "--ini_size", "0", "--KV_class3", "0.1"], "ini_size must be in (0, 1], got 0"),
        (["--enable_squeeze", "--ini_size", "nan", "--KV_class3", "0.1"], "ini_size"),
        (["--enable_squeeze", "--ini_size", "many", "--KV_class3", "0.1"], "ini_size"),
        (["--enable_squeeze", "--ini_size", "0.2", "--KV_class3", "0.3"], "KV_class3 must be in (0, ini_size"),
        (["--enable_squeeze", "--ini_size", "0.2", "--KV_class3", "-0.1"], "KV_class3"),
        (["--enable_squeeze", "--ini_size", "0.2", "--KV_class3", "inf"], "KV_class3"),
        (["--enable_squeeze", "--ini_size", "0.2"], "KV_class3 is missing"),
        (["--enable_squeeze", "--KV_class3", "0.2"], "ini_size is missing"),
        (["--ini_size", "0.2", "--KV_class3", "0.1"], "--ini_size is for a squeezed cache"),
        (["--KV_class3", "0.1"], "--KV_class3 is for a squeezed cache"),
        ([*SIZES, "--model_arch", "no_change"], "--model_arch no_change"),
        (["--algorithm", "h2o"], "--algorithm is for a squeezed cache"),
        ([*SIZES, "--algorithm", "lru"], "random, got lru (a class of your own is package.module:Class)"),
        ([*SIZES, "--allocation", "even"], "--allocation must be one of"),
        ([*SIZES, "--attn", "flash_attention_2"], "full cache only"),
        (["--compile"], "--compile is for a squeezed cache"),
        (["--prefill_chunk", "64"], "--prefill_chunk is for a squeezed cache"),
        ([*UNIFORM, "--prefill_chunk", "0"], "--prefill_chunk must be 1 or more, got 0"),
        ([*UNIFORM, "--prefill_chunk", "64", "--algorithm", "h2o"], "prefill_chunk cannot be used with h2o"),
        ([*SIZES, "--prefill_chunk", "64"], "make KV_class3 equal to ini_size (0.2), or leave prefill_chunk out"),
        ([*SIZES, "--compile", "--device_map", "auto"], "--compile needs the model on one device"),
        ([*SIZES, "--start_size", "-1"], "start_size"),
        ([*SIZES, "--start_size", "four"], "--start_size"),
        (
            ["--pred", "Short"],
            "--pred must be Long (LongBench) or e (LongBench-E) or ruler (RULER) or niah (Needle map) or xsum",
        ),
        (
            ["--pred", "xsum", "--temperature", "1"],
            "--temperature is for LongBench: with --pred xsum the requests say",
        ),
        (["--pred", "xsum", "--datasets", "samsum"], "--datasets is for LongBench"),
        (["--requests", "x.jsonl"], "--requests is for --pred xsum or cnndm"),
        (["--model_arch", "gpt2"], "--model_arch must be one of Mistral, llama, no_change, got gpt2"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--sample_num", "0"], "--sample_num must be 1 or more"),
        (["--sample_num", "two"], "--sample_num"),
        (["--seed", "-1"], "--seed"),
        (["--temperature", "-1"], "--temperature must be a number, 0 or more, got -1"),
        (["--temperature", "nan"], "--temperature must be a number, 0 or more, got nan"),
        (["--temperature", "1", "--top_p", "0"], "--top_p must be in (0, 1], got 0"),
        (["--top_p", "0.9"], "--top_p is for sampling"),
        (["--fidelity"], "--fidelity compares a squeezed cache with the full one"),
        ([*SIZES, "--fidelity", "--temperature", "1"], "--fidelity compares greedy answers"),
        (["--ini", "0.2"], "--ini"),
        (["--ini_size"], "--ini_size"),
    ],
)
def test_bad_flags_get_one_sentence(flags, words):
    with pytest.raises(InputError) as error:
        read(*flags)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_run_command_prints_the_sentence_and_returns_2(capsys):
    def main(argv):
        raise InputError("this is wrong")

    assert run_command(main) == 2
    assert capsys.readouterr() == ("", "error: this is wrong\n")
    assert run_command(lambda argv: None) == 0


@pytest.mark.parametrize("parser", [pred_parser, eval_parser])
def test_help_explains_every_flag_and_shows_the_published_commands(parser, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command.py"])
    shown = parser().format_help()
    assert "--model Mistral --pred Long" in shown
    assert "--ini_size 0.21 --KV_class3 0.08" in shown
    assert all(action.help for action in parser()._actions)


@pytest.mark.parametrize("command", ["pred.py --help", "pred.py --model Mistral --ini_size 0.2", "eval.py --help"])
def test_flags_are_answered_without_importing_torch(command):
    code = f"import sys; sys.argv = {command.split()}\ntry: exec(open(sys.argv[0]).read())\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
