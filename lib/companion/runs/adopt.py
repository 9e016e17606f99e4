"""Import the results of a run into `reports/`, which git tracks."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pandas as pd

from ..errors import BadParameter, CorruptFile, check_choice
from ..evaluation.tables import Results
from ..io import record
from ..io.files import atomic, read_json, sha256, write_json
from ..io.papers import slugs
from ..io.provenance import code_hash, sources
from .batch import NAME

MEASURED = "measured.csv"  # the results on real data, of all runs of a paper


def adopt(folder: str | Path) -> str:
    """Copy a run's results to `reports/` and return a message with their location.

    The files must have the hashes of the run's record. Results of other code than this checkout's are taken too; the
    message and the record name their commit. A run of a grid, whose name is in its record, keeps its folder. The
    files of the previous run are replaced; a study is not deleted.

    Raises:
        BadParameter: the record is of an unknown paper or profile, or of a dry run.
        CorruptFile: a file is missing, or its hash differs from the record's.
    """
    source, root = Path(folder), record.root()
    if not (source / "run.json").is_file():
        raise CorruptFile(source / "run.json", "there is no such file: not the output folder of a run")
    facts = read_json(source / "run.json")
    try:
        slug, profile, code, outputs = (facts[k] for k in ("slug", "profile", "code", "outputs"))
        outputs = dict(outputs)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(source / "run.json", f"not a run record ({error})") from error
    check_choice("slug", slug, {*slugs(), *(path.stem for path in (root / "notebooks").glob("*.ipynb"))})
    check_choice("profile", profile, ("pocket", "paper"))
    if facts.get("parameters", {}).get("dry_run"):
        raise BadParameter("folder", folder, "a run that is no dry run, whose numbers mean nothing")
    notebook = root / "notebooks" / f"{slug}.ipynb"
    if not notebook.is_file():
        raise CorruptFile(notebook, "there is no such file: call `companion adopt` in the project's checkout")
    for name, hashed in outputs.items():
        path = source / name
        if not path.resolve().is_relative_to(source.resolve()):
            raise CorruptFile(source / "run.json", f"{name} lies outside of the folder")
        if not path.is_file() or sha256(path) != hashed:
            raise CorruptFile(path, "missing, or not the file that the record's hash is of")
    here = source.resolve()
    name = str(facts.get("run", here.name if here.parent.name == slug else ""))  # records of before have none
    if name and (not NAME.fullmatch(name) or name.startswith(".")):
        raise CorruptFile(source / "run.json", f"run = {name!r} is not the name of a run")
    target = root / "reports" / profile / slug / name
    if target.resolve() == here:
        return f"{target.relative_to(root)} is already in place"
    executed = [path.name for path in source.glob(f"{slug}.ipynb")]
    before = _outputs(target)
    with contextlib.ExitStack() as renamed:  # all files at the end, when each was copied
        new = {name: renamed.enter_context(atomic(target / name)) for name in (*outputs, *executed)}
        for name, path in new.items():
            shutil.copyfile(source / name, path)
        if MEASURED in outputs and (target / MEASURED).exists():
            _gather(slug, target / MEASURED, new[MEASURED])
    for name in {*before, f"{slug}.ipynb"} - {*new, MEASURED}:
        (target / name).unlink(missing_ok=True)
    write_json(target / "run.json", facts | {"outputs": {name: sha256(target / name) for name in outputs}})
    message = f"adopted {len(outputs)} files into {target.relative_to(root)}"
    if code != code_hash([notebook, *sources(notebook)]):
        message += f"; made by other code than this checkout's, commit {facts.get('commit') or 'unknown'}"
    if not executed:
        message += f"\nthere is no executed {slug}.ipynb among them, so the site cannot show the run"
    return message


def _outputs(folder: Path) -> list[str]:
    """The outputs of the previous run in `folder`, by its record; none if the record is missing or invalid."""
    with contextlib.suppress(CorruptFile, TypeError, KeyError):
        outputs = read_json(folder / "run.json")["outputs"]
        return [name for name in outputs if (folder / name).resolve().is_relative_to(folder.resolve())]
    return []


def _gather(slug: str, before: Path, new: Path) -> None:
    """Add to the measured results in `new` those of the runs `before` that measured something else."""
    results = Results.of(slug)
    rows = pd.concat([results.measured(before), results.measured(new)])
    rows.drop_duplicates([key for key in results.keys if key in rows], keep="last").to_csv(new, index=False)
