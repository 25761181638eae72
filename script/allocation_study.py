"""Ways of making budgets from loss curves, compared on prompts: what docs/allocation.md shows.

    python script/allocation_study.py run --data_dir DIR --datasets lcc,samsum --requests FILE --out study.jsonl
    python script/allocation_study.py show study.jsonl
    python script/allocation_study.py pairs pred_Long pred_xsum

`pairs` takes runs of pred.py --fidelity: for every method and size, the mean over tasks of the KL divergence from the
full cache, and its difference from uniform budgets on the same samples with a 95% interval (bootstrap within tasks).

`run` and `show` compare more than pred.py has. Every way gives budgets of the same total. The full cache answers
greedily, up to 64 tokens; each cut cache is fed that answer, and the mean KL divergence of its next-token
distributions from the full cache's is a line of the file. What is there is not run again. Needs the samples that
python -m squeeze.calibrate leaves in calibration/MODEL/ALGORITHM.
"""

import argparse
import json
import statistics
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from squeeze import SqueezeConfig, calibrate, curves, fidelity, inventory, loading, models, predict, squeezed
from squeeze.allocation import allocate
from squeeze.evictors import make_evictor
from squeeze.longbench import load_data
from squeeze.loss_curves import MULTIPLES, measure
from squeeze.request_files import read_requests
from squeeze.scoring import difference
from squeeze.tables import table

ALGORITHMS = ("sliding_window", "streaming", "h2o")
SIZES = ("0.1", "0.2", "0.4")
NEW_TOKENS = 64


class Curves:
    """What `squeeze.calibrate` measured: losses of each prompt, `(prompts, shares, layers, multiples)`."""

    def __init__(self, folder, algorithm):
        content = json.loads((folder / algorithm / "run.json").read_text())
        self.shares = [float(Fraction(one)) for one in content["settings"]["shares"]]
        text = (folder / algorithm / "samples/curves.jsonl").read_text()
        self.losses = np.array([json.loads(line)["loss"] for line in text.splitlines()])

    def at(self, losses, size):
        return curves.between(self.shares, losses, Fraction(size))


def ways(known, algorithm, size, length, cap, similarities, own):
    """Budgets by each way that is compared, by name.

    Args:
        known: `Curves` of each algorithm.
        similarities: of the prompt's layers.
        own: losses measured on the prompt itself, `(layers, multiples)`; None: not measured.
    """
    share, minimum = Fraction(size), make_evictor(algorithm, 4).minimum_budget
    here = known[algorithm]
    layers = here.losses.shape[2]
    each = here.losses

    def by(losses):
        return curves.budgets(MULTIPLES, losses, share, length, cap, minimum)

    def formula(allocation, ratio):
        options = {"ini_size": share, "kv_class3": share * Fraction(ratio), "allocation": allocation}
        return allocate(similarities, **options, length=length, cap=cap, minimum=minimum).tokens

    def blend(one, other, weight=Fraction(1, 2)):
        mixed = [weight * a + (1 - weight) * b for a, b in zip(one, other, strict=True)]
        rounded = [int(value) for value in mixed]
        order = sorted(range(layers), key=lambda layer: rounded[layer] - mixed[layer])
        for layer in order[: sum(one) - sum(rounded)]:
            rounded[layer] += 1
        return rounded

    relative, _ = calibrate.relative(each, MULTIPLES.index(1))
    mean = here.at(relative.mean(axis=0), size)
    found = {"uniform": formula("squeeze", "1")}
    found["squeeze 0.6x"] = formula("squeeze", "0.6")
    found["squeeze-log 0.6x"] = formula("squeeze-log", "0.6")
    found["calibrated"] = by(mean)
    found["mean of losses in nats"] = by(here.at(each.mean(axis=0), size))
    found["worst of the prompts"] = by(here.at(relative.max(axis=0), size))
    for number in range(len(each)):
        found[f"prompt {number + 1} alone"] = by(here.at(each[number], size))
        found[f"prompt {number + 1} alone, half way to squeeze-log"] = blend(
            found[f"prompt {number + 1} alone"], found["squeeze-log 0.6x"]
        )
    found["half way to uniform"] = blend(found["calibrated"], found["uniform"])
    found["a quarter of the way to uniform"] = blend(found["calibrated"], found["uniform"], Fraction(3, 4))
    for index, one in enumerate(here.shares):
        if f"{one:g}" != size:
            found[f"curves at {one:g}, scaled"] = by(relative.mean(axis=0)[index])
    for other in known:
        if other != algorithm:
            found[f"curves of {other}"] = by(
                known[other].at(calibrate.relative(known[other].losses, MULTIPLES.index(1))[0].mean(axis=0), size)
            )
    if own is not None:
        found["the prompt's own tail (measured)"] = by(own)
        found["measured and calibrated, mean of both"] = by(own / own[0, MULTIPLES.index(1)] + mean)
    return found


def run(args):
    """Measure what is missing."""
    done = {tuple(one[key] for key in ("prompt", "algorithm", "size", "way")) for one in read(args.out)}
    source = models.resolve("SmolLM2-135M", None)
    folder = models.fetch(source, False)
    device = loading.pick_device("cpu", 0)
    model, tokenizer = loading.load(folder, device, loading.pick_dtype("float32", device), "auto")
    how = predict.Options(max_length=args.max_length, model_name=source.name)
    prompts = {}
    for dataset in filter(None, args.datasets.split(",")):
        data = load_data(dataset, args.data_dir, "Long")
        found = predict.encode(tokenizer, data, len(data.rows), how)
        prompts |= {f"{dataset} {index}": one for index, one in enumerate(found)}
    if args.requests:
        data = read_requests("xsum", str(args.requests))
        how = predict.Options(max_length=8192, model_name=source.name)
        found = predict.encode(tokenizer, data, len(data.rows), how)
        prompts |= {f"xsum {index}": one for index, one in enumerate(found)}
    chosen = {name: one for name, one in prompts.items() if args.first <= int(name.split()[1]) < args.last}
    known = {one: Curves(Path("calibration/SmolLM2-135M"), one) for one in ALGORITHMS}
    uniform = SqueezeConfig("streaming", "1", "1")
    with squeezed(model, uniform) as engine, args.out.open("a") as out, tqdm(total=len(chosen), unit="prompt") as bar:
        engine.share_prefills = True
        for name, prompt in chosen.items():
            tokens, settings = prompt.tokens, dict(prompt.settings)
            new = settings["max_new_tokens"] = min(settings["max_new_tokens"], NEW_TOKENS)
            full = None
            for algorithm in args.algorithms.split(","):
                for size in SIZES:
                    if not args.again and any((name, algorithm, size, "uniform") == one for one in done):
                        continue
                    full = full or fidelity.answer(model, [tokens], settings)
                    engine.use(SqueezeConfig(algorithm, size, size))
                    own = np.array(measure(engine, tokens, [Fraction(size)])[0]) if args.measured else None
                    fidelity.compare(model, [tokens], full, engine, new)
                    similarities = engine.similarities[0]
                    length, cap = len(tokens), len(tokens) + new
                    for way, budgets in ways(known, algorithm, size, length, cap, similarities, own).items():
                        if (name, algorithm, size, way) in done:
                            continue
                        engine.use(SqueezeConfig(algorithm, budgets=budgets))
                        [one] = fidelity.compare(model, [tokens], full, engine, new)
                        record = {"prompt": name, "algorithm": algorithm, "size": size, "way": way}
                        out.write(json.dumps(record | {"tokens": length, **one}) + "\n")
                        out.flush()
            bar.update()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show(args):
    """A table for each algorithm: mean KL at each size, and its difference from uniform in pairs."""
    records = [one for one in read(args.out) if one["kl"] is not None]
    if args.datasets:
        records = [one for one in records if one["prompt"].split()[0] in args.datasets.split(",")]
    names = list(dict.fromkeys(one["way"] for one in records))
    for algorithm in dict.fromkeys(one["algorithm"] for one in records):
        lines = []
        for way in names:
            line, ratios = {"way": way}, []
            for size in SIZES:
                mine, other = (
                    {one["prompt"]: one["kl"] for one in records if key(one) == (algorithm, size, name)}
                    for name in (way, "uniform")
                )
                both = sorted(mine.keys() & other.keys())
                line[size] = line[f"{size} less uniform"] = "-"
                if both:
                    mean, low, high = difference([other[one] for one in both], [mine[one] for one in both])
                    line[size] = f"{statistics.fmean(mine[one] for one in both):.4f}"
                    line[f"{size} less uniform"] = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
                    ratios += [np.log(mine[one] / other[one]) for one in both]
            line["ratio"] = f"{np.exp(np.mean(ratios)):.2f}" if ratios else "-"
            lines.append(line)
        print(f"\n{algorithm}, {len({one['prompt'] for one in records})} prompts\n")
        print(table(["way", "ratio", *(name for size in SIZES for name in (size, f"{size} less uniform"))], lines))


def pairs(args):
    """The table of runs of `pred.py --fidelity`."""
    found = inventory.find(args.runs)
    for problem in found.problems:
        print(f"left out: {problem}")
    kl = {}
    for entry in found.entries:
        if entry.fidelity:
            told = inventory.describe(entry.settings, entry.summary)
            rows = [json.loads(line) for line in (entry.folder / f"{entry.dataset}.jsonl").read_text().splitlines()]
            group = kl.setdefault((told["algorithm"], told["ini_size"]), {})
            group.setdefault(told["allocation"], {})[entry.dataset] = [row["kl"] for row in rows]
    lines = []
    for (algorithm, size), group in kl.items():
        for allocation, tasks in group.items():
            means, differences = [], []
            for task, values in tasks.items():
                both = [
                    (mine, other)
                    for mine, other in zip(values, group["uniform"][task], strict=True)
                    if mine is not None and other is not None
                ]
                means.append(statistics.fmean(mine for mine, _ in both))
                differences.append([mine - other for mine, other in both])
            mean, low, high = over_tasks(differences)
            line = {"algorithm": algorithm, "ini_size": size, "allocation": allocation}
            line |= {"KL": f"{statistics.fmean(means):.4f}", "less uniform": f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"}
            line |= {"closer on": f"{sum(one < 0 for task in differences for one in task)}"}
            line |= {"samples": str(sum(map(len, differences)))}
            lines.append(line | {task: f"{one:.4f}" for task, one in zip(tasks, means, strict=True)})
    columns = list(dict.fromkeys(name for line in lines for name in line))
    print(table(columns, [dict.fromkeys(columns, "-") | line for line in lines]))


def over_tasks(differences):
    """Mean of the tasks' means, and its 95% bootstrap interval over the samples within each task."""
    rng = np.random.default_rng(0)
    resampled = sum(rng.choice(np.array(one), (10_000, len(one))).mean(axis=1) for one in differences)
    low, high = np.percentile(resampled / len(differences), [2.5, 97.5])
    return statistics.fmean(map(statistics.fmean, differences)), low, high


def key(one):
    return one["algorithm"], one["size"], one["way"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("--data_dir", required=True)
    running.add_argument("--datasets", default="")
    running.add_argument("--requests", type=Path, help="of HELM's XSum, as pred.py takes them")
    running.add_argument("--algorithms", default=",".join(ALGORITHMS))
    running.add_argument("--first", type=int, default=0, help="rows from this one on")
    running.add_argument("--last", type=int, default=8, help="rows before this one")
    running.add_argument("--max_length", type=int, default=2000, help="tokens of a prompt of LongBench")
    running.add_argument("--measured", action="store_true", help="also measure on every prompt's own tail")
    running.add_argument("--again", action="store_true", help="look for ways that are missing")
    running.add_argument("--out", type=Path, required=True)
    running.set_defaults(do=run)
    showing = commands.add_parser("show")
    showing.add_argument("out", type=Path)
    showing.add_argument("--datasets", default="", help="of these only")
    showing.set_defaults(do=show)
    pairing = commands.add_parser("pairs")
    pairing.add_argument("runs", nargs="+", type=Path)
    pairing.set_defaults(do=pairs)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
