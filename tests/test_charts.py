"""Charts appear whole, or not at all."""

import io

import numpy as np
import pytest

from megatron_ksa.charts import chart, draw_seeds

PNG = b"\x89PNG"


def test_a_chart_is_written_when_it_is_drawn(tmp_path):
    with chart(tmp_path / "chart.png", columns=2, figsize=(3, 2)) as (_, (left, right)):
        draw_seeds(left, [1, 2, 3], np.array([[1.0, 3.0], [2.0, 4.0], [5.0, 5.0]]), "arm", "#222222")
        bold, *thin = left.get_lines()
        assert list(bold.get_ydata()) == [2.0, 3.0, 5.0] and len(thin) == 2
        assert {line.get_color() for line in left.get_lines()} == {"#222222"}
        draw_seeds(right, [1], np.array([[1.0]]), "arm")
    assert (tmp_path / "chart.png").read_bytes().startswith(PNG)
    with chart(stream := io.BytesIO()):
        pass
    assert stream.getvalue().startswith(PNG)


def test_an_error_while_drawing_leaves_the_chart_before(tmp_path):
    (tmp_path / "chart.png").write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), chart(tmp_path / "chart.png"):
        raise ZeroDivisionError
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]
