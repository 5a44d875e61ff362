"""What the reference of a run was made from, so that a run that goes on keeps it instead of making it again.

A mean that is registered again and again has other last bits on another kind of processor, and lacks a frame whose
file was lost meanwhile; neither may put finished units out of date.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import pydantic

from stillframe.durable import fingerprint, with_checksum, write_durably
from stillframe.frames import FrameSource
from stillframe.match import KERNEL_VERSION
from stillframe.records import read_sealed

ORIGIN_VERSION: Final = 2


class Origin(pydantic.BaseModel):
    """The settings and the frames that a reference was made from."""

    model_config = pydantic.ConfigDict(frozen=True)

    version: Literal[1, 2] = ORIGIN_VERSION
    """Version of this format; 1 had no checksum."""
    settings: str
    """Fingerprint of the settings, the mask and the layout of the frames."""
    frames: dict[int, str | None]
    """Fingerprint of the files of each frame; None where it could not be read."""
    digest: str = ""
    """Hash of the reference that was made."""
    history: str | None = None
    """What the reference says of itself, which its hash does not know; None where it was not kept."""

    @classmethod
    def of(
        cls, source: FrameSource, indices: Sequence[int], settings: Mapping[str, Any], *, contents: bool = False
    ) -> "Origin":
        """Describe what a reference from these frames would be made from now."""
        common = {"kernel": KERNEL_VERSION, "array": source.meaning(), "missing": source.missing_chunks}
        frames = {index: _token(source, index, contents) for index in indices}
        return cls(settings=fingerprint(common | dict(settings)), frames=frames)

    def without(self, lost: Iterable[int]) -> "Origin":
        """Return the same with frames that turned out unreadable."""
        return self.model_copy(update={"frames": self.frames | dict.fromkeys(lost)})

    def holds(self, now: "Origin") -> bool:
        """Tell whether nothing was changed since; files that vanished or came back change nothing."""
        if (self.settings, self.frames.keys()) != (now.settings, now.frames.keys()):
            return False
        pairs = ((self.frames[index], now.frames[index]) for index in self.frames)
        return all(before == after or None in (before, after) for before, after in pairs)

    def returned(self, now: "Origin") -> list[int]:
        """Return the frames that could not be read then and may be readable now."""
        return [index for index, token in self.frames.items() if token is None and now.frames[index] is not None]

    def write(self, path: Path) -> None:
        """Keep it, durable, unless it is there already."""
        content = with_checksum(self.model_dump_json().encode())
        if not path.exists() or path.read_bytes() != content:
            write_durably(path, content)


def read_origin(path: Path) -> Origin | None:
    """Read what :meth:`Origin.write` wrote; None where there is none that is whole.

    Raises
    ------
    ValueError
        It was written by a newer version of this package.
    """
    return read_sealed(path, Origin, ORIGIN_VERSION, unsealed=1)


def _token(source: FrameSource, index: int, contents: bool) -> str | None:
    """Fingerprint of the files of a frame; None where one that matters is missing."""
    files = source.identity(index, index + 1, contents=contents)
    lost = source.missing_chunks == "report" and any(size < 0 for _, size, _ in files)
    return None if lost else fingerprint({"files": files})
