"""Templates and models of someone who means harm: they learn nothing of the machine, take little of it, and end with a reason."""

import contextlib
import copy
import json
import pickle
import time

import pytest
from pyarrow.fs import LocalFileSystem

from tests.train_loop.models import make_base, run
from train_loop.data import bounds
from train_loop.data.bounds import bounded_memory
from train_loop.data.formats import RowRejected
from train_loop.data.prepare import prepare_local
from train_loop.data.sources import find_files
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import DatasetError, ModelError
from train_loop.model.tokenizer import load_tokenizer
from train_loop.spec import JobSpec, Prompt

TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
CANARY = "canary-of-the-environment"
SHOW = ".__init__.__globals__.os.environ.get('TEMPLATE_CANARY')"

REACHING = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler" + SHOW + " }}",
    "{{ joiner" + SHOW + " }}",
    "{{ namespace" + SHOW + " }}",
    "{{ lipsum.__globals__.os.environ.get('TEMPLATE_CANARY') }}",
    "{{ (lipsum|attr('__globals__'))['os'].environ.get('TEMPLATE_CANARY') }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ self.__init__.__globals__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__.__mro__ }}",
    "{% set ns = namespace(a=cycler.__init__) %}{{ ns.a.__globals__.os.environ.get('TEMPLATE_CANARY') }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{0.__init__.__globals__[os].environ[TEMPLATE_CANARY]}'.format(cycler) }}",
    "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "{{ '%s'|format(cycler.__init__.__globals__) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}{{ strftime_now.__closure__ }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ tojson.__globals__ }}{{ ''|tojson.__globals__ }}",
    "{{ messages.append(1) }}{{ messages|length }}x",
    "{{ messages[0].update({'content': 'other'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.environ }}",
    "{% from 'os' import environ %}{{ environ }}",
    "{% extends '/etc/passwd' %}",
    "{% do messages.clear() %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}",
    "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}",
    "{{ generation.__class__ }}",
    "{{ range(10**9) }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{{ 9**9**9 }}",
    "{% set x = 9 ** messages|length %}",
]


@pytest.fixture(params=["prompt.template", "the base's own"])
def encode(request, tokenizer, monkeypatch):
    """Encode a row by a template that comes from there."""
    monkeypatch.setenv("TEMPLATE_CANARY", CANARY)

    def by(template):
        own, given = copy.copy(tokenizer), template
        if request.param == "the base's own":
            own.chat_template, given = template, None
        chat = ChatTokenizer(own, Prompt(template=given, max_length=4096), "right", "all")
        return tokenizer.decode(chat.encode(copy.deepcopy(TALK)).input_ids)

    return by


@pytest.mark.parametrize("attack", REACHING)
def test_no_template_reaches_what_is_outside_of_it(encode, attack):
    try:
        text = encode(TURNS + attack)
    except DatasetError as error:
        text = f"{error.code} {error.message}"
    except RowRejected as error:
        text = error.reason
    for secret in (CANARY, "<class", "<built-in", "<function", "<module", "root:", "__main__"):
        assert secret not in text
    assert encode(TURNS) == "user: Hi<|im_end|>assistant: Yes.<|im_end|>"  # it changed nothing for the next row


@pytest.mark.parametrize(
    "attack",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{% generation %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endgeneration %}",
    ],
)
def test_a_template_without_end_is_ended(encode, attack, monkeypatch):
    monkeypatch.setattr(bounds, "MAX_RENDER_S", 0.3)
    with pytest.raises(DatasetError, match="isn't done with a row") as caught:
        encode(TURNS + attack)
    assert caught.value.code == "template_error"
    used = time.process_time()
    assert encode(TURNS)  # what ended it ends nothing else
    time.sleep(1.5 * bounds.LOOK_S)
    assert encode(TURNS)
    assert time.process_time() - used < 60


BOMBS = [
    "{% set x = 'a' * 1000000000 %}",
    "{% set x = 'a' * 1000000000000 %}",
    "{% set x = [0] * 1000000000 %}",
    "{% set x = '%999999999d' % 1 %}",
    "{% set x = '{:>999999999}'.format(1) %}",
    "{% set x = 'a'.center(999999999) %}",
    "{% set x = 'a'|center(999999999) %}",
    "{% set s = 'a' * 99999 %}{% set x = s.replace('a', s) %}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
]


@pytest.mark.parametrize("attack", BOMBS)
def test_a_template_that_wants_the_machines_memory_is_refused_it(encode, attack, monkeypatch):
    monkeypatch.setattr(bounds, "MORE_BYTES", 256 << 20)
    with bounded_memory(), pytest.raises(DatasetError, match="takes more memory") as caught:
        encode(TURNS + attack)
    assert caught.value.code == "template_error"
    assert encode(TURNS)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(
    ("attack", "said"), [(BOMBS[0], "memory"), ("{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2, "done")]
)
def test_preparing_ends_with_the_cause(local_job, tokenizer, tmp_path, monkeypatch, attack, said, lazy):
    monkeypatch.setattr(bounds, "MORE_BYTES", 256 << 20)
    monkeypatch.setattr(bounds, "MAX_RENDER_S", 0.3)
    pre = "dataset_config.preprocessing."
    spec = JobSpec.model_validate(local_job({pre + "prompt.template": TURNS + attack, pre + "lazy_tokenize": lazy}))
    local = LocalFileSystem()
    with pytest.raises(DatasetError, match=said) as caught:
        prepare_local(spec, local, find_files(spec, local), local, str(tmp_path / "run"), ChatTokenizer.of(spec, tokenizer))
    assert caught.value.code == "template_error"


# --- models ---


class Harm:
    """What a pickle runs when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.fixture
def base(tmp_path, tokenizer):
    return tmp_path / make_base("llama", tmp_path, tokenizer)


def train(local_job, tmp_path, changes=None):
    job = local_job({"model_details.base_model": "tuneyard/llama", "model_details.quantization": None} | (changes or {}))
    return run(job, tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.pt", "model.ckpt", "consolidated.00.pth"])
def test_a_model_of_pickles_is_refused_and_none_is_read(base, local_job, tmp_path, name):
    (base / "model.safetensors").unlink()
    (base / name).write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    with pytest.raises(ModelError, match=r"can't be loaded: .*safetensors") as caught:
        train(local_job, tmp_path)
    assert caught.value.field == "model_details.base_model"
    assert not (tmp_path / "harmed").exists()


def test_a_pickle_that_is_called_safetensors_is_no_model(base, local_job, tmp_path):
    (base / "model.safetensors").write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    with pytest.raises(ModelError, match="can't be loaded"):
        train(local_job, tmp_path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("model_type", ["harmful", "llama"])
def test_a_models_own_code_is_never_run(base, local_job, tmp_path, model_type):
    harm = f"open({str(tmp_path / 'harmed')!r}, 'w')\n"
    for name in ("configuration_harmful.py", "modeling_harmful.py", "tokenization_harmful.py"):
        (base / name).write_text(harm)
    code = {"AutoConfig": "configuration_harmful.C", "AutoModelForCausalLM": "modeling_harmful.M"}
    config = json.loads((base / "config.json").read_text()) | {"model_type": model_type, "auto_map": code}
    (base / "config.json").write_text(json.dumps(config))
    if model_type == "llama":  # what transformers has itself is taken from there
        train(local_job, tmp_path)
    else:
        with pytest.raises(ModelError, match="no model's own code is run here"):
            train(local_job, tmp_path)
    assert not (tmp_path / "harmed").exists()


def test_a_tokenizers_own_code_is_never_run(base, tmp_path):
    (base / "tokenization_harmful.py").write_text(f"open({str(tmp_path / 'harmed')!r}, 'w')\n")
    config = json.loads((base / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Harmful", "auto_map": {"AutoTokenizer": ["tokenization_harmful.T", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with contextlib.suppress(ModelError):  # or it is taken for one of a kind that transformers has
        load_tokenizer(base)
    assert not (tmp_path / "harmed").exists()
