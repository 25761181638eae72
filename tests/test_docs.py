"""The pages: their commands are ones that the commands take, their code runs, and their links lead somewhere."""

import argparse
import importlib.util
import itertools
import re
import runpy
import shlex
import sys
import tomllib
import warnings

import pytest
import torch
from conftest import ROOT, random_model

from squeeze import SqueezeConfig, squeezed
from squeeze.cli.arguments import Parser
from squeeze.commands.main import COMMANDS as CONSOLE

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

#: Fenced blocks: indent (in a list), language and text.
FENCES = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)

#: Of `squeeze NAME`: the files of a checkout that are the same command; the others are modules `squeeze.NAME`.
FILES = {"pred": "pred.py", "eval": "eval.py", "check": "modify_transformers.py"}

#: Headings of docs/commands.md, and the file or module of each command.
COMMANDS = {f"`{file}`": file for file in FILES.values()}
COMMANDS |= {f"`python -m squeeze.{name}`": f"squeeze.{name}" for name in CONSOLE if name not in FILES}
COMMANDS["`script/helm.sh`"] = COMMANDS.pop("`python -m squeeze.helm_score`")

#: Other projects' packages that pages install by name.
PACKAGES = ("flash-attn",)


def blocks(page, *languages):
    """Texts of the fenced blocks of a page in some languages."""
    found = FENCES.findall(page.read_text("utf-8"))
    return [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, kind, text in found if kind in languages]


def commands(text):
    """Words of each command of a block: a line that ends in a backslash goes on, `;` and `&&` end a command."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if word not in (";", "&&"):
                words += [word] if word != "..." else []
            elif words:
                yield words
                words = []


def inline(page):
    """Words of the commands in a page's running text, where they have arguments."""
    text = FENCES.sub("", page.read_text("utf-8"))
    for code in re.findall(r"`((?:python|bash|sh|pip|torchrun)\s[^`]+)`", text):
        words = shlex.split(code)
        if len(words) > (3 if words[1] == "-m" else 2):
            yield words


def every_command():
    for page in PAGES:
        fenced = [words for text in blocks(page, "", "bash", "sh") for words in commands(text)]
        for words in [*fenced, *inline(page)]:
            yield pytest.param(words, id=f"{page.stem}: {' '.join(words)[:100]}")


def named_files(language):
    """Blocks of the pages that are files: their first line is a comment with the name."""
    named = (re.match(r"# (\S+\.\w+)\n", text) for page in PAGES for text in blocks(page, language))
    return {found[1]: found.string for found in named if found}


class Read(BaseException):
    """A command has read its flags, and is to go no further: no error that it could catch."""


class Checker:
    """Checks commands in this process; files that the pages show can be imported and given to commands."""

    def __init__(self, monkeypatch, capsys, tmp_path):
        self.monkeypatch, self.capsys, self.files = monkeypatch, capsys, tmp_path
        for name, text in (named_files("python") | named_files("yaml")).items():
            (tmp_path / name).write_text(text, "utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as if the user had chosen, so that no command measures
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def run(self, program, words):
        """Run a file or a module as Python starts it."""
        self.monkeypatch.setattr(sys, "argv", [program, *words])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of runpy, for modules that were imported before
            if program.startswith("squeeze."):
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / program), run_name="__main__")

    def read(self, program, words):
        """What a command reads from its words."""

        def stopping(parse_args):
            def parse(*args, **kwargs):
                raise Read(parse_args(*args, **kwargs))

            return parse

        with self.monkeypatch.context() as context:
            for parser in (argparse.ArgumentParser, Parser):
                context.setattr(parser, "parse_args", stopping(parser.parse_args))
            with pytest.raises(Read) as stopped:
                self.run(program, words)
        return stopped.value.args[0]

    def flags(self, program):
        """All flags that a command takes."""
        seen = []
        with self.monkeypatch.context() as context:
            context.setattr(argparse.ArgumentParser, "print_help", lambda self, file=None: seen.append(self))
            with pytest.raises(SystemExit):
                self.run(program, ["--help"])
        return {flag for action in seen[0]._actions for flag in action.option_strings} - {"-h", "--help"}

    def no_model(self, program, words):
        """All is right but the model, which a command looks for when it has checked its flags."""
        with pytest.raises(SystemExit) as ended:
            self.run(program, words)
        said = self.capsys.readouterr().err.strip().splitlines()[-1]
        assert ended.value.code == 2 and said.endswith("or a Hub name such as org/model, works too"), said
        assert re.match("error: (no run of the grid is possible: )?unknown model no-such-model: ", said), said

    def check(self, words):
        """Fail unless a command is one that its program takes."""
        settings = []
        while re.match(r"\w+=", words[0]):
            settings, words = [*settings, words[0].partition("=")[0]], words[1:]
        program, words = words[0].removeprefix(".venv-peers/bin/"), words[1:]
        if program in ("bash", "sh"):
            self.script(settings, words[0], words[1:])
            return
        assert settings in ([], ["PYTHONPATH"]), f"{settings} are no settings of {program}"
        if program in ("python", "python3.11"):
            self.python(words)
        elif program == "squeeze":
            name, *words = words
            assert name in (*CONSOLE, "--help"), f"squeeze has no command {name}"
            if name in CONSOLE:
                self.python([*([FILES[name]] if name in FILES else ["-m", f"squeeze.{name}"]), *words])
        elif program == "torchrun":
            from torch.distributed.run import get_args_parser

            started = get_args_parser().parse_args(words)
            self.python([started.training_script, *started.training_script_args])
        elif program == "pip":
            self.pip(words)
        elif program == "helm-run":
            plugin = words[words.index("--plugins") + 1]
            assert importlib.util.find_spec(plugin), f"there is no {plugin}"
        else:
            pytest.fail(f"this test does not know the command {program}")

    def python(self, words):
        program, *words = words[1:] if words[0] == "-m" else words
        if program == "venv":
            return
        args = self.read(program, words)
        if program == "pred.py":
            assert args.model is not None, "--model is missing"
            others = re.sub(r"(^|\0)--model(_path)?[=\0][^\0]*", "", "\0".join(words)).strip("\0")
            self.no_model(program, ["--model", "no-such-model", *others.split("\0")])
        if program == "squeeze.sweep":
            [file] = [word for word in args.arguments if "=" not in word]
            file = self.files / file if (self.files / file).exists() else file
            changes = [word for word in args.arguments if re.match("(?!model=).*=", word)]
            self.no_model(program, [str(file), *changes, "model=no-such-model", "--dry_run"])

    def script(self, settings, path, words):
        text = (ROOT / path).read_text("utf-8")
        for name in settings:
            assert f"${{{name}:-" in text, f"{path} has no setting {name}"
        if path == "script/helm.sh":
            self.python(["-m", "squeeze.helm_score", *words])
            return
        for before, word in itertools.pairwise([path, *words]):
            name, equals, _ = word.partition("=")
            if path == "script/test.sh":  # of pytest's own
                markers = [marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
                known = (
                    word == "-m"
                    or (before == "-m" and word in markers)
                    or (before != "-m" and (ROOT / word).is_file())
                )
                assert known, f"{word} is no marker of the tests"
            elif equals:
                assert "changes+=" in text and f"--{name}" in self.flags("pred.py"), f"{path} takes no {word}"
            elif not before.startswith("--"):
                assert re.search(rf"(^| ){re.escape(word)}( \]|\))", text, re.MULTILINE), f"{path} takes no {word}"

    def pip(self, words):
        extras = PROJECT["project"].get("optional-dependencies", {})
        for before, word in itertools.pairwise(words):
            own = re.fullmatch(r"\.(?:\[(.*)\])?", word)
            if before == "-r":
                assert (ROOT / word).is_file(), f"there is no {word}"
            elif own:
                assert set((own[1] or "").split(",")) <= {"", *extras}, f"pyproject.toml has no {word}"
            else:
                assert word in ("-r", "--no-deps", *PACKAGES), f"{word} is no package that is known here"


@pytest.fixture
def checker(monkeypatch, capsys, tmp_path):
    return Checker(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize("words", list(every_command()))
def test_a_pages_command_is_one_that_its_program_takes(words, checker):
    checker.check(words)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("python pred.py --model Mistral --ini 0.2", "unrecognized arguments: --ini 0.2"),
        ("python pred.py --model M --enable_squeeze --ini_size 0.2 --KV_class3 0.3", "KV_class3 must be in"),
        ("python pred.py --model Mistral --pred Short", "--pred must be"),
        ("python pred.py --pred Long", "--model is missing"),
        ("python eval.py --sample_num 3", "unrecognized arguments: --sample_num"),
        ("python -m squeeze.sweep config/sweep_demo.yaml sizes=3", "there is no sizes"),
        ("python -m squeeze.sweep config/none.yaml", "cannot read config/none.yaml"),
        ("python -m squeeze.report", "RUNS"),
        ("squeeze predict --model Mistral", "squeeze has no command predict"),
        ("squeeze sweep config/sweep_demo.yaml sizes=3", "there is no sizes"),
        ("python -m squeeze.nothing", "squeeze.nothing"),
        ("python script/decode_kernels.py --fast", "unrecognized arguments: --fast"),
        ("torchrun --nproc_per_node 4 pred.py --model Mistral --device_maps auto", "--device_maps"),
        ("bash script/nothing.sh", "script/nothing.sh"),
        ("samples=3 bash script/demo.sh", "script/demo.sh has no setting samples"),
        ("bash script/reproduce.sh --model Mistral --fast", "script/reproduce.sh takes no --fast"),
        ("bash script/reproduce.sh --demo sizes=3", "script/reproduce.sh takes no sizes=3"),
        ("sh script/helm.sh --ini 0.4", "unrecognized arguments: --ini"),
        ("bash script/test.sh -m fast", "fast is no marker"),
        ("pip install -r requirements-none.txt", "there is no requirements-none.txt"),
        ("pip install .[nothing]", "pyproject.toml has no .[nothing]"),
        ("PYTHONPATH=. helm-run --plugins squeeze.nothing", "there is no squeeze.nothing"),
        ("make all", "does not know the command make"),
    ],
)
def test_a_wrong_command_would_be_seen(wrong, said, checker, capsys):
    [words] = commands(f"{wrong}  # and a comment")
    with pytest.raises(BaseException) as seen:
        checker.check(words)
    assert said in f"{seen.value} {capsys.readouterr().err}"


def test_words_of_a_block():
    text = "python a.py --x 1 \\\n    --y '2 3' ...; b=1 sh c.sh && pip d   # e\n# f\n"
    assert list(commands(text)) == [["python", "a.py", "--x", "1", "--y", "2 3"], ["b=1", "sh", "c.sh"], ["pip", "d"]]


@pytest.mark.parametrize("heading", COMMANDS)
def test_the_page_of_commands_has_every_flag(heading, checker):
    parts = re.split(r"^## (.*)$", (ROOT / "docs/commands.md").read_text("utf-8"), flags=re.MULTILINE)
    section = dict(zip(parts[1::2], parts[2::2], strict=True))[heading]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    named = [flag for cell in cells for flag in re.findall(r"`(--\w+)`", cell)]
    assert sorted(named) == sorted(checker.flags(COMMANDS[heading]))


def test_sweeps_that_the_pages_show_are_whole(checker, tmp_path):
    for number, text in enumerate(text for page in PAGES for text in blocks(page, "yaml")):
        (tmp_path / f"{number}.yaml").write_text(text, "utf-8")
        checker.python(["-m", "squeeze.sweep", f"{number}.yaml"])


def anchors(page):
    """What GitHub calls the headings of a page."""
    text = FENCES.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = FENCES.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            assert other.exists() and other.is_relative_to(ROOT), f"{page.name}: {target} leads nowhere"
            assert not anchor or anchor in anchors(other), f"{page.name}: {other.name} has no heading {anchor}"


def test_every_figure_and_grid_is_on_a_page():
    """What nobody shows any more was lost with the section that it belongs to, or is to be deleted."""
    pages = "".join(page.read_text("utf-8") for page in PAGES)
    files = [*(ROOT / "docs/figures").iterdir(), *(ROOT / "config").glob("*.yaml")]
    assert files and [file.name for file in files if file.name not in pages] == []


def test_the_line_of_imports_is_the_one_that_is_enforced():
    [line] = re.findall(r"^`(.* → .*)`$", (ROOT / "docs/architecture.md").read_text("utf-8"), re.MULTILINE)
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    assert [set(part.split(" | ")) for part in line.split(" → ")] == [set(part.split(" | ")) for part in layers[::-1]]


def test_the_front_page_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 130
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


CODE = [text for page in ("README.md", "docs/library.md") for text in blocks(ROOT / page, "python")]


def test_the_pages_own_loop_gives_what_generate_gives():
    model, ids = random_model("llama"), torch.arange(3, 90)[None]
    with squeezed(model, SqueezeConfig("streaming", "0.3", "0.1")):
        expected = model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None)
    [loop] = [block for block in CODE if "run.cache(" in block and "for _ in" in block]
    seen = {"model": model, "ids": ids}
    exec(loop, seen)
    assert seen["cache"].steps == 31
    assert seen["output"].logits[:, -1].argmax(-1).tolist() == expected[:, -1].tolist()


def test_the_pages_other_blocks_run(monkeypatch):
    monkeypatch.setattr("os.environ", {"OMP_WAIT_POLICY": "ACTIVE"})
    model = random_model("llama")
    for block in CODE:
        if "for _ in" not in block:
            text, questions = torch.arange(3, 90)[None], [torch.arange(90, 99)[None], torch.arange(99, 104)[None]]
            seen = {"model": model, "inputs": {"input_ids": text}, "text": text, "questions": questions}
            exec(block, seen)
            assert "questions" not in block or seen["answer"].shape == (1, 87 + 5 + 16)
