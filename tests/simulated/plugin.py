"""`python -m pytest -p tests.simulated.plugin FILES`: tests with the simulated GPU wherever they ask for the CPU.

Only their trainings and evaluations are on the GPU; what a test computes itself stays on the CPU.
"""

from __future__ import annotations

import pytest

from tests.simulated import simdevice

simdevice.install(project=("/lib/companion/",))

SKIPPED = {
    "test_the_teacher_follows_once_a_step_after_the_student": "compares with a mean computed on the CPU",
    "is_the_one_written_out": "the training that the test writes out is on the CPU",
    "test_cached_losses_are_the_losses[float32]": "1.4e-6 apart: batched products are rounded otherwise",
}
"""Part of a test's name, and why it does not hold on a GPU."""


def pytest_configure(config: pytest.Config) -> None:
    """Fabric gets the GPU, and so does `device`."""
    import lightning_fabric

    launch = lightning_fabric.Fabric
    lightning_fabric.Fabric = lambda accelerator, **settings: launch(accelerator="cuda", **settings)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, the tests of SKIPPED."""
    for item in items:
        for name, why in SKIPPED.items():
            if name in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=why))
