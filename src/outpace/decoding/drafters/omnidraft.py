"""OmniDraft: a draft model of another vocabulary, its drafts translated into the target's tokens.

target's tokens --bytes--> the same text in the draft's tokens (the twin) --chain--> drafted tokens
drafted tokens  --words--> target's tokens, scored by how such tokens fared before
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

import numpy as np

from ...errors import MethodError
from ...registry import register
from ...types import NO_PARENT, Draft, SamplingParams
from ..contracts import Drafter, DrafterContext, Market, Observation, Proposal, Sequence
from ..translation import Translated, Translator, Twin, Words
from .draft_model import DraftChain
from .grown import Draws
from .nodes import Nodes
from .owners import OwnerOf, PerOwner, one_owner
from .rates import Rates
from .sources import ModelSource, draft_model_of

_EDGES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.88, 0.94)  # bins of the draft model's probability of a target token
_PRIOR = (  # acceptance to start from: by how the token was found, and whether its word may go on, and by bin
    (0.08, 0.2, 0.35, 0.48, 0.6, 0.7, 0.8, 0.88, 0.94),  # one draft token of the same bytes, or a known word
    (0.06, 0.15, 0.25, 0.35, 0.48, 0.6, 0.7, 0.8, 0.88),  # spelled by the target's tokenizer
    (0.06, 0.16, 0.28, 0.4, 0.5, 0.6, 0.7, 0.78, 0.85),  # of the last word, found
    (0.03, 0.08, 0.13, 0.18, 0.24, 0.3, 0.35, 0.4, 0.45),  # of the last word, spelled: it may merge with what follows
)
_SPELLED, _LAST = 1, 2  # bits of a row of the table


class RereadSource(ModelSource):
    """A draft model whose text may change at its end."""

    def rewind(self, sequence: Sequence, length: int) -> None:
        """The text of `sequence` is no longer what was read from token `length` on."""
        kv = self._kv[sequence.id]
        self.cache.rollback(kv)
        self.cache.truncate(kv, min(self.cache.length(kv), length))


@dataclass(slots=True, eq=False)
class _State:
    twin: Twin
    sequence: Sequence  # of the twin's tokens, as the draft model's drafter sees it
    nodes: Nodes = field(default_factory=Nodes)  # the whole translation last made, until it is checked


@register(
    family="SPEC",
    title="OmniDraft: a draft model of another vocabulary",
    paper="https://arxiv.org/abs/2507.02659",
    exactness="identical",
    needs=("draft model of any vocabulary",),
    claim="up to 1.5x to 2x, the drafter trained online",
)
class OmniDraft(Drafter):
    """The draft model reads the text cut into its own tokens, and continues it by its likeliest tokens, one forward
    each. What it wrote becomes tokens of the target word by word: a cache of n-grams knows which run of target tokens a
    run of draft tokens stands for, learned from committed text that both vocabularies cut; unknown words are cut by the
    target's tokenizer. Tokens that the draft may have left unfinished are proposed only if such tokens prove right
    often enough. Penalties and sampling parameters do not reach the draft model.

    Ramakrishnan et al., "OmniDraft: A Cross-vocabulary, Online Adaptive Drafter for On-device Speculative Decoding",
    section 3 (cross-vocabulary speculative decoding with an online n-gram cache). Not built: its online distillation
    of the draft model. A vocabulary of bytes, not of strings, so that tokens may end inside a character.

    The cache holds words of the text that taught it: `owner_of` keeps those of different owners apart.

    Parameters: `lead` what the draft model reads before any text; `max_tokens` longest draft in the draft model's
    tokens; `min_reach` a draft ends where the probability of being reached and accepted falls below; `max_owners`
    owners that are remembered.
    Raises ParameterError for a value out of range.
    """

    name = "omnidraft"
    paper = "https://arxiv.org/abs/2507.02659"

    def __init__(
        self,
        source: RereadSource,
        translator: Translator,
        owner_of: OwnerOf = one_owner,
        lead: Seq[int] = (),
        max_tokens: int = 10,
        min_reach: float = 0.25,
        max_owners: int = 256,
    ) -> None:
        self.translator, self.lead, self.min_reach = translator, lead, min_reach
        self.chain = DraftChain(source, Draws.LIKELIEST, max_tokens, min_reach)
        self.source = source
        self.words = PerOwner(owner_of, Words, max_owners)
        self.rates = Rates(_PRIOR)
        self._states: dict[int, _State] = {}

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> OmniDraft:
        decoder = draft_model_of(context, cls.name)
        target, draft = context.tokenizer, context.draft_tokenizer
        if target is None or draft is None:
            raise MethodError(
                f"method {cls.name!r} translates between two vocabularies and needs the tokenizers of both models: "
                "pass `tokenizer` and `draft_tokenizer` in the DrafterContext (LLM does), or use method draft"
            )
        if target.same_vocabulary(draft):
            raise MethodError(
                f"method {cls.name!r} translates between vocabularies, but this draft model has the target's own: use "
                "method draft (or draft-tree), which drafts the target's tokens outright"
            )
        translator = Translator(draft.vocabulary, target.vocabulary)
        rows = min(decoder.config.vocab_size, len(draft.vocabulary.bytes))  # others are padding of the embedding
        owner_of = context.owner_of if context.owner_of is not None else one_owner
        lead = draft.prompt("a")[: -len(draft.encode("a"))]  # a beginning token, if the draft model wants one
        return cls(RereadSource(decoder, context.draft_pages, rows), translator, owner_of, lead, **options)

    def begin(self, sequence: Sequence) -> None:
        twin = Twin(self.translator, self.words.of(sequence), list(self.lead))
        state = _State(twin, Sequence(sequence.id, twin.tokens, 0, SamplingParams()))
        self._states[sequence.id] = state
        self.chain.begin(state.sequence)

    def end(self, sequence: Sequence) -> None:
        state = self._states.pop(sequence.id, None)
        if state is not None:
            self.chain.end(state.sequence)

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        self._read(sequence, self._states[sequence.id], seen)

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int], market: Market) -> Proposal:
        states = [self._states[sequence.id] for sequence in sequences]
        for sequence, state in zip(sequences, states, strict=True):
            self._read(sequence, state, None)
        # a sequence of control tokens alone may leave the draft model nothing to read
        wanted = [
            self._budget(s.twin, budget) if s.twin.tokens else 0 for s, budget in zip(states, budgets, strict=True)
        ]
        chains = self.chain.propose([state.sequence for state in states], wanted, market).drafts
        return Proposal(
            [
                self._translate(sequence, state, chain, budget, market.floor)
                for sequence, state, chain, budget in zip(sequences, states, chains, budgets, strict=True)
            ]
        )

    @staticmethod
    def _budget(twin: Twin, budget: int) -> int:
        """Draft tokens that make about `budget` target tokens, and one that shows where the last word ends."""
        return ceil(budget * len(twin.tokens) / max(twin.read, 1)) + 1 if budget else 0

    def _read(self, sequence: Sequence, state: _State, seen: Observation | None) -> None:
        """Check the last draft and bring the twin up to the text. Where its end is cut anew, what was read of that is
        taken back."""
        state.nodes.update_rates(self.rates, sequence.tokens)
        state.nodes = Nodes()
        before = len(state.twin.tokens)
        kept = state.twin.extend(sequence.tokens[state.twin.read :])
        if kept < before:
            self.source.rewind(state.sequence, kept)
        elif seen is not None:
            self.chain.observe(state.sequence, seen)

    def _translate(self, sequence: Sequence, state: _State, chain: Draft, budget: int, floor: float) -> Draft:
        """The whole translation is checked later; the part that may pay is proposed."""
        found = self.translator.translate(chain.tokens.tolist(), state.twin.words)
        scores = [] if chain.scores is None else chain.scores.tolist()
        state.nodes = nodes = Nodes(root=len(sequence.tokens))
        parent, reach, most = NO_PARENT, 1.0, 0
        for i, token in enumerate(found.tokens):
            cell = _cell(found, i, scores)
            score = float(self.rates.value[cell])
            reach *= score
            if reach >= max(self.min_reach, floor) and most == i < budget:
                most = i + 1
            parent = nodes.add(parent, token, score, cell)
        return Draft.chain(nodes.tokens[:most], self.name, np.array(nodes.scores[:most], dtype=np.float32))


def _cell(found: Translated, i: int, scores: list[float]) -> tuple[int, int]:
    """Where the acceptance of the i-th token is counted: by how it was found and how probable its draft tokens are."""
    kind = (_SPELLED if found.how[i] == "spelled" else 0) + (_LAST if found.last[i] else 0)
    return kind, bisect_right(_EDGES, prod(scores[row] for row in found.rows[i]))
