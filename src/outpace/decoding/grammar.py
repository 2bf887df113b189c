"""Output that keeps to a grammar: a JSON schema, a regular expression or a context-free grammar, by `llguidance`.

A grammar says which tokens may follow a text. Where one sequence is in its grammar is a `Matcher`: it belongs to the
sampler's `History`, goes along every path that the history goes along and back with it, and forbids tokens in
`sampling.process`: in plain decoding, in every node of a draft and for a drafter's own rows alike. When the grammar is
complete, stop tokens alone are left.

Shapes: `V` vocabulary of the target.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
from numpy.typing import NDArray

from ..errors import GrammarError, ParameterError
from ..models.tokenizer import Tokenizer
from ..types import SamplingParams

_KEPT = 32  # compiled grammars of one tokenizer
NOTHING_FOLLOWS = "no token of the model can follow"
_FORMATS = {"json_schema": "json_schema", "regex": "regex", "grammar": "gbnf"}  # ours -> the library's


class Matcher:
    """Where one sequence is in its grammar, `start` being the library's matcher at its beginning. A token that the
    grammar does not allow leads off it, from where `retreat` alone leads back: nothing that stands there is ever
    accepted, so there nothing is forbidden either."""

    def __init__(self, start: Any, vocab_size: int, stop_ids: Iterable[int], eos_ids: Iterable[int]) -> None:
        self._start, self._matcher, self._vocab_size = start, start.deep_copy(), vocab_size
        self._stop_ids = np.array(sorted(stop_ids), dtype=np.int64)
        self._eos_ids = np.array(sorted(eos_ids), dtype=np.int64)
        self._tokens: list[int] = []  # on the grammar
        self._beyond = 0  # tokens behind a stop token or off the grammar

    def advance(self, token: int) -> None:
        """`token` follows."""
        if not self._beyond and self._matcher.try_consume_tokens([token]):
            self._tokens.append(token)
        else:
            self._beyond += 1

    def retreat(self, n: int = 1) -> None:
        """Take the last `n` tokens back."""
        back = min(n, self._beyond)
        self._beyond -= back
        if n > back:
            del self._tokens[len(self._tokens) - (n - back) :]
            if not self._matcher.rollback(n - back):
                self._return()

    def allowed(self) -> NDArray[np.bool_] | None:
        """Which tokens may follow, [V]; at least one. None off the grammar.

        Raises GrammarError when the grammar asks for more than the library's limits allow.
        """
        if self._beyond:
            return None
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.zeros(self._vocab_size, dtype=np.bool_)
        if self._matcher.is_error():
            reason = _error(self._matcher)
            self._return()
            if reason != NOTHING_FOLLOWS:
                raise GrammarError(f"the grammar cannot be followed any further: {reason}")
        else:
            bits = np.unpackbits(packed, bitorder="little")
            n = min(len(bits), len(allowed))
            allowed[:n] = bits[:n]
            allowed[self._eos_ids] = False  # which of them end this request is not the library's to say
        if self._matcher.is_accepting() or not allowed.any():  # complete, or nothing can complete it
            allowed[self._stop_ids] = True
        return allowed

    def _return(self) -> None:
        """To where it was, by another way: the library's matcher never leaves an error."""
        self._matcher = self._start.deep_copy()
        self._matcher.consume_tokens(self._tokens)


def _error(matcher: Any) -> str:
    """What a matcher complains of, "" if of nothing."""
    found: str = matcher.get_error().removesuffix("<non-verbose/>").strip()
    return NOTHING_FOLLOWS if found.startswith("NoExtension") else found


class Grammars:
    """Compiles grammars for one tokenizer, each once; those least recently used are forgotten. Safe to use from several
    threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._size = ref(tokenizer), max(tokenizer.vocab_size, vocab_size)  # kept by a weak key below
        self._eos_ids, self._vocab_size = sorted(tokenizer.eos_ids), vocab_size
        self._vocabulary: Any = None  # of the library
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = Lock()  # of the table
        self._compiling = Lock()

    def matcher(self, params: SamplingParams, stop_ids: Iterable[int]) -> Matcher:
        """At the beginning of the grammar of `params`. `stop_ids` are what may end the output.

        Raises GrammarError for a grammar that does not compile or that nothing matches, ParameterError if the library
        is missing.
        """
        assert params.constraint is not None
        start = self.prepare(params.constraint)
        return Matcher(start, self._vocab_size, stop_ids, self._eos_ids)

    def prepare(self, constraint: tuple[str, str]) -> Any:
        """Compile a grammar now, so that `matcher` finds it; a heavy one takes seconds. Who asks for one that is there
        waits for no other. Returns the library's matcher at its beginning; raises what `matcher` does."""
        found = self._known(constraint)
        if found is None:
            with self._compiling:
                found = self._known(constraint)
                if found is None:
                    found = self._compile(*constraint)
                    with self._lock:
                        self._compiled[constraint] = found
                        if len(self._compiled) > _KEPT:
                            self._compiled.popitem(last=False)
        return found

    def _known(self, constraint: tuple[str, str]) -> Any:
        with self._lock:
            if constraint in self._compiled:
                self._compiled.move_to_end(constraint)
            return self._compiled.get(constraint)

    def _compile(self, kind: str, text: str) -> Any:
        try:
            import llguidance
        except ImportError:
            raise ParameterError(
                f"{kind} needs the library llguidance: install it with  pip install 'outpace[grammar]'"
            ) from None
        if kind == "regex" and (len(text) - len(text.rstrip("\\"))) % 2:
            raise GrammarError(f"regex={_short(text)}: it ends in a backslash that escapes nothing")
        try:
            if self._vocabulary is None:
                tokenizer = self._tokenizer()
                assert tokenizer is not None, "the tokenizer is gone"
                self._vocabulary = llguidance.LLTokenizer(
                    tokenizer.to_json(), n_vocab=self._size, eos_token=self._eos_ids or None
                )
            source = llguidance.grammar_from(_FORMATS[kind], text)  # type: ignore[arg-type]
            limits = llguidance.LLParserLimits(verbose_errors=False)
            matcher = llguidance.LLMatcher(self._vocabulary, source, log_level=0, limits=limits)
            wrong = _error(matcher)
            if not wrong:
                trial = matcher.deep_copy()
                trial.compute_bitmask()
                wrong = _error(trial)
        except BaseException as e:  # the library raises plain Exception, and its panics are BaseException
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            wrong = str(e)
        if wrong:
            raise GrammarError(f"{kind}={_short(text)}: {wrong}")
        return matcher


_lock = Lock()
_of_tokenizer: WeakKeyDictionary[Tokenizer, dict[int, Grammars]] = WeakKeyDictionary()


def grammars_of(tokenizer: Tokenizer, vocab_size: int) -> Grammars:
    """The compiler for a tokenizer and a target's vocabulary, shared by all who ask."""
    with _lock:
        sizes = _of_tokenizer.setdefault(tokenizer, {})
        if vocab_size not in sizes:
            sizes[vocab_size] = Grammars(tokenizer, vocab_size)
        return sizes[vocab_size]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
