"""Certificates and keys: what is wrong with them is said in one line."""

from pathlib import Path

import pytest

from nanovllm.tls import ServerTls, TlsConfig, TlsError, read_authorities, read_identity
from tests.security.pki import Pki


def test_a_missing_file_is_named(pki: Pki, tmp_path: Path):
    identity = pki.issue("server")
    with pytest.raises(TlsError, match=r"cannot read .*/nothing.pem: No such file"):
        ServerTls(tmp_path / "nothing.pem", identity.key)


def test_a_key_of_another_certificate_is_refused(pki: Pki):
    one, other = pki.issue("one"), pki.issue("other")
    with pytest.raises(TlsError, match=r"the key in .*other.key does not match .*one.pem"):
        read_identity(one.cert, other.key)


@pytest.mark.parametrize("content", [b"", b"\0\1\2", b"-----BEGIN NOTHING-----\n"])
def test_a_file_without_pem_is_named(pki: Pki, content: bytes):
    identity = pki.issue("server")
    garbage = identity.cert.with_name("garbage")
    garbage.write_bytes(content)
    with pytest.raises(TlsError, match=r"garbage holds no PEM certificate"):
        read_identity(garbage, identity.key)
    with pytest.raises(TlsError, match=r"garbage holds no PEM private key"):
        read_identity(identity.cert, garbage)
    with pytest.raises(TlsError, match=r"garbage holds no valid PEM certificates"):
        read_authorities(garbage)


def test_a_damaged_certificate_is_refused(pki: Pki):
    identity = pki.issue("server")
    lines = identity.cert.read_text().splitlines()
    identity.cert.write_text("\n".join([lines[0], "AAAA" + lines[1][4:], *lines[2:]]))
    with pytest.raises(TlsError, match="is damaged") as caught:
        read_identity(identity.cert, identity.key)
    assert "\n" not in str(caught.value)


def test_an_encrypted_key_is_refused_without_asking_for_its_passphrase(pki: Pki):
    identity = pki.issue("server")
    identity.key.write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    with pytest.raises(TlsError, match="encrypted; give a key without a passphrase"):
        read_identity(identity.cert, identity.key)


def test_a_certificate_without_its_key_is_refused(pki: Pki):
    with pytest.raises(TlsError, match="come together"):
        TlsConfig(cert=pki.issue("client").cert)


def test_a_key_is_not_written_to_any_folder(pki: Pki, tmp_path: Path):
    identity = pki.issue("server")
    before = sorted(tmp_path.rglob("*"))
    read_identity(identity.cert, identity.key)
    assert sorted(tmp_path.rglob("*")) == before
