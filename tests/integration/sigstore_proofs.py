# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A Sigstore instance of our own: what Fulcio, its certificate log, Rekor and a timestamp authority would have said, at any time.

Tests have no network and need proofs that are wrong in one place, so nothing here runs as a service; every proof is made when it is needed.

- certificate: https://github.com/sigstore/fulcio/blob/main/docs/certificate-specification.md and docs/oid-info.md
- its proof (SCT): RFC 6962, section 3.2 and 3.3
- log entry: https://github.com/sigstore/rekor/tree/main/pkg/types (dsse 0.0.1, hashedrekord 0.0.1), the inclusion promise in
  https://github.com/sigstore/rekor/blob/main/pkg/verify/verify.go, tree and path: RFC 6962, section 2.1
- checkpoint: https://github.com/transparency-dev/formats/blob/main/log/README.md
- envelope: https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
- bundle and trusted root: https://github.com/sigstore/protobuf-specs/tree/main/protos
- timestamp: RFC 3161, by openssl
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import struct
import subprocess
import typing as t
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
IN_TOTO = "application/vnd.in-toto+json"
#: When things are signed unless a test says otherwise: long enough ago that each certificate has expired.
LONG_AGO = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.timezone.utc)
MINUTE = datetime.timedelta(minutes=1)
#: Name of the log, which is the host that the trusted root gives for it.
REKOR = "rekor.example.com"
_INDEX = 4711
_ALWAYS = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc), datetime.datetime(2049, 1, 1, tzinfo=datetime.timezone.utc)
_SCT_LIST = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_ISSUER = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_ISSUER_V2 = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.8")


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public key in DER, which logs and certificates are known by."""
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    return key.sign(message, ec.ECDSA(hashes.SHA256()))


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def canonical(value: t.Any) -> bytes:
    """RFC 8785, for what occurs here: ASCII and whole numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


@dataclass(frozen=True)
class Log:
    """A log by its key. ``known_as``: the key of another log that it pretends to be."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    known_as: ec.EllipticCurvePrivateKey | None = None

    @property
    def id(self) -> bytes:
        return hashlib.sha256(spki(self.known_as or self.key)).digest()

    def trusted(self, url: str) -> dict[str, t.Any]:
        public = {"rawBytes": b64(spki(self.key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": {"start": _ALWAYS[0].isoformat()}}
        return {"baseUrl": url, "hashAlgorithm": "SHA2_256", "publicKey": public, "logId": {"keyId": b64(self.id)}}


class Authority:
    """A root and an intermediate that issues, as Fulcio and the timestamp authority have them."""

    def __init__(self, name: str, usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CODE_SIGNING) -> None:
        root_key, self.key = new_key(), new_key()
        self.name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "test"), x509.NameAttribute(NameOID.COMMON_NAME, name)])
        root_name = x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "test"), x509.NameAttribute(NameOID.COMMON_NAME, f"{name} root")]
        )
        root = self._ca(root_name, root_key, root_name, root_key, None)
        self.chain = [self._ca(self.name, self.key, root_name, root_key, usage), root]

    @staticmethod
    def _ca(
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        issuer: x509.Name,
        issuer_key: ec.EllipticCurvePrivateKey,
        usage: x509.ObjectIdentifier | None,
    ) -> x509.Certificate:
        builder = certificate_builder(subject, key, issuer, issuer_key, *_ALWAYS, signs_certificates=True)
        if usage:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    def trusted(self, url: str, *first: x509.Certificate) -> dict[str, t.Any]:
        certificates = [{"rawBytes": b64(der(item))} for item in (*first, *self.chain)]
        names = {"organization": "test", "commonName": "test"}
        return {"subject": names, "uri": url, "certChain": {"certificates": certificates}, "validFor": {"start": _ALWAYS[0].isoformat()}}


def certificate_builder(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    begin: datetime.datetime,
    end: datetime.datetime,
    signs_certificates: bool = False,
) -> x509.CertificateBuilder:
    usages = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only", "decipher_only"),
        False,
    )
    usage = x509.KeyUsage(digital_signature=not signs_certificates, key_cert_sign=signs_certificates, **usages)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(begin).not_valid_after(end)
    builder = builder.add_extension(usage, critical=True)
    if signs_certificates:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)


class Timestamps:
    """An authority that says what it saw and when. It is openssl, so when is now."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        authority = Authority("timestamps", ExtendedKeyUsageOID.TIME_STAMPING)
        key = new_key()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "timestamps")])
        builder = certificate_builder(subject, key, authority.name, authority.key, *_ALWAYS)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), critical=True)
        signer = builder.sign(authority.key, hashes.SHA256())
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (directory / "tsa.pem").write_bytes(pem(signer))
        (directory / "tsa.key").write_bytes(private)
        (directory / "tsa.cnf").write_text(
            "[tsa]\ndefault_tsa = ours\n[ours]\nserial = tsa.serial\ndefault_policy = 1.3.6.1.4.1.57264.2\n"
            "digests = sha256\nsigner_digest = sha256\ness_cert_id_alg = sha256\n"
        )
        #: How a trusted root names it.
        self.trusted = authority.trusted("https://tsa.example.com", signer)

    def answer(self, message: bytes) -> bytes:
        (self.directory / "message").write_bytes(message)
        self._openssl("-query", "-data", "message", "-sha256", "-cert", "-out", "query")
        self._openssl("-reply", "-config", "tsa.cnf", "-queryfile", "query", "-signer", "tsa.pem", "-inkey", "tsa.key", "-out", "answer")
        return (self.directory / "answer").read_bytes()

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", "ts", *arguments], cwd=self.directory, check=True, capture_output=True)


@dataclass(frozen=True)
class Sigstore:
    """One instance; with ``dataclasses.replace`` one that differs from it in a single part.

    ``certificate_log``: ``None`` for a CA that has none.
    """

    ca: Authority = field(default_factory=lambda: Authority("signing CA"))
    certificate_log: Log | None = field(default_factory=Log)
    log: Log = field(default_factory=Log)

    def trusted_root(self, path: Path, **more: t.Any) -> str:
        """Write what those trust who trust this instance, and return where."""
        root = {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "certificateAuthorities": [self.ca.trusted("https://fulcio.example.com")],
            "ctlogs": [self.certificate_log.trusted("https://ctfe.example.com")] if self.certificate_log else [],
            "tlogs": [self.log.trusted(f"https://{REKOR}")],
            **more,
        }
        path.write_text(json.dumps(root))
        return str(path)

    # -- the certificate -------------------------------------------------------------------------------------------

    def certificate(
        self, key: ec.EllipticCurvePrivateKey, mail: str, issuer: str, begin: datetime.datetime, end: datetime.datetime
    ) -> x509.Certificate:
        """As Fulcio issues them: no subject, the identity and who vouched for it as extensions, and valid for minutes."""
        builder = certificate_builder(x509.Name([]), key, self.ca.name, self.ca.key, begin, end)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.RFC822Name(mail)]), critical=True)
        text = issuer.encode()
        builder = builder.add_extension(x509.UnrecognizedExtension(_ISSUER, text), critical=False)
        builder = builder.add_extension(x509.UnrecognizedExtension(_ISSUER_V2, b"\x0c" + bytes([len(text)]) + text), critical=False)
        certificate = builder.sign(self.ca.key, hashes.SHA256())
        if self.certificate_log is None:
            return certificate
        # What the log signs is the certificate without the list of SCTs, and so just what was issued first.
        proof = self._sct(self.certificate_log, certificate.tbs_certificate_bytes, begin)
        listed = struct.pack(">HH", len(proof) + 2, len(proof)) + proof
        octets = b"\x04" + (bytes([len(listed)]) if len(listed) < 128 else bytes([0x81, len(listed)])) + listed
        return builder.add_extension(x509.UnrecognizedExtension(_SCT_LIST, octets), critical=False).sign(self.ca.key, hashes.SHA256())

    def _sct(self, log: Log, precertificate: bytes, moment: datetime.datetime) -> bytes:
        # version 1, certificate_timestamp; at the end no extensions.
        time = struct.pack(">Q", int(moment.timestamp() * 1000))
        entry = struct.pack(">H", 1) + hashlib.sha256(spki(self.ca.key)).digest() + len(precertificate).to_bytes(3, "big") + precertificate
        signature = sign(log.key, b"\0\0" + time + entry + b"\0\0")
        return b"\0" + log.id + time + b"\0\0" + b"\x04\x03" + struct.pack(">H", len(signature)) + signature

    # -- the log ---------------------------------------------------------------------------------------------------

    def _proof(self, body: bytes, origin: str) -> dict[str, t.Any]:
        """Of a tree of two leaves; the other one is somebody else's."""
        leaf, other = (hashlib.sha256(b"\0" + content).digest() for content in (body, b"another entry"))
        root = hashlib.sha256(b"\1" + other + leaf).digest()
        note = f"{origin}\n2\n{b64(root)}\n"
        signed = hashlib.sha256(spki(self.log.key)).digest()[:4] + sign(self.log.key, note.encode())
        checkpoint = {"envelope": f"{note}\n\u2014 {REKOR} {b64(signed)}\n"}
        return {"logIndex": "1", "rootHash": b64(root), "treeSize": "2", "hashes": [b64(other)], "checkpoint": checkpoint}

    def _entry(self, kind: str, spec: t.Mapping[str, t.Any], moment: datetime.datetime) -> dict[str, t.Any]:
        """An entry of Rekor 1 with promise and proof; the promise is what vouches for the time."""
        body = canonical({"apiVersion": "0.0.1", "kind": kind, "spec": spec})
        time = int(moment.timestamp())
        promised = canonical({"body": b64(body), "integratedTime": time, "logID": self.log.id.hex(), "logIndex": _INDEX})
        return {
            "logIndex": str(_INDEX),
            "logId": {"keyId": b64(self.log.id)},
            "kindVersion": {"kind": kind, "version": "0.0.1"},
            "integratedTime": str(time),
            "inclusionPromise": {"signedEntryTimestamp": b64(sign(self.log.key, promised))},
            # Rekor 1 calls its trees "<host> - <number>", and is known for that.
            "inclusionProof": self._proof(body, f"{REKOR} - 1234"),
            "canonicalizedBody": b64(body),
        }

    def _entry_of_rekor_2(self, message: bytes, signature: bytes, certificate: x509.Certificate) -> dict[str, t.Any]:
        """It has no time and promises nothing."""
        verifier = {"keyDetails": "PKIX_ECDSA_P256_SHA_256", "x509Certificate": {"rawBytes": b64(der(certificate))}}
        data = {"algorithm": "SHA2_256", "digest": b64(hashlib.sha256(message).digest())}
        spec = {"hashedRekordV002": {"data": data, "signature": {"content": b64(signature), "verifier": verifier}}}
        body = canonical({"apiVersion": "0.0.2", "kind": "hashedrekord", "spec": spec})
        return {
            "logIndex": "1",
            "logId": {"keyId": b64(self.log.id)},
            "kindVersion": {"kind": "hashedrekord", "version": "0.0.2"},
            "inclusionProof": self._proof(body, REKOR),
            "canonicalizedBody": b64(body),
        }

    # -- what is signed --------------------------------------------------------------------------------------------

    def bundle(
        self,
        mail: str,
        issuer: str,
        statement: t.Mapping[str, t.Any],
        moment: datetime.datetime = LONG_AGO,
        logged: datetime.datetime | None = None,
        timestamps: Timestamps | None = None,
        lasting: datetime.timedelta = 10 * MINUTE,
        rekor: int = 1,
    ) -> dict[str, t.Any]:
        """A statement signed at ``moment``, and written to a log of this version of ``rekor`` then, or when ``logged`` says.

        The certificate began a minute before. ``timestamps`` know only the present, which then is the moment.
        """
        key, payload = new_key(), canonical(statement)
        message = b"DSSEv1 %d %s %d %s" % (len(IN_TOTO), IN_TOTO.encode(), len(payload), payload)
        signature = sign(key, message)
        material: dict[str, t.Any] = {}
        if timestamps:
            material["timestampVerificationData"] = {"rfc3161Timestamps": [{"signedTimestamp": b64(timestamps.answer(signature))}]}
            moment = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
        certificate = self.certificate(key, mail, issuer, moment - MINUTE, moment - MINUTE + lasting)
        envelope = {"payload": b64(payload), "payloadType": IN_TOTO, "signatures": [{"sig": b64(signature)}]}
        material["certificate"] = {"rawBytes": b64(der(certificate))}
        if rekor == 1:
            spec = {
                "envelopeHash": {"algorithm": "sha256", "value": hashlib.sha256(canonical(envelope)).hexdigest()},
                "payloadHash": {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()},
                "signatures": [{"signature": b64(signature), "verifier": b64(pem(certificate))}],
            }
            material["tlogEntries"] = [self._entry("dsse", spec, logged or moment)]
        elif rekor == 2:
            material["tlogEntries"] = [self._entry_of_rekor_2(message, signature, certificate)]
        return {"mediaType": BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope}

    def signature_of_cosign_2(
        self, mail: str, issuer: str, payload: bytes, moment: datetime.datetime = LONG_AGO, logged: datetime.datetime | None = None
    ) -> dict[str, str]:
        """The same about a payload of cosign 2: the annotations that it writes beside it."""
        key = new_key()
        certificate = self.certificate(key, mail, issuer, moment - MINUTE, moment + 9 * MINUTE)
        signature = b64(sign(key, payload))
        digest = {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()}
        spec = {"data": {"hash": digest}, "signature": {"content": signature, "publicKey": {"content": b64(pem(certificate))}}}
        return self._annotations(signature, certificate, self._entry("hashedrekord", spec, logged or moment))

    def attestation_of_cosign_2(self, bundle: t.Mapping[str, t.Any]) -> tuple[bytes, dict[str, str]]:
        """What cosign 2 would have written in place of a bundle: the envelope, and the annotations beside it."""
        material = bundle["verificationMaterial"]
        certificate = x509.load_der_x509_certificate(base64.b64decode(material["certificate"]["rawBytes"]))
        return canonical(bundle["dsseEnvelope"]), self._annotations("", certificate, material["tlogEntries"][0])

    def _annotations(self, signature: str, certificate: x509.Certificate, entry: t.Mapping[str, t.Any]) -> dict[str, str]:
        promised = {
            "body": entry["canonicalizedBody"],
            "integratedTime": int(entry["integratedTime"]),
            "logIndex": int(entry["logIndex"]),
            "logID": self.log.id.hex(),
        }
        bundle = {"SignedEntryTimestamp": entry["inclusionPromise"]["signedEntryTimestamp"], "Payload": promised}
        return {
            "dev.cosignproject.cosign/signature": signature,
            "dev.sigstore.cosign/certificate": pem(certificate).decode(),
            "dev.sigstore.cosign/chain": "".join(pem(item).decode() for item in self.ca.chain),
            "dev.sigstore.cosign/bundle": json.dumps(bundle),
        }
