import pytest
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tcopilot.data import byte_tokenizer, word_tokenizer
from tcopilot.data.tokenizers import ids_of

TEXT = "Amy's  café\n\t 漢字 <pad> <eos> 🙂 . "


@pytest.fixture(params=["built", "reloaded"])
def reload(request, tmp_path):
    def through_disk(tokenizer):
        tokenizer.save_pretrained(tmp_path)
        return AutoTokenizer.from_pretrained(tmp_path)

    return through_disk if request.param == "reloaded" else lambda tokenizer: tokenizer


def test_bytes_return_any_text_unchanged(reload):
    tokenizer = reload(byte_tokenizer())
    ids = tokenizer(TEXT).input_ids
    assert len(ids) == len(TEXT.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, len(tokenizer)) == (0, 1, 2, 259)


def test_words_keep_their_order_as_ids_and_decode_with_single_spaces(reload):
    tokenizer = reload(word_tokenizer(["eggs", ".", "7", "eggs"]))
    assert tokenizer("7  eggs\n. frogs").input_ids == [5, 3, 4, 2]
    assert tokenizer.decode([5, 3, 4, 1, 0], skip_special_tokens=True) == "7 eggs ."
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, len(tokenizer)) == (0, 1, 2, 6)


@pytest.mark.parametrize("word", ["", "two words", "<pad>"])
def test_words_that_could_never_be_read_are_refused(word):
    with pytest.raises(ValueError, match="words must be"):
        word_tokenizer(["fine", word])


def test_a_text_that_follows_another_gets_no_space_of_its_own():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="?", fuse_unk=True))  # as that of LLaMA 2
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["?", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(["Answer: 9 a"], trainers.BpeTrainer(special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")

    def tokens(text, follows):
        return tokenizer.convert_ids_to_tokens(ids_of(tokenizer, [text], follows)[0])

    assert tokens(" 9", False)[:2] == ["▁", "▁"]
    assert ["".join(tokens(text, True)) for text in (" 9", "9", "\na")] == ["▁9", "9", "<0x0A>a"]
    assert ids_of(byte_tokenizer(), [" 9", "\n"], True) == ids_of(byte_tokenizer(), [" 9", "\n"])
