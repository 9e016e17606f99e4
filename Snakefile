# Notebooks to reports to the site. `make reports` calls it at pocket scale; on a GPU machine or a cluster:
#   snakemake --cores all --config profile=paper parameters='-p data_root /data' reports/paper/sa2vp/sa2vp.ipynb
#   snakemake --profile profiles/local --configfile profiles/grid.yaml       (profiles/slurm on a cluster)
# Features of whole slides, in parallel parts (cores, or SLURM jobs with --executor slurm), each slide
# resumed where a kill left it:
#   snakemake --cores 8 --config parts=8 slides='slides/panda --data-root /data --weights vit256_small_dino.pth' features

import json
import os
import shlex
import sys
from pathlib import Path

from companion.errors import BadParameter
from companion.runs import batch
from companion.io.provenance import sources

batch.check(config)
PROFILE = config.get("profile", "pocket")
SLUGS = sorted(path.stem for path in Path("notebooks").glob("*.ipynb"))
# git ignores build/: `make reports` changes no committed record, `make notebooks` writes those
RUNS = "build/reports" if PROFILE == "pocket" else "reports"
PAPERS = str(config.get("papers") or "").split()
EXECUTED = expand(RUNS + "/{profile}/{slug}/{slug}.ipynb", profile=PROFILE, slug=PAPERS or SLUGS)
PYTHON = sys.executable
PARTS = int(config.get("parts", 1))
GRID = batch.expand(config, SLUGS) if "runs" in config else {}
REPORTS = Path("reports", PROFILE)
STUDIES = [slug for slug in PAPERS or SLUGS if Path(f"lib/companion/toy/{slug}.py").exists()]
for slug in PAPERS:
    if slug not in SLUGS:
        raise BadParameter("papers", slug, SLUGS)
# default resources of a run of the grid, see `resources` there
USUAL = {"threads": 1, "gpu": 0, "mem_mb": 4000, "runtime": 30}
if PROFILE == "paper":
    USUAL = {"threads": 8, "gpu": 1, "mem_mb": 32000, "runtime": 24 * 60}


def below(folder, *endings):
    """The files below a folder, those with some endings if there are any."""
    found = (path for path in Path(folder).rglob("*") if path.is_file() and path.suffix not in (".pyc", ".safetensors"))
    return sorted(str(path) for path in found if not endings or path.suffix in endings)


def asked(name):
    """How much of `name` a run of the grid requests."""
    return lambda run: GRID[f"{run.slug}/{run.run}"]["resources"].get(name, USUAL[name])


def code_of(run):
    return [os.path.relpath(path) for path in sources(f"notebooks/{run.slug}.ipynb")]


def seconds(run):
    """How long a notebook took for its committed record: with the longest first, none runs alone at the end."""
    record = Path("reports", "pocket", run.slug, "run.json")
    return json.loads(record.read_text())["seconds"] if record.exists() else 0


# what the site shows next to the executed notebooks: its pages, records, and the interface of the library
SHOWN = [str(path) for path in Path().glob("*.md")]
SHOWN += [path for folder in ("site", "lib", "benchmarks", "notebooks/figures") for path in below(folder)]
SHOWN += [path for path in below("reports", ".json", ".csv") if not path.startswith(("reports/site", "reports/paper"))]


def study_rows(run):
    """The rows on synthetic data, and those on real images, which some notebooks show too."""
    return [str(path) for kind in ("pocket", "real") for path in Path("reports", kind, run.slug).glob("study.*")]


# a failed run leaves the notebook as far as it came next to its log
PAPERMILL = """
    export OMP_NUM_THREADS={threads} COMPANION_PROGRESS={params.progress}
    unset MPLBACKEND  # the kernel's own backend puts figures into the notebook
    echo "{params.name}: started on {threads} thread(s)"
    if {PYTHON:q} -m companion.runs.batch {params.gpu} {input.notebook} {params.draft:q} -k python3 --no-progress-bar \
        {params.given} -p profile {wildcards.profile} -p out {params.out:q} > {log:q} 2>&1
    then
        mv {params.draft:q} {output:q}
        echo "{params.name}: done in $SECONDS s"
    else
        echo "{params.name}: FAILED after $SECONDS s; executed so far: {params.draft}; the end of {log}:"
        tail -n 40 {log:q}
        exit 1
    fi
"""
# hours at the paper profile want lines in the notebook; a minute does not
PROGRESS = "off" if PROFILE == "pocket" else "lines"


wildcard_constraints:
    profile="[^/]+",
    slug="[^/]+",
    run="[^/]+",


rule all:
    input:
        [f"{REPORTS}/{name}/{name.split('/')[0]}.ipynb" for name in GRID] or [*EXECUTED, "reports/site/index.html"],


# Tables, claims and the run record are written by the notebook itself and are not outputs here: Snakemake deletes the
# outputs of a job that fails, and a failed run must not delete the previous record.
rule notebook:
    input:
        notebook="notebooks/{slug}.ipynb",
        code=code_of,
        study=study_rows,
    output:
        RUNS + "/{profile}/{slug}/{slug}.ipynb",
    log:
        "build/{profile}/{slug}.log",
    params:
        name="{slug}",
        draft="build/{profile}/{slug}.ipynb",
        out=RUNS + "/{profile}/{slug}",
        given="" if GRID else config.get("parameters", ""),
        gpu=0,
        progress=PROGRESS,
    priority: seconds
    # pocket models gain little beyond a few threads, so notebooks run in parallel and share the cores
    threads: min(4, max(1, (workflow.resource_settings.cores or 1) // max(1, len(EXECUTED))))
    shell:
        PAPERMILL


rule features:
    input:
        expand("build/slides/{part}-of-{parts}.done", part=range(PARTS), parts=PARTS),


# A finished part is not checked again: delete build/slides when slides were added.
rule slides:
    output:
        touch("build/slides/{part}-of-{parts}.done"),
    log:
        "build/slides/{part}-of-{parts}.log",
    params:
        given=config.get("slides", ""),
    shell:
        """
        export OMP_NUM_THREADS={threads} COMPANION_PROGRESS=off
        echo "slides {wildcards.part}/{wildcards.parts}: started"
        if {PYTHON:q} -m companion.cli slides {params.given} --part {wildcards.part}/{wildcards.parts} > {log} 2>&1
        then
            echo "slides {wildcards.part}/{wildcards.parts}: done in $SECONDS s"
        else
            cat {log}
            exit 1
        fi
        """


rule run:
    input:
        notebook="notebooks/{slug}.ipynb",
        code=code_of,
    output:
        "reports/{profile}/{slug}/{run}/{slug}.ipynb",
    log:
        "build/{profile}/{slug}/{run}.log",
    params:
        name="{slug}/{run}",
        draft="build/{profile}/{slug}/{run}.ipynb",
        out="reports/{profile}/{slug}/{run}",
        given=lambda run: "-y " + shlex.quote(json.dumps(GRID[f"{run.slug}/{run.run}"]["parameters"])),
        gpu=lambda wildcards, resources: resources.gpu,
        progress=PROGRESS,
    threads: asked("threads")
    resources:
        gpu=asked("gpu"),
        mem_mb=asked("mem_mb"),
        runtime=asked("runtime"),
    shell:
        PAPERMILL


if GRID:

    onsuccess:
        print(batch.summarise(GRID, REPORTS, Path("build", PROFILE)))

    onerror:
        print(batch.summarise(GRID, REPORTS, Path("build", PROFILE)))


# What a killed study has done stays in its folder, which is no output, and the next run goes on from there.
rule studies:
    input:
        expand("build/study/{slug}.done", slug=STUDIES),


rule study:
    input:
        code=lambda run: [os.path.relpath(path) for path in sources(f"lib/companion/toy/{run.slug}.py")],
    output:
        touch("build/study/{slug}.done"),
    log:
        "build/study/{slug}.log",
    threads: workflow.resource_settings.cores or 1
    shell:
        """
        echo "study of {wildcards.slug}: started"
        {PYTHON:q} -m companion.studies.study {wildcards.slug} reports/pocket/{wildcards.slug} --workers {threads} \
            > {log} 2>&1 || {{ tail -n 40 {log}; exit 1; }}
        echo "study of {wildcards.slug}: done"
        """


rule site:
    input:
        EXECUTED,
        SHOWN,
    output:
        "reports/site/index.html",
    log:
        "build/site.log",
    shell:
        """
        echo "site: started"
        if {PYTHON:q} site/build.py --reports {RUNS}/{PROFILE} --out reports/site > {log} 2>&1
        then
            echo "site: done in $SECONDS s: {output}"
        else
            cat {log}
            exit 1
        fi
        """
