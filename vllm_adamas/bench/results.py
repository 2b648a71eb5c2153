"""bench.json: every measured cell with its times, from which a run that was interrupted goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_adamas.environment import Environment, different
from vllm_adamas.errors import AdamasError
from vllm_adamas.page import write_whole

FORMAT, VERSION = "vllm-adamas-bench", 1
NAME = "bench.json"
DENSE = "dense"  #: end to end, the engine with the attention backend that vLLM chooses
#: The parts of a record, and what tells their entries apart.
ATTENTION = "attention"  #: microseconds of a decode step of a layer, ``dense_us`` and ``adamas_us``, by round
TPOT = "end to end"  #: milliseconds of the decode steps of an engine, ``steps_ms``, by round
ENGINES = "engines"  #: what an engine told about itself
KEYS = {
    ATTENTION: ("configuration", "context", "batch"),
    TPOT: ("configuration", "repeat", "context", "batch"),
    ENGINES: ("configuration", "repeat"),
}


class Results:
    """The record of a folder; :meth:`add` saves it.

    Args:
        folder: made when there is something to save.
        settings: what has to be the same for cells to belong together.

    Raises:
        AdamasError: the folder's file belongs to a run with other settings, on another host or of other versions,
            or is something else.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path = folder / NAME
        self.record: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "settings": json.loads(json.dumps(settings)),
            "environment": Environment.capture().record(),
            "layer": {},
            **{part: [] for part in KEYS},
        }
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        held = load(self.path)
        if found := different(self.record, held):
            raise AdamasError(
                f"{self.path} holds times of other settings ({', '.join(found)}): give another --output or remove "
                "the file."
            )
        self.record = held

    def find(self, part: str, *key: Any) -> dict[str, Any] | None:
        """The entry of a part with these values of its ``KEYS``."""
        entries = (entry for entry in self.record[part] if key_of(part, entry) == key)
        return next(entries, None)

    def add(self, part: str, entry: dict[str, Any]) -> None:
        """Adds an entry in place of the one with its keys."""
        key = key_of(part, entry)
        self.record[part] = [x for x in self.record[part] if key_of(part, x) != key] + [entry]
        self.save()

    def save(self) -> None:
        write_whole(self.path, json.dumps(self.record, indent=1) + "\n")


def key_of(part: str, entry: dict[str, Any]) -> tuple:
    return tuple(entry[name] for name in KEYS[part])


def load(path: Path) -> dict[str, Any]:
    """The record of a file.

    Raises:
        AdamasError: it is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (data["format"], data["version"]) == (FORMAT, VERSION):
            Environment.model_validate(data["environment"])
            for part in KEYS:
                for entry in data[part]:
                    key_of(part, entry)
            return data
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise AdamasError(f"{path} holds no times of this release: give another --output.")
