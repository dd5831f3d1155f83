"""Downloads checked by their hash, from an address or from the package indexes pip is set up for.

pip itself cannot be asked for an sdist: it would run the package's setup.py merely to download it.
So its settings are read (index-url, extra-index-url, cert, proxy) and the file is taken from there.
"""

from __future__ import annotations

import ast
import hashlib
import html
import re
import ssl
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import (
    BaseHandler,
    HTTPBasicAuthHandler,
    HTTPPasswordMgrWithPriorAuth,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    build_opener,
)

from tqdm import tqdm

from utils.errors import one_line, printable
from utils.logger import log

TIMEOUT = 15.0  # seconds without an answer
PIP_TIMEOUT = 60.0  # seconds for pip to say how it is set up
PAGE_LIMIT = 2**24  # bytes of an index's page
BLOCK = 2**20  # bytes
SHORT = 8  # digits of a hash that are shown
PYPI = "https://pypi.org/simple"


class Unavailable(Exception):
    """An address that cannot be reached or gives something else; its message is one line."""


@dataclass(frozen=True)
class Package:
    """One file of one version of a project on package indexes."""

    project: str  # normalised name
    version: str
    file: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.project} {self.version}"


class Downloads:
    """Downloads by way of a folder for temporary files; a host that is silent is asked once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.silent: dict[str, str] = {}  # host → why

    def get(
        self, url: str, path: Path, sha256_prefix: str, opener: OpenerDirector | None = None
    ) -> None:
        """Write what an address gives to path.

        Raises Unavailable where it is not what the hash says; what path holds then is rubbish.
        """
        host, name = host_of(url), unquote(urlsplit(url).path.rsplit("/", 1)[1])
        if host in self.silent:
            raise Unavailable(self.silent[host])
        digest, received = hashlib.sha256(), 0
        try:
            response = (opener or new_opener()).open(url, timeout=TIMEOUT)
        except HTTPError as error:
            raise Unavailable(f"{host} refuses {name} ({reason(error)})") from error
        except (OSError, HTTPException, ValueError) as error:
            self.silent[host] = f"{host} cannot be reached ({reason(error)})"
            raise Unavailable(self.silent[host]) from error
        with response, path.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            log.info("downloading %s, %.0f MB, from %s", name, total / 1e6, host)
            with tqdm(
                total=total or None, unit="B", unit_scale=True, disable=None, leave=False
            ) as bar:
                while block := next_block(response, host):
                    file.write(block)
                    digest.update(block)
                    received += len(block)
                    bar.update(len(block))
        if received < total:
            raise Unavailable(f"{host} broke off after {received} of {total} bytes of {name}")
        if not digest.hexdigest().startswith(sha256_prefix):
            raise Unavailable(
                f"{host} gives another or a damaged {name} (SHA-256 "
                f"{digest.hexdigest()[:SHORT]}…, not {sha256_prefix[:SHORT]}…)"
            )

    def package(self, package: Package) -> Path:
        """The package's file, unopened, from the first of pip's indexes that gives it.

        Raises Unavailable.
        """
        path = self.folder / package.file
        if path.is_file():  # whole, as it is renamed last
            return path
        part, reasons = path.with_name(f"{path.name}.part"), []
        settings = pip_settings()
        for index in [
            settings.get("index-url", PYPI),
            *settings.get("extra-index-url", "").split(),
        ]:
            try:
                opener, address = open_index(index, settings)
                self.get(link(address, package, opener), part, package.sha256, opener)
            except Unavailable as error:
                reasons.append(str(error))
            else:
                return part.replace(path)
        raise Unavailable(f"{package} cannot be downloaded: {'; '.join(reasons)}")


def next_block(response: Any, host: str) -> bytes:
    """The next bytes of an answer, none at its end. Raises Unavailable."""
    try:
        return bytes(response.read(BLOCK))
    except (OSError, HTTPException) as error:
        raise Unavailable(f"{host} broke off ({reason(error)})") from error


def host_of(url: str) -> str:
    return urlsplit(url).hostname or urlsplit(url).path


def reason(error: Exception) -> str:
    """Why an address could not be opened, without the words that urllib puts around it."""
    return printable(str(getattr(error, "reason", "") or error)) or type(error).__name__


def new_opener(*handlers: BaseHandler) -> OpenerDirector:
    """What opens addresses; some servers refuse the name that Python's would give itself."""
    opener = build_opener(*handlers)
    opener.addheaders = [("User-Agent", "looc")]
    return opener


def pip_settings() -> dict[str, str]:
    """pip's settings by name: environment before files, `pip download`'s own before global ones."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    try:
        listing = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no pip
        return {}
    settings = {}
    for line in sorted(listing.stdout.splitlines(), reverse=True):  # :env:. is last, and prevails
        key, _, value = line.partition("=")
        with suppress(ValueError, SyntaxError):
            settings[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    return settings


def open_index(index: str, settings: Mapping[str, str]) -> tuple[OpenerDirector, str]:
    """What opens the addresses of an index as pip would, and its address without a password.

    Raises Unavailable where the settings are of no use.
    """
    parts = urlsplit(index)
    try:
        context = ssl.create_default_context(cafile=settings.get("cert"))
    except OSError as error:
        raise Unavailable(f"pip's cert {settings['cert']}: {one_line(error)}") from error
    passwords = HTTPPasswordMgrWithPriorAuth()
    netloc = parts.netloc.rpartition("@")[2]
    if parts.username is not None:
        user, password = unquote(parts.username), unquote(parts.password or "")
        root = f"{parts.scheme}://{netloc}/"
        passwords.add_password(None, root, user, password, is_authenticated=True)
    proxy = settings.get("proxy")
    opener = new_opener(
        HTTPSHandler(context=context),
        HTTPBasicAuthHandler(passwords),
        ProxyHandler({"http": proxy, "https": proxy} if proxy else None),
    )
    return opener, parts._replace(netloc=netloc).geturl()


def link(index: str, package: Package, opener: OpenerDirector) -> str:
    """Where an index has the package's file, from its page of links (PEP 503).

    Raises Unavailable.
    """
    address = f"{index.rstrip('/')}/{package.project}/"
    if urlsplit(index).scheme == "file":
        address += "index.html"
    try:
        with opener.open(address, timeout=TIMEOUT) as response:
            page, address = (
                bytes(response.read(PAGE_LIMIT)).decode(errors="replace"),
                str(response.url),
            )
    except (OSError, HTTPException, ValueError) as error:
        raise Unavailable(f"{host_of(index)} ({reason(error)})") from error
    for reference in re.findall(r"""href\s*=\s*["']([^"']+)""", page):
        url = urljoin(address, html.unescape(reference)).partition("#")[0]
        if unquote(urlsplit(url).path).endswith(f"/{package.file}"):
            return url
    raise Unavailable(f"{host_of(index)} does not have {package.file}")
