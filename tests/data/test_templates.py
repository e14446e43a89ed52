import pytest

from rlhf_ray.data.quarantine import BadRow
from rlhf_ray.data.templates import answer_ids, chat_ids_and_mask, ensure_chat_template, prompt_ids, split_dialogue
from rlhf_ray.errors import DataError

TWO_TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is a cat?"},
    {"role": "assistant", "content": "An animal."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day!"},
]


def learned(tokenizer, messages):
    """Pieces of text under the mask, one for each run of True."""
    ids, mask = chat_ids_and_mask(tokenizer, messages)
    pieces, before = [], False
    for token, is_answer in zip(ids, mask, strict=True):
        if is_answer and not before:
            pieces.append([])
        if is_answer:
            pieces[-1].append(token)
        before = is_answer
    return [tokenizer.decode(piece) for piece in pieces]


def test_the_plain_template_writes_turns_as_hh_rlhf_does(plain):
    text = plain.apply_chat_template(TWO_TURNS, tokenize=False, add_generation_prompt=True)
    assert text == (
        "\n\nSystem: Be kind.\n\nHuman: What is a cat?\n\nAssistant: An animal.<|im_end|>"
        "\n\nHuman: Hello\n\nAssistant: Good day!<|im_end|>\n\nAssistant:"
    )


def test_a_template_that_is_there_is_kept(chatml):
    before = chatml.chat_template
    assert ensure_chat_template(chatml).chat_template == before


def test_a_tokenizer_that_writes_bos_before_text_writes_it_once_before_a_dialogue(make_tokenizer):
    tokenizer = ensure_chat_template(make_tokenizer(adds_bos=True))
    ids, _ = chat_ids_and_mask(tokenizer, TWO_TURNS)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert prompt_ids(tokenizer, "Hello")[0] == tokenizer.bos_token_id


def test_a_tokenizer_without_eos_is_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        ensure_chat_template(tokenizer)


def test_plain_mask_covers_each_answer_and_its_eos(plain):
    assert learned(plain, TWO_TURNS) == [" An animal.<|im_end|>", " Good day!<|im_end|>"]


def test_chatml_mask_leaves_out_what_the_template_writes_after_the_eos(chatml):
    assert learned(chatml, TWO_TURNS) == ["An animal.<|im_end|>", "Good day!<|im_end|>"]
    ids, _ = chat_ids_and_mask(chatml, TWO_TURNS)
    assert ids[-1] == chatml.eos_token_id


def test_turns_after_the_last_answer_are_left_away(chatml):
    more = [*TWO_TURNS, {"role": "user", "content": "Bye"}]
    assert chat_ids_and_mask(chatml, more) == chat_ids_and_mask(chatml, TWO_TURNS)


def test_a_template_that_never_writes_eos_gets_one_after_the_last_answer(make_tokenizer):
    tokenizer = make_tokenizer(eos="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert learned(tokenizer, TWO_TURNS) == ["An animal.;", "Good day!;<|end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name(raw):
    raw.chat_template = (
        "{% for m in messages %}{{ loop.length ~ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(DataError, match="template rewrites earlier turns") as raised:
        chat_ids_and_mask(raw, TWO_TURNS)
    assert not isinstance(raised.value, BadRow)


def test_a_template_that_shortens_only_earlier_answers_still_works(raw):
    """Templates of reasoning models drop the thoughts of earlier answers."""
    raw.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' }}"
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    assert learned(raw, TWO_TURNS) == ["An animal.<|im_end|>", "<think></think>Good day!<|im_end|>"]


def test_a_token_across_the_end_of_the_prompt_is_a_bad_row_and_not_a_silent_shift(raw):
    raw.chat_template = (  # the lone space at the end merges with the answer's first word
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.raises(BadRow, match="no border"):
        chat_ids_and_mask(raw, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "cat"}])


def test_a_row_the_template_refuses_is_a_bad_row_with_the_templates_words(raw):
    raw.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRow, match=r"refused by the chat template: roles must alternate"):
        prompt_ids(raw, [{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("answer", ["Good day!", "Good day!<|im_end|>", "\n Good day! \n"])
def test_prompt_and_answer_are_the_whole_dialogue(chatml, plain, answer):
    for tokenizer in (chatml, plain):
        whole, _ = chat_ids_and_mask(tokenizer, TWO_TURNS)
        assert prompt_ids(tokenizer, TWO_TURNS[:-1]) + answer_ids(tokenizer, TWO_TURNS[:-1], answer) == whole


def test_text_is_one_user_turn_where_there_is_a_template(chatml):
    assert prompt_ids(chatml, " Hello ") == prompt_ids(chatml, [{"role": "user", "content": "Hello"}])
    assert chatml.decode(prompt_ids(chatml, "Hello")) == ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def test_text_is_encoded_as_it_stands_where_there_is_no_template(raw):
    assert raw.decode(prompt_ids(raw, "A cat is") + answer_ids(raw, "A cat is", " an animal")) == (
        "A cat is an animal<|im_end|>"
    )


def test_plain_text_has_one_bos_and_one_eos_even_if_the_text_spells_them(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    ids = prompt_ids(tokenizer, "<s>A cat") + answer_ids(tokenizer, "<s>A cat", " is<|im_end|>")
    assert tokenizer.decode(ids) == "<s>A cat is<|im_end|>"


def test_an_eos_inside_an_answer_is_a_bad_row(chatml, raw):
    for tokenizer in (chatml, raw):
        with pytest.raises(BadRow, match="end inside an answer"):
            answer_ids(tokenizer, "Hello", "Good<|im_end|> day")


def test_messages_without_a_template_say_what_is_missing(raw):
    with pytest.raises(DataError, match="no chat template"):
        chat_ids_and_mask(raw, TWO_TURNS)


def test_an_answer_to_nothing_is_a_bad_row(chatml):
    with pytest.raises(BadRow, match="no prompt"):
        chat_ids_and_mask(chatml, [{"role": "assistant", "content": "Hello"}])


def test_a_dialogue_without_an_answer_is_a_bad_row(chatml):
    with pytest.raises(BadRow, match="no answer"):
        chat_ids_and_mask(chatml, [{"role": "user", "content": "Hello"}])


def test_split_dialogue_keeps_line_breaks_and_markers_inside_a_line():
    turns = split_dialogue("\n\nHuman: Say Human: twice\nHuman: yes\n\nAssistant: a\n\nb\n\nHuman: c\n\nAssistant:")
    assert turns == [
        {"role": "user", "content": "Say Human: twice\nHuman: yes"},
        {"role": "assistant", "content": "a\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize("text", ["Hello", "Preface\n\nHuman: Hello", "Human, hello"])
def test_text_that_does_not_begin_with_a_turn_is_no_dialogue(text):
    with pytest.raises(BadRow, match="not a dialogue"):
        split_dialogue(text)


def test_an_eos_of_a_later_answer_does_not_end_an_earlier_one(raw):
    """A template that writes EOS at the end of all only: what lies between the answers must not be learned."""
    raw.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% else %}{{ eos_token }}{% endif %}"
    )
    with pytest.raises(DataError, match="template rewrites earlier turns"):
        chat_ids_and_mask(raw, TWO_TURNS)
