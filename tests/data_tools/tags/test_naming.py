"""Names of branches by an LLM: asked once, data and not instructions, told apart, and shown by what follows."""

import json

import pytest
from chat_server import chat_server, completion
from work_folder import TOPICS, make_work_folder

from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.naming import NamingSettings, name_branches, parse_name
from megatron_ksa.data_tools.tags.pool import load_pool
from megatron_ksa.data_tools.tags.taggers.prompt import BadAnswer
from megatron_ksa.data_tools.tags.taggers.settings import EndpointSettings
from megatron_ksa.errors import UsageError


def name(content: object) -> tuple[int, dict, bytes]:
    return 200, {}, completion(json.dumps(content))


def endpoint(server) -> EndpointSettings:
    return EndpointSettings(url=server.url, attempts=2, backoff=0.0, timeout=5.0)


def test_branches_take_the_names_given_and_siblings_are_told_apart(tmp_path):
    work = make_work_folder(tmp_path)
    asked = []

    def behave(tags, attempt, request):
        asked.append(tags)
        return name({"name": "Reckoning" if tags[0][:4] in (TOPICS[0][:4], TOPICS[1][:4]) else "History"})

    with chat_server(lambda *_: (_ for _ in ()).throw(AssertionError)) as server:
        assert name_branches(work, NamingSettings(0), endpoint(server)) == {"named": 0}
    with chat_server(behave) as server:
        counts = name_branches(work, NamingSettings(1), endpoint(server))
        assert counts["named"] == len(asked) == len(TOPICS) and all(len(tags) == 5 for tags in asked)
        name_branches(work, NamingSettings(1), endpoint(server))
        assert len(asked) == len(TOPICS)
    names = load_pool(work).names.tolist()
    assert names[:5] == ["root", "Reckoning", f"Reckoning ({TOPICS[1]})", "History", f"History ({TOPICS[3]})"]
    assert names[5] == f"{TOPICS[0]} 0"
    assert [row["node"] for row in read_jsonl(work / "branch_names.jsonl")] == [1, 2, 3, 4]


def test_a_branch_without_a_name_keeps_its_medoid_and_none_at_all_is_an_error(tmp_path):
    work = make_work_folder(tmp_path)
    with (
        chat_server(lambda *_: (400, {}, b"no such model")) as server,
        pytest.raises(UsageError, match="no such model"),
    ):
        name_branches(work, NamingSettings(1), endpoint(server))

    def behave(tags, attempt, request):
        return name({"name": "Sums"} if tags[0].startswith("Algebra") else {"name": "?!"})

    with chat_server(behave) as server:
        counts = name_branches(work, NamingSettings(1), endpoint(server))
    assert (counts["named"], counts["left_with_medoid"]) == (1, 3)
    assert load_pool(work).names.tolist()[:3] == ["root", "Sums", TOPICS[1]]


@pytest.mark.parametrize("content", ["", "{}", '{"name": 7}', '{"name": "' + "x" * 500 + '"}', '{"name": "a", "b": 1}'])
def test_what_is_no_name_does_not_count(content):
    with pytest.raises(BadAnswer):
        parse_name(content)
