"""The language model behind two small adapters with the same verbs: embed, forward, generate.

Shapes: B rows, L input tokens, T label tokens, E width, V vocabulary.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

from vlm_tune.compat import cache_name
from vlm_tune.data.types import IGNORE_INDEX, Batch
from vlm_tune.errors import ArgumentError, ModelError
from vlm_tune.model.acceleration.decoder_layer import join
from vlm_tune.model.acceleration.head import by_kernel, head_loss
from vlm_tune.model.acceleration.interval_attention import Branches, attending, attends, growing, keeping, runs, usable
from vlm_tune.model.acceleration.mlp import gate
from vlm_tune.model.language.logits import FAULTS, embedding_factor, first_line, head_rule, own_logits
from vlm_tune.model.language.loss import token_loss
from vlm_tune.model.language.masks import additive, joining_reason, layer_masks, packing_reason, same_sample, tree_mask
from vlm_tune.model.language.virtual_tokens import KeyValuePrefix, SoftPrompt, VirtualTokens
from vlm_tune.quoting import quoted

Read = tuple[torch.Tensor, Callable[[torch.Tensor, torch.Tensor], torch.Tensor], Callable[[torch.Tensor], None]]
"""Hidden states [B, L, E] of rows; what gives those [B, K, E] of new tokens' embeds [B, K, E] and positions, call by call; and
what leaves only the branches at places [B, K'] to grow on."""

PROBED = 6
"""Tokens of a row by which a model is compared with its own forward pass."""
MOST = 1_000_000
"""The largest number of tokens or beams that is taken for one that is meant."""
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
SAMPLED = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "transformers_version",
    "_from_model_config",
    "max_length",
    "use_cache",
)
"""What a generation config says of sampling and lengths, which answers here do not depend on."""
POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings|positions_embed)$")
"""Tables of learned positions, as transformers names them."""
SPARED = 0.8
"""Share of the branches that are left below which the others are let go."""


@dataclass
class TokenLoss:
    """Cross-entropy summed over supervised tokens (fp32 scalar), and how many there are."""

    sum: torch.Tensor
    count: int


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: greedy, or beams."""

    max_new_tokens: int
    num_beams: int = 1

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)
        check_count("num_beams", self.num_beams)


def check_count(name: str, value: Any, most: int = MOST) -> None:
    """Raises `ArgumentError` unless a value is a whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ArgumentError(f"{name} is a whole number from 1 to {most:,}, got {quoted(value)}")


def largest(logits: torch.Tensor, block: int = 256) -> torch.Tensor:
    """Where the largest of logits [..., V] is, the first of equal ones: block by block, for torch's argmax on a CPU is no vector code."""
    if logits.device.type != "cpu" or logits.shape[-1] <= block:
        return logits.argmax(-1)
    size = logits.shape[-1]
    whole = size // block * block
    tops = logits[..., :whole].unflatten(-1, (-1, block)).amax(-1)
    if whole < size:
        tops = torch.cat([tops, logits[..., whole:].amax(-1, keepdim=True)], -1)
    # Past the end it is the last one again, which is not the first of equals.
    places = (tops.argmax(-1, keepdim=True) * block + torch.arange(block)).clamp(max=size - 1)
    return places.gather(-1, logits.gather(-1, places).argmax(-1, keepdim=True)).squeeze(-1)


def plain_generation(model: Any) -> dict[str, Any]:
    """Takes from a model's generation config all but its special ids, and returns what changed answers in it.

    Answers are greedy, or beams, by the model's logits alone: the same one by one, in batches, as branches and exported.
    """
    from transformers import GenerationConfig

    given = getattr(model, "generation_config", None)
    if given is None:
        return {}
    ids = {name: getattr(given, name, None) for name in IDS}
    model.generation_config = GenerationConfig(**{name: value for name, value in ids.items() if value is not None})
    changed = given.to_diff_dict().items()
    return {name: value for name, value in changed if name not in (*IDS, *SAMPLED) and value is not None and value is not False}


class LanguageModel(nn.Module):
    """Base of the adapters; `model` is the transformers model, LoRA layers injected in place.

    `prompt` holds virtual tokens that every row begins with, where prompt or prefix tuning made some. With `whole_head`
    the output head runs once a batch, not chunk by chunk.
    """

    layout: Literal["causal", "seq2seq"]

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.rule = head_rule(model, self.bodies, self.head)
        self.factor = 1.0 if self.layout == "seq2seq" else embedding_factor(self.body, model.get_input_embeddings())
        gate(model)
        join(model)
        self.prompt: VirtualTokens | None = None
        self.whole_head = False
        self.dropped = plain_generation(model)

    @property
    def virtual(self) -> int:
        """How many virtual tokens stand before every row."""
        return 0 if self.prompt is None else self.prompt.tokens

    @cached_property
    def longest(self) -> int | None:
        """Tokens of the longest row that the model has positions for; None where positions are computed, not looked up."""
        sizes = [
            module.num_embeddings - int(getattr(module, "offset", 0))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding) and POSITIONS.search(name)
        ]
        return min(sizes, default=None)

    def check_length(self, length: int) -> None:
        """Raises `ModelError` for rows of more tokens than the model has positions for, virtual tokens included."""
        if self.longest is not None and length > self.longest:
            raise ModelError(
                f"a row of {length} tokens (images and virtual tokens included), and {type(self.model).__name__} has positions for "
                f"{self.longest}: set data.max_length to at most {self.longest - self.virtual}, or ask less"
            )

    @cached_property
    def unjoined(self) -> str | None:
        """Why samples can't be joined to one row, None where they can."""
        raise NotImplementedError

    def check_joined(self) -> None:
        """Raises `ModelError` where samples can't be joined to one row."""
        if self.unjoined:
            raise ModelError(
                f"rows of {type(self.model).__name__} can't be joined, {self.unjoined}: set data.group: none and data.packing: false"
            )

    def room(self, decoding: Decoding, length: int) -> Decoding:
        """The decoding with as many new tokens after `length` others as there are positions for, one at least."""
        if self.longest is None or length + decoding.max_new_tokens <= self.longest + 1:
            return decoding
        return replace(decoding, max_new_tokens=self.longest - length + 1)  # the last one is read by nobody

    def prompted(self, embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """embeds [B, L, E] and attention mask [B, L] with the virtual tokens before them; a prefix stands in the mask alone."""
        return embeds if self.prompt is None else self.prompt.before(embeds), pad(mask, (self.virtual, 0), value=True)

    @property
    def width(self) -> int:
        """E, the width of the input embeddings."""
        embeddings = self.model.get_input_embeddings()
        return getattr(embeddings, "base_layer", embeddings).embedding_dim

    @property
    def head(self) -> nn.Module:
        """The output head."""
        return self.model.get_output_embeddings()

    @property
    def bodies(self) -> list[nn.Module]:
        """What puts out the hidden states that the head takes: one module, or one inside another that passes them on."""
        raise NotImplementedError

    @property
    def body(self) -> Any:
        """What makes hidden states of embeddings; transformers misnames it in Llama4ForCausalLM."""
        return self.model.base_model if self.model.base_model is not self.model else self.model.model

    def kept(self, input_ids: torch.Tensor) -> Any:
        """transformers' cache of the keys and values that self-attention over text keeps for ids [B, L] read from their start."""
        return self.body(input_ids=input_ids, use_cache=True)[cache_name()]

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings [B, L, E] of ids [B, L]."""
        embeds = self.model.get_input_embeddings()(input_ids)
        return embeds if self.factor == 1 else embeds * self.factor

    def forward(self, embeds: torch.Tensor, batch: Batch) -> TokenLoss:
        """Loss of the batch's supervised labels, given its embeds [B, L, E]."""
        hidden, targets = self.supervised(embeds, batch)
        head: Any = self.head
        scale = None if self.rule is None else self.rule.scale
        if scale is not None and not self.whole_head and by_kernel(hidden, head):
            return TokenLoss(head_loss(hidden if scale == 1 else hidden * scale, head.weight, targets), len(targets))
        return TokenLoss(token_loss(self.logits, hidden, targets, self.head_parts(), whole=self.whole_head), len(targets))

    def head_parts(self) -> nn.ModuleList:
        """The modules that `logits` calls: the head, and all beside the bodies where the model does more than a rule holds."""
        if self.rule is not None:
            return nn.ModuleList([self.head])
        bodies = [*self.bodies, *([self.model.get_encoder()] if self.layout == "seq2seq" else [])]
        inside = {id(module) for body in bodies for module in body.modules()}
        outside = [module for module in self.model.modules() if inside.isdisjoint(map(id, module.modules()))]
        return nn.ModuleList([self.head, *outside])

    @torch.no_grad()
    def check(self) -> None:
        """Compares the logits of a few tokens with those of the model's own forward pass.

        Raises `ModelError` for a model that is called in another way than it is made for: one whose logits differ, and a
        decoder whose tokens see what comes after them.
        """
        name = type(self.model).__name__
        if self.dropped:
            told = ", ".join(f"{key} {quoted(value)}" for key, value in self.dropped.items())
            logging.getLogger("vlm_tune").warning("%s: left out of its generation config, for answers follow its logits: %s", name, told)
        rows = self.model.get_input_embeddings().num_embeddings
        ids = (torch.arange(PROBED)[None] + rows // 3).repeat(2, 1).to(self.model.device) % rows
        ids[1, -1] = rows // 5
        mask = torch.ones_like(ids, dtype=torch.bool)
        batch = Batch(["a", "b"], ids, mask, torch.zeros_like(mask), ids, torch.zeros(0, dtype=torch.int64))
        was = self.training
        self.eval()
        try:
            theirs = self.theirs(batch)
            ours = self.supervised_logits(self.embed(ids), batch).view_as(theirs)
        except FAULTS as error:
            raise ModelError(
                f"a {name} can't be trained here: its forward pass does not take text alone, as embeddings ({first_line(error)})"
            ) from None
        finally:
            self.train(was)
        allowed = (1e-4 if theirs.dtype == torch.float32 else 3e-2) * max(float(theirs.abs().max()), 1.0)
        difference = float((ours - theirs.float()).abs().max())
        if not difference <= allowed:
            raise ModelError(
                f"a {name} can't be trained here: called with embeddings its logits are others than with ids, by {difference:.3g}"
            )
        if self.layout == "causal" and float((theirs[0, :-1] - theirs[1, :-1]).abs().max()) > allowed:
            raise ModelError(f"a {name} is no decoder as it is configured: its tokens see what comes after them (is_decoder: false?)")

    def theirs(self, batch: Batch) -> torch.Tensor:
        """Logits [B, T, V] of the model's own forward pass of a batch of text."""
        raise NotImplementedError

    def supervised(self, embeds: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states [S, E] that the head makes supervised tokens of, and those tokens [S], in row order."""
        raise NotImplementedError

    def supervised_logits(self, embeds: torch.Tensor, batch: Batch) -> torch.Tensor:
        """fp32 logits [S, V] of the supervised tokens, in row order."""
        return self.logits(self.supervised(embeds, batch)[0])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32[S, V] of hidden states [S, E], as the transformers model makes them."""
        return own_logits(self.model, self.bodies, hidden).float() if self.rule is None else self.rule.logits(self.head, hidden)

    def generate(
        self, embeds: torch.Tensor, attention_mask: torch.Tensor, decoding: Decoding, pad_id: int, stop_ids: list[int]
    ) -> torch.Tensor:
        """New ids [B, at most max_new_tokens]; decoders want their rows padded on the left."""
        raise NotImplementedError

    def _options(self, decoding: Decoding, pad_id: int, stop_ids: list[int]) -> dict[str, Any]:
        from transformers import GenerationConfig

        start = getattr(self.model.generation_config, "decoder_start_token_id", None)
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            do_sample=False,
            pad_token_id=pad_id,
            eos_token_id=stop_ids,
            decoder_start_token_id=start,
        )
        return {"generation_config": config}


class CausalLLM(LanguageModel):
    """A decoder: Llama, Mistral, Qwen, Gemma, SmolLM, GPT-2, ..."""

    layout = "causal"

    @property
    def bodies(self) -> list[nn.Module]:
        # Bart's decoder stands in a wrapper, whose decoder is called.
        inner = self.model.get_decoder()
        return [self.body, *(module for module in self.body.modules() if module is inner and inner is not self.body)]

    def theirs(self, batch: Batch) -> torch.Tensor:
        return self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False).logits

    @cached_property
    def unjoined(self) -> str | None:
        return joining_reason(self.model, self.body)

    def supervised(self, embeds: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        length, virtual, positions, ends = embeds.shape[1], self.virtual, batch.positions, batch.ends
        cache = None if self.prompt is None else self.prompt.cache(len(embeds), embeds.dtype)
        # The positions of joined rows begin anew with each of them.
        self.check_length(virtual + (length if positions is None or self.longest is None else int(positions.max()) + 1))
        embeds, mask = self.prompted(embeds, batch.attention_mask)
        if ends is not None:
            self.check_joined()
        if virtual and ends is not None:
            # Every sample of a joined row sees the virtual tokens, and its own tokens come after them.
            ends = pad(torch.where(ends > 0, ends + virtual, 0), (virtual, 0), value=virtual + length)
        if virtual and positions is not None:
            first = torch.arange(virtual, device=positions.device).expand(len(positions), -1)
            positions = torch.cat([first, positions + virtual], dim=1)
        own = None if positions is None else positions[:, -embeds.shape[1] :]
        before = runs()
        if attends(self):
            seen: Any = (torch.where(mask, mask.shape[1], 0) if ends is None else ends).int()[:, None, None]
        elif ends is None or positions is None or own is None:
            seen = mask.long()
        else:
            seen = layer_masks(self.model.config, tree_mask(ends)[:, :, -embeds.shape[1] :], own, positions, embeds.dtype)
        output = self.body(
            inputs_embeds=embeds,
            attention_mask=seen,
            position_ids=own,
            use_cache=False,
            **{cache_name(): cache},
        )
        if attends(self) and runs() == before and not isinstance(embeds, FakeTensor):
            raise ModelError(f"{type(self.model).__name__} does not attend by the function it is given; train in fp32, or report it")
        hidden, supervised = output.last_hidden_state[:, -length:], batch.labels != IGNORE_INDEX
        return hidden[supervised], batch.labels[supervised]

    def generate(
        self, embeds: torch.Tensor, attention_mask: torch.Tensor, decoding: Decoding, pad_id: int, stop_ids: list[int]
    ) -> torch.Tensor:
        embeds, mask = self.prompted(embeds, attention_mask)
        self.check_length(mask.shape[1])
        options = self._options(self.room(decoding, mask.shape[1]), pad_id, stop_ids)
        if isinstance(self.prompt, KeyValuePrefix):
            # transformers wants the whole input beside a cache, and drops what the cache stands for.
            options[cache_name()] = self.prompt.cache(len(embeds) * decoding.num_beams, embeds.dtype)
            embeds = pad(embeds, (0, 0, self.virtual, 0))
        with torch.compiler.set_stance("force_eager"):
            return self.model.generate(inputs_embeds=embeds, attention_mask=mask.long(), **options)

    def continue_branches(
        self, embeds: torch.Tensor, batch: Batch, leaves: torch.Tensor, max_new_tokens: int, stop_ids: list[int]
    ) -> torch.Tensor:
        """New ids [B, K, at most max_new_tokens], greedy, after each of the tokens `leaves` int64[B, K] of a row of branches.

        The rows are read once; then every branch grows by a token a step, and sees what its leaf sees and itself.
        """
        assert batch.ends is not None and batch.positions is not None
        rising = self.rule is not None and self.rule.rising
        self.check_length(int(batch.positions.max()) + 1)
        if self.longest is not None:
            max_new_tokens = min(max_new_tokens, self.longest - int(batch.positions.max()))
        seen = tree_mask(batch.ends)
        rows = torch.arange(len(leaves), device=embeds.device)[:, None]
        visible, positions = seen[:, 0][rows, leaves], batch.positions[rows, leaves]
        if usable(self):
            hidden, grow, keep = self._read(embeds, batch.ends, batch.positions, visible)
        else:
            hidden, grow, keep = self._read_masked(embeds, seen, batch.positions, visible)
        hidden = hidden[rows, leaves]
        stops, ended = torch.tensor(stop_ids, device=embeds.device), torch.zeros_like(leaves, dtype=torch.bool)
        found, place = stops[0].repeat(*leaves.shape, max_new_tokens), torch.arange(leaves.shape[1], device=embeds.device).expand_as(leaves)
        for step in range(max_new_tokens):
            # As they are where neither a wider type nor a soft cap moves the largest.
            said = largest(self.head(hidden) if rising else self.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]))
            found[..., step].scatter_(1, place, torch.where(ended, stops[0], said))
            ended = ended | torch.isin(said, stops)
            left = int((~ended).sum(1).max())
            if left == 0 or step + 1 == max_new_tokens:
                break
            positions = positions + 1
            if left < SPARED * ended.shape[1]:
                order = ended.int().argsort(dim=1, stable=True)[:, :left]
                keep(order)
                place, said, ended, positions = (each.gather(1, order) for each in (place, said, ended, positions))
            hidden = grow(self.embed(said), positions)
        return found

    def _read(self, embeds: torch.Tensor, ends: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor) -> Read:
        """Reads rows by the kernel. Compiled blocks run in every call: a graph knows neither a cache nor what is kept."""

        def run(embeds: torch.Tensor, ends: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            # A size of 1 would be a graph of its own.
            with attending(self), torch.compiler.set_stance("force_eager" if 1 in embeds.shape[:2] else "default"):
                return self._hidden(embeds, ends.int()[:, None, None], positions, None)

        with keeping() as kept:
            hidden = run(embeds, ends, positions)
        branches = Branches(kept, visible)

        def grow(embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            with growing(branches):
                return run(embeds, torch.zeros_like(positions), positions)

        return hidden, grow, branches.keep

    def _read_masked(self, embeds: torch.Tensor, seen: torch.Tensor, held: torch.Tensor, visible: torch.Tensor) -> Read:
        """Reads rows by the attention that transformers chose, given masks and a cache; `held` [B, L] are positions."""
        from transformers import DynamicCache

        config = self.model.config
        cache = DynamicCache()  # of no config, so it keeps all: what a window leaves out differs by branch
        hidden = self._hidden(embeds, layer_masks(config, seen, held, held, embeds.dtype), held, cache)

        def grow(embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            nonlocal visible, held
            own = torch.eye(visible.shape[1], dtype=torch.bool, device=embeds.device).expand(len(visible), -1, -1)
            visible, held = torch.cat([visible, own], -1), torch.cat([held, positions], -1)
            mask = layer_masks(config, visible[:, None], positions, held, embeds.dtype)
            # With a cache that grows, compiled blocks would be compiled anew.
            with torch.compiler.set_stance("force_eager"):
                return self._hidden(embeds, mask, positions, cache)

        def keep(places: torch.Tensor) -> None:
            nonlocal visible
            visible = visible[torch.arange(len(places), device=places.device)[:, None], places]

        return hidden, grow, keep

    def _hidden(self, embeds: torch.Tensor, mask: Any, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Hidden states [B, S, E] of tokens that follow those in the cache, given the mask or masks of what they see."""
        options = {cache_name(): cache, "use_cache": cache is not None}
        return self.body(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **options).last_hidden_state


class Seq2SeqLLM(LanguageModel):
    """An encoder-decoder: T5, Flan-T5, mT5, UL2."""

    layout = "seq2seq"

    @property
    def bodies(self) -> list[nn.Module]:
        return [self.model.get_decoder()]

    def kept(self, input_ids: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, decoder_input_ids=input_ids, use_cache=True)[cache_name()].self_attention_cache

    def prompted(self, embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # A prefix stands before what the decoder writes.
        if isinstance(self.prompt, SoftPrompt):
            return super().prompted(embeds, mask)
        return embeds, mask

    def theirs(self, batch: Batch) -> torch.Tensor:
        return self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), labels=batch.labels, use_cache=False
        ).logits

    @cached_property
    def unjoined(self) -> str | None:
        return packing_reason(self.model)

    def shifted(self, labels: torch.Tensor) -> torch.Tensor:
        """What the decoder reads, int64[B, T], to write labels [B, T]: its start token, then the labels but the last."""
        start = getattr(self.model.config, "decoder_start_token_id", None)
        if start is None:
            raise ModelError(f"{type(self.model).__name__}'s config names no decoder_start_token_id (T5's is its pad_token_id)")
        if hasattr(self.model, "prepare_decoder_input_ids_from_labels"):
            return self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        inputs = pad(labels[:, :-1], (1, 0), value=start)
        return inputs.masked_fill(inputs == IGNORE_INDEX, self.model.config.pad_token_id)

    def _prefix(self, rows: int, dtype: torch.dtype) -> Any:
        """transformers' cache of a decoder that begins with the prefix; None where there is none."""
        from transformers import DynamicCache, EncoderDecoderCache

        cache = None if self.prompt is None else self.prompt.cache(rows, dtype)
        return None if cache is None else EncoderDecoderCache(cache, DynamicCache())

    def supervised(self, embeds: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.shifted(batch.labels)
        embeds, mask = self.prompted(embeds, batch.attention_mask)
        self.check_length(mask.shape[1])
        mask, seen, order = mask.long(), mask.long(), None
        if batch.samples is not None and batch.label_samples is not None:
            self.check_joined()
            if self.virtual:
                raise ModelError("virtual tokens stand before one sample of an encoder-decoder: it takes no packed rows (data.packing)")
            own, said = batch.samples, batch.label_samples
            # Every sample's decoder begins with the start token. Relative positions are differences, so those inside
            # a sample are what they would be without its neighbours.
            inputs[:, 1:][said[:, 1:] != said[:, :-1]] = self.model.config.decoder_start_token_id
            earlier = torch.ones(said.shape[1], said.shape[1], dtype=torch.bool, device=said.device).tril()
            mask = additive(same_sample(own, own), embeds.dtype)
            seen = additive(same_sample(said, own), embeds.dtype)
            order = additive(same_sample(said, said) & earlier, embeds.dtype)
        encoded = self.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        hidden = self.model.get_decoder()(
            input_ids=inputs,
            attention_mask=order,
            encoder_hidden_states=encoded,
            encoder_attention_mask=seen,
            use_cache=False,
            **{cache_name(): self._prefix(len(embeds), embeds.dtype)},
        ).last_hidden_state
        supervised = batch.labels != IGNORE_INDEX
        return hidden[supervised], batch.labels[supervised]

    def generate(
        self, embeds: torch.Tensor, attention_mask: torch.Tensor, decoding: Decoding, pad_id: int, stop_ids: list[int]
    ) -> torch.Tensor:
        embeds, mask = self.prompted(embeds, attention_mask)
        self.check_length(mask.shape[1])
        encoded = self.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask.long())
        options, first = self._options(decoding, pad_id, stop_ids), 1
        if isinstance(self.prompt, KeyValuePrefix):
            # transformers wants the whole output so far beside a cache, and drops what the cache stands for.
            first += self.virtual
            options[cache_name()] = self._prefix(len(embeds) * decoding.num_beams, embeds.dtype)
            options["decoder_input_ids"] = mask.new_full((len(embeds), first), self.model.config.decoder_start_token_id, dtype=torch.int64)
        ids = self.model.generate(encoder_outputs=encoded, attention_mask=mask.long(), **options)
        return ids[:, first:]


LLMS: dict[str, type[LanguageModel]] = {"causal": CausalLLM, "seq2seq": Seq2SeqLLM}
