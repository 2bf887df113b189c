"""Between the vocabularies of a draft model and its target: one text, two ways to cut it into tokens.

    target     | def| un|believable|(|x|):\n|
    draft      | def| un|beli|ev|able|(|x|):|\n|
    words      |    |                              a word begins where both cut before a space and what follows it

A *word* is the unit of translation: merges of the usual vocabularies never reach over its beginning, so that each word
is cut the same whatever stands around it. It is a run of draft tokens on one side and a run of target tokens on the
other, and which belongs to which is remembered. Words hold bytes: a token may end inside a character.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..models.vocabulary import Vocabulary

NONE = -1
_LONGEST = 24  # draft tokens of a word that is remembered
_OPEN = 1024  # bytes without the beginning of a word, after which the tail counts as settled anyhow

Word = tuple[int, ...]
#: How a target token was found: the one draft token of the same bytes, the word was known, or cut by the tokenizer
How = Literal["exact", "known", "spelled"]


class Words:
    """Runs of draft tokens and the target tokens that they stand for; the longest unused are forgotten."""

    def __init__(self, most: int = 1 << 15) -> None:
        self.most = most
        self._of: OrderedDict[Word, Word] = OrderedDict()

    def __len__(self) -> int:
        return len(self._of)

    def find(self, draft: Word) -> Word | None:
        found = self._of.get(draft)
        if found is not None:
            self._of.move_to_end(draft)
        return found

    def learn(self, draft: Word, target: Word) -> None:
        """Of two translations of one word the later stays."""
        if len(draft) > _LONGEST:
            return
        self._of[draft] = target
        self._of.move_to_end(draft)
        if len(self._of) > self.most:
            self._of.popitem(last=False)


@dataclass(slots=True)
class Translated:
    """A draft in the target's tokens. `rows` are the draft tokens that begin inside a target token's bytes; `last`
    marks the tokens of the last word, which the draft may have left unfinished."""

    tokens: list[int] = field(default_factory=list)  # [n]
    how: list[How] = field(default_factory=list)  # [n]
    rows: list[range] = field(default_factory=list)  # [n]
    last: list[bool] = field(default_factory=list)  # [n]


class Translator:
    """Holds what follows from the two vocabularies alone; what is learned from text is in `Words`.

    `exact[d]` is the target token of the same bytes as draft token `d`, or the control token of the same name; NONE if
    there is none. `control[t]` is the draft's control token for one of the target.
    """

    def __init__(self, draft: Vocabulary, target: Vocabulary) -> None:
        self.draft, self.target = draft, target
        self.exact = [target.ids.get(written, NONE) if written else NONE for written in draft.bytes]
        names = {content: i for i, content in draft.control.items()}
        self.control = {t: names[content] for t, content in target.control.items() if content in names}
        for t, d in self.control.items():
            self.exact[d] = t
        self.begins = [written[:1] == b" " and written[1:2] not in (b"", b" ") for written in draft.bytes]

    def translate(self, draft: list[int], words: Words) -> Translated:
        """As many target tokens as `draft` stands for; stops before a token that has no meaning in the target."""
        out = Translated()
        for start, stop in self._runs(draft):
            run, last = tuple(draft[start:stop]), stop == len(draft)
            if self._alone(run[0]):
                if run[0] not in self.draft.control or self.exact[run[0]] == NONE:
                    break
                self._add(out, (self.exact[run[0]],), "exact", start, run, last=False)
                continue
            data = self.draft.text(list(run))
            known = words.find(run)
            if known is not None:
                self._add(out, known, "known", start, run, last)
            elif len(run) == 1 and self.exact[run[0]] != NONE:
                self._add(out, (self.exact[run[0]],), "exact", start, run, last)
            else:
                spelled = tuple(self.target.encode(whole_characters(data) if last else data))
                self._add(out, spelled, "spelled", start, run, last)
                if not last and self.begins[run[0]]:
                    words.learn(run, spelled)
        return out

    def _alone(self, token: int) -> bool:
        """Control tokens, and rows of the draft model that are no tokens."""
        return token >= len(self.exact) or not self.draft.bytes[token]

    def _runs(self, draft: list[int]) -> Iterator[tuple[int, int]]:
        """(start, stop) of each word and of each token that is none."""
        start = 0
        for i, token in enumerate(draft):
            alone = self._alone(token)
            if i > start and (alone or self.begins[token]):
                yield start, i
                start = i
            if alone:
                yield i, i + 1
                start = i + 1
        if start < len(draft):
            yield start, len(draft)

    def _add(self, out: Translated, tokens: Word, how: How, start: int, run: Word, last: bool) -> None:
        ends = [0]
        for token in run:
            ends.append(ends[-1] + len(self.draft.bytes[token]))
        at = row = 0
        for token in tokens:
            at += len(self.target.bytes[token])
            first = row
            while row < len(run) and ends[row] < at:
                row += 1
            out.tokens.append(token)
            out.how.append(how)
            out.rows.append(range(start + first, start + row))
            out.last.append(last)


@dataclass(slots=True, eq=False)
class Twin:
    """A sequence's text in the draft model's tokens, kept up as the target's tokens are committed.

    Only the last word can still change: `tokens[settled:]` is its present cut, `tail` its bytes and `pending` its
    target tokens. `tokens` may be given a beginning that the draft model wants before any text.
    """

    translator: Translator
    words: Words
    tokens: list[int] = field(default_factory=list)
    settled: int = field(init=False)
    read: int = 0  # target tokens
    tail: bytes = b""
    pending: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settled = len(self.tokens)

    def extend(self, new: Iterable[int]) -> int:
        """Read further target tokens. Returns how many of the draft's tokens are what they were before."""
        before, kept = self.tokens[self.settled :], self.settled
        target, control = self.translator.target, self.translator.control
        for token in new:
            self.read += 1
            if token not in target.control:
                written = target.bytes[token] if token < len(target.bytes) else b""
                self.tail += written
                self.pending.append(token)
                continue
            self._settle()
            self._close()
            # Those without a counterpart are left out; a beginning token that was given already is not doubled.
            if token in control and not (self.read == 1 and self.tokens == [control[token]]):
                self.tokens.append(control[token])
                self.settled += 1
        self._settle()
        for old, now in zip(before, self.tokens[kept:], strict=False):
            if old != now:
                break
            kept += 1
        return kept

    def _close(self) -> None:
        self.settled, self.tail, self.pending = len(self.tokens), b"", []

    def _settle(self) -> None:
        """Cut the tail into draft tokens; settle and learn the words that are complete."""
        translator = self.translator
        cut = translator.draft.encode(self.tail)
        self.tokens[self.settled :] = cut
        if translator.draft.text(cut) == self.tail:
            self._learn(cut)
        if len(self.tail) > _OPEN and whole_characters(self.tail) == self.tail:
            self._close()

    def _learn(self, cut: list[int]) -> None:
        """`cut` writes exactly the tail."""
        draft, target = self.translator.draft.bytes, self.translator.target.bytes
        places: dict[int, int] = {}  # byte -> target tokens before it
        at = 0
        for n, token in enumerate(self.pending):
            places[at] = n
            at += len(target[token]) if token < len(target) else 0
        first = first_target = first_byte = at = 0
        for i, token in enumerate(cut):
            if i and self.translator.begins[token] and at in places:
                word, meant = tuple(cut[first:i]), tuple(self.pending[first_target : places[at]])
                if len(word) > 1 or meant != (self.translator.exact[word[0]],):
                    self.words.learn(word, meant)
                first, first_target, first_byte = i, places[at], at
            at += len(draft[token])
        self.settled += first
        self.tail, self.pending = self.tail[first_byte:], self.pending[first_target:]


def whole_characters(data: bytes) -> bytes:
    """Without the beginning of a character at the end."""
    for n in range(1, min(3, len(data)) + 1):
        lead = data[-n]
        if lead >= 0xC0:
            size = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return data[:-n] if n < size else data
        if lead < 0x80:
            break
    return data
