"""Files of the package index that pip is configured for, each with its sha256. Nothing of a file is run.

pip itself would run the build script of a source distribution, even to download it.
"""

import hashlib
import html
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request

#: Most bytes of a file, more than any that is fetched has.
MAX_BYTES = 2**30
SECONDS = 60  #: within which a server has to send something


def fetch(project: str, file: str, sha256: str) -> bytes:
    """
    Args:
        file: its name, as the index lists it.

    Raises:
        SystemExit: the index cannot be read, does not have the file, or has another one under that name.
    """
    page = f"{(_pip('index-url') or _default_index()).rstrip('/')}/{project}/"
    context = ssl.create_default_context(cafile=_pip("cert") or None)

    def read(url: str) -> bytes:
        try:
            with urllib.request.urlopen(url, context=context, timeout=SECONDS) as answer:
                content = answer.read(MAX_BYTES + 1)
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise SystemExit(f"{url} cannot be read ({reason}): check pip's index-url.") from None
        if len(content) > MAX_BYTES:
            raise SystemExit(
                f"{url} has more than {MAX_BYTES} bytes: set pip's index-url to an index that is trusted."
            )
        return content

    links = re.findall(r'href="([^"]+)"', read(page).decode())
    urls = [urllib.parse.urljoin(page, html.unescape(link)).partition("#")[0] for link in links]
    found = [url for url in urls if url.rpartition("/")[2] == file]
    if not found:
        raise SystemExit(f"{page} has no {file}: set pip's index-url to an index that has it.")
    content = read(found[0])
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise SystemExit(
            f"{found[0]} has the sha256 {digest} instead of {sha256}: do not use it, and find out who changed it."
        )
    return content


def _pip(option: str) -> str:
    """A setting of pip, from the environment or its files."""
    given = os.environ.get("PIP_" + option.replace("-", "_").upper())
    return given or _python("-m", "pip", "config", "get", f"global.{option}")


def _default_index() -> str:
    # In a separate process: pip and setuptools, which torch imports, conflict over distutils.
    return _python("-c", "from pip._internal.models.index import PyPI; print(PyPI.simple_url)")


def _python(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True
    ).stdout.strip()
