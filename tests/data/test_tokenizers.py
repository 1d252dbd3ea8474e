import pytest
from transformers import AutoTokenizer

from tcopilot.data import byte_tokenizer, word_tokenizer

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
