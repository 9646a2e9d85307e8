"""Fill a network from a checkpoint, one tensor at a time.

    with torch.device("meta"):
        net = Llama(config)
    load(net, Checkpoint.open("/models/orpheus"), device="cuda", dtype=torch.bfloat16)

The network says where its parameters come from when its own names differ from the published ones:
it may define `sources(name) -> Sequence[Source]`. Nothing here knows a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from mstar.engine.checkpoint import Checkpoint
from mstar.engine.layers.quantized import Quantization, Quantized
from mstar.errors import WeightsError

__all__ = ["Checkpoint", "Source", "load", "randomize", "weight_bytes"]

Progress = Callable[[int, int, str], None]  # tensors done, tensors in all, the one just done
_LISTED = 20  # how many faults one error message spells out


@dataclass(frozen=True)
class Source:
    """Tensors of a checkpoint that together make one parameter.

    Attributes:
        names: the tensors' names in the checkpoint.
        combine: makes the parameter from them; it is given the tensors on the CPU, as stored. None
            concatenates along dimension 0, which fuses q/k/v or gate/up. Where the parameter has
            more dimensions than the pieces, the concatenation fills it in row-major order, which
            stacks experts: 2E pieces of [rows, in] fill [E, 2 * rows, in].
    """

    names: tuple[str, ...]
    combine: Callable[[list[Tensor]], Tensor] | None = None


@dataclass
class _Slot:
    """One tensor of a network, with every place that holds it (several if it is tied)."""

    tensor: Tensor
    optional: bool = False  # a buffer that already has its value
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def assign(self, value: Tensor | Quantized) -> None:
        if isinstance(self.tensor, nn.Parameter) and isinstance(value, Tensor):
            value = nn.Parameter(value, requires_grad=False)
        for holder, key in self.places:
            if isinstance(value, Quantized):
                delattr(holder, key)  # a module under the name of the parameter
            setattr(holder, key, value)

    def kind(self, quantization: Quantization | None) -> str | None:
        """How the tensor is quantised, if it is."""
        taken = quantization is not None and quantization.takes(self.names, self.tensor)
        return quantization.kind if taken else None


def load(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    quantization: Quantization | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Read every parameter and persistent buffer of `module` onto `device`; returns `module`.

    Tensors are streamed: besides the parameters themselves, the pieces of at most one parameter
    are alive at a time. Parameters that are tied in the module stay tied. Tensors of the
    checkpoint that nobody asks for are ignored. The module ends in eval mode without gradients.

    Args:
        module: usually built under `torch.device("meta")`. Non-persistent buffers (rotary tables)
            must hold their values: build them with an explicit `device="cpu"`.
        dtype: the run dtype of floating-point tensors; None keeps what is stored.
        quantization: the matrices that it names become `Quantized` piece by piece, from the
            numbers that are stored.
        progress: called after each tensor with (done, total, name).

    Raises:
        WeightsError: tensors are missing or have another shape (all are named, not only the
            first), or a file cannot be read.
    """
    faults: list[str] = []
    chosen: list[tuple[_Slot, Source]] = []
    for slot in _slots(module):
        options = [source for name in slot.names for source in _sources(module, name)]
        source = next((s for s in options if all(n in checkpoint for n in s.names)), None)
        if source is None:
            if not slot.optional:
                faults.append(_missing(slot, options, checkpoint))
        elif source.combine is None and (fault := _misfit(slot, source, checkpoint)):
            faults.append(fault)
        else:
            chosen.append((slot, source))
    _raise(faults, module, checkpoint)

    for done, (slot, source) in enumerate(chosen, start=1):
        kind = slot.kind(quantization)
        value = _read(slot, source, checkpoint, torch.device(device), dtype, kind)
        if value.shape != slot.tensor.shape:
            faults.append(_wrong_shape(slot.names[0], list(value.shape), slot))
        slot.assign(value)
        if progress is not None:
            progress(done, len(chosen), slot.names[0])
    _raise(faults, module, checkpoint)
    return _finish(module, device)


def weight_bytes(module: nn.Module) -> int:
    """Size of the parameters, tied ones counted once."""
    return sum(parameter.nbytes for parameter in module.parameters())


def randomize(
    module: nn.Module,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    quantization: Quantization | None = None,
    seed: int = 0,
) -> nn.Module:
    """Give `module` random weights, the same for the same seed and device; returns `module`.

    Matrices are normal with standard deviation 0.02, biases (and means) zero, and other vectors,
    which are scales of norms, one. Buffers that already have values keep them.

    Args:
        dtype: of floating-point tensors; None keeps what the module declares.
        quantization: see `load`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for slot in _slots(module):
        if slot.optional:
            continue
        old, name = slot.tensor, slot.names[0]
        keep = dtype is None or not old.is_floating_point()
        value = torch.empty(old.shape, dtype=old.dtype if keep else dtype, device=device)
        if not value.is_floating_point() or name.endswith(("bias", "mean")):
            value.zero_()
        elif value.numel() == max(value.shape, default=1):
            value.fill_(1.0)
        else:
            value.normal_(0.0, 0.02, generator=generator)
        if kind := slot.kind(quantization):
            plain, value = value, Quantized.empty(value.shape, kind, device)
            value.fill(0, plain)
            del plain  # before the next one is made
        slot.assign(value)
    return _finish(module, device)


def _slots(module: nn.Module) -> list[_Slot]:
    """The distinct parameters and persistent buffers of a module, in order of definition."""
    slots: dict[int, _Slot] = {}

    def add(tensor: Tensor, name: str, holder: nn.Module, key: str, optional: bool) -> None:
        slot = slots.setdefault(id(tensor), _Slot(tensor, optional))
        slot.names.append(name)
        slot.places.append((holder, key))

    for prefix, part in module.named_modules(remove_duplicate=False):
        path = f"{prefix}." if prefix else ""
        for key, tensor in part._parameters.items():
            if tensor is not None:
                add(tensor, path + key, part, key, False)
        for key, tensor in part._buffers.items():
            if tensor is not None and key not in part._non_persistent_buffers_set:
                add(tensor, path + key, part, key, not tensor.is_meta)
    return list(slots.values())


def _sources(module: nn.Module, name: str) -> Sequence[Source]:
    ask = getattr(module, "sources", None)
    return (Source((name,)),) if ask is None else ask(name)


def _read(
    slot: _Slot,
    source: Source,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None,
    kind: str | None,
) -> Tensor | Quantized:
    """The value of a slot on `device`; plain pieces go straight to their rows of it."""
    value, row = None, 0
    for piece in _pieces(source, checkpoint):
        if value is None:
            shape = slot.tensor.shape if source.combine is None else piece.shape
            keep = dtype is None or not piece.is_floating_point()
            if kind is not None:
                value = Quantized.empty(shape, kind, device)
            elif piece.shape == shape:
                return piece.to(device=device, dtype=piece.dtype if keep else dtype)
            else:
                value = torch.empty(shape, dtype=piece.dtype if keep else dtype, device=device)
                rows = value.view(-1, *piece.shape[1:])
        if kind is not None:
            value.fill(row, piece)
            row += piece.shape[:-1].numel()
        else:
            rows[row : row + len(piece)].copy_(piece)
            row += len(piece)
        del piece  # before the next one is read
    return value


def _pieces(source: Source, checkpoint: Checkpoint) -> Iterator[Tensor]:
    if source.combine is not None:
        yield source.combine([checkpoint.read(name) for name in source.names])
    else:
        yield from map(checkpoint.read, source.names)


def _misfit(slot: _Slot, source: Source, checkpoint: Checkpoint) -> str | None:
    """What is wrong with the shapes of a plain source, before anything is read."""
    want = slot.tensor.shape
    found = [checkpoint.shape(name) for name in source.names]
    if len(found) == 1:
        fits = found[0] == want
    else:
        tail = found[0][1:]
        one_tail = all(len(shape) and shape[1:] == tail for shape in found)
        whole = one_tail and sum(map(prod, found)) == want.numel()
        fits = whole and len(want) > len(tail) and want[len(want) - len(tail) :] == tail
    if fits:
        return None
    return _wrong_shape(" + ".join(source.names), " + ".join(str(list(s)) for s in found), slot)


def _wrong_shape(name: str, found: object, slot: _Slot) -> str:
    return f"{name}: found {found}, expected {list(slot.tensor.shape)}"


def _missing(slot: _Slot, options: Sequence[Source], checkpoint: Checkpoint) -> str:
    lacking = [[n for n in source.names if n not in checkpoint] for source in options]
    wanted = " or ".join(dict.fromkeys(" + ".join(names) for names in lacking)) or slot.names[0]
    return f"{wanted}: missing, expected {list(slot.tensor.shape)}"


def _raise(faults: list[str], module: nn.Module, checkpoint: Checkpoint) -> None:
    if not faults:
        return
    lines = faults[:_LISTED]
    if len(faults) > _LISTED:
        rest = Counter("missing" if ": missing" in f else "of another shape" for f in faults)
        counts = ", ".join(f"{count} {kind}" for kind, count in rest.items())
        lines.append(f"... and {len(faults) - _LISTED} more (in all {counts})")
    head = f"{checkpoint} does not fit {type(module).__name__}"
    raise WeightsError("\n  ".join([f"{head}:", *lines]))


def _finish(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Move the buffers that were not loaded, and refuse one that never had a value."""
    for prefix, part in module.named_modules():
        for key, tensor in part._buffers.items():
            if tensor is None:
                continue
            if tensor.is_meta:
                name = f"{prefix}.{key}" if prefix else key
                raise WeightsError(
                    f"{type(module).__name__}: buffer {name} has no value: it is not persistent "
                    'and was built on the meta device; build it with device="cpu"'
                )
            part._buffers[key] = tensor.to(device)
    return module.requires_grad_(False).eval()
