"""`PolicyWatcher`: the policy that is in force while its file is being edited."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

from lbdt.serving.policy import Policy, PolicyError, checked_known, policy_of, read_policy

_FRESH = 2.0
"""Seconds after a change in which another one may leave the file's times as they are: the step of the coarsest file
systems' clocks."""


class PolicyWatcher:
    """Holds the last good version of a policy file; `refresh` looks for a later one.

    Any number of threads may read `current` while others refresh: a reader has one version or the other, whole.
    """

    def __init__(
        self, path: str | Path, known: Sequence[str], *, report: Callable[[str], None] | None = None
    ) -> None:
        """Reads the file. `known`: the names of the eraser's concepts. `report` is given the text of every broken
        version, once, by the thread that refreshes.

        Raises:
            PolicyError, TypeError, ValueError: as `load_policy`.
        """
        self.path = Path(path)
        self._known = checked_known(known)
        self._report = report
        self._lock = threading.Lock()
        self._seen = self._state()
        data = read_policy(self.path)
        self._current = policy_of(self.path, data, self._known)
        self._versions = {self._current.version: self._current.digest}
        self._rejected: tuple[str | None, str] | None = None

    @property
    def current(self) -> Policy:
        """The policy in force."""
        return self._current

    @property
    def rejected(self) -> str | None:
        """Why the file as it was last read is not in force; None: it is."""
        rejected = self._rejected
        return None if rejected is None else rejected[1]

    def refresh(self) -> bool:
        """Reads the file if it has changed; whether another version is in force now.

        A broken version, one that is not there, and one whose version's name has been in force here with another
        content leave `current` as it is. A file that changed less than two seconds ago is read again, as it may be half
        written, and its times need not show the rest. What `report` raises is raised here, after the version has been
        noted.
        """
        with self._lock:
            seen = self._state()
            if seen is not None and seen == self._seen:
                return False
            before, said = self._current, self._rejected
            self._read()
            self._seen = seen
            exchanged, rejected = self._current is not before, self._rejected
        # Outside of the lock: whom it tells may ask to refresh.
        if rejected is not None and rejected != said and self._report is not None:
            self._report(rejected[1])
        return exchanged

    def _read(self) -> None:
        digest = None
        try:
            data = read_policy(self.path)
            digest = sha256(data).hexdigest()
            if self._rejected is not None and self._rejected[0] == digest:
                return
            if digest != self._current.digest:
                policy = policy_of(self.path, data, self._known, self._versions)
                self._versions[policy.version] = policy.digest
                self._current = policy
            self._rejected = None
        except PolicyError as error:
            self._rejected = (digest, str(error))

    def _state(self) -> tuple[int, ...] | None:
        """What changes with the file, looked up before it is read, so that a later change is seen; None: it may change
        unseen, or is not there."""
        try:
            found = os.stat(self.path)
        except (OSError, ValueError):
            return None
        # A copy may keep the time of the content, not that of the file's entry, which is also the machine's own.
        if time.time() - found.st_ctime < _FRESH:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev
