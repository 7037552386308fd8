"""The base class of language models, decoders and encoder-decoders: embed, forward, generate.

Shapes: B rows, L input tokens, T label tokens, E width, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn.functional import pad

from vlm_tune.compat import cache_name
from vlm_tune.data.batch import Batch
from vlm_tune.errors import ModelError
from vlm_tune.model.language.decoding import Decoding, plain_generation
from vlm_tune.model.language.logits import (
    FAULTS,
    embedding_factor,
    head_rule,
    own_logits,
)
from vlm_tune.model.language.loss import Reduction, token_loss
from vlm_tune.model.language.masks import Blocks
from vlm_tune.model.language.positions import learned_positions
from vlm_tune.model.language.row_buffers import Branches, Rows
from vlm_tune.model.language.virtual_tokens import VirtualTokens
from vlm_tune.quoting import quoted, reason_of

PROBED = 6
"""Tokens per row of the batch with which `LanguageModel.check` compares logits."""


@dataclass
class TokenLoss:
    """Cross-entropy summed over supervised tokens (fp32 scalar), and the number of those."""

    sum: torch.Tensor
    count: int


@dataclass
class AnswerLogprobs:
    """Log-probabilities of a batch's answers, fp32[A], each summed over the answer's tokens."""

    sums: torch.Tensor


@dataclass
class SupervisedLogprobs:
    """Log-probabilities of a batch's supervised tokens, fp32[S]."""

    logprobs: torch.Tensor


def chunked_loss(
    llm: LanguageModel,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    reduction: Reduction = "sum",
    temperature: float = 1.0,
) -> torch.Tensor:
    """Cross-entropy, an fp32 scalar or fp32[S], whose logits exist for some positions at a time.

    Args:
        llm: The language model, whose `logits` are computed.
        hidden: Hidden states [S, E].
        targets: Token ids int64[S].
        reduction: "sum", or "none" for the loss of each position.
        temperature: What logits are divided by.
    """
    logits = llm.logits if temperature == 1 else lambda states: llm.logits(states) / temperature
    return token_loss(
        logits, hidden, targets, llm.head_parts(), whole=llm.whole_head, reduction=reduction
    )


class Loss(Protocol):
    """A function as `chunked_loss`."""

    def __call__(
        self,
        llm: LanguageModel,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        reduction: Reduction = "sum",
        temperature: float = 1.0,
        /,
    ) -> torch.Tensor: ...


class LanguageModel(nn.Module):
    """Base class of the language models: a transformers model with one interface.

    Attributes:
        model: The transformers model, with LoRA layers injected in place.
        rule: How logits follow from the head's outputs; None where the model's forward pass has to
            be called for them.
        factor: What the embeddings of ids are multiplied by.
        prompt: The virtual tokens of prompt or prefix tuning that every row begins with, or None.
        whole_head: Whether the output head runs once per batch, not chunk by chunk.
        loss: The function of the summed cross-entropy, which `acceleration.install` replaces.
        dropped: The settings of the generation config that are left out (`plain_generation`).
    """

    layout: Literal["causal", "seq2seq"]
    native = False
    """Whether it is a whole vision-language model, whose forward pass takes ids and images."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.rule = head_rule(model, self.bodies, self.head)
        self.factor = (
            1.0
            if self.layout == "seq2seq"
            else embedding_factor(self.body, model.get_input_embeddings())
        )
        self.prompt: VirtualTokens | None = None
        self.whole_head = False
        self.loss: Loss = chunked_loss
        self.dropped = plain_generation(model)

    @property
    def virtual(self) -> int:
        """The number of virtual tokens before every row."""
        return 0 if self.prompt is None else self.prompt.tokens

    @property
    def vocabulary(self) -> int:
        """The number of rows of the embedding table, with those that no token has."""
        table = self.model.get_input_embeddings()
        # LoRA's layer around a table has none of its attributes.
        return getattr(table, "base_layer", table).num_embeddings

    @cached_property
    def longest(self) -> int | None:
        """The longest row, in tokens, that the model has learned positions for.

        None where positions are computed and not looked up in a table.
        """
        return learned_positions(self.model)

    def part_of(self, name: str) -> str:
        """The part (tower, connector, llm) that rules know a parameter of `model` by."""
        return "llm"

    def check_length(self, length: int) -> None:
        """Checks that the model has positions for rows of `length` tokens, virtual tokens included.

        Raises `ModelError` if the rows are longer.
        """
        if self.longest is not None and length > self.longest:
            raise ModelError(
                f"a row of {length} tokens (images and virtual tokens included), and "
                f"{type(self.model).__name__} has positions for {self.longest}: set "
                f"data.max_length to at most {self.longest - self.virtual}, or ask less"
            )

    def blocks(self, batch: Batch) -> Blocks | None:
        """The tokens of a batch that see each other both ways; None where none do."""
        return None

    @property
    def supports_intervals(self) -> bool:
        """Whether attention on this device can take `visible_until` in place of a mask."""
        return False

    @property
    def shares_beginnings(self) -> bool:
        """Whether prompts that begin alike have the same states there."""
        return True

    @cached_property
    def unjoined(self) -> str | None:
        """The reason why samples can't be joined to one row, None if they can."""
        raise NotImplementedError

    @property
    def reads_branches(self) -> bool:
        """Whether answers to one prompt are joined to one row, and not rows of their own."""
        return True

    def check_joined(self) -> None:
        """Raises `ModelError` if samples can't be joined to one row."""
        if self.unjoined:
            other = "; for preferences and rewards, another model" if self.reads_branches else ""
            raise ModelError(
                f"rows of {type(self.model).__name__} can't be joined, {self.unjoined}: "
                f"set data.group: none and data.packing: false{other}"
            )

    def room(self, decoding: Decoding, length: int) -> Decoding:
        """The decoding with `max_new_tokens` limited to the positions left after `length` tokens.

        One new token is always left.
        """
        if self.longest is None or length + decoding.max_new_tokens <= self.longest + 1:
            return decoding
        # The last new token needs no position: it is not fed back.
        return replace(decoding, max_new_tokens=self.longest - length + 1)

    def prompted(
        self, embeds: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts the virtual tokens before embeds [B, L, E] and their attention mask [B, L].

        A prefix of keys and values is added to the mask alone.
        """
        return embeds if self.prompt is None else self.prompt.before(embeds), pad(
            mask, (self.virtual, 0), value=True
        )

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
        """The modules that output the hidden states which the head takes.

        One module, or two where the outer one returns the inner one's output.
        """
        raise NotImplementedError

    @property
    def body(self) -> Any:
        """The model without its head; transformers misnames it in Llama4ForCausalLM."""
        return (
            self.model.base_model if self.model.base_model is not self.model else self.model.model
        )

    def prefill(self, input_ids: torch.Tensor) -> Any:
        """The transformers KV cache of self-attention after a prefill of ids [B, L].

        The first token is at position 0.
        """
        return self.body(input_ids=input_ids, use_cache=True)[cache_name()]

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings [B, L, E] of ids [B, L], as the model scales them."""
        embeds = self.model.get_input_embeddings()(input_ids)
        return embeds if self.factor == 1 else embeds * self.factor

    def forward(
        self,
        embeds: torch.Tensor,
        batch: Batch,
        *,
        by_answer: bool = False,
        temperature: float | None = None,
    ) -> TokenLoss | AnswerLogprobs | SupervisedLogprobs:
        """The loss of the batch's supervised labels, given its embeds [B, L, E].

        With `by_answer` the log-probabilities of the batch's answers, with a `temperature` those of
        its supervised tokens, of logits that are divided by it.
        """
        hidden, targets = self.supervised(embeds, batch)
        if temperature is not None:
            return SupervisedLogprobs(-self.loss(self, hidden, targets, "none", temperature))
        if by_answer:
            assert batch.answer_of is not None and batch.answer_lengths is not None
            losses = self.loss(self, hidden, targets, "none")
            sums = losses.new_zeros(len(batch.answer_lengths))
            return AnswerLogprobs(sums.index_add(0, batch.answer_of, -losses))
        return TokenLoss(self.loss(self, hidden, targets), len(targets))

    def head_parts(self) -> nn.ModuleList:
        """The modules that `logits` calls: the head, and without a rule all outside of `bodies`."""
        if self.rule is not None:
            return nn.ModuleList([self.head])
        bodies = [*self.bodies, *([self.model.get_encoder()] if self.layout == "seq2seq" else [])]
        inside = {id(module) for body in bodies for module in body.modules()}
        outside = [
            module
            for module in self.model.modules()
            if inside.isdisjoint(map(id, module.modules()))
        ]
        return nn.ModuleList([self.head, *outside])

    @torch.no_grad()
    def check(self) -> None:
        """Compares the logits of a few tokens with those of the model's own forward pass.

        It also logs a warning for settings that were dropped from its generation config.

        Raises:
            ModelError: The logits differ, so the model expects to be called in another way; or it
                is a decoder whose tokens see later tokens.
        """
        name = type(self.model).__name__
        if self.dropped:
            settings = ", ".join(f"{key} {quoted(value)}" for key, value in self.dropped.items())
            logging.getLogger("vlm_tune").warning(
                "%s: left out of its generation config, for answers follow its logits: %s",
                name,
                settings,
            )
        rows = self.vocabulary
        ids = (torch.arange(PROBED)[None] + rows // 3).repeat(2, 1).to(self.model.device) % rows
        ids[1, -1] = rows // 5
        mask = torch.ones_like(ids, dtype=torch.bool)
        batch = Batch(
            ["a", "b"], ids, mask, torch.zeros_like(mask), ids, torch.zeros(0, dtype=torch.int64)
        )
        was = self.training
        self.eval()
        try:
            theirs = self.theirs(batch)
            ours = self.supervised_logits(self.embed(ids), batch).view_as(theirs)
        except FAULTS as error:
            raise ModelError(
                f"a {name} can't be trained here: its forward pass does not accept embeddings "
                f"of text alone ({reason_of(error)})"
            ) from None
        finally:
            self.train(was)
        allowed = (1e-4 if theirs.dtype == torch.float32 else 3e-2) * max(
            float(theirs.abs().max()), 1.0
        )
        difference = float((ours - theirs.float()).abs().max())
        if not difference <= allowed:
            raise ModelError(
                f"a {name} can't be trained here: its logits for embeddings differ from those "
                f"for ids, by {difference:.3g}"
            )
        if (
            self.layout == "causal"
            and float((theirs[0, :-1] - theirs[1, :-1]).abs().max()) > allowed
        ):
            raise ModelError(
                f"a {name} is not configured as a decoder: its tokens attend to later ones "
                "(is_decoder: false?)"
            )

    def theirs(self, batch: Batch) -> torch.Tensor:
        """Logits [B, T, V] of the model's own forward pass for a batch of text."""
        raise NotImplementedError

    def supervised(self, embeds: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states [S, E] that predict supervised tokens, and those tokens [S], by row."""
        raise NotImplementedError

    def supervised_logits(self, embeds: torch.Tensor, batch: Batch) -> torch.Tensor:
        """fp32 logits [S, V] of the supervised tokens, in row order."""
        return self.logits(self.supervised(embeds, batch)[0])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits [S, V] of hidden states [S, E], as the transformers model computes them."""
        return (
            own_logits(self.model, self.bodies, hidden).float()
            if self.rule is None
            else self.rule.logits(self.head, hidden)
        )

    def generate(
        self,
        embeds: torch.Tensor,
        batch: Batch,
        decoding: Decoding,
        pad_id: int,
        stop_ids: list[int],
        **options: Any,
    ) -> torch.Tensor:
        """Generates answers by transformers' `generate`: by beam search, else by the likeliest id.

        Args:
            embeds: Input embeddings [B, L, E].
            batch: The rows; for a decoder, padded on the left.
            decoding: The numbers of new tokens, of beams, and of beams to return.
            pad_id: The id after a row's end.
            stop_ids: Ids that end an answer.
            **options: Further arguments of transformers' `generate`: processors of logits, ...

        Returns:
            New ids [B * beams to return, at most max_new_tokens].
        """
        raise NotImplementedError

    @property
    def uncontinued(self) -> str | None:
        """The reason why rows are not continued by `branches`, but by `generate`; None if they are.

        A beam search always goes by `generate`.
        """
        raise NotImplementedError

    def branches(
        self, embeds: torch.Tensor, batch: Batch, leaves: torch.Tensor, new_tokens: int
    ) -> Branches:
        """Prefills rows whose branches are then continued, each after its last token.

        Args:
            embeds: Input embeddings [B, L, E].
            batch: The rows, padded on the right.
            leaves: The last tokens of the branches in the rows, int64[B, K].
            new_tokens: The most new tokens of a branch.
        """
        raise NotImplementedError

    @property
    def unbatched(self) -> str | None:
        """The reason why rows can't join and leave others that are continued; None if they can."""
        raise NotImplementedError

    def rows(self) -> Rows:
        """Rows that join and leave while they are continued together; there are none yet."""
        raise NotImplementedError

    def positions_left(self, batch: Batch) -> int | None:
        """How many new tokens the model has positions for; None where there is no limit.

        Raises:
            ModelError: There are fewer than the rows of the batch have tokens.
        """
        return None

    def _options(self, decoding: Decoding, pad_id: int, stop_ids: list[int]) -> dict[str, Any]:
        """Options for `generate` of transformers."""
        from transformers import GenerationConfig

        start = getattr(self.model.generation_config, "decoder_start_token_id", None)
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            num_return_sequences=decoding.num_return_sequences if decoding.num_beams > 1 else 1,
            do_sample=False,
            pad_token_id=pad_id,
            eos_token_id=stop_ids,
            decoder_start_token_id=start,
        )
        return {"generation_config": config}
