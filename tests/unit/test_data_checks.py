"""The rules between the options of data sources: what is wrong is named before anything is read."""

import pytest

from megapref.checks import check
from megapref.config import Config, Data, Method, Model, Plugin, Source


def config(tmp_path, **changes):
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    data = {name: changes.pop(name) for name in ("train", "validation") if name in changes}
    data = {"train": [Source(str(tmp_path / "rows.jsonl"))]} | data
    return Config(data=Data(**data), method=Method(pairs="offline"), loss=Plugin("losses:dpo"), model=Model(str(tmp_path / "model"), **changes))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question", r"data.train\[0\].template.prompt=\"\{question\": expected '}' before end of string; write \{column\}"),
        ("a } b", "Single '}' encountered"),
        ("{}", "there is more or less than a name between braces"),
        ("{a!r}", "there is more or less than a name between braces"),
        ("{a:>3}", "there is more or less than a name between braces"),
        (3, "3 is neither text nor messages with role and content"),
        ([{"role": "user", "content": None}], "null is neither text nor messages"),
    ],
)
def test_templates(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        check(config(tmp_path, train=[Source(str(tmp_path / "rows.jsonl"), template={"prompt": template})]), 1, None)


def test_good_templates_and_columns(tmp_path):
    template = {"prompt": "{{x}} {question} {a column}", "messages": [{"role": "user", "content": "{question}"}]}
    check(config(tmp_path, train=[Source(str(tmp_path / "rows.jsonl"), template=template, columns={"chosen": "best"})]), 1, None)


def test_weights_are_for_all_training_sources_or_none(tmp_path):
    path = str(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"data.train\[1\].weight=null, but other sources have one; give all of them a weight, or none"):
        check(config(tmp_path, train=[Source(path, weight=1.0), Source(path)]), 1, None)
    with pytest.raises(ValueError, match=r"data.validation.held_out.weight=2 has no effect"):
        check(config(tmp_path, validation={"held_out": Source(path, weight=2.0)}), 1, None)
    check(config(tmp_path, train=[Source(path, weight=1.0), Source(path, weight=0.5)]), 1, None)


def test_folders_of_saved_data_sets_and_tokenizer_files(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"data.train\[0\].path=.*set\" is a folder; name the file in it"):
        check(config(tmp_path, train=[Source(str(folder))]), 1, None)
    (folder / "state.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    check(config(tmp_path, train=[Source(str(folder))], tokenizer=str(tmp_path / "tokenizer.model")), 1, None)
    with pytest.raises(ValueError, match=r"model.chat_template=.*gone.jinja\": there is no such file .*give a Jinja file"):
        check(config(tmp_path, chat_template=str(tmp_path / "gone.jinja")), 1, None)
