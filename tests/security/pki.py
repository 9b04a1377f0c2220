"""Certificates in files, as an operator would have them."""

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate with its chain, and its key."""

    cert: Path
    key: Path


class Pki:
    """One authority and what it has issued, below a directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self.ca = directory / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, *names: str, file: str | None = None) -> Identity:
        """Writes a certificate for the names; `file` overwrites that of an earlier one."""
        issued = self._authority.issue_cert(*names, key_type=trustme.KeyType.ECDSA)
        stem = file or names[0]
        identity = Identity(self._directory / f"{stem}.pem", self._directory / f"{stem}.key")
        identity.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(identity.key))
        return identity
