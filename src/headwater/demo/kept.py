"""Answers kept on disk, so that a demo that is started again does not repeat them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from headwater.result import FeatureScores, TrainingScores, load
from headwater.store import content_hash, read_json, write_json

Scores = TypeVar("Scores", TrainingScores, FeatureScores)


def kept(place: Path, name: str, facts: Sequence[Any], work: Callable[[], list[Scores]]) -> list[Scores]:
    """What ``work`` gives, from its files or made and written. ``facts``: all that it depends on; other facts, other files."""
    key = content_hash(*facts)[:12]
    listing = place / f"{name}-{key}.json"
    if not listing.exists():
        files = [scores.save(place / f"{name}-{key}-{k}").name for k, scores in enumerate(work())]
        write_json(listing, files)
    return [load(place / file) for file in read_json(listing)]
