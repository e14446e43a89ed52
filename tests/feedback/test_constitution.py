import json
from pathlib import Path

import pytest
import yaml

from rlhf_ray.errors import ConfigError
from rlhf_ray.feedback import constitution as constitutions
from rlhf_ray.feedback.constitution import Constitution

PRINCIPLE = {"id": "kind", "critique": "what is unkind?", "revision": "be kinder.", "comparison": "which is kinder?"}


def written(folder: Path, tree: object, name: str = "own.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(tree) if path.suffix == ".yaml" else json.dumps(tree))
    return path


def test_our_own_has_at_least_sixteen_principles_of_every_kind_and_examples() -> None:
    own = constitutions.load()
    assert len(own.principles) >= 16
    for tag in ("helpful", "honest", "harmless", "not_preachy"):
        assert len(own.only([tag]).principles) >= 4
    assert all(principle.source and principle.tags for principle in own.principles)
    assert own.examples


def test_the_sha_follows_the_content_and_not_the_layout(tmp_path: Path) -> None:
    tree = {"name": "own", "principles": [PRINCIPLE]}
    plain = constitutions.load(written(tmp_path, tree))
    commented = tmp_path / "commented.yaml"
    commented.write_text("# mine\n" + yaml.safe_dump(tree, sort_keys=True, indent=8))
    assert constitutions.load(commented).sha == plain.sha
    changed = {**PRINCIPLE, "comparison": "which is kinder, then?"}
    assert constitutions.load(written(tmp_path, {"name": "own", "principles": [changed]})).sha != plain.sha


@pytest.mark.parametrize(
    ("second", "what"),
    [
        ({"id": "kind", "critique": "a", "revision": "b", "comparison": "c"}, "id"),
        ({"id": "k2", "critique": "a", "revision": "b", "comparison": "Which is  kinder?"}, "comparison"),
        ({**PRINCIPLE, "id": "k2", "comparison": "c"}, "critique"),
    ],
)
def test_a_principle_that_stands_twice_is_refused(tmp_path: Path, second: dict[str, str], what: str) -> None:
    path = written(tmp_path, {"name": "own", "principles": [PRINCIPLE, second]})
    with pytest.raises(ConfigError, match=f"'kind' and '{second['id']}' have the same {what}"):
        constitutions.load(path)


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path, {"name": "own", "principles": [PRINCIPLE], "template": {}})
    with pytest.raises(ConfigError, match="unknown key 'template'; did you mean 'templates'"):
        constitutions.load(path)


def test_a_template_without_a_place_for_an_answer_is_refused(tmp_path: Path) -> None:
    templates = {"comparison": "{conversation} {principle} {a}"}
    path = written(tmp_path, {"name": "own", "principles": [PRINCIPLE], "templates": templates})
    with pytest.raises(ConfigError, match=r"templates.comparison.*lacks \{b\}"):
        constitutions.load(path)


def test_an_example_of_a_principle_that_is_not_there_is_refused(tmp_path: Path) -> None:
    example = {"principle": "bold", "prompt": "p", "response": "r", "critique": "c", "revision": "v"}
    path = written(tmp_path, {"name": "own", "principles": [PRINCIPLE], "examples": [example]})
    with pytest.raises(ConfigError, match="follows principle 'bold', which is not among"):
        constitutions.load(path)


def test_records_of_prompt_and_edit_request_are_read_as_a_list_and_by_name(tmp_path: Path) -> None:
    record = {"prompt": "What is harmful here?", "edit_request": "Take the harm out."}
    by_name = constitutions.load(written(tmp_path, {"harm": record}, "named.json")).principles[0]
    listed = constitutions.load(written(tmp_path, [record], "listed.json")).principles[0]
    assert (by_name.id, by_name.critique, by_name.revision) == ("harm", record["prompt"], record["edit_request"])
    assert (listed.id, listed.critique) == ("p0", record["prompt"])
    assert record["prompt"] in by_name.comparison


@pytest.mark.parametrize("name", ["plain.txt", "plain.json", "plain.yaml"])
def test_plain_sentences_become_principles(tmp_path: Path, name: str) -> None:
    sentences = ["Be kind.", "Be true."]
    path = written(tmp_path, sentences, name) if name != "plain.txt" else tmp_path / name
    if name == "plain.txt":
        path.write_text("Be kind.\n\nBe true.\n")
    found = constitutions.load(path)
    assert [principle.id for principle in found.principles] == ["p0", "p1"]
    for text in (found.principles[1].critique, found.principles[1].revision, found.principles[1].comparison):
        assert text.endswith(": Be true.")


@pytest.mark.parametrize("tree", [[], [3], {"a": {"prompt": "only"}}, "one sentence", None])
def test_what_is_no_constitution_is_refused(tmp_path: Path, tree: object) -> None:
    with pytest.raises(ConfigError, match=r"constitution .*own.yaml"):
        constitutions.load(written(tmp_path, tree))


def test_principles_are_chosen_by_id_or_by_tag_and_their_examples_with_them() -> None:
    own = constitutions.load()
    some = own.only(["honest", "harmless-self"])
    assert [principle.id for principle in some.principles] == [
        principle.id for principle in own.principles if "honest" in principle.tags or principle.id == "harmless-self"
    ]
    assert [example.principle for example in some.examples] == ["honest-uncertainty"]
    assert some.sha != own.sha
    with pytest.raises(ConfigError, match="the id or the tag 'honnest'"):
        own.only(["honnest"])


def test_answers_with_braces_go_into_a_template_as_they_are() -> None:
    constitution = Constitution.model_validate({"name": "own", "principles": [PRINCIPLE]})
    text = constitution.templates.comparison.format(conversation="{a}", principle="p", a="x{b}", b="{")
    assert "(A) x{b}\n" in text
    assert "(B) {\n" in text
