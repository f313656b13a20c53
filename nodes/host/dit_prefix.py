"""Exact reuse in a diffusion transformer: what enters a block in the main pass enters it again.

What other nodes and ControlNets add between blocks is then in it. In the perturbed pass the blocks
before are passed over, all of it through per-call hooks of the host; no module is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...seg_core import Target
from .call import Call
from .prefix import Kept, NotReusable, joined

Around = Callable[[dict[str, Any], Callable[..., Any]], Any]
_STREAMS = ("img", "txt")


@dataclass(frozen=True)
class Fork:
    """The first block that a perturbed pass computes, or why it has to compute all of them."""

    target: Target
    obstacle: str = ""


def hook_block(call: Call, target: Target, around: Around) -> None:
    """Run `around(args, block)` in place of a block in one call.

    `block` is what would have run: another node's replacement, or the host's own block.
    """
    replaced = call.options.get("patches_replace", {})
    table = replaced.get("dit", {})
    key = (f"{target.part}_block", target.index)
    before = table.get(key)

    def hooked(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        if before is None:
            return around(args, extra["original_block"])
        return around(args, lambda own: before(own, extra))

    table = {**table, key: hooked}
    call.options = {**call.options, "patches_replace": {**replaced, "dit": table}}


def record(call: Call, kept: list[Kept], forks: Iterable[Fork], streams: tuple[str, ...]) -> None:
    """Make a main pass keep what enters the forks' blocks.

    Args:
        call: the model call; its hooks are extended.
        kept: where to keep, one for each wanted cond of the call.
        forks: where later passes will begin.
        streams: what flows from block to block.
    """
    for target in {fork.target for fork in forks if not fork.obstacle}:
        hook_block(call, target, _keep(target, kept, streams))


def _keep(target: Target, kept: list[Kept], streams: tuple[str, ...]) -> Around:
    def keep(args: dict[str, Any], block: Callable[..., Any]) -> Any:
        for name in _present(args, streams):
            for number, tensor in enumerate(_parts(args[name])):
                for one in kept:
                    one.keep((target, name, number), tensor)
        return block(args)

    return keep


def replay(
    call: Call,
    kept: list[Kept],
    fork: Fork,
    before: list[Target],
    *,
    last: bool,
) -> None:
    """Make a perturbed pass begin at its fork.

    Args:
        call: the model call; its hooks are replaced.
        kept: what the main pass kept, in the order of the call's conds.
        fork: where the pass begins.
        before: the blocks before it.
        last: no later pass needs what was kept, so that it need not be copied.

    Raises:
        NotReusable: if that would not be exact; the call is then as it was.
    """
    if fork.obstacle:
        raise NotReusable(fork.obstacle)
    names = {name for one in kept for name in one.tensors if _is_of(name, fork.target)}
    if not names or any(name not in one.tensors for one in kept for name in names):
        raise NotReusable("another node answered for the model in the main pass")
    if call.patches("post_input") and call.extra.get("ref_latents"):
        raise NotReusable("another node may have left the reference images out")
    given = {name: joined([one.tensors[name] for one in kept]) for name in names}
    if not last and len(kept) == 1:  # blocks write into what they are given
        given = {name: tensor.clone() for name, tensor in given.items()}

    for number, target in enumerate(before):
        hook_block(call, target, _pass_over if number else _pass_over_first)
    hook_block(call, fork.target, _resume(given, fork.target))


def _pass_over(args: dict[str, Any], block: Callable[..., Any]) -> dict[str, Any]:
    del block
    return {name: args[name] for name in _present(args, _STREAMS)}


def _pass_over_first(args: dict[str, Any], block: Callable[..., Any]) -> dict[str, Any]:
    # The host adds to what comes out of a block, and may still need what went into the first.
    streams = _pass_over(args, block)
    return {k: v.clone() if torch.is_tensor(v) else v for k, v in streams.items()}


def _resume(given: dict[Hashable, torch.Tensor], target: Target) -> Around:
    def resume(args: dict[str, Any], block: Callable[..., Any]) -> Any:
        resumed = dict(args)
        for name in _present(args, _STREAMS):
            if (target, name, 0) not in given:
                continue
            parts = tuple(given[target, name, n] for n in range(len(_parts(args[name]))))
            resumed[name] = parts[0] if torch.is_tensor(args[name]) else parts
        given.clear()
        return block(resumed)

    return resume


def _is_of(name: Hashable, target: Target) -> bool:
    return isinstance(name, tuple) and name[0] == target


def _present(args: dict[str, Any], streams: tuple[str, ...]) -> list[str]:
    return [name for name in streams if args.get(name) is not None]


def _parts(stream: Any) -> tuple[torch.Tensor, ...]:
    return (stream,) if torch.is_tensor(stream) else tuple(stream)
