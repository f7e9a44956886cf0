"""Which commit the code is, if it is one: asked of git, and held against every file of the package as it lies here."""

import hashlib
import io
import os
import re
import subprocess
import tarfile
from pathlib import Path

from rlroute.sources import PACKAGE, TABLE, WINGS, digest, of_core, package_files


def commit_of(package: Path = PACKAGE) -> tuple[str | None, bool | None]:
    """Return the commit of a package's repository, and whether the package's code here differs from it.

    A file that the commit lacks makes it differ, whether git ignores it or not, and so does one that only the commit
    has. (None, None) where there is no repository, or somebody else's, whose commit does not hold the package.
    """
    wings = [(package / wing).resolve() for wing in WINGS]
    try:
        root, head = _git(package, "rev-parse", "--show-toplevel", "HEAD").decode().split("\n")[:2]
        folders = [folder.relative_to(root).as_posix() for folder in (package, *wings)]
        listed = _git(package, "ls-tree", "-r", "-z", "--full-tree", head, "--", *folders).decode().split("\0")
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None, None
    entries = (line.partition("\t") for line in listed if line)
    there = {path: about.split()[2] for about, _, path in entries if path.endswith((".py", TABLE))}
    here = {path.relative_to(root).as_posix(): path for path in package_files(package)}
    if (package / "__init__.py").relative_to(root).as_posix() not in there:
        return None, None
    return head, here.keys() != there.keys() or any(
        _blob(path, there[name]) != there[name] for name, path in here.items()
    )


def core_sha256_at(commit: str, package: Path = PACKAGE) -> str | None:
    """Return :func:`rlroute.sources.core_sha256` of a commit; None where this repository does not hold it."""
    if not re.fullmatch("[0-9a-f]{40,64}", commit):
        return None
    try:
        archive = _git(package, "archive", "--format=tar", commit)
    except (OSError, subprocess.CalledProcessError):
        return None
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        contents = {m.name: files.extractfile(m) for m in files if m.isfile() and of_core(m.name)}
        return digest({name: file.read() for name, file in contents.items() if file})


def _git(folder: Path, *arguments: str) -> bytes:
    """Run git in a folder, whatever repository the environment names."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ("git", "--no-optional-locks", "-C", str(folder), *arguments)
    return subprocess.run(command, capture_output=True, check=True, env=environment).stdout


def _blob(path: Path, like: str) -> str:
    """Return git's id of a file's content, by the hash function of another id."""
    content = path.read_bytes()
    return hashlib.new("sha256" if len(like) == 64 else "sha1", b"blob %d\0" % len(content) + content).hexdigest()
