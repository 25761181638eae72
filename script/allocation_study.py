"""Ways of making budgets from loss curves, compared on prompts: what docs/budgets.md shows.

    python script/allocation_study.py run --data_dir DIR --datasets lcc,samsum --requests FILE --out study.jsonl
    python script/allocation_study.py show study.jsonl
    python script/allocation_study.py blends --model NAME --algorithm h2o --size 0.1 --data_dir DIR --datasets trec

`run` and `show` compare more than pred.py has. Every way gives budgets of the same total. The full cache answers
greedily, up to 64 tokens; caches cut in all ways are fed that answer together, and the mean KL divergence of each from
the full one is a line of the file. What is there is not run again. Needs the samples that python -m squeeze.calibrate
leaves in calibration/MODEL; --curves names other such folders.

`blends` takes the curves in config/calibration of any model, and compares budgets at one size: `calibrated`, those of
one share's curves alone, half way to uniform, and of another method's curves.
"""

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from squeeze.threads import settings

os.environ |= settings()

import numpy as np
import torch
from tqdm import tqdm

from squeeze import SqueezeConfig, calibrate, devices, squeezed
from squeeze.allocations import calibration, curves
from squeeze.allocations.base import PromptFacts
from squeeze.allocations.squeeze import Squeeze
from squeeze.allocations.squeeze_log import SqueezeLog
from squeeze.allocations.totals import round_to
from squeeze.benchmarks import fidelity
from squeeze.benchmarks.base import Options
from squeeze.benchmarks.registry import BENCHMARKS
from squeeze.cli.tables import table
from squeeze.engine.loss_curves import MULTIPLES, divergences, measure
from squeeze.models import loading, sources
from squeeze.report.paired import mean_over_data_sets, shown
from squeeze.runs.manifest import Manifest
from squeeze.storage.files import read_json, read_jsonl

ALGORITHMS = ("sliding_window", "streaming", "h2o")
SIZES = ("0.1", "0.2", "0.4")
NEW_TOKENS = 64


class Curves:
    """What `squeeze.calibrate` measured of an algorithm, in one folder or several.

    Args:
        shares: the sizes that it was measured at.
        prompts: data set and row of each prompt.
        losses: of each, in multiples of what uniform budgets lose on it, `(prompts, shares, layers, multiples)`.
        nats: the same, in nats.
    """

    def __init__(self, shares, prompts, nats):
        self.shares, self.prompts, self.nats = shares, prompts, nats
        uniform = nats[:, :, :1, MULTIPLES.index(1), None]
        self.losses = nats / np.maximum(uniform, calibration.LEAST)

    @classmethod
    def read(cls, folders, algorithm):
        records, shares = [], set()
        for folder in folders:
            settings = read_json(folder / algorithm / "run.json", Manifest)["settings"]
            shares.add(tuple(settings.get("shares", ())))
            path = folder / algorithm / "samples/curves.jsonl"
            records += [one for _, one in read_jsonl(path, calibrate.MeasuredSample)]
        prompts = [(one["dataset"], one["row"]) for one in records]
        if len(shares) > 1 or len(set(prompts)) < len(prompts):
            sys.exit(f"error: {', '.join(map(str, folders))} differ in sizes, or have a prompt twice ({algorithm})")
        shares = [Fraction(one) for one in shares.pop()]
        return cls(shares, prompts, np.array([one["loss"] for one in records]))

    def some(self, wanted):
        """Those of some prompts only."""
        chosen = [index for index, one in enumerate(self.prompts) if one in wanted]
        return Curves(self.shares, [self.prompts[index] for index in chosen], self.nats[chosen])

    def at(self, losses, size):
        return losses[self.shares.index(Fraction(size))]


def blend(one, other, weight=Fraction(1, 2)):
    """Budgets between two, of the same total: `weight` of the first, largest remainders first."""
    return average([one, other], [weight, 1 - weight])


def average(several, weights=None):
    """The mean of several budgets of one total, of that total as well; layers are equally wide."""
    weights = weights or [Fraction(1, len(several))] * len(several)
    shares = [
        sum(w * value for w, value in zip(weights, values, strict=True)) for values in zip(*several, strict=True)
    ]
    return round_to(shares, sum(several[0]), [1] * len(shares))


def ways(known, algorithm, size, facts, own):
    """Budgets by each way that is compared, by name.

    Args:
        known: `Curves` of each algorithm.
        facts: about the prompt, with similarities.
        own: losses measured on the prompt itself, `(layers, multiples)`; None: not measured.
    """
    share = Fraction(size)

    def by(losses):
        return curves.greedy(MULTIPLES, losses, share, facts)

    def formula(allocation, ratio):
        return allocation(share, share * Fraction(ratio)).allocate(facts).tokens

    def each(some, at=size):
        return [by(some.at(losses, at)) for losses in some.losses]

    uniform, log = formula(Squeeze, "1"), formula(SqueezeLog, "0.6")
    found = {"uniform": uniform, "squeeze 0.6x": formula(Squeeze, "0.6"), "squeeze-log 0.6x": log}
    every = known[algorithm]
    default = [(dataset, 0) for dataset in calibrate.DATASETS.split(",")]
    for name, some in {
        "4": every.some(default[::2]),
        "8": every.some(default),
        str(len(every.prompts)): every,
    }.items():
        curve, budgets = by(some.at(some.losses.mean(axis=0), size)), average(each(some))
        for kind, one in {"mean curve": curve, "mean of budgets": budgets}.items():
            found[f"{name} prompts: {kind}"] = one
            found[f"{name} prompts: {kind}, a quarter of the way to uniform"] = blend(one, uniform, Fraction(3, 4))
            found[f"{name} prompts: {kind}, half way to uniform"] = blend(one, uniform)
        found[f"{name} prompts: mean curve of losses in nats"] = by(some.at(some.nats.mean(axis=0), size))
    some = every.some(default)
    found["8 prompts: curve of the worst losses"] = by(some.at(some.losses.max(axis=0), size))
    found["8 prompts: curve of the median losses"] = by(some.at(np.median(some.losses, axis=0), size))
    for number, alone in enumerate(each(some)[:4], start=1):
        found[f"prompt {number} alone"] = alone
        found[f"prompt {number} alone, half way to uniform"] = blend(alone, uniform)
        found[f"prompt {number} alone, half way to squeeze-log"] = blend(alone, log)
    for one in SIZES:
        if one != size:
            found[f"8 prompts: mean of budgets, curves at {one}, scaled"] = average(each(some, one))
    larger = SIZES[SIZES.index(size) :]
    found["8 prompts: mean of budgets, curves at all sizes"] = average([b for one in SIZES for b in each(some, one)])
    measured = [some.at(losses, one) for losses in some.losses for one in larger]
    calibrated = curves.budgets(MULTIPLES, np.array(measured), share, facts).tokens
    found["calibrated: 8 prompts, curves at this size and above, and uniform"] = calibrated
    for other in known:
        if other != algorithm:
            found[f"8 prompts: mean of budgets, curves of {other}"] = average(each(known[other].some(default)))
    both = [b for one in ("h2o", "streaming") for b in each(known[one].some(default))]
    found["8 prompts: mean of budgets, curves of h2o and of streaming"] = average(both)
    if own is not None:
        alone = by(own)
        found["the prompt's own tail (measured)"] = alone
        found["measured, half way to uniform"] = blend(alone, uniform)
        found["measured, half way to 8 prompts: mean of budgets"] = blend(alone, average(each(some)))
    return found


@torch.inference_mode()
def run(args):
    """Measure what is missing."""
    done = {tuple(one[key] for key in ("prompt", "algorithm", "size", "way")) for one in read(args.out)}
    source = sources.resolve("SmolLM2-135M", None)
    folder = sources.fetch(source, False)
    device = devices.pick_device(args.device, 0)
    model, tokenizer = loading.load(folder, device, devices.pick_dtype("float32", device), "auto")
    wanted = [("Long", dataset, args.data_dir, args.max_length) for dataset in filter(None, args.datasets.split(","))]
    if args.requests:
        wanted.append(("xsum", "xsum", str(args.requests), 8192))
    prompts = {}
    for task, dataset, location, limit in wanted:
        benchmark = BENCHMARKS[task]
        data, options = benchmark.read(dataset, location), Options(max_length=limit, model_name=source.name)
        found = benchmark.encode(tokenizer, data, len(data.rows), options)
        prompts |= {f"{dataset} {index}": one for index, one in enumerate(found)}
    chosen = {name: one for name, one in prompts.items() if args.first <= int(name.split()[1]) < args.last}
    known = {one: Curves.read(args.curves, one) for one in ALGORITHMS}
    with squeezed(model, SqueezeConfig("streaming", "1", "1")) as engine, args.out.open("a") as out:
        engine.share_prefills = True
        for name, prompt in tqdm(chosen.items(), unit="prompt"):
            tokens, settings = prompt.tokens, dict(prompt.settings)
            settings["max_new_tokens"] = min(settings["max_new_tokens"], NEW_TOKENS)
            length = len(tokens)
            answer = None
            for algorithm in args.algorithms.split(","):
                todo = [one for one in SIZES if args.again or (name, algorithm, one, "uniform") not in done]
                if not todo:
                    continue
                answer = answer or fidelity.answer(model, [tokens], settings)
                if len(answer.logprobs) < 2:  # nothing follows on the first token
                    continue
                engine.use(SqueezeConfig(algorithm, "1", "1"))
                own = measure(engine, tokens, [Fraction(one) for one in todo]) if args.measured else [None] * len(todo)
                inputs = tokens[None].to(device)
                model.model(inputs, past_key_values=engine.cache(1), use_cache=True)
                held, minimum = engine.kept_prefill, engine.evictor.minimum_budget
                about = engine.layers, length, settings["max_new_tokens"], minimum, engine.similarities[0]
                facts = PromptFacts.of(*about)
                for size, losses in zip(todo, own, strict=True):
                    losses = None if losses is None else np.array(losses)
                    found = ways(known, algorithm, size, facts, losses)
                    found = {way: one for way, one in found.items() if (name, algorithm, size, way) not in done}
                    if not found:
                        continue
                    text = answer.tokens[0][: len(answer.logprobs) - 1]
                    full = torch.cat(answer.logprobs[1:])
                    kl = divergences(engine, held, list(found.values()), text, full)
                    record = {"prompt": name, "algorithm": algorithm, "size": size, "tokens": length}
                    for way, one in zip(found, kl, strict=True):
                        out.write(json.dumps(record | {"way": way, "kl": one}) + "\n")
                    out.flush()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show(args):
    """A table for each algorithm: differences from uniform in KL, on the same prompts, mean over tasks."""
    kl = {}
    for one in [one for path in args.out for one in read(path)]:
        task = one["prompt"].split()[0]
        if not args.datasets or task in args.datasets.split(","):
            ways = kl.setdefault(one["algorithm"], {})
            ways.setdefault(one["way"], {})[one["size"], task, one["prompt"]] = one["kl"]
    for algorithm, ways in kl.items():
        uniform, lines = ways["uniform"], []
        for way, mine in ways.items():
            both = sorted(mine.keys() & uniform.keys())
            line = {"way": way, "prompts": str(len({prompt for _, _, prompt in both}))}
            every = {size for size, _, _ in both} == {size for size, _, _ in uniform}
            ratio = np.exp(np.mean([np.log(mine[index] / uniform[index]) for index in both]))
            line["ratio"] = f"{ratio:.2f}" if every else "-"
            for size in SIZES:
                tasks = {}
                for index in both:
                    if index[0] == size:
                        tasks.setdefault(index[1], []).append(mine[index] - uniform[index])
                line[size] = "-"
                if tasks:
                    line[size] = shown(*mean_over_data_sets(list(tasks.values())))
            lines.append(line)
        counts = Counter(task for size, task, _ in uniform if size == SIZES[0])
        print(f"\n{algorithm}, prompts: {', '.join(f'{task} {count}' for task, count in sorted(counts.items()))}\n")
        print(table(list(lines[0]), lines))


@torch.inference_mode()
def blends(args):
    """The KL divergence of budgets that are made of a model's curves in other ways, on prompts."""
    source = sources.resolve(args.model, None)
    device = devices.pick_device(args.device, 0)
    model, tokenizer = loading.load(
        sources.fetch(source, False), device, devices.pick_dtype("float32", device), "auto"
    )
    own, other = (
        calibration.read_calibration(calibration.curves_file(source.name, one)) for one in (args.algorithm, args.other)
    )
    if args.other == args.algorithm:
        sys.exit(f"error: --other must be another method than {args.algorithm}")
    other = replace(other, algorithm=own.algorithm, start_size=own.start_size, parameters=own.parameters)
    share = own.first(Fraction(args.size))
    found = {
        "calibrated": own,
        f"curves at {args.size} alone": replace(own, losses=own.losses[:, [share]], shares=own.shares[share:][:1]),
        f"curves at {float(own.shares[-1]):g} alone": replace(own, losses=own.losses[:, -1:], shares=own.shares[-1:]),
        # Curves without slopes are uniform budgets.
        "half way to uniform": replace(own, losses=np.concatenate([own.losses, np.zeros_like(own.losses)])),
        f"curves of {args.other}": other,
        "curves of both": replace(own, losses=np.concatenate([own.losses, other.losses])),
    }
    configs = [SqueezeConfig(args.algorithm, args.size, allocation="uniform")]
    configs += [
        SqueezeConfig(args.algorithm, args.size, None, "calibrated", calibration=one) for one in found.values()
    ]
    benchmark, lines = BENCHMARKS["Long"], []
    with squeezed(model, configs[0]) as engine:
        engine.use(*configs)
        for dataset in args.datasets.split(","):
            data = benchmark.read(dataset, args.data_dir)
            options = Options(max_length=args.max_length, model_name=source.name)
            prompts = benchmark.encode(tokenizer, data, min(args.last, len(data.rows)), options)
            kl = []
            for prompt in tqdm(prompts, desc=dataset, unit="prompt"):
                answer = fidelity.answer(model, [prompt.tokens], prompt.settings)
                most = prompt.settings["max_new_tokens"]
                measured = fidelity.compare(model, [prompt.tokens] * len(configs), answer, engine, most)
                kl.append([one["kl"] for one in measured])
            means = np.mean([one for one in kl if None not in one], axis=0)
            line = {"data set": dataset, "prompts": str(sum(None not in one for one in kl))}
            lines.append(line | {way: f"{one:.4f}" for way, one in zip(["uniform", *found], means, strict=True)})
    print(table(list(lines[0]), lines))


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
    folders = [Path("calibration/SmolLM2-135M")]
    running.add_argument(
        "--curves", nargs="+", type=Path, default=folders, help="what python -m squeeze.calibrate left"
    )
    running.add_argument("--device", default="cpu")
    running.add_argument("--out", type=Path, required=True)
    running.set_defaults(do=run)
    showing = commands.add_parser("show")
    showing.add_argument("out", nargs="+", type=Path)
    showing.add_argument("--datasets", default="", help="of these only")
    showing.set_defaults(do=show)
    blending = commands.add_parser("blends")
    blending.add_argument("--model", required=True)
    blending.add_argument("--algorithm", required=True)
    blending.add_argument("--other", default="h2o", help="another method, whose curves are tried")
    blending.add_argument("--size", required=True)
    blending.add_argument("--data_dir", required=True)
    blending.add_argument("--datasets", required=True)
    blending.add_argument("--last", type=int, default=4, help="rows before this one")
    blending.add_argument("--max_length", type=int, default=2000, help="tokens of a prompt")
    blending.add_argument("--device", default="cpu")
    blending.set_defaults(do=blends)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
