"""The `companion` command: requirements of a run, downloads, comparison with the authors' outputs, text files of runs,
features of whole slides, and maps of land cover.

companion doctor sa2vp [--data-root DIR]      what is missing for each table; the parameters and their accepted values
companion fetch sa2vp [--data-root DIR]       weights and data that are free and have a checksum
companion data [--data-root DIR]              all data sets: present, missing or incomplete
companion parity sa2vp [--checkpoint FILE]    our model against outputs of the authors' code
companion parity sa2vp --recipe     our training and evaluation against the authors'
companion slides slides/panda --weights FILE [--part I/N]    patch embeddings, slide by slide; resumes
companion landcover DIR --checkpoint FILE     a map of every GeoTIFF in DIR/images, by a network that you trained
companion landcover DIR --check     the values of the masks in DIR/labels, their classes, and their shares
companion run sa2vp vitb_fgvc_per_task --data-root DIR     all runs of a published table, then the table; resumes
companion pack RUN -o FOLDER [--by NAME]      three small text files of a run, for a pull request
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from . import __version__, data  # what needs torch, or takes long, is imported where it is used
from .errors import BadParameter, CompanionError, check_choice, extra
from .io.files import check_folder
from .io.papers import accepted, paper, rules, slugs
from .runs import needs


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of `companion`, and those of its commands by name."""
    papers = f"papers: {', '.join(slugs())}"
    parser = argparse.ArgumentParser(prog="companion", description=__doc__.split("\n\n")[0], epilog=papers)
    parser.add_argument("--version", action="version", version=f"companion {__version__}")
    hvit, metasegnet = rules("hvit"), rules("metasegnet")
    found = {"companion": parser}
    below = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int], name: str, what: str, *positional: str):
        sub = below.add_parser(name, help=what, description=what, epilog=papers)
        for argument in positional:
            sub.add_argument(argument)
        sub.set_defaults(run=run)
        found[f"companion {name}"] = sub
        return sub

    for function, name, what in (
        (doctor, "doctor", "missing requirements of each table of a paper; accepted parameters of its notebook"),
        (fetch, "fetch", "download a paper's weights and data where they are free"),
    ):
        sub = command(function, name, what, "paper")
        sub.add_argument("--data-root", default="data")
        if function is fetch:
            sub.add_argument("--dataset", help="of the data this set alone (default: all of the paper's)")
        else:
            sub.add_argument("--devices", type=int, default=1, help="as the notebook's parameter (default: 1)")
            sub.add_argument("--accumulate", type=int, default=1, help="as the notebook's parameter (default: 1)")
            sub.add_argument("--gpu", choices=needs.GPUS, help="the time is on this GPU (default: this one, or A100)")
            choices = hvit["precision"]["choices"]
            sub.add_argument("--precision", default="paper", choices=choices, help="the time is at this precision")
    command(show_data, "data", "all data sets and whether they are present").add_argument("--data-root", default="data")
    sub = command(check_parity, "parity", "compare our model, or recipe, with the authors' code", "paper")
    sub.add_argument(
        "--recipe", action="store_true", help="the code outside the model: schedules, labels, metrics, ..."
    )
    sub.add_argument("--checkpoint", help="weights that should give the recorded outputs, under the authors' names")
    sub.add_argument("--fixtures", help="folder <paper>/<case>/ (default: the project's)")
    sub.add_argument("--case", help="run this case only")
    sub.add_argument("--accelerator", default="cpu", choices=["cpu", "cuda"], help="device of our model (default: cpu)")
    sub = command(slides, "slides", "store the patch embeddings of slides, one HDF5 each; resumes", "dataset")
    sub.add_argument("--weights", required=True, help="file of the patch level, such as HIPT's vit256_small_dino.pth")
    sub.add_argument("--data-root", default="data", help="folder of the data sets; of the slides, for dataset `folder`")
    sub.add_argument("--features", default="", help="output folder (default: DATA_ROOT/features)")
    table = "a CSV with slide_id and mpp, the microns per pixel of level 0 of single slides; before --mpp"
    sub.add_argument("--spacing", help=table)
    sub.add_argument("--preview", action="store_true", help="a PNG of each slide and its regions, next to its features")
    sub.add_argument("--part", default="0/1", help="I/N: every N-th slide from the I-th on, for N parallel jobs")
    sub.add_argument("--batch", type=int, default=1, help="regions per step")
    sub.add_argument("--heads", type=int, help="attention heads of the patch level (default: one for 64 channels)")
    sub.add_argument("--mpp", type=float, help="microns per pixel of level 0 (default: each slide's own)")
    masks = "folder of a tissue mask a slide, <slide id>.png or .tif, in its proportions: 0 (black) is background, "
    sub.add_argument("--masks", help=f"{masks}any other value tissue (default: tissue is detected by colour)")
    sub.add_argument("--region", type=int, default=2048, help="side of a region in pixels")
    scan = "resize the nearest level to 0.5 microns per pixel, where none is near: of 40x with levels 1, 4, 16"
    sub.add_argument("--resample", action="store_true", help=scan)
    sub.add_argument("--normalise", default="unit", choices=hvit["normalise"]["choices"], help="of the pixels")
    raw = "encode regions as read (default: after JPEG compression, as HS2P stores them for the authors)"
    sub.add_argument("--raw", action="store_true", help=raw)
    sub.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "cuda"])
    sub = command(landcover, "landcover", "predict maps for the GeoTIFFs of a folder, of any size", "folder")
    kind = sub.add_mutually_exclusive_group(required=True)
    kind.add_argument("--checkpoint", help="trained weights, <out>/trained/<name>.safetensors; maps and PNG previews")
    kind.add_argument("--check", action="store_true", help="no maps: list the values of the masks in FOLDER/labels")
    for name, default, what in (
        ("method", "MetaSegNet", "the trained model"),
        ("augmentation", "none", "test-time augmentation of a tile"),
    ):
        choices = metasegnet[name]["choices"]
        sub.add_argument(f"--{name.replace('_', '-')}", default=default, choices=choices, help=what)
    sub.add_argument("--data-root", default="data", help="folder of the weights: <data root>/weights/bert-base-uncased")
    sub.add_argument("--prompts", default="", help="a file of texts by climate zone (default: the included one)")
    sub.add_argument("--out", default="", help="output folder (default: FOLDER/maps)")
    sub.add_argument("--tile", type=int, default=1024, help="side of a tile in pixels")
    sub.add_argument("--overlap", type=int, default=256, help="overlap of tiles in pixels")
    sub.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "cuda"])
    what = "run what a published table needs, one run after the other on each GPU, and fill the table; resumes"
    sub = command(run, "run", what, "paper", "table")
    sub.add_argument("--data-root", default="data")
    sub.add_argument("--dry-run", action="store_true", help="rehearse all of them: two steps each on a few items")
    sub.add_argument("--profile", default="profiles/local", help="of Snakemake: profiles/local or profiles/slurm")
    sub = command(
        pack, "pack", "write a run of the paper profile as three small text files, for a pull request", "folder"
    )
    sub.add_argument("-o", "--output", required=True, help="new folder, reports/contributed/PAPER/DATE-NAME")
    sub.add_argument("--by", default="", help="who measured it, shown with its rows (default: nobody is named)")
    return found


def main(words: list[str] | None = None) -> int:
    """Run one command; 0 when all is well, 1 when something is missing or differs, 2 for a wrong call."""
    given = commands()["companion"].parse_args(words)
    try:
        if Path(root := getattr(given, "data_root", ".")).is_file():
            raise BadParameter("--data-root", root, "a folder; this is a file")
        code = given.run(given)
        sys.stdout.flush()
        return code
    except BadParameter as error:
        print(f"companion: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # for example `companion data | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (
        CompanionError,
        OSError,
    ) as error:  # for example a folder without write permission; its path is in the message
        print(f"companion: {error}", file=sys.stderr)
        return 1


def _weights(facts: dict, root: str | Path) -> list[tuple[dict, str]]:
    """The paper's weights, and for each the missing file ("" for none).

    Those with a `file` can only be downloaded by hand; they belong below `<data root>/weights`.
    """
    from huggingface_hub import constants, try_to_load_from_cache  # imported here because it takes half a second

    found = []
    for weights in facts["weights"]:
        if weights.get("released") == "never":
            continue
        if "file" in weights:
            path = Path(root) / "weights" / weights["file"]
            where = data.dated(weights["source"], weights.get("checked"))
            found.append((weights, "" if path.is_file() else f"not at {path}; by hand from {where}"))
        else:  # without timm, whose import takes seconds: the hub has its weights under these names
            files = ("model.safetensors", "pytorch_model.bin")
            cached = [try_to_load_from_cache(f"timm/{weights['id']}", file) for file in files]
            here = any(isinstance(file, str) for file in cached)
            found.append((weights, "" if here else f"not in {constants.HF_HUB_CACHE}"))
    return found


def doctor(given: argparse.Namespace) -> int:
    """Print, for each group of tables, the requirements of its run and which are missing; then the notebook's
    parameters."""
    facts, root = paper(given.paper), Path(given.data_root)
    weights = {w["name"]: (w, lack) for w, lack in _weights(facts, root)}
    wrap = textwrap.TextWrapper(110, subsequent_indent=" " * 18, break_long_words=False, break_on_hyphens=False)
    lacking, look = False, functools.cache(functools.partial(data.status, root=root, decode=True))  # once for all runs
    print(f"{facts['title']}  (arXiv {facts['arxiv']})\ndata root: {root.resolve()}\n")
    for run in facts["runs"]:
        print(f"{run['title']}\n  tables   {', '.join(run['tables'])}")
        lacking |= _show_sets({name: look(name) for name in needs.sets(run["data"])}, root)
        for name in run["weights"]:
            entry, lack = weights[name]
            size = f"{entry['size_mb']} MB, " if "size_mb" in entry else ""
            print(f"  weights  {entry.get('id') or entry['file']} ({size}{entry['licence']}): {lack or 'here'}")
            print(wrap.fill(f"           {entry['what']}"))
            if "replaces" in entry:
                print(wrap.fill(f"           in place of {entry['replaces']}; rows of the tables name it"))
            lacking |= bool(lack)
        lacking |= _show_costs(given, facts, run)
    print(f"Parameters of notebooks/{given.paper}.ipynb and their accepted values")
    for name, rule in rules(given.paper).items():
        print(wrap.fill(f"  {name:14}  {accepted(rule)}"))
    print()
    for entry in facts["weights"]:
        if entry.get("released") == "never":
            print(f"{entry['name']}: never released")
    print("Free parts: " + f"companion fetch {given.paper} --data-root {given.data_root}\n{data.LINKS}")
    return int(lacking)


def _show_sets(looked: dict[str, data.Status], root: Path) -> bool:
    """Print what of a run's data sets is here; whether some of it is missing."""

    def show(text: str) -> None:
        print(textwrap.fill(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 8))

    absent = [(data.DATASETS[name], state) for name, state in looked.items() if state.state != "present"]
    print(f"  data     {len(looked) - len(absent)} of {len(looked)} sets are present")
    for name, state in looked.items():
        if state.ready:
            print(f"    {name}, in {state.folder}")
            print(*(f"      {split}: ready: {line}" for split, line in state.ready.items()), sep="\n")
    # sets with the same layout and source are printed together
    for (layout, source), members in itertools.groupby(absent, lambda pair: (pair[0].layout, pair[0].where)):
        sets = [*members]
        for dataset, state in sets:
            print(f"    {dataset.name}: {state.state}; licence: {dataset.licence}")
            for split, line in state.lacking.items():
                show(f"{split}: {line}")
        print(textwrap.indent(f"searched in {sets[0][0].folder(root)}:\n{textwrap.indent(layout, '  ')}", " " * 6))
        for archive in dict.fromkeys(dataset.archive for dataset, _ in sets if dataset.archive):
            show(f"wanted: {archive}")
        show(f"get it: {source}")
    return bool(absent)


def _show_costs(given: argparse.Namespace, facts: dict, run: dict) -> bool:
    """Print what memory, disk and time a run needs; whether there is too little of the first two."""
    import torch

    from .io import record
    from .io.files import read_json
    from .training.hardware import device

    kind, root = device("auto"), Path(given.data_root).absolute()
    memory, where = (needs.free(kind), torch.cuda.get_device_name() if kind == "cuda" else "no GPU here")
    disk = shutil.disk_usage(next(f for f in (root, *root.parents) if f.exists())).free / 1e9  # it may not exist yet
    here = [name for name in needs.GPUS if re.search(rf"\b{name}\b", where)]  # "NVIDIA A100-SXM4-80GB", "Tesla T4"
    gpu = given.gpu or (here or ["A100"])[0]
    precision = facts["precision"] if given.precision == "paper" else given.precision
    products = facts.get("products", precision) if given.precision == "paper" else precision
    peak = needs.peak(gpu, products)
    wanted, how = needs.memory(given.paper, run, precision, kind)
    print(f"  memory   {wanted:.3g} GB needed{how}; {memory:.0f} GB free ({where})")
    written = needs.disk(given.paper, run)
    print(f"  disk     {run['disk_gb']} GB of data, {written:.3g} GB in `out`; {disk:.0f} GB free")
    if "batch" in run:
        text = needs.batch(run["batch"], given.devices, given.accumulate)
        print(textwrap.fill(text, 110, initial_indent="  batch    ", subsequent_indent=" " * 11))
    hours, flop = needs.hours(run, peak)
    print(
        f"  time     about {hours:.1f} h on one {gpu} (not measured): {flop:.1e} operations of forward and\n"
        f"           backward passes, {needs.SHARE:.0%} of its peak of {peak} TFLOP/s at {products}\n"
    )
    dry_runs = [
        file
        for folder in ("runs", "reports")
        for file in (record.root() / folder / "paper" / given.paper).glob("**/dry_run/step.json")
    ]
    if dry_runs and run["epochs"]:
        step = read_json(max(dry_runs, key=lambda file: file.stat().st_mtime))
        took = f"{step['seconds']:.2f} s for a step of {step['images']} images on {step['device']}"
        print(f"           {needs.measured(run, step):.1f} h of training by the last dry run:\n           {took}\n")
    return memory < wanted or disk < run["disk_gb"] + written


def fetch(given: argparse.Namespace) -> int:
    """Download what is free and has a checksum; for the rest print where to get it."""
    from . import backbones

    facts, left = paper(given.paper), []
    for weights, lack in _weights(facts, given.data_root):
        if lack and "file" in weights:
            left.append(f"{weights['file']}: {lack}")
        elif lack:
            print(f"weights {weights['id']} ({weights['size_mb']} MB)", flush=True)
            try:
                backbones.find_weights(weights["id"], download=True)
            except CompanionError as error:
                left.append(str(error))
    names = dict.fromkeys(name for run in facts["runs"] for name in needs.sets(run["data"]))
    if given.dataset:
        check_choice("--dataset", given.dataset, names)
    for name in [given.dataset] if given.dataset else names:
        try:
            print(f"data    {name}: {data.fetch(name, given.data_root)}", flush=True)
        except CompanionError as error:
            left.append(str(error))
    if left:
        print(f"\n{len(left)} could not be fetched:\n")
        print("\n\n".join(textwrap.indent(text, "  ") for text in left))
    return int(bool(left))


def show_data(given: argparse.Namespace) -> int:
    """Print every data set with its state, source and licence."""
    rows = data.table(given.data_root)
    width, before = max(len(row["name"]) for row in rows), ""
    for row in rows:
        print(f"{row['name']:{width}}  {row['state']:10}  {row['title']}")
        source = f"{row['source']}; licence: {row['licence']}"
        print(f"{'':{width}}  {'':10}  {'as above' if source == before else source}")
        before = source
        if row["state"] != "missing":
            print(textwrap.indent(row["detail"], " " * (width + 14)))
    print()
    for group in dict.fromkeys(row["name"].partition("/")[0] for row in rows):
        some = [row for row in rows if row["name"].startswith(f"{group}/")]
        lacking = ", ".join(f"{row['name']} {row['state']}" for row in some if row["state"] != "present")
        here = sum(row["state"] == "present" for row in some)
        print(f"{group:{width}}  {here} of {len(some)} present{f': {lacking}' if 0 < here < len(some) else ''}")
    print(f"\n{data.LINKS}")
    return 0


def check_parity(given: argparse.Namespace) -> int:
    """Compare with the recorded cases of the checkout, by its own program."""
    from .io import record
    from .runs import cases

    words = [given.paper, "--accelerator", given.accelerator, *(["--recipe"] if given.recipe else [])]
    for name in ("checkpoint", "fixtures", "case"):
        if value := getattr(given, name):
            words += [f"--{name}", str(Path(value).resolve()) if name != "case" else value]
    return subprocess.run(cases.program(words), cwd=record.root()).returncode


def slides(given: argparse.Namespace) -> int:
    """Store features slide by slide, and list the slides that could not be read."""
    from .models.hvit import encoders, recipe
    from .models.hvit.slides import PANDA

    i, _, n = given.part.partition("/")
    if not (i.isdecimal() and n.isdecimal()):
        raise BadParameter("--part", given.part, "I/N, such as 0/8")
    check_folder("--features", recipe.stored_in(given.features, given.data_root))
    patch, bad = encoders.patch_encoder(given.weights, given.heads), []
    tiling = replace(PANDA, jpeg=not given.raw, resample=given.resample)
    parameters = SimpleNamespace(**vars(given))
    options = {name: getattr(given, name) for name in ("batch", "mpp", "spacing", "masks", "preview")}
    for name, found in recipe.store(parameters, patch, (int(i), int(n)), tiling=tiling, **options):
        if isinstance(found, CompanionError):
            bad.append(name)
            print(f"{name}: {found}", file=sys.stderr, flush=True)
        else:
            print(f"{name}: {found}", flush=True)
    if bad:
        print(f"companion: no features of {len(bad)} slides: {', '.join(bad)}", file=sys.stderr)
    return int(bool(bad))


def landcover(given: argparse.Namespace) -> int:
    """Write a map and a preview for each image and print the map's path; or list the values of the masks."""
    if not Path(given.folder).is_dir():
        raise BadParameter("folder", given.folder, "a folder with images/ and classes.txt: there is no such folder")
    if given.check:
        return check_masks(given.folder)
    from .models.metasegnet.own import maps

    check_folder("--out", given.out or Path(given.folder) / "maps")
    options = {name: value for name, value in vars(given).items() if name not in ("run", "check")}
    for path, zone in maps(**options):
        print(f"{path}  ({zone or 'location unknown'})", flush=True)
    return 0


def check_masks(folder: str) -> int:
    """Print the values of all masks of a folder, the classes they mean and their shares; 1 if no pixel has a class."""
    from .data import landcover as sets

    masks = sets.own(folder, sets.read_classes(folder))["all"]
    values, names = sets.label_values(masks), [*masks.classes, "ignored"]
    total, labelled = sum(values.values()), sum(picture.label is not None for picture in masks.pictures)
    print(f"{labelled} of {len(masks)} images have a mask in {Path(folder) / 'labels'}")
    if labelled:
        print(f"{'value':>15}  {'pixels':>8}  class")
    for (value, label), count in values.items():
        print(f"{', '.join(map(str, value)):>15}  {count / total:8.2%}  {names[label]}")
    if absent := [name for i, name in enumerate(masks.classes) if not any(i == label for _, label in values)]:
        print(f"no pixel: {', '.join(absent)}")
    if any(len(value) == 1 for value, _ in values):
        print(
            f"0 to {len(masks.classes) - 1} are the classes in the order of classes.txt; other values are ignored in "
            "training and scores.\nMasks with such values look black in a viewer: that is right. Previews of maps are "
            "in colour."
        )
    return int(all(label == masks.ignore for _, label in values))


def run(given: argparse.Namespace) -> int:
    """Queue the runs of a table with Snakemake, and print the paper's tables with what was measured.

    Finished runs are not repeated, and a stopped training resumes.
    """
    import pandas as pd

    from .io import record
    from .io.files import write_json
    from .runs import batch

    config = batch.of_table(given.paper, given.table, given.data_root, given.dry_run)
    root = record.root()
    with extra("reports"):
        import snakemake  # noqa: F401 (in a process of its own, which could not name the extra)
    if Path(given.profile).name == "local" and not batch.gpus():
        print("no GPU here: the runs are on the CPU")
        for one in config["runs"]:
            one["resources"]["gpu"] = 0
    write_json(file := root / "build" / "runs" / f"{given.paper}, {given.table}.json", config)
    words = [sys.executable, "-m", "snakemake", "--profile", given.profile, "--configfile", str(file)]
    began = time.time()
    code = batch.run_group(words, root)
    measured = root / "reports" / "paper" / given.paper / f"{'dry_runs' if given.dry_run else 'grid'}.csv"
    if measured.exists() and measured.stat().st_mtime >= began:  # not that of another table, where nothing was measured
        recipe = importlib.import_module(f"companion.models.{given.paper}.recipe")
        rows = recipe.RESULTS.measured(measured)
        with pd.option_context("display.width", None, "display.max_columns", None):
            for title, table in recipe.tables(rows).items():
                print(f"\n{title}\n{table.to_string(index=False)}")
        print(f"\n{len(rows)} rows in {measured}{': dry runs, whose numbers mean nothing' if given.dry_run else ''}")
    return code


def pack(given: argparse.Namespace) -> int:
    """Write the contribution of a run, see `runs.pack`."""
    from .runs.pack import pack as write

    print(write(given.folder, given.output, given.by))
    return 0


if __name__ == "__main__":
    sys.exit(main())
