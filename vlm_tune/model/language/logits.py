"""From hidden states to logits as a transformers model makes them: its head, and what it scales, caps or adds around it.

What that is stands in the code of its `forward` alone, so it is found by calling that with other things in place of body
and head, not by the names of settings.

Shapes: S positions, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm_tune.errors import ModelError

FAULTS = (
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    LookupError,
    NotImplementedError,
    AssertionError,
)
"""What the forward pass of an architecture raises that can't be called with hidden states alone."""
PROBED = 3
"""Positions of a probe."""


@dataclass(frozen=True)
class HeadRule:
    """logits = cap(after * head(before * hidden)), where cap(x) is `cap * tanh(x / cap)`, or x without one."""

    before: float = 1.0
    after: float = 1.0
    cap: float | None = None

    @property
    def scale(self) -> float | None:
        """What the head's outputs are multiplied by in all, None where a cap does more than that."""
        return self.before * self.after if self.cap is None else None

    @property
    def rising(self) -> bool:
        """Whether the largest logit is the head's largest output."""
        return self.before * self.after > 0

    def logits(self, head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """fp32[..., V] of hidden states [..., E]."""
        found = head(hidden if self.before == 1 else hidden * self.before).float()
        found = found if self.after == 1 else found * self.after
        return found if self.cap is None else torch.tanh(found / self.cap) * self.cap


class _States(tuple[torch.Tensor]):
    """The output of a body, of which only the hidden states are known; all else is None."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _computing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, the module's forward pass is another."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


@contextmanager
def _real_buffers(model: nn.Module) -> Iterator[None]:
    """Within, the model's own buffers that are on the meta device, as Bart's bias of logits, are zeros on the CPU."""
    bare = {name: buffer for name, buffer in model.named_buffers(recurse=False) if buffer.is_meta}
    for name, buffer in bare.items():
        model._buffers[name] = torch.zeros_like(buffer, device="cpu")
    try:
        yield
    finally:
        model._buffers.update(bare)


def own_logits(model: Any, bodies: list[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E] as the model's own forward pass makes them of what `bodies` put out.

    A decoder is called with the states as its input, an encoder-decoder with them as the encoder's output.
    """
    states = hidden[None]
    inputs: dict[str, Any] = {"inputs_embeds": states}
    if model.config.is_encoder_decoder:
        inputs = {"encoder_outputs": _States((states,)), "decoder_inputs_embeds": states}
    with ExitStack() as stack:
        for body in bodies:
            stack.enter_context(_computing(body, lambda *_, **__: _States((states,))))
        return model(**inputs, use_cache=False, return_dict=True).logits[0]


def head_rule(model: Any, bodies: list[nn.Module], head: nn.Module) -> HeadRule | None:
    """The rule by which a model makes its logits, None where it does more than a rule holds.

    No weights are read: the head is replaced too. Raises `ModelError` for a model that makes no logits of hidden states.
    """
    seen: list[torch.Tensor] = []
    weight: Any = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    # Packed weights have another shape than the layer.
    rows = getattr(head, "out_features", weight.shape[0])
    width = getattr(head, "in_features", weight.shape[1])
    hidden = torch.linspace(-2, 3, PROBED * width, device="cpu").view(PROBED, width)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    given = torch.linspace(-2, 1.5, PROBED * rows, device="cpu").view(1, PROBED, rows) * (
        cap or 1.0
    )

    def note(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.append(x)
        return given

    was = model.training
    try:
        with torch.no_grad(), _real_buffers(model), _computing(head, note):
            found = own_logits(model.eval(), bodies, hidden)
    except FAULTS as error:
        raise ModelError(
            f"a {type(model).__name__} can't be trained here: it makes no logits of hidden states ({first_line(error)})"
        ) from None
    finally:
        model.train(was)
    if len(seen) != 1 or seen[0].device.type != "cpu" or found.device.type != "cpu":
        return None
    before = _factor(seen[0].reshape(-1), hidden.reshape(-1))
    if before is None or found.shape != given[0].shape:
        return None
    capped = HeadRule(before, cap=float(cap)) if cap else None
    if capped is not None and torch.allclose(
        capped.logits(nn.Identity(), given[0] / before), found, rtol=1e-5, atol=1e-6
    ):
        return capped
    after = _factor(found, given[0])
    return None if after is None else HeadRule(before, after)


class _Reached(Exception):
    """What the first layer is given, to go no further."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states


def embedding_factor(body: Any, embedding: Any) -> float:
    """What a decoder multiplies the embeddings of ids by before its layers, but not embeddings that it is given.

    1 where it is the same for both, or can't be told without weights; `LanguageModel.check` compares the whole.
    """
    given = torch.linspace(-2, 3, PROBED * embedding.embedding_dim, device="cpu").view(
        1, PROBED, -1
    )
    ids = torch.arange(PROBED, device="cpu")[None]

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if (
                isinstance(value, torch.Tensor)
                and value.shape == given.shape
                and value.is_floating_point()
            ):
                raise _Reached(value)

    def reached(**inputs: torch.Tensor) -> torch.Tensor | None:
        try:
            body(**inputs, use_cache=False)
        except _Reached as first:
            return first.states
        except FAULTS:
            return None
        return None

    layers = [module for module in body.modules() if module is not body and module is not embedding]
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(_computing(embedding, lambda *_, **__: given))
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(stop, with_kwargs=True).remove)
        of_ids = reached(input_ids=ids)
        of_embeds = reached(inputs_embeds=given.clone())
    if (
        of_ids is None
        or of_embeds is None
        or of_ids.device.type != "cpu"
        or of_embeds.device.type != "cpu"
    ):
        return 1.0
    return _factor(of_ids, of_embeds) or 1.0


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _factor(found: torch.Tensor, given: torch.Tensor) -> float | None:
    """The number by which all of `found` is `given` multiplied, None if there is none."""
    if found.shape != given.shape:
        return None
    if torch.equal(found, given.to(found.dtype)):
        return 1.0
    one = found.double()
    other = given.double()
    factor = float((one * other).sum() / (other * other).sum())
    return factor if torch.allclose(one, factor * other, rtol=1e-5, atol=1e-6) else None
