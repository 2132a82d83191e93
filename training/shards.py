"""Demo models that see through the same tower store it once: in the folder of the model that it was
trained in.

Each of them has Hugging Face's index of a checkpoint in several files, which names the tower's file
beside its own, so that `from_pretrained` of its folder finds both as long as the folders stay side
by side.
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

WHOLE, TOWER, REST = "model.safetensors", "tower.safetensors", "decoder.safetensors"
SHARED = "qwen3vl-m"  # whose tower others see through
_INDEX = WHOLE + ".index.json"
_OF_TOWER = "model.visual."


def split_tower(folder: Path, owner: str) -> list[str]:
    """Divide what `save_pretrained` wrote: the tower's weights go to a file in the folder of model
    `owner`, which if it is another is there already, and an index tells where each weight is.
    Returns both files, as seen from `folder`."""
    weights = load_file(folder / WHOLE)
    tower = {name: weight for name, weight in weights.items() if name.startswith(_OF_TOWER)}
    rest = {name: weight for name, weight in weights.items() if name not in tower}
    where = TOWER if owner == folder.name else f"../{owner}/{TOWER}"
    if where == TOWER:
        save_file(tower, folder / TOWER, {"format": "pt"})
    else:
        theirs = load_file(folder / where)
        assert all((weight == theirs[name]).all() for name, weight in tower.items()), (
            "it saw through another tower"
        )
    save_file(rest, folder / REST, {"format": "pt"})
    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": dict.fromkeys(tower, where) | dict.fromkeys(rest, REST),
    }
    (folder / _INDEX).write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    (folder / WHOLE).unlink()
    return [REST, where]
