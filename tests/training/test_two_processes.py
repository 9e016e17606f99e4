"""Two devices (processes on the CPU) train as one does: each paper, by the function that its recipe calls.

Everything is checked in a separate process, because pytest's may have threads and must not be forked. The random
numbers of a step (masks, dropout, noise) depend on the images alone. One device then takes a batch in two
parts, which are the shares of two devices: losses that are not a mean over images, and batch norms, are those of a
device's images, as in the authors' code under DDP.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import TensorDataset

from companion.errors import BadParameter, CompanionError
from companion.models.bat import recipe as bat
from companion.models.dmt import recipe as dmt
from companion.models.dplq import recipe as dplq
from companion.models.ecamp import model as ecamp_model
from companion.models.ecamp import recipe as ecamp
from companion.models.layers import dino
from companion.models.metasegnet import recipe as metasegnet
from companion.models.promptpar import recipe as promptpar
from companion.models.sa2vp import recipe as sa2vp
from companion.models.sic_cads import recipe as sic_cads
from companion.models.tip import recipe as tip
from companion.toy.encoders import tracker
from companion.training import fit as loop
from companion.training.callbacks import Callback, ClipNorm, EarlyStop, Lookahead
from companion.training.checkpoints import Checkpoint, trained_state
from companion.training.fit import CPU, Hardware, predict
from tests.conftest import ROOT, parameters
from tests.models.common import draw
from tests.models.dmt.test_recipe import CROPS, GENERATED
from tests.models.ecamp.test_recipe import toy_pairs
from tests.models.layers.test_dino import level
from tests.models.metasegnet.test_recipe import part as land
from tests.models.promptpar.test_recipe import SENTENCES
from tests.models.sic_cads.test_recipe import batch as crops
from tests.small import shrink, small_backbones, small_clip, small_pipe
from tests.training.test_fit import noisy_model, pairs, run, same

TWO = Hardware("cpu", 2)
Trained = tuple[nn.Module, list[dict]]
MODULES = (sa2vp, dplq, promptpar, bat, tip, dmt, dmt.down, metasegnet, sic_cads, ecamp, dino)


# --- the trainings ----------------------------------------------------------------------------------------------------


def small_networks(slug: str, devices: int, patch: pytest.MonkeyPatch) -> None:
    shrink(slug, patch)
    if slug != "dmt":
        return
    scenes, detector = dmt.down.SceneCrops, dmt.down.detector
    few = {"rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 16, "size": 256, "channels": 16}
    patch.setattr(dmt, "DRY_BATCH", 4 // devices)
    patch.setattr(dmt.down, "detector", lambda vit, classes, **options: detector(vit, classes, **options | few))
    patch.setattr(dmt.down, "Crops", lambda data, size: CROPS(data, 256))
    patch.setattr(dmt.down, "SceneCrops", lambda data, size: scenes(data, 224))
    patch.setattr(dmt, "_Generated", lambda task, count, side, seed: GENERATED(task, count, 256, seed))


def train_sa2vp(p: SimpleNamespace) -> Trained:
    return sa2vp.train(sa2vp.setting(p, Path()), "SA²VP", epochs=2)


def train_dplq(p: SimpleNamespace) -> Trained:
    return dplq.train(dplq.setting(p, Path()), "DPLQ", epochs=2)


def train_promptpar(p: SimpleNamespace) -> Trained:
    model = promptpar.build(p, SENTENCES, *small_backbones())
    data = TensorDataset(draw(8, 3, 64, 64), (draw(8, 3) > 0).float())
    return model, promptpar.learn(p, model, data, torch.full((3,), 0.3), epochs=2, batch=4)


def train_bat(p: SimpleNamespace) -> Trained:
    found = tracker.build()
    sides, boxes = (found.template, found.search), 0.3 + 0.1 * draw(8, 4).sigmoid()
    pairs, model = TensorDataset(*(draw(8, 6, s, s) for s in sides), boxes), bat.build("BAT", found, 0)
    return model, bat.learn(model, pairs, 0, Hardware(p.accelerator, p.devices), epochs=2, batch=4)


def train_tip(p: SimpleNamespace) -> Trained:
    pipe = small_pipe()
    history = tip.train(p, pipe, tip.samples(tip.Generated(8, 32, 0), 32, "TIP", 0), epochs=2, batch=4, warmup=0)
    return pipe.adaptor, history


def distil(p: SimpleNamespace) -> Trained:
    model = dmt.build(p, dmt.teachers(p))
    return model, dmt.distil(p, model, TensorDataset(draw(4, 3, 224, 224)), rates=np.full(3, 1e-3), batch=4)


def downstream(p: SimpleNamespace) -> Trained:
    found = dmt.downstream(p)
    model = found.build()
    return model, found.learn(model)


def train_metasegnet(p: SimpleNamespace) -> Trained:
    texts = metasegnet.texts(metasegnet.Prompts.read(), "MetaSegNet", ["Cfa", "Aw"] * 4)
    torch.manual_seed(0)
    model = metasegnet.MetaSegNet.build(3, size="pocket", text=metasegnet.Words.of(texts, length=64))
    data = metasegnet.Prompted(land(8), model.text, texts, metasegnet.DROPPED)
    return model, metasegnet.learn(p, data, model, epochs=3, batch=4)


def train_sic_cads(p: SimpleNamespace) -> Trained:
    text = nn.functional.normalize(draw(80, 24), dim=-1)
    model = sic_cads.build(p, small_clip(), text, torch.arange(80) % 3 == 0, "random")
    return model, sic_cads.train_model(p, TensorDataset(*crops(8)), None, model, batch=4, epochs=2)


def train_ecamp(p: SimpleNamespace) -> Trained:
    torch.manual_seed(0)
    model = ecamp_model.build("pocket")
    return model, ecamp.pretrain(p, model, toy_pairs(), learning_rates=np.full(4, 1e-3), batch=4)


def train_dino(p: SimpleNamespace) -> Trained:
    encoder, images, _ = level("patch")
    options = {"outputs": 32, "hidden": 32, "bottleneck": 16, "hardware": Hardware(p.accelerator, p.devices)}
    return dino.pretrain(encoder, images, corners, epochs=3, batch=8, warmup=0, lr=1e-3, **options)


def corners(x: torch.Tensor) -> list[torch.Tensor]:
    return [x[..., :28, :28], x[..., 4:, 4:], x[..., 6:18, 6:18]]


# parts in which one device takes a batch; one where the loss has statistics of all devices, and nothing is drawn
PAPERS: dict[str, tuple[str, Callable[[SimpleNamespace], Trained], int, dict]] = {
    "sa2vp": ("sa2vp", train_sa2vp, 2, {"dry_run": True}),
    "sa2vp, epoch chosen on val": ("sa2vp", train_sa2vp, 2, {"dry_run": True, "dataset": "fgvc/cub200"}),
    "dplq": ("dplq", train_dplq, 2, {"dry_run": True, "domain": "clip", "protocol": "cross-dataset"}),
    "promptpar": ("promptpar", train_promptpar, 2, {}),
    "promptpar, parts unused": ("promptpar", train_promptpar, 2, {"method": "regions, no similarity loss"}),
    "bat": ("bat", train_bat, 4, {}),
    "tip": ("tip", train_tip, 2, {"size": 32}),
    "dmt": ("dmt", distil, 1, {"mask_ratio": 0.0, "losses": "with relations"}),
    "dmt, fine-tune": ("dmt", downstream, 2, {"task": "fine-tune"}),
    "dmt, segment": ("dmt", downstream, 2, {"task": "segment"}),
    "dmt, detect": ("dmt", downstream, 2, {"task": "detect"}),
    "metasegnet": ("metasegnet", train_metasegnet, 2, {}),
    "sic_cads": ("sic_cads", train_sic_cads, 2, {"dataset": "detection/ov-lvis"}),
    "ecamp": ("ecamp", train_ecamp, 2, {}),
    "dino": ("hvit", train_dino, 1, {}),
}


def train(name: str, devices: int, fit: Callable[..., list], **changes: object) -> Trained:
    """A training of `PAPERS`, whose recipe finds `fit`."""
    slug, run, _, settings = PAPERS[name]
    usual = {"profile": "paper", "accelerator": "cpu", "data_root": "nowhere", "devices": devices}
    usual |= {"student": "tiny", "dry_run": True} if slug == "dmt" else {}
    with pytest.MonkeyPatch.context() as patch:
        small_networks(slug, devices, patch)
        for module in MODULES:
            patch.setattr(module, "fit", fit)
        return run(parameters(slug, **usual | settings | changes))


# --- what is checked, in a process of its own -------------------------------------------------------------------------


def trains_as_one_device_does(name: str) -> None:
    """The same losses and the same final state, buffers included."""
    parts, found = PAPERS[name][2], []

    def fit(model, loss, data, *, hardware, **options):
        def drawn(network: nn.Module, batch: tuple) -> object:
            torch.manual_seed(zlib.crc32(batch[0].numpy().tobytes()))
            return loss(network, batch)

        assert hardware.devices == devices
        hardware = dataclasses.replace(hardware, workers=0, accumulate=max(1, parts // devices))
        return loop.fit(model, drawn, data, hardware=hardware, **options)

    for devices in (1, 2):
        model, history = train(name, devices, fit)
        found.append((trained_state(model), history))
    (state, history), (other, again) = found
    assert len(history) > 1
    for row, twin in zip(history, again, strict=True):
        assert twin == pytest.approx(row, rel=1e-5)
    # Adam makes whole steps of the rounding of gradients that vanish, those of the keys' biases
    close = {"rtol": 1e-6, "atol": 1e-8} if parts > 1 else {"rtol": 1e-3, "atol": 3e-4}
    of_batch_norms = ("running_", "num_batches")  # see `running_statistics_are_means_over_devices`
    for key in [key for key in state if not key.rpartition(".")[2].startswith(of_batch_norms)]:
        torch.testing.assert_close(other[key], state[key], **close, msg=lambda text, key=key: f"{key}: {text}")


def running_statistics_are_means_over_devices() -> None:
    shares = [nn.BatchNorm1d(5, momentum=0.3) for _ in range(2)]
    for rank, share in enumerate(shares):
        for x, _ in loop._batches(pairs(), 8, 1, 0, 0, 16, rank, 2, 0):
            share(x)
    model = nn.Sequential(nn.BatchNorm1d(5, momentum=0.3, affine=False), nn.Linear(5, 2))
    run(model, epochs=2, hardware=TWO)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(model[0], name), sum(getattr(share, name) for share in shares) / 2)


def a_killed_training_resumes_to_the_same_bits() -> None:
    class Killed(Callback):
        def on_step_end(self, loop) -> None:
            if loop.step == 21:
                raise ValueError("killed")

    def trained(file: str, last: Callback) -> tuple[list, list, nn.Module]:
        model, best = noisy_model(), EarlyStop(lambda model: float(predict(model, pairs(), hardware=CPU).std()))
        callbacks = [ClipNorm(1.0), Lookahead(2), best, last]
        return run(model, callbacks=callbacks, checkpoint=Checkpoint(file, 5), hardware=TWO), best.scores, model

    *expected, whole = trained("whole.pt", Callback())
    with pytest.raises(ProcessRaisedException, match="killed"):
        trained("killed.pt", Killed())
    assert torch.load("killed.pt", weights_only=True)["step"] == 20
    *found, resumed = trained("killed.pt", Callback())
    assert found == expected and len(found[1]) == 5 and same(whole, resumed)


def one_device_scores_and_all_stop() -> None:
    values, file = (1.0, 3.0, 2.0, 0.0), Path("asked")

    def score(model: nn.Module) -> float:
        with file.open("a") as asked:
            asked.write("x")
        return values[file.stat().st_size - 1]

    stop = EarlyStop(score, patience=2)
    assert len(run(noisy_model(), callbacks=[stop], hardware=TWO)) == 32
    assert stop.scores == [(8 * i, value, value) for i, value in enumerate(values, 1)]


def the_last_images_of_an_epoch_are_trained_on_as_by_one_device() -> None:
    """Of 13 images in batches of 4 one is left, of which both devices get a copy; "carry" adds it to the next batch."""
    data = TensorDataset(*(t[:13] for t in pairs().tensors))
    for last, steps in (("train", 12), ("carry", 9)):
        found = []
        for hardware in (CPU, TWO, Hardware("cpu", 2, accumulate=2)):
            torch.manual_seed(1)
            model = nn.Linear(5, 2)
            history = run(model, data=data, epochs=3, batch=4, last=last, hardware=hardware)
            assert len(history) == steps
            found.append((torch.tensor([row["loss"] for row in history]), *model.state_dict().values()))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


class Spare(nn.Linear):
    """A layer with a parameter that is not used."""

    def __init__(self):
        super().__init__(5, 2)
        self.spare = nn.Parameter(torch.ones(1))


def errors_of_the_processes_come_out() -> None:
    data = pairs()
    data.tensors[1][3] = torch.inf
    with pytest.raises(CompanionError, match=r"^the training diverged"):
        run(noisy_model(), data=data, callbacks=[ClipNorm(1.0)], checkpoint=Checkpoint("none.pt", 1), hardware=TWO)
    with pytest.raises(ProcessRaisedException, match="find_unused_parameters=True"):
        run(Spare(), hardware=TWO)


def threads_of_the_process_do_not_hang_its_forks() -> None:
    torch.set_num_threads(2)
    large = torch.ones(1000, 1000)
    (large @ large).exp_()
    data = TensorDataset(torch.ones(8, 1000))
    run(nn.Linear(1000, 1000), lambda model, batch: model(batch[0]).square().mean(), data, epochs=1, hardware=TWO)
    torch.set_num_threads(1)


def teachers_are_cached_in_another_process() -> None:
    """So that this one has used no GPU when it is forked."""
    own, forward = os.getpid(), dmt.Teachers.forward

    def elsewhere(*arguments: object) -> object:
        assert os.getpid() != own
        return forward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        small_networks("dmt", 2, patch)
        patch.setattr(dmt.Teachers, "forward", elsewhere)
        usual = {"profile": "paper", "accelerator": "cpu", "dry_run": True, "student": "tiny"}
        setting = dmt.setting(parameters("dmt", **usual, devices=2, cached=True), Path())
        assert len(setting.learn(setting.build("DMT"), "DMT")) == 2


OTHERS = (
    running_statistics_are_means_over_devices,
    a_killed_training_resumes_to_the_same_bits,
    one_device_scores_and_all_stop,
    the_last_images_of_an_epoch_are_trained_on_as_by_one_device,
    errors_of_the_processes_come_out,
    threads_of_the_process_do_not_hang_its_forks,
    teachers_are_cached_in_another_process,
)
CHECKS = {name: functools.partial(trains_as_one_device_does, name) for name in PAPERS} | {c.__name__: c for c in OTHERS}


def main() -> None:
    """Write a file for each check into the current folder: empty, or its error."""
    for name, check in CHECKS.items():
        try:
            check()
            Path(f"{name}.txt").touch()
        except Exception:
            Path(f"{name}.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main()


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> Path:
    folder, paths = tmp_path_factory.mktemp("checked"), [str(ROOT), os.environ.get("PYTHONPATH", "")]
    usual = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COMPANION_PROGRESS": "off"}
    command = [sys.executable, "-m", "tests.training.test_two_processes"]
    subprocess.run(command, cwd=folder, env=os.environ | usual, capture_output=True, timeout=600)
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name, checked):
    assert not (checked / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", PAPERS)
def test_no_gpu_is_used_before_the_processes_are_forked(name, monkeypatch):
    """PyTorch for CPUs raises an error where a GPU is used."""

    class Reached(Exception):
        pass

    def fit(model, loss, data, *, hardware, **options):
        raise Reached(hardware.devices)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Reached, match="2"):
        train(name, 2, fit, accelerator="cuda")


def test_heads_on_features_of_a_gpu_are_trained_on_one_device(monkeypatch):
    def fit(model, loss, data, *, hardware, **options):
        asked.append(hardware.devices)
        return []

    asked: list[int] = []
    monkeypatch.setitem(PAPERS, "head", ("sa2vp", lambda p: sa2vp.train(sa2vp.setting(p, Path()), p.method), 1, {}))
    train("head", 2, fit, method="linear probing", dry_run=True)
    monkeypatch.setitem(PAPERS, "head", ("dmt", downstream, 1, {}))
    train("head", 2, fit, task="linear probe")
    assert asked == [1, 1]


def test_batch_norms_of_the_segmenter_are_synchronised_on_gpus(monkeypatch):
    """As in mmseg. A CPU has no such layer, so none is trained here."""

    def fit(model, loss, data, **options):
        kinds.update(type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        return []

    kinds: set[type] = set()
    monkeypatch.setattr(dmt, "device", lambda accelerator: "cuda")
    train("dmt, segment", 2, fit)
    assert kinds == {nn.SyncBatchNorm}


def test_a_platform_that_cannot_fork_trains_on_one_device(monkeypatch):
    monkeypatch.setattr(loop.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(BadParameter, match="Windows"):
        run(noisy_model(), hardware=TWO)
