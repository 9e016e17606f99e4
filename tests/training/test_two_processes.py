"""Two devices (processes on the CPU) train as one does: the mechanisms, and each paper's dry run.

Everything is checked in a separate process, because pytest's may have threads and must not be forked. The random
numbers of a step (masks, dropout, noise) depend on the images alone. One device then takes a batch in two
parts, which are the shares of two devices: losses that are not a mean over images, and batch norms, are those of a
device's images, as in the authors' code under DDP.
"""

import copy
import dataclasses
import functools
import os
import re
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import ConcatDataset, TensorDataset

from companion.errors import CompanionError
from companion.models.hvit.pretrain import pretrain
from companion.training import fit as loop
from companion.training.callbacks import Callback, ClipNorm, EarlyStop, Lookahead
from companion.training.checkpoints import Checkpoint, trained_state
from companion.training.fit import outputs_of
from companion.training.hardware import CPU, Hardware
from tests.conftest import ROOT, parameters
from tests.models.common import draw, refuses
from tests.papers.common import shrink
from tests.training.test_fit import noisy_model, pairs, run, same
from tests.training.test_precision import CASES

TWO = Hardware("cpu", 2)

# --- each paper, by its dry run ---------------------------------------------------------------------------------------

ON_ONE = ("hvit", "dmt, linear probe", "ecamp, fine-tune", "ecamp, segment", "ecamp, detect")  # device
PAPERS: dict[str, dict] = {name: {} for name in CASES if name not in ON_ONE}
PAPERS |= {
    "sa2vp, epoch chosen on val": {"dataset": "fgvc/cub200"},
    "dplq": {"domain": "clip"},
    "promptpar, parts unused": {"method": "regions, no similarity loss"},
    "dmt, distil": {"student": "tiny", "mask_ratio": 0.0},  # its loss has statistics of all devices: nothing is drawn
}
SMOKE = ("dplq", "promptpar")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in SMOKE)) for name in PAPERS]


class Reached(Exception):
    """The training, with what was found there."""


def train(name: str, fit: Callable, **changes: object) -> object:
    """What `fit` raises as `Reached` in the dry run of a paper."""
    slug = name.partition(",")[0]
    case, settings = (CASES.get(name) or CASES[slug])[:2]
    usual = {"profile": "paper", "dry_run": True, "accelerator": "cpu", "data_root": "nowhere", "devices": 2}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Reached) as reached:
        recipe = shrink(slug, patch)
        patch.setattr(recipe, "fit", fit, raising=False)  # of a recipe that does not call `training.recipe.run`
        patch.setattr("companion.training.recipe.fit", fit)
        case(recipe, parameters(slug, **usual | settings | PAPERS.get(name, {}) | changes), Path())
    return reached.value.args[0]


def trains_as_one_device_does(name: str) -> None:
    """The same losses and the same final state."""

    def fit(model, loss, data, *, hardware, batch, **options):
        def drawn(network: nn.Module, batch: tuple) -> object:
            torch.manual_seed(zlib.crc32(batch[0].numpy().tobytes()))
            return loss(network, batch)

        found = []
        for devices in (1, 2):
            on = dataclasses.replace(hardware, devices=devices, accumulate=max(1, parts // devices), workers=0)
            twin, settings = copy.deepcopy((model, options | {"checkpoint": None}))
            # twice the data: batch norms need two images
            history = loop.fit(twin, drawn, ConcatDataset([data] * 2), hardware=on, batch=2 * batch, **settings)
            found.append((trained_state(twin), history))
        raise Reached(found)

    parts = 1 if name == "dmt, distil" else 2
    (state, history), (other, again) = train(name, fit, devices=1)
    assert len(history) > 1
    for row, twin in zip(history, again, strict=True):
        assert twin == pytest.approx(row, rel=1e-4)
    close = {"rtol": 1e-5, "atol": 1e-6} if parts > 1 else {"rtol": 1e-3, "atol": 3e-4}
    # Adam makes whole steps of the rounding of the gradients of keys' biases; `running_statistics_are_means...`
    for key in [key for key in state if not re.search(r"qkv\.bias$|running_|num_batches", key)]:
        torch.testing.assert_close(other[key], state[key], **close, msg=lambda text, key=key: f"{key}: {text}")


# --- the mechanisms ---------------------------------------------------------------------------------------------------


def running_statistics_are_means_over_devices() -> None:
    shares = [nn.BatchNorm1d(5, momentum=0.3) for _ in range(2)]
    for rank, share in enumerate(shares):
        for x, _ in loop._batches(pairs(), 8, 1, 0, 0, 16, rank, 2, 0):
            share(x)
    model = nn.Sequential(nn.BatchNorm1d(5, momentum=0.3, affine=False), nn.Linear(5, 2))
    run(model, epochs=2, hardware=TWO)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(model[0], name), sum(getattr(share, name) for share in shares) / 2)


def the_centre_of_dino_is_that_of_all_devices() -> None:
    encoder, images = nn.Sequential(nn.Flatten(), nn.Linear(48, 8)), draw(16, 3, 4, 4)
    encoder.dim = 8
    sizes = {"epochs": 3, "batch": 8, "warmup": 0, "lr": 1e-3, "outputs": 16, "hidden": 16, "bottleneck": 8}
    (one, history), (two, again) = (
        pretrain(encoder, images, lambda x: [x, x.flip(-1)], hardware=hardware, **sizes) for hardware in (CPU, TWO)
    )
    for row, twin in zip(history, again, strict=True):
        assert twin == pytest.approx(row, rel=1e-4)
    torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=1e-3, atol=1e-4)


def a_killed_training_resumes_to_the_same_bits() -> None:
    class Killed(Callback):
        def on_step_end(self, loop) -> None:
            if loop.step == 21:
                raise ValueError("killed")

    def trained(file: str, last: Callback) -> tuple[list, list, nn.Module]:
        model, best = noisy_model(), EarlyStop(lambda model: float(outputs_of(model, pairs(), hardware=CPU).std()))
        callbacks = [ClipNorm(1.0), Lookahead(2), best, last]
        return run(model, callbacks=callbacks, checkpoint=Checkpoint(file, every), hardware=TWO), best.scores, model

    for every, longest in ((5, 600), (1000, 0)):  # by steps, and by the clock, in the middle of an epoch of 8 steps
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("companion.training.checkpoints.LONGEST", longest)
            *expected, whole = trained(f"whole {every}.pt", Callback())
            with pytest.raises(ProcessRaisedException, match="killed"):
                trained(f"killed {every}.pt", Killed())
            assert torch.load(f"killed {every}.pt", weights_only=True)["step"] == 20
            *found, resumed = trained(f"killed {every}.pt", Callback())
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


def errors_of_the_processes_are_raised() -> None:
    data = pairs()
    data.tensors[1][3] = torch.inf
    with pytest.raises(CompanionError):
        run(noisy_model(), data=data, callbacks=[ClipNorm(1.0)], checkpoint=Checkpoint("none.pt", 1), hardware=TWO)


def a_parameter_that_is_not_used_gets_no_gradient() -> None:
    model = nn.Linear(5, 2)
    model.spare, before = nn.Parameter(torch.ones(1)), model.weight.detach().clone()
    run(model, epochs=1, hardware=TWO)
    assert model.spare == 1 and not torch.equal(model.weight, before)


def a_slurm_step_trains_on_its_own_processes() -> None:
    step = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "step", "SLURM_PROCID": "0"}
    step |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in step.items():
            patch.setenv(name, value)
        one, two = (run(nn.Linear(5, 2), epochs=1, hardware=hardware) for hardware in (CPU, TWO))
    assert len(one) == len(two) > 1


def threads_of_the_process_do_not_hang_its_forks() -> None:
    torch.set_num_threads(2)
    large = torch.ones(1000, 1000)
    (large @ large).exp_()
    data = TensorDataset(torch.ones(8, 1000))
    run(nn.Linear(1000, 1000), lambda model, batch: model(batch[0]).square().mean(), data, epochs=1, hardware=TWO)
    torch.set_num_threads(1)


def teachers_are_cached_in_another_process() -> None:
    """So that this one has used no GPU when it is forked."""
    own = os.getpid()

    def elsewhere(*arguments: object) -> object:
        assert os.getpid() != own
        return forward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        dmt = shrink("dmt", patch)
        forward = dmt.Teachers.forward
        patch.setattr(dmt.Teachers, "forward", elsewhere)
        usual = {"profile": "paper", "accelerator": "cpu", "dry_run": True, "student": "tiny"}
        _, training, _ = dmt.distillation(parameters("dmt", **usual, devices=2, cached=True), Path(), real=False)
        assert len(dmt.train(dmt.opened(training))[1]) == 2


MECHANISMS = (
    running_statistics_are_means_over_devices,
    the_centre_of_dino_is_that_of_all_devices,
    a_killed_training_resumes_to_the_same_bits,
    one_device_scores_and_all_stop,
    the_last_images_of_an_epoch_are_trained_on_as_by_one_device,
    errors_of_the_processes_are_raised,
    a_parameter_that_is_not_used_gets_no_gradient,
    a_slurm_step_trains_on_its_own_processes,
    threads_of_the_process_do_not_hang_its_forks,
    teachers_are_cached_in_another_process,
)
CHECKS = {c.__name__: c for c in MECHANISMS}
CHECKS |= {name: functools.partial(trains_as_one_device_does, name) for name in PAPERS}


def main(names: list[str]) -> None:
    """Write a file for each check into the current folder: empty, or its error."""
    for name in names:
        try:
            CHECKS[name]()
            Path(f"{name}.txt").touch()
        except (Exception, pytest.fail.Exception):
            Path(f"{name}.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(sys.argv[1:])


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(request, tmp_path_factory) -> Path:
    """The folder of the results of all selected checks, which one process makes."""
    names = [item.callspec.params["name"] for item in request.session.items if "checked" in item.fixturenames]
    folder, paths = tmp_path_factory.mktemp("checked"), [str(ROOT), os.environ.get("PYTHONPATH", "")]
    usual = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COMPANION_PROGRESS": "off"}
    command = [sys.executable, "-m", "tests.training.test_two_processes", *names]
    subprocess.run(command, cwd=folder, env=os.environ | usual, capture_output=True, timeout=1800)
    return folder


@pytest.mark.parametrize("name", [*(check.__name__ for check in MECHANISMS), *NAMES])
def test_two_processes(name, checked):
    assert not (checked / f"{name}.txt").read_text()


def reached(model, loss, data, *, hardware, **options):
    raise Reached(hardware.devices)


@pytest.mark.parametrize("name", NAMES)
def test_no_gpu_is_used_before_the_processes_are_forked(name, monkeypatch):
    """PyTorch for CPUs raises an error where a GPU is used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train(name, reached, accelerator="cuda") == 2


def test_heads_on_features_of_a_gpu_are_trained_on_one_device(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("dmt, linear probe", reached) == 1


@pytest.mark.slow
def test_batch_norms_of_the_segmenter_are_synchronised_on_gpus(monkeypatch):
    """As in mmseg. A CPU has no such layer, so none is trained here."""

    def fit(model, loss, data, **options):
        raise Reached({type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)})

    monkeypatch.setattr("companion.models.dmt.recipe.device", lambda accelerator: "cuda")
    assert train("dmt, segment", fit) == {nn.SyncBatchNorm}


def test_a_platform_that_cannot_fork_trains_on_one_device(monkeypatch):
    monkeypatch.setattr(loop.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    refuses((lambda: run(noisy_model(), hardware=TWO), "devices = 2"))
