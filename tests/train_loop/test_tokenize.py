import copy

import numpy as np
import pytest
from tokenizers import processors
from tokenizers.processors import TemplateProcessing

from train_loop.data.formats import RowRejected
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import DatasetError
from train_loop.spec import JobSpec, Prompt

ROLES = ["user", "assistant"] * 3
CHAT = {
    "messages": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First answer."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Second: <b>näïve</b> 日本 🚢"},
    ]
}


def encode(tokenizer, conversation=CHAT, *, truncation="right", train_on="assistant", **prompt):
    sample = ChatTokenizer(tokenizer, Prompt(**{"max_length": 512} | prompt), truncation, train_on).encode(conversation)
    assert len(sample.input_ids) == len(sample.labels)
    return sample


def trained_text(tokenizer, sample):
    return tokenizer.decode(sample.labels[sample.labels != -100])


def test_only_answers_and_their_end_token_are_trained(tokenizer):
    sample = encode(tokenizer)
    assert trained_text(tokenizer, sample) == "First answer.<|im_end|>Second: <b>näïve</b> 日本 🚢<|im_end|>"


def test_the_last_answer_alone(tokenizer):
    sample = encode(tokenizer, train_on="last_assistant")
    assert trained_text(tokenizer, sample) == "Second: <b>näïve</b> 日本 🚢<|im_end|>"


def test_all_tokens(tokenizer):
    sample = encode(tokenizer, train_on="all")
    assert (sample.labels == sample.input_ids).all()


def test_tokens_are_what_inference_would_see(tokenizer):
    sample = encode(tokenizer)
    expected = tokenizer.apply_chat_template(CHAT["messages"], tokenize=True, return_dict=True)["input_ids"]
    assert sample.input_ids.tolist() == expected


def test_generation_marks_and_prefixes_agree(tokenizer):
    marked = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    plain = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with_marks, without = encode(tokenizer, template=marked), encode(tokenizer, template=plain)
    np.testing.assert_array_equal(with_marks.input_ids, without.input_ids)
    np.testing.assert_array_equal(with_marks.labels, without.labels)
    assert "First answer.<|im_end|>" in trained_text(tokenizer, without)


def test_the_system_prompt_is_for_rows_without_one(tokenizer):
    assert "Be brief." in tokenizer.decode(encode(tokenizer, system="Be brief.").input_ids)
    own = {"messages": [{"role": "system", "content": "Mine."}, *CHAT["messages"]]}
    assert "Be brief." not in tokenizer.decode(encode(tokenizer, own, system="Be brief.").input_ids)


def test_truncation(tokenizer):
    whole = encode(tokenizer)
    right = encode(tokenizer, max_length=44)
    left = encode(tokenizer, max_length=44, truncation="left")
    assert right.input_ids.tolist() == whole.input_ids[:44].tolist()
    assert left.input_ids.tolist() == whole.input_ids[-44:].tolist()
    with pytest.raises(RowRejected, match="more than max_length 44"):
        encode(tokenizer, max_length=44, truncation="reject")
    with pytest.raises(RowRejected, match="no supervised token left"):
        encode(tokenizer, max_length=16)


def test_a_template_that_attacks_or_fails_is_the_users_error(tokenizer):
    for template in ("{{ messages.__class__.__mro__ }}", "{{ nothing.at.all }}", "{{ 1 / 0 }}", "{{ 'a' + messages }}"):
        with pytest.raises(DatasetError) as caught:
            encode(tokenizer, template=template)
        assert caught.value.field == "dataset_config.preprocessing.prompt.template"
        assert caught.value.code == "template_error"


def test_a_template_that_shows_only_content_in_parts_trains_on_nothing_by_mistake(tokenizer):
    parts = (
        "{% for m in messages %}{{ m.role }}:{% if m.content is not string %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(DatasetError, match="leaves out what the assistant says"):
        encode(tokenizer, template=parts)


def test_a_template_that_floods_is_stopped_before_its_text_is_tokenised(tokenizer):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"  # more than there is memory
    loop = "{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}"
    for template in (loop, "{% for i in range(999999) %}x{% endfor %}", endless, "{% generation %}{% endgeneration %}" + endless):
        with pytest.raises(DatasetError) as caught:
            encode(tokenizer, template=template)
        assert caught.value.code == "template_error"


def test_a_long_row_is_no_flood(tokenizer):
    long = {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "on and on " * 200_000}]}
    assert len(encode(tokenizer, long).input_ids) == 512


def test_marked_answers_that_begin_with_a_blank_are_trained_on(tokenizer):
    blank = copy.deepcopy(tokenizer)
    blank.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as Llama 3's and GPT-2's
    marked = "{% for m in messages %}{{ m.role }}\n{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}"
    talk = {"messages": [{"role": role, "content": f" word {i}"} for i, role in enumerate(ROLES)]}
    ends = [f" word {i}<|im_end|>" for i in range(6)]
    assert trained_text(blank, encode(blank, talk, template=marked)) == "".join(ends)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt.max_length": 50},
        {"prompt.max_length": 50, "truncation": "left"},
        {"prompt.system": "Be brief."},
        {"prompt.template": "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"},
        {"train_on": "all"},
        {"train_on": "last_assistant"},
    ],
)
def test_every_setting_of_a_job_reaches_its_tokens(tokenizer, local_job, changes):
    def tokens(changes):
        job = local_job({f"dataset_config.preprocessing.{name}": value for name, value in changes.items()})
        sample = ChatTokenizer.of(JobSpec.model_validate(job), tokenizer).encode(talk)
        return sample.input_ids.tolist(), sample.labels.tolist()

    talk = {"messages": [{"role": role, "content": f"Words {i}."} for i, role in enumerate(ROLES)]}
    assert tokens(changes) != tokens({})
    if changes.get("truncation"):
        assert tokens(changes) != tokens({k: v for k, v in changes.items() if k != "truncation"})


def test_a_model_without_a_chat_template_learns_from_text_alone(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DatasetError, match="no chat template of its own") as caught:
        encode(bare)
    assert caught.value.code == "no_chat_template"
    assert trained_text(bare, encode(bare, {"text": "Once upon a time."})) == "Once upon a time.<|im_end|>"


def test_text_is_trained_on_whole_with_one_beginning_and_one_end(tokenizer):
    begins = copy.deepcopy(tokenizer)
    begins.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begins.bos_token_id)])
    for text in ("Tea.", "<s>Tea.", "Tea.</s>"):
        sample = encode(begins, {"text": text}, system="Not for text.", train_on="last_assistant")
        assert begins.decode(sample.input_ids) == "<s>Tea.</s>"
        assert (sample.labels == sample.input_ids).all()
    assert len(encode(begins, {"text": "Tea. " * 50}, max_length=16).input_ids) == 16
