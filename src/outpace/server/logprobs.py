"""Log-probabilities as clients get them: tokens as text and bytes, those alone that the text is made of."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from ..models.tokenizer import Tokenizer
from ..types import PromptReading, Result, SamplingParams

LOWEST = -9999.0  # stands for a probability of zero, which JSON cannot say
ScoredToken = tuple[int, float, list[tuple[int, float]]]  # token, log-probability, the likeliest with theirs


class Shown:
    """The tokens of one output, without the one that ended it and without those of a stop string."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._vocabulary = tokenizer.vocabulary
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else tokenizer.eos_ids)
        self._stops = bool(params.stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters so far
        self._held: list[ScoredToken] = []  # of a text that may yet be cut
        self._seen = self._written = 0  # bytes of all tokens before those, and of the text so far
        self._begun = False
        self._echo = False  # the prompt was shown

    def token(self, id: int) -> tuple[str, bytes]:
        """A control token is shown by its name."""
        named = self._vocabulary.control.get(id)
        data = named.encode() if named is not None else self._vocabulary.text([id])
        return data.decode("utf-8", "replace"), data

    def ends(self, id: int) -> bool:
        return id in self._ends

    def whole(self, result: Result) -> list[ScoredToken]:
        """Of a whole output."""
        found = zip(result.token_ids, result.logprobs or [], result.top_logprobs or [], strict=True)
        return self.certain(list(found), result.text, result)

    def certain(self, tokens: Sequence[ScoredToken], text: str, result: Result | None) -> list[ScoredToken]:
        """Those that are certain to stay, of `tokens` and of what was held back. `text` is what has become certain with
        them, `result` the whole output when it is over."""
        self._held += [one for one in tokens if self._echo or not self.ends(one[0])]
        self._written += len(text.encode("utf-8", "surrogatepass"))
        if not self._stops:
            found, self._held = self._held, []
            return found
        if text and not self._begun:  # some vocabularies write a space before a text that is not shown
            self._begun = True
            first = self._vocabulary.text([one[0] for one in self._held])
            self._seen -= first.startswith(b" ") and not text.startswith(" ")
        over = result is not None
        cut = result is not None and self._cut(result)
        found = []
        while self._held:
            size = len(self._vocabulary.text([self._held[0][0]]))
            if cut and self._seen >= self._written:
                self._held.clear()
            elif over or self._seen + size <= self._written:
                found.append(self._held.pop(0))
                self._seen += size
            else:
                break
        return found

    def _cut(self, result: Result) -> bool:
        """Whether a stop string ended it."""
        return result.finish_reason == "stop" and bool(result.token_ids) and not self.ends(result.token_ids[-1])

    def chat(self, tokens: Sequence[ScoredToken]) -> list[dict[str, Any]]:
        """OpenAI's `logprobs.content`."""
        return [
            {**self._entry(id, logprob), "top_logprobs": [self._entry(i, p) for i, p in top]}
            for id, logprob, top in tokens
        ]

    def legacy(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """`logprobs` of /v1/completions."""
        offsets = []
        for id, _, _ in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self.token(id)[1]))
        return {
            "tokens": [self._name(id) for id, _, _ in tokens],
            "token_logprobs": [max(logprob, LOWEST) for _, logprob, _ in tokens],
            "top_logprobs": [self._named(top) for _, _, top in tokens],
            "text_offset": offsets,
            "bytes": [list(self.token(id)[1]) for id, _, _ in tokens],
        }

    def prompt(self, tokens: Sequence[int], reading: PromptReading, characters: int) -> dict[str, Any]:
        """The same of a prompt, whose text has so many characters; control tokens are no part of it. Nothing was said
        of the first token. The token that ends the output is shown as well then: whoever counts tokens counts it."""
        assert reading.logprobs is not None and reading.top_logprobs is not None
        self._echo = True
        decoder, offsets, at = codecs.getincrementaldecoder("utf-8")("replace"), [], 0
        for id in tokens:
            offsets.append(min(at, characters))
            at += 0 if id in self._vocabulary.control else len(decoder.decode(self._vocabulary.text([id])))
        self._offset = characters
        return {
            "tokens": [self._name(id) for id in tokens],
            "token_logprobs": [None, *(max(logprob, LOWEST) for logprob in reading.logprobs)],
            "top_logprobs": [None, *map(self._named, reading.top_logprobs)],
            "text_offset": offsets,
            "bytes": [list(self.token(id)[1]) for id in tokens],
        }

    def _named(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """By the tokens' names; of two tokens that write the same the second is named by its id."""
        found: dict[str, float] = {}
        for id, logprob in top:
            name = self._name(id)
            found[f"token_id:{id}" if name in found else name] = max(logprob, LOWEST)
        return found

    def _name(self, id: int) -> str:
        r"""Its text; its bytes, as `bytes:\xe4\xbd`, if these are no whole characters."""
        text, data = self.token(id)
        if text.encode() == data:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _entry(self, id: int, logprob: float) -> dict[str, Any]:
        text, data = self.token(id)
        return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(data)}
