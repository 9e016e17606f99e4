"""Check the places that findings and recorded cases cite, against bare clones of the authors' repositories.

    python -m tools.findings --repos FOLDER [paper ...]

FOLDER has `<owner>+<name>/repo` for each repository. A place is `path:line` or `path:first-last`, in the repository and
at the commit of the paper's `paper.yaml`, or `owner/name:path:line` in another one of those named there; its token, one
name or literal, stands on one of its lines. Prints each place that is off, and each repository that is missing; returns
1 if there is any.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from companion.io.files import read_json
from companion.io.papers import findings, paper, slugs

CASES = Path(__file__).parents[1] / "tests" / "recipes"
PLACE = re.compile(
    r"(?:(?P<repository>[\w.-]+/[\w.-]+):)?(?P<path>(?![\d-]+$)[^:]+)(?::(?P<first>\d+)(?:-(?P<last>\d+))?)?"
)
TOKEN = re.compile(r"\S{1,40}")


class Place(NamedTuple):
    """Lines of a repository at a commit, all of them from `first` to `last` (0: the file), and what cites them."""

    cited: str
    repository: str
    commit: str
    path: str
    first: int
    last: int
    token: str


def places(slug: str) -> Iterator[Place]:
    """The places that a paper's findings and recorded cases cite.

    Raises `ValueError`: a place or token of another form, or a repository that `paper.yaml` does not name.
    """
    known = paper(slug)["code"]["repositories"]
    rows = [(f"{slug}: {row['topic']}", row["where"], known) for row in findings(slug)]
    for file in sorted((CASES / slug).glob("*/case.json")):
        sources = read_json(file)["source"]
        for source in sources if isinstance(sources, list) else [sources]:
            commits = {source["repo"]: source["commit"]} | known
            rows.append((f"{slug}, case {file.parent.name}", source["where"], commits))
    for cited, where, commits in rows:
        if not isinstance(where, dict):
            raise ValueError(f"{cited}: `where` maps each place to a token, not {where!r}")
        for text, token in where.items():
            place = PLACE.fullmatch(text)
            repository = place and (place["repository"] or next(iter(commits), ""))
            if not place or repository not in commits:
                raise ValueError(f"{cited}: {text} is no place (path:line) of {', '.join(commits)}")
            first = int(place["first"] or 0)
            if not (isinstance(token, str) and (TOKEN.fullmatch(token) if first else not token)):
                raise ValueError(f"{cited}: {text}: a token is one name or literal, and only of lines, not {token!r}")
            last = int(place["last"] or first)
            yield Place(cited, repository, str(commits[repository]), place["path"], first, last, token)


@cache
def _lines(folder: Path, commit: str, path: str) -> list[str] | None:
    """The lines of a file at a commit, those of its names if it is a folder; None without it."""
    done = subprocess.run(["git", "-C", folder, "show", f"{commit}:{path.rstrip('/')}"], capture_output=True)
    return done.stdout.decode(errors="replace").splitlines() if done.returncode == 0 else None


def off(place: Place, repos: Path) -> str:
    """What is wrong with a place, "" if nothing is. Its repository is in `repos`."""
    lines = _lines(repos / place.repository.replace("/", "+") / "repo", place.commit, place.path)
    if lines is None:
        return f"no {place.path} at {place.commit}"
    if not place.first <= place.last <= len(lines):
        return f"{place.path} has {len(lines)} lines, not {place.first}-{place.last}"
    cited = lines[place.first - 1 : place.last]
    if place.token and not any(place.token in line for line in cited):
        return f"no {place.token} at {place.path}:{place.first}-{place.last}"
    return ""


def main(argv: list[str] | None = None) -> int:
    """Check all places of the papers given, print what is off; 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("papers", nargs="*", choices=[[], *slugs()], metavar="paper", help="default: all")
    parser.add_argument("--repos", type=Path, required=True, metavar="FOLDER", help="with <owner>+<name>/repo, bare")
    given = parser.parse_args(argv)
    wrong, missing = 0, set()
    for slug in given.papers or slugs():
        try:
            cited = list(places(slug))
        except ValueError as error:
            print(error)
            wrong += 1
            continue
        here = {p.repository for p in cited if (given.repos / p.repository.replace("/", "+") / "repo").exists()}
        missing |= {p.repository for p in cited} - here
        found = [(place, off(place, given.repos)) for place in cited if place.repository in here]
        for place, said in found:
            if said:
                print(f"{place.cited}: {said}")
        bad = sum(bool(said) for _, said in found)
        wrong += bad
        print(f"{slug}: {len(found) - bad} of {len(cited)} places are right")
    for name in sorted(missing):
        folder = given.repos / name.replace("/", "+") / "repo"
        print(f"missing: {folder}; git clone --bare https://github.com/{name} {folder}")
    return int(bool(wrong or missing))


if __name__ == "__main__":
    raise SystemExit(main())
