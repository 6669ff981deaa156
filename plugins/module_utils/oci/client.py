# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One registry: its manifests, blobs and uploads, with every error said in words."""

from __future__ import annotations

import json
import re
import threading
import typing as t
from dataclasses import replace
from urllib.parse import quote, urlencode, urljoin, urlsplit

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.auth import (
    Authenticator,
    find_credentials,
    parse_challenges,
    refused_credentials,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import ACCEPT, Descriptor, Manifest
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import DOCKER_HUB, Reference, digest_of
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.transport import (
    Interrupted,
    Origin,
    Patience,
    Response,
    Transport,
    answer_of,
)

#: No manifest, token answer or error text is larger than this; registries refuse manifests above 4 MiB.
_SMALL = 8 * 1024 * 1024
#: Bodies to try in turn where a larger one is refused; the default limit of nginx is 1 MiB.
_PARTS = (64 * 1024 * 1024, 8 * 1024 * 1024, 1024 * 1024, 256 * 1024)
_HUB_HOST = "registry-1.docker.io"


def pull_scope(repository: str) -> str:
    return f"repository:{repository}:pull"


def push_scope(repository: str) -> str:
    return f"repository:{repository}:pull,push"


def delete_scope(repository: str) -> str:
    return f"repository:{repository}:delete"


class RegistryClient:
    """Talks to one registry; safe to use from several threads. Close it, or use :class:`Registries`."""

    def __init__(self, registry: str, options: ClientOptions) -> None:
        self.registry = registry
        self.options = options
        scheme = "http" if options.plain_http else "https"
        self._base = f"{scheme}://{_HUB_HOST if registry == DOCKER_HUB else registry}"
        self._origin = Origin.of(self._base)
        self.transport = Transport(options)
        self._auth = Authenticator(registry, lambda: find_credentials(registry, options), self._fetch, allow_plain=options.plain_http)
        self._lock = threading.Lock()
        #: Whether the registry has the referrers API; ``None`` until it was asked.
        self.referrers_api: bool | None = None
        self._tags: dict[str, frozenset[str] | None] = {}
        #: Largest body that what stands before the registry lets pass, as far as it was found out.
        self._part: int | None = None

    def close(self) -> None:
        self.transport.close()

    # -- requests --------------------------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        scopes: t.Sequence[str],
        headers: t.Mapping[str, str] | None = None,
        body: bytes | None = None,
        chunks: t.Iterable[t.Any] | None = None,
        stream: bool = False,
        retry: bool = True,
        limit: int = _SMALL,
    ) -> Response:
        """Send a request to ``path`` (or a whole URL) and answer challenges of this registry.

        A body of ``chunks`` cannot be sent twice: when its token has just expired, the request is ``Interrupted`` and
        the next try has a new one.
        """
        url = urljoin(self._base, path)
        ours = Origin.of(url) == self._origin
        authorization = self._auth.header(scopes) if ours else None
        for _round in range(3):
            values = {**(headers or {}), **({"Authorization": authorization} if authorization else {})}
            response = self.transport.send(method, url, values, body, chunks, stream, None if stream else limit, retry)
            if response.status != 401 or Origin.of(response.url) != self._origin:
                return response
            if stream:
                response.read_all(_SMALL)
            authorization = self._auth.answer(parse_challenges(response.headers.get_all("WWW-Authenticate") or []), scopes, authorization)
            if authorization is None:
                return response
            if chunks is not None:
                raise Interrupted(f"{method} {path}", "the registry wanted a new token in the middle of an upload")
        return response

    def _fetch(self, method: str, url: str, headers: dict[str, str], body: bytes | None) -> tuple[int, bytes]:
        response = self.transport.send(method, url, headers, body, limit=_SMALL)
        return response.status, response.body

    def refusal(self, tried: str, response: Response) -> DeliveryError:
        """What an answer that is not the hoped-for one means to a person."""
        said = answer_of(response)
        if response.status in (401, 403):
            return refused_credentials(tried, self.registry, self._auth.credentials, said)
        if response.status == 400 and b"HTTP request to an HTTPS server" in response.body:
            return DeliveryError(tried, f"{self.registry} speaks TLS", "Do not set plain_http for it.", "config")
        if response.status == 405:
            remedy = "It is read-only now, perhaps while its garbage is collected: run again later."
            return DeliveryError(tried, f"{self.registry} answered {said}", remedy, "transport", status=405)
        return DeliveryError(tried, f"{self.registry} answered {said}", "Look at the registry's log.", "transport", status=response.status)

    # -- manifests -------------------------------------------------------------------------------------------------

    def manifest(self, repository: str, version: str) -> Manifest | None:
        """The manifest of a tag or digest, checked byte for byte; ``None`` when the registry does not have it."""
        tried = f"read {self.registry}/{repository}{'@' if ':' in version else ':'}{version}"
        response = self.request("GET", f"/v2/{repository}/manifests/{version}", [pull_scope(repository)], {"Accept": ACCEPT})
        if response.status == 404:
            return None
        if response.status != 200:
            raise self.refusal(tried, response)
        told = response.headers.get("Docker-Content-Digest")
        return Manifest.parse(response.body, version if ":" in version else told, response.headers.get("Content-Type", ""), tried[5:])

    def manifest_digest(self, repository: str, version: str) -> str | None:
        """The digest that a tag names, by HEAD, which counts as no pull anywhere; ``None`` where the answer does not say it."""
        response = self.request("HEAD", f"/v2/{repository}/manifests/{version}", [pull_scope(repository)], {"Accept": ACCEPT})
        return response.headers.get("Docker-Content-Digest") if response.status == 200 else None

    def resolve(self, reference: Reference) -> Manifest:
        """The manifest of ``reference``; an unknown one is a ``DeliveryError`` (config)."""
        found = self.manifest(reference.repository, reference.version)
        if found is None:
            kind = "digest" if reference.digest else "tag"
            raise DeliveryError(
                f"read {reference}",
                f"{self.registry} has no {kind} {reference.version} in the repository {reference.repository}",
                "Check that it was pushed there and is spelled right.",
                "config",
                reference=str(reference),
            )
        return found

    def put_manifest(self, repository: str, manifest: Manifest, tag: str | None = None) -> Response:
        """Write ``manifest`` by its digest, or under ``tag``; a registry that makes another digest of it is refused."""
        version = tag or manifest.digest
        tried = f"write {self.registry}/{repository}{':' if tag else '@'}{version}"
        path, headers = f"/v2/{repository}/manifests/{version}", {"Content-Type": manifest.media_type}
        patience = Patience(self.transport.policy)
        while True:
            response = self.request("PUT", path, [push_scope(repository)], headers, manifest.body)
            if response.status in (200, 201, 202):
                break
            if response.status == 415:
                raise DeliveryError(
                    tried,
                    f"{self.registry} does not take manifests of the type {manifest.media_type} ({answer_of(response)})",
                    "Let it take Docker's types (zot: compat docker2s2), or build the image with OCI types.",
                    "config",
                )
            # A blob's link is empty for a moment while another promotion writes it again: not known, and there the next time.
            believed = b"BLOB_UNKNOWN" not in response.body or not self._complete(repository, manifest)
            if believed or not patience.wait():
                raise self.refusal(tried, response)
        told = response.headers.get("Docker-Content-Digest")
        if told and told.split(":")[0] == manifest.digest.split(":")[0] and told != manifest.digest:
            raise DeliveryError(
                tried, f"the registry made {told} of {manifest.digest}", "It changes manifests; use one that keeps them.", "transport"
            )
        return response

    def delete_manifest(self, repository: str, version: str) -> str:
        """Delete by digest, and with it every tag that names it, or a tag alone; returns what became of it.

        ``deleted``; ``absent``: it was not there; ``unsupported``: this registry does not delete such (deletion is switched off, or
        it is read-only, or it knows no deletion of a tag alone, as distribution 2).
        """
        response = self.request("DELETE", f"/v2/{repository}/manifests/{version}", [delete_scope(repository)])
        if response.status in (200, 202, 204):
            return "deleted"
        if response.status == 404:
            return "absent"
        if response.status in (405, 501) or (response.status == 400 and ":" not in version):
            return "unsupported"
        raise self.refusal(f"delete {self.registry}/{repository}{'@' if ':' in version else ':'}{version}", response)

    def _complete(self, repository: str, manifest: Manifest) -> bool:
        return all(self.probe_blob(repository, blob) == "present" for blob in manifest.blobs) and all(
            self.manifest(repository, child.digest) for child in manifest.children
        )

    def tags(self, repository: str) -> frozenset[str] | None:
        """All tags; ``None`` where the registry does not tell (no right, or no such call)."""
        found: set[str] = set()
        path = f"/v2/{repository}/tags/list?n=1000"
        while path:
            response = self.request("GET", path, [pull_scope(repository)])
            if response.status == 404:
                return frozenset(found)
            if response.status in (401, 403, 405):
                return None
            if response.status != 200:
                raise self.refusal(f"list the tags of {self.registry}/{repository}", response)
            found.update(self._json(response, f"the tags of {self.registry}/{repository}").get("tags") or [])
            path = self._next_page(response) or ""
        return frozenset(found)

    def known_tags(self, repository: str) -> frozenset[str] | None:
        """``tags`` as they were when first asked in this run."""
        with self._lock:
            if repository not in self._tags:
                self._tags[repository] = self.tags(repository)
            return self._tags[repository]

    def referrers_page(self, path: str, repository: str) -> tuple[list[t.Any], str | None] | None:
        """One page of the referrers API: descriptors and the path of the next; ``None`` where there is no such API."""
        response = self.request("GET", path, [pull_scope(repository)], {"Accept": ACCEPT})
        if response.status in (400, 404, 405, 501):
            return None
        if response.status != 200:
            raise self.refusal(f"list the referrers in {self.registry}/{repository}", response)
        content = self._json(response, f"the referrers in {self.registry}/{repository}")
        return list(content.get("manifests") or []), self._next_page(response)

    def _next_page(self, response: Response) -> str | None:
        """The address in a ``Link: <…>; rel="next"`` header."""
        for part in (response.headers.get("Link") or "").split(","):
            address, _semicolon, parameters = part.partition(";")
            address = address.strip()
            if address.startswith("<") and address.endswith(">") and 'rel="next"' in parameters.replace("rel=next", 'rel="next"'):
                return self._address(response, address[1:-1], f"list in {self.registry}")
        return None

    def _json(self, response: Response, what: str) -> dict[str, t.Any]:
        try:
            content = json.loads(response.body)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise DeliveryError(
                f"read {what}", f"{self.registry} answered something that is not a JSON object", "Is it a registry?", "transport"
            )
        return content

    # -- blobs -----------------------------------------------------------------------------------------------------

    def probe_blob(self, repository: str, blob: Descriptor) -> str:
        """``present``, ``absent`` or ``damaged``.

        Asks for one byte by GET: HEAD answers from a cache, and says 200 for a blob whose file is gone or cut short.
        """
        if blob.size == 0:
            response = self.request("HEAD", _blob(repository, blob), [pull_scope(repository)])
            return "present" if response.status == 200 else "absent"
        # Twice, since one broken body can be the network; two in a row are the blob.
        for _attempt in range(2):
            response = self.request("GET", _blob(repository, blob), [pull_scope(repository)], {"Range": "bytes=0-0"}, stream=True)
            if response.status == 404:
                response.read_all(_SMALL)
                return "absent"
            if response.status not in (200, 206, 416):
                response.read_all(_SMALL)
                raise self.refusal(f"look for {blob.digest} in {self.registry}/{repository}", response)
            try:
                whole = response.status != 416 and response.readinto(bytearray(1)) == 1 and _whole_size(response) in (blob.size, None)
            except Interrupted:
                continue
            response.close()
            return "present" if whole else "damaged"
        return "damaged"

    def open_blob(self, repository: str, blob: Descriptor) -> BlobReader:
        """Start to read a blob; the caller reads to its end and checks what came."""
        return BlobReader(self, repository, blob)

    def blob_from(self, repository: str, blob: Descriptor, offset: int) -> Response:
        """The answer that streams a blob from ``offset`` on; ``Interrupted`` where the registry sends no parts."""
        tried = f"read {blob.digest} of {self.registry}/{repository}"
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            response = self.request("GET", _blob(repository, blob), [pull_scope(repository)], headers, stream=True)
        except Interrupted as exc:
            raise exc.during(tried) from exc
        if response.status == 206 and (response.headers.get("Content-Range") or "").startswith(f"bytes {offset}-"):
            return response
        if response.status == 200 and not offset:
            announced = _whole_size(response)
            if announced in (blob.size, None):
                return response
            response.close()
            raise Interrupted(
                tried, f"{self.registry} announces {announced} of {blob.size} bytes", "The blob is damaged there; push the image again."
            )
        if response.status in (200, 206):
            response.close()
            raise Interrupted(tried, f"after a cut the registry does not go on at byte {offset}")
        response.read_all(_SMALL)
        if response.status == 404:
            raise DeliveryError(tried, "the registry does not have it, though a manifest names it", "Push the image again.", "transport")
        raise self.refusal(tried, response)

    def read_blob(self, repository: str, blob: Descriptor, limit: int = _SMALL) -> bytes:
        """A small blob (config, record) as checked bytes."""
        tried = f"read {blob.digest} of {self.registry}/{repository}"
        if blob.size > limit:
            raise DeliveryError(tried, f"it has {blob.size} bytes, more than {limit}", "", "transport")
        response = self.request("GET", _blob(repository, blob), [pull_scope(repository)], limit=max(limit, _SMALL))
        if response.status == 404:
            raise DeliveryError(tried, "the registry does not have it, though a manifest names it", "Push the image again.", "transport")
        if response.status != 200:
            raise self.refusal(tried, response)
        actual = digest_of(response.body, blob.digest.split(":", 1)[0])
        if actual != blob.digest:
            raise DeliveryError(
                tried, f"its bytes have the digest {actual}", "The blob is damaged in the registry; push the image again.", "transport"
            )
        return response.body

    def image_config(self, repository: str, manifest: Manifest) -> dict[str, t.Any]:
        """The config of a single image; empty where it is not one, as with artifacts."""
        if manifest.config is None:
            return {}
        try:
            content = json.loads(self.read_blob(repository, manifest.config))
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def start_upload(self, repository: str) -> str:
        """Open an upload and return its address."""
        tried = f"upload to {self.registry}/{repository}"
        response = self.request("POST", f"/v2/{repository}/blobs/uploads/", [push_scope(repository)])
        if response.status != 202:
            raise self.refusal(tried, response)
        return self._location(response, tried)

    def mount_blob(self, repository: str, blob: Descriptor, source: str) -> str | None:
        """Take over a blob from the repository ``source``; ``None`` when that worked, else the address of an upload."""
        query = urlencode({"mount": blob.digest, "from": source})
        response = self.request("POST", f"/v2/{repository}/blobs/uploads/?{query}", [push_scope(repository), pull_scope(source)])
        if response.status == 201:
            return None
        if response.status == 202:
            return self._location(response, f"upload to {self.registry}/{repository}")
        # Without the right to read the source a registry may refuse the whole request; a plain upload is still open.
        return self.start_upload(repository)

    def finish_upload(self, repository: str, location: str, blob: Descriptor, chunks: t.Iterable[t.Any], offset: int = 0) -> None:
        """Send the blob from ``offset`` on, and close the upload. ``chunks`` raises when what it reads is wrong; then nothing is stored.

        One request, where the registry and what stands before it take that; else parts, each smaller than what they
        refused. ``Interrupted`` with a ``status`` when this upload is lost and a new one may go well.
        """
        tried = f"upload {blob.digest} to {self.registry}/{repository}"
        source_failed: list[BaseException] = []

        def watched(given: t.Iterable[t.Any] = chunks) -> t.Iterator[t.Any]:
            try:
                yield from given
            except BaseException as exc:
                source_failed.append(exc)
                raise

        try:
            self._send_upload(tried, repository, location, blob, watched(), offset)
        except Interrupted as exc:
            # What the source says is told as it is.
            raise exc if exc in source_failed else exc.during(tried) from None

    def _send_upload(self, tried: str, repository: str, location: str, blob: Descriptor, chunks: t.Iterator[t.Any], offset: int) -> None:
        octets = {"Content-Type": "application/octet-stream"}
        part = min(self._part or blob.size, blob.size)
        whole = not offset and part == blob.size
        while not whole and offset < blob.size:
            end = min(offset + part, blob.size)
            headers = {**octets, "Content-Length": str(end - offset), "Content-Range": f"{offset}-{end - 1}"}
            piece, chunks = _split(chunks, end - offset)
            response = self.request("PATCH", location, [push_scope(repository)], headers, chunks=piece)
            if response.status not in (201, 202, 204):
                raise self._lost_upload(tried, response, end - offset)
            location, offset = self._location(response, tried), end
        address = location + ("&" if "?" in location else "?") + "digest=" + quote(blob.digest, safe="")
        if whole:
            headers = {**octets, "Content-Length": str(blob.size)}
            response = self.request("PUT", address, [push_scope(repository)], headers, chunks=chunks)
        else:
            for _rest in chunks:  # Its last word is whether all of it was right.
                pass
            response = self.request("PUT", address, [push_scope(repository)], octets, b"")
        if response.status in (200, 201, 204):
            return
        if whole and response.status != 413:
            raise self.refusal(tried, response)
        raise self._lost_upload(tried, response, blob.size)

    def _lost_upload(self, tried: str, response: Response, size: int) -> DeliveryError:
        if response.status == 413:
            smaller = max((part for part in _PARTS if part < size), default=0)
            if not smaller:
                return self.refusal(tried, response)
            with self._lock:
                self._part = min(self._part or smaller, smaller)
        elif response.status in (401, 403):
            return self.refusal(tried, response)
        return Interrupted(tried, f"{self.registry} answered {answer_of(response)}", "Look at the registry's log.", status=response.status)

    def resume_upload(self, repository: str, location: str) -> tuple[str, int] | None:
        """Where an upload that broke off goes on and how many bytes are there; ``None`` where it cannot."""
        response = self.request("GET", location, [push_scope(repository)])
        told = re.match(r"(?:bytes=)?0-(\d+)\Z", response.headers.get("Range") or "")
        if response.status not in (200, 202, 204) or not told:
            return None
        # Nothing at all and one byte are both told as 0-0.
        offset = int(told.group(1)) + 1 if told.group(1) != "0" else 0
        return self._location(response, f"upload to {self.registry}/{repository}") if response.headers.get("Location") else location, offset

    def cancel_upload(self, repository: str, location: str) -> None:
        """Take back an upload that failed, so that it does not stay on the registry's disk; its failure is no news."""
        try:
            self.request("DELETE", location, [push_scope(repository)], retry=False)
        except DeliveryError:
            pass

    def push_blob(self, repository: str, data: bytes, media_type: str) -> Descriptor:
        """Store a small blob of our own unless it is there; return its descriptor."""
        blob = Descriptor(media_type, digest_of(data), len(data))
        if self.probe_blob(repository, blob) != "present":
            self.finish_upload(repository, self.start_upload(repository), blob, [data])
        return blob

    def _location(self, response: Response, tried: str) -> str:
        location = response.headers.get("Location")
        if not location:
            raise DeliveryError(tried, "the registry opened an upload without an address", "Look at the registry's log.", "transport")
        return self._address(response, location, tried)

    def _address(self, response: Response, location: str, tried: str) -> str:
        """The whole address of a ``location`` that this registry names, relative or not."""
        url = urljoin(response.url, location)
        target = Origin.of(url)
        if self._origin.scheme == "https" and target.scheme == "http":
            if target.host != self._origin.host:
                raise DeliveryError(
                    tried, f"the registry sends us to http://{target.netloc}", "Correct the host setting of the registry.", "config"
                )
            # A registry behind a TLS proxy that does not know its own scheme.
            parts = urlsplit(url)
            url = urljoin(self._base, parts.path) + (f"?{parts.query}" if parts.query else "")
        return url


class BlobReader:
    """A blob as it streams. After a cut it goes on where it stopped, within the budget of retries."""

    def __init__(self, client: RegistryClient, repository: str, blob: Descriptor) -> None:
        self._client, self._repository, self._blob = client, repository, blob
        self._position = 0
        self._patience = Patience(client.transport.policy)
        self._response = client.blob_from(repository, blob, 0)

    def readinto(self, buffer: t.Any) -> int:
        """Fill a part of ``buffer``; 0 at the end. Raises ``Interrupted`` when the budget is used up."""
        while True:
            try:
                count = self._response.readinto(buffer)
                self._position += count
                return count
            except Interrupted as exc:
                if self._position >= self._blob.size or not self._patience.wait():
                    exc.final = True
                    raise
                self._response = self._client.blob_from(self._repository, self._blob, self._position)

    def close(self) -> None:
        self._response.close()


class Registries:
    """One client for each registry and set of options, closed together."""

    def __init__(self) -> None:
        self._clients: dict[tuple[str, ClientOptions], RegistryClient] = {}
        self._lock = threading.Lock()

    def client(self, registry: str, options: ClientOptions) -> RegistryClient:
        with self._lock:
            # Concurrency is not a property of the connection, so it does not split clients.
            key = (registry, replace(options, concurrency=1))
            if key not in self._clients:
                self._clients[key] = RegistryClient(registry, options)
            return self._clients[key]

    def __enter__(self) -> Registries:
        return self

    def __exit__(self, *_exc: object) -> None:
        for client in self._clients.values():
            client.close()


def _blob(repository: str, blob: Descriptor) -> str:
    return f"/v2/{repository}/blobs/{blob.digest}"


def _split(chunks: t.Iterator[t.Any], size: int) -> tuple[t.Iterator[t.Any], t.Iterator[t.Any]]:
    """The first ``size`` bytes of ``chunks``, and what comes after them once those are read."""
    rest: list[t.Any] = []

    def head() -> t.Iterator[t.Any]:
        left = size
        while left:
            chunk = next(chunks, None)
            if chunk is None:
                return
            if len(chunk) > left:
                rest.append(chunk[left:])
            yield chunk[:left]
            left -= min(len(chunk), left)

    def tail() -> t.Iterator[t.Any]:
        yield from rest
        yield from chunks

    return head(), tail()


def _whole_size(response: Response) -> int | None:
    """Size of the blob as the answer to a range request tells it."""
    if response.status == 200:
        text = response.headers.get("Content-Length") or ""
    else:
        text = (response.headers.get("Content-Range") or "").rpartition("/")[2]
    return int(text) if text.isascii() and text.isdigit() else None
