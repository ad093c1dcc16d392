"""A certificate authority of a test's own, made with the openssl program."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

VALID = ("20240101000000Z", "20991231000000Z")
EXPIRED = ("20240101000000Z", "20240102000000Z")

_CONFIG = """\
[ca]
default_ca = own
[own]
database = {folder}/index.txt
new_certs_dir = {folder}
rand_serial = yes
default_md = sha256
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
"""
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True)
class Certificate:
    """Two PEM files: what is shown, and what must be kept."""

    file: Path
    key: Path


class Authority:
    """Issues certificates. `file` is what its clients are to trust."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.file = folder / "authority.pem"
        self._key = folder / "authority.key"
        (folder / "openssl.cnf").write_text(_CONFIG.format(folder=folder))
        (folder / "index.txt").touch()
        _openssl("req", "-x509", *_KEY, "-days", "2", "-subj", f"/CN={folder.name}", "-keyout", self._key, "-out", self.file)

    def issue(self, host: str, between: tuple[str, str] = VALID) -> Certificate:
        """A certificate for one host name, valid between two times."""
        name = f"{host}-{between[1]}"
        made, request = Certificate(self._folder / f"{name}.pem", self._folder / f"{name}.key"), self._folder / f"{name}.csr"
        names = f"subjectAltName=DNS:{host}"
        _openssl("req", "-new", *_KEY, "-subj", f"/CN={host}", "-addext", names, "-keyout", made.key, "-out", request)
        issuer = ("-config", self._folder / "openssl.cnf", "-cert", self.file, "-keyfile", self._key)
        dates = ("-startdate", between[0], "-enddate", between[1])
        _openssl("ca", "-batch", "-notext", *issuer, *dates, "-in", request, "-out", made.file)
        return made


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
