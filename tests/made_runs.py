"""Run folders as `pred.py` leaves them, made up in no time: a run's answers are right in a share of its samples."""

import json
import random

from squeeze.generation.stats import SampleStats

ANSWER = "Ann forgot the tickets and Bob takes the bus to the station."
LAYERS = 8


def measured(seconds=0.0):
    """Statistics of a sample of the full cache."""
    return SampleStats(9, 2, 0.5, float(seconds), 10.0, 0.0, 10, 10**6)


def make_run(folder, dataset="samsum", samples=6, right=0.5, seed=42, model="M", layers=LAYERS, **more):
    """Write a run's folder and return it.

    Args:
        right: share of the words that an answer has right, on average.
        more: settings; without `ini_size` it is the full cache. `similarities=False` leaves them out, as early
            versions did; `lengths` are LongBench-E's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(f"{folder.name}{right}")
    keep_similarities, lengths = more.pop("similarities", True), more.pop("lengths", [12] * samples)
    together = more.pop("together", 1)
    squeezed = "ini_size" in more
    settings = {"model": {}, "max_length": 900, "dtype": "float32", "attn": "sdpa", "seed": seed}
    settings |= {"cache": "squeezed" if squeezed else "full"}
    settings |= {"algorithm": "streaming", "allocation": "squeeze"} | more if squeezed else {}
    kept = more.get("ini_size", 1.0)
    stats = {"prompt_tokens": 100, "new_tokens": 5}
    if squeezed:
        stats |= layer_stats(more["ini_size"], more.get("KV_class3", more["ini_size"] / 2), layers)
        if more.get("per"):  # two heads a layer, further apart in every layer
            stats["budgets"] = [[own - layer, own + layer] for layer, own in enumerate(stats["budgets"])]
        if not keep_similarities:
            del stats["similarities"]
    summary = {
        "settings": {},
        "starts": [
            {
                "command": f"python pred.py --model {model} --pred Long",
                "model": {"name": model},
                "device": "cpu",
                "versions": {"torch": "2.14.1", "git": None},
                "together": together,
            }
        ],
        "data": {"sha256": f"of {dataset}"},
        "samples": samples,
        "kept": kept,
        "kv_bytes": int(1e6 * kept),
        "tokens_per_second": 10 / kept,
        "layers_per_class": [1, 2, layers - 3],
    }
    rows = []
    for index in range(samples):
        words = [word if chance.random() < right else "no" for word in ANSWER.split()]
        rows.append({"pred": " ".join(words), "answers": [ANSWER], "all_classes": None, "length": lengths[index]})
    write_lines(folder / f"{dataset}.jsonl", rows)
    (folder / "samples").mkdir(exist_ok=True)
    records = [{"index": index, **row, "stats": stats} for index, row in enumerate(rows)]
    write_lines(folder / "samples" / f"{dataset}.jsonl", records)
    write_manifest(folder, settings, {dataset: summary})
    return folder


def make_fidelity(folder, kl, **more):
    """Write a run of `--fidelity`, `kl` its mean."""
    make_run(folder, **more)
    manifest = json.loads((folder / "run.json").read_text())
    manifest["settings"]["measure"] = "fidelity"
    [(dataset, summary)] = manifest["datasets"].items()
    for key in ("kv_bytes", "tokens_per_second", "layers_per_class"):
        del summary[key]
    summary |= {"compared": summary["samples"], "tokens": 40, "kl": {"mean": kl, "low": kl / 1.5, "high": kl * 1.5}}
    summary |= {"agreement": {"mean": 0.9, "low": 0.8, "high": 1.0}}
    write_lines(folder / f"{dataset}.jsonl", [{"kl": kl, "agreement": 0.9, "tokens": 8}] * summary["samples"])
    write_manifest(folder, manifest["settings"], manifest["datasets"])
    return folder


def make_helm(folder, scores=None, samples=3, **more):
    """Write a run on HELM's XSum; `scores` are ROUGE-1, 2 and L, None before `script/helm.sh`."""
    make_run(folder, "xsum", samples, **more)
    write_lines(folder / "xsum.jsonl", [{"request": {}, "result": {}}] * samples)
    if scores is not None:
        named = dict(zip(("ROUGE-1", "ROUGE-2", "ROUGE-L"), scores, strict=True))
        (folder / "result.json").write_text(json.dumps({"xsum": named}))
    return folder


def make_needles(folder, found=1.0, kl=None, depths=(0, 50, 100), **more):
    """Write a run of the needle map: `found` is the share of its needles; `kl` makes it one of `--fidelity`."""
    name = "niah-prose_1024"
    more |= {"dataset": name, "samples": 2 * len(depths)}
    make_run(folder, right=found, **more) if kl is None else make_fidelity(folder, kl, **more)
    manifest = json.loads((folder / "run.json").read_text())
    manifest["datasets"][name]["depths"] = list(depths)
    write_manifest(folder, manifest["settings"], manifest["datasets"])
    return folder


def make_bench(path, batch_sizes=(1, 8), caches=("streaming full", "streaming squeezed")):
    """Write a file of `squeeze.bench`."""
    runs = []
    for batch in batch_sizes:
        for number, cache in enumerate(caches):
            spec = {"engine": "squeeze", "cache": cache, "dtype": "float32", "batch_size": batch, "device": "cpu"}
            spec |= {"prompt_length": 4096, "model": "/models/M"}
            times = {"median": 0.1 / (number + 1), "low": 0.09 / (number + 1), "high": 0.12 / (number + 1)}
            found = {"step_seconds": times, "prefill_seconds": times, "kv_bytes": 10**8 // (number + 1) * batch}
            found |= {"peak_bytes": 2 * 10**9, "weight_bytes": 5 * 10**8, "copy_bandwidth": 1e10}
            runs.append({"spec": spec, "result": found})
    runs.append({"spec": runs[0]["spec"] | {"cache": "streaming compiled"}, "result": {"error": "no compiler"}})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": "a machine", "runs": runs}))
    return path


def make_grid(root, sizes=(0.2, 0.4), allocations=("squeeze", "squeeze-log", "paper"), ratios=(0.25, 0.5), **more):
    """Write a full run and a grid of squeezed ones below `root`, with fidelity, and return `root`."""
    make_run(root / "full", right=0.8, **more)
    for size in sizes:
        common = {"ini_size": size, **more}
        uniform = make_run(root / f"{size:g}/{100 * size:g}", KV_class3=size, right=0.3 + size, **common)
        make_fidelity(uniform / "fidelity", 0.02 / size, KV_class3=size, **common)
        for allocation in allocations:
            for ratio in ratios:
                third = round(size * ratio, 4)
                folder = root / allocation / f"{size:g}/{100 * third:g}"
                sizes_of = {"KV_class3": third, "allocation": allocation, **common}
                make_run(folder, right=0.35 + size * ratio, **sizes_of)
                make_fidelity(folder / "fidelity", 0.01 / size / ratio, **sizes_of)
    return root


def layer_stats(ini_size, kv_class3, layers):
    """Classes, budgets and similarities of a prompt of 100 tokens."""
    classes = [1, 2, 2] + [3] * (layers - 3)
    share = (layers * ini_size - (layers - 3) * kv_class3) / 3
    budgets = [round(100 * (kv_class3 if one == 3 else share)) for one in classes]
    similarities = [round(1 - 0.3 / (layer + 1) ** 2, 6) for layer in range(layers)]
    return {"classes": classes, "budgets": budgets, "similarities": similarities, "notes": []}


def write_manifest(folder, settings, datasets):
    (folder / "run.json").write_text(json.dumps({"settings": settings, "datasets": datasets}))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
