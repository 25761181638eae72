"""Write a model's predictions on LongBench or for HELM with a full or a squeezed KV cache: `python pred.py --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from squeeze import InputError, models, request_files
from squeeze.distributed import ranks
from squeeze.flags import check_flags, check_task_flags, config_from_flags, for_model, pred_parser, run_command
from squeeze.longbench import Data, dataset_names, load_data
from squeeze.request_files import HELM_TASKS, Requests, read_requests
from squeeze.runs import Run, cache_settings, run_folder, versions
from squeeze.samples import PUBLISHED


def main(argv: Sequence[str] | None = None) -> None:
    args = pred_parser().parse_args(argv)
    check_flags(args)
    check_task_flags(args)
    if args.model is None:
        raise InputError("--model is missing: a name in config/model2path.json, a local folder or a Hub name")
    config = config_from_flags(args)
    helm = args.pred in HELM_TASKS
    datasets = [] if helm else dataset_names("samsum" if args.datasets is None else args.datasets, args.pred)
    source = models.resolve(args.model, args.model_path)

    # torch and transformers take seconds to import: --help and what is wrong with the flags should not wait for them.
    import torch

    from squeeze import completions, fidelity, loading, predict, prompting, squeezed, stats

    process = ranks()
    device = loading.pick_device(args.device, process.local)
    dtype = loading.pick_dtype(args.dtype, device)
    data: list[Data] | list[Requests] = [load_data(dataset, args.data_dir, args.pred) for dataset in datasets]
    if helm:
        data = [read_requests(args.pred, args.requests)]
    folder = models.fetch(source, args.allow_pickle)
    model_config = models.read_config(folder)
    model_type = model_config["model_type"]
    models.check_arch(args.model_arch, model_type)
    config = for_model(config, model_type)
    max_length, note = models.positions(model_config), None
    if not helm:
        max_length, note = models.prompt_limit(source, model_config)
    if note and process.first:
        print(f"note: {note}")

    model_id = models.identity(source, folder, args.allow_pickle)
    settings = {"model": model_id, "max_length": max_length, "dtype": str(dtype).removeprefix("torch.")}
    settings |= {"attn": "sdpa" if args.attn == "auto" else args.attn, "seed": args.seed, **cache_settings(config)}
    settings |= asked_for(args)
    info = {
        "command": shlex.join(["python", "pred.py", *(sys.argv[1:] if argv is None else argv)]),
        "flags": vars(args),
        "model": {"name": source.name, "path": source.path, "type": model_type},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": process.world,
        "versions": versions(),
    }
    how = predict.Options(
        max_length=max_length,
        model_name=source.name,
        chat=args.chat,
        batch_size=args.batch_size,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        ranks=process,
    )
    place = run_folder(args.pred, source.name, config, model_type, args.seed)
    published: Sequence[str] = request_files.PUBLISHED if helm else PUBLISHED
    work: Callable[..., int] = completions.answer if helm else predict.predict
    summarize, describe = stats.summarize, stats.progress
    if args.fidelity:
        place /= "fidelity"
        published, work = fidelity.PUBLISHED, fidelity.measure
        summarize, describe = fidelity.summarize, fidelity.describe
    with ExitStack() as stack:
        run = stack.enter_context(Run(place, settings, info, args.overwrite, published, process))
        todo = [(one, run.open(one.dataset, one.settings, one.count(args.sample_num))) for one in data]
        if process.share(any(samples.missing for _, samples in todo)):
            torch.manual_seed(args.seed)
            model, tokenizer = loading.load(folder, device, dtype, args.attn, args.allow_pickle, args.device_map)
            if args.chat:
                prompting.check_chat_template(tokenizer, source.name)
            squeeze_run = stack.enter_context(squeezed(model, config)) if config else None
        for one, samples in todo:
            run.start(samples)
            if samples.missing:
                run.note(samples, batch_size=work(model, tokenizer, one, samples, squeeze_run, how))
            run.finish(samples, summarize, data=one.origin)
            if process.first:
                found = [record["stats"] for record in samples.records]
                print(f"{samples.published}: {len(found)} samples, {describe(found)}")
                summary = run.manifest["datasets"][samples.dataset]
                if "layers_per_class" in summary:
                    print("  layers in class 1, 2, 3: " + ", ".join(f"{n:g}" for n in summary["layers_per_class"]))


def asked_for(args: argparse.Namespace) -> dict[str, Any]:
    """Settings that change results and are named in a run's settings only where they are not the default."""
    found: dict[str, Any] = {"chat": True} if args.chat else {}
    found |= {"temperature": args.temperature, "top_p": args.top_p} if args.temperature > 0 else {}
    return found | ({"measure": "fidelity"} if args.fidelity else {})


if __name__ == "__main__":
    sys.exit(run_command(main))
