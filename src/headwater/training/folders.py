"""Weights as diffusers and transformers leave them in folders: ``save_pretrained`` of a model or a pipeline, ``save_state`` of accelerate, adapters.

    unet/diffusion_pytorch_model.safetensors      raw weights (or transformer/, prior/; or in the folder itself; in shards; as .bin)
    unet_ema/...                                  their moving average; its config.json knows the decay
    pytorch_lora_weights.safetensors              adapters alone
    optimizer.bin                                 what accelerate kept of the optimizer
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from headwater.errors import DamagedFile, MissingCheckpoint

PARTS = ("unet", "transformer", "prior", "model")
"""Folders of a pipeline that hold the network which is trained."""
ADAPTERS = "pytorch_lora_weights"
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", ADAPTERS)
_SUFFIXES = (".safetensors", ".bin")


def load(path: Path) -> Any:
    """What a file holds. Raises MissingCheckpoint, DamagedFile."""
    if not path.is_file():
        raise MissingCheckpoint(f"{path} is not there", "a file of weights, or a folder with one", "check the path")
    try:
        if path.name.endswith(".index.json"):
            shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            return {name: t for shard in shards for name, t in load(path.with_name(shard)).items()}
        return safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except MissingCheckpoint:
        raise
    except Exception as error:  # both libraries raise many types for a broken file
        raise DamagedFile(f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})", "a state dict of tensors", "save it again") from error


def weights_file(folder: Path) -> Path:
    """The file of weights in a folder, or in the part of a pipeline that is trained. Raises MissingCheckpoint."""
    found = next((file for place in (folder, *(folder / part for part in PARTS)) for file in _files(place)), None)
    if found is None:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        expected = f"one of {', '.join(stem + '.safetensors' for stem in _STEMS)} in it, or in one of its folders {', '.join(PARTS)}"
        raise MissingCheckpoint(f"{folder}, a folder that holds {there}", expected, "name the file or the folder of the network itself")
    return found


def _files(place: Path) -> Iterable[Path]:
    for stem in _STEMS:
        for suffix in _SUFFIXES:
            yield from (file for name in (f"{stem}{suffix}", f"{stem}{suffix}.index.json") if (file := place / name).is_file())
        yield from sorted(place.glob(f"{stem}.*.safetensors"))  # a variant: fp16


def average_folder(given: Any) -> Path | None:
    """The folder of averaged weights that lies beside those of a checkpoint, if there is one."""
    if not isinstance(given, str | Path) or not Path(given).is_dir():
        return None
    places = [Path(given) / f"{part}_ema" for part in PARTS]
    if Path(given).name in PARTS:
        places.append(Path(given).with_name(f"{Path(given).name}_ema"))
    return next((place for place in places if place.is_dir()), None)


def decay_of(folder: Path) -> float | None:
    """The decay that diffusers notes in the config of averaged weights."""
    config = folder / "config.json"
    found = json.loads(config.read_text()).get("decay") if config.is_file() else None
    return float(found) if isinstance(found, float | int) else None


def optimizer_file_of(given: Any) -> Path | None:
    """accelerate's file of the optimizer in a checkpoint's folder."""
    file = Path(given) / "optimizer.bin" if isinstance(given, str | Path) else None
    return file if file is not None and file.is_file() else None


def as_in(state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Adapters under the names that they have in a model: files leave out the adapter's own name, and pipelines put the network's before it."""
    known = {re.sub(r"\.(lora_[AB])\.[^.]+\.weight$", r".\1.weight", name): name for name in names}
    out = {}
    for name, tensor in state.items():
        plain = name.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")
        shorter = plain.partition(".")[2]
        if plain in known or shorter in known or plain.partition(".")[0] in PARTS:  # of other networks of the pipeline (text_encoder) there is nothing here
            out[known.get(plain, known.get(shorter, name))] = tensor
    return out
