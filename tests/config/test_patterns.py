import pytest

from megatron_ksa.config.ksa import KSAConfig, LayerKind
from megatron_ksa.config.patterns import parse_integers, parse_letters
from megatron_ksa.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128", (128,) * 8),
        ("([128]*3+[1024])*2", (128, 128, 128, 1024) * 2),
        ("[1, 2]*4", (1, 2) * 4),
        ("[5]*7 + [6]", (5,) * 7 + (6,)),
        ("((1+2)*2)*2", (1, 2) * 4),
    ],
)
def test_integer_patterns(text, expected):
    assert parse_integers(text, 8, "--ksa-window-chunks") == expected


def test_letter_patterns():
    assert parse_letters("kkkf*2", "klf", 8, "--ksa-layer-pattern") == tuple("kkkfkkkf")
    assert parse_letters("(k*3+f)*2", "klf", 8, "--ksa-layer-pattern") == tuple("kkkfkkkf")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "__import__('os')",
        "[1]*3+",
        "[1]**2",
        "-1",
        "1.5",
        "(1",
        "1)",
        "[1]*[2]",
        "[]",
        "[1]*3",
        "[1]*99999999999",
        "k",
    ],
)
def test_bad_integer_patterns_name_the_flag(text):
    with pytest.raises(UsageError, match="--ksa-window-chunks") as error:
        parse_integers(text, 8, "--ksa-window-chunks")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "kkkx", "kkk", "K", "k*", "3", "__import__('os').system('true')"])
def test_bad_letter_patterns_name_the_flag(text):
    with pytest.raises(UsageError, match="--ksa-layer-pattern"):
        parse_letters(text, "klf", 8, "--ksa-layer-pattern")


def test_large_window_layers_see_the_whole_sequence():
    layers = KSAConfig(window_chunks="4", layer_pattern="klf").layers(3, 100)
    assert [layer.kind for layer in layers] == [LayerKind.KSA, LayerKind.LARGE_WINDOW, LayerKind.FULL]
    assert layers[0].window_chunks == 4 and layers[1].window_chunks * 8 >= 100


@pytest.mark.parametrize(
    ("length", "options", "nearest"),
    [(100, {}, "96 or 104"), (72, {"context_parallel": 2}, "64 or 96"), (24, {"sequence_parallel": 2}, "16 or 32")],
)
def test_length_that_cuts_a_chunk_names_the_nearest(length, options, nearest):
    with pytest.raises(UsageError, match=nearest):
        KSAConfig().check_sequence(length, **options)


def test_annealing_is_one_then_linear_then_zero():
    ksa = KSAConfig(anneal_start=10, anneal_end=20)
    assert [ksa.summary_coefficient(i) for i in (0, 10, 15, 20, 99)] == [1.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 0},
        {"summary_tokens": 0},
        {"anneal_start": 5},
        {"anneal_start": 5, "anneal_end": 5},
        {"anneal_start": 1, "anneal_end": 5, "independent_projections": False},
    ],
)
def test_settings_out_of_range(options):
    with pytest.raises(UsageError, match="--ksa-"):
        KSAConfig(**options)
