"""What a long command has done so far, batch by batch, so that it continues after it was killed.

    parts = Parts("submission.csv", digest_of(model, settings))
    done = parts.read()                  # {number of a batch: its bytes}, of earlier processes
    parts.append(7, scores.tobytes())    # on disk before the next batch begins
    remove("submission.csv")             # once the output itself is there

They lie in a hidden folder beside the output, a file for each process. Its name begins with a digest of all that the
batches depend on: those of another input, model or setting are never read. Each batch has a checksum: what was half
written when its process died is done again.
"""

import hashlib
import itertools
import json
import struct
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

import checkpoint

HEAD = struct.Struct("<qqI")  # of a batch: its number, its bytes, their checksum
SAMPLE = 4096  # values of a tensor that tell one model from another


class Parts:
    """The batches of one output that are done."""

    def __init__(self, output: str | Path, digest: str):
        self.folder = folder_of(output)
        self.digest = digest
        self.path = self.folder / f"{digest}.{uuid.uuid4().hex}"  # no other process appends to it

    def read(self) -> dict[int, bytes]:
        """The bytes of each batch that is done, by its number."""
        done = {}
        for path in sorted(self.folder.glob(f"{self.digest}.*")):
            data = path.read_bytes()
            place = 0
            while place + HEAD.size <= len(data):
                number, size, checksum = HEAD.unpack_from(data, place)
                place += HEAD.size
                batch = data[place : place + max(size, 0)]
                if len(batch) != size or checksum != _checksum(number, batch):
                    break
                done[number] = batch
                place += size
        return done

    def append(self, number: int, batch: bytes) -> None:
        """Add a batch. Raises OSError where the disk does not take all of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.append_whole(self.path, HEAD.pack(number, len(batch), _checksum(number, batch)) + batch)

    def once(self, make: Callable) -> Callable:
        """make(batch, number) -> a value as JSON has it; the same function, but what is done is not made again."""
        done = self.read()

        def made(batch, number: int):
            if number in done:
                return json.loads(done[number])
            value = make(batch, number)
            self.append(number, json.dumps(value).encode())
            return value

        return made


def _checksum(number, batch):
    return zlib.crc32(batch, zlib.crc32(repr(number).encode()))


def folder_of(output: str | Path) -> Path:
    """Where the parts of an output are."""
    return Path(output).with_name(f".{Path(output).name}.parts")


def remove(output: str | Path) -> None:
    """Remove the parts of an output, whatever they depended on."""
    checkpoint.fs_remove(folder_of(output))


def digest_of(model: torch.nn.Module, *settings) -> str:
    """A digest of a model and of settings, each with a repr; and of what arithmetic depends on beside them."""
    digest = hashlib.sha256(repr((settings, torch.__version__, torch.get_num_threads())).encode())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        values = tensor.detach().flatten()
        sample = values[:: max(1, len(values) // SAMPLE)].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type}".encode())
        digest.update(sample.view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
