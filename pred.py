"""Write a model's LongBench predictions with a full or a squeezed KV cache: `python pred.py --help`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from squeeze import InputError, models
from squeeze.flags import check_flags, config_from_flags, for_model, pred_parser, run_command
from squeeze.longbench import Data, data_settings, dataset_names, load_data
from squeeze.runs import Run, Samples, cache_settings, run_folder, versions
from squeeze.stats import progress, summarize


def main(argv: Sequence[str] | None = None) -> None:
    args = pred_parser().parse_args(argv)
    check_flags(args)
    if args.model is None:
        raise InputError("--model is missing: a name in config/model2path.json, a local folder or a Hub name")
    config = config_from_flags(args)
    datasets = dataset_names("samsum" if args.datasets is None else args.datasets)
    source = models.resolve(args.model, args.model_path)

    # torch and transformers take seconds to import: --help and what is wrong with the flags should not wait for them.
    import torch

    from squeeze import loading, squeezed
    from squeeze.predict import predict

    device = loading.pick_device(args.device)
    dtype = loading.pick_dtype(args.dtype, device)
    data = [load_data(dataset, args.data_dir) for dataset in datasets]
    folder = models.fetch(source, args.allow_pickle)
    model_config = models.read_config(folder)
    model_type = model_config["model_type"]
    models.check_arch(args.model_arch, model_type)
    config = for_model(config, model_type)
    max_length, note = models.prompt_limit(source, model_config)
    if note:
        print(f"note: {note}")

    model_id = models.identity(source, folder, args.allow_pickle)
    settings = {"model": model_id, "max_length": max_length, "dtype": str(dtype).removeprefix("torch.")}
    settings |= {"attn": "sdpa" if args.attn == "auto" else args.attn, "seed": args.seed, **cache_settings(config)}
    info = {
        "command": shlex.join(["python", "pred.py", *(sys.argv[1:] if argv is None else argv)]),
        "flags": vars(args),
        "model": {"name": source.name, "path": source.path, "type": model_type},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
    }
    with Run(run_folder(args.pred, source.name, config, model_type, args.seed), settings, info, args.overwrite) as run:
        todo = [(one, run.open(one.dataset, data_settings(one), one.count(args.sample_num))) for one in data]
        if any(samples.missing for _, samples in todo):
            torch.manual_seed(args.seed)
            model, tokenizer = loading.load(folder, device, dtype, args.attn, args.allow_pickle, args.device_map)
            with squeezed(model, config) if config else nullcontext() as squeeze_run:
                for one, samples in todo:
                    if samples.missing:
                        run.start(samples)
                        limits = (max_length, source.name, args.batch_size)
                        run.note(samples, batch_size=predict(model, tokenizer, one, samples, squeeze_run, *limits))
                        finish(run, one, samples)
        for one, samples in todo:
            if not samples.complete:
                run.start(samples)
                finish(run, one, samples)
            report(run, samples)


def finish(run: Run, data: Data, samples: Samples) -> None:
    run.finish(samples, {"data": data.origin, **summarize([record["stats"] for record in samples.records])})


def report(run: Run, samples: Samples) -> None:
    summary = run.manifest["datasets"][samples.dataset]
    stats = [record["stats"] for record in samples.records]
    print(f"{samples.published}: {len(stats)} samples, {progress(stats)}")
    if "layers_per_class" in summary:
        print("  layers in class 1, 2, 3: " + ", ".join(f"{count:g}" for count in summary["layers_per_class"]))


if __name__ == "__main__":
    sys.exit(run_command(main))
