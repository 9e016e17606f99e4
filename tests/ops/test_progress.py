"""Progress: the default by where the output goes."""

import io

import pytest
from ipykernel.iostream import OutStream

from companion.errors import BadParameter
from companion.ops import progress as module


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Kernel(OutStream):
    """A kernel's stdout without a kernel."""

    def __init__(self) -> None:
        self.text = io.StringIO()

    write = property(lambda self: self.text.write)
    flush = property(lambda self: self.text.flush)
    getvalue = property(lambda self: self.text.getvalue)
    isatty = property(lambda self: self.text.isatty)

    def __del__(self) -> None:
        """There is nothing to close."""


@pytest.mark.parametrize(("stdout", "bar"), [(io.StringIO, False), (Terminal, True), (Kernel, True)])
def test_a_pipe_gets_lines_a_terminal_and_a_kernel_a_bar(stdout, bar, monkeypatch) -> None:
    monkeypatch.delenv("COMPANION_PROGRESS", raising=False)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("sys.stdout", out := stdout())
    assert list(module.progress([1, 2], "training")) == [1, 2]
    assert ("training: 2 of 2" in out.getvalue()) != bar and ("training:   0%" in out.getvalue()) == bar


def test_the_environment_chooses(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COMPANION_PROGRESS", "off")
    assert list(module.progress([1], "training")) == [1] and not capsys.readouterr().out
    monkeypatch.setenv("COMPANION_PROGRESS", "dots")
    with pytest.raises(BadParameter, match="'bar', 'lines', 'off'"):
        list(module.progress([1], "training"))
