"""Logits from hidden states as a transformers model computes them: head, scales, caps and biases.

A model's scales and caps are written in the code of its `forward` alone. They are determined by
calling that with stand-ins for body and head, not from the names of settings.

Shapes: S positions, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm_tune.compat import submodules
from vlm_tune.errors import ModelError
from vlm_tune.quoting import reason_of

FAULTS = (
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    LookupError,
    NotImplementedError,
    AssertionError,
)
"""Errors of a forward pass that can't be called with hidden states alone."""
PROBED = 3
"""Positions in the inputs with which a model is probed."""


@dataclass(frozen=True)
class HeadRule:
    """The formula logits = soft_cap(after * head(before * hidden)).

    soft_cap(x) is cap * tanh(x / cap), or x if `cap` is None.
    """

    before: float = 1.0
    after: float = 1.0
    cap: float | None = None

    @property
    def scale(self) -> float | None:
        """The factor from the head's outputs to the logits; None if they are capped as well."""
        return self.before * self.after if self.cap is None else None

    @property
    def rising(self) -> bool:
        """Whether the argmax of the logits is that of the head's outputs."""
        return self.before * self.after > 0

    def logits(self, head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits [..., V] of hidden states [..., E]."""
        logits = head(hidden if self.before == 1 else hidden * self.before).float()
        logits = logits if self.after == 1 else logits * self.after
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class _States(tuple[torch.Tensor]):
    """A stand-in for a body's output, with hidden states; every other attribute is None."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _computing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces a module's forward pass within the context."""
    original = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if original is not None:
            module.__dict__["forward"] = original


@contextmanager
def _real_buffers(model: nn.Module) -> Iterator[None]:
    """Puts zeros on the CPU in place of the model's meta-device buffers within the context.

    Only buffers of the model itself, not of its submodules, such as Bart's bias of logits.
    """
    bare = {name: buffer for name, buffer in model.named_buffers(recurse=False) if buffer.is_meta}
    for name, buffer in bare.items():
        setattr(model, name, torch.zeros_like(buffer, device="cpu"))
    try:
        yield
    finally:
        for name, buffer in bare.items():
            setattr(model, name, buffer)


def _real_device(model: nn.Module) -> torch.device:
    """The device of a model's weights, on which it is probed; the CPU for the meta device."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def own_logits(model: Any, bodies: list[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E], by the model's own forward pass.

    In it `bodies` are replaced: they output the states. A decoder is called with the states as its
    input embeddings, an encoder-decoder with them as the encoder's output.
    """
    states = hidden[None]
    inputs: dict[str, Any] = {"inputs_embeds": states}
    if model.config.is_encoder_decoder:
        inputs = {"encoder_outputs": _States((states,)), "decoder_inputs_embeds": states}
    copied = _with_bodies(model, bodies, lambda *_, **__: _States((states,)))
    return copied(**inputs, use_cache=False, return_dict=True).logits[0]


def _with_bodies(module: nn.Module, bodies: list[nn.Module], forward: Callable[..., Any]) -> Any:
    """A shallow copy of a model in which `bodies` compute `forward`; the model stays as it is.

    Only the bodies and what they are in are copied, so another thread may call the model at once.
    """
    children = {
        name: child if child is None else _with_bodies(child, bodies, forward)
        for name, child in submodules(module).items()
    }
    is_body = any(module is body for body in bodies)
    if not is_body and all(child is submodules(module)[name] for name, child in children.items()):
        return module
    copied = module.__new__(type(module))
    copied.__dict__ = {**module.__dict__, "_modules": children}
    if is_body:
        copied.__dict__["forward"] = forward
    return copied


def head_rule(model: Any, bodies: list[nn.Module], head: nn.Module) -> HeadRule | None:
    """The rule by which a model computes its logits.

    No weights are read: the head is replaced too.

    Returns:
        The rule, or None if the model does more than a rule can express.

    Raises:
        ModelError: The model can't compute logits from hidden states.
    """
    head_inputs: list[torch.Tensor] = []
    weight: Any = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    # Packed 4-bit weights have another shape than the layer.
    rows = getattr(head, "out_features", weight.shape[0])
    width = getattr(head, "in_features", weight.shape[1])
    device = _real_device(model)
    hidden = torch.linspace(-2, 3, PROBED * width, device=device).view(PROBED, width)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    head_outputs = torch.linspace(-2, 1.5, PROBED * rows, device=device).view(1, PROBED, rows) * (
        cap or 1.0
    )

    def note(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        head_inputs.append(x)
        return head_outputs

    was = model.training
    try:
        with torch.no_grad(), _real_buffers(model), _computing(head, note):
            logits = own_logits(model.eval(), bodies, hidden)
    except FAULTS as error:
        raise ModelError(
            f"a {type(model).__name__} can't be trained here: it makes no logits of hidden states "
            f"({reason_of(error)})"
        ) from None
    finally:
        model.train(was)
    if len(head_inputs) != 1 or head_inputs[0].device != device or logits.device != device:
        return None
    before = _factor(head_inputs[0].reshape(-1), hidden.reshape(-1))
    if before is None or logits.shape != head_outputs[0].shape:
        return None
    capped = HeadRule(before, cap=float(cap)) if cap else None
    if capped is not None and torch.allclose(
        capped.logits(nn.Identity(), head_outputs[0] / before), logits, rtol=1e-5, atol=1e-6
    ):
        return capped
    after = _factor(logits, head_outputs[0])
    return None if after is None else HeadRule(before, after)


class _Reached(Exception):
    """Stops a forward pass at its first layer, with that layer's input."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states


def embedding_factor(body: Any, embedding: Any) -> float:
    """The factor by which a decoder scales embeddings of ids, but not embeddings passed to it.

    1 if it treats both alike, or if the factor can't be determined without weights;
    `LanguageModel.check` compares the logits of the whole.
    """
    device = _real_device(body)
    embeds = torch.linspace(-2, 3, PROBED * embedding.embedding_dim, device=device).view(
        1, PROBED, -1
    )
    ids = torch.arange(PROBED, device=device)[None]

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in (*args, *kwargs.values()):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.shape == embeds.shape
                and tensor.is_floating_point()
            ):
                raise _Reached(tensor)

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
        stack.enter_context(_computing(embedding, lambda *_, **__: embeds))
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(stop, with_kwargs=True).remove)
        of_ids = reached(input_ids=ids)
        of_embeds = reached(inputs_embeds=embeds.clone())
    if of_ids is None or of_embeds is None or {of_ids.device, of_embeds.device} != {device}:
        return 1.0
    return _factor(of_ids, of_embeds) or 1.0


def _factor(scaled: torch.Tensor, original: torch.Tensor) -> float | None:
    """The number x with scaled = x * original, None if there is none."""
    if scaled.shape != original.shape:
        return None
    if torch.equal(scaled, original.to(scaled.dtype)):
        return 1.0
    left = scaled.double()
    right = original.double()
    factor = float((left * right).sum() / (right * right).sum())
    return factor if torch.allclose(left, factor * right, rtol=1e-5, atol=1e-6) else None
