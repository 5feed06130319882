"""A shallow student: the first blocks of a base checkpoint as a checkpoint of their own."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from fedbt_app.model.checkpoint import Checkpoint, find_model
from fedbt_app.parts import HeadKind


def shallow_student(base: str, blocks: int, folder: Path) -> Path:
    """Write the first `blocks` blocks of `base`, its embeddings and its heads into `folder`."""
    source = find_model(base)
    checkpoint = Checkpoint(source)
    arch = checkpoint.architecture
    shapes = arch.embeddings()
    shapes |= arch.head(HeadKind.MASKED_LM, 0)
    shapes |= arch.head(HeadKind.SEQUENCE, 0)
    for index in range(blocks):
        shapes |= arch.block(index)
    kept = {name: checkpoint.tensor(name).clone() for name in shapes if name in checkpoint}
    config = {**checkpoint.config, "num_hidden_layers": blocks}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for file in source.glob("*"):  # the tokenizer stays the base's
        if file.is_file() and ("token" in file.name or file.name == "vocab.txt"):
            shutil.copy(file, folder)
    return folder
