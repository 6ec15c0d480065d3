"""LocalPolicy: the policy as one plain model in this process, where the trainer's own is sharded over ranks or adapted.

Over it a `PolicyView` is built as over any model. Tensors are the trainer's own wherever those are usable; for the rest it holds
copies, which `refresh` rewrites in place, so that whatever was captured over them stays valid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from atlas_rl.engine.memory import free_bytes
from atlas_rl.engine.policy_view import fingerprint
from atlas_rl.engine.twin import UnsupportedModel, adopt, blank_model
from atlas_rl.integrations.distributed import (
    compute_device,
    compute_dtypes,
    full_shape,
    gathered,
    is_sharded,
    needs_gathering,
    plain_class,
    refuse_other_shards,
    show_shards,
)
from atlas_rl.integrations.peft import Place, adapter_state, check_mergeable, merged_parameters, plain_modules

BUCKET_BYTES = 64 * 2**20
"""Sharded parameters are gathered together up to this many bytes, and one by one beyond."""


class Part:
    """Parameters of the local model that are copies, and what they are made from: a sharded parameter as it is, or all that an
    adapted layer consists of."""

    def __init__(
        self,
        sources: list[nn.Parameter],
        copies: dict[str, nn.Parameter],
        values_of: Callable[[Mapping[int, torch.Tensor]], Mapping[str, torch.Tensor]],
    ) -> None:
        self.sources = sources
        self.copies = copies
        """By name; on the meta device until they are allocated."""
        self.values_of = values_of
        """From the full values of the sources, by id, to those of the copies."""
        self.users: list[tuple[nn.Module, str, str]] = []
        """A module of the local model, the parameter's name there, and the copy's name here: several where weights are tied."""

    @property
    def num_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.copies.values())

    def add_user(self, module: nn.Module, name: str, copy_name: str) -> None:
        self.users.append((module, name, copy_name))
        module._parameters[name] = self.copies[copy_name]

    def allocate(self, device: torch.device) -> None:
        self.copies = {name: _parameter(torch.empty_like(blank, device=device)) for name, blank in self.copies.items()}
        for module, name, copy_name in self.users:
            module._parameters[name] = self.copies[copy_name]

    def write(self, full: Mapping[int, torch.Tensor]) -> None:
        for name, value in self.values_of(full).items():
            self.copies[name].copy_(value)


class LocalPolicy:
    """A plain model of this process that computes what the trainer's model computes.

    A copy has the dtype that the trainer's own forward has the parameter in: under FSDP2 with mixed precision the policy's
    `param_dtype`, since the forward casts all parameters to it; under ZeRO-3 that of the engine's weights, which is the compute
    dtype; otherwise, and so under autocast, that of the parameter itself.

    Nothing is allocated before `allocate` or the first `refresh`, and nothing communicated outside of `refresh`. Where
    parameters are sharded, all ranks make it together and refresh it together (`is_collective`).

    Raises:
        UnsupportedModel: class, config and mergeable adapters do not describe the model.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        if getattr(policy, "is_quantized", False):
            raise UnsupportedModel("its weights are quantised")
        show_shards(policy)
        self.policy = policy
        places = plain_modules(policy)
        self.model = blank_model(plain_class(policy), copy.deepcopy(policy.config)).eval()
        """The plain model."""
        adopt(self.model, {name: place.module for name, place in places.items()}, plain_class)
        self.parts = self._make_parts(places)
        self.buckets = _buckets(self.parts)
        self.structure = _structure(policy, places)
        self.is_allocated = False
        self.is_collective = any(is_sharded(p) for part in self.parts for p in part.sources)
        """Whether a refresh communicates."""
        self.device = compute_device(next(policy.parameters()))
        self.num_gathers = 0
        """Refreshes that communicated."""
        self.gathered_bytes = 0
        """Written into copies, by refreshes of a sharded policy."""
        self.written: Any = None
        """The fingerprint of what the copies were last made from."""

    @classmethod
    def of(cls, policy: PreTrainedModel) -> LocalPolicy | None:
        """None where the policy's own tensors are usable as they are: one process, DDP, ZeRO-1 and 2, without adapters."""
        refuse_other_shards(policy)
        is_plain = all(
            name_now == name and place.module is module and place.tuner is None
            for (name_now, place), (name, module) in zip(plain_modules(policy).items(), policy.named_modules())
        )
        if is_plain and not any(is_sharded(p) for p in policy.parameters()) and plain_class(policy) is type(policy):
            return None
        return cls(policy)

    def _make_parts(self, places: dict[str, Place]) -> list[Part]:
        parts: dict[Any, Part] = {}
        dtypes = compute_dtypes(self.policy)

        def blank(source: nn.Parameter) -> nn.Parameter:
            dtype = dtypes.get(id(source), source.dtype)
            return _parameter(torch.empty(full_shape(source), dtype=dtype, device="meta"))

        for name, module in self.model.named_modules():
            place = places[name]
            own = {key: p for key, p in place.module._parameters.items() if p is not None}
            if place.tuner is not None:
                sources = list(place.tuner.parameters())
                key = (type(place.tuner), *map(id, sources))  # layers of tied weights may share their adapter as well
                if key not in parts:
                    check_mergeable(name, place.tuner)
                    merge = partial(merged_parameters, place.tuner)
                    parts[key] = Part(sources, {name: blank(p) for name, p in own.items()}, merge)
                for parameter_name in own:
                    parts[key].add_user(module, parameter_name, parameter_name)
                continue
            for parameter_name, source in own.items():
                if not is_sharded(source):
                    continue
                if id(source) not in parts:
                    parts[id(source)] = Part([source], {"": blank(source)}, partial(_value_of, source))
                parts[id(source)].add_user(module, parameter_name, "")
        return list(parts.values())

    @property
    def copied_bytes(self) -> int:
        """What the copies take, allocated or not."""
        return sum(part.num_bytes for part in self.parts)

    def check_fits(self, kv_bytes: int = 0) -> None:
        """Before the first refresh: is there memory for the copies and this much KV?

        Raises:
            ValueError
        """
        if self.is_allocated:
            return
        passing = max((_passing_bytes(bucket) for bucket in self.buckets), default=0)
        free = free_bytes(self.device)
        if self.copied_bytes + passing + kv_bytes > free:
            gib = [f"{n / 2**30:.3g} GiB" for n in (self.copied_bytes, passing, free, kv_bytes)]
            kind = "full copy of its sharded weights" if self.is_collective else "copy of its adapted weights"
            raise ValueError(
                f"to roll out, the policy needs a {kind}, which takes {gib[0]} on this device ({self.device}) and {gib[1]} "
                f"in passing; {gib[2]} are free, and KV for one sequence takes {gib[3]}. Train in bfloat16, keep less of "
                "the trainer on the device (more ranks to shard over, offload_optimizer_device: cpu), use a larger device, "
                "or remove the Atlas callback"
            )

    def needs_gathering(self) -> bool:
        """Whether a refresh would communicate now: a trainer may have made its weights whole around the call."""
        return any(needs_gathering(p) for part in self.parts for p in part.sources)

    def has_changed(self) -> bool:
        """Whether adapted layers are no longer what the copies were made from; of sharded weights only the caller can know."""
        assert not self.is_collective
        return self.written != self._fingerprint()

    def is_current(self) -> bool:
        """Whether the policy still consists of what it did: adapters may have been added, or another module been put to use.

        If not, a new LocalPolicy is needed.
        """
        return self.structure == _structure(self.policy, plain_modules(self.policy))

    def allocate(self) -> None:
        """Take the memory that the copies need, if that is still to be done: what can fail on one rank alone."""
        with torch.inference_mode(False):  # a drafter's loss takes the copies as constants
            for part in self.parts if not self.is_allocated else ():
                part.allocate(self.device)
        self.is_allocated = True

    def release(self) -> None:
        """Give the copies' memory back, until the next refresh. Whatever was built over them is void."""
        for part in self.parts:
            part.allocate(torch.device("meta"))
        self.is_allocated, self.written = False, None

    def refresh(self) -> None:
        """Rewrite the copies, in place, from the policy's weights as they are now. The policy is only read.

        What fails on this rank is raised at the end, when others no longer wait for it.
        """
        self.allocate()
        failure: Exception | None = None
        with torch.inference_mode(False), torch.no_grad():
            self.num_gathers += self.needs_gathering()
            for bucket in self.buckets:
                with gathered(list({id(p): p for part in bucket for p in part.sources}.values())) as full:
                    try:
                        for part in bucket:
                            part.write(full)
                    except Exception as error:
                        failure = failure or error
            if failure is not None:
                raise failure
            if self.is_collective:
                self.gathered_bytes += self.copied_bytes
            else:
                self.written = self._fingerprint()

    def _fingerprint(self) -> Any:
        sources = {id(p): p for part in self.parts for p in part.sources}
        return fingerprint(sources.values()), _adapter_states(self.policy)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _value_of(source: nn.Parameter, full: Mapping[int, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return {"": full[id(source)]}


def _sharded_sources(parts: list[Part]) -> list[nn.Parameter]:
    return list({id(p): p for part in parts for p in part.sources if is_sharded(p)}.values())


def _passing_bytes(bucket: list[Part]) -> int:
    """What is gathered at a time, and an adapted layer's clone to merge into."""
    return sum(_num_bytes(p) for p in _sharded_sources(bucket)) + max(part.num_bytes for part in bucket)


def _num_bytes(parameter: nn.Parameter) -> int:
    return full_shape(parameter).numel() * parameter.element_size()


def _buckets(parts: list[Part]) -> list[list[Part]]:
    """Parts to be written from one gathering; those that share a sharded parameter are in the same one."""
    buckets: list[list[Part]] = []
    bucket_of: dict[int, list[Part]] = {}
    num_bytes = 0
    for part in parts:
        sharded = {id(p): _num_bytes(p) for p in _sharded_sources([part])}
        earlier = next((bucket_of[key] for key in sharded if key in bucket_of), None)
        if earlier is not None:
            earlier.append(part)
        else:
            num_bytes += sum(sharded.values())
            if not buckets or not sharded or num_bytes > BUCKET_BYTES:
                buckets.append([])
                num_bytes = sum(sharded.values())
            buckets[-1].append(part)
        bucket_of.update(dict.fromkeys(sharded, earlier or buckets[-1]))
    return buckets


def _structure(policy: nn.Module, places: dict[str, Place]) -> list[Any]:
    """Names no parameter that FSDP2 manages: it exchanges them around a forward."""
    structure = []
    for name, place in places.items():
        holder = place.tuner if place.tuner is not None else place.module
        is_managed = getattr(place.module, "_is_fsdp_managed_module", False)
        parameters = [] if is_managed else holder.parameters(recurse=place.tuner is not None)
        # an emptied parameter may have another device than a gathered one
        kinds = [(id(p), p.dtype, None if is_sharded(p) else p.device) for p in parameters]
        structure.append((name, id(holder), id(place.module), kinds))
    return structure


def _adapter_states(policy: nn.Module) -> list[Any]:
    return [adapter_state(place.tuner) for place in plain_modules(policy).values() if place.tuner is not None]
