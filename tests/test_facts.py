"""Faults of the files of facts are named with file, line and key: `tools/facts.py`, on copies with one mistake."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from companion.io import papers
from tools import facts

MISTAKES = """
bat findings 0.kind | kind: fault -> kind: falut
bat findings 0.case | case: groups_full -> case: groups_fll
bat paper arxive | arxiv: -> arxive:
bat paper arxiv | arxiv: '2312.10611' -> arxiv: 2312.10611
bat paper method | question: 'Do -> method: 'Do
bat paper weights.0.sorce | MIT, source: -> MIT, sorce:
bat paper claims.12.measured.0.at_most | at_least: 69.7 -> at_most: 69.7
bat paper runs.0.tables | tables: [bat_main, bat_lasher_attributes] -> tables: [bat_mian]
bat paper runs.0.weights | weights: [ostrack] -> weights: [ostrak]
bat paper runs.0.data | data: rgbt/lasher -> data: rgbt/lahser
bat paper tables.0.rows.0.values | values: {LasHeR_PR -> values: {LasHer_PR
bat paper claims | id: swap, -> id: parameters, | claims:
bat paper findings.0.claim | {claim: over-sum -> {claim: over-mean
bat paper figure | figure: attention -> figure: atention
tip threads lower.1.threads | threads: [IceClear/StableSR#34] -> threads: [IceClear/StableSR#3]
sa2vp paper parameters.method.choices | [SA²VP, VPT-deep, -> [SA²VP, VPT-deeep,
sa2vp paper parameters.method.choices_of | recipe:BASELINES -> recipe:BASELINE
sa2vp paper parameters.dataset.choices | vtab/cifar100, -> vtab/cifar, |     choices: [
sa2vp paper results.cells.vitb_fgvc_per_task.where.backbone | {backbone: vit_b16 -> {backbone: vit_b
sa2vp paper results.cells.vitb_vtab_natural_per_task.column | vtab/svhn: svhn -> vtab/svhn: a | vtab_natural_per_task: {
sa2vp paper results.cells | vitb_fgvc_per_task: {where -> vitb_fgvc: {where | cells:
sa2vp paper claims.12.measured.0.of | of: [SA2VP, hta] -> of: [SA2VP, htaa]
sa2vp paper computed.1.by | hta, by: means -> hta, by: mean
sa2vp paper data_built_for | textures: ' -> texture: ' | data_built_for:
sa2vp paper claims.5.tasks | tasks: [where] -> tasks: [were]
sa2vp paper claims.5.worse | worse: VPT-deep, favours -> worse: VPT, favours
sa2vp paper claims.8.why | , why: -> , limits: | id: aligned-real, kind
"""


@pytest.mark.parametrize("slug", papers.slugs())
def test_the_facts_of_a_paper_are_right(slug: str) -> None:
    assert not [*facts.check_paper(papers.MODELS / slug)]


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_a_mistake_is_named_with_its_file_line_and_key(mistake: str, tmp_path: Path) -> None:
    """A line of `MISTAKES`: the file and the key that is named, what is changed, and the line, if it is another one."""
    (slug, file, key), (right, wrong) = mistake.split(" | ")[0].split(), mistake.split(" | ")[1].split(" -> ")
    shutil.copytree(
        papers.MODELS / slug, tmp_path / slug, ignore=shutil.ignore_patterns("*.py", "*.svg", "__pycache__")
    )
    path = tmp_path / slug / f"{file}.yaml"
    text = path.read_text(encoding="utf-8").replace(right, wrong, 1)
    path.write_text(text, encoding="utf-8")
    at = text.index(mistake.split(" | ")[-1].split(" -> ")[-1])
    found = [*facts.check_paper(tmp_path / slug)]
    start = f"{path}:{text[:at].count(chr(10)) + 1}: {key}: "
    assert any(line.startswith(start) for line in found), found


def test_a_file_that_is_no_yaml_or_has_a_key_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own_sets.yaml"
    for text, line in (("sets: [1, 2\n", 1), ("facts: {}\nsets: []\nfacts: {}\n", 3)):
        path.write_text(text)
        assert any(fault.startswith(f"{path}:{line}: ") for fault in facts.Facts(path, "sets").told())
