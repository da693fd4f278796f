"""Private roots for running what images run, without a container runtime: Linux and root only.

A root is an overlay over this machine's own: whatever is written stays inside and is gone
afterwards. All roots of a sandbox share its network, which may be one without any way out.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TOOLS = ("unshare", "nsenter", "setpriv", "chroot", "mount", "ip")
CLONE_NEWNET = 0x40000000

MEMORY = "mount -t tmpfs -o size=6g sandbox {base}"
DISK = """
truncate --size={gib}G {base}.ext4
mkfs.ext4 -q -F {base}.ext4
mount -o loop,noatime {base}.ext4 {base}
rm {base}.ext4
"""
"""A file of its own, gone when it is no longer mounted: an overlay cannot lie on what is below."""

HOLD = """
set -e
{storage}
{network}
echo ready
cat
"""

ROOT = """
set -e
mkdir -p {at}/upper {at}/work {at}/root
mount -t overlay -o lowerdir=/,upperdir={at}/upper,workdir={at}/work overlay {at}/root
cd {at}/root
chmod 755 root
mount --rbind /proc proc
mount --rbind /dev dev
mount --rbind /sys sys
"""


@dataclass(frozen=True)
class Mount:
    """A folder of the machine, seen at a path of a root."""

    path: str
    folder: Path
    read_only: bool = False


class Sandbox:
    """Roots with a network of their own, or with that of the machine.

    What is written lies in memory, or in a file of `disk_gib` where that is given.

    Raises:
        OSError: this machine does not allow it (see `reason_against`).
    """

    def __init__(self, base: Path, *, network: bool, disk_gib: int = 0) -> None:
        self.base = base
        self._network = network
        self._disk_gib = disk_gib
        self._holder: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.base.mkdir(parents=True, exist_ok=True)
        private = [] if self._network else ["--net"]
        lines = "" if self._network else "ip link set lo up"
        base = shlex.quote(str(self.base))
        storage = (DISK if self._disk_gib else MEMORY).format(base=base, gib=self._disk_gib)
        script = HOLD.format(storage=storage, network=lines)
        self._holder = subprocess.Popen(
            ["unshare", "--mount", *private, "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise OSError("namespaces, tmpfs or loop devices are not allowed here")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._holder is not None
        self._holder.communicate("")

    def root(self, name: str, mounts: Sequence[Mount] = (), hosts: Mapping[str, str] | None = None,
             *, read_only: bool = False) -> Root:  # fmt: skip
        """A new root; `hosts` are addresses by name."""
        at = self.base / name
        script = [ROOT.format(at=shlex.quote(str(at)))]
        for mount in mounts:
            target = shlex.quote(mount.path.lstrip("/"))
            script.append(
                f"mkdir -p {target}; mount --bind {shlex.quote(str(mount.folder))} {target}"
            )
            if mount.read_only:
                script.append(f"mount -o remount,bind,ro {target}")
        lines = "".join(f"{address} {host}\n" for host, address in (hosts or {}).items())
        if lines:
            script.append(
                f"printf %s {shlex.quote('127.0.0.1 localhost' + chr(10) + lines)} > etc/hosts"
            )
        if read_only:
            script.append("cd /; mount -o remount,ro " + shlex.quote(str(at / "root")))
        subprocess.run([*self.inside(), "sh", "-c", "\n".join(script)], check=True)
        return Root(self, at / "root")

    def inside(self) -> list[str]:
        """The words before a command that make it run in the sandbox."""
        assert self._holder is not None
        return ["nsenter", f"--target={self._holder.pid}", "--mount", "--net"]

    @contextmanager
    def network(self) -> Iterator[None]:
        """Move this thread, and threads it starts, into the sandbox's network."""
        assert self._holder is not None
        libc = ctypes.CDLL(None, use_errno=True)
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        other = os.open(f"/proc/{self._holder.pid}/ns/net", os.O_RDONLY)
        try:
            if libc.setns(other, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            yield
        finally:
            libc.setns(own, CLONE_NEWNET)
            os.close(own)
            os.close(other)


@dataclass(frozen=True)
class Root:
    """A root to run commands in."""

    sandbox: Sandbox
    path: Path

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], *, uid: int = 0,
        folder: str = "/", **options: Any,
    ) -> subprocess.Popen[str]:  # fmt: skip
        """Start a command; any uid but 0 runs without a single capability."""
        words = [*self.sandbox.inside(), "chroot", str(self.path)]
        if uid:
            words += ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
            words += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        # env's own words name the variables: the programs before it need those of this machine.
        variables = [f"{name}={value}" for name, value in environment.items()]
        words += ["env", "--ignore-environment", f"--chdir={folder}", *variables, *command]
        return subprocess.Popen(words, text=True, start_new_session=True, **options)


def reason_against() -> str:
    """Why there can be no sandbox on this machine; empty if there can."""
    if os.geteuid() != 0:
        return "private roots need the rights of root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    probe = ["unshare", "--mount", "--net", "mount", "-t", "tmpfs", "probe", "/mnt"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "namespaces are not allowed here"
    return ""
