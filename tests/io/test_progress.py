"""Progress: the default by where the output goes."""

import io

import pytest

from companion.io import progress as module


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("mode", "stdout", "shown"), [
    ("", io.StringIO, "training: 2 of 2"), ("", Terminal, "training:   0%"), ("off", Terminal, ""),
])  # fmt: skip
def test_a_pipe_gets_lines_and_a_terminal_a_bar_unless_the_environment_chooses(mode, stdout, shown, monkeypatch):
    monkeypatch.delenv("COMPANION_PROGRESS", raising=False)
    if mode:
        monkeypatch.setenv("COMPANION_PROGRESS", mode)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("sys.stdout", out := stdout())
    assert list(module.progress([1, 2], "training")) == [1, 2]
    assert shown in out.getvalue() and ("%" in out.getvalue()) == ("%" in shown)
