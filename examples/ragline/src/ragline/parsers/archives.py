"""ZIP archives of XML, as office formats and e-books are: read member by member, within limits."""

from __future__ import annotations

import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from urllib.parse import unquote

from lxml import etree

from ragline.errors import DamagedError, EncryptedError
from ragline.limits import Limits

_ENCRYPTED_FLAG = 0x1
_BLOCK_BYTES = 1 << 20
# "Strict Open XML" has the same elements in other namespaces (ISO/IEC 29500-1, Annex A).
_STRICT = re.compile(rb"http://purl\.oclc\.org/ooxml/(\w+)/")
_TRANSITIONAL = rb"http://schemas.openxmlformats.org/\1/2006/"
_RELATIONSHIP = "{http://schemas.openxmlformats.org/package/2006/relationships}Relationship"


class Archive:
    """A document that is a ZIP archive.

    Args:
        data: its bytes.
        what: what it is, for the reason why it cannot be read, such as "Word document".
        limits: bytes are counted as they are unpacked, not as the archive declares them.

    Raises:
        DamagedError: it is no ZIP archive that can be opened.
    """

    def __init__(self, data: bytes, what: str, limits: Limits) -> None:
        self._what = what
        self._limits = limits
        self._unpacked_bytes = 0
        self._elements = 0
        try:
            self._zip = zipfile.ZipFile(BytesIO(data))
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise self.damaged() from error
        self.names = frozenset(self._zip.namelist())

    def damaged(self) -> DamagedError:
        """What to raise where something is missing."""
        return DamagedError(f"The {self._what} is damaged and cannot be opened.")

    def read(self, name: str) -> bytes:
        """The bytes of a member.

        Raises:
            TooLargeError: all members that were read unpack to more than the limit.
            EncryptedError: it needs a password.
            DamagedError: it is not there, or broken.
        """
        return b"".join(self._blocks(name))

    def measure(self, name: str) -> None:
        """Count the bytes of a member that a library will unpack; raises what `read` raises."""
        for _ in self._blocks(name):
            pass

    def _blocks(self, name: str) -> Iterator[bytes]:
        try:
            entry = self._zip.getinfo(name)
            if entry.flag_bits & _ENCRYPTED_FLAG:
                raise self.encrypted()
            with self._zip.open(entry) as stream:
                while block := stream.read(_BLOCK_BYTES):
                    self._unpacked_bytes += len(block)
                    self._limits.check("unpacked_bytes", self._unpacked_bytes)
                    yield block
        except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
            raise self.damaged() from error

    def encrypted(self) -> EncryptedError:
        """What to raise where a password is needed."""
        return EncryptedError(f"The {self._what} is protected by a password: save a copy without one.")

    def xml(self, name: str) -> etree._Element:
        """The tree of a member.

        Entities are not expanded, nothing is loaded from elsewhere, and libxml2 refuses a depth above 256.

        Raises:
            TooLargeError: all members that were read have more elements than the limit.
            DamagedError: it is not there, or no XML.
        """
        data = self.read(name)
        self._elements += data.count(b"<")
        self._limits.check("elements", self._elements)
        if b"purl.oclc.org" in data[:4096]:
            data = _STRICT.sub(_TRANSITIONAL, data)
        parser = etree.XMLParser(
            resolve_entities=False, no_network=True, remove_comments=True, remove_pis=True
        )
        try:
            root: etree._Element = etree.fromstring(data, parser)
        except etree.XMLSyntaxError as error:
            if (
                error.code == etree.ErrorTypes.ERR_NO_MEMORY
            ):  # for lxml it is one fault of the text among others
                raise MemoryError from error
            raise self.damaged() from error
        return root

    def related(self, name: str) -> list[tuple[str, str, str]]:
        """What a member of an Office document refers to inside it: (id, last word of the type, member)."""
        folder, base = posixpath.split(name)
        file = posixpath.join(folder, "_rels", f"{base}.rels")
        if file not in self.names:
            return []
        found = []
        for relation in self.xml(file).iter(_RELATIONSHIP):
            target = unquote(relation.get("Target", ""))
            if relation.get("TargetMode") == "External":
                continue
            path = target.lstrip("/") if target.startswith("/") else posixpath.join(folder, target)
            kind = relation.get("Type", "").rpartition("/")[2]
            found.append((relation.get("Id", ""), kind, posixpath.normpath(path)))
        return found
