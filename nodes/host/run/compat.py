"""What is done for the kinds of other nodes' code; each is a row of docs/neighbours.md.

Code inside of the network is noticed by where the host lets it in. Caches get a memory for each
prediction by itself. Of guiders it is known which prompts each of ComfyUI's own compares.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.samplers import CFGGuider

from ..batch.call import Call
from ..batch.compiled import eager, is_compiled
from ..batch.network_call import NetworkCall
from ..batch.trees import tensors_in
from ..settings.branch import Branch

_MODULES_OWN = set(vars(torch.nn.Module()))
Kept = dict[str, Any]
_SIDES = {"positive", "negative", "middle", "empty_negative_prompt"}


def foreign_code(call: Call) -> frozenset[Hashable]:
    """Return what acts inside of a network in one call besides the host; empty if nothing does.

    Patches and replacements, an attention override, parts and methods of the network that were
    exchanged. Wrappers are not among them: rows join inside of those, where nobody sees them. Each
    is named by where it acts and whose code it is, so that a patch that is made anew for each call
    is the same one.
    """
    methods = exchanged_methods(call.model.diffusion_model).items()
    parts = call.model.current_patcher.object_patches.items()
    exchanged = (n for n, v in parts if n.startswith("diffusion_model") and not is_compiled(v))
    own = ((name, _code(value)) for name, value in methods)
    return patches_in(call.options).union(own, exchanged)


def may_mix_rows(foreign: frozenset[Hashable]) -> bool:
    """Tell whether any of what acts there may make rows of other rows, or count on them.

    A replacement of self-attention, as ComfyUI's SAG has one, does neither: it notes what it sees
    of one side, and a pass of its own for the other side would disturb it.
    """
    return any(not isinstance(one, tuple) or one[0] != "attn1" for one in foreign)


def patches_in(options: dict[str, Any]) -> frozenset[Hashable]:
    """Return the patches among the host's options, as the network sees them."""
    replaced = options.get("patches_replace", {}).items()
    tables = [*options.get("patches", {}).items(), *((n, t.values()) for n, t in replaced)]
    found = {(name, _code(patch)) for name, patches in tables for patch in patches}
    if "optimized_attention_override" in options:
        found.add(("override", _code(options["optimized_attention_override"])))
    return frozenset(found)


def has_rows_of_others(call: Call, inner: NetworkCall, guider: Any) -> bool:
    """Tell whether a network is given rows of other prompts than a call names, by their text.

    It costs a wait. Text that is nobody's is no sign of it: others may have altered a prompt.
    """
    given = inner.arguments.get("context")
    conds = [cond for side in getattr(guider, "conds", {}).values() for cond in side or ()]
    known = {cond["uuid"]: cond.get("model_conds", {}).get("c_crossattn") for cond in conds}
    texts = {name: known[name].cond for name in call.uuids if known.get(name) is not None}
    if not torch.is_tensor(given) or len(given) != len(call.x):
        return False

    def are_of(name: Hashable, rows: torch.Tensor) -> torch.Tensor:
        text = texts[name].to(rows)
        if text.shape[::2] != (1, rows.shape[2]):
            return rows.new_zeros(len(rows), dtype=torch.bool)
        tokens = min(text.shape[1], rows.shape[1])  # shorter text is repeated
        return (rows[:, :tokens] == text[:, :tokens]).flatten(1).all(dim=1)

    for chunk, name in enumerate(call.uuids):
        rows = given[call.rows(chunk)]
        others = [are_of(other, rows) for other in texts if other != name]
        if name in texts and others:
            foreign = torch.stack(others).any(dim=0) & ~are_of(name, rows)
            if foreign.any():
                return True
    return False


def _code(function: Any) -> Hashable:
    """Return whose code a function is: it outlives the function itself."""
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", type(function))


class NetworkMemory:
    """What code in the network's place remembers there, for each prediction by itself.

    Some nodes run a network by code of their own, which keeps what it computed as attributes of the
    network, under the label of the prediction. A perturbed prediction has the label of the base
    prediction: it gets a memory of its own, so that neither is answered with what the other
    computed.

    Attributes:
        is_rewritten: another node has exchanged methods of the network.
    """

    def __init__(self) -> None:
        self.is_rewritten = False
        self._before: Any = None
        self._own: dict[Hashable, Any] = {}

    def begin(self, network: Any) -> None:
        """Note what a network remembers before the first guided evaluation."""
        if self._before is None:
            self._before = _copied(_kept(network))

    def see(self, network: Any) -> None:
        """Note, while a network is called, whether another node has exchanged its methods."""
        self.is_rewritten |= bool(exchanged_methods(network))

    def observe(self, network: Any) -> bool:
        """Tell whether the exchanged methods have left tensors on the network since `begin`."""
        if not self.is_rewritten:
            return False
        before = {id(one) for one in tensors_in(self._before)}
        return any(id(one) not in before for one in tensors_in(_kept(network)))

    @contextmanager
    def of(self, owner: Hashable, network: Any) -> Iterator[None]:
        """Let a network remember, for one perturbed prediction, what that one has computed."""
        if not self.observe(network):
            yield
            return
        base = _kept(network)
        _exchange(network, self._own.get(owner, _copied(self._before)))
        try:
            yield
        finally:
            self._own[owner] = _kept(network)
            _exchange(network, base)

    def clear(self) -> None:
        """Let go of every tensor."""
        self._own.clear()
        self._before = None


def exchanged_methods(network: Any) -> dict[str, Any]:
    """Return the methods of a network that another node has exchanged, by name."""
    space, cls = vars(eager(network)), type(eager(network))
    return {
        name: value
        for name, value in space.items()
        if name not in _MODULES_OWN and callable(value) and callable(getattr(cls, name, None))
    }


def in_the_same_step(model_options: dict[str, Any]) -> dict[str, Any]:
    """Return options without the wrapper that would begin a step of ComfyUI's EasyCache anew.

    A step that it answers from its cache stays one: either both predictions come from there, or
    neither does. Their difference would else hold the error of the cache, times the scale.
    """
    transformer = model_options.get("transformer_options", {})
    wrappers = transformer.get("wrappers", {})
    others = {k: fns for k, fns in wrappers.get("calc_cond_batch", {}).items() if k != "easycache"}
    own = {**transformer, "wrappers": {**wrappers, "calc_cond_batch": others}}
    return {**model_options, "transformer_options": own}


def _kept(network: Any) -> Kept:
    space = vars(eager(network))
    return {name: value for name, value in space.items() if name not in _MODULES_OWN}


def _exchange(network: Any, kept: Kept) -> None:
    space = vars(eager(network))
    for name in _kept(network):
        del space[name]
    space.update(kept)


def _copied(value: Any) -> Any:
    """Return a copy of the containers in a value; what they hold stays."""
    if type(value) is dict:
        return {key: _copied(one) for key, one in value.items()}
    if type(value) is list:
        return [_copied(one) for one in value]
    return value


def expected_conds(guider: Any, branch: Branch) -> set[Hashable]:
    """Return the conds that a branch will ask for under a guider that ComfyUI ships.

    Under others with more than two sides `free` waits an evaluation: what it perturbs for nothing
    would be in the base prediction.
    """
    conds = getattr(guider, "conds", {})
    cond, uncond = "positive", "negative"
    if "middle" in conds:  # DualCFGGuider compares neighbours
        nested = getattr(guider, "nested", False)
        cond, uncond = ("positive", "middle") if nested else ("middle", "negative")
    elif branch.side == "unconditional" and not _makes_uncond(guider):
        uncond = cond
    if branch.side == "free" and conds.keys() - _SIDES:
        return set()
    side = cond if branch.side == "conditional" else uncond
    return {one["uuid"] for one in conds.get(side) or ()}


def _makes_uncond(guider: Any) -> bool:
    """Tell whether a guider with two sides at most predicts without the prompt."""
    if not getattr(guider, "conds", {}).get("negative"):
        return False
    is_at_cfg_1 = type(guider) is CFGGuider and math.isclose(guider.cfg, 1.0)
    return not is_at_cfg_1 or guider.model_options.get("disable_cfg1_optimization", False)


def tell_conds_apart(guider: Any) -> None:
    """Give each cond of a run an identity of its own.

    Where one prompt has an area and the other has none, the host copies a cond of the one to the
    other side together with its uuid. The dictionaries belong to this run alone.
    """
    seen = set[Hashable]()
    for conds in getattr(guider, "conds", {}).values():
        for cond in conds or ():
            if cond["uuid"] in seen:
                cond["uuid"] = uuid.uuid4()
            seen.add(cond["uuid"])
