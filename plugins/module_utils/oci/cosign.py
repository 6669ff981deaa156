# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The cosign program, asked about files alone: whether this signer signed this statement about this digest, and to sign one.

It gets no credentials and does not reach the registry: what it is to check was read, and its bytes checked, before. It reaches the
network only for Sigstore's public root, and only where neither a trusted root is given nor keys alone decide.
Written against cosign 2.6 and 3.1: https://github.com/sigstore/cosign/tree/main/doc
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import shutil
import tempfile
import typing as t
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils import command
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import Manifest, canonical_json

#: The oldest release whose `verify` takes a trusted root and local files in the way used here.
MINIMUM = (2, 6, 0)
#: The predicate of a statement that says no more than "I sign this image".
SIGN_PREDICATE = "https://sigstore.dev/cosign/sign/v1"
#: Artifact type of Sigstore bundles without their version, and the annotation that tells what they say.
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle"
BUNDLE_PREDICATE = "dev.sigstore.bundle.predicateType"
#: What a bundle with an envelope is made of.
_BUNDLE_KEYS = frozenset(("mediaType", "verificationMaterial", "dsseEnvelope"))
#: cosign's short names of predicates.
PREDICATES = {
    "custom": "https://cosign.sigstore.dev/attestation/v1",
    "cyclonedx": "https://cyclonedx.org/bom",
    "link": "https://in-toto.io/Link/v1",
    "openvex": "https://openvex.dev/ns",
    "slsaprovenance": "https://slsa.dev/provenance/v0.2",
    "slsaprovenance02": "https://slsa.dev/provenance/v0.2",
    "slsaprovenance1": "https://slsa.dev/provenance/v1",
    "spdx": "https://spdx.dev/Document",
    "spdxjson": "https://spdx.dev/Document",
    "vuln": "https://cosign.sigstore.dev/attestation/vuln/v1",
}
_EMPTY_ROOT = {"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}
#: What cosign says, in words for those who did not write it.
_WORDS = (
    # First, since names out of the certificate follow.
    (r"none of the expected identities matched|no matching CertificateIdentity", "its certificate is for somebody else"),
    (r"only supported with --new-bundle-format", "cosign 2 cannot check it against a trusted root, cosign 3 can"),
    (
        r"offline verification failed|verified log entries|rekor log public key not found|unable to verify SET",
        "no proof of a trusted transparency log came with it, and insecure_ignore_tlog is not set",
    ),
    (
        r"inclusion proof|calculated root|checkpoint did not verify|does not match signed tree head|verifying log entry",
        "its proof of being in the transparency log does not hold",
    ),
    (r"transparency log .*does not match", "its entry in the transparency log is about another signature"),
    (r"outside certificate validity|checking expiry on certificate with", "it was signed while its certificate was not valid"),
    (
        r"integrated timestamps|verified signed timestamps|expected a signed timestamp",
        "nothing that is trusted says that it was signed while its certificate was valid",
    ),
    (
        r"does not include required embedded SCT|signed certificate timestamp|SCT entries",
        "its certificate has no proof of a trusted certificate log, and insecure_ignore_sct is not set",
    ),
    (
        r"leaf certificate verification failed",
        "its certificate is not by a trusted CA, or was not valid when it was signed (today, where no trusted log or timestamp says when)",
    ),
    (
        r"invalid signature when validating|accepted signatures do not match|crypto/rsa: verification error",
        "another key signed it, or it was changed",
    ),
    (r"no certificate found on signature", "it was made with a key and has no certificate"),
)
_PEM = re.compile(r"-----BEGIN (?P<kind>[A-Z ]+)-----(?P<body>.*?)-----END (?P=kind)-----", re.DOTALL)


@dataclass(frozen=True)
class Identity:
    """Who must stand in a certificate; a subject and an issuer, each as it is or as a Go regular expression."""

    subject: str = ""
    subject_regexp: str = ""
    issuer: str = ""
    issuer_regexp: str = ""

    @classmethod
    def from_params(cls, params: t.Mapping[str, t.Any]) -> Identity:
        """Read one entry of ``identities``; raises ``DeliveryError`` (config) unless it has one subject and one issuer."""
        found = cls(**{key: str(value) for key, value in params.items() if value})
        for name in ("subject", "issuer"):
            if bool(getattr(found, name)) == bool(getattr(found, f"{name}_regexp")):
                raise DeliveryError(
                    f"read the identity {found}",
                    f"it needs {name} or {name}_regexp, one of the two",
                    "A subject without its issuer could be claimed by any issuer.",
                    "config",
                )
        return found

    def __str__(self) -> str:
        return f"{self.subject or '/' + self.subject_regexp + '/'} by {self.issuer or '/' + self.issuer_regexp + '/'}"


@dataclass(frozen=True)
class Signer:
    """One whose signature counts. ``arguments`` say so to cosign; a key has a fingerprint, SHA-256 over its DER form."""

    name: str
    arguments: tuple[str, ...]
    fingerprint: str = ""


@dataclass(frozen=True)
class SigningKey:
    """A private key: the path of a file that cosign made, its content, or the URI of a key management service."""

    reference: str = field(repr=False)
    password: str = field(default="", repr=False)


@dataclass(frozen=True)
class Attachment:
    """A manifest with its blobs, by digest, all of them checked against their digests."""

    manifest: Manifest
    blobs: t.Mapping[str, bytes]


@dataclass(frozen=True)
class Checked:
    """What cosign confirmed, each as a JSON object, and in ``refusal`` what it said where it confirmed nothing."""

    statements: tuple[dict[str, t.Any], ...] = ()
    refusal: str = ""


class Cosign:
    """One program with what it is to trust. Use as a context: its files lie in a private directory that is removed at the end.

    ``timeout`` bounds each call, in seconds. Raises ``DeliveryError`` (config) for a program that is missing, too old or not cosign, for
    keys and roots that cannot be read; (transport) when it does not end, or cannot fetch Sigstore's public root.
    """

    def __init__(
        self,
        program: str = "cosign",
        trusted_root: str | None = None,
        ignore_tlog: bool = False,
        ignore_sct: bool = False,
        timeout: float = 60.0,
    ) -> None:
        self._program = program
        self._root = trusted_root
        self._ignore_tlog = ignore_tlog
        self._ignore_sct = ignore_sct
        self._timeout = timeout
        self._directory = ""
        # Sigstore's public root names one.
        self._authorities = True
        self.version = ""

    def __enter__(self) -> Cosign:
        # mkdtemp makes it 0700.
        self._directory = tempfile.mkdtemp(prefix="delivery-cosign-")
        try:
            self.version = self._ask_version()
            if self._root:
                self._authorities = bool(_read_root(self._root).get("timestampAuthorities"))
            # Names of files and of what is in them reach cosign only as absolute paths.
            self._root = os.path.abspath(self._root) if self._root else None
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    # -- signers ---------------------------------------------------------------------------------------------------

    def key(self, text: str) -> Signer:
        """The signer with this public key: the path of a PEM file, or its content."""
        where = "the public key given as text" if "-----BEGIN" in text else f"the public key {text}"
        if "-----BEGIN" not in text:
            try:
                with open(text, encoding="utf-8") as handle:
                    text = handle.read()
            except FileNotFoundError as exc:
                raise DeliveryError(
                    f"read {where}", "there is no such file on this host", "Correct the path, or give the key itself.", "config"
                ) from exc
            except (OSError, UnicodeDecodeError) as exc:
                raise DeliveryError(
                    f"read {where}",
                    getattr(exc, "strerror", None) or "it is not text",
                    "Give a readable PEM file like cosign.pub.",
                    "config",
                ) from exc
        fingerprint = key_fingerprint(text, where)
        return Signer(f"key {fingerprint}", ("--key", self._write("key.pub", text.encode())), fingerprint)

    def identity(self, identity: Identity) -> Signer:
        """The signers whose certificate says this."""
        flags = {
            "--certificate-identity": identity.subject,
            "--certificate-identity-regexp": identity.subject_regexp,
            "--certificate-oidc-issuer": identity.issuer,
            "--certificate-oidc-issuer-regexp": identity.issuer_regexp,
        }
        return Signer(f"identity {identity}", tuple(f"{flag}={value}" for flag, value in flags.items() if value))

    # -- questions -------------------------------------------------------------------------------------------------

    def signatures(self, signer: Signer, image: Manifest, signed: Attachment) -> Checked:
        """Signatures in the form of cosign 2, as ``critical`` and ``optional``."""
        # Such a layout never holds bundles; without the flag cosign 3 may look for nothing else.
        result = self._run(
            "verify", signer, ["--new-bundle-format=false", "--output=json", "--local-image", self._layout(image, signed, "sigs")]
        )
        if not result.ok:
            return Checked(refusal=_said(result))
        return Checked(tuple(_objects(_json(result.stdout))))

    def attestations(self, signer: Signer, image: Manifest, attested: Attachment, predicate: str) -> Checked:
        """Attestations of one predicate in the form of cosign 2, as in-toto statements."""
        layout = self._layout(image, attested, "atts")
        result = self._run("verify-attestation", signer, ["--new-bundle-format=false", f"--type={predicate}", "--local-image", layout])
        if not result.ok:
            return Checked(refusal=_said(result))
        envelopes = _objects([_json(line) for line in result.stdout.splitlines()])
        return Checked(tuple(statement for statement in map(statement_of, envelopes) if statement is not None))

    def bundle(self, signer: Signer, digest: str, bundle: bytes, predicate: str) -> Checked:
        """One Sigstore bundle (signature or attestation), as an in-toto statement."""
        algorithm, value = digest.split(":", 1)
        path = self._write("bundle.json", bundle)
        # Without being told that it is a bundle, cosign 2 takes one that it cannot read for something else, and says so.
        arguments = ["--new-bundle-format=true", "--bundle", path, f"--type={predicate}", f"--digest={value}", f"--digestAlg={algorithm}"]
        content = _json(bundle)
        if not isinstance(content, dict):
            return Checked(refusal="the bundle is not a JSON object")
        if not _BUNDLE_KEYS.issuperset(content):
            # cosign 3 reads it in its older format then, and would confirm another envelope than the one that is read here.
            return Checked(refusal=f"the bundle holds what no bundle holds: {', '.join(sorted(set(content) - _BUNDLE_KEYS))[:100]}")
        material = content.get("verificationMaterial")
        if self.version.startswith("v3.") and isinstance(material, dict) and "x509CertificateChain" in material:
            # What cosign 3 writes for a certificate that it was given with its chain, and does not read without being told.
            arguments.append("--allow-certificate-chain=true")
        if not signer.fingerprint and isinstance(material, dict) and self._timed_by_authority(material):
            arguments.append("--use-signed-timestamps=true")
        result = self._run("verify-blob-attestation", signer, arguments)
        if not result.ok and "only supported with --new-bundle-format" in result.stderr:
            return Checked(refusal="cosign cannot read the bundle; does the log's entry lack its inclusion proof?")
        if not result.ok:
            return Checked(refusal=_said(result))
        statement = statement_of(content.get("dsseEnvelope"))
        return Checked((statement,)) if statement is not None else Checked(refusal="the bundle holds no statement")

    def _timed_by_authority(self, material: t.Mapping[str, t.Any]) -> bool:
        """Whether only a timestamp (RFC 3161) can say when it was signed; then cosign 2 has to be told to look at it.

        cosign 3 decides the same for entries of Rekor 2, which give no time. Where no log is asked, a timestamp counts if the trusted root
        names authorities; else the certificate has to be valid today.
        """
        stamps = material.get("timestampVerificationData")
        if not isinstance(stamps, dict) or not stamps.get("rfc3161Timestamps"):
            return False
        if self._ignore_tlog:
            return self._authorities
        return all(str(entry.get("integratedTime") or "0") == "0" for entry in _objects(material.get("tlogEntries")))

    def sign(self, key: SigningKey, subject: str, digest: str, predicate: str, content: t.Mapping[str, t.Any]) -> bytes:
        """A Sigstore bundle in which ``key`` says ``content``, of the type ``predicate``, about ``digest``, known by the name ``subject``.

        No transparency log is written. Raises ``DeliveryError`` (config) when cosign cannot sign with this key.
        Source: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
        """
        algorithm, value = digest.split(":", 1)
        statement = {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"name": subject, "digest": {algorithm: value}}],
            "predicateType": predicate,
            "predicate": dict(content),
        }
        place = self._write("signing.key", key.reference.encode()) if "-----BEGIN" in key.reference else key.reference
        bundle = self._write("made.json", b"")
        told = self._write("statement.json", canonical_json(statement))
        argv = [self._program, "attest-blob", "--yes", "--key", place, "--statement", told, "--new-bundle-format=true"]
        argv += ["--bundle", bundle, "--tlog-upload=false", "--use-signing-config=false"]
        # Without a password in the environment cosign would ask for one.
        result = self._call(argv, {"COSIGN_PASSWORD": key.password})
        with open(bundle, "rb") as handle:
            made = handle.read()
        if not result.ok or not made:
            raise DeliveryError("sign with cosign and the given key", _said(result), "Check the key and its password.", "config")
        return made

    # -- the program -----------------------------------------------------------------------------------------------

    def _run(self, action: str, signer: Signer, arguments: t.Sequence[str]) -> command.CommandResult:
        # --offline: a proof of the transparency log counts when it came with the signature; the log itself is not asked.
        argv = [self._program, action, "--offline=true", *signer.arguments]
        if self._ignore_tlog:
            argv.append("--insecure-ignore-tlog=true")
        if self._ignore_sct and not signer.fingerprint:
            argv.append("--insecure-ignore-sct=true")
        root = self._root
        if not root and signer.fingerprint and self._ignore_tlog:
            # Nothing but the key decides, yet cosign would fetch Sigstore's public root.
            root = self._write("root.json", json.dumps(_EMPTY_ROOT).encode())
        if root:
            argv += ["--trusted-root", root]
        result = self._call([*argv, *arguments])
        if not result.ok:
            self._raise_if_unable(action, result)
        return result

    def _call(self, argv: t.Sequence[str], secrets: t.Mapping[str, str] | None = None) -> command.CommandResult:
        # Its settings from the environment would be trust that no option of ours has asked for.
        settings = {name: "" for name in os.environ if name.startswith(("COSIGN_", "SIGSTORE_"))}
        settings.update(secrets or {})
        tried = f"run {self._program} {argv[1]}"
        try:
            result = command.run(argv, timeout=self._timeout, env=settings)
        except FileNotFoundError as exc:
            raise DeliveryError(
                tried,
                "the program is not installed",
                f"Install cosign {_dotted(MINIMUM)} or newer, or name it in cosign_program.",
                "config",
            ) from exc
        except PermissionError as exc:
            raise DeliveryError(tried, "it may not be executed", "Correct its permissions or cosign_program.", "config") from exc
        if result.timed_out:
            raise DeliveryError(
                tried,
                f"it did not end within {self._timeout:g} s",
                "Without trusted_root it fetches Sigstore's public root; where that cannot be reached, give trusted_root.",
                "transport",
            )
        return result

    def _ask_version(self) -> str:
        result = self._call([self._program, "version", "--json"])
        try:
            version = str(json.loads(result.stdout)["gitVersion"])
        except (ValueError, KeyError, TypeError) as exc:
            raise DeliveryError(
                f"ask {self._program} for its version", "it does not answer like cosign", "Correct cosign_program.", "config"
            ) from exc
        numbers = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
        # A build without a version calls itself "devel": whoever built it knows.
        if numbers and tuple(map(int, numbers.groups())) < MINIMUM:
            raise DeliveryError(
                f"use {self._program}",
                f"it is cosign {version}",
                f"Install cosign {_dotted(MINIMUM)} or newer, or name it in cosign_program.",
                "config",
            )
        return version

    def _raise_if_unable(self, action: str, result: command.CommandResult) -> None:
        """Sort out what says nothing about the signature: options that mean nothing, a root that cannot be had."""
        said = _said(result)
        tried = f"run {self._program} {action}"
        if re.search(r"loading public key|unsupported key|error parsing regexp|malformed (issuer|subject)|loading trusted root", said):
            raise DeliveryError(tried, said, "Correct keys, identities or trusted_root.", "config")
        if re.search(r"unknown (flag|command)", said):
            raise DeliveryError(tried, said, f"cosign {self.version} is not one that is known here; use 2.6 or 3.1.", "config")
        if re.search(r"\bTUF\b|tuf-repo|updating local metadata", result.stderr) and not self._root:
            raise DeliveryError(
                tried,
                "it could not fetch Sigstore's public root",
                "Give trusted_root; or, where only keys count and no transparency log was written, insecure_ignore_tlog.",
                "transport",
            )

    # -- files -----------------------------------------------------------------------------------------------------

    def _write(self, name: str, content: bytes) -> str:
        descriptor, path = tempfile.mkstemp(suffix=f"-{name}", dir=self._directory)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
        return path

    def _layout(self, image: Manifest, attached: Attachment, kind: str) -> str:
        """What `cosign save` would have written, without the image's own layers: no check reads them."""
        path = tempfile.mkdtemp(suffix="-layout", dir=self._directory)
        blobs = {image.digest: image.body, attached.manifest.digest: attached.manifest.body, **attached.blobs}
        os.makedirs(os.path.join(path, "blobs", "sha256"))
        for digest, content in blobs.items():
            with open(os.path.join(path, "blobs", *digest.split(":", 1)), "wb") as handle:
                handle.write(content)
        listed = []
        for manifest, name in ((image, "imageIndex" if image.is_index else "image"), (attached.manifest, kind)):
            listed.append({**manifest.descriptor().as_json(), "annotations": {"kind": f"dev.cosignproject.cosign/{name}"}})
        for name, value in (("oci-layout", {"imageLayoutVersion": "1.0.0"}), ("index.json", {"schemaVersion": 2, "manifests": listed})):
            with open(os.path.join(path, name), "w", encoding="utf-8") as text:
                json.dump(value, text)
        return path


def key_fingerprint(text: str, where: str) -> str:
    """``sha256:<hex>`` of a public key in PEM; raises ``DeliveryError`` (config) for anything else."""
    match = _PEM.search(text)
    kind = match.group("kind") if match else ""
    if "PRIVATE KEY" in kind:
        raise DeliveryError(
            f"read {where}", "it is a private key", "Give the public one, cosign.pub, and keep the other where it signs.", "config"
        )
    try:
        if not match or not kind.endswith("PUBLIC KEY"):
            raise ValueError
        der = base64.b64decode("".join(match.group("body").split()), validate=True)
    except (ValueError, binascii.Error) as exc:
        raise DeliveryError(f"read {where}", "it is not a public key in PEM", "Give a file like cosign.pub.", "config") from exc
    return f"sha256:{hashlib.sha256(der).hexdigest()}"


def statement_of(envelope: t.Any) -> dict[str, t.Any] | None:
    """The in-toto statement in a DSSE envelope, ``None`` where there is none. Whether it was signed is not asked."""
    try:
        statement = json.loads(base64.b64decode(envelope["payload"], validate=True))
    except (ValueError, TypeError, KeyError):
        return None
    return statement if isinstance(statement, dict) else None


def subjects_of(statement: t.Mapping[str, t.Any]) -> set[str]:
    """The digests that an in-toto statement is about."""
    subjects = statement.get("subject")
    found = [item.get("digest") for item in subjects if isinstance(item, dict)] if isinstance(subjects, list) else []
    return {f"{algorithm}:{value}" for digest in found if isinstance(digest, dict) for algorithm, value in digest.items()}


def certificate_names(der: bytes) -> tuple[str, str]:
    """Subject and OIDC issuer in a Fulcio certificate, empty where they are not read.

    For a report about a certificate that cosign has accepted, never for a decision: it looks for the two extensions and does not parse
    the rest. OIDs: https://github.com/sigstore/fulcio/blob/main/docs/oid-info.md
    """
    subject = ""
    names = _extension(der, b"\x06\x03\x55\x1d\x11")
    if names:
        _tag, value, _rest = _tlv(names)
        tag, first, _rest = _tlv(value)
        # otherName, rfc822Name, dNSName, uniformResourceIdentifier
        subject = first.decode(errors="replace") if tag in (0x81, 0x82, 0x86) else ""
    issuer = _extension(der, b"\x06\x0a\x2b\x06\x01\x04\x01\x83\xbf\x30\x01\x08")
    if issuer:
        return subject, _tlv(issuer)[1].decode(errors="replace")
    return subject, (_extension(der, b"\x06\x0a\x2b\x06\x01\x04\x01\x83\xbf\x30\x01\x01") or b"").decode(errors="replace")


def _extension(der: bytes, oid: bytes) -> bytes | None:
    position = der.find(oid)
    if position < 0:
        return None
    tag, value, rest = _tlv(der[position + len(oid) :])
    if tag == 0x01:  # critical
        tag, value, rest = _tlv(rest)
    return value if tag == 0x04 else None


def _tlv(data: bytes) -> tuple[int, bytes, bytes]:
    """Tag, value and what follows; empty where the bytes end early."""
    if len(data) < 2:
        return 0, b"", b""
    length, start = data[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(data[2:start], "big")
    return data[0], data[start : start + length], data[start + length :]


def _objects(values: t.Any) -> list[dict[str, t.Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _json(text: str | bytes) -> t.Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _said(result: command.CommandResult) -> str:
    """The reason in what cosign wrote: behind ``Error:``, without its warnings and without saying it twice."""
    text = result.stderr.partition("Error: ")[2] or result.last_lines(2)
    lines = [line.strip() for line in text.splitlines()]
    kept = []
    for line in lines:
        if "error during command execution" in line:
            break
        if line and line not in kept:
            kept.append(line)
    # Hashes in Go's words, a number for each byte, tell nobody anything.
    told = re.sub(r"\[\d+( \d+){15,}\]", "[…]", "; ".join(kept))
    said = re.sub(r"^no matching (signatures|attestations): ", "", told)[:600] or f"it ended with exit code {result.code}"
    words = next((words for pattern, words in _WORDS if re.search(pattern, said)), "")
    return f"{words}; cosign: {said}" if words else said


def _read_root(path: str) -> dict[str, t.Any]:
    tried = f"read the trusted root {path}"
    try:
        with open(path, encoding="utf-8") as handle:
            content = json.load(handle)
    except OSError as exc:
        raise DeliveryError(
            tried, exc.strerror or str(exc), "Correct trusted_root; the file is looked for on this host.", "config"
        ) from exc
    except ValueError as exc:
        raise DeliveryError(tried, "it is not JSON", "Give the file that `cosign trusted-root create` writes.", "config") from exc
    if not isinstance(content, dict):
        raise DeliveryError(tried, "it is not a JSON object", "Give the file that `cosign trusted-root create` writes.", "config")
    return content


def _dotted(version: t.Sequence[int]) -> str:
    return ".".join(map(str, version))
