"""The card says what is known and nothing else, in the hub's own form."""

import dataclasses

import yaml

from jaxalign.hf.card import Data, Facts, Merge, Scores, hub_name, model_card, table

FULL = Facts(
    "slots",
    "adapter",
    path="me/slots",
    base="meta-llama/Meta-Llama-3-8B-Instruct",
    languages=("cy", "no"),
    datasets=("someone/pairs",),
    tags=("lora",),
    summary="fine-tuned for slot filling",
    training=(("LoRA", "r 8"), ("a|b", "c")),
    data=(Data("task", ("train.jsonl", "hf:someone/pairs"), "cy 10"),),
    scores=Scores(("", "**slots**"), (("slot F1, %, all", "55.5 ± 0.3"),), ("a note",)),
    prompts="Prompts were built by the tokenizer's chat template.",
    system="Find the slots.\nAll of them.",
    call={"do_sample": False, "top_p": 0.5},
    request={"temperature": 0, "top_p": 0.5},
    template="own",
    served_rank=8,
    aligned="yes",
)


def front(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_front_matter_in_the_forms_of_the_hub():
    found, _ = front(model_card(FULL))
    assert found == {
        "base_model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "language": ["cy", "no"],  # not False: YAML's no
        "datasets": ["someone/pairs"],
        "tags": ["lora", "jaxalign"],
    }


def test_a_revision_of_the_base_is_loaded():
    """The newest weights of a repository have the same shapes, and are other weights."""
    facts = dataclasses.replace(FULL, base="me/base", revision="step1000", template="base")
    head, body = front(model_card(facts))
    assert head["base_model"] == "me/base"
    assert "(https://huggingface.co/me/base) at revision `step1000`, fine-tuned" in body
    assert 'from_pretrained("me/base", revision="step1000", dtype="auto")' in body
    assert "vllm serve me/base --revision step1000 --enable-lora" in body
    of_jaxalign = dataclasses.replace(facts, in_peft=False)
    assert "model.path=me/base model.revision=step1000 --adapter" in model_card(of_jaxalign)


def test_the_hub_s_own_reader():
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(FULL))
    assert card.data.base_model == FULL.base
    assert card.data.library_name == "peft"
    assert card.data.language == ["cy", "no"]
    assert card.data.license is None


def test_a_model_is_of_transformers():
    found, body = front(model_card(Facts("m", "model", path="me/m", base="x/y", template="base")))
    assert found["library_name"] == "transformers"
    assert found["base_model_relation"] == "finetune"
    assert "peft" not in body and "vllm serve me/m\n" in body


def test_body():
    _, body = front(model_card(FULL))
    assert body.count("\n# ") == 1 and "\n# slots\n" in body
    assert "LoRA adapter of [meta-llama/Meta-Llama-3-8B-Instruct](" in body
    assert "| a\\|b | c |" in body
    assert "| task | `train.jsonl`, `hf:someone/pairs` | cy 10 |" in body
    assert "55.5 ± 0.3" in body and "a note" in body
    assert "> Find the slots.\n> All of them." in body
    assert 'PeftModel.from_pretrained(model, "me/slots")' in body
    assert "--max-lora-rank 8" in body and "--chat-template chat_template.jinja" in body
    assert "doi       = {10.18653/v1/2025.acl-long.778}" in body
    for heading in ("Training", "Data", "Scores", "Prompts", "Use", "Citation"):
        assert body.count(f"\n## {heading}\n") == 1


def test_what_is_unknown_is_left_out():
    found, body = front(model_card(Facts("x", "adapter", served_rank=8)))
    assert found == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["jaxalign"],
    }
    for heading in ("Training", "Data", "Scores", "Prompts", "Citation"):
        assert f"## {heading}" not in body
    for word in ("None", "unknown", "nan", "layer", "apply_chat_template", "chat_template.jinja"):
        assert word not in body
    assert "PATH/TO/THE/BASE" in body


def test_an_adapter_that_vllm_does_not_serve():
    limits = ("vLLM refuses DoRA; merge it", "and so on")
    _, body = front(model_card(Facts("x", "adapter", served_rank=8, limits=limits)))
    assert "vllm serve" not in body
    assert "vLLM refuses DoRA; merge it.\n\nand so on." in body


def test_the_code_in_it_is_code():
    import re

    ways = [dataclasses.replace(FULL, asked=asked) for asked in ("joined", "text")]
    for facts in (FULL, *ways, Facts("m", "model", template="base"), Facts("m", "tree")):
        blocks = re.findall(r"```python\n(.*?)```", model_card(facts), re.S)
        assert blocks
        for block in blocks:
            compile(block, "card", "exec")


def test_the_calls_decode_as_the_answers_were_scored():
    for kind in ("adapter", "model"):
        _, body = front(model_card(dataclasses.replace(FULL, kind=kind, stops=(2, 5))))
        ends = ", eos_token_id=[2, 5]" * (kind == "adapter")
        assert f"model.generate(**inputs, do_sample=False, top_p=0.5{ends})" in body
        assert '`"temperature": 0, "top_p": 0.5` with each request' in body
        assert ("from the base's `generation_config.json`" in body) == (kind == "adapter")
    _, body = front(model_card(dataclasses.replace(FULL, call={}, request={})))
    assert "model.generate(**inputs)" in body and "with each request" not in body


def test_an_instruction_in_the_user_s_turn():
    _, body = front(model_card(dataclasses.replace(FULL, asked="joined")))
    assert "The system turn was" not in body
    words = "The instruction, followed by a blank line, stood before the user's text:"
    assert f"{words}\n\n> Find the slots.\n> All of them." in body
    turns = r'turns = [{"role": "user", "content": "INSTRUCTION\n\n..."}]'
    assert f"{turns}\n" in body


def test_prompts_without_a_template():
    for template in ("none", "base"):
        facts = dataclasses.replace(FULL, asked="text", template=template, system="")
        _, body = front(model_card(facts))
        assert 'inputs = tokenizer("PREFIX", return_tensors="pt")\nanswer = ' in body
        assert "no chat template: send prompts to `/v1/completions`." in body
        for word in ("apply_chat_template", "turns", "chat_template.jinja"):
            assert word not in body


def test_a_merge():
    rows = (("me/task", "0.6", "8"), ("runs/align/adapter", "-0.4", "4"))
    merge = Merge(rows, (("method", "svd"), ("rank", "8")))
    _, body = front(model_card(Facts("m", "adapter", base="x/y", summary="made", merge=merge)))
    assert "(https://huggingface.co/x/y), made.\n" in body
    assert body.count("\n## Merge\n") == 1 and "## Training" not in body
    assert "| me/task | 0.6 | 8 |\n| runs/align/adapter | -0.4 | 4 |\n\n" in body
    assert "| method | svd |\n| rank | 8 |" in body


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert hub_name("meta-llama/Meta-Llama-3-8B") == "meta-llama/Meta-Llama-3-8B"
    assert hub_name("runs/base") == hub_name("a/b/c") == hub_name(str(tmp_path)) == ""


def test_tables():
    assert table(("a", "b"), [("1", "2|3")]) == "| a | b |\n| --- | --- |\n| 1 | 2\\|3 |"


def test_the_template_is_shipped():
    import tomllib

    from jaxalign.hf.card import TEMPLATE

    project = tomllib.loads((TEMPLATE.parents[2] / "pyproject.toml").read_text("utf-8"))
    assert TEMPLATE.name in project["tool"]["setuptools"]["package-data"]["jaxalign.hf"]


def test_what_a_run_says_is_not_markup_of_the_template():
    card = model_card(Facts("{{ 7 * 7 }}", "model", summary="{% if %} <b>&</b>"))
    assert "# {{ 7 * 7 }}\n" in card and "Model, {% if %} <b>&</b>.\n" in card
