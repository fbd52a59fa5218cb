"""Nothing in a checkpoint may run code: what megatron-core would unpickle is read here first, under restriction.

megatron-core 0.16.1 to 0.19.2 on torch 2.13 reads a `torch_dist` folder through four doors:

- `.metadata` with plain `pickle.load`, which runs whatever the file says;
- tensors in `.distcp` files with `torch.load(weights_only=True)`: safe;
- other objects in `.distcp` files with `torch.load(weights_only=False)`, which runs whatever the file says;
- `common.pt` with `torch.load` at its default, safe unless an environment variable switches the default off.

`check` reads the same bytes with an unpickler that knows only the classes that such metadata consists of, and the
objects with `weights_only=True`. What passes builds plain data under the unrestricted readers as well.

There is a fifth: an object named `_extra_state` is bytes to all of these, and a pickle to Transformer Engine's layers.
Ours store what they remember as tensors (`precision/extra_state.py`), so one that is not empty is refused.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from vishwamai_mp.checkpoint.manifest import Manifest
from vishwamai_mp.config import UserError
from vishwamai_mp.config.errors import one_line

_DCP = "torch.distributed.checkpoint."
_ALLOWED = {
    (_DCP + "metadata", "Metadata"),
    (_DCP + "metadata", "MetadataIndex"),
    (_DCP + "metadata", "TensorStorageMetadata"),
    (_DCP + "metadata", "BytesStorageMetadata"),
    (_DCP + "metadata", "ChunkStorageMetadata"),
    (_DCP + "metadata", "TensorProperties"),
    (_DCP + "metadata", "StorageMeta"),
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"),
    (_DCP + "filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # looks a name up in a table of layouts
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def check(folder: Path, manifest: Manifest) -> None:
    """Refuse a checkpoint whose reading could run code, or read files outside its folder.

    Raises:
        UserError: says what it asks for.
    """
    metadata = read_metadata(folder)
    for index, storage in metadata.storage_data.items():
        if storage.relative_path not in manifest.files:
            raise UserError(f"{folder}/.metadata refers to {storage.relative_path!r}, which is not in the manifest")
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (folder / storage.relative_path).open("rb") as file:
                file.seek(storage.offset)
                found = _check_torch_file(io.BytesIO(file.read(storage.length)), f"{folder}: {index.fqn}")
            is_empty = found is None or (isinstance(found, torch.Tensor) and found.numel() == 0)
            if "_extra_state" in index.fqn and not is_empty:
                raise UserError(
                    f"{folder}: {index.fqn} refused: Transformer Engine's pickled state, which could run code; only the"
                    " checkpoint's tensors can be taken, by tools/convert_checkpoint.py to-hf and from-hf"
                )
    _check_torch_file(io.BytesIO((folder / "common.pt").read_bytes()), f"{folder}/common.pt")


def read_metadata(folder: Path) -> Metadata:
    """The unpickled `.metadata` of a torch_dist folder.

    Raises:
        UserError: it holds anything but such metadata.
    """
    path = folder / ".metadata"
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} refused: not plain checkpoint metadata ({one_line(error)})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{path} refused: not checkpoint metadata")
    return metadata


def _check_torch_file(file: io.BytesIO, what: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{what} refused: more than plain data ({one_line(error)[:200]})") from None
