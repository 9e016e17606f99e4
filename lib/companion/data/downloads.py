"""Downloads of data sets that leave no half copy."""

from __future__ import annotations

import contextlib
import http.client
import io
import shutil
import socket
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import CompanionError
from . import DataSet

SECONDS = 20  # timeout of a host's answer


@contextlib.contextmanager
def fetched(dataset: DataSet, root: Path, progress: bool) -> Iterator[Path]:
    """Context of a download: a hidden folder, whose content is moved to the set's folder at the end.

    Archives in it are removed. In an incomplete copy files are replaced; none of the user's others is removed. No
    progress bars unless `progress`; a failure raises `CompanionError` with advice, as does an archive with a member
    outside of its folder. A host that does not answer within `SECONDS` counts as a failure; the system's own timeout is
    minutes.
    """
    folder, waited = dataset.folder(root), socket.getdefaulttimeout()
    root.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(SECONDS)
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # the default from Python 3.14 on
    try:
        with (
            contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()),
            tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as name,
        ):
            (new := Path(name) / folder.name).mkdir()
            yield new
            for archive in (path for path in new.iterdir() if path.suffix in (".gz", ".tgz", ".zip")):
                archive.unlink()
            shutil.copytree(new, folder, dirs_exist_ok=True, copy_function=shutil.move)
    except (OSError, http.client.HTTPException, RuntimeError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise CompanionError(
            f"{dataset.title} could not be downloaded ({getattr(error, 'reason', error)}). No partial file was "
            f"saved. On a machine with a network run `companion fetch` again, or copy a finished {folder} here."
        ) from None
    finally:
        socket.setdefaulttimeout(waited)
        tarfile.TarFile.extraction_filter = None
