"""What the command line of `train-draft` makes of a chat template."""

from tests.support.guided import byte_level
from xlane.models.tokenizer import TextTokenizer, TokenizerFiles
from xlane.server.train_draft import chat_around


def test_a_chat_is_cut_where_the_user_speaks() -> None:
    plain = byte_level()
    template = "[{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}] assistant:"
    tokenizer = TextTokenizer(TokenizerFiles(plain.backend, {"default": template}))
    before, after = chat_around(tokenizer)
    assert (plain.decode(before), plain.decode(after)) == ("[user: ", "] assistant:")


def test_without_a_chat_or_with_one_that_repeats_the_user_a_text_is_one_piece() -> None:
    plain = byte_level()
    twice = TokenizerFiles(plain.backend, {"default": "{{ messages[0].content * 2 }}"}, eos_ids=plain.eos_ids)
    for tokenizer in (plain, TextTokenizer(twice)):
        assert chat_around(tokenizer) == (plain.eos_ids[:1], ())
