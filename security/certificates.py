"""Certificates for TLS: a federation's authority, the server certificates it issues, a gossip node's self-signed one.

Private keys are made in the folder where they are used, readable by their owner alone, and never overwritten. Knows
nothing of servers, nodes or sockets.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core_training.foundation.bounded_reading import ForeignTextError, read_bounded, reason_of
from core_training.foundation.errors import InputError
from security.private_files import LARGEST_KEY_FILE, make_private_folder, read_private_file, write_private_file

AUTHORITY_CERTIFICATE = "ca.crt"
AUTHORITY_KEY = "ca.key"
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")

ENDS_SOON_DAYS = 30
"""Days before a certificate's last one from which on status commands speak of it."""

_CLOCK_SKEW = timedelta(minutes=10)
_LONGEST_COMMON_NAME = 64


@dataclass(frozen=True)
class CertificateFiles:
    """The files of a certificate (PEM) and its private key (PEM, PKCS 8)."""

    certificate: Path
    key: Path


def create_authority(folder: Path, name: str = "fedloom federation", days: int = 3650) -> CertificateFiles:
    """Make a certificate authority in `folder`: `ca.crt`, to hand out, and `ca.key`, which stays there.

    Raises InputError when the folder has an authority already.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(name)
    builder = (
        _builder(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return _write(builder.sign(key, hashes.SHA256()), key, folder, "ca")


def issue_server_certificate(
    authority_folder: Path,
    hosts: Sequence[str],
    folder: Path | None = None,
    name: str = "server",
    days: int = 825,
) -> CertificateFiles:
    """Make `<name>.crt` and `<name>.key` in `folder` (default: the authority's), signed by the authority.

    `hosts` are the DNS names and IP addresses that clients will dial; this machine's own are always added.
    Raises InputError when the authority is missing or unusable, or the key is there already.
    """
    authority = load_certificate(authority_folder / AUTHORITY_CERTIFICATE)
    authority_key = load_private_key(authority_folder / AUTHORITY_KEY)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _leaf(authority.subject, key.public_key(), hosts[0] if hosts else name, hosts, days)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
    )
    return _write(builder.sign(authority_key, hashes.SHA256()), key, folder or authority_folder, name)


def create_node_certificate(
    folder: Path, name: str, hosts: Sequence[str] = (), days: int = 825, now: datetime | None = None
) -> CertificateFiles:
    """Make `node.crt` and `node.key` in `folder`: self-signed, valid for the node's name, `hosts` and this machine.

    The certificate is no authority: who trusts it trusts this one node, and nothing that the node might sign.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _leaf(_subject(name), key.public_key(), name, [name, *hosts], days, now)
    return _write(builder.sign(key, hashes.SHA256()), key, folder, "node")


def load_certificate(path: Path, authority: x509.Certificate | None = None) -> x509.Certificate:
    """Read a certificate file and check it as `parse_certificate` does."""
    return parse_certificate(_pem(path), source=str(path), authority=authority)


def parse_certificate(
    pem: bytes, source: str, authority: x509.Certificate | None = None, now: datetime | None = None
) -> x509.Certificate:
    """Read one PEM certificate that is valid now and, when `authority` is given, issued by it.

    `source` names it in errors. Raises InputError for a malformed, expired, not yet valid or foreign certificate.
    """
    certificate = _certificate(pem, source)
    now = now or datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise InputError(
            f"{source}: the certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}; issue a new one"
        )
    if now < certificate.not_valid_before_utc:
        raise InputError(
            f"{source}: the certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on; "
            "is this machine's clock right?"
        )
    if authority is not None:
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            raise InputError(
                f"{source}: the certificate is foreign: this federation's authority did not issue it"
            ) from None
    return certificate


def last_day(path: Path) -> date:
    """The last day (UTC) of a certificate file, past or to come. Raises InputError for a file that holds none."""
    return _certificate(_pem(path), source=str(path)).not_valid_after_utc.date()


def ends_soon(path: Path, today: date | None = None) -> str | None:
    """What to say of a certificate that ends within `ENDS_SOON_DAYS`, or has ended; None of another."""
    last = last_day(path)
    days = (last - (today or datetime.now(UTC).date())).days
    if days > ENDS_SOON_DAYS:
        return None
    when = f"ends on {last}, in {days} days" if days >= 0 else f"ended on {last}"
    return f"{path}: the certificate {when}; issue a new one and hand it out (docs/deploy.md)"


def load_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read an elliptic-curve private key that only its owner may read. Raises InputError on anything else."""
    data = read_private_file(path)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        raise InputError(f"{path}: this is not an unencrypted PEM private key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path}: this is not an elliptic-curve private key")
    return key


def common_name(certificate: x509.Certificate) -> str:
    """The name that the certificate was made out to; empty when it has none."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def to_pem(certificate: x509.Certificate) -> bytes:
    """The certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem(path: Path) -> bytes:
    try:
        return read_bounded(path, LARGEST_KEY_FILE)
    except (OSError, ForeignTextError) as error:
        raise InputError(f"{path}: the certificate cannot be read: {reason_of(error)}") from None


def _certificate(pem: bytes, source: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise InputError(f"{source}: this is not a PEM certificate (-----BEGIN CERTIFICATE-----)") from None


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:_LONGEST_COMMON_NAME])])


def _builder(
    issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int, now: datetime | None = None
) -> x509.CertificateBuilder:
    start = now or datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _CLOCK_SKEW)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _leaf(
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    name: str,
    hosts: Sequence[str],
    days: int,
    now: datetime | None = None,
) -> x509.CertificateBuilder:
    alternatives = [_alternative_name(host) for host in dict.fromkeys([*hosts, *THIS_MACHINE])]
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        _builder(issuer, _subject(name), key, days, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    )


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise InputError(f"'{host}': a host is an IP address or a DNS name in ASCII letters") from None


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, folder: Path, name: str) -> CertificateFiles:
    make_private_folder(folder)
    files = CertificateFiles(folder / f"{name}.crt", folder / f"{name}.key")
    write_private_file(
        files.key,
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    files.certificate.write_bytes(to_pem(certificate))
    return files
