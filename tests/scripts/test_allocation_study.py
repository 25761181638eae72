"""The study of allocations: all ways that it compares give out the same total; differences are on the same prompts."""

import argparse
import importlib.util
from fractions import Fraction

import numpy as np
import pytest
from conftest import ROOT
from made_runs import write_lines

from squeeze import PromptFacts, calibrate
from squeeze.evictors import make_evictor

spec = importlib.util.spec_from_file_location("allocation_study", ROOT / "script/allocation_study.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


@pytest.mark.parametrize("algorithm", study.ALGORITHMS)
def test_all_ways_give_out_the_same_total(algorithm):
    rng = np.random.default_rng(0)
    default = [(dataset, 0) for dataset in calibrate.DATASETS.split(",")]
    known = {}
    for one in study.ALGORITHMS:
        nats = np.sort(rng.uniform(0.1, 1, (9, 3, 30, 5)))[..., ::-1]
        nats[..., 2] = nats[..., :1, 2]  # nothing differs where no layer does
        known[one] = study.Curves([Fraction(one) for one in study.SIZES], [*default, ("trec", 1)], nats)
    similarities, minimum = 1 - rng.uniform(0, 0.1, 30), make_evictor(algorithm, 4).minimum_budget
    facts = PromptFacts(1001, (1065,) * 30, (1001,) * 30, (384,) * 30, minimum, similarities)
    for size in study.SIZES:
        found = study.ways(known, algorithm, size, facts, rng.uniform(0.1, 1, (30, 5)))
        assert len(found) >= 30 and "9 prompts: mean curve" in found
        for name, budgets in found.items():
            assert sum(budgets) == int(30 * Fraction(size) * 1001), name
            assert all(1 <= tokens <= 1065 for tokens in budgets), name


def test_ways_are_compared_with_uniform_on_the_prompts_that_have_both(tmp_path, capsys):
    def line(task, row, way, kl, size="0.1"):
        return {"prompt": f"{task} {row}", "algorithm": "h2o", "size": size, "way": way, "kl": kl}

    uniform = [("lcc", 0, 0.4), ("lcc", 1, 0.2), ("xsum", 0, 1.0)]
    lines = [line(task, row, "uniform", kl) for task, row, kl in uniform]
    lines += [line(task, row, "a half", kl / 2) for task, row, kl in uniform]
    lines += [
        line("xsum", 0, "once", 2.0),
        line("xsum", 0, "elsewhere", 1.0, "0.2"),
        line("xsum", 0, "uniform", 1.0, "0.2"),
    ]
    write_lines(tmp_path / "study.jsonl", lines)
    study.show(argparse.Namespace(out=[tmp_path / "study.jsonl"], datasets=""))
    said = capsys.readouterr().out
    assert "h2o, prompts: lcc 2, xsum 1" in said
    cells = {
        row[0]: row[1:] for row in ([one.strip() for one in text.strip("|").split("|")] for text in said.splitlines())
    }
    mean = -((0.2 + 0.1) / 2 + 0.5) / 2  # of the tasks' means
    assert cells["a half"][:2] == ["3", "-"] and cells["a half"][2].startswith(f"{mean:+.4f} [-")
    assert cells["a half"][3:] == ["-", "-"] and cells["uniform"][1] == "1.00"
    assert cells["once"] == ["1", "-", "+1.0000", "-", "-"]
    assert cells["elsewhere"][1:4] == ["-", "-", "+0.0000"]
