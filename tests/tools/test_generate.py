"""tools/generate.py on a tiny model: a prompt as it grows, JSONL with bad records, resume, and what is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from run_tool import ROOT, refusal, run_tool
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_ksa.data_tools.tokenizers import load_tokenizer, write_byte_level
from megatron_ksa.huggingface.importer import import_checkpoint
from megatron_ksa.inference import records
from megatron_ksa.platform import trainer_defaults
from megatron_ksa.training.arguments import install_arguments

LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`hf`, a model of bytes with its tokenizer, and `megatron`, the same without one."""
    folder = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=LENGTH, initializer_range=0.5,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "hf")
    write_byte_level(folder / "hf")
    write_byte_level(folder / "tokenizer")
    (folder / "megatron").mkdir()
    with install_arguments(trainer_defaults()):
        import_checkpoint(folder / "hf", folder / "megatron")
    return folder


def generate(folder, *words, load="hf"):
    return run_tool("generate.py", "--load", folder / load, *words)


def lines(path):
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def test_a_prompt_of_either_kind_of_folder(folder):
    """The transformers library's greedy text of the same folder."""
    done = generate(folder, "--prompt", "def main", "--max-new-tokens", 12)
    again = generate(folder, "--prompt", "def main", "--max-new-tokens", 12, "--tokenizer-model", folder / "tokenizer",
                     load="megatron")  # fmt: skip
    assert done.returncode == again.returncode == 0, done.stderr
    tokenizer = load_tokenizer(str(folder / "hf"))
    prompt = torch.tensor([tokenizer.encode("def main")])
    model = Qwen3ForCausalLM.from_pretrained(folder / "hf").eval()
    ids = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    end = tokenizer.end_of_document
    text = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
    assert done.stdout == again.stdout == text + "\n" and text
    assert "8 prompt tokens" in done.stderr


def test_records_run_and_bad_ones_are_reported(folder, tmp_path):
    given = [
        {"prompt": "abc", "id": 7},
        {"prompt": ""},
        {"prompt": "sampled", "temperature": 2.0, "seed": 3, "max_new_tokens": 5},
        {"prompt": "x" * LENGTH},
        {"prompt": "abc", "top_p": 7},
        {"question": "abc"},
        {"prompt": "long", "max_new_tokens": 1000},
    ]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    source.write_text("\n".join([*map(json.dumps, given), "{broken"]) + "\n")
    flags = ("--input", source, "--output", output, "--max-new-tokens", 4, "--batch", 2)
    done = generate(folder, *flags)
    assert "5 of 8 records could not run" in refusal(done)
    found = lines(output)
    assert [each["index"] for each in found] == list(range(8))
    reasons = {each["index"]: each["error"] for each in found if "error" in each}
    for index, reason in {
        1: "the prompt is empty", 3: f"trained on sequences of {LENGTH}", 4: "--top-p 7", 5: "no field 'prompt'",
        7: "invalid JSON",
    }.items():  # fmt: skip
        assert reason in reasons.pop(index)
        assert f"prompts.jsonl:{index + 1}: " in done.stderr
    assert not reasons
    assert found[0]["input"] == given[0] and found[0]["new_tokens"] == 4 and found[0]["finish"] == "max_new_tokens"
    assert found[2]["new_tokens"] == 5
    assert found[6]["finish"] in ("max_length", "end")
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "texts.jsonl"}


def test_a_run_that_was_cut_goes_on(folder, tmp_path):
    """The rest is done, a line that was cut is done again, and the file is that of an uninterrupted run."""
    source, whole, output = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "texts.jsonl"))
    prompts = [{"prompt": f"number {i}", "seed": i} for i in range(5)]
    source.write_text("".join(json.dumps(each) + "\n" for each in prompts))
    flags = ("--input", source, "--temperature", 1, "--max-new-tokens", 6)
    assert generate(folder, *flags, "--output", whole).returncode == 0
    running = tmp_path / "texts.jsonl.running"

    class Cut(Exception):
        pass

    add = records.Texts.add

    def two_of_them(texts, found):
        if len(texts.done) == 2:
            raise Cut
        add(texts, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records.Texts, "add", two_of_them)
        with pytest.raises(Cut):
            generate(folder, *flags, "--output", output)
    header, *kept = lines(running)
    assert len(kept) == 2 and not output.exists()
    with open(running, "a", encoding="utf-8") as stream:
        stream.write('{"index": 4, "inp')
    assert "other settings (sampling)" in refusal(generate(folder, *flags, "--output", output, "--top-k", 2))
    done = generate(folder, *flags, "--output", output)
    assert done.returncode == 0 and "5 texts" in done.stdout
    assert output.read_bytes() == whole.read_bytes() and not running.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give --prompt or --input"),
        (("--prompt", "a", "--input", "b"), "give --prompt or --input"),
        (("--input", "b"), "--input and --output go together"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "x" * LENGTH), f"the prompt has {LENGTH} tokens: the model was trained on sequences of {LENGTH}"),
        (("--prompt", "x" * 9, "--max-length", "9"), "the prompt has 9 tokens: with its text it has at most 9"),
        (("--prompt", "a", "--max-length", str(10**12)), "GiB are free"),
        (("--prompt", "a", "--max-length", "9" * 400), "GiB are free"),
        (("--prompt", "caf\udce9"), "the prompt is no UTF-8 text: surrogates not allowed at character 3"),
        (("--prompt", "a", "--temperature", "hot"), "argument --temperature: invalid float value: 'hot'"),
        (("--prompt", "a", "--temperature", "-1"), "--temperature -1.0"),
        (("--prompt", "a", "--sampling", "beam"), "unrecognized arguments: --sampling beam"),
        (("--prompt", "a", "--stop", ""), "--stop ('',): strings that are not empty"),
        (("--prompt", "a", "--batch", "0"), "--batch 0: at least 1"),
        (("--prompt", "a", "--iteration", "3"), "--iteration 3"),
        (("--prompt", "a", "--load", "nowhere"), "--load nowhere is no folder"),
        (("--input", "nowhere.jsonl", "--output", "{tmp}/out.jsonl"), "nowhere.jsonl cannot be read"),
        (("--input", "{tmp}/empty.jsonl", "--output", "{tmp}/out.jsonl"), "has no records"),
        (("--prompt", "a", "--load", "{tmp}"), "it has neither latest_checkpointed_iteration.txt"),
    ],
)
def test_bad_input(flags, message, folder, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    words = [word.format(tmp=tmp_path) for word in flags]
    assert message in refusal(generate(folder, *words))
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_a_stop_string_that_never_comes_is_counted(folder, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    done = generate(folder, "--input", source, "--output", output, "--max-new-tokens", 3, "--stop", "never comes")
    assert done.returncode == 0 and "no stop string came in 2 texts" in done.stderr


def test_odd_records_do_not_stop_the_others(folder, tmp_path):
    """Half of a surrogate pair in a prompt, and numbers that no float holds, ended the run with a traceback. In another
    field half of a pair has no UTF-8: it goes to the output as it came, escaped. A stop string need be no list."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "a\\ud800"}\n'
        '{"prompt": "ab", "id": "\\udfff", "note": "é"}\n'
        '{"prompt": "ab", "temperature": 1' + "0" * 400 + "}\n"
        '{"prompt": "ab", "temperature": 1e-310}\n'
        '{"prompt": "ab", "temperature": 1, "top_p": 1e-46}\n'
        '{"prompt": "ab", "temperature": 1, "top_k": 1180591620717411303424}\n'
        '{"prompt": "ab", "stop": "never comes"}\n'
    )
    done = generate(folder, "--input", source, "--output", output, "--max-new-tokens", 3, "--segment", 10**30)
    assert "2 of 7 records could not run" in refusal(done)
    found = lines(output)
    reasons = {each["index"]: each["error"] for each in found if "error" in each}
    assert reasons.keys() == {0, 2} and "no UTF-8 text" in reasons[0] and "a number is needed" in reasons[2]
    assert found[1]["input"] == {"prompt": "ab", "id": "\udfff", "note": "é"}
    # As good as greedy.
    assert found[3]["text"] == found[4]["text"] == found[1]["text"] == found[6]["text"]
    assert all(each["new_tokens"] in (1, 2, 3) for each in found if "error" not in each)


def test_a_flag_of_words_given_twice(folder):
    """`--stop A --stop B` forgot A without a word."""
    free = generate(folder, "--prompt", "def main", "--max-new-tokens", 12).stdout[:-1]
    first, last = free[2:4], free[6:8]
    done = generate(folder, "--prompt", "def main", "--max-new-tokens", 12, "--stop", first, "--stop", last)
    assert done.stdout == free[: min(free.index(first), free.index(last))] + "\n" and "ended by stop" in done.stderr


def test_an_unreadable_run_under_way(folder, tmp_path):
    """A folder of the name of the running output ended in a traceback."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "ab"}\n')
    (tmp_path / "out.jsonl.running").mkdir()
    done = generate(folder, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert "out.jsonl.running cannot be read: Is a directory" in refusal(done)


@pytest.mark.slow
def test_stdout_has_the_text_alone(folder):
    """`generate.py --prompt ... > text.txt` had log lines before the text, and one about the CPU without a GPU."""
    words = ("--load", folder / "hf", "--prompt", "def main", "--max-new-tokens", "12")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tools" / "generate.py", *words]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = generate(folder, "--prompt", "def main", "--max-new-tokens", 12).stdout
    assert done.stdout.decode() == expected


def test_a_reader_that_leaves():
    """`generate.py --prompt ... | head -c 3` ended in a traceback."""
    script = (
        "import runpy, sys\n"
        f"write_out = runpy.run_path({str(ROOT / 'tools' / 'generate.py')!r})['write_out']\n"
        "write_out('ready\\n'); sys.stdin.readline()\n"
        "while True: write_out('text')\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout.readline() == "ready\n"
    child.stdout.close()
    child.stdin.write("go\n")
    child.stdin.close()
    said = child.stderr.read()
    assert child.wait() == 1 and "Traceback" not in said and "BrokenPipe" not in said, said
