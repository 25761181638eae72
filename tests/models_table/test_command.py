"""`python -m squeeze.models_table`: rows by name, a model folder of one's own, and the page that it writes."""

import pytest
from tiny import save_tiny

from squeeze import InputError
from squeeze.models_table import zoo
from squeeze.models_table.command import BEGIN, END, main


def test_rows_are_printed_and_progress_is_said(capsys):
    assert main(["bloom", "mpt"]) == 0
    said = capsys.readouterr()
    head, line, *rows = said.out.splitlines()
    assert head.startswith("| model") and set(line) == set("| -")
    assert [row.split()[1] for row in rows] == ["bloom", "mpt"] and "ALiBi" in rows[0]
    assert len(said.err.splitlines()) == 2


def test_a_page_keeps_its_words_around_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "ZOO", {"bloom": zoo.ZOO["bloom"]})
    page = tmp_path / "models.md"
    page.write_text(f"# Models\n\n{BEGIN}old\n{END}\nAfter.\n")
    for _ in range(2):
        assert main(["--out", str(page)]) == 0
        before, table, after = page.read_text().replace(END, BEGIN).split(BEGIN)
        assert (before, after) == ("# Models\n\n", "\nAfter.\n")
        assert table.startswith("1 models, with transformers ") and "| bloom" in table and "old" not in table


def test_a_model_of_ones_own(tmp_path, capsys):
    save_tiny(tmp_path / "mine")
    assert main(["--model", str(tmp_path / "mine")]) == 0
    [row] = capsys.readouterr().out.splitlines()[2:]
    assert row.split()[1] == "mine" and row.count(" ok ") == 5 and "keys 0-7, halves" in row


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["llama", "lama"], "there is no tiny model lama: there are llama, "),
        (["llama", "--model", "x"], "exclude each other"),
        (["--model", "no-such-model"], "unknown model no-such-model"),
        (["--out", "page.md"], "page.md has no place for the table"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text("# Models\n")
    with pytest.raises(InputError, match=said):
        main(words)
