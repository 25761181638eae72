"""A dataclass's fields as flags: what a parser takes of them, and what their values are as text."""

from dataclasses import dataclass, field, replace

import pytest

from squeeze import InputError
from squeeze.cli.arguments import Parser, whole
from squeeze.cli.fields import flag, flags_of, switch


@dataclass(frozen=True)
class Oven:
    """Two flags and a field that is none."""

    degrees: int = flag(180, "how hot", whole(50, 250), also=("--heat",), axis=1)
    fan: bool = switch("with the fan", squeezed=True)
    owner: str = field(default="")


def test_fields_with_a_help_are_flags():
    found = flags_of(Oven)
    assert list(found) == ["degrees", "fan"]
    assert (found["degrees"].options, found["degrees"].axis) == (("--degrees", "--heat"), 1)
    assert (found["fan"].default, found["fan"].squeezed, found["fan"].in_sweeps) == (False, True, True)


def test_a_parser_takes_them_and_a_command_may_say_it_otherwise():
    parser = Parser()
    flags = flags_of(Oven)
    replace(flags["degrees"], also=()).add_to(parser, default=200, help="how hot it is")
    flags["fan"].add_to(parser)
    assert vars(parser.parse_args([])) == {"degrees": 200, "fan": False}
    assert vars(parser.parse_args(["--degrees", "60", "--fan"])) == {"degrees": 60, "fan": True}
    assert "how hot it is" in parser.format_help() and "--heat" not in parser.format_help()


def test_text_and_values():
    degrees, fan = flags_of(Oven).values()
    assert (degrees.value("90"), fan.value("true"), fan.value("false")) == (90, True, False)
    assert degrees.words("90") == ["--degrees", "90"] and degrees.words("-90") == ["--degrees=-90"]
    assert fan.words("true") == ["--fan"] and fan.words("false") == []
    with pytest.raises(InputError) as error:
        degrees.value("900")
    assert str(error.value) == "--degrees/--heat must be at most 250, got 900"
