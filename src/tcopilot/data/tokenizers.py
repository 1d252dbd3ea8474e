"""Two tokenizers that need no download: one over a closed vocabulary of words, one over bytes."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS, UNK, BOS = "<pad>", "<eos>", "<unk>", "<bos>"


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are ``words``, split at white space.

    Ids 0, 1, 2 are pad, end and unknown; the distinct words follow in the given order. Decoding joins the words with
    single spaces.

    Raises:
        ValueError: If a word is empty, holds white space (it could never be matched) or is one of the special tokens.
    """
    bad = [word for word in words if word.split() != [word] or word in (PAD, EOS, UNK)]
    if bad:
        raise ValueError(f"words must be non-empty, without white space and not special tokens; got {bad[:5]}")
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([PAD, EOS, UNK, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer, unk_token=UNK)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of the 256 bytes of UTF-8, which reads and returns any text unchanged.

    Ids 0, 1, 2 are pad, end and begin; the other 256 ids are one byte each. Text that spells a special token is
    read as plain bytes.
    """
    tokens = [PAD, EOS, BOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, bos_token=BOS, split_special_tokens=True)


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], follows: bool = False) -> list[list[int]]:
    """Return the token ids of texts, without special tokens.

    Tokenizers such as LLaMA 2's put a space before every text. With ``follows`` the texts continue another one, and
    get no such space: they are tokenised behind a line break, which is then removed.
    """

    def plain(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids

    own = plain(texts)
    line, bare, behind = plain(["\n", "a", "\na"]) if follows and texts else ([], [], [])
    if behind in (bare, line + bare) or behind[: len(line)] != line:
        return own
    joined = plain([f"\n{text}" for text in texts])
    return [ids[len(line) :] if ids[: len(line)] == line else alone for ids, alone in zip(joined, own, strict=True)]


def _wrap(tokenizer: Tokenizer, **special: str | bool) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False, **special
    )
