"""Chat templates and ids: each family's traits, real vocabularies, spans."""

import gzip
import json
import shutil

import numpy as np
import pytest

from mcpo_jax import errors
from mcpo_jax.data import templates
from mcpo_jax.data import tokenizer as tokenizer_lib
from mcpo_jax.data.records import Record, read_records

# Templates with the traits of well-known families, written for these tests.
LLAMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n{{ system }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
    "\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% endfor %}")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last and "
    "'</think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
FAMILIES = {"llama3": (LLAMA3, "<|eot_id|>"), "mistral": (MISTRAL, "<|eos|>"),
            "chatml": (CHATML, "<|im_end|>"), "gemma": (GEMMA, "<end_of_turn>")}

USER = {"role": "user", "content": "What is new?"}
TURNS = [USER, {"role": "assistant", "content": "Nothing."},
         {"role": "user", "content": "Really?"}]


def record(prompt, *completions, **columns):
  return Record(prompt, list(completions), None, 0, "id", None, columns, "f:7")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Tiny tokenizers, one per family."""
  texts = ["What is new? Nothing. Really? Yes, really. system user"] * 3
  return {
      name: tokenizer_lib.train_tokenizer(
          texts, vocab_size=300, chat_template=template,
          out_dir=tmp_path_factory.mktemp(name))
      for name, (template, _) in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def family(request, folders):
  return request.param, tokenizer_lib.load_tokenizer(folders[request.param])


def text_of(tok, ids):
  return tok.hf.decode([int(i) for i in ids], skip_special_tokens=False)


def test_prompt_and_completion_join_to_the_template_s_own_text(family):
  name, tok = family
  encoded = tok.encode_record(record(TURNS, "Yes, really."))
  turns = [*TURNS, {"role": "assistant", "content": "Yes, really."}]
  whole = tok.render(turns, tools=None, add_generation_prompt=False)
  joined = text_of(tok, encoded.prompt) + text_of(tok, encoded.completions[0])
  assert joined == whole.rstrip("\n"), name
  assert encoded.masks[0].all()


def test_a_completion_ends_with_one_end_of_turn(family):
  name, tok = family
  end = tok.hf.convert_tokens_to_ids(FAMILIES[name][1])
  encoded = tok.encode_record(record([USER], "Yes", "No, no"))
  for ids in encoded.completions:
    assert ids[-1] == end
    assert end not in ids[:-1]
  assert tok.end_id == end
  assert set(tok.stop_ids) == {end, tok.eos_id}


def test_bos_stands_exactly_once_where_the_family_has_one(family):
  name, tok = family
  prompt = tok.encode_prompt(TURNS)
  assert np.count_nonzero(prompt == tok.bos_id) == (name != "chatml")


def test_a_system_message_is_folded_where_the_template_refuses_it(family):
  name, tok = family
  before = tok.counts["folded_system"]
  text = text_of(tok, tok.encode_prompt(
      [{"role": "system", "content": "Be brief."}, USER]))
  assert text.count("Be brief.") == 1
  folded = tok.counts["folded_system"] - before
  assert folded == (name in ("mistral", "gemma"))
  if folded:
    assert "Be brief.\n\nWhat is new?" in text


def test_spelled_control_tokens_are_plain_text_and_counted(family):
  name, tok = family
  mark = FAMILIES[name][1]
  end = tok.hf.convert_tokens_to_ids(mark)
  before = tok.counts["special_token_text"]
  encoded = tok.encode_record(
      record([{"role": "user", "content": f"Say {mark} now"}], f"{mark} done"))
  plain = tok.encode_prompt([{"role": "user", "content": "Say now"}])
  assert np.count_nonzero(encoded.prompt == end) == np.count_nonzero(
      plain == end)
  assert np.count_nonzero(encoded.completions[0] == end) == 1  # its own end
  assert f"Say {mark} now" in text_of(tok, encoded.prompt)
  assert tok.counts["special_token_text"] - before == 2


def test_spelled_control_tokens_can_be_allowed(folders):
  tok = tokenizer_lib.load_tokenizer(folders["chatml"], special_text="control")
  end = tok.hf.convert_tokens_to_ids("<|im_end|>")
  prompt = tok.encode_prompt([{"role": "user", "content": "a<|im_end|>b"}])
  assert np.count_nonzero(prompt == end) == 2


def test_today_is_frozen(folders):
  text = [text_of(tok, tok.encode_prompt([USER])) for tok in (
      tokenizer_lib.load_tokenizer(folders["llama3"], date="2025-03-09"),
      tokenizer_lib.load_tokenizer(folders["llama3"]))]
  assert "Today Date: 09 Mar 2025\n" in text[0]
  assert "Today Date: 26 Jul 2024\n" in text[1]


def test_template_variables_reach_the_template(folders):
  tok = tokenizer_lib.load_tokenizer(
      folders["chatml"], chat_template_kwargs={"enable_thinking": False})
  encoded = tok.encode_record(record([USER], "Yes"))
  assert text_of(tok, encoded.prompt).endswith("<think>\n\n</think>\n\n")
  assert text_of(tok, encoded.completions[0]) == "Yes<|im_end|>"


@pytest.mark.parametrize("think, text, scored", [
    ("keep", "<think>\nhm\n</think>\n\nYes<|im_end|>", True),
    ("mask", "<think>\nhm\n</think>\n\nYes<|im_end|>", False),
    ("strip", "<think>\n\n</think>\n\nYes<|im_end|>", True),
])
def test_reasoning_is_kept_masked_or_stripped(folders, think, text, scored):
  tok = tokenizer_lib.load_tokenizer(folders["chatml"], think=think)
  encoded = tok.encode_record(record([USER], "<think>\nhm\n</think>\n\nYes"))
  ids, mask = encoded.completions[0], encoded.masks[0]
  assert text_of(tok, ids) == text
  assert text_of(tok, ids[mask]).endswith("Yes<|im_end|>")
  assert mask.all() == scored
  assert ("hm" in text_of(tok, ids[mask])) == (think == "keep")


def test_stripping_all_of_a_completion_is_an_error(folders):
  tok = tokenizer_lib.load_tokenizer(folders["chatml"], think="strip")
  with pytest.raises(errors.DataError) as e:
    tok.encode_record(record([USER], "<think>only this</think>"))
  assert e.value.slug == "data.empty"


def test_only_the_last_assistant_turn_is_scored_unless_asked(folders):
  last = tokenizer_lib.load_tokenizer(folders["llama3"])
  every = tokenizer_lib.load_tokenizer(folders["llama3"], scored="all")
  one = last.encode_record(record(TURNS, "Yes."))
  two = every.encode_record(record(TURNS, "Yes."))
  assert text_of(last, one.completions[0]) == "Yes.<|eot_id|>"
  np.testing.assert_array_equal(
      np.concatenate([one.prompt, one.completions[0]]),
      np.concatenate([two.prompt, two.completions[0]]))
  scored = two.completions[0][two.masks[0]]
  assert text_of(every, scored) == "Nothing.<|eot_id|>Yes.<|eot_id|>"


def test_turns_between_in_a_completion_are_context(folders):
  tok = tokenizer_lib.load_tokenizer(folders["llama3"])
  turns = [{"role": "assistant", "content": "Let me see."},
           {"role": "tool", "content": "42"},
           {"role": "assistant", "content": "It is 42."}]
  encoded = tok.encode_record(record([USER], turns))
  ids, mask = encoded.completions[0], encoded.masks[0]
  assert text_of(tok, ids).startswith("Let me see.<|eot_id|>")
  assert text_of(tok, ids[mask]) == "It is 42.<|eot_id|>"


def test_plain_text_without_a_template_is_prompt_completion_eos(folders):
  tok = tokenizer_lib.load_tokenizer(folders["llama3"], chat_template="none")
  encoded = tok.encode_record(record("What is", " new?"))
  assert text_of(tok, encoded.prompt) == "What is"
  assert text_of(tok, encoded.completions[0]) == " new?<|eos|>"
  with pytest.raises(errors.DataError) as e:
    tok.encode_record(record(TURNS, "Yes"))
  assert e.value.slug == "data.chat_template"


def test_a_template_can_be_given_as_text_or_file(folders, tmp_path):
  path = tmp_path / "template.jinja"
  path.write_text(MISTRAL)
  by_file = tokenizer_lib.load_tokenizer(
      folders["llama3"], chat_template=str(path))
  by_text = tokenizer_lib.load_tokenizer(
      folders["llama3"], chat_template=MISTRAL)
  assert by_file.key == by_text.key
  assert by_file.template == MISTRAL


def test_a_template_that_rewrites_the_prompt_is_refused(folders):
  rewriting = ("{% for m in messages %}{{ m['content'] }}{% endfor %}"
               "{% if add_generation_prompt %}<|eot_id|>{% endif %}")
  tok = tokenizer_lib.load_tokenizer(
      folders["llama3"], chat_template=rewriting)
  with pytest.raises(errors.DataError) as e:
    tok.encode_record(record([USER], "Yes"))
  assert e.value.slug == "data.template_prefix"


@pytest.fixture
def hurried(monkeypatch):
  """Templates get half a second."""
  templates.stop()
  monkeypatch.setattr(templates, "SECONDS", 0.5)
  yield
  templates.stop()


@pytest.mark.parametrize("template, what", [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
     "{% endfor %}", "time"),
    ("{% set a = 'a' * 3000000000 %}", "memory"),
    ("{{ 'a' * 2000000 }}", "output")])
def test_h12_a_template_may_not_use_up_the_machine(
    folders, hurried, template, what):
  with pytest.raises(errors.ModelDirError) as e:
    tokenizer_lib.load_tokenizer(
        folders["llama3"], chat_template=template)
  assert e.value.slug == "hf.template"
  assert what in e.value.message


def test_h12_a_template_that_waits_for_its_row_is_stopped_at_it(
    folders, hurried):
  """It is harmless when it is loaded, and the next text is rendered again."""
  tok = tokenizer_lib.load_tokenizer(folders["chatml"], chat_template=(
      CHATML + "{% if messages[0].content == 'now' %}{% for i in range(99999) "
      "%}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"))
  before = tok.encode_prompt("not yet").tolist()
  with pytest.raises(errors.ModelDirError) as e:
    tok.encode_prompt("now", where="x.jsonl:7")
  assert e.value.slug == "hf.template" and e.value.where == "x.jsonl:7"
  assert tok.encode_prompt("not yet").tolist() == before


def test_a_guarded_template_gives_the_text_that_transformers_gives(family):
  name, tok = family
  for template in (tok.template, "{%- for m in messages -%}\n  {% generation %}"
                   "{{ m | tojson }}{%- endgeneration -%}\n{% endfor %} "
                   "{{ tools | tojson(indent=2) }}{{ eos_token }}{{ kind }}"):
    for more in ({"tools": [{"type": "function", "function": {"name": "é"}}]},
                 {"tools": None, "kind": ["x"]}):
      for add in (False, True):
        messages = [*TURNS, {"role": "assistant", "content": "Ü\n ",
                             "tool_calls": None}]
        assert templates.render(
            template, messages, add_generation_prompt=add,
            **tok.hf.special_tokens_map, **more) == tok.hf.apply_chat_template(
                messages, chat_template=template, tokenize=False,
                add_generation_prompt=add, **more), name


def test_a_refusal_of_the_template_does_not_repeat_the_prompt(folders):
  tok = tokenizer_lib.load_tokenizer(folders["chatml"], chat_template=(
      CHATML + "{% if messages[0].content != 'a' %}"
      "{{ raise_exception(messages[0].content) }}{% endif %}"))
  with pytest.raises(errors.DataError) as e:
    tok.encode_prompt("QUOKKA")
  assert e.value.slug == "data.chat_template" and "QUOKKA" not in str(e.value)


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}", "{% for i in range(10**9) %}x{% endfor %}",
    "{% if %}", "{{ bos_token }}"])
def test_h12_a_broken_or_malicious_template_is_named_at_load(folders, template):
  with pytest.raises(errors.ModelDirError) as e:
    tokenizer_lib.load_tokenizer(folders["llama3"], chat_template=template)
  assert e.value.slug == "hf.template"


def test_a_double_or_absent_bos_is_refused(folders):
  double = tokenizer_lib.load_tokenizer(
      folders["llama3"], chat_template="{{ bos_token }}" + LLAMA3)
  with pytest.raises(errors.DataError) as e:
    double.encode_prompt([USER])
  assert e.value.slug == "data.bos"
  assert e.value.got[:2] == [double.bos_id, double.bos_id]


def test_every_setting_changes_the_key(folders):
  base = tokenizer_lib.load_tokenizer(folders["llama3"])
  others = [
      tokenizer_lib.load_tokenizer(folders["llama3"], **setting)
      for setting in ({"think": "mask"}, {"scored": "all"}, {"bos": "none"},
                      {"date": "2025-01-01"}, {"special_text": "control"},
                      {"chat_template": MISTRAL},
                      {"chat_template_kwargs": {"a": 1}})]
  others.append(tokenizer_lib.load_tokenizer(folders["gemma"]))
  keys = {t.key for t in [base, *others]}
  assert len(keys) == 1 + len(others)
  assert tokenizer_lib.load_tokenizer(folders["llama3"]).key == base.key


def test_a_saved_tokenizer_gives_the_same_ids(family, tmp_path):
  _, tok = family
  tok.save(tmp_path)
  again = tokenizer_lib.load_tokenizer(tmp_path)
  np.testing.assert_array_equal(
      tok.encode_prompt(TURNS), again.encode_prompt(TURNS))
  assert tok.stop_ids == again.stop_ids


def test_training_twice_gives_the_same_vocabulary(tmp_path):
  texts = ["a rose is a rose is a rose", "and a daisy is none"]
  keys = {tokenizer_lib.load_tokenizer(tokenizer_lib.train_tokenizer(
      texts, vocab_size=290, out_dir=tmp_path / str(i))).key for i in range(2)}
  assert len(keys) == 1


def test_text_survives_a_trained_vocabulary(tmp_path):
  tok = tokenizer_lib.load_tokenizer(tokenizer_lib.train_tokenizer(
      ["plain"], vocab_size=280, out_dir=tmp_path))
  text = "naïve 日本 \u2028 <|user|>\n  two"
  encoded = tok.encode_record(record("x", text))
  assert tok.decode(encoded.completions[0]) == text
  assert tok.vocab_size == len(tok.hf)


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path):
  with pytest.raises(errors.ConfigError):
    tokenizer_lib.train_tokenizer(["a"], vocab_size=100, out_dir=tmp_path)


# Real vocabularies.


@pytest.fixture(scope="module")
def deepseek(shared, tmp_path_factory):
  folder = tmp_path_factory.mktemp("deepseek")
  origin = shared / "tokenizers" / "deepseek_r1"
  with gzip.open(origin / "tokenizer.json.gz") as packed:
    (folder / "tokenizer.json").write_bytes(packed.read())
  shutil.copy(origin / "tokenizer_config.json", folder)
  return folder


def test_gpt2_gives_the_known_ids(shared, tmp_path):
  import transformers

  origin = shared / "tokenizers" / "gpt2"
  transformers.GPT2Tokenizer(
      str(origin / "vocab.json"), str(origin / "merges.txt")
  ).save_pretrained(tmp_path)
  tok = tokenizer_lib.load_tokenizer(tmp_path)
  encoded = tok.encode_record(
      record("Hello world,", " this is GPT-2.", "<|endoftext|>"))
  ids = [*encoded.prompt, *encoded.completions[0]]
  assert ids == [15496, 995, 11, 428, 318, 402, 11571, 12, 17, 13, 50256]
  assert np.count_nonzero(encoded.completions[1] == 50256) == 1
  assert not tok.joint_differs(encoded, 0)
  split = tok.encode_record(record("Hello wor", "ld"))
  assert tok.joint_differs(split, 0)


def test_deepseek_template_keeps_what_it_would_drop(deepseek):
  tok = tokenizer_lib.load_tokenizer(deepseek)
  answer = "<think>\nhm\n</think>\n\nYes."
  encoded = tok.encode_record(record([USER], answer, "Yes."))
  assert text_of(tok, encoded.prompt) == (
      "<｜begin▁of▁sentence｜><｜User｜>What is new?<｜Assistant｜>")
  assert text_of(tok, encoded.completions[0]) == (
      answer + "<｜end▁of▁sentence｜>")
  assert np.count_nonzero(encoded.prompt == tok.bos_id) == 1
  assert encoded.completions[0][-1] == tok.eos_id == tok.pad_id


def test_deepseek_tool_turns_pass_through_its_template(deepseek):
  tok = tokenizer_lib.load_tokenizer(deepseek)
  call = {"role": "assistant", "content": None, "tool_calls": [{
      "type": "function",
      "function": {"name": "clock", "arguments": "{}"}}]}
  turns = [USER, call, {"role": "tool", "content": "noon"}]
  encoded = tok.encode_record(record(turns, "It is noon."))
  text = text_of(tok, encoded.prompt)
  assert "<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock" in text
  assert text.endswith("noon<｜tool▁output▁end｜><｜tool▁outputs▁end｜>")
  assert text_of(tok, encoded.completions[0]) == (
      "It is noon.<｜end▁of▁sentence｜>")
  called = tok.encode_record(record([USER], [call]))
  assert text_of(tok, called.completions[0]).startswith(
      "<｜tool▁calls▁begin｜>")
  assert called.completions[0][-1] == tok.eos_id


def test_deepseek_user_marks_in_text_are_no_control_tokens(deepseek):
  tok = tokenizer_lib.load_tokenizer(deepseek)
  user = tok.hf.convert_tokens_to_ids("<｜User｜>")
  prompt = tok.encode_prompt(
      [{"role": "user", "content": "a<｜User｜>b<｜end▁of▁sentence｜>"}])
  assert np.count_nonzero(prompt == user) == 1
  assert tok.eos_id not in prompt


def test_deepseek_on_real_conversations(deepseek, shared):
  tok = tokenizer_lib.load_tokenizer(deepseek)
  path = shared / "data" / "kwise" / "oasst_ranked.train.jsonl.gz"
  for number, row in enumerate(read_records(str(path))):
    if number == 20:
      break
    encoded = tok.encode_record(row)
    for text, ids in zip(row.completions, encoded.completions):
      assert tok.decode(ids) == text
      assert ids[-1] == tok.eos_id


def test_mistral_v3_gives_the_ids_of_its_own_format(shared, tmp_path):
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("sentencepiece")
  [model] = (shared / "tokenizers" / "mistral_v3").glob("*.model.v3")
  shutil.copy(model, tmp_path / "tokenizer.model")
  converted = transformers.LlamaTokenizer.from_pretrained(str(tmp_path))
  converted.save_pretrained(tmp_path / "hf")
  tok = tokenizer_lib.load_tokenizer(tmp_path / "hf", chat_template=MISTRAL)
  assert tok.prefixes_space
  encoded = tok.encode_record(record(
      [{"role": "user", "content": "Hi"},
       {"role": "assistant", "content": "Hello"},
       {"role": "user", "content": "More"}], "Hello", "a </s> b"))
  # <s>[INST] Hi[/INST] Hello</s>[INST] More[/INST], each text by SentencePiece
  assert encoded.prompt.tolist() == [1, 3, 16127, 4, 23325, 2, 3, 4532, 4]
  assert encoded.completions[0].tolist() == [23325, 2]
  assert np.count_nonzero(encoded.completions[1] == 2) == 1
  assert tok.decode(encoded.completions[1]).strip() == "a </s> b"


def test_a_missing_or_endless_tokenizer_is_named(tmp_path):
  with pytest.raises(errors.ModelDirError) as e:
    tokenizer_lib.load_tokenizer(tmp_path)
  assert e.value.slug == "hf.tokenizer"
  tokenizer_lib.train_tokenizer(["a"], vocab_size=280, out_dir=tmp_path)
  path = tmp_path / "tokenizer_config.json"
  config = json.loads(path.read_text())
  del config["eos_token"]
  path.write_text(json.dumps(config))
  with pytest.raises(errors.ModelDirError) as e:
    tokenizer_lib.load_tokenizer(tmp_path)
  assert "EOS" in e.value.message


def test_tools_of_a_record_reach_the_template(folders):
  template = ("{% if tools %}{{ tools[0]['function']['name'] }} {% endif %}"
              + CHATML)
  tok = tokenizer_lib.load_tokenizer(
      folders["chatml"], chat_template=template)
  tool = {"type": "function", "function": {"name": "clock"}}
  encoded = tok.encode_record(record([USER], "Yes", tools=[tool]))
  assert text_of(tok, encoded.prompt).startswith("clock <|im_start|>user")


def test_a_template_file_is_read_for_a_tokenizer_that_is_trained(tmp_path):
  file = tmp_path / "own.jinja"
  file.write_text("{% for m in messages %}<|me|>{{ m.content }}{% endfor %}"
                  "{{ eos_token }}")
  folder = tokenizer_lib.train_tokenizer(
      ["some text to learn from"], vocab_size=280, out_dir=tmp_path / "t",
      chat_template=str(file))
  loaded = tokenizer_lib.load_tokenizer(folder)
  assert loaded.template == file.read_text()
  assert "<|me|>" in loaded.hf.get_vocab()
