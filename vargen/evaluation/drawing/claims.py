"""Who works on which piece: one claim file a piece, so that processes need nothing in common but a folder.

A claim is held by a heartbeat. The claim of a process that died on this machine is free at once, that of a machine that
fell silent after ``STALE_AFTER`` seconds. Claims save work and protect nothing: two owners of a piece write the same bytes.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vargen.files import make_folder, writing
from vargen.validation.printable import printable
from vargen.validation.reading import read_json

STALE_AFTER = 60.0  # seconds without a heartbeat
_BEAT = 5.0  # seconds between heartbeats


class Claims:
    """Claims on named pieces of work.

    Args:
        folder: where the claim files lie; made when it is missing.
        stale_after: seconds without a heartbeat after which a claim of another machine is free.
    """

    def __init__(self, folder: Path, *, stale_after: float = STALE_AFTER) -> None:
        self.folder, self.stale_after = folder, stale_after
        make_folder(self.folder)

    @contextmanager
    def hold(self, name: str) -> Iterator[bool]:
        """Yield whether the piece is ours; if so it is until the block ends."""
        path = self.folder / name
        if not self._take(path):
            yield False
            return
        ended = threading.Event()
        beat = threading.Thread(target=self._beat, args=(path, ended), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            ended.set()
            beat.join()
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove claims that nobody holds: of processes that died between finishing a piece and letting go of it."""
        for path in self.folder.glob("[!.]*"):
            if self._is_free(path):
                self._bury(path)

    def holder(self, name: str) -> str:
        """Say who holds a piece."""
        owner = _read(self.folder / name)
        return f"process {owner['pid']} on {printable(owner['host'])}" if owner else "an unknown process"

    def _take(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return self._is_free(path) and self._bury(path) and self._take(path)
        with writing(path), os.fdopen(descriptor, "w") as stream:
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}, stream)
        return True

    def _is_free(self, path: Path) -> bool:
        owner = _read(path)
        if owner and owner["host"] == socket.gethostname():
            return _started(owner["pid"]) != owner["started"]
        try:
            return self._now() - path.stat().st_mtime > self.stale_after
        except FileNotFoundError:
            return True

    def _bury(self, path: Path) -> bool:
        grave = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            os.rename(path, grave)  # of several processes that find the claim stale, one moves it
        except FileNotFoundError:
            return False
        grave.unlink(missing_ok=True)
        return True

    def _now(self) -> float:
        """Return the time by the clock of the file system, which need not be that of this machine."""
        probe = self.folder / f".clock.{secrets.token_hex(4)}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _beat(self, path: Path, ended: threading.Event) -> None:
        while not ended.wait(min(_BEAT, self.stale_after / 4)):
            try:
                os.utime(path)
            except OSError:  # taken over meanwhile: the piece is then made twice, which does no harm
                return


def _read(path: Path) -> dict[str, Any] | None:
    try:
        owner = read_json(path, limit=2**12)
    except ValueError:  # gone, or its owner died before it had signed
        return None
    signed = isinstance(owner, dict) and isinstance(owner.get("host"), str) and type(owner.get("pid")) is int
    return owner if signed and 0 < owner["pid"] < 2**31 and "started" in owner else None


def _started(pid: int) -> str | None:
    """Return when a process started (a process number is used again), or None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "running"  # no /proc on this system
