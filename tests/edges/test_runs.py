"""Names of papers, studies, tasks and GPUs that there are none of, and figures without an image: what runs and plots
refuse."""

import matplotlib.pyplot as plt
import pytest
import torch

from companion.errors import BadParameter
from companion.io import papers
from companion.runs import batch, cases, needs, report
from companion.studies import real, study
from companion.viz import attention, plots

OF_A_PAPER = {
    "facts": papers.paper,
    "findings": papers.findings,
    "threads": papers.threads,
    "rules": papers.rules,
    "diagram": papers.diagram,
    "needs": needs.longest,
    "cases": cases.agreement,
    "opening": report.opening,
    "run": lambda slug: report.start(slug, {}),
    "study": study.load,
    "grid": lambda slug: batch.of_table(slug, "1", "data"),
}
OTHERS = {
    "gpu": lambda _: needs.peak("H900", "32-true"),
    "task": lambda _: real.folder("CIFAR-11"),
    "published": lambda _: needs.batch(0),
    "devices": lambda _: needs.batch(8, devices=0),
    "accumulate": lambda _: needs.batch(8, accumulate=0),
    "count": lambda folder: batch.devices(-1, folder).__enter__(),
    "runs": lambda _: batch.expand({}, ["sa2vp"]),
    "number of images": lambda _: plots.show_images(torch.rand(0, 3, 8, 8)),
    "images of the longest row": lambda _: plots.image_rows({"a": []}),
    "titles": lambda _: plots.show_images(torch.rand(2, 3, 8, 8), ["one"]),
    "image": lambda _: plots.denormalise(torch.rand(1, 8, 8), (0,), (1,)),
    "number of features": lambda _: plots.tsne(torch.rand(1, 4), torch.zeros(1), plt.gca()),
    "labels": lambda _: plots.tsne(torch.rand(5, 4), torch.zeros(4), plt.gca()),
    "number of maps": lambda _: attention.rollout([]),
    "channels of the tokens": lambda _: attention.token_pca(torch.rand(1, 9, 2), (3, 3)),
}


@pytest.mark.parametrize("name", OF_A_PAPER)
@pytest.mark.parametrize("slug", ["nope", "", "../sa2vp"])
def test_a_paper_that_is_none_is_refused(name, slug, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadParameter, match="sa2vp"):  # those that there are
        OF_A_PAPER[name](slug)


@pytest.mark.parametrize("name", OTHERS)
def test_an_argument_is_refused_by_name(name, tmp_path):
    with pytest.raises(BadParameter, match=f"^{name}"):
        OTHERS[name](tmp_path)
