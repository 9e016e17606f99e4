"""What the runs of the papers' tables need, row by row."""

from collections import Counter

import pytest

from companion.errors import CompanionError
from companion.io.papers import paper, slugs
from companion.runs import needs
from tests.conftest import parameters
from tests.models.common import refuses


@pytest.mark.parametrize("slug", slugs())
def test_each_run_is_once_in_the_rows_on_each_of_its_data_sets(slug):
    rows = needs.rows(slug)
    expected = Counter((run["id"], name) for run in paper(slug)["runs"] for name in needs.sets(run["data"]))
    assert Counter((row.run["id"], name) for row in rows for name in row.sets) == expected
    assert set(expected.values()) == {1} and len({row.anchor for row in rows}) == len(rows)
    for run in paper(slug)["runs"]:
        whole = needs.hours(run, needs.peak("H100", paper(slug).get("products", paper(slug)["precision"])))[0]
        own = [row for row in rows if row.run is run and row.hours["H100"]]
        counts = [1 if "dataset" in run.get("parameters", {}) else len(row.sets) for row in own]
        least, most = (sum(n * row.hours["H100"][i] for n, row in zip(counts, own, strict=True)) for i in (0, 1))
        assert not own or least * 0.999 <= whole <= most * 1.001
    # a T4 has no bfloat16
    assert not any(row.hours["T4"] for row in rows) or paper(slug)["precision"] != "bf16-mixed"


def test_a_name_is_one_data_set_and_a_group_all_of_its_own():
    assert needs.sets("hta/cifar10") == ["hta/cifar10"] and {"vtab/svhn", "vtab/dtd"} < set(needs.sets("vtab/"))


def test_a_run_that_does_not_fit_has_no_hours_there_and_accumulate_divides_the_published_batch(tmp_path, monkeypatch):
    counted = "bat: {{visevent: {{fixed_gb: {}, image_gb: 0.5, image_half_gb: 0.25, images: 96}}}}"
    monkeypatch.setattr(needs, "MODELS", tmp_path)
    for fixed, fitting in ((10, {*needs.SHOWN}), (24, {"A100", "H100"}), (80, set())):
        (tmp_path / "memory.yaml").write_text(counted.format(fixed), encoding="utf-8")
        row = next(row for row in needs.rows("bat") if row.run["id"] == "visevent")
        assert (row.memory, row.accumulate, row.smallest) == (fixed + 128 * 0.5, 64, fixed + 2 * 0.5)
        assert {gpu for gpu, hours in row.hours.items() if hours} == fitting


def test_a_step_that_is_divided_further_takes_the_memory_of_the_published_batch_by_the_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "_free", lambda: 0)
    for accumulate, images in ((0, 64), (8, 1024), (4096, 2)):  # of 8192; the recipe takes 64 at once
        p = parameters("ecamp", profile="paper", accelerator="cpu", accumulate=accumulate)
        refuses((lambda p=p: needs.check("ecamp", p, tmp_path), f" {images} images "), error=CompanionError)
