"""A tokenizer for models whose own is not known: every text has tokens, and the tokens give the text back.

A chat API takes text and returns text. In between, this service speaks of token ids: prompts are built, queued, cached
and sent to workers as ids. So the text is written in a vocabulary of ours, bytes and common words, in which each label
is one token, and the engine reads it back. The ids mean nothing to the server, and there are more of them than the
server's own tokens: against Qwen2.5's 2.6 times as many for RewardBench, 5 times in Japanese, 6 times in Russian.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

REPLY: Final = "<|judge_reply|>"
"""Stands behind a chat message, so that a label never joins with the message's last letters. It is not sent."""

_REPLY_ID: Final = 0
_CHAT_TEMPLATE: Final = "{% for message in messages %}{{ message['content'] }}{% endfor %}" + REPLY
# What templates and requests may ask for as a label besides those of the loaded templates.
_LABELS: Final = (
    "Yes No yes no YES NO True False true false TRUE FALSE Good Bad good bad GOOD BAD Correct Incorrect correct "
    "incorrect Right Wrong right wrong Safe Unsafe safe unsafe Better Worse better worse Pass Fail pass fail Accept "
    "Reject accept reject First Second first second Left Neither Both Tie tie Positive Negative positive negative "
    "Ja Nein Oui Non Si Sì Sí Sim Não Да Нет"
)
# Common English words and pieces of words: they only make prompts shorter, in tokens.
_WORDS: Final = (
    "the of and to in is it that for you was on are with as be this have or at not but what all were we when your can "
    "said there use an each which she he do how their if will up other about out many then them these so some her "
    "would make like him into time has look two more write go see number way could people my than been call who its "
    "now find long down day did get come made may part over new answer question response prompt user assistant system "
    "instruction following best return def function class print self import from int str list value data code test "
    "else while result string one three please explain because also just only very much most should Is The What How "
    "Answer Question Response Request Reply User Assistant Write Explain Please This It In If You For We An And To Are "
    "does any where after before between through under world work first being same another example different every "
    "know think want need help here such using used given above below both still even well back good great own off too "
    "where why again must might those while during without within however therefore since until although whether"
)
_PAIRS: Final = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro ic "
    "ne ea ra ce li ch ll be ma si om ur ca el ta la ns di fo ho pe ec pr no ct us ac ot il tr ly nc et ut ss so rs un "
    "lo wa ge ie wh ee wi em ad ol rt po we na ul ni ts mo ow pa im mi ai sh ir su id os iv ia am fi ci vi pl ig tu ev"
)


def text_tokenizer(labels: Iterable[str], max_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template that is the message, in which each of `labels` is one token.

    That holds for a label that is one word, or one run of digits or of signs; others are more than one, as they would
    be anywhere.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(_vocabulary(labels), _merges(), ignore_merges=True))
    tokenizer.add_special_tokens([REPLY])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = transformers.PreTrainedTokenizerFast
    return cast(
        "PreTrainedTokenizerFast",
        fast(
            tokenizer_object=tokenizer,
            eos_token=REPLY,
            pad_token=REPLY,
            chat_template=_CHAT_TEMPLATE,
            model_max_length=max_tokens,
        ),
    )


def text_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text that has these tokens, without the mark behind a chat message."""
    ids = list(token_ids[:-1] if token_ids and token_ids[-1] == _REPLY_ID else token_ids)
    return str(tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names the vocabulary: two processes may exchange ids where it is the same."""
    return sha256("\0".join(sorted(tokenizer.get_vocab())).encode()).hexdigest()[:16]


def _vocabulary(labels: Iterable[str]) -> dict[str, int]:
    """Ids by token. The built-in part comes first and never moves; the labels follow in their alphabetic order."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    single = [chr(code) for code in (*range(ord("0"), ord("9") + 1), *range(ord("A"), ord("Z") + 1))]
    words = [*_LABELS.split(), *_WORDS.split(), *single]
    known = [_written(form) for word in words for form in (word, f" {word}")]
    asked = sorted({_written(form) for label in labels for form in (label, label.strip(), f" {label.strip()}")})
    tokens = dict.fromkeys([REPLY, *alphabet, *_PAIRS.split(), *known, *asked])
    return {token: index for index, token in enumerate(tokens) if token}


def _merges() -> list[tuple[str, str]]:
    return [(pair[0], pair[1]) for pair in _PAIRS.split()]


def _written(text: str) -> str:
    """The text as a byte-level vocabulary writes it: one letter for each byte."""
    from tokenizers import pre_tokenizers

    return "".join(
        piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    )
